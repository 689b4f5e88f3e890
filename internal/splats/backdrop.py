"""Closes the background where no training camera looked, as high in the sky or under the floor.

No picture tells what is there, and a drawn picture would be black. The colours around such a gap
are spread into it smoothly (harmonic interpolation: each direction has the mean colour of its
neighbours), and a few large Gaussians on a far shell show them.
"""

from __future__ import annotations

import jax
import numpy as np
from scipy import spatial

from .. import cameras, structs
from . import gaussians
from .surfaces import SHELL

_DISTANCE = 1.5 * SHELL  # So that they lie behind all others, whose depth is at most SHELL.
_COUNT = 700  # Directions on the whole sphere: 8 degrees apart.
_SHARE = 0.1  # At most this part of all Gaussians closes the background.
_RAYS = 65  # Along each side of a camera's picture, to find what it covers.
_MOST_CAMERAS = 100
_NEIGHBOURS = 6
_STEPS = 2000  # Of Jacobi's method; colours then spread over the whole sphere.
_WIDTH = 0.8  # Deviation of a Gaussian in distances between neighbours, so that they overlap.
_OPACITY = 0.99


def sphere(count: int) -> np.ndarray:
  """Returns unit vectors [count, 3], evenly spread along a spiral by the golden angle."""
  k = np.arange(count) + 0.5
  z, turn = 1 - 2 * k / count, np.pi * (3 - np.sqrt(5)) * k
  radius = np.sqrt(1 - z**2)
  return np.stack([radius * np.cos(turn), radius * np.sin(turn), z], -1)


def unseen(cams: structs.Cameras, most_splats: int) -> np.ndarray:
  """Returns which of the directions `sphere(n)` no camera looks in: [n] bool.

  Args:
    cams: the training cameras, with any lenses.
    most_splats: the Gaussians that there may be; n is at most a tenth of it.
  """
  directions = sphere(min(_COUNT, int(_SHARE * most_splats)))
  if not len(directions):
    return np.zeros(0, bool)
  total = len(cams.size)
  rows = np.unique(np.linspace(0, total - 1, min(total, _MOST_CAMERAS)).round().astype(int))
  size = np.asarray(cams.size)[rows]  # [c, 2]
  side = np.linspace(0, 1, _RAYS)
  x, y = (np.round(side * (size[:, k, None] - 1)).astype(np.int32) for k in (0, 1))  # [c, r]
  shape = len(rows), _RAYS, _RAYS
  row = np.broadcast_to(rows[:, None, None], shape).astype(np.int32)
  rays = cameras.pixels_to_rays(
    cams, row, np.broadcast_to(x[:, :, None], shape), np.broadcast_to(y[:, None, :], shape)
  )
  seen = np.asarray(rays.directions, np.float64).reshape(-1, 3)
  seen /= np.linalg.norm(seen, axis=-1, keepdims=True)
  return spatial.cKDTree(seen).query(directions)[0] > 0.6 * _spacing(len(directions))


def _spacing(count: int) -> float:
  """Returns the distance of neighbours among directions on the unit sphere."""
  return float(np.sqrt(4 * np.pi / count))


def closed(splats: gaussians.Splats, gaps: np.ndarray, centre: np.ndarray) -> gaussians.Splats:
  """Adds a Gaussian in each unseen direction.

  Args:
    splats: Gaussians in the normalised world.
    gaps: [n] bool, from `unseen`.
    centre: [3] of the cameras.
  """
  if not gaps.any():
    return splats
  directions, count = sphere(len(gaps)), int(gaps.sum())
  colors = _spread(directions, *_seen_colors(splats, directions, gaps, centre))[gaps]
  sh = np.zeros((count, gaussians.SH_COEFFICIENTS, 3))
  sh[:, 0] = (colors - 0.5) / gaussians.SH_0
  added = gaussians.Splats(
    means=centre + _DISTANCE * directions[gaps],
    log_scales=np.full((count, 3), np.log(_WIDTH * _DISTANCE * _spacing(len(gaps)))),
    quaternions=np.tile([1.0, 0, 0, 0], (count, 1)),
    opacity_logits=np.full(count, np.log(_OPACITY / (1 - _OPACITY))),
    sh=sh,
  )
  return jax.tree.map(lambda *both: np.concatenate(both).astype(np.float32), splats, added)


def _seen_colors(splats, directions, gaps, centre) -> tuple[np.ndarray, np.ndarray]:
  """Returns colours [n, 3] in directions, and whether they are known [n].

  A colour is the mean over the Gaussians there, weighted by how much of the view they fill and by
  their distance, since the background is what is far.
  """
  toward = np.asarray(splats.means, np.float64) - centre
  distance = np.maximum(np.linalg.norm(toward, axis=-1), 1e-6)
  toward /= distance[:, None]
  rgb = np.asarray(gaussians.sh_colors(np.float32(splats.sh), np.float32(toward)), np.float64)
  widths = np.sort(np.exp(np.asarray(splats.log_scales, np.float64)), -1)[:, 1:] / distance[:, None]
  opacity = 1 / (1 + np.exp(-np.asarray(splats.opacity_logits, np.float64)))
  weight = opacity * np.minimum(widths, 1).prod(-1) * distance
  of = spatial.cKDTree(directions).query(toward)[1]
  total = np.bincount(of, weight, len(directions))
  sums = [np.bincount(of, weight * channel, len(directions)) for channel in rgb.T]
  known = (total > 0) & ~gaps
  return np.stack(sums, -1) / np.maximum(total, 1e-30)[:, None], known


def _spread(directions: np.ndarray, colors: np.ndarray, known: np.ndarray) -> np.ndarray:
  """Solves Laplace's equation where colours are unknown, on the graph of nearest neighbours."""
  if not known.any():
    return np.full_like(colors, 0.5)
  rows = spatial.cKDTree(directions).query(directions, min(_NEIGHBOURS + 1, len(directions)))[1]
  result = np.where(known[:, None], colors, colors[known].mean(0))
  for _ in range(_STEPS):
    result = np.where(known[:, None], colors, result[rows[:, 1:]].mean(1))
  return np.clip(result, 0, 1)
