"""How coarsely each Gaussian may be rounded: what pictures show much of finely, the rest coarsely.

Rounding a parameter x to multiples of q adds q^2 / 12 to its mean squared error, and to that of
pictures q^2 / 12 sum_p (d picture_p / d x)^2, where p counts pixels and channels of all views. Each
parameter may add the same, so q is inverse to the root of that sum.

The sums of all parameters come from one gradient a view: that of the product of the picture with
random signs, whose square has the sum as its mean (Bekas et al. 2007, "An estimator for the
diagonal of a matrix").

Harmonics do not err independently: a fit lets those of a Gaussian add up in the directions that it
has seen. So the constant one takes what rounding the others changes in the mean view.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ..system import progress
from . import gaussians, rasterizer

_ERROR = 10**-4.4  # Mean squared error of pictures that rounding may add, in a linear estimate.
_PARAMETERS = 59  # Of a Gaussian.
# There may be views that the estimate has not seen, so no step is larger than these:
_COLOR = 0.1  # Of the constant harmonic: 0.03 of full brightness.
_HARMONIC = 1.0  # Most harmonics are smaller, and become 0.
_LOG_SCALE = 0.25
_POSITION = 0.25  # In deviations, their geometric mean.
_FIXED_HARMONIC = 4 / 128


@dataclasses.dataclass(frozen=True)
class Steps:
  """Each number of n Gaussians may be rounded to a multiple of its step; 0 rounds nothing."""

  means: np.ndarray  # [n] in the unit of the positions, for all three axes.
  log_scales: np.ndarray  # [n] for all three axes.
  harmonics: np.ndarray  # [n] for degrees 1 to 3 of all channels.
  seen: np.ndarray  # [n, 15] their basis functions over the constant one, weighted mean of views.

  @property
  def color(self) -> np.ndarray:
    """[n] steps of the constant harmonic."""
    return np.minimum(self.harmonics, _COLOR)

  def moved(self, transform: np.ndarray) -> Steps:
    """Returns the steps of Gaussians to which a similarity [4, 4] is applied."""
    scale = np.cbrt(np.linalg.det(transform[:3, :3]))
    seen = np.pad(self.seen, ((0, 0), (1, 0)))[..., None]
    seen = gaussians.rotate_sh(seen, transform[:3, :3] / scale)[:, 1:, 0]
    return dataclasses.replace(self, means=scale * self.means, seen=seen)


def fixed(n: int) -> Steps:
  """Returns steps without views: harmonics in 6 bits of 8, and the rest as it is."""
  zeros = np.zeros(n)
  return Steps(zeros, zeros, np.full(n, _FIXED_HARMONIC), np.zeros((n, 15)))


def steps(
  splats: gaussians.Splats,
  cameras: list[gaussians.Pinhole],
  background: np.ndarray,
  capacity: int,
) -> Steps:
  """Estimates steps for views that should stay as they are; shows progress.

  A sum over few views is uncertain, so each counts as 1 + 2 / v of it, for v views that show the
  Gaussian. What none shows is not rounded.

  Args:
    splats: n Gaussians.
    cameras: of these views.
    background: [3] colour behind the Gaussians.
    capacity: see `rasterizer.render`.

  Returns:
    The steps, in the frame of `splats`.
  """
  splats, n = jax.tree.map(jnp.float32, splats), len(splats.means)
  total = (*jnp.zeros((3, n)), jnp.zeros((n, gaussians.SH_COEFFICIENTS)))
  for k in progress.track(range(len(cameras)), 'how far to round'):
    total = _add(total, splats, jax.random.key(k), cameras[k], background, capacity)
  views, means, log_scales, sh = (np.asarray(part, np.float64) for part in total)
  numbers = 3 * sum(int(np.prod(camera.size)) for camera in cameras)
  each = _ERROR * numbers / (_PARAMETERS * max(n, 1))
  each = each / (1 + 2 / np.maximum(views, 1))

  def step(sums, most):
    return np.where(views > 0, np.minimum(np.sqrt(12 * each / np.maximum(sums, 1e-20)), most), 0)

  size = np.exp(np.mean(np.asarray(splats.log_scales, np.float64), -1))
  return Steps(
    means=step(means, _POSITION * size),
    log_scales=step(log_scales, _LOG_SCALE),
    # Squares of the basis functions have the same mean over directions: one sum stands for all.
    harmonics=step(sh[:, 0], _HARMONIC),
    seen=sh[:, 1:] / np.maximum(sh[:, :1], 1e-20),
  )


@functools.partial(jax.jit, static_argnames='capacity')
def _add(total, splats, key, camera, background, capacity):
  """Adds a view to the sums: whether it shows a Gaussian, and products of derivatives, [n, ...]."""
  width, height = camera.size
  signs = jax.random.rademacher(key, (height, width, 3), jnp.float32)

  def product(splats):
    return jnp.sum(signs * rasterizer.render(splats, camera, background, capacity).rgb)

  g = jax.grad(product)(splats)
  with_constant = jnp.mean(g.sh * g.sh[:, :1], -1)  # [n, 16], the first its own square.
  shown = jnp.float32(with_constant[:, 0] > 0)
  own = shown, jnp.mean(g.means**2, -1), jnp.mean(g.log_scales**2, -1), with_constant
  return jax.tree.map(jnp.add, total, own)
