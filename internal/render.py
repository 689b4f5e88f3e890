"""Gaussians of conical frusta along rays, and volume rendering.

Notation: `tdist` [..., n + 1] ascending metric endpoints of n intervals; quantities of a ray are
[..., 3] or [..., 1], quantities of an interval [..., n]. World units, unless said otherwise.
"""

import jax
import jax.numpy as jnp

from . import math, stepfun, structs
from .errors import UserError

Array = jax.Array


def _conical_frustum(t0: Array, t1: Array, radii: Array) -> tuple[Array, Array, Array]:
  """Computes (t mean, t variance, r variance) of conical frusta (arXiv:2103.13415, Eq. 7).

  Written in midpoint and half-width, which keeps thin and distant frusta accurate in float32.
  """
  mid, half = (t0 + t1) / 2, (t1 - t0) / 2
  slant = half / jnp.maximum(mid, math.SMALL)  # In [0, 1]; squares of a tiny t would underflow.
  ratio = slant**2 / (3 + slant**2)
  t_mean = mid + 2 * mid * ratio
  t_var = half**2 / 3 - (4 / 15) * ratio**2 * (12 * mid**2 - half**2)
  r_var = radii**2 * (mid**2 / 4 + (5 / 12) * half**2 - (4 / 15) * ratio * half**2)
  return t_mean, t_var, r_var


def _cylinder(t0: Array, t1: Array, radii: Array) -> tuple[Array, Array, Array]:
  """Computes (t mean, t variance, r variance) of cylinders."""
  t_mean = (t0 + t1) / 2
  return t_mean, (t1 - t0) ** 2 / 12, jnp.broadcast_to(radii**2 / 4, t_mean.shape)


_SHAPES = {'cone': _conical_frustum, 'cylinder': _cylinder}


def _moments(tdist: Array, radii: Array, ray_shape: str) -> tuple[Array, Array, Array]:
  """Computes (t mean, t variance, r variance) of each interval, [..., n] each."""
  if ray_shape not in _SHAPES:
    raise UserError(f'ray_shape must be one of {", ".join(_SHAPES)}, got {ray_shape!r}.')
  return _SHAPES[ray_shape](tdist[..., :-1], tdist[..., 1:], radii)


def cast_rays(
  tdist: Array, origins: Array, directions: Array, radii: Array, ray_shape: str
) -> structs.Gaussians:
  """Fits a Gaussian to each interval of each ray's cone (mip-NeRF, arXiv:2103.13415, Eq. 7 and 8).

  Args:
    tdist: [..., n + 1] ascending metric endpoints, not negative.
    origins: [..., 3] ray origins in world space.
    directions: [..., 3] ray directions, not normalised.
    radii: [..., 1] radius of the cone at t = 1, or of the cylinder everywhere.
    ray_shape: 'cone' or 'cylinder'.

  Returns:
    Gaussians with the mean [..., n, 3] and covariance [..., n, 3, 3] of each solid, in world space.

  Raises:
    UserError: ray_shape is unknown.
  """
  t_mean, t_var, r_var = _moments(tdist, radii, ray_shape)
  d = directions[..., None, :]  # [..., 1, 3]
  outer = d[..., :, None] * d[..., None, :]  # [..., 1, 3, 3]
  norm_sq = jnp.sum(d**2, -1)[..., None, None]  # [..., 1, 1, 1]
  norm_sq = jnp.where(norm_sq > 0, norm_sq, 1)  # Where the direction is 0, so is outer.
  across = jnp.broadcast_to(jnp.eye(3, dtype=d.dtype), outer.shape) - outer / norm_sq
  cov = t_var[..., None, None] * outer + r_var[..., None, None] * across  # [..., n, 3, 3]
  return structs.Gaussians(origins[..., None, :] + t_mean[..., None] * d, cov)


# Zip-NeRF's pattern of six points: angles around the axis, and relative offsets along it.
_ANGLES = (0, 2 * math.PI / 3, 4 * math.PI / 3, math.PI, 5 * math.PI / 3, math.PI / 3)
_ALONG = (-1, -0.6, -0.2, 0.2, 0.6, 1)
_SCALE = 0.5  # Standard deviation of a point's Gaussian, in units of its distance from the axis.


