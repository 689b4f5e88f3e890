"""transforms.json of instant-ngp and nerfstudio, for photographs.

Poses are camera to world with OpenGL axes. A frame's intrinsics override those of
the file. The world is normalised by PCA, as for a COLMAP-posed folder. Alpha is composited on
white.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import colmap, configs, structs
from ..system import files
from . import frames as frames_lib
from . import images, scenes

_LENSES = {
  'PINHOLE': structs.PERSPECTIVE,
  'SIMPLE_PINHOLE': structs.PERSPECTIVE,
  'SIMPLE_RADIAL': structs.PERSPECTIVE,
  'RADIAL': structs.PERSPECTIVE,
  'OPENCV': structs.PERSPECTIVE,
  'OPENCV_FISHEYE': structs.FISHEYE,
  'SIMPLE_RADIAL_FISHEYE': structs.FISHEYE,
  'RADIAL_FISHEYE': structs.FISHEYE,
}
_SPLITS = ('train_filenames', 'val_filenames', 'test_filenames')


def load(config: configs.Config, read_only: bool = False) -> scenes.Scene:
  """Loads `transforms.json`.

  Images are sorted by file name. The split is that of train_filenames and test_filenames (or
  val_filenames); without them every llffhold-th image is held out. `images_<factor>/` is used, and
  made, as for a COLMAP-posed folder.

  Raises:
    DataNotFoundError: the folder, the file or a picture is missing.
    DataError: a file is damaged or contradicts another.
  """
  data_dir = frames_lib.capture_dir(config.data_dir)
  path = os.path.join(data_dir, 'transforms.json')
  table = read_table(path)
  frames = sorted(read_frames(data_dir, path, table), key=lambda frame: frame.name)
  if any(key in table for key in _SPLITS):
    split = _listed_split(path, table, frames)
  else:
    split = frames_lib.split_every(len(frames), config.llffhold)
  return frames_lib.assemble(
    'transforms',
    data_dir,
    frames,
    frames_lib.world_pca(data_dir, frames),
    split,
    factor=config.factor,
    background='white',
    unregistered=frames_lib.unposed(data_dir, frames),
    read_only=read_only,
  )


def read_table(path: str) -> dict[str, Any]:
  """Reads the JSON object of a transforms file.

  Raises:
    DataNotFoundError, DataError: the file is missing, or has no frames.
  """
  hint = "For a folder with a COLMAP model in sparse/0 use Config.dataset_loader = 'llff'."
  table = read_json(path, hint)
  frames = table.get('frames') if isinstance(table, dict) else None
  if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
    raise images.DataError(f"{path}: has no list of 'frames'. Export it again.")
  if not frames:
    raise images.DataError(f"{path}: its list of 'frames' is empty. Pose the pictures again.")
  return table


def read_json(path: str, hint: str) -> Any:
  """Reads a JSON file; `hint` ends the message if it does not exist.

  Raises:
    DataNotFoundError, DataError: the file is missing, or is not valid JSON.
  """
  if not files.is_file(path):
    raise images.DataNotFoundError(f'No such file: {path!r}. {hint}')
  try:
    with open(path, encoding='utf-8') as f:
      return json.load(f)
  except (ValueError, RecursionError) as e:
    raise images.DataError(f'{path}: is not valid JSON ({e}). Export it again.') from None


def read_frames(data_dir: str, path: str, table: dict[str, Any]) -> list[frames_lib.Frame]:
  """Returns the frames of a transforms file, in its order.

  Raises:
    DataError, DataNotFoundError: a value or a picture is missing or invalid.
  """
  result = []
  for number, own in enumerate(table['frames'], 1):
    where = f'{path}: frame {number}'
    if not isinstance(own.get('file_path'), str):
      raise images.DataError(f"{where} has no 'file_path'. Export it again.")
    name = normal_name(own['file_path'])
    with frames_lib.prefix_errors(where):
      file = find_file(data_dir, name)
    where = f'{where} ({name})'
    values = {**table, **own}
    size = _read_size(where, values, data_dir, file)
    model = _camera_model(where, values)
    folder, _, rest = file.partition('/')
    frame = frames_lib.Frame(
      name=name,
      folder=folder if rest else '',
      file=rest or folder,
      intrinsics=_intrinsics(where, values, size, _LENSES[model]),
      size=size,
      pose=_read_pose(where, own),
      model=model,
      mask=_read_mask(where, own, data_dir),
    )
    result.append(frame)
  return result


def _read_mask(where: str, own: dict[str, Any], data_dir: str) -> str | None:
  """Returns the frame's mask_path, relative to data_dir."""
  if own.get('mask_path') is None:
    return None
  if not isinstance(own['mask_path'], str):
    raise images.DataError(f'{where}: mask_path must be a name. Export it again.')
  name = normal_name(own['mask_path'])
  with frames_lib.prefix_errors(where):
    images.inside(data_dir, name)
  return name


