"""The rasteriser's naive twin: a loop over pixels and Gaussians."""

from __future__ import annotations

import numpy as np

from internal.splats import gaussians


def covariances(splats: gaussians.Splats) -> np.ndarray:
  """Computes the covariances R S S^T R^T [n, 3, 3] (Kerbl et al. 2023, Eq. 6)."""
  m = np.asarray(gaussians.axes(splats), np.float64)
  return m @ m.swapaxes(-1, -2)


def render(projected: gaussians.Projected, size: tuple[int, int], background) -> np.ndarray:
  """Composites projected Gaussians front to back (Kerbl et al. 2023, Eq. 3), in float64.

  Args:
    projected: n Gaussians.
    size: width and height of the picture.
    background: [3] colour behind everything.

  Returns:
    [h, w, 4] colour and opacity.
  """
  xy, depth, conic, opacity, rgb = (
    np.asarray(getattr(projected, name), np.float64)
    for name in ('xy', 'depth', 'conic', 'opacity', 'rgb')
  )
  width, height = size
  picture = np.zeros((height, width, 4))
  order = [k for k in np.argsort(depth, kind='stable') if opacity[k] > 0]
  for row in range(height):
    for column in range(width):
      color, through = np.zeros(3), 1.0
      for k in order:
        dx, dy = column + 0.5 - xy[k, 0], row + 0.5 - xy[k, 1]
        power = conic[k, 0] * dx * dx + 2 * conic[k, 1] * dx * dy + conic[k, 2] * dy * dy
        alpha = min(gaussians.MAX_ALPHA, opacity[k] * np.exp(-0.5 * power))
        if alpha >= gaussians.MIN_ALPHA:
          color += through * alpha * rgb[k]
          through *= 1 - alpha
      picture[row, column] = *(color + through * np.asarray(background)), 1 - through
  return picture
