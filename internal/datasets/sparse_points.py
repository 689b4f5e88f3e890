"""The capture's sparse points in a run's folder: for visualisation, not for training."""

from __future__ import annotations

import os

import numpy as np

from .. import colmap, configs, paths
from ..system import files
from . import llff, scenes

FILE = 'points.npy'  # [m, 6] float32: position in the normalised world, colour 0 to 255.
_MAX_POINTS = 50_000


def read(data_dir: str | None, transform: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns COLMAP's points [m, 3] and their colours, uint8 [m, 3]; None if there are none.

  `transform` [4, 4] maps the capture's world to the world of the result.
  """
  try:
    points = colmap.read_model(llff.find_model(data_dir or '')).points
  except (OSError, ValueError):
    return None  # Poses may come from elsewhere (poses_bounds.npy).
  if not len(points.xyz):
    return None
  return paths.transform_points(transform, points.xyz), points.rgb


def save(checkpoint_dir: str, config: configs.Config, capture: scenes.Scene) -> None:
  """Writes the points of a COLMAP-posed capture into the run's folder."""
  if capture.loader != 'llff':
    return
  points = read(config.data_dir, capture.world_transform)
  if points is None:
    return
  xyz, rgb = points
  rows = np.flatnonzero((np.abs(xyz) < 1e6).all(-1))
  if not len(rows):
    return
  if len(rows) > _MAX_POINTS:
    rows = np.random.default_rng(0).choice(rows, _MAX_POINTS, replace=False)
  table = np.concatenate([xyz, rgb], -1)[rows].astype(np.float32)
  with files.whole(os.path.join(checkpoint_dir, FILE)) as path:
    np.save(path, table)


def load(checkpoint_dir: str) -> tuple[np.ndarray, np.ndarray] | None:
  """Loads positions [m, 3] in the normalised world and colours, uint8 [m, 3].

  Returns None if the file is missing or damaged, since it is only for visualisation.
  """
  path = os.path.join(checkpoint_dir, FILE)
  if not files.is_file(path):
    return None
  try:
    table = files.read_array(path)
  except ValueError:
    return None
  if table.ndim != 2 or table.shape[1] != 6 or not np.isfinite(table).all():
    return None
  return table[:, :3], np.clip(table[:, 3:], 0, 255).astype(np.uint8)