def multisample(
  key: Array | None, tdist: Array, origins: Array, directions: Array, radii: Array, ray_shape: str
) -> structs.Gaussians:
  """Places six isotropic Gaussians in each interval (Zip-NeRF's multisampling, arXiv:2304.06706).

  The centres form a hexagonal pattern around the ray. Their mean and their variance along and
  across the ray (averaged over angles) are those of the conical frustum.

  Args:
    key: PRNG key, or [...] keys, one for each ray: rotates and mirrors each pattern at random. None
      rotates every other pattern by 30 degrees and mirrors it.
    tdist: [..., n + 1] ascending metric endpoints, not negative.
    origins: [..., 3] ray origins in world space.
    directions: [..., 3] ray directions, not normalised.
    radii: [..., 1] radius of the cone at t = 1, or of the cylinder everywhere.
    ray_shape: 'cone' or 'cylinder'.

  Returns:
    Gaussians with means [..., n, 6, 3] and covariances [..., n, 6, 3, 3], in world space.

  Raises:
    UserError: ray_shape is unknown.
  """
  t_mean, _, _ = _moments(tdist, radii, ray_shape)
  mid, half = (tdist[..., :-1] + tdist[..., 1:]) / 2, jnp.diff(tdist) / 2
  ratio = (half / jnp.maximum(mid, math.SMALL)) ** 2 if ray_shape == 'cone' else 0.0
  reach = half * (3 / 7**0.5) * ((1 - ratio) ** 2 + 4) ** 0.5 / (3 + ratio)
  shape = (1,) * t_mean.ndim + (6,)
  along, angles = (jnp.array(v, tdist.dtype).reshape(shape) for v in (_ALONG, _ANGLES))
  t = t_mean[..., None] + reach[..., None] * along  # [..., n, 6]
  turn, mirror = _turns(key, t_mean)
  angles = mirror[..., None] * angles + turn[..., None]  # [..., n, 6]
  distance = (t if ray_shape == 'cone' else jnp.ones_like(t)) * radii[..., None] / 2**0.5
  u, v = (a[..., None, None, :] for a in _across(directions))  # [..., 1, 1, 3]
  off = jnp.cos(angles)[..., None] * u + jnp.sin(angles)[..., None] * v  # [..., n, 6, 3]
  on_axis = origins[..., None, None, :] + t[..., None] * directions[..., None, None, :]
  var = (_SCALE * distance) ** 2
  eye = jnp.eye(3, dtype=t.dtype).reshape((1,) * t.ndim + (3, 3))
  return structs.Gaussians(on_axis + distance[..., None] * off, var[..., None, None] * eye)


def _turns(key: Array | None, like: Array) -> tuple[Array, Array]:
  """Returns each pattern's rotation in radians and its orientation, 1 or -1, [..., n] each."""
  if key is None:
    odd = jnp.broadcast_to(jnp.arange(like.shape[-1]) % 2, like.shape).astype(like.dtype)
    return odd * (math.PI / 6), 1 - 2 * odd
  u = math.draw(jax.random.uniform, key, like.shape, like.dtype)
  # One uniform number gives both: its halves choose the orientation, each spans a whole turn.
  return 4 * math.PI * u, jnp.where(u < 0.5, 1.0, -1.0)


def _across(directions: Array) -> tuple[Array, Array]:
  """Returns two unit vectors [..., 3] orthogonal to each direction and each other; 0 for 0."""
  smallest = jnp.argmin(jnp.abs(directions), -1)
  axis = jax.nn.one_hot(smallest, 3, dtype=directions.dtype)
  u = _unit(jnp.cross(directions, axis))
  return u, _unit(jnp.cross(directions, u))


def _unit(x: Array) -> Array:
  norm_sq = jnp.sum(x**2, -1, keepdims=True)
  return x / jnp.sqrt(jnp.where(norm_sq > 0, norm_sq, 1))


