"""Reads camera paths: .npy files of poses, COLMAP sparse models, nerfstudio's camera paths.

nerfstudio's viewers save camera paths as JSON: `camera_path`, a list of frames, each with
`camera_to_world` (a 4x4 matrix in row-major order, OpenGL axes) and `fov` (vertical, in degrees);
`render_width` and `render_height`; `camera_type` (perspective, fisheye or equirectangular); `fps`.
Their poses are in the world that nerfstudio trains in. Its `dataparser_transforms.json`, written
beside its config.yml, maps the capture's original world to it by `transform` [3, 4] and then
`scale`. Where a transforms.json has `applied_transform` A and `applied_scale` a, the original world
is that before nerfstudio's importer applied them: nerfstudio trains in scale / a (transform A^-1 x)
of the world x of the transforms.json. Paths that our viewer saves have 'world': 'capture', since
they need no conversion.
"""

from __future__ import annotations

import dataclasses
import os
import reprlib
from typing import Any

import numpy as np

from .. import colmap, paths, structs
from ..datasets import scenes
from ..errors import UserError
from ..system import files, warnings

CAPTURE = 'capture'  # Value of 'world' in a path that is in the capture's world.
_TRANSFORMS = 'dataparser_transforms.json'
_LENSES = {
  'perspective': structs.PERSPECTIVE,
  'fisheye': structs.FISHEYE,
  'equirectangular': structs.PANORAMA,
}
_MOST_PIXELS = 100_000  # Per side.
_LARGEST = 1e12  # Limit on the coordinates of a position.


class PathFileError(UserError):
  """A camera path's file that is missing or invalid."""


@dataclasses.dataclass(frozen=True)
class PathFile:
  """The content of a camera path's file, n frames; the config decides on what is None."""

  poses: np.ndarray  # [n, 3, 4] in the capture's world, unless the file says otherwise.
  fov: np.ndarray | None = None  # [n] Vertical, radians.
  size: tuple[int, int] | None = None  # Width and height in pixels.
  lens: int | None = None  # A lens code of `structs`.
  fps: float | None = None


def read(path: str, applied: scenes.Applied | None = None) -> PathFile:
  """Reads a camera path from a folder (COLMAP model), a .json (nerfstudio) or a .npy file.

  A COLMAP model gives only poses, in the order of its images' names.

  Args:
    path: the folder or file.
    applied: how the capture's world came from that of its COLMAP model; None if they are equal.

  Raises:
    PathFileError: the file is missing, or is not a valid camera path.
  """
  if files.is_folder(path):
    result = PathFile(_read_colmap(path, applied))
  elif not files.is_file(path):
    raise PathFileError(f'Config.render_path_file: no such file: {path!r}.')
  elif path.lower().endswith('.json'):
    result = _read_nerfstudio(path, applied)
  else:
    result = PathFile(_read_npy(path))
  rigid = paths.are_rigid(result.poses) & (np.abs(result.poses[:, :, 3]) < _LARGEST).all(-1)
  if not rigid.all():
    raise PathFileError(
      f'{path}: pose {np.argmin(rigid)} is not a rigid transform (it scales, shears, mirrors or is '
      'too far away). Matrices must be camera-to-world, with OpenGL axes.'
    )
  return result


def _read_npy(path: str) -> np.ndarray:
  try:
    poses = files.read_array(path)
    usable = poses.ndim == 3 and poses.shape[1:] in ((3, 4), (4, 4)) and len(poses) > 0
    usable = usable and bool(np.isfinite(poses).all())
  except ValueError:
    usable = False
  if not usable:
    raise PathFileError(
      f'{path}: must be a .npy file of finite camera-to-world matrices [n, 3, 4] or [n, 4, 4].'
    )
  return poses[:, :3]


def _read_colmap(folder: str, applied: scenes.Applied | None) -> np.ndarray:
  try:
    images = colmap.read_model(folder).images.values()
  except (colmap.ModelError, colmap.ModelNotFoundError) as e:
    raise PathFileError(f'Config.render_path_file: {e}') from None
  if not images:
    raise PathFileError(f'{folder}: the sparse model has no images, so there are no poses.')
  poses = np.stack([colmap.camera_to_world(i) for i in sorted(images, key=lambda i: i.name)])
  if applied:
    poses = paths.transform_poses(_scaling(applied.scale) @ applied.transform, poses)
  return poses


