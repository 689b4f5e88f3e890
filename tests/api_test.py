"""The public API, run from the page and the notebook that show it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import mipnerf360
import numpy as np
import program_runner
import pytest
import tiny

from internal import configs, errors
from internal.commands import demo_scene

ROOT = Path(__file__).resolve().parents[1]
SCENE = ('--width', '32', '--height', '24', '--images', '9')
BINDINGS = [
  'Config.batch_size = 64', 'Config.render_chunk_size = 64', 'NerfMLP.grid_levels = 2',
  'PropMLP.grid_levels = 2', 'PropMLP.grid_max_resolution = 64',
]  # fmt: skip
SMALL = f'bindings={BINDINGS}'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A working folder that has the demo scene already, small."""
  folder = tmp_path_factory.mktemp('api')
  demo_scene.main([str(folder / 'demo_scene'), *SCENE])
  return folder


def _run(code: str, folder: Path, steps: str) -> str:
  """Runs code as a program of its own, with a smaller scene, batch and number of steps."""
  smaller = code.replace(
    "make_demo_scene('demo_scene')", "make_demo_scene('demo_scene', 32, 24, 9)"
  )
  smaller = smaller.replace("data_dir='demo_scene',", f"data_dir='demo_scene', {SMALL},")
  smaller = re.sub(steps, r'\g<1>4', smaller)
  assert smaller.count('32, 24, 9') == smaller.count(SMALL) == 1
  file = folder / 'program.py'
  file.write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r}); import internal\n{smaller}')
  env = {**os.environ, 'XLA_FLAGS': program_runner.xla_flags(1), 'MPLBACKEND': 'agg'}
  done = subprocess.run(
    [sys.executable, file], cwd=folder, env=env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def test_the_page_runs(folder):
  blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'api.md').read_text(), re.DOTALL)
  program, *others = blocks
  inside = ''.join('  ' + line for block in others for line in block.splitlines(keepends=True))
  check = "  assert image['rgb'].shape == (36, 48, 3) and features.shape == (1, 8, 504)\n"
  said = _run(program + inside + check, folder, r'(max_steps=)500')
  assert 'mean of 2 images at step 4' in said


@pytest.mark.hammer
def test_the_notebook_runs(folder):
  cells = json.loads((ROOT / 'notebooks' / 'quickstart.ipynb').read_text())['cells']
  code = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
  check = '\nassert [s for s, _ in progress] == [1, 4] and restored.step == 4\n'
  said = _run(code + check, folder, r'(STEPS = )1500')
  assert 'mean of 2 images at step 4' in said


@pytest.fixture(scope='module')
def trained(folder, tmp_path_factory):
  """A run of three steps, and the steps that its callback was called after."""
  steps, run = [], str(tmp_path_factory.mktemp('run'))
  settings = mipnerf360.load_settings(
    bindings=[*tiny.TINY, 'Config.max_steps = 3'],
    data_dir=str(folder / 'demo_scene'),
    checkpoint_dir=run,
  )
  return mipnerf360.train(settings, on_step=lambda run: steps.append(run.step)), steps


@pytest.fixture
def run(trained):
  return trained[0]


class TestRun:
  def test_the_callback_follows_each_step(self, trained):
    run, steps = trained
    assert steps == [1, 2, 3]
    assert run.step == 3

  def test_names_rows_and_cameras_are_the_same(self, run):
    by_row = run.render(2)['rgb']
    np.testing.assert_array_equal(run.render(run.scene.names[2])['rgb'], by_row)
    one = jax.tree.map(lambda x: x[2:3], run.scene.cameras)
    np.testing.assert_array_equal(run.render(one)['rgb'], by_row)
    np.testing.assert_array_equal(run.render(2 - len(run.scene.names))['rgb'], by_row)

  def test_a_restored_run_renders_the_same(self, run):
    again = mipnerf360.load_run(run.folder)
    np.testing.assert_array_equal(again.render(0)['rgb'], run.render(0)['rgb'])
    assert again.metrics() == run.metrics()

  def test_unknown_cameras_are_refused(self, run):
    with pytest.raises(errors.UserError, match=r"'nobody.png' is not an image"):
      run.render('nobody.png')
    with pytest.raises(errors.UserError, match='row of the 9 images, got 9'):
      run.render(9)
    for camera in (1.5, run.scene.cameras.camtoworld[:1]):
      with pytest.raises(errors.UserError, match=f'camera must be .*{type(camera).__name__}'):
        run.render(camera)


@pytest.mark.parametrize('images', [0, -1])
def test_no_images_are_refused_before_results_are_lost(run, images):
  before = run.evaluate(images=1)
  file = Path(run.folder) / 'eval' / 'results.json'
  content = file.read_bytes()
  with pytest.raises(errors.UserError, match=f'at least 1, or None for all, got {images}'):
    run.evaluate(images=images)
  assert file.read_bytes() == content
  assert json.loads(content)['mean'] == before['mean']


def test_callbacks_cannot_be_between_steps(run):
  with pytest.raises(errors.UserError, match='every must be at least 1, got 0'):
    mipnerf360.train(run.settings, on_step=print, every=0)


def test_values_win_over_bindings_and_slips_are_named():
  settings = mipnerf360.load_settings(bindings=['Config.max_steps = 5'], max_steps=7)
  assert settings.config.max_steps == 7
  with pytest.raises(configs.ConfigError, match='max_steps'):
    mipnerf360.load_settings(max_step=7)


def test_paths_and_scalars_of_numpy_are_values_too(run):
  settings = mipnerf360.load_settings(
    Path('configs/demo.gin'), data_dir=Path('a b'), max_steps=np.int64(7), near=np.float32(0.5)
  )
  assert (settings.config.data_dir, settings.config.max_steps) == ('a b', 7)
  assert settings.config.near == 0.5
  again = mipnerf360.load_run(Path(run.folder), step=np.int64(run.step))
  assert again.step == run.step
  with pytest.raises(TypeError, match='integer'):
    mipnerf360.load_run(run.folder, step='3')


def test_configs_have_short_names_and_one_binding_needs_no_list(run):
  by_path = mipnerf360.load_settings('configs/demo.gin', bindings=['Config.seed = 5'])
  by_name = mipnerf360.load_settings('demo', bindings='Config.seed=5')
  assert by_name == by_path
  assert by_name.config.seed == 5
  assert mipnerf360.load_settings('paper') == mipnerf360.load_settings('configs/360.gin')
  assert mipnerf360.load_run(run.folder, bindings='Config.seed=5').settings.config.seed == 5
  with pytest.raises(configs.ConfigError, match=r'nope.*Use fast, grid, paper'):
    mipnerf360.load_settings('nope')