def gradient_scale(tdist: Array, directions: Array, reach: float) -> Array:
  """Computes the factor on gradients of samples near the camera, min(1, (d / reach)^2).

  At a distance d from a camera, the number of its rays through a volume is as 1 / d^2. The factor
  makes up for that, so that density does not grow first next to the cameras (arXiv:2305.02756).

  Args:
    tdist: [..., n + 1] endpoints of the intervals.
    directions: [..., 3] ray directions; their norm converts t to length.
    reach: distance in world units from which on gradients are unchanged, positive.

  Returns:
    [..., n] factors in [0, 1].
  """
  middle = (tdist[..., 1:] + tdist[..., :-1]) / 2
  distance = middle * jnp.linalg.norm(directions, axis=-1, keepdims=True)
  return jnp.minimum(1, (distance / reach) ** 2)


def compute_alpha_weights(
  density: Array, tdist: Array, directions: Array, opaque_background: bool = False
) -> Array:
  """Computes volume-rendering weights from densities (NeRF, arXiv:2003.08934, Eq. 3).

  w_i = (1 - exp(-density_i length_i)) exp(-sum_{j < i} density_j length_j).

  Args:
    density: [..., n] densities per world unit of length, not negative.
    tdist: [..., n + 1] ascending metric endpoints.
    directions: [..., 3] ray directions; their norm converts t to length.
    opaque_background: whether the last interval is infinitely dense.

  Returns:
    [..., n] weights that sum to at most 1, or to exactly 1 with an opaque background.
  """
  norm_sq = jnp.sum(directions**2, -1, keepdims=True)  # [..., 1]
  norm = jnp.sqrt(jnp.where(norm_sq > 0, norm_sq, 1))  # The root has no gradient at 0.
  length = jnp.where(norm_sq > 0, jnp.diff(tdist) * norm, 0)
  depth = density * length  # Optical depth of each interval.
  before = jnp.cumsum(depth[..., :-1], -1)  # [..., n - 1]
  transmitted = jnp.exp(-jnp.concatenate([jnp.zeros_like(depth[..., :1]), before], -1))
  alpha = -jnp.expm1(-depth)  # 1 - exp(-depth) would be 0 for thin media.
  if opaque_background:
    alpha = jnp.concatenate([alpha[..., :-1], jnp.ones_like(alpha[..., -1:])], -1)
  return alpha * transmitted


def volumetric_rendering(
  rgb: Array, weights: Array, tdist: Array, background: Array, far: float
) -> structs.Rendering:
  """Composites colours and computes the distances that rays see (arXiv:2003.08934, Eq. 3).

  Args:
    rgb: [..., n, 3] colours of the intervals.
    weights: [..., n] weights from `compute_alpha_weights`.
    tdist: [..., n + 1] ascending metric endpoints.
    background: colour behind the last interval, broadcastable to [..., 3].
    far: metric distance of the far plane.

  Returns:
    Rendering with rgb [..., 3], opacity acc [...], the geometric mean distance [...] and the 5th,
    50th and 95th percentile [..., 3]. Percentiles place the remaining weight, 1 - acc, between the
    last endpoint and the far plane. The mean is `far` where acc is 0.
  """
  acc = jnp.sum(weights, -1)
  missing = jnp.maximum(0, 1 - acc)
  colour = jnp.sum(weights[..., None] * rgb, -2) + missing[..., None] * background
  log_mid = math.safe_log((tdist[..., 1:] + tdist[..., :-1]) / 2)
  mean = jnp.exp(jnp.sum(weights * log_mid, -1) / jnp.maximum(acc, math.EPS))
  mean = jnp.where(acc > 0, jnp.clip(mean, tdist[..., 0], tdist[..., -1]), far)
  t_all = jnp.concatenate([tdist, jnp.full_like(tdist[..., :1], far)], -1)
  w_all = jnp.concatenate([weights, missing[..., None]], -1)  # [..., n + 1], sums to 1.
  percentiles = stepfun.weighted_percentile(t_all, w_all, (5, 50, 95))
  return structs.Rendering(colour, acc, mean, percentiles)
