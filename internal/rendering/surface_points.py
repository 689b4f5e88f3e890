"""Extracts coloured surface points: rendered pixels at their median distance."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from .. import cameras, structs
from ..system import progress


def pixel_rays(cams: structs.Cameras, row: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the origins and directions [h, w, 3] of all pixels' rays."""
  width, height = np.asarray(cams.size)[row].tolist()
  x, y = jnp.meshgrid(jnp.arange(width), jnp.arange(height))
  rays = cameras.pixels_to_rays(cams, jnp.full_like(x, row), x, y)
  return np.asarray(rays.origins), np.asarray(rays.directions)


def from_image(
  cams: structs.Cameras, row: int, image: dict, max_spread: float = np.inf
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the points of one rendered image that lie on a surface: its opacity is 0.5 or more.

  Args:
    cams: cameras in world space (not in NDC).
    row: the camera of `image`.
    image: a result of `renderer.make_image_renderer`.
    max_spread: pixels are dropped if their distances at 5 and 95 percent differ by more than this
      times the median, as in fog or at the edges of objects.

  Returns:
    Positions [m, 3] in the world and colours [m, 3], uint8.
  """
  origins, directions = pixel_rays(cams, row)
  low, median, high = np.moveaxis(image['distance_percentiles'], -1, 0)
  with np.errstate(all='ignore'):
    kept = (image['acc'] >= 0.5) & ((high - low) <= max_spread * median)
    xyz = origins + directions * median[..., None]
  kept &= np.isfinite(xyz).all(-1)
  return xyz[kept], np.round(255 * image['rgb'][kept]).astype(np.uint8)


def from_views(
  render_image: Callable, params, cams: structs.Cameras, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
  """Renders all cameras and returns their points, as `from_image` does."""
  parts = []
  for row in progress.track(range(len(cams.size)), 'views'):
    parts.append(from_image(cams, row, render_image(params, cams, row, fraction), 0.3))
  return tuple(np.concatenate(each) for each in zip(*parts))
