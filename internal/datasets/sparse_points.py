"""The capture's sparse points as a run keeps them: for pictures, not for training."""

from __future__ import annotations

import os

import numpy as np

from .. import colmap, configs, paths
from ..system import files
from . import llff, scenes

FILE = 'points.npy'  # [m, 6] float32: position in the normalised world, colour 0 to 255.
_MOST = 50_000


def read(data_dir: str | None, transform: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
  """COLMAP's points [m, 3] of a capture and their colours, uint8; None if there are none.

  `transform` [4, 4] leads from the capture's world to the one that they are wanted in.
  """
  try:
    points = colmap.read_model(llff.find_model(data_dir or '')).points
  except (OSError, ValueError):
    return None  # Poses may come from elsewhere (poses_bounds.npy).
  if not len(points.xyz):
    return None
  return paths.transform_points(transform, points.xyz), points.rgb


def save(checkpoint_dir: str, config: configs.Config, capture: scenes.Scene) -> None:
  """Writes the points of a COLMAP-posed capture into the run's folder; others have none."""
  if capture.loader != 'llff':
    return
  points = read(config.data_dir, capture.world_transform)
  if points is None:
    return
  xyz, rgb = points
  rows = np.flatnonzero((np.abs(xyz) < 1e6).all(-1))
  if not len(rows):
    return
  if len(rows) > _MOST:
    rows = np.random.default_rng(0).choice(rows, _MOST, replace=False)
  table = np.concatenate([xyz, rgb], -1)[rows].astype(np.float32)
  with files.whole(os.path.join(checkpoint_dir, FILE)) as path:
    np.save(path, table)


def load(checkpoint_dir: str) -> tuple[np.ndarray, np.ndarray] | None:
  """Positions [m, 3] in the normalised world and colours, uint8 [m, 3]; None if there are none.

  A file that is damaged counts as none: it is for pictures alone.
  """
  path = os.path.join(checkpoint_dir, FILE)
  if not os.path.isfile(path):
    return None
  try:
    table = files.read_array(path)
  except ValueError:
    return None
  if table.ndim != 2 or table.shape[1] != 6 or not np.isfinite(table).all():
    return None
  return table[:, :3], np.clip(table[:, 3:], 0, 255).astype(np.uint8)
