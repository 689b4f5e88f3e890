"""Safe primitives: finite in value and in gradient wherever the pipeline can call them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

PI = float(np.pi)
TINY = float(np.finfo(np.float32).tiny)
EPS = float(np.finfo(np.float32).eps)
SMALL = 1e-18  # Guards divisors: gradients have their square, and TINY^2 is no float32.
_MAX_EXP = 88.0  # exp(88) is the last whole power that float32 holds.
_MAX = float(np.finfo(np.float32).max)


def safe_sin(x: Array) -> Array:
  """sin(x) with infinities held at float32's largest number, so that the result is finite."""
  return jnp.sin(jnp.clip(x, -_MAX, _MAX))


@jax.custom_jvp
def safe_exp(x: Array) -> Array:
  """exp(x), held at exp(88) above 88; its derivative is itself, so it never vanishes there."""
  return jnp.exp(jnp.minimum(x, _MAX_EXP))


@safe_exp.defjvp
def _safe_exp_jvp(primals, tangents):
  y = safe_exp(primals[0])
  return y, y * tangents[0]


def safe_log(x: Array) -> Array:
  """log(x), with x held at the smallest normal float32, so that log(0) is about -87."""
  # Not maximum, whose gradient is a product: 0 times a gradient of 1 / TINY that overflowed.
  return jnp.log(jnp.where(x > TINY, x, TINY))


def polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
  """Evaluates sum_k coefficients[k] x^k by Horner's rule, for x of any shape."""
  total = jnp.full_like(x, coefficients[-1])
  for c in coefficients[-2::-1]:
    total = total * x + c
  return total


def narrow_dot(x: Array, matrix: Array) -> Array:
  """[..., a] of any type times [a, b] float32 with few columns, in float32: one sum for each.

  As a product, GPUs would first write x out in float32.
  """
  row = (1,) * (x.ndim - 1) + (-1,)
  columns = [x.astype(jnp.float32) * matrix[:, i].reshape(row) for i in range(matrix.shape[1])]
  return jnp.stack([jnp.sum(c, -1) for c in columns], -1)


def log_lerp(t: Array, v0: float, v1: float) -> Array:
  """Interpolates between v0 (t = 0) and v1 (t = 1) on a log scale; t is clipped to [0, 1].

  Raises:
    ValueError: v0 or v1 is not positive.
  """
  if v0 <= 0 or v1 <= 0:
    raise ValueError(f'log_lerp needs positive end points, got {v0} and {v1}.')
  return jnp.exp(jnp.log(v0) + jnp.clip(t, 0, 1) * (jnp.log(v1) - jnp.log(v0)))


def num_below(knots: Array, x: Array) -> Array:
  """How many knots [..., n], ascending, are at most x [..., m]: [..., m] int32.

  A binary search for all at once, its steps unrolled.
  """
  n = knots.shape[-1]
  count = jnp.zeros(x.shape, jnp.int32)
  for bit in reversed(range(n.bit_length())):
    longer = count + (1 << bit)
    below = pick(knots, jnp.minimum(longer, n) - 1) <= x
    count = jnp.where((longer <= n) & below, longer, count)
  return count


def pick(values: Array, index: Array) -> Array:
  """values [..., n] at [..., m] indices along the last axis, which must be in [0, n)."""
  return jnp.take_along_axis(values, index, -1, mode='promise_in_bounds')


def sorted_interp(x: Array, xp: Array, fp: Array) -> Array:
  """Piecewise-linear interpolation of a monotone function.

  As `np.interp` along the last axis, for xp and fp that both ascend (ties allowed).

  Args:
    x: [..., m] where to evaluate.
    xp: [..., n] knots, ascending.
    fp: [..., n] values at the knots, ascending.

  Returns:
    [..., m] values, held at fp's ends outside xp.
  """
  x0, x1, f0, f1 = by_platform(_bracket_by_mask, _bracket_by_search)(x, xp, fp)
  width = x1 - x0
  offset = jnp.where(width > 0, (x - x0) / jnp.where(width > 0, width, 1), 0)
  return f0 + jnp.clip(offset, 0, 1) * (f1 - f0)


def by_platform(dense: Callable, indexed: Callable) -> Callable:
  """Of two twins the one for the platform: TPUs are slow at lookups, others at comparing all."""
  return lambda *args: jax.lax.platform_dependent(*args, tpu=dense, default=indexed)


def _bracket_by_search(x: Array, xp: Array, fp: Array) -> tuple[Array, ...]:
  """The knots and values on either side of x."""
  after = num_below(xp, x)
  lo, hi = jnp.maximum(after - 1, 0), jnp.minimum(after, xp.shape[-1] - 1)
  return pick(xp, lo), pick(xp, hi), pick(fp, lo), pick(fp, hi)


def _bracket_by_mask(x: Array, xp: Array, fp: Array) -> tuple[Array, ...]:
  """The same without a lookup, as masked maxima and minima."""
  below = xp[..., None, :] <= x[..., :, None]  # [..., m, n]

  def bracket(v):
    v = v[..., None, :]
    lo = jnp.max(jnp.where(below, v, v[..., :1]), -1)
    hi = jnp.min(jnp.where(below, v[..., -1:], v), -1)
    return lo, hi

  return *bracket(xp), *bracket(fp)


def split_keys(key: Array | None, num: int) -> tuple[Array | None, ...]:
  """`num` keys, each of key's shape (one key, or an array of keys); `num` times None of None."""
  if key is None:
    return (None,) * num
  key = _typed(key)
  keys = _map_axes(lambda k: jax.random.split(k, num), key.ndim)(key)
  return tuple(keys[..., i] for i in range(num))


def fold_in(key: Array, data: int) -> Array:
  """Another key for each of key's, for draws of another kind."""
  key = _typed(key)
  return _map_axes(lambda k: jax.random.fold_in(k, data), key.ndim)(key)


def draw(sampler: Callable, key: Array, shape: tuple[int, ...], *args, **kwargs) -> Array:
  """Random numbers of `shape`: from one key for all, or from an array of keys each its own part.

  `sampler(key, shape, *args, **kwargs)` is a function like jax.random.uniform. An array's shape
  is the beginning of `shape`; what its keys draw does not depend on which keys stand beside them.
  """
  key = _typed(key)
  return _map_axes(lambda k: sampler(k, shape[key.ndim :], *args, **kwargs), key.ndim)(key)


def _typed(key: Array) -> Array:
  """Keys whose shape is that of the keys: not so a raw one, of jax.random.PRNGKey."""
  raw = not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  return jax.random.wrap_key_data(key) if raw else key


def _map_axes(fn: Callable, axes: int) -> Callable:
  """`fn`, mapped over the leading axes."""
  for _ in range(axes):
    fn = jax.vmap(fn)
  return fn
