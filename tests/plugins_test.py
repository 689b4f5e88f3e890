"""Extension points: plug-ins outside of the tree, and the examples of CONTRIBUTING.md."""

import argparse
import importlib
import os
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import captures
import jax
import jax.numpy as jnp
import numpy as np
import program_runner
import pytest
import tiny
from trajectory_test import make_scene

from internal import api, cli, configs, coord, datasets, knobs, losses, models, plugins, structs
from internal.commands import run_dataset, scaling
from internal.errors import UserError
from internal.experiments import runs, slurm
from internal.fields import encodings
from internal.fields.mlp import MLP
from internal.rendering import trajectory
from internal.training import runlog

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = dict(
  re.findall(
    r'^```python\n# my_package/(\w+)\.py\n(.*?)^```$',
    (ROOT / 'CONTRIBUTING.md').read_text(),
    re.MULTILINE | re.DOTALL,
  )
)


@pytest.fixture
def plug(tmp_path, monkeypatch):
  """Returns a function that writes a module into the working folder; forgets all plug-ins later."""
  tables = [(table, dict(table), dict(table.modules)) for table in plugins.TABLES]
  imported = set(sys.modules)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  monkeypatch.chdir(tmp_path)

  def write(name: str, text: str) -> str:
    (tmp_path / f'{name}.py').write_text(f'from mipnerf360 import plugins\n{text}\n')
    return name

  yield write
  for table, entries, modules in tables:
    for content, before in ((table, entries), (table.modules, modules)):
      content.clear()
      content.update(before)
  for name in set(sys.modules) - imported:
    if not name.startswith(('internal', 'mipnerf360')):
      del sys.modules[name]


def refused(call, *args) -> str:
  with pytest.raises(UserError) as e:
    call(*args)
  assert '\n' not in str(e.value)
  return str(e.value)


class TestTables:
  def test_choices_at_the_settings_are_the_built_in_entries(self):
    hints = {**typing.get_type_hints(configs.Config), **typing.get_type_hints(configs.Model)}
    hints |= typing.get_type_hints(configs.MLP)
    assert trajectory  # Imported for its entries.
    for table in (plugins.encoding, plugins.camera_path, plugins.ray_distance):
      parts = (hints[table.setting], *typing.get_args(hints[table.setting]))
      choices = next(typing.get_args(p) for p in parts if typing.get_origin(p) is typing.Literal)
      assert set(choices) == {*table} - {*table.plugged()}

  def test_a_name_taken_twice_names_both_modules(self, plug):
    plugins.load([plug('one', "plugins.loss('mine')(len)")])
    message = refused(plugins.load, [plug('two', "plugins.loss('mine')(len)")])
    assert message == "one and two both register a loss 'mine'; rename one."
    message = refused(plugins.load, [plug('three', "plugins.encoding('grid')(len)")])
    assert message.startswith('internal.fields.encodings and three')

  def test_a_module_may_be_loaded_again(self, plug):
    name = plug('one', "plugins.loss('mine')(len)")
    plugins.load([name])
    plugins.load([name])
    plugins.loss('other')(len)
    plugins.loss('other')(max)
    assert plugins.loss['other']([1, 3]) == 3
    assert plugins.loaded() == ('one', __name__)

  def test_a_package_stands_for_its_modules(self, plug, tmp_path):
    (tmp_path / 'mine').mkdir()
    plug('mine/part', "plugins.loss('mine')(len)")
    plug('mine/__init__', 'from . import part')
    plugins.load(['mine'])
    plugins.load(['mine'])
    assert plugins.loaded() == ('mine.part',)


