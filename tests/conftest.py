"""Eight virtual CPU devices, shape slips are errors, and no program is compiled twice."""

import gc
import os
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=8'
  + ' --xla_backend_optimization_level=0'  # Compiling takes most of the tests' time.
)
# Shared with the subprocesses that the tests start.
_CACHE = tempfile.TemporaryDirectory(prefix='jax_cache_')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', _CACHE.name)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')

import captures  # noqa: E402  The variables above must be set first.
import jax  # noqa: E402
import lives  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
gc.set_threshold(50_000)  # Looking for garbage often takes a third of JAX's tracing.


@pytest.fixture(scope='session')
def nursery():
  """Where short runs of the programs come from."""
  keep = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  told = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': lives.ONE_DEVICE, **keep}
  nursery = lives.Nursery({**os.environ, **told})
  yield nursery
  nursery.close()


@pytest.fixture(scope='session')
def small_capture(tmp_path_factory):
  """What short runs are trained on."""
  folder = tmp_path_factory.mktemp('capture')
  captures.write_colmap(folder, n=18, camera=('PINHOLE', (20.0, 20.0, 8.0, 8.0)), size=(16, 16))
  return folder


@pytest.fixture(scope='session')
def start_training(nursery, small_capture):
  """Starts a life of train.py in a folder."""

  def start(run, *bindings, **kwargs):
    args = lives.arguments(small_capture, run, *bindings)
    return nursery.start('train', args, **{'said': f'{run}.said', **kwargs})

  return start
