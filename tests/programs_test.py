"""The three programs as users run them, on a tiny capture."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import captures
import numpy as np
import program_runner
import pytest

ROOT = Path(__file__).resolve().parents[1]

TINY = (
  'Config.max_steps = 12',
  'Config.print_every = 4',
  'Config.checkpoint_every = 6',
  'Config.train_render_every = 12',
  'Config.batch_size = 64',
  'Config.render_chunk_size = 256',
  'Config.render_path_frames = 5',
  'Model.num_prop_samples = 8',
  'Model.num_nerf_samples = 4',
  'PropMLP.net_depth = 2',
  'PropMLP.net_width = 16',
  'NerfMLP.net_depth = 2',
  'NerfMLP.net_width = 16',
)


def _arguments(*bindings, config='configs/360.gin', flags=()):
  configs = [f'--gin_configs={config}'] if config else []
  return [*configs, *(f'--gin_bindings={b}' for b in bindings), *flags]


def _run(program, *args, **kwargs):
  """Runs a program as users do."""
  done = subprocess.run(
    [sys.executable, program, *_arguments(*args, **kwargs)], cwd=ROOT, capture_output=True,
    text=True, env={**os.environ, 'XLA_FLAGS': program_runner.xla_flags(1)}, timeout=400,
    check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  return done


@pytest.fixture
def quick(runner, tmp_path):
  """Runs a program without paying for its imports; returns all that it prints."""

  def run(program, *args, code=0, env=None, **kwargs):
    output = tmp_path / f'output{len(list(tmp_path.glob("output*")))}'
    done = runner.start(program, _arguments(*args, **kwargs), output, **(env or {}))
    assert done.wait() == code, done.text()
    return done.text()

  return run


def _train_bindings(data, run, *more):
  here = (f"Config.data_dir = '{data}'", f"Config.checkpoint_dir = '{run}'", 'Config.factor = 0')
  return (*TINY, *here, *more)


def _one_line(text, *words):
  """The user's error is one line, without a traceback, and says all of `words`."""
  assert 'Traceback' not in text
  (line,) = (line for line in text.splitlines() if line.startswith('Error: '))
  for word in words:
    assert word in line, (word, text)


def _metrics(run, prefix='loss'):
  with open(Path(run) / 'metrics.jsonl') as f:
    return [row for row in map(json.loads, f) if prefix in row]


@pytest.fixture(scope='session')
def capture(tmp_path_factory):
  folder = tmp_path_factory.mktemp('capture')
  camera = ('PINHOLE', (30.0, 30.0, 16.0, 12.0))
  captures.write_colmap(folder, n=10, camera=camera, size=(32, 24))
  return folder


@pytest.fixture(scope='session')
def run(capture, tmp_path_factory):
  """A finished run, trained in two goes."""
  folder = tmp_path_factory.mktemp('run') / 'r'
  first = _run('train.py', *_train_bindings(capture, folder, 'Config.early_exit_steps = 6'))
  assert 'step 4/6' in ' '.join(first.stdout.split())
  assert re.search(r'first step after .* GB memory', first.stdout)
  second = _run('train.py', *_train_bindings(capture, folder))
  assert 'steps 6 to 12' in second.stdout
  return folder


def test_dry_run_reports_as_json_and_writes_nothing(capture, tmp_path):
  bindings = _train_bindings(capture, tmp_path / 'r')
  report = json.loads(_run('train.py', *bindings, flags=['--dry_run']).stdout)
  assert report['num_params'] > 1000
  assert report['batch_per_device'] == 64
  text = json.dumps(report).lower()
  for word in ('registered', 'missing', '32x24', 'pinhole', 'train', 'test', 'bytes', 'scale'):
    assert word in text, word
  assert not (tmp_path / 'r').exists()


@pytest.mark.parametrize(
  ('binding', 'text'),
  [
    ("Config.weight_decay_mults = {'nerf': 0.1}", 'weight_decay_mults names an unknown part'),
    ('Config.depth_loss_mult = 0.1', 'Config.depth_loss_mult needs points'),
    ('Model.num_glo_features = 4', 'num_glo_embeddings is 3, fewer than the 8'),
    ("Config.pixels_on = 'disk'", 'sparse/0/cameras.bin/x: cannot be written'),
  ],
)
def test_dry_run_refuses_the_settings_that_training_refuses(
  capture, tmp_path, quick, binding, text
):
  more = (
    'Model.num_glo_embeddings = 3',
    f"Config.pixel_cache_dir = '{capture}/sparse/0/cameras.bin/x'",
  )
  bindings = _train_bindings(capture, tmp_path / 'r', binding, *more)
  _one_line(quick('train', *bindings, flags=['--dry_run'], code=1), text)


@pytest.mark.parametrize('factor', [0, 2])
def test_dry_run_decodes_all_pictures(capture, tmp_path, quick, factor):
  folder = tmp_path / 'capture'
  shutil.copytree(capture, folder)
  for k in (0, 3):  # A test image and a training image.
    path = folder / f'images/{k:03}.png'
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  pixels = captures.pixels(5, (32, 24), 4)
  captures.save_image(str(folder / 'images/005.png'), pixels)
  bindings = _train_bindings(folder, tmp_path / 'r', f'Config.factor = {factor}')
  text = quick('train', *bindings, flags=['--dry_run'], code=1)
  _one_line(text, '000.png: cannot be read', "2 more cannot be used: '003.png', '005.png'.")
  assert not (folder / 'images_2').exists()


