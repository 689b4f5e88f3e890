"""mip-NeRF's multi-scale Blender scenes: one metadata.json for pictures of several sizes.

Its parts 'train', 'val' and 'test' are tables with one row per picture: `file_path`, `cam2world`
(OpenGL axes), `width`, `height`, `focal` in pixels of that size, and `lossmult`, the weight of its
pixels in the data loss (in mip-NeRF the area of a pixel). Objects on white; the capture's world is
kept.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from .. import configs
from . import blender, images, scenes, transforms
from . import frames as frames_lib

_COLUMNS = ('file_path', 'cam2world', 'width', 'height', 'focal', 'lossmult')


def load(config: configs.Config, read_only: bool = False) -> scenes.Scene:
  """Loads a multi-scale Blender scene.

  Raises:
    DataNotFoundError: the folder, metadata.json or a picture is missing.
    DataError: a file is damaged or contradicts another.
  """
  data_dir = frames_lib.capture_dir(config.data_dir)
  path = os.path.join(data_dir, 'metadata.json')
  tables = _read_tables(path)

  def read(part: str) -> list[frames_lib.Frame]:
    rows = _rows(f'{path}: {part}', tables.get(part))
    frames = transforms.read_frames(data_dir, f'{path}: {part}', {'frames': rows})
    return [dataclasses.replace(f, weight=row['_lossmult']) for f, row in zip(frames, rows)]

  return blender.assemble('multicam', config, read, read_only)


def _read_tables(path: str) -> dict[str, Any]:
  hint = "For a Blender scene of one scale use Config.dataset_loader = 'blender'."
  tables = transforms.read_json(path, hint)
  if not isinstance(tables, dict):
    raise images.DataError(f"{path}: must have the parts 'train' and 'test'. Make it again.")
  return tables


def _rows(where: str, table: Any) -> list[dict[str, Any]]:
  """Converts the columns of a part to the frames of a transforms.json, plus `lossmult`."""
  if not isinstance(table, dict):
    raise images.DataError(f'{where}: is missing or not a table. Make it again.')
  columns = [table.get(name) for name in _COLUMNS]
  if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
    raise images.DataError(
      f'{where}: must have the columns {", ".join(_COLUMNS)}, all of one length. Make it again.'
    )
  rows = []
  for path, pose, width, height, focal, weight in zip(*columns):
    if not (isinstance(weight, int | float) and 0 < weight < frames_lib.LARGEST):
      raise images.DataError(f'{where}: lossmult must be positive numbers. Make it again.')
    rows.append(
      {
        'file_path': path,
        'transform_matrix': pose,
        'w': width,
        'h': height,
        'fl_x': focal,
        'camera_model': 'PINHOLE',
        '_lossmult': float(weight),  # No key of a transforms.json.
      }
    )
  return rows
