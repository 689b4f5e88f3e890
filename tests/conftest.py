"""Eight virtual CPU devices, shape slips are errors, and no program is compiled twice."""

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

import jax  # noqa: E402  The variables above must be set first.

jax.config.update('jax_numpy_rank_promotion', 'raise')