class TestLoading:
  @pytest.mark.parametrize(
    ('text', 'words'),
    [
      (None, ('--plugins absent', 'ModuleNotFoundError', 'working folder')),
      ('raise SystemExit(0)', ('--plugins broken', 'SystemExit')),
      ('1 / 0', ('--plugins broken', 'ZeroDivisionError', '--debug')),
      ('x = 1', ('--plugins broken', 'registers nothing', '@plugins.encoding')),
      ('from mipnerf360 import nothing_like_it', ('--plugins broken', 'ImportError', 'Correct')),
      ('import absent', ("No module named 'absent'). Correct the module; --debug",)),
      ('import absent.part', ("No module named 'absent'). Correct the module; --debug",)),
    ],
  )
  def test_unusable_modules_are_one_line_errors(self, plug, text, words):
    name = 'absent' if text is None else plug('broken', text)
    for _ in range(2):
      message = refused(plugins.load, [name])
      assert all(word in message for word in words), message

  @pytest.mark.parametrize('name', ['json', '', '.relative', 'my_field.py', 'runs/mine'])
  def test_names_that_are_no_plugins(self, plug, name):
    assert f'--plugins {name}: ' in refused(plugins.load, [name])

  def test_paths_of_files_hint_at_the_module(self, plug, tmp_path):
    (tmp_path / 'mine').mkdir()
    plug('mine/field', "plugins.loss('mine')(len)")
    name = 'is a path. Give the name of the module, '
    for path in ('mine/field.py', './mine/field.py', str(tmp_path / 'mine' / 'field.py')):
      assert refused(plugins.load, [path]) == f'--plugins {path}: {name}mine.field.'
    assert refused(plugins.load, ['field.py']) == f'--plugins field.py: {name}field.'
    message = refused(plugins.load, ['/elsewhere/field.py'])
    assert message.endswith(f'{name}field, and add /elsewhere to PYTHONPATH.')
    assert plugins.loaded() == ()

  def test_the_flag_loads_before_settings_are_read(self, plug):
    names = [plug(name, f"plugins.ray_distance('{name}')(lambda: (len, len))") for name in 'ab']
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    args = parser.parse_args(['--plugins', *names, '--gin_bindings', "Model.raydist_fn = 'b'"])
    settings = configs.load_config([], args.gin_bindings)
    assert settings.model.raydist_fn == 'b'
    assert settings.config.plugins == ('a', 'b')
    assert plugins.flags() == ['--plugins', 'a', 'b']

  def test_a_gin_file_imports_nothing(self, plug, tmp_path, monkeypatch):
    plug('trap', "open('sprung', 'w').close()\nplugins.loss('trap')(len)")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'config.gin').write_text("Config.plugins = ('trap', 'other')\n")
    message = refused(configs.load_config, ['config.gin'])
    assert message.startswith('config.gin needs plug-ins that are not loaded: trap, other. ')
    assert 'Add --plugins trap other to' in message
    assert not (tmp_path / 'sprung').exists()
    for value in ("'trap'", '3', '(1,)'):
      refused(configs.load_config, [], [f'Config.plugins = {value}'])

  def test_settings_read_back(self, plug, tmp_path):
    plugins.load([plug('one', "plugins.loss('mine')(len)\nplugins.encoding('mine')(len)")])
    bindings = ["Config.loss_mults = {'mine': 2}", "NerfMLP.encoding = 'mine'"]
    bindings += ["NerfMLP.encoding_options = {'a': 1, 'b': 'text'}"]
    first = configs.load_config([], bindings)
    (tmp_path / 'config.gin').write_text(first.text)
    assert configs.load_config(['config.gin']) == first
    assert configs.load_config(['config.gin'], ['Config.plugins = ()']).config.plugins == ('one',)

  def test_other_programs_get_the_flag(self, plug, monkeypatch, tmp_path):
    plugins.load([plug('one', "plugins.loss('mine')(len)")])
    (run,) = runs.make_runs('a', '.', [], ["Config.loss_mults = {'mine': 1}"])
    job = runs.make_job(run)
    for command in job.commands:
      assert command[-2:] == ('--plugins', 'one')
    args = run_dataset.parse(['--dataset', '360', '--root', 'r', '--slurm'])
    task = run_dataset.task(args, '.')
    slurm.write(args, [types.SimpleNamespace(name='a', folder='out/a')], '.', task)
    assert ' --plugins one --only ' in (tmp_path / 'slurm.sh').read_text()
    started = []
    monkeypatch.setattr(scaling.subprocess, 'run', lambda command, **_: started.append(command))
    args = types.SimpleNamespace(platform='cpu', gin_bindings=[], scene_steps=1)
    scaling.dataset_seconds('a.gin', 'folder', ['a'], args)
    at = started[0].index('--plugins')
    assert started[0][at + 1] == 'one'


