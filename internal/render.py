"""Gaussians along a ray, and compositing.

`tdist` [..., n + 1] are metric endpoints; per-ray quantities are [..., 3] or [..., 1]; weights
[..., n].
"""

import jax
import jax.numpy as jnp

from . import math, stepfun, structs
from .errors import UserError

Array = jax.Array


def _conical_frustum(t0: Array, t1: Array, radii: Array) -> tuple[Array, Array, Array]:
  """Moments of a conical frustum along and across its axis (arXiv:2103.13415, Eq. 7).

  In mid-point and half-width, so that thin and far frusta keep their digits.
  """
  mid, half = (t0 + t1) / 2, (t1 - t0) / 2
  slant = half / jnp.maximum(mid, math.SMALL)  # In [0, 1]: squares of tiny t would underflow.
  ratio = slant**2 / (3 + slant**2)
  t_mean = mid + 2 * mid * ratio
  t_var = half**2 / 3 - (4 / 15) * ratio**2 * (12 * mid**2 - half**2)
  r_var = radii**2 * (mid**2 / 4 + (5 / 12) * half**2 - (4 / 15) * ratio * half**2)
  return t_mean, t_var, r_var


def _cylinder(t0: Array, t1: Array, radii: Array) -> tuple[Array, Array, Array]:
  """Moments of a cylinder along and across its axis."""
  t_mean = (t0 + t1) / 2
  return t_mean, (t1 - t0) ** 2 / 12, jnp.broadcast_to(radii**2 / 4, t_mean.shape)


_SHAPES = {'cone': _conical_frustum, 'cylinder': _cylinder}


def _moments(tdist: Array, radii: Array, ray_shape: str) -> tuple[Array, Array, Array]:
  """Means along, and variances along and across the axis, of each interval: [..., n] each."""
  if ray_shape not in _SHAPES:
    raise UserError(f'ray_shape must be one of {", ".join(_SHAPES)}, got {ray_shape!r}.')
  return _SHAPES[ray_shape](tdist[..., :-1], tdist[..., 1:], radii)


def cast_rays(
  tdist: Array, origins: Array, directions: Array, radii: Array, ray_shape: str
) -> structs.Gaussians:
  """A Gaussian with the mean and covariance of each interval of each ray's cone.

  Args:
    tdist: [..., n + 1] metric endpoints.
    origins: [..., 3].
    directions: [..., 3], not normalised.
    radii: [..., 1] radius of the cone at t = 1 (of the cylinder anywhere).
    ray_shape: 'cone' or 'cylinder'.

  Returns:
    Gaussians: mean [..., n, 3], cov [..., n, 3, 3], in world space.

  Raises:
    ValueError: an unknown ray shape.
  """
  t_mean, t_var, r_var = _moments(tdist, radii, ray_shape)
  d = directions[..., None, :]  # [..., 1, 3]
  outer = d[..., :, None] * d[..., None, :]  # [..., 1, 3, 3]
  norm_sq = jnp.sum(d**2, -1)[..., None, None]
  norm_sq = jnp.where(norm_sq > 0, norm_sq, 1)  # A ray that goes nowhere has outer = 0.
  across = jnp.broadcast_to(jnp.eye(3, dtype=d.dtype), outer.shape) - outer / norm_sq
  cov = t_var[..., None, None] * outer + r_var[..., None, None] * across
  return structs.Gaussians(origins[..., None, :] + t_mean[..., None] * d, cov)


# The pattern of Zip-NeRF's six points: angles, and distances along the axis from the mean.
_ANGLES = (0, 2 * math.PI / 3, 4 * math.PI / 3, math.PI, 5 * math.PI / 3, math.PI / 3)
_ALONG = (-1, -0.6, -0.2, 0.2, 0.6, 1)
_SCALE = 0.5  # Of a point's Gaussian, in units of its distance from the axis.


def multisample(
  key: Array | None,
  tdist: Array,
  origins: Array,
  directions: Array,
  radii: Array,
  ray_shape: str,
) -> structs.Gaussians:
  """Six small isotropic Gaussians for each interval of each ray: arXiv:2304.06706, multisampling.

  Their centres stand in a hexagon around the ray, spread over the interval so that their mean is
  the frustum's, as are their variances along and across the ray (the latter averaged over angles).

  Args:
    key: PRNG key, or [...] keys, to turn and mirror each pattern at random; None turns every other
      one by 30 degrees and mirrors it.
    tdist: [..., n + 1] metric endpoints.
    origins: [..., 3].
    directions: [..., 3], not normalised.
    radii: [..., 1] radius of the cone at t = 1 (of the cylinder anywhere).
    ray_shape: 'cone' or 'cylinder'.

  Returns:
    Gaussians: mean [..., n, 6, 3], cov [..., n, 6, 3, 3], in world space.

  Raises:
    ValueError: an unknown ray shape.
  """
  t_mean, _, _ = _moments(tdist, radii, ray_shape)
  mid, half = (tdist[..., :-1] + tdist[..., 1:]) / 2, jnp.diff(tdist) / 2
  ratio = (half / jnp.maximum(mid, math.SMALL)) ** 2 if ray_shape == 'cone' else 0.0
  reach = half * (3 / 7**0.5) * ((1 - ratio) ** 2 + 4) ** 0.5 / (3 + ratio)
  shape = (1,) * t_mean.ndim + (6,)
  along, angles = (jnp.array(v, tdist.dtype).reshape(shape) for v in (_ALONG, _ANGLES))
  t = t_mean[..., None] + reach[..., None] * along  # [..., n, 6]
  turn, mirror = _turns(key, t_mean)
  angles = mirror[..., None] * angles + turn[..., None]
  distance = (t if ray_shape == 'cone' else jnp.ones_like(t)) * radii[..., None] / 2**0.5
  u, v = (a[..., None, None, :] for a in _across(directions))  # [..., 1, 1, 3]
  off = jnp.cos(angles)[..., None] * u + jnp.sin(angles)[..., None] * v
  on_axis = origins[..., None, None, :] + t[..., None] * directions[..., None, None, :]
  var = (_SCALE * distance) ** 2
  eye = jnp.eye(3, dtype=t.dtype).reshape((1,) * t.ndim + (3, 3))
  return structs.Gaussians(on_axis + distance[..., None] * off, var[..., None, None] * eye)


