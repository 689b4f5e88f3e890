"""Runs that end before their time go on as if nothing had been: processes, signalled and killed."""

import json
import os
import signal
import socket

import captures
import jax
import lives
import numpy as np
import pytest
import tiny

from internal import checkpoints

STEPS = 60
SMALLEST = (
  f'Config.max_steps = {STEPS}',
  'Config.print_every = 7',
  'Config.checkpoint_every = 10',
  'Config.train_render_every = 0',
  'Config.batch_size = 8',
  'Config.factor = 0',
  'Config.render_chunk_size = 64',
  'Config.render_path_frames = 40',
  'Model.num_levels = 2',
  'Model.num_prop_samples = 4',
  'Model.num_nerf_samples = 4',
  'PropMLP.net_depth = 1',
  'PropMLP.net_width = 8',
  'PropMLP.max_deg_point = 2',
  'NerfMLP.net_depth = 1',
  'NerfMLP.net_width = 8',
  'NerfMLP.max_deg_point = 2',
  'NerfMLP.net_width_viewdirs = 8',
  'NerfMLP.bottleneck_width = 8',
)
_TIMES = ('time', 'train_seconds', 'rays_per_sec', 'test_seconds')


@pytest.fixture(scope='module')
def nursery():
  flags = '--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0'
  keep = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  nursery = lives.Nursery({**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags, **keep})
  yield nursery
  nursery.close()


@pytest.fixture(scope='module')
def capture(tmp_path_factory):
  folder = tmp_path_factory.mktemp('capture')
  captures.write_colmap(folder, n=18, camera=('PINHOLE', (20.0, 20.0, 8.0, 8.0)), size=(16, 16))
  return folder


@pytest.fixture(scope='module')
def train(nursery, capture):
  """Starts a life of train.py in a folder."""

  def start(run, *bindings, **kwargs):
    here = (f"Config.data_dir = '{capture}'", f"Config.checkpoint_dir = '{run}'")
    args = ('--gin_configs=configs/360.gin', '--gin_bindings', *SMALLEST, *here, *bindings)
    return nursery.start('train', args, **{'said': f'{run}.said', **kwargs})

  return start


@pytest.fixture(scope='module')
def whole(train, tmp_path_factory):
  """A run that nobody interrupts."""
  run = tmp_path_factory.mktemp('whole') / 'run'
  life = train(run)
  assert life.wait() == 0, life.text()
  return run


def metrics(run):
  """The lines of metrics.jsonl without what a clock has measured."""
  rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  return [{k: v for k, v in row.items() if k not in _TIMES} for row in rows]


def same(a, b):
  """Whether parameters, optimizer state and metrics of two finished runs are equal."""
  states = []
  for run in (a, b):
    settings, _ = checkpoints.open_run(str(run))
    assert checkpoints.newest(str(run)) == settings.config.last_step
    state = checkpoints.restore(str(run), settings, tiny.mesh(1), settings.config.last_step)
    states.append(jax.tree.map(np.asarray, state))
  equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), *states)
  return all(jax.tree.leaves(equal)) and metrics(a) == metrics(b)


class TestSignals:
  def test_training_saves_and_says_where_and_goes_on(self, train, whole, tmp_path):
    run, start = tmp_path / 'run', 0
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
      life = train(run, said=f'{run}.{signum.name}')
      assert life.until(lambda life=life: 'first step' in life.text())
      life.kill(signum)
      assert life.wait() == code, life.text()
      assert f'steps {start} to {STEPS}' in life.text()
      start = checkpoints.newest(str(run))
      assert 0 < start < STEPS
      assert f'step {start} is saved in {run}; the same command goes on' in life.text()
      assert life.text().endswith(f'Stopped by {signum.name}.\n')
    assert train(run).wait() == 0
    assert same(run, whole)

  def test_one_process_signalled_is_enough(self, train, tmp_path):
    run = tmp_path / 'run'
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    told = {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}', 'JAX_NUM_PROCESSES': '2'}
    bindings = ('Config.max_steps = 100000', 'Config.checkpoint_every = 100000')
    pair = [
      train(run, *bindings, JAX_PROCESS_ID='0', **told),
      train(run, *bindings, JAX_PROCESS_ID='1', **told),
    ]
    assert pair[0].until(lambda: 'step       7/' in pair[0].text())
    pair[1].kill(signal.SIGTERM)
    assert [life.wait() for life in pair] == [143, 143], pair[0].text()
    (step,) = checkpoints.all_steps(str(run))
    assert step % 7 == 0
    assert f'step {step:,} is saved' in pair[0].text()

  @pytest.mark.parametrize(
    ('program', 'begun', 'made'),
    [('eval', '1/3 ', 'eval/results.json'), ('render', 'frames of', 'render/color.mp4')],
  )
  def test_eval_and_render_leave_nothing_half_written(self, nursery, whole, program, begun, made):
    said = whole.parent / f'{program}.said'
    life = nursery.start(program, ['--checkpoint_dir', str(whole)], said)
    assert life.until(lambda: begun in life.text())
    life.kill(signal.SIGTERM)
    assert life.wait() == 143, life.text()
    assert life.text().endswith('Stopped by SIGTERM.\n')
    assert not (whole / made).exists()
    assert not list(whole.rglob('*.part*'))
    assert nursery.start(program, ['--checkpoint_dir', str(whole)], said).wait() == 0
    assert (whole / made).exists()