def normal_name(file_path: str) -> str:
  """Normalises a path: './images\\a.png', as some tools write it, becomes images/a.png."""
  name = re.sub('/+', '/', file_path.replace('\\', '/'))
  while name.startswith('./'):
    name = name[2:].lstrip('/')
  return name


def find_file(data_dir: str, name: str) -> str:
  """Returns the picture of a frame, relative to data_dir; `name` may lack its extension.

  Raises:
    DataError: the picture is not inside data_dir.
  """
  path = images.inside(data_dir, name)
  found = name
  if not (name.lower().endswith(images.EXTENSIONS) or files.is_file(path)):
    endings = [ending for ext in images.EXTENSIONS for ending in (ext, ext.upper())]
    found += next((ending for ending in endings if files.is_file(path + ending)), '.png')
  images.inside(data_dir, found)
  return found


def _number(where: str, values: dict[str, Any], key: str) -> float | None:
  value = values.get(key)
  if value is None:
    return None
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not (number and abs(value) < frames_lib.LARGEST):
    raise images.DataError(
      f'{where}: {key} must be a number, got {reprlib.repr(value)}. Export it again.'
    )
  return float(value)


def _read_size(where: str, values: dict[str, Any], data_dir: str, file: str) -> tuple[int, int]:
  """Returns the width and height from the file, or from the full-size picture."""
  width, height = _number(where, values, 'w'), _number(where, values, 'h')
  if width is None or height is None:
    header = images.read_header(os.path.join(data_dir, file))
    return header.width, header.height
  fits = all(1 <= side <= colmap.MAX_SIDE and side % 1 == 0 for side in (width, height))
  if not fits:
    raise images.DataError(f'{where}: w and h must be whole pixels, got {width:g} and {height:g}.')
  return int(width), int(height)


def _camera_model(where: str, values: dict[str, Any]) -> str:
  model = values.get('camera_model') or ('OPENCV_FISHEYE' if values.get('is_fisheye') else 'OPENCV')
  if not isinstance(model, str) or model not in _LENSES:
    raise images.DataError(
      f'{where}: unknown camera model {reprlib.repr(model)}. Undistort the pictures, or use one of '
      f'{", ".join(_LENSES)}.'
    )
  return model


def _intrinsics(
  where: str, values: dict[str, Any], size: tuple[int, int], lens: int
) -> colmap.Intrinsics:
  """Returns intrinsics. Fields of view can replace focal lengths; the centre is the default."""

  def focal(key: str, angle_key: str, side: int) -> float | None:
    pixels, angle = _number(where, values, key), _number(where, values, angle_key)
    if pixels is None and angle is not None and 1e-6 < angle < math.pi:
      return 0.5 * side / math.tan(0.5 * angle)
    return pixels

  fx = focal('fl_x', 'camera_angle_x', size[0])
  fy = focal('fl_y', 'camera_angle_y', size[1])
  fx, fy = fx if fx is not None else fy, fy if fy is not None else fx
  if fx is None or min(fx, fy) <= 0:
    raise images.DataError(
      f"{where}: has no focal length. Add a positive 'fl_x' or a 'camera_angle_x' below pi."
    )
  cx, cy = _number(where, values, 'cx'), _number(where, values, 'cy')
  keys = ('k1', 'k2', 'k3', 'k4', 'p1', 'p2')
  return colmap.Intrinsics(
    fx,
    fy,
    size[0] / 2 if cx is None else cx,
    size[1] / 2 if cy is None else cy,
    tuple(_number(where, values, key) or 0.0 for key in keys),
    lens,
  )


def _read_pose(where: str, own: dict[str, Any]) -> np.ndarray:
  """Returns the pose, [3, 4]."""
  try:
    matrix = np.array(own['transform_matrix'], np.float64)
  except (KeyError, ValueError, TypeError, OverflowError):
    matrix = np.empty(0)
  if matrix.shape not in ((4, 4), (3, 4)) or not np.isfinite(matrix).all():
    raise images.DataError(
      f"{where}: 'transform_matrix' must be 4x4 finite numbers, camera to world. Export it again."
    )
  return matrix[:3]


def _listed_split(
  path: str, table: dict[str, Any], frames: Sequence[frames_lib.Frame]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns (train, test) rows from the file's lists; unlisted images are in neither."""
  row = {frame.name: i for i, frame in enumerate(frames)}
  rows = {}
  for key in _SPLITS:
    names = table.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
      raise images.DataError(f'{path}: {key} must be a list of names. Export it again.')
    names = [normal_name(name) for name in names]
    unknown = [name for name in names if name not in row]
    if unknown:
      raise images.DataError(
        f'{path}: {key} has {reprlib.repr(unknown[0])}, which is not a frame. Remove it, or the '
        f'three lists {", ".join(_SPLITS)}.'
      )
    rows[key] = sorted({row[name] for name in names})
  test = rows['test_filenames'] or rows['val_filenames']
  train = rows['train_filenames'] or [i for i in range(len(frames)) if i not in set(test)]
  return tuple(train), tuple(test)
