"""Space warps, ray-distance warps and positional encodings.

Notation: points `x` [..., 3]; Gaussians `mean` [..., 3] and `cov` [..., 3, 3]; along a ray, metric
distance `t` and normalised distance `s` in [0, 1]. `...` is any batch shape.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from . import math, plugins
from .errors import UserError

Array = jax.Array


def contract(x: Array) -> Array:
  """Contracts points towards the origin, into a ball of radius 2 (Eq. 10 of arXiv:2111.12077).

  contract(x) = x if |x| <= 1, otherwise (2 - 1 / |x|) x / |x|. In float32, values are right up to
  |x| = 1e19 and gradients up to 1e9, beyond the largest `Config.far`; farther points overflow.

  Args:
    x: [..., 3] points in world units.

  Returns:
    [..., 3] points with norm below 2. Points with norm at most 1 are unchanged.
  """
  # With r = max(1, |x|) one expression serves both branches, and the root is never taken at 0.
  r_sq = jnp.maximum(1, jnp.sum(x**2, -1, keepdims=True))  # [..., 1]
  return x * ((2 * jnp.sqrt(r_sq) - 1) / r_sq)


def inv_contract(z: Array) -> Array:
  """Maps contracted points back to the world: the inverse of `contract`.

  Args:
    z: [..., 3] points with norm below 2.

  Returns:
    [..., 3] points in world units.
  """
  r_sq = jnp.maximum(1, jnp.sum(z**2, -1, keepdims=True))  # [..., 1]
  return z / (2 * jnp.sqrt(r_sq) - r_sq)  # |x| = 1 / (2 - |z|)


_SMALLEST_RADIUS = 1e-3  # `donerf` is linear within it: at 0 the root's gradient is infinite.


def donerf(x: Array) -> Array:
  """Warps points by the square root of their distance from the origin (DONeRF, arXiv:2103.03231).

  donerf(x) = x / sqrt(|x|), and linear for |x| < 1e-3. Points with norm 1 are unchanged.

  Args:
    x: [..., 3] points in normalised world units (all cameras in [-1, 1]^3).

  Returns:
    [..., 3] points with norm sqrt(|x|).
  """
  r_sq = jnp.maximum(_SMALLEST_RADIUS**2, jnp.sum(x**2, -1, keepdims=True))
  return x * r_sq**-0.25


def inverted_sphere(x: Array) -> Array:
  """Parametrises points by direction and inverse distance (NeRF++, arXiv:2010.07492, section 4).

  Args:
    x: [..., 3] points in world units.

  Returns:
    [..., 4]: (x / r, 1 / r) with r = max(1, |x|). Points inside the unit sphere become (x, 1).
  """
  inverse = jax.lax.rsqrt(jnp.maximum(1, jnp.sum(x**2, -1, keepdims=True)))
  return jnp.concatenate([x * inverse, inverse], -1)


def linearize(fn: Callable[[Array], Array], mean: Array, cov: Array) -> tuple[Array, Array]:
  """Maps Gaussians through a warp linearised at their means (Eq. 9 of arXiv:2111.12077).

  Args:
    fn: warp from [..., 3] to [..., c] that acts on each point separately, such as `contract`.
    mean: [..., 3] means.
    cov: [..., 3, 3] covariances.

  Returns:
    (fn(mean) [..., c], J cov J^T [..., c, c]) with J the Jacobian of fn at the mean.
  """
  # Jacobian-vector products with the columns of cov never build J.
  warped, jvp = jax.linearize(fn, mean)
  columns = jax.vmap(jvp, -1, -1)
  half = columns(cov)  # [..., c, 3], J cov
  return warped, columns(jnp.swapaxes(half, -1, -2))  # [..., c, c], J (J cov)^T


def power_ladder(lam: float = -1.5, scale: float = 1.0) -> tuple[Callable, Callable]:
  """Returns the power ladder g(t) = P(scale t, lam) and its inverse (arXiv:2304.06706).

  P(x, lam) = |lam - 1| / lam ((x / |lam - 1| + 1)^lam - 1), for x >= 0 (arXiv:2502.12140). It is x
  at lam = 1, and in the limits log(1 + x) at 0, exp(x) - 1 at infinity and 1 - exp(-x) at minus
  infinity. Its slope at x = 0 is 1; with lam below 1 it flattens with x.

  Both functions are elementwise. Rounding costs 1e-7 / |lam|: instead of |lam| < 0.01, use 0.

  Args:
    lam: the exponent lambda.
    scale: factor on distances, positive.

  Raises:
    UserError: scale is not positive, or lam is not a number.
  """
  if not scale > 0 or lam != lam:
    raise UserError(f'The power ladder needs scale > 0 and a number lam, got {scale} and {lam}.')
  limits = {
    1: (lambda t: scale * t, lambda y: y / scale),
    0: (lambda t: jnp.log1p(scale * t), lambda y: jnp.expm1(y) / scale),
    np.inf: (lambda t: jnp.expm1(scale * t), lambda y: jnp.log1p(y) / scale),
    # Rounding can take y to 1 at the far plane, where the logarithm would be infinite.
    -np.inf: (
      lambda t: -jnp.expm1(-scale * t),
      lambda y: -jnp.log1p(-jnp.minimum(y, 1 - math.EPS)) / scale,
    ),
  }
  if lam in limits:
    return limits[lam]
  size = abs(lam - 1)
  unit = size / scale
  # Rounding can take the base below 0 at the far plane, where the power would be NaN. This bound is
  # passed where the distance is beyond 1e13 units.
  least = 10 ** min(0, max(-20, 40 / 3 * lam))
  return (
    lambda t: size / lam * ((t / unit + 1) ** lam - 1),
    lambda y: unit * (jnp.maximum(y * lam / size + 1, least) ** (1 / lam) - 1),
  )


# Pairs (g, inverse of g) for Eq. 11.
for _name, _curve in {
  'identity': (lambda x: x, lambda x: x),
  'reciprocal': (lambda x: 1 / x, lambda x: 1 / x),
  'log': (jnp.log, jnp.exp),
  'piecewise': (
    lambda x: jnp.where(x < 1, 0.5 * x, 1 - 0.5 / jnp.maximum(x, 1)),
    lambda y: jnp.where(y < 0.5, 2 * y, 0.5 / jnp.maximum(1 - y, math.TINY)),
  ),
}.items():
  plugins.ray_distance(_name)(functools.partial(tuple, _curve))
plugins.ray_distance('power')(power_ladder)


def ray_warps(
  name: str | None,
  near: float | Array,
  far: float | Array,
  options: Mapping[str, object] | None = None,
) -> tuple[Callable, Callable]:
  """Returns the maps between metric and normalised ray distance (Eq. 11 of arXiv:2111.12077).

  s = (g(t) - g(near)) / (g(far) - g(near)), where the curve g is chosen by name.

  Args:
    name: 'reciprocal' (linear in disparity), 'log', 'identity' (or None), 'piecewise' (linear up
      to t = 1, then in disparity), 'power' (`power_ladder`), or another in plugins.ray_distance.
    near: metric distance at s = 0.
    far: metric distance at s = 1. The bounds are checked only if neither is a JAX array.
    options: arguments of the curve, such as `power_ladder`'s.

  Returns:
    (t_to_s, s_to_t), elementwise functions of arrays of any shape. s_to_t is clipped to
    [near, far].

  Raises:
    UserError: the name is unknown, the curve has no such options, not 0 <= near < far, or near is 0
      with 'reciprocal' or 'log'.
  """
  name = name or 'identity'
  if name not in plugins.ray_distance:
    known = ', '.join(plugins.ray_distance)
    raise UserError(f'The ray warp must be one of {known}, got {name!r}.')
  known = not isinstance(near, Array) and not isinstance(far, Array)
  if known and not 0 <= near < far:
    raise UserError(f'Ray warps require 0 <= near < far, got near {near} and far {far}.')
  if known and near == 0 and name in ('reciprocal', 'log'):
    raise UserError(f'Ray warp {name!r} requires near > 0; set Config.near, for example to 0.1.')
  try:
    fwd, inv = plugins.ray_distance[name](**(options or {}))
  except TypeError as e:
    raise UserError(
      f'Model.raydist_options must be arguments of the ray distance {name!r}, got {options} ({e}).'
    ) from None
  g_near, g_far = fwd(jnp.float32(near)), fwd(jnp.float32(far))

  def t_to_s(t):
    return (fwd(t) - g_near) / (g_far - g_near)

  def s_to_t(s):
    return jnp.clip(inv(s * g_far + (1 - s) * g_near), near, far)

  return t_to_s, s_to_t


def lift_and_diagonalize(mean: Array, cov: Array, basis: Array) -> tuple[Array, Array]:
  """Projects Gaussians onto the columns of a basis (arXiv:2111.12077, section 2).

  Keeps the variances along the directions and drops the correlations between them.

  Args:
    mean: [..., c] means.
    cov: [..., c, c] symmetric covariances.
    basis: [c, b] directions P as columns, for example from `geopoly.generate_basis`.

  Returns:
    (P^T mean [..., b], diag(P^T cov P) [..., b]). Variances are clipped at 0.
  """
  basis = jnp.asarray(basis, mean.dtype)
  axes = len(basis)
  directions = basis.reshape((axes,) + (1,) * (mean.ndim - 1) + (-1,))  # [c, 1, ..., b]
  # XLA fuses explicit sums with the operations around them; a matmul would be a separate kernel.
  lifted = sum(mean[..., i, None] * directions[i] for i in range(axes))  # [..., b]
  var = sum(
    cov[..., i, j, None] * (directions[i] * directions[j] * (1 if i == j else 2))
    for i in range(axes)
    for j in range(i, axes)
  )
  return lifted, jnp.maximum(var, 0)  # Rounding can take the variance of a flat Gaussian below 0.


# Angles are in turns, so that range reduction drops the integer part. A turn count is hi + lo: hi
# is a product of two 12-bit numbers, exact in float32 at every octave; lo is the remainder.
_TURN = 1 / (2 * np.pi)
_TURN_HI = 2608 / 2**14  # 12 bits of _TURN.
_MAX_ANGLE = 2.0**40  # Far larger float32 angles have no fraction of a turn.

# sin(2 pi r) / r for |r| <= 1/4 as a polynomial in r^2, fitted at Chebyshev points: error 1e-10.
_SIN_QUARTER = (6.28318531, -41.3417019, 81.6052094, -76.703666, 41.9999608, -14.3368559)


def to_turns(x: Array) -> tuple[Array, Array]:
  """Converts radians to turns, as a sum (hi, lo)."""
  x = jnp.clip(x, -_MAX_ANGLE, _MAX_ANGLE)
  leading = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=11)  # 12 bits.
  return leading * _TURN_HI, leading * (_TURN - _TURN_HI) + (x - leading) * _TURN


@jax.custom_jvp
def sin_turns(turns: Array) -> Array:
  """Computes sin(2 pi turns) in a few multiply-adds, faster than the library's sine."""
  turns -= jnp.round(turns)
  folded = 0.25 - jnp.abs(jnp.abs(turns) - 0.25)  # sin x = sin (pi - x)
  return jnp.sign(turns) * folded * math.polynomial(_SIN_QUARTER, folded**2)