class TestChoices:
  @pytest.mark.parametrize(
    ('binding', 'words'),
    [
      ("NerfMLP.encoding = 'nope'", "'ipe', 'grid', 'mine'"),
      ("Model.raydist_fn = 'nope'", "'power', None, 'mine'"),
      ("Config.render_path_type = 'nope'", "'dolly', None, 'mine'"),
      ("Config.loss_mults = {'nope': 1.0}", "losses ('mine')"),
      ("Config.loss_mults = {'distortion': 1.0}", "losses ('mine')"),
      ("Config.loss_mults = {'mine': 'x'}", 'must be a dictionary from text to numbers'),
      ("Config.loss_mults = {'mine': 1e999}", 'finite'),
    ],
  )
  def test_messages_list_plugins(self, plug, binding, words):
    points = ('encoding', 'ray_distance', 'camera_path', 'loss')
    plugins.load([plug('one', '\n'.join(f"plugins.{p}('mine')(len)" for p in points))])
    assert words in refused(configs.load_config, [], [binding])

  def test_a_loss_without_multiplier_is_not_computed(self, plug):
    calls = []
    plugins.loss('mine')(lambda inputs: calls.append(inputs) or jnp.mean(inputs.renderings[-1].rgb))
    t, w = jnp.linspace(0.0, 1, 5)[None], jnp.ones((1, 4)) / 4
    rgb = jnp.full((1, 3), 0.5)
    history = [structs.RayHistory(t, t, w, None)] * 2
    rendering = structs.Rendering(rgb, w[:, 0], w[:, 0], w[:, :3])

    def total(**mults):
      config = configs.Config(loss_mults=mults)
      return losses.total(config, {}, [rendering] * 2, history, structs.Batch(None, rgb))

    before, terms = total(mine=0.0)
    assert 'mine' not in terms
    assert calls == []
    after, terms = total(mine=-3.0)
    assert terms['mine'] == -1.5
    assert after == before - 1.5
    assert calls[0].history is history

  @pytest.mark.parametrize(
    ('value', 'got'),
    [(jnp.ones(3), 'an array [3]'), (None, 'None'), ('x', "'x'"), ((1, jnp.ones(2)), '(1, an ')],
  )
  def test_losses_that_are_no_scalars_are_named(self, plug, value, got):
    plugins.loss('mine')(lambda inputs: value)
    message = refused(plugins.loss['mine'], None)
    assert message.startswith(f"The loss 'mine' of {__name__} must return a scalar, got {got}")

  def test_losses_may_be_python_numbers(self, plug):
    plugins.loss('mine')(lambda inputs: 0.25)
    t, w, rgb = jnp.linspace(0.0, 1, 5)[None], jnp.ones((1, 4)) / 4, jnp.full((1, 3), 0.5)
    rendering = structs.Rendering(rgb, w[:, 0], w[:, 0], w[:, :3])
    history = [structs.RayHistory(t, t, w, None)] * 2
    config = configs.Config(loss_mults={'mine': 2.0})
    _, terms = losses.total(config, {}, [rendering] * 2, history, structs.Batch(None, rgb))
    assert isinstance(terms['mine'], jax.Array)
    assert terms['mine'] == 0.5

  def test_datasets_without_a_scene_are_named(self, plug):
    plugins.dataset('mine')(lambda config, read_only: None)
    config = configs.Config(dataset_loader='mine')
    rule = 'must return a datasets.scenes.Scene, got None.'
    assert refused(datasets.load_dataset, config) == f"The dataset 'mine' of {__name__} {rule}"

  @pytest.mark.parametrize('value', [jnp.sqrt, None, (jnp.sqrt,), (jnp.sqrt, 2.0)])
  def test_ray_distances_without_an_inverse_are_named(self, plug, value):
    plugins.ray_distance('mine')(lambda: value)
    message = refused(coord.ray_warps, 'mine', 1.0, 2.0)
    rule = 'must return two functions, g and its inverse, got '
    assert message.startswith(f"The ray distance 'mine' of {__name__} {rule}")
    assert 'raydist_options' in refused(coord.ray_warps, 'mine', 1.0, 2.0, {'lam': 1})

  def test_encodings_of_another_shape_are_named(self, plug):
    gaussians = structs.Gaussians(jnp.zeros((2, 5, 6, 3)), jnp.zeros((2, 5, 6, 3, 3)))

    def message(multisampled=False):
      field = MLP(configs.NerfMLP(encoding='mine', net_depth=1), multisampled=multisampled)
      return refused(field.init, jax.random.key(0), None, gaussians)

    value = gaussians.mean[..., 0]

    @plugins.encoding('mine')
    class Mine(encodings.Encoding):
      def __call__(self, gaussians):
        return value

    rule = 'must return features [2, 5, 6, f] for means [2, 5, 6, 3]'
    text = f"The encoding 'mine' of {__name__} {rule}, got "
    assert message() == f'{text}an array [2, 5, 6].'
    value = gaussians.mean[:1]
    assert message() == message(True) == f'{text}an array [1, 5, 6, 3].'
    value = None
    assert message() == f'{text}None.'
    plugins.encoding('mine')(len)
    assert 'must be a subclass of fields.encodings.Encoding, got <built-in' in message()

  def test_encodings_average_multisamples(self, plug):
    @plugins.encoding('mine')
    class Mine(encodings.Encoding):
      power: int = 1

      def __call__(self, gaussians):
        return gaussians.mean**self.power

    config = configs.NerfMLP(encoding='mine', encoding_options={'power': 2}, net_depth=1)
    rng = np.random.default_rng(0)
    mean = jnp.float32(rng.normal(size=(2, 5, 6, 3)))
    many = structs.Gaussians(mean, jnp.zeros((2, 5, 6, 3, 3)))
    one = structs.Gaussians(jnp.sqrt(jnp.mean(mean**2, -2)), jnp.zeros((2, 5, 3, 3)))
    fields = [MLP(config, multisampled=m) for m in (True, False)]
    params = fields[0].init(jax.random.key(0), None, many)
    assert params['params']['trunk_0']['kernel'].shape == (3, 256)
    for a, b in zip(fields[0].apply(params, None, many), fields[1].apply(params, None, one)):
      np.testing.assert_allclose(a, b, rtol=1e-4)

  def test_wrong_options_are_named(self):
    settings = tiny.settings("NerfMLP.encoding_options = {'levls': 3}")
    message = refused(lambda: models.init_params(models.build(settings), jax.random.key(0)))
    assert 'NerfMLP.encoding_options' in message
    assert 'levls' in message

  def test_malformed_paths_are_refused(self, plug):
    plugins.camera_path('mine')(lambda config, scene: np.zeros((3, 4)))
    config = configs.Config(render_path_type='mine')
    message = refused(trajectory.make_path, config, make_scene())
    assert message.startswith(f"The camera path 'mine' of {__name__} must return poses [n, 3, 4]")
    assert message.endswith('got an array [3, 4].')
    poses = np.tile(np.eye(3, 4), (2, 1, 1))
    for wrong in (None, [[1], [1, 2]], (poses, np.ones(3)), (poses,) * 3, poses[:0]):
      plugins.camera_path('mine')(lambda config, scene, wrong=wrong: wrong)
      assert "The camera path 'mine'" in refused(trajectory.make_path, config, make_scene())
    plugins.camera_path('mine')(lambda config, scene: np.full((2, 3, 4), np.nan))
    assert 'Pose 0 contains NaN' in refused(trajectory.make_path, config, make_scene())
    zoom = np.array([1.0, 2.0])
    plugins.camera_path('mine')(lambda config, scene: (scene.cameras.camtoworld[:2], zoom))
    cams, _ = trajectory.make_path(config, make_scene())
    pixels = np.asarray(cams.pixtocam[:, 0, 0])
    np.testing.assert_allclose(pixels[0], 2 * pixels[1], rtol=1e-6)


