"""The capture's sparse points in a run's folder: for visualisation, not for training."""

from __future__ import annotations

import os

import numpy as np

from .. import colmap, configs, paths
from ..system import files
from . import llff, ply, scenes, transforms

FILE = 'points.npy'  # [m, 6] float32: position in the normalised world, colour 0 to 255.
_MAX_POINTS = 50_000


def read(
  data_dir: str | None, transform: np.ndarray, loader: str = 'llff'
) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns a capture's points [m, 3] and their colours, uint8 [m, 3]; None if there are none.

  They are those of the COLMAP model or, for the loader 'transforms', of `ply_file_path`.
  `transform` [4, 4] maps the capture's world to the world of the result.
  """
  data_dir = data_dir or ''
  try:
    if loader == 'transforms':
      table = transforms.read_table(os.path.join(data_dir, 'transforms.json'))
      path = transforms.points_file(data_dir, table)
      xyz, rgb = ply.read_points(path) if path else ((), ())
    else:
      points = colmap.read_model(llff.find_model(data_dir)).points
      xyz, rgb = points.xyz, points.rgb
  except (OSError, ValueError):
    return None  # Poses may come from elsewhere (poses_bounds.npy).
  return (paths.transform_points(transform, xyz), rgb) if len(xyz) else None


def save(checkpoint_dir: str, config: configs.Config, capture: scenes.Scene) -> None:
  """Writes the sparse points of a capture, if it has some, into the run's folder."""
  if capture.loader not in ('llff', 'transforms'):
    return
  points = read(config.data_dir, capture.world_transform, capture.loader)
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