def _turns(key: Array | None, like: Array) -> tuple[Array, Array]:
  """Each pattern's angle, and 1 or -1 for how it goes round: [..., n] both."""
  if key is None:
    odd = jnp.broadcast_to(jnp.arange(like.shape[-1]) % 2, like.shape).astype(like.dtype)
    return odd * (math.PI / 6), 1 - 2 * odd
  u = math.draw(jax.random.uniform, key, like.shape, like.dtype)
  # One number for both: a whole turn for either half of it.
  return 4 * math.PI * u, jnp.where(u < 0.5, 1.0, -1.0)


def _across(directions: Array) -> tuple[Array, Array]:
  """Two unit vectors [..., 3] across each direction and each other; zeros across zero."""
  smallest = jnp.argmin(jnp.abs(directions), -1)
  axis = jax.nn.one_hot(smallest, 3, dtype=directions.dtype)
  u = _unit(jnp.cross(directions, axis))
  return u, _unit(jnp.cross(directions, u))


def _unit(x: Array) -> Array:
  norm_sq = jnp.sum(x**2, -1, keepdims=True)
  return x / jnp.sqrt(jnp.where(norm_sq > 0, norm_sq, 1))


def compute_alpha_weights(
  density: Array, tdist: Array, directions: Array, opaque_background: bool = False
) -> Array:
  """Compositing weights (volume rendering, arXiv:2003.08934, Eq. 3).

  Args:
    density: [..., n] per unit of length.
    tdist: [..., n + 1] metric endpoints.
    directions: [..., 3]; their norm turns t into length.
    opaque_background: take the last interval as infinitely thick.

  Returns:
    [..., n] weights that sum to at most one; to exactly one with an opaque background.
  """
  norm_sq = jnp.sum(directions**2, -1, keepdims=True)
  norm = jnp.sqrt(jnp.where(norm_sq > 0, norm_sq, 1))  # Of which 0 has no gradient.
  length = jnp.where(norm_sq > 0, jnp.diff(tdist) * norm, 0)
  depth = density * length  # Optical depth of each interval.
  before = jnp.cumsum(depth[..., :-1], -1)
  transmitted = jnp.exp(-jnp.concatenate([jnp.zeros_like(depth[..., :1]), before], -1))
  alpha = -jnp.expm1(-depth)
  if opaque_background:
    alpha = jnp.concatenate([alpha[..., :-1], jnp.ones_like(alpha[..., -1:])], -1)
  return alpha * transmitted


def volumetric_rendering(
  rgb: Array, weights: Array, tdist: Array, background: Array, far: float
) -> structs.Rendering:
  """Composites colours and measures distances along rays.

  Median and percentiles are of the histogram completed by one more bin, up to the far plane, that
  holds the missing weight.

  Args:
    rgb: [..., n, 3] colours of the intervals.
    weights: [..., n].
    tdist: [..., n + 1] metric endpoints.
    background: [..., 3] what shows where the ray goes through, or broadcastable to it.
    far: metric distance of the far plane.
  """
  acc = jnp.sum(weights, -1)
  missing = jnp.maximum(0, 1 - acc)
  colour = jnp.sum(weights[..., None] * rgb, -2) + missing[..., None] * background
  log_mid = math.safe_log((tdist[..., 1:] + tdist[..., :-1]) / 2)
  mean = jnp.exp(jnp.sum(weights * log_mid, -1) / jnp.maximum(acc, math.EPS))
  mean = jnp.where(acc > 0, jnp.clip(mean, tdist[..., 0], tdist[..., -1]), far)
  t_all = jnp.concatenate([tdist, jnp.full_like(tdist[..., :1], far)], -1)
  w_all = jnp.concatenate([weights, missing[..., None]], -1)
  percentiles = stepfun.weighted_percentile(t_all, w_all, (5, 50, 95))
  return structs.Rendering(colour, acc, mean, percentiles)
