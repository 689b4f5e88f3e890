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
  known, counts = np.unique(np.concatenate(ids), return_counts=True)
  often = known[counts >= _SEEN]
  keep = [np.isin(rows, often) for rows in ids]
  points = [xyz[rows] for xyz, rows in zip(points, keep)]
  ids = [rows[kept] for rows, kept in zip(ids, keep)]
  cells = [
    c for i, j in _from_one_place(poses, points) if (c := _cells(poses[j], points, ids, i, j))
  ]
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


def _cells(pose: np.ndarray, points, ids, i: int, j: int) -> tuple[np.ndarray, np.ndarray] | None:
  """Counts points in the cells of photograph j, whose pose is given.

  Returns:
    For cells with enough of both: the smaller number of points, and the number of common ones.
  """
  own, other = (_project(pose, points[k]) for k in (j, i))
  own = own[np.isfinite(own).all(1)]
  if len(own) < _FEWEST * _CELLS:
    return None
  low, high = own.min(0), own.max(0) + 1e-9  # The part of the picture that has points.
  inside = ((other >= low) & (other <= high)).all(1)
  at = [
    (np.minimum((xy - low) / (high - low) * _GRID, np.array(_GRID) - 1)).astype(int) @ [1, _GRID[0]]
    for xy in (own, other[inside])
  ]
  counts = [np.bincount(k, minlength=_GRID[0] * _GRID[1]) for k in at]
  common = at[1][np.isin(ids[i][inside], ids[j])]
  common = np.bincount(common, minlength=len(counts[0]))
  smaller = np.minimum(*counts)
  enough = smaller >= _FEWEST
  return (smaller[enough], common[enough]) if enough.sum() >= _CELLS else None


def _project(pose: np.ndarray, xyz: np.ndarray) -> np.ndarray:
  """Projects points to [p, 2] at z = 1; NaN for those behind the camera."""
  local = xyz @ pose[:, :3].T + pose[:, 3]
  local = np.where(local[:, 2:] > 1e-9, local, np.nan)
  return local[:, :2] / local[:, 2:]
