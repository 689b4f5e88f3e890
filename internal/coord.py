"""Space warps and encodings.

Shapes: points `x` [..., 3]; Gaussians as `mean` [..., 3] and `cov` [..., 3, 3]; distances along
a ray as metric `t` and normalised `s` in [0, 1].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from . import math
from .errors import UserError

Array = jax.Array


def contract(x: Array) -> Array:
  """Contracts points towards the origin, into a ball of radius 2 (Eq. 10 of arXiv:2111.12077).

  With r = max(1, |x|), both branches of the equation are (2 - 1 / r) x / r, and the gradient is
  finite everywhere: r never nears zero, and the factor's derivative vanishes at r = 1.

  Args:
    x: [..., 3] points.

  Returns:
    [..., 3] points with norm below 2; those of norm up to 1 unchanged.
  """
  r_sq = jnp.maximum(1, jnp.sum(x**2, -1, keepdims=True))
  return x * ((2 * jnp.sqrt(r_sq) - 1) / r_sq)


def inv_contract(z: Array) -> Array:
  """The inverse of `contract`, for [..., 3] points with norm below 2."""
  r_sq = jnp.maximum(1, jnp.sum(z**2, -1, keepdims=True))
  return z / (2 * jnp.sqrt(r_sq) - r_sq)


_SMALLEST_RADIUS = (
  1e-3  # Of `donerf`: within it, about the middle of the scene, the warp is linear.
)


def donerf(x: Array) -> Array:
  """Shortens points to the square root of their length (DONeRF, arXiv:2103.03231).

  Lengths are in units of the scene, in which the cameras are within [-1, 1]^3: those of length 1
  stay. At 0, where the root's gradient is infinite, the warp is linear.

  Args:
    x: [..., 3] points.

  Returns:
    [..., 3] points.
  """
  r_sq = jnp.maximum(_SMALLEST_RADIUS**2, jnp.sum(x**2, -1, keepdims=True))
  return x * r_sq**-0.25


def inverted_sphere(x: Array) -> Array:
  """The direction and the inverse distance of points (NeRF++, arXiv:2010.07492, section 4).

  Args:
    x: [..., 3] points.

  Returns:
    [..., 4]: x / r and 1 / r with r = max(1, |x|), so that points within the sphere are x and 1.
  """
  inverse = jax.lax.rsqrt(jnp.maximum(1, jnp.sum(x**2, -1, keepdims=True)))
  return jnp.concatenate([x * inverse, inverse], -1)


def linearize(fn: Callable[[Array], Array], mean: Array, cov: Array) -> tuple[Array, Array]:
  """Pushes Gaussians through a warp by linearising it at their means (Eq. 9).

  The Jacobian is applied by jvp, first to the columns of `cov` and then to its rows, and never
  built. `fn` must act on each point by itself.

  Args:
    fn: [..., 3] -> [..., c].
    mean: [..., 3].
    cov: [..., 3, 3].

  Returns:
    (fn(mean) [..., c], J cov J^T [..., c, c]).
  """
  warped, jvp = jax.linearize(fn, mean)
  columns = jax.vmap(jvp, -1, -1)
  half = columns(cov)  # J cov
  return warped, columns(jnp.swapaxes(half, -1, -2))  # J (J cov)^T, symmetric.


# Pairs (g, its inverse) of Eq. 11. The power family is that of arXiv:2304.06706, lambda = -1.5.
_POWER = -1.5
_POWER_SCALE = abs(_POWER - 1)
_CURVES = {
  'identity': (lambda x: x, lambda x: x),
  'reciprocal': (lambda x: 1 / x, lambda x: 1 / x),
  'log': (jnp.log, jnp.exp),
  'piecewise': (
    lambda x: jnp.where(x < 1, 0.5 * x, 1 - 0.5 / jnp.maximum(x, 1)),
    lambda y: jnp.where(y < 0.5, 2 * y, 0.5 / jnp.maximum(1 - y, math.TINY)),
  ),
  'power': (
    lambda x: _POWER_SCALE / _POWER * ((x / _POWER_SCALE + 1) ** _POWER - 1),
    # Rounding may take the base below 0 at the far plane; held at 1e-20 it is far enough for any.
    lambda y: (
      _POWER_SCALE * (jnp.maximum(y * _POWER / _POWER_SCALE + 1, 1e-20) ** (1 / _POWER) - 1)
    ),
  ),
}


def ray_warps(
  name: str | None, near: float | Array, far: float | Array
) -> tuple[Callable, Callable]:
  """The maps between metric and normalised distance (Eq. 11).

  Args:
    name: 'reciprocal', 'log', 'identity' (or None), 'piecewise' or 'power'.
    near: the distance of s = 0.
    far: the distance of s = 1. Where near or far is an array, nothing is checked.

  Returns:
    (t_to_s, s_to_t), each from any shape to the same.

  Raises:
    ValueError: an unknown name, or distances that the curve does not take.
  """
  name = name or 'identity'
  if name not in _CURVES:
    raise UserError(f'ray warp must be one of {", ".join(_CURVES)}, got {name!r}.')
  known = not isinstance(near, Array) and not isinstance(far, Array)
  if known and not 0 <= near < far:
    raise UserError(f'ray warp needs 0 <= near < far, got near {near}, far {far}.')
  if known and near == 0 and name in ('reciprocal', 'log'):
    raise UserError(f'ray warp {name!r} needs near > 0; set Config.near, say to 0.1.')
  fwd, inv = _CURVES[name]
  g_near, g_far = fwd(jnp.float32(near)), fwd(jnp.float32(far))

  def t_to_s(t):
    return (fwd(t) - g_near) / (g_far - g_near)

  def s_to_t(s):
    return jnp.clip(inv(s * g_far + (1 - s) * g_near), near, far)

  return t_to_s, s_to_t


def lift_and_diagonalize(mean: Array, cov: Array, basis: Array) -> tuple[Array, Array]:
  """Projects Gaussians onto the columns of a basis, keeping the variances along them.

  Args:
    mean: [..., c].
    cov: [..., c, c].
    basis: [c, b].

  Returns:
    P^T mean [..., b] and diag(P^T cov P) [..., b].
  """
  basis = jnp.asarray(basis, mean.dtype)
  axes = len(basis)
  directions = basis.reshape((axes,) + (1,) * (mean.ndim - 1) + (-1,))
  # Written out, the sums join the work around them; as products on a GPU they would be calls.
  lifted = sum(mean[..., i, None] * directions[i] for i in range(axes))
  var = sum(
    cov[..., i, j, None] * (directions[i] * directions[j] * (1 if i == j else 2))
    for i in range(axes)
    for j in range(i, axes)
  )
  return lifted, jnp.maximum(var, 0)


# Angles are kept in turns, whose whole part is no matter, in two numbers: turns.hi is a product of
# 12 by 12 bits, so its fraction at every octave is exact; turns.lo is what that leaves out.
_TURN = 1 / (2 * np.pi)
_TURN_HI = 2608 / 2**14  # 12 bits.
_MAX_ANGLE = 2.0**40  # Float32 holds no fraction of a turn far beyond.

# sin(2 pi r) / r for |r| <= 1/4 as a polynomial in r^2, fitted at Chebyshev points: error 1e-10.
_SIN_QUARTER = (6.28318531, -41.3417019, 81.6052094, -76.703666, 41.9999608, -14.3368559)


def _to_turns(x: Array) -> tuple[Array, Array]:
  """x / (2 pi) as hi + lo."""
  x = jnp.clip(x, -_MAX_ANGLE, _MAX_ANGLE)
  leading = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=11)
  return leading * _TURN_HI, leading * (_TURN - _TURN_HI) + (x - leading) * _TURN


@jax.custom_jvp
def _sin_turns(turns: Array) -> Array:
  """sin of 2 pi times `turns`, in a few instructions that every device does at full rate."""
  turns -= jnp.round(turns)
  folded = 0.25 - jnp.abs(jnp.abs(turns) - 0.25)  # sin x = sin (pi - x)
  return jnp.sign(turns) * folded * math.polynomial(_SIN_QUARTER, folded**2)


@_sin_turns.defjvp
def _sin_turns_jvp(primals, tangents):
  (turns,), (tangent,) = primals, tangents
  return _sin_turns(turns), 2 * np.pi * _sin_turns(turns + 0.25) * tangent


def integrated_pos_enc(mean: Array, var: Array, min_deg: int, max_deg: int) -> Array:
  """Expected sines and cosines of Gaussian coordinates (arXiv:2103.13415, Eq. 14).

  Args:
    mean: [..., b] coordinates.
    var: [..., b] their variances.
    min_deg: l of the first frequency 2^l.
    max_deg: l after the last.

  Returns:
    [..., 2 * (max_deg - min_deg) * b]: all sines, then all cosines; by frequency, then by
    coordinate.
  """
  lead = (1,) * (mean.ndim - 1)
  scale = (2.0 ** jnp.arange(min_deg, max_deg, dtype=mean.dtype)).reshape(*lead, 1, -1, 1)
  phase = jnp.array([0, 0.25], mean.dtype).reshape(*lead, 2, 1, 1)  # Of sines, and of cosines.
  # Once for each coordinate: compilers would repeat what is before the barrier for each feature.
  hi, lo, fade = jax.lax.optimization_barrier((*_to_turns(mean), -0.5 * var))
  hi, lo, fade = (v[..., None, None, :] for v in (hi, lo, fade))
  turns = hi * scale
  turns = turns - jnp.round(turns) + lo * scale
  features = jnp.exp(fade * scale**2) * _sin_turns(turns + phase)  # [..., 2, deg, b]
  return features.reshape(*mean.shape[:-1], 2 * (max_deg - min_deg) * mean.shape[-1])


def pos_enc(x: Array, min_deg: int, max_deg: int, append_identity: bool = True) -> Array:
  """Plain sines and cosines of [..., c] coordinates, with x itself in front (NeRF, Eq. 4)."""
  features = integrated_pos_enc(x, jnp.zeros_like(x), min_deg, max_deg)
  return jnp.concatenate([x, features], -1) if append_identity else features