# The examples of CONTRIBUTING.md.

BINDINGS = (
  'Config.max_steps = 6',
  'Config.print_every = 3',
  'Config.train_render_every = 0',
  'Config.batch_size = 64',
  'Config.render_chunk_size = 256',
  'Config.render_path_frames = 3',
  'Config.factor = 0',
  'Model.num_levels = 2',
  'Model.num_prop_samples = 8',
  'Model.num_nerf_samples = 4',
  'PropMLP.net_depth = 1',
  'PropMLP.net_width = 16',
  'NerfMLP.net_depth = 2',
  'NerfMLP.net_width = 16',
  "NerfMLP.encoding = 'fourier'",
  "NerfMLP.encoding_options = {'features': 24}",
  "Config.loss_mults = {'clear_air': 0.01}",
  "Config.dataset_loader = 'npz_poses'",
  "Model.raydist_fn = 'sqrt'",
)
TRAINED_WITH = [f'my_package.my_{what}' for what in ('distance', 'field', 'format', 'loss')]


@pytest.fixture(scope='module')
def project(tmp_path_factory):
  """A folder outside of the tree with the package of CONTRIBUTING.md and a capture for it."""
  folder = tmp_path_factory.mktemp('project')
  (folder / 'my_package').mkdir()
  for name, text in EXAMPLES.items():
    (folder / 'my_package' / f'{name}.py').write_text(text)
  poses = captures.circle_poses(9)
  for i in range(len(poses)):
    captures.save_image(folder / 'data' / 'images' / f'{i}.png', captures.pixels(i, (16, 12)))
  intrinsics = np.array([[20.0, 0, 8], [0, 20, 6], [0, 0, 1]])
  np.savez(folder / 'data' / 'cameras.npz', poses=poses, intrinsics=intrinsics)
  return folder