def _read_json(path: str) -> dict[str, Any]:
  return files.read_json(path, dict, PathFileError)


def _numbers(where: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
  """Converts a JSON value to finite numbers of a shape; errors start with `where`."""
  try:
    array = np.array(value, np.float64)
    if array.size == np.prod(shape) and np.isfinite(array).all():
      return array.reshape(shape)
  except (ValueError, TypeError, OverflowError):
    pass
  wanted = 'a finite number' if shape == () else f'{np.prod(shape)} finite numbers'
  raise PathFileError(f'{where} must be {wanted}, got {reprlib.repr(value)}.')


def _read_nerfstudio(path: str, applied: scenes.Applied | None) -> PathFile:
  table = _read_json(path)
  frames = table.get('camera_path')
  if not isinstance(frames, list) or not frames or not all(isinstance(f, dict) for f in frames):
    raise PathFileError(
      f"{path}: has no list 'camera_path' with frames. Export a camera path from nerfstudio's "
      'viewer again, or write poses from elsewhere to a .npy file.'
    )
  kind = table.get('camera_type', 'perspective')
  if not isinstance(kind, str) or kind not in _LENSES:
    raise PathFileError(
      f'{path}: camera_type {reprlib.repr(kind)} cannot be rendered; use one of '
      f'{", ".join(_LENSES)}.'
    )
  size = [
    _numbers(f'{path}: {key}', table.get(key), ()) for key in ('render_width', 'render_height')
  ]
  if not all(1 <= side <= _MOST_PIXELS and side == int(side) for side in size):
    raise PathFileError(
      f'{path}: render_width and render_height must be whole numbers from 1 to {_MOST_PIXELS}.'
    )
  poses = np.stack(
    [
      _numbers(f'{path}: camera_to_world of frame {i}', f.get('camera_to_world'), (4, 4))[:3]
      for i, f in enumerate(frames)
    ]
  )
  return PathFile(
    poses=poses if table.get('world') == CAPTURE else _undo_dataparser(path, poses, applied),
    fov=None if _LENSES[kind] == structs.PANORAMA else _read_fov(path, frames),
    size=(int(size[0]), int(size[1])),
    lens=_LENSES[kind],
    fps=_read_fps(path, table),
  )


def _read_fov(path: str, frames: list[dict[str, Any]]) -> np.ndarray:
  degrees = np.array(
    [_numbers(f'{path}: fov of frame {i}', f.get('fov'), ()) for i, f in enumerate(frames)]
  )
  outside = ~((degrees > 0.01) & (degrees < 179.9))
  if outside.any():
    raise PathFileError(
      f'{path}: fov of frame {np.argmax(outside)} must be between 0 and 180 degrees, got '
      f'{degrees[np.argmax(outside)]:g}.'
    )
  return np.radians(degrees)


def _read_fps(path: str, table: dict[str, Any]) -> float | None:
  if table.get('fps') is None:
    return None
  fps = float(_numbers(f'{path}: fps', table['fps'], ()))
  if not 0 < fps <= 1000:
    raise PathFileError(f'{path}: fps must be above 0 and at most 1000, got {fps:g}.')
  return fps


def _scaling(factor: float) -> np.ndarray:
  return np.diag([factor, factor, factor, 1])


def _undo_dataparser(path: str, poses: np.ndarray, applied: scenes.Applied | None) -> np.ndarray:
  """Converts poses to the capture's world if nerfstudio's transform lies beside the path's file."""
  beside = os.path.join(os.path.dirname(path), _TRANSFORMS)
  if not files.is_file(beside):
    warnings.warn(
      f'{path}: {_TRANSFORMS} is not beside it, so its poses are not converted. If nerfstudio '
      "saved the path, copy that file from the folder of nerfstudio's config.yml."
    )
    return poses
  table = _read_json(beside)
  transform = np.eye(4)
  transform[:3] = _numbers(f'{beside}: transform', table.get('transform'), (3, 4))
  scale = float(_numbers(f'{beside}: scale', table.get('scale'), ()))
  if applied:
    transform, scale = transform @ np.linalg.inv(applied.transform), scale / applied.scale
  if not (scale > 0 and paths.are_rigid(transform[None, :3])[0]):
    raise PathFileError(f'{beside}: transform must be a rotation and scale positive.')
  return paths.transform_poses(np.linalg.inv(_scaling(scale) @ transform), poses)
