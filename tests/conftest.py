"""Sets up eight virtual CPU devices, strict rank promotion and a shared compilation cache."""

import gc
import os
import tempfile

import program_runner

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {program_runner.xla_flags(8)}'
# Shared with the subprocesses that the tests start.
_CACHE = tempfile.TemporaryDirectory(prefix='jax_cache_')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', _CACHE.name)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')

import captures  # noqa: E402  The variables above must be set first.
import gcs_server  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
gc.set_threshold(50_000)  # Frequent collections take a third of the time of tracing.


# The files that take longest start first, so that no core waits for the last of them.
_FIRST = ('viewer_page_test', 'processes_test', 'train_step_test', 'resume_test', 'knobs_test')


def pytest_collection_modifyitems(config, items):
  """Leaves long tests to scripts/hammer.sh, which sets HAMMER=1; moves long files to the front."""
  if not os.environ.get('HAMMER'):
    long = [item for item in items if item.get_closest_marker('hammer')]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]
  items.sort(key=lambda item: item.path.stem not in _FIRST)


@pytest.fixture(scope='session')
def runner():
  """Starts train.py, eval.py and render.py as short processes."""
  env = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': program_runner.xla_flags(1)}
  env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  runner = program_runner.ProgramRunner({**os.environ, **env})
  yield runner
  runner.close()


@pytest.fixture
def stand_in():
  """A local stand-in of Cloud Storage: its bucket, and the environment of programs that use it."""
  with gcs_server.serving() as served:
    yield served


@pytest.fixture(scope='session')
def small_capture(tmp_path_factory):
  """A small capture for short runs."""
  folder = tmp_path_factory.mktemp('capture')
  captures.write_colmap(folder, n=18, camera=('PINHOLE', (20.0, 20.0, 8.0, 8.0)), size=(16, 16))
  return folder


@pytest.fixture(scope='session')
def start_training(runner, small_capture):
  """Starts train.py on the small capture, in a given run folder."""

  def start(run, *bindings, **kwargs):
    args = program_runner.arguments(small_capture, run, *bindings)
    return runner.start('train', args, **{'output': f'{run}.output', **kwargs})

  return start


@pytest.fixture(scope='module')
def whole(start_training, tmp_path_factory):
  """An uninterrupted run."""
  run = tmp_path_factory.mktemp('whole') / 'run'
  program = start_training(run)
  assert program.wait() == 0, program.text()
  return run