def run(project, program, *args, code=0):
  """Runs a program of the checkout from the project's folder; returns its output."""
  done = subprocess.run(
    [sys.executable, ROOT / program, *args], cwd=project, capture_output=True, text=True,
    env={**os.environ, 'XLA_FLAGS': program_runner.xla_flags(1)}, timeout=400, check=False,
  )  # fmt: skip
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope='module')
def trained(project):
  """A run of the project with the encoding, loss, dataset and ray distance of CONTRIBUTING.md."""
  here = ("Config.data_dir = 'data'", "Config.checkpoint_dir = 'run'")
  flags = ['--gin_configs', 'configs/360.gin', '--gin_bindings', *BINDINGS, *here]
  run(project, 'train.py', '--plugins', *TRAINED_WITH, *flags)
  return project / 'run'


def test_examples_are_short():
  assert EXAMPLES.keys() == {'my_field', 'my_loss', 'my_format', 'my_path', 'my_distance'}
  for text in EXAMPLES.values():
    assert len(text.splitlines()) < 30


def test_training_with_plugins(trained):
  rows = [row for row in runlog.read_metrics(trained / 'metrics.jsonl') if 'loss' in row]
  assert [row['step'] for row in rows] == [3, 6]
  for row in rows:
    assert row['loss_clear_air'] >= 0
    terms = sum(value for name, value in row.items() if name.startswith('loss_'))
    assert row['loss'] == pytest.approx(terms, rel=1e-5)
  text = (trained / 'config.gin').read_text()
  assert all(repr(name) in text for name in TRAINED_WITH)


def test_their_settings_are_listed(project):
  modules = ('my_package.my_field', 'my_package.my_loss', 'my_package.my_path')
  out = run(project, 'train.py', '--list_knobs', '--plugins', *modules)
  assert "NerfMLP.encoding_options['scale'] = 4.0\n" in out
  assert 'Standard deviation of the initial frequencies. [a number]' in ' '.join(out.split())
  assert "Config.loss_mults['clear_air']" in out
  assert "'ipe' or 'grid' or 'fourier'" in ' '.join(out.split())
  assert "Config.render_path_type = 'figure_eight'" in ' '.join(out.split())


def test_their_own_gin_configurables_are_listed_and_set(plug):
  plug(
    'mine',
    """import dataclasses
import gin

@gin.configurable
@dataclasses.dataclass
class Mine:
  \"\"\"My own settings.\"\"\"

  depth: int = 3  # How deep.

@plugins.loss('mine')
def mine(inputs):
  return Mine().depth
""",
  )
  before = dict(configs.gin.config._REGISTRY._selector_map)
  try:
    plugins.load(['mine'])
    assert 'Mine.depth = 3\n      How deep. [a whole number]' in knobs.listing('deep')
    configs.load_config((), ['Mine.depth=4'])
  finally:
    configs.gin.config._REGISTRY._selector_map = before


def test_reopening_a_run_needs_its_plugins(project, trained):
  error = run(project, 'render.py', '--checkpoint_dir', 'run', code=1)
  assert error.splitlines()[-1].startswith('Error: run/config.gin needs plug-ins')
  assert f'--plugins {" ".join(TRAINED_WITH)} ' in error
  assert 'Traceback' not in error
  path = "Config.render_path_type = 'figure_eight'"
  args = ('--checkpoint_dir', 'run', '--plugins', *TRAINED_WITH, 'my_package.my_path')
  run(project, 'render.py', *args, '--gin_bindings', path)
  assert len(list((trained / 'render' / 'color').glob('*.png'))) == 3


def test_the_api_needs_no_flag(project, trained, plug, monkeypatch):
  with pytest.raises(plugins.PluginError, match=r'my_package\.my_loss'):
    api.load_run(str(trained))
  monkeypatch.syspath_prepend(project)
  for name in TRAINED_WITH:
    importlib.import_module(name)
  image = api.load_run(str(trained)).render(0)['rgb']
  assert image.shape == (12, 16, 3)
  assert np.isfinite(image).all()
