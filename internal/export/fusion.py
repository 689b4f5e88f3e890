"""Fuses the depths of rendered views into distances to the nearest surface, on a grid.

A level of the density makes a poor surface: it is low where rays have long intervals, as far away
and where training was short, and the mesh has holes there. The views' median depths have none. In
each cell, the mean over views of the distance to the surface that the view sees, positive in front
of it, is zero where the views' surfaces are on average (Curless and Levoy 1996, "A Volumetric
Method for Building Complex Models from Range Images").
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .. import coord, structs
from ..rendering import surface_points
from ..system import progress
from . import points

TRUNCATION = 3.0  # Cells. What is farther behind a surface is hidden; in front of it, empty.
_FEW = 0.1  # Fewer views than this part of those that do not see a cell are mistaken.
_FLATTEST = 0.04  # Where a ray and the surface enclose an angle of a smaller sine, it is an edge.


def distances(
  views: points.Views,
  axes: list[np.ndarray],
  to_world: Callable,
  box: np.ndarray,
  width: float,
) -> tuple[np.ndarray, np.ndarray]:
  """Computes distances to surfaces at the corners of a grid's cells.

  Args:
    views: v rendered views.
    axes: three coordinates [n_k] of the corners in mesh space.
    to_world: from mesh space to the world.
    box: [2, 3] world; what is outside is not computed.
    width: of a cell in mesh space.

  Returns:
    Distances [n_0, n_1, n_2] in cells, between -TRUNCATION and TRUNCATION, and where they are known
    [n_0, n_1, n_2]: in the box, and not inside of things.
  """
  depths = [views.depth(k) for k in range(len(views.images))]
  sines = [_sines(views.cams, k, depth) for k, depth in enumerate(depths)]
  result = np.zeros([len(axis) for axis in axes], np.float32)
  known = np.zeros(result.shape, bool)
  for i, x in enumerate(progress.track(axes[0], 'surfaces')):
    z = np.stack(np.meshgrid([x], axes[1], axes[2], indexing='ij'), -1).reshape(-1, 3)
    xyz = np.asarray(to_world(jnp.asarray(z, jnp.float32)), np.float64)
    inside = np.flatnonzero(points.in_box(xyz, box))
    xyz, cell = xyz[inside], width * stretch(z, to_world)[inside]
    total, weights, seen, hidden = np.zeros((4, len(xyz)))
    for k, (depth, sine) in enumerate(zip(depths, sines)):
      rows, pixel, ahead = points.seen_at(views.cams, k, xyz)
      with np.errstate(invalid='ignore'):
        distance = (depth[pixel] - ahead) * sine[pixel] / cell[rows]
      there = distance > -TRUNCATION
      hidden[rows[~there]] += 1
      rows, weight = rows[there], ahead[there] ** -2.0
      seen[rows] += 1
      total[rows] += weight * np.minimum(distance[there], TRUNCATION)
      weights[rows] += weight
    result[i].ravel()[inside] = total / np.maximum(weights, 1e-30)
    known[i].ravel()[inside] = seen > _FEW * hidden
  return result, known


def stretch(z: np.ndarray, to_world: Callable) -> np.ndarray:
  """Returns the mean factor [m] by which `to_world` enlarges lengths at points [m, 3]."""
  return np.asarray(_stretch(np.float32(z), to_world), np.float64)


@functools.partial(jax.jit, static_argnums=1)
def _stretch(z, to_world):
  eye = jnp.broadcast_to(jnp.eye(3), (len(z), 3, 3))
  cov = coord.linearize(to_world, z, eye)[1]  # J J^T
  return jnp.abs(jnp.linalg.det(cov)) ** (1 / 6)


def _sines(cams: structs.Cameras, k: int, depth: np.ndarray) -> np.ndarray:
  """Returns the factors [h, w] from differences of camera k's depth [h, w] to distances.

  The distances are those to the surface. A factor is the sine of the angle between ray and surface,
  for directions with z = -1 in camera axes, and 1 at edges.
  """
  origins, directions = (
    a.astype(np.float64) for a in surface_points.pixel_rays(cams, k)
  )  # [h, w, 3]
  xyz = origins + np.where(np.isfinite(depth), depth, 0)[..., None] * directions
  normal = np.cross(np.gradient(xyz, axis=1), np.gradient(xyz, axis=0))
  length = np.linalg.norm(normal, axis=-1)
  sine = np.abs((normal * directions).sum(-1)) / np.where(length > 0, length, 1)
  return np.where(sine > _FLATTEST, sine, 1)
