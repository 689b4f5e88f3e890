"""Numerical primitives that stay finite, in value and in gradient, and batched random numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

PI = float(np.pi)
TINY = float(np.finfo(np.float32).tiny)
EPS = float(np.finfo(np.float32).eps)
SMALL = 1e-18  # Lower bound of divisors. Gradients square them, and TINY^2 underflows.
_MAX_EXP = 88.0  # exp(89) overflows float32.
_MAX = float(np.finfo(np.float32).max)


def safe_sin(x: Array) -> Array:
  """Computes sin(x), finite also for infinite x, which is clipped to the largest float32."""
  return jnp.sin(jnp.clip(x, -_MAX, _MAX))


@jax.custom_jvp
def safe_exp(x: Array) -> Array:
  """Computes exp(min(x, 88)). The derivative equals the value, so it does not vanish above 88."""
  return jnp.exp(jnp.minimum(x, _MAX_EXP))


@safe_exp.defjvp
def _safe_exp_jvp(primals, tangents):
  y = safe_exp(primals[0])
  return y, y * tangents[0]


_MAX_SLOPE_EXP = 15.0  # exp(15) is 3e6.


@jax.custom_jvp
def truncated_exp(x: Array) -> Array:
  """Computes exp(min(x, 88)) with the derivative exp(min(x, 15)), which cannot overflow a product.

  Gradients are exact up to x = 15 and too small beyond, but of the right sign.
  """
  return safe_exp(x)


@truncated_exp.defjvp
def _truncated_exp_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  return truncated_exp(x), jnp.exp(jnp.minimum(x, _MAX_SLOPE_EXP)) * dx


@jax.custom_jvp
def scale_gradient(x: Array, factor: Array) -> Array:
  """Returns x, bit for bit; its gradient is multiplied by `factor`, which gets none itself."""
  return x


@scale_gradient.defjvp
def _scale_gradient_jvp(primals, tangents):
  x, factor = primals
  return x, factor * tangents[0]


def safe_log(x: Array) -> Array:
  """Computes log(max(x, smallest normal float32)), so that log(0) is about -87."""
  # `where`, because the gradient of `maximum` would multiply 0 by an overflowed 1 / TINY.
  return jnp.log(jnp.where(x > TINY, x, TINY))


def polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
  """Evaluates sum_k coefficients[k] x^k by Horner's rule, for x of any shape."""
  total = jnp.full_like(x, coefficients[-1])
  for c in coefficients[-2::-1]:
    total = total * x + c
  return total


def narrow_dot(x: Array, matrix: Array) -> Array:
  """Multiplies x [..., a] by a float32 matrix [a, b] with few columns, in float32.

  A sum for each column reads x once; a matmul on GPUs would first write a float32 copy of x.

  Returns:
    [..., b] float32.
  """
  row = (1,) * (x.ndim - 1) + (-1,)
  columns = [x.astype(jnp.float32) * matrix[:, i].reshape(row) for i in range(matrix.shape[1])]
  return jnp.stack([jnp.sum(c, -1) for c in columns], -1)


def log_lerp(t: Array, v0: float, v1: float) -> Array:
  """Interpolates log-linearly: v0^(1 - t) v1^t, with t (any shape) clipped to [0, 1].

  Raises:
    ValueError: v0 or v1 is not positive.
  """
  if v0 <= 0 or v1 <= 0:
    raise ValueError(f'log_lerp requires positive v0 and v1, got {v0} and {v1}.')
  return jnp.exp(jnp.log(v0) + jnp.clip(t, 0, 1) * (jnp.log(v1) - jnp.log(v0)))


def num_below(knots: Array, x: Array) -> Array:
  """Counts the knots that are at most x, by a binary search with unrolled steps.

  Args:
    knots: [..., n] ascending.
    x: [..., m]

  Returns:
    [..., m] int32 counts in [0, n].
  """
  n = knots.shape[-1]
  count = jnp.zeros(x.shape, jnp.int32)
  for bit in reversed(range(n.bit_length())):
    longer = count + (1 << bit)
    below = pick(knots, jnp.minimum(longer, n) - 1) <= x
    count = jnp.where((longer <= n) & below, longer, count)
  return count


