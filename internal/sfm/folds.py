"""Tests whether a model folds two places that look alike into one.

Photographs that a model puts at one place, looking one way, should see the same points. If they are
of two places, they share the points of what looks alike; beside these, each has points of its own
where the other has points of its own, as in a picture whose frame stays and whose wall changes.
Unlike contradictions between matches, this needs no order and no true match between the places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.spatial.distance

_SEEN = 3  # Photographs that see a point, from which it counts.
_DISTANCE = 0.09  # Of cameras at one place, in median depths: 5 degrees.
_TURN = 25.0  # Degrees between their directions.
_MOST = 3000  # Pairs that are tested.
_GRID = (8, 6)  # Cells of a picture.
_FEWEST = 6  # Points of either photograph that a cell needs,
_EXPECTED = 3.0  # and how many of them should be common, by what other pairs share.
_CELLS = 6  # Cells that a pair needs.
_DIFFERENT = 0.1  # Share of the cells without a common point, from which a pair sees two places.


def share_of_pairs(photographs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
  """Returns the share of pairs from one place that see different points; 0 without such pairs.

  Args:
    photographs: the pose [3, 4] of each, world to camera, the 3D points [f, 3] that it sees, and
      their numbers [f], which photographs that see the same point share.
  """
  if not photographs:
    return 0.0
  poses, points, ids = zip(*photographs)
  _, rows, counts = np.unique(np.concatenate(ids), return_inverse=True, return_counts=True)
  ids = np.split(rows, np.cumsum([len(x) for x in ids])[:-1])  # From 0, without gaps.
  keep = [counts[rows] >= _SEEN for rows in ids]
  points = [xyz[rows] for xyz, rows in zip(points, keep)]
  ids = [rows[kept] for rows, kept in zip(ids, keep)]
  near, cells = _from_one_place(poses, points), []
  for j in np.unique(near[:, 1]):
    own, seen = _project(poses[j], points[j]), np.zeros(len(counts), bool)
    seen[ids[j]] = True
    for i in near[near[:, 1] == j, 0]:
      if found := _cells(own, _project(poses[j], points[i]), seen[ids[i]]):
        cells.append(found)
  if not cells:
    return 0.0
  usual = np.median([common.sum() / smaller.sum() for smaller, common in cells])
  different = []
  for smaller, common in cells:
    tested = smaller * usual >= _EXPECTED
    if tested.sum() >= _CELLS:
      different.append((tested & (common == 0)).sum() > _DIFFERENT * tested.sum())
  return float(np.mean(different)) if different else 0.0


def _from_one_place(poses, points) -> np.ndarray:
  """Returns pairs [m, 2] of photographs near each other that look in about the same direction."""
  local = [xyz @ pose[2, :3] + pose[2, 3] for pose, xyz in zip(poses, points)]
  depth = np.array([np.median(z) if len(z) else np.nan for z in local])  # [n]
  centres = np.stack([-pose[:, :3].T @ pose[:, 3] for pose in poses])
  ahead = np.stack([pose[2, :3] for pose in poses])
  distance = scipy.spatial.distance.cdist(centres, centres)  # [n, n]
  near = (distance < _DISTANCE * depth[:, None]) & (ahead @ ahead.T > np.cos(np.radians(_TURN)))
  np.fill_diagonal(near, False)
  pairs = np.argwhere(near)
  return np.random.default_rng(0).permutation(pairs)[:_MOST]


def _cells(
  own: np.ndarray, other: np.ndarray, both: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
  """Counts points in the cells of a photograph.

  Args:
    own: [p, 2] its points, projected, NaN for those behind it.
    other: [q, 2] the points of another photograph, projected into this one.
    both: [q] whether this one sees them too.

  Returns:
    For cells with enough of both: the smaller number of points, and the number of common ones.
  """
  own = own[np.isfinite(own).all(1)]
  if len(own) < _FEWEST * _CELLS:
    return None
  low, high = own.min(0), own.max(0) + 1e-9  # The part of the picture that has points.
  inside = ((other >= low) & (other <= high)).all(1)
  at = [
    (np.minimum((xy - low) / (high - low) * _GRID, np.array(_GRID) - 1)).astype(int) @ [1, _GRID[0]]
    for xy in (own, other[inside])
  ]
  size = _GRID[0] * _GRID[1]
  counts = [np.bincount(k, minlength=size) for k in at]
  common = np.bincount(at[1][both[inside]], minlength=size)
  smaller = np.minimum(*counts)
  enough = smaller >= _FEWEST
  return (smaller[enough], common[enough]) if enough.sum() >= _CELLS else None


def _project(pose: np.ndarray, xyz: np.ndarray) -> np.ndarray:
  """Projects points to [p, 2] at z = 1; NaN for those behind the camera."""
  local = xyz @ pose[:, :3].T + pose[:, 3]
  local = np.where(local[:, 2:] > 1e-9, local, np.nan)
  return local[:, :2] / local[:, 2:]