def test_train_leaves_metrics_checkpoints_renders_and_tensorboard(run):
  rows = _metrics(run)
  assert [r['step'] for r in rows] == [4, 6, 8, 12]
  assert all(np.isfinite(r['loss']) and r['rays_per_sec'] > 0 for r in rows)
  assert (run / 'config.gin').exists()
  assert (run / 'scene.json').exists()
  assert len(list((run / 'train_renders').glob('*.png'))) == 2  # A test image and its rays.
  assert list((run / 'tensorboard').glob('events*'))
  assert {p.name for p in (run / 'checkpoints').iterdir()} >= {'6', '12'}


def test_a_finished_run_has_nothing_to_do(run, capture, quick):
  assert 'Nothing to do' in quick('train', *_train_bindings(capture, run))


def test_a_finished_run_is_not_taken_for_one_with_other_settings(run, capture, quick):
  said = quick('train', *_train_bindings(capture, run, 'Config.lr_init = 0.5'), code=1)
  _one_line(said, str(run), 'Config.lr_init from', 'to 0.5', 'Set another')


def test_flags_resume_what_bindings_have_begun(run, capture, quick):
  bindings = [b for b in TINY if 'max_steps' not in b]
  flags = ['--data', str(capture), '--out', str(run), '--factor', '0', '--steps', '12']
  assert 'Nothing to do' in quick('train', *bindings, flags=flags)


def test_errors_name_the_flag_that_was_typed(capture, tmp_path, quick):
  def fails(*flags):
    return quick('train', *TINY, flags=flags, code=1)

  place = ('--out', str(tmp_path / 'r'))
  _one_line(fails('--data', '/no/such/folder', *place), '/no/such/folder', 'Set --data to')
  _one_line(fails('--data', str(capture), *place, '--factor', '-1'), '--factor must be at least 0')
  _one_line(fails('--data', str(capture)), 'Config.checkpoint_dir (--out) is not set')
  said = quick('eval', flags=[str(tmp_path)], config=None, code=1)
  _one_line(said, str(tmp_path), 'give the folder that train.py wrote as RUN')


def test_a_resumed_run_ends_like_an_uninterrupted_one(run, capture, tmp_path, quick):
  whole = tmp_path / 'whole'
  quick('train', *_train_bindings(capture, whole))
  a, b = _metrics(run)[-1], _metrics(whole)[-1]
  assert (a['step'], a['loss']) == (b['step'], b['loss'])


def test_eval_writes_results(run):
  done = _run('eval.py', f"Config.checkpoint_dir = '{run}'", config=None)
  results = json.loads((run / 'eval' / 'results.json').read_text())
  assert results['step'] == 12
  assert len(results['per_image']) == 2
  for name in ('psnr', 'ssim', 'cc_psnr', 'cc_ssim'):
    values = [image[name] for image in results['per_image']]
    np.testing.assert_allclose(results['mean'][name], np.mean(values), rtol=1e-6)
  assert results['protocol']
  assert len(list((run / 'eval').rglob('*.png'))) >= 6
  assert f'{results["mean"]["psnr"]:.2f}' in done.stdout


def test_render_needs_no_photographs_and_continues(run, tmp_path, quick):
  """Run on a copy of the run's folder whose config names a capture that is gone."""
  moved = tmp_path / 'moved'
  shutil.copytree(run, moved)
  config = moved / 'config.gin'
  config.write_text(re.sub(r'data_dir = .*(\n\s+.*)?', "data_dir = '/gone'", config.read_text()))
  _run('render.py', f"Config.checkpoint_dir = '{moved}'", config=None)
  frames = sorted((moved / 'render' / 'color').glob('*.png'))
  assert len(frames) == 5
  for name in ('color.mp4', 'depth.mp4'):
    assert (moved / 'render' / name).stat().st_size > 500
  kept = {f: f.stat().st_mtime_ns for f in frames}
  frames[2].unlink()
  (moved / 'render' / 'color.mp4').unlink()
  quick('render', f"Config.checkpoint_dir = '{moved}'", config=None)
  assert (moved / 'render' / 'color.mp4').exists()
  again = {f: f.stat().st_mtime_ns for f in frames}
  assert [f for f in frames if again[f] != kept[f]] == [frames[2]]


def test_eval_without_a_checkpoint_says_so(tmp_path, run, quick):
  said = quick('eval', f"Config.checkpoint_dir = '{tmp_path}'", config=None, code=1)
  _one_line(said, str(tmp_path), 'Train first')
  empty = tmp_path / 'empty'
  shutil.copytree(run, empty)
  shutil.rmtree(empty / 'checkpoints')
  said = quick('eval', f"Config.checkpoint_dir = '{empty}'", config=None, code=1)
  _one_line(said, 'No complete checkpoint', str(empty))


def test_eval_names_missing_photographs(run, quick):
  bindings = (f"Config.checkpoint_dir = '{run}'", "Config.data_dir = '/gone'")
  _one_line(quick('eval', *bindings, config=None, code=1), '/gone', 'Config.data_dir')


def test_errors_of_users_are_one_line(capture, run, tmp_path, quick):
  def fails(*bindings):
    return quick('train', *_train_bindings(capture, tmp_path / 'r', *bindings), code=1)

  _one_line(fails('Config.bach_size = 32'), 'bach_size', 'Config.batch_size')
  _one_line(fails("Config.data_dir = '/no/such/folder'"), '/no/such/folder')
  other = _train_bindings(capture, run, 'NerfMLP.net_width = 24', 'Config.max_steps = 14')
  said = quick('train', *other, code=1)
  _one_line(said, 'another architecture', 'nerf_mlp', '16', '24')


def test_a_batch_size_not_divisible_by_the_devices(capture, tmp_path, quick):
  bindings = _train_bindings(capture, tmp_path / 'r', 'Config.batch_size = 62')
  env = {'XLA_FLAGS': program_runner.xla_flags(4)}
  _one_line(quick('train', *bindings, code=1, env=env), '62', '4', 'divisible')