def pick(values: Array, index: Array) -> Array:
  """Returns values [..., n] at indices [..., m] along the last axis, which must be in [0, n)."""
  return jnp.take_along_axis(values, index, -1, mode='promise_in_bounds')


def sorted_interp(x: Array, xp: Array, fp: Array) -> Array:
  """Interpolates a non-decreasing function linearly: `np.interp` along the last axis.

  Args:
    x: [..., m] points to evaluate.
    xp: [..., n] knots, ascending; ties are jumps.
    fp: [..., n] values at the knots, ascending.

  Returns:
    [..., m] values; outside the knots the nearest end of fp; NaN beside a knot that is NaN.
  """
  x0, x1, f0, f1 = by_platform(_bracket_by_mask, _bracket_by_search)(x, xp, fp)
  width = x1 - x0
  flat = width <= 0  # False for NaN, which must not look like a tie.
  offset = jnp.where(flat, 0, (x - x0) / jnp.where(flat, 1, width))
  return f0 + jnp.clip(offset, 0, 1) * (f1 - f0)


def by_platform(dense: Callable, indexed: Callable) -> Callable:
  """Returns a function that runs `dense` on TPUs, where gathers are slow, otherwise `indexed`."""
  return lambda *args: jax.lax.platform_dependent(*args, tpu=dense, default=indexed)


def _bracket_by_search(x: Array, xp: Array, fp: Array) -> tuple[Array, ...]:
  """Returns the knots and values on both sides of x: (x0, x1, f0, f1), [..., m] each."""
  after = num_below(xp, x)
  lo, hi = jnp.maximum(after - 1, 0), jnp.minimum(after, xp.shape[-1] - 1)
  return pick(xp, lo), pick(xp, hi), pick(fp, lo), pick(fp, hi)


def _bracket_by_mask(x: Array, xp: Array, fp: Array) -> tuple[Array, ...]:
  """Computes `_bracket_by_search` with masked maxima and minima, without a gather."""
  below = xp[..., None, :] <= x[..., :, None]  # [..., m, n]

  def bracket(v):
    v = v[..., None, :]
    lo = jnp.max(jnp.where(below, v, v[..., :1]), -1)
    hi = jnp.min(jnp.where(below, v[..., -1:], v), -1)
    return lo, hi

  return *bracket(xp), *bracket(fp)


def split_keys(key: Array | None, num: int) -> tuple[Array | None, ...]:
  """Splits one key, or each key of an array, into `num` of the same shape; None into Nones."""
  if key is None:
    return (None,) * num
  key = _typed(key)
  keys = _map_axes(lambda k: jax.random.split(k, num), key.ndim)(key)
  return tuple(keys[..., i] for i in range(num))


def fold_in(key: Array, data: int) -> Array:
  """Folds an integer into one key or into each key of an array, as `jax.random.fold_in`."""
  key = _typed(key)
  return _map_axes(lambda k: jax.random.fold_in(k, data), key.ndim)(key)


def draw(sampler: Callable, key: Array, shape: tuple[int, ...], *args, **kwargs) -> Array:
  """Draws random numbers from one key, or a part of them from each key of an array.

  Args:
    sampler: called as `sampler(key, shape, *args, **kwargs)`, such as `jax.random.uniform`.
    key: one key, or an array of keys whose shape is a prefix of `shape`.
    shape: shape of the result.
    *args: passed to `sampler`, as is `**kwargs`.

  Returns:
    An array of `shape`. The part that a key draws does not depend on the other keys.
  """
  key = _typed(key)
  return _map_axes(lambda k: sampler(k, shape[key.ndim :], *args, **kwargs), key.ndim)(key)


def _typed(key: Array) -> Array:
  """Wraps raw keys (`jax.random.PRNGKey`), so that `key.shape` is the batch shape."""
  raw = not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  return jax.random.wrap_key_data(key) if raw else key


def _map_axes(fn: Callable, axes: int) -> Callable:
  """Maps `fn` over the first `axes` axes."""
  for _ in range(axes):
    fn = jax.vmap(fn)
  return fn
