"""How coarsely each Gaussian may be rounded: what pictures show much of finely, the rest coarsely.

A parameter x that is rounded to multiples of q changes by q^2 / 12 in the mean square, and pictures
by q^2 / 12 sum_p (d picture_p / d x)^2, where p counts pixels and channels. All parameters may add
the same to the pictures' error, so q is inverse to the root of that sum.

The sums of all parameters come from one gradient a view: that of the product of the picture with
random signs, whose square has the sum as its mean (Bekas et al. 2007, "An estimator for the
diagonal of a matrix").

Harmonics do not err independently: a fit lets those of a Gaussian add up in the directions that it
has seen. So the constant one takes what rounding the others changes in the mean view.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from . import gaussians, rasterizer

_ERROR = 10**-4.8  # Mean squared error of pictures that rounding may add, in a linear estimate.
_PARAMETERS = 59  # Of a Gaussian.
# Views may come that the estimate has not seen, so there are limits:
_COLOR = 0.1  # For the constant harmonic, 0.03 of full brightness.
_HARMONIC = 1.0  # Which leaves nothing of most.
_LOG_SCALE = 0.25
_POSITION = 0.25  # In deviations, their geometric mean.


@dataclasses.dataclass(frozen=True)
class Steps:
  """Of what each number of n Gaussians may be rounded to a multiple; [n] each, but for `seen`."""

  means: np.ndarray  # In the unit of the positions.
  log_scales: np.ndarray
  color: np.ndarray  # The constant harmonic.
  harmonics: np.ndarray  # Degrees 1 to 3.
  seen: np.ndarray  # [n, 15] their basis functions over the constant one, mean over the views.

  def moved(self, transform: np.ndarray) -> Steps:
    """Returns the steps of Gaussians to which a similarity [4, 4] is applied."""
    scale = np.cbrt(np.linalg.det(transform[:3, :3]))
    seen = np.pad(self.seen, ((0, 0), (1, 0)))[..., None]
    seen = gaussians.rotate_sh(seen, transform[:3, :3] / scale)[:, 1:, 0]
    return dataclasses.replace(self, means=scale * self.means, seen=seen)


def steps(
  splats: gaussians.Splats,
  cameras: list[gaussians.Pinhole],
  background: np.ndarray,
  capacity: int,
) -> Steps:
  """Estimates steps from the pictures of some cameras.

  Args:
    splats: n Gaussians.
    cameras: those whose pictures should stay as they are.
    background: [3] colour behind the Gaussians.
    capacity: see `rasterizer.render`.
  """
  splats = jax.tree.map(jnp.float32, splats)

  @jax.jit
  def add(total, key, camera):
    width, height = camera.size
    signs = jax.random.rademacher(key, (height, width, 3), jnp.float32)

    def product(moving):
      return jnp.sum(signs * rasterizer.render(moving, camera, background, capacity).rgb)

    g = jax.grad(product)(splats)
    together = jnp.mean(g.sh * g.sh[:, :1], -1)  # [n, 16]
    parts = jnp.mean(g.means**2, -1), jnp.mean(g.log_scales**2, -1), together
    return jax.tree.map(jnp.add, total, parts)

  n = len(splats.means)
  total = jnp.zeros(n), jnp.zeros(n), jnp.zeros((n, gaussians.SH_COEFFICIENTS))
  for k, camera in enumerate(cameras):
    total = add(total, jax.random.key(k), camera)
  numbers = 3 * sum(int(np.prod(camera.size)) for camera in cameras)
  each = _ERROR * numbers / (_PARAMETERS * max(n, 1))
  *rest, together = (np.asarray(part, np.float64) for part in total)
  sums = *rest, together[:, 0]
  means, log_scales, sh = (np.sqrt(12 * each / np.maximum(part, 1e-20)) for part in sums)
  size = np.exp(np.mean(np.asarray(splats.log_scales, np.float64), -1))
  # The basis functions have the same mean square over directions, so one sum stands for all 16.
  return Steps(
    means=np.minimum(means, _POSITION * size),
    log_scales=np.minimum(log_scales, _LOG_SCALE),
    color=np.minimum(sh, _COLOR),
    harmonics=np.minimum(sh, _HARMONIC),
    seen=together[:, 1:] / np.maximum(together[:, :1], 1e-20),
  )
