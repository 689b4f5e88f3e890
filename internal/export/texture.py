"""Unwraps a mesh and paints a texture for it from rendered views.

A texture holds far more detail than the colours of the vertices, so a mesh with few faces looks
like one with many. xatlas, an optional package, cuts the mesh into charts and packs them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from ..system import progress
from . import points, shapes
from .mesh import Mesh, library

_PADDING = 2  # Texels between charts, so that their colours do not bleed.
_CHUNK = 20_000  # Faces that are painted at a time.
_TOLERANCE = 0.05  # See `points.support`.


def unwrap(
  vertices: np.ndarray, faces: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
  """Cuts a mesh into flat charts.

  Args:
    vertices: [m, 3]; the size of a face here decides on the number of its texels.
    faces: [f, 3].
    side: texels of the texture's side, approximately.

  Returns:
    The original vertex of each new one [n], new faces [f, 3], places of the new vertices in texels
    from the upper left corner [n, 2], and the texture's width and height.
  """
  xatlas = library('xatlas')
  atlas = xatlas.Atlas()
  atlas.add_mesh(np.float32(vertices), np.uint32(faces))
  packing = xatlas.PackOptions()
  packing.resolution, packing.padding = side, _PADDING
  atlas.generate(pack_options=packing)
  source, new_faces, uv = atlas[0]
  size = atlas.width, atlas.height
  return source.astype(np.int64), new_faces.astype(np.int64), np.float64(uv) * size, size


def texels(uv: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Finds the texels whose centres lie in the faces.

  Args:
    uv: [n, 2] places of vertices in texels.
    faces: [f, 3].

  Returns:
    Columns and rows of k texels [k, 2], their faces [k], and barycentric coordinates [k, 3].
  """
  corners = uv[faces]  # [f, 3, 2]
  low = np.floor(corners.min(1)).astype(np.int64)
  width, height = (np.ceil(corners.max(1)).astype(np.int64) - low).T
  count = width * height
  face = np.repeat(np.arange(len(faces)), count)
  rank = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
  at = low[face] + np.stack([rank % width[face], rank // width[face]], -1)
  a, b, c = np.moveaxis(corners, 1, 0)
  twice = _cross(b - a, c - a)  # [f] signed area.
  centre = at + 0.5 - a[face]
  with np.errstate(all='ignore'):
    second = _cross(centre, (c - a)[face]) / twice[face]
    third = _cross((b - a)[face], centre) / twice[face]
  weights = np.stack([1 - second - third, second, third], -1)
  inside = (weights >= -1e-9).all(-1)
  return at[inside], face[inside], weights[inside]


def _cross(p: np.ndarray, q: np.ndarray) -> np.ndarray:
  return p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]


def textured(
  shape: shapes.Shape,
  mesh: Mesh,
  space: tuple[Callable, Callable],
  views: points.Views,
  side: int,
) -> shapes.Shape:
  """Returns a mesh with a texture of the mean colours of the views that see a surface there.

  Args:
    shape: the mesh in the frame of its file.
    mesh: the same in the world.
    space: functions to mesh space and back, from `mesh.warps`; there, texels are of equal size.
    views: v rendered views.
    side: texels of the texture's side, approximately.
  """
  progress.say(f'Unwrapping {len(mesh.faces):,} faces.')
  z = np.asarray(space[0](mesh.vertices.astype(np.float32)))
  source, faces, uv, (width, height) = unwrap(z, mesh.faces, side)
  picture, empty = np.zeros((height, width, 3), np.uint8), np.ones((height, width), bool)
  for start in progress.track(range(0, len(faces), _CHUNK), 'texture'):
    part = faces[start : start + _CHUNK]
    at, face, weights = texels(uv, part)
    column, row = np.clip(at, 0, [width - 1, height - 1]).T
    corners = source[part[face]]  # [k, 3] vertices.
    xyz = np.einsum('kc,kcj->kj', weights, mesh.vertices[corners])
    votes = points.support(xyz, views, _TOLERANCE)
    between = np.einsum('kc,kcj->kj', weights, mesh.colors[corners])
    picture[row, column] = np.where(votes.seen[:, None] > 0, votes.colors, np.round(between))
    empty[row, column] = False
  # Texels outside charts take the colour of the nearest inside, for programs that interpolate.
  nearest = ndimage.distance_transform_edt(empty, return_distances=False, return_indices=True)
  picture = picture[tuple(nearest)]
  place = np.stack([uv[:, 0] / width, 1 - uv[:, 1] / height], -1)
  return shapes.Shape(
    shape.vertices[source], shape.normals[source], shape.colors[source], faces, place, picture
  )
