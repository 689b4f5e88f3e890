"""Off-axis basis of Mip-NeRF 360: unit directions distributed evenly over a hemisphere."""

import itertools

import numpy as np

from .errors import UserError

_GOLDEN = (1 + np.sqrt(5)) / 2


def _cyclic(points):
  """Returns all cyclic permutations of the points' coordinates."""
  return [np.roll(p, k) for p in points for k in range(3)]


def _vertices(shape: str) -> np.ndarray:
  """Returns the unit vertices [v, 3] of a regular polyhedron."""
  if shape == 'icosahedron':
    points = _cyclic([(0, a, b * _GOLDEN) for a in (1, -1) for b in (1, -1)])
  elif shape == 'octahedron':
    points = _cyclic([(a, 0, 0) for a in (1, -1)])
  elif shape == 'tetrahedron':
    points = [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]
  else:
    raise UserError(
      f'The basis shape must be icosahedron, octahedron or tetrahedron, got {shape!r}.'
    )
  points = np.array(points, np.float64)
  return points / np.linalg.norm(points, axis=-1, keepdims=True)


def _faces(points: np.ndarray) -> list[tuple[int, int, int]]:
  """Returns the triangular faces of a regular polyhedron, as indices of mutually nearest points."""
  distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
  edge = np.min(distance[distance > 1e-6]) * (1 + 1e-6)
  near = distance <= edge
  return [
    (i, j, k)
    for i, j, k in itertools.combinations(range(len(points)), 3)
    if near[i, j] and near[j, k] and near[i, k]
  ]


def _tessellate(points: np.ndarray, subdivisions: int) -> np.ndarray:
  """Splits every edge into `subdivisions` parts and projects the new vertices onto the sphere."""
  corners = [
    (a, b, subdivisions - a - b)
    for a in range(subdivisions + 1)
    for b in range(subdivisions + 1 - a)
  ]
  weights = np.array(corners) / subdivisions
  new = np.concatenate([weights @ points[list(face)] for face in _faces(points)])
  return new / np.linalg.norm(new, axis=-1, keepdims=True)


def _half_sphere(points: np.ndarray) -> np.ndarray:
  """Keeps one point of each antipodal pair, without duplicates, in a fixed order.

  The kept point has a positive last nonzero coordinate.
  """
  points = np.round(points, 12) + 0.0  # Adding 0.0 turns -0.0 into 0.0.
  kept = {}
  for p in points:
    last = p[np.nonzero(p)[0][-1]]
    p = p if last > 0 else -p + 0.0
    kept[tuple(np.round(p, 9))] = p
  return np.array([kept[k] for k in sorted(kept, reverse=True)])


def generate_basis(shape: str, subdivisions: int) -> np.ndarray:
  """Generates the basis P for the off-axis encoding (arXiv:2111.12077, section 2).

  The columns are the vertices of a tessellated polyhedron, one of each antipodal pair.

  Args:
    shape: 'icosahedron', 'octahedron' or 'tetrahedron'.
    subdivisions: number of parts that each edge is split into, at least 1.

  Returns:
    [3, b] float64 unit columns. ('icosahedron', 2) has the 21 columns of the paper;
    ('octahedron', 1) is the identity.

  Raises:
    UserError: the shape is unknown, or subdivisions is below 1.
  """
  if subdivisions < 1:
    raise UserError(f'The basis subdivisions must be at least 1, got {subdivisions}.')
  return _half_sphere(_tessellate(_vertices(shape), subdivisions)).T
