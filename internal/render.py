"""Gaussians along a ray, and compositing.

`tdist` [..., n + 1] are metric endpoints; per-ray quantities are [..., 3] or [..., 1]; weights
[..., n].
"""

import jax
import jax.numpy as jnp

from internal import math, stepfun, structs

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
  if ray_shape not in _SHAPES:
    raise ValueError(f'ray_shape must be one of {", ".join(_SHAPES)}, got {ray_shape!r}.')
  t_mean, t_var, r_var = _SHAPES[ray_shape](tdist[..., :-1], tdist[..., 1:], radii)
  d = directions[..., None, :]  # [..., 1, 3]
  outer = d[..., :, None] * d[..., None, :]  # [..., 1, 3, 3]
  norm_sq = jnp.sum(d**2, -1)[..., None, None]
  norm_sq = jnp.where(norm_sq > 0, norm_sq, 1)  # A ray that goes nowhere has outer = 0.
  across = jnp.broadcast_to(jnp.eye(3, dtype=d.dtype), outer.shape) - outer / norm_sq
  cov = t_var[..., None, None] * outer + r_var[..., None, None] * across
  return structs.Gaussians(origins[..., None, :] + t_mean[..., None] * d, cov)


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
  length = jnp.diff(tdist) * jnp.linalg.norm(directions[..., None, :], axis=-1)
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