@sin_turns.defjvp
def sin_turns_jvp(primals, tangents):
  (turns,), (tangent,) = primals, tangents
  return sin_turns(turns), 2 * np.pi * sin_turns(turns + 0.25) * tangent


def integrated_pos_enc(mean: Array, var: Array, min_deg: int, max_deg: int) -> Array:
  """Computes expected sines and cosines of Gaussian coordinates (arXiv:2103.13415, Eq. 14).

  E[sin(2^l x)] = exp(-4^l var / 2) sin(2^l mean) for x ~ N(mean, var), and likewise for cos.

  Args:
    mean: [..., b] means of the coordinates.
    var: [..., b] variances.
    min_deg: exponent l of the lowest frequency 2^l.
    max_deg: exponent after that of the highest frequency.

  Returns:
    [..., 2 * (max_deg - min_deg) * b] features in [-1, 1]: all sines, then all cosines; each
    ordered by frequency, then by coordinate.
  """
  lead = (1,) * (mean.ndim - 1)
  scale = (2.0 ** jnp.arange(min_deg, max_deg, dtype=mean.dtype)).reshape(*lead, 1, -1, 1)
  phase = jnp.array([0, 0.25], mean.dtype).reshape(*lead, 2, 1, 1)  # cos is sin a quarter on.
  # Without the barrier compilers recompute the per-coordinate values for every feature.
  hi, lo, fade = jax.lax.optimization_barrier((*to_turns(mean), -0.5 * var))
  hi, lo, fade = (v[..., None, None, :] for v in (hi, lo, fade))  # [..., 1, 1, b]
  turns = hi * scale  # [..., 1, deg, b]
  turns = turns - jnp.round(turns) + lo * scale
  features = jnp.exp(fade * scale**2) * sin_turns(turns + phase)  # [..., 2, deg, b]
  return features.reshape(*mean.shape[:-1], 2 * (max_deg - min_deg) * mean.shape[-1])


def pos_enc(x: Array, min_deg: int, max_deg: int, append_identity: bool = True) -> Array:
  """Computes sines and cosines of coordinates (NeRF, arXiv:2003.08934, Eq. 4).

  Args:
    x: [..., c] coordinates.
    min_deg: exponent l of the lowest frequency 2^l.
    max_deg: exponent after that of the highest frequency.
    append_identity: whether x itself comes first.

  Returns:
    [..., 2 * (max_deg - min_deg) * c] features as in `integrated_pos_enc`, with [..., c] more in
    front if `append_identity`.
  """
  features = integrated_pos_enc(x, jnp.zeros_like(x), min_deg, max_deg)
  return jnp.concatenate([x, features], -1) if append_identity else features
