"""Scenes: everything about a capture except its pixels, which are read one picture at a time.

A scene is saved beside the checkpoints, so that rendering uses the cameras of training.
`n` is the number of images.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import cameras as cameras_lib
from .. import paths, structs
from ..system import files
from . import images, masks

_VERSION = 1  # Format of scene.json.
_MAX_SIDE = 1_000_000  # Pixels.
_ARRAYS = {
  'pixtocam': np.float32,
  'camtoworld': np.float32,
  'distortion': np.float32,
  'lens': np.int32,
  'size': np.int32,
}


@dataclasses.dataclass(frozen=True)
class Applied:
  """How nerfstudio's importer moved a capture: poses in the file are scale * transform * original.

  nerfstudio removes both from the world of its camera paths, so reading those paths needs them.
  """

  transform: np.ndarray  # [4, 4] float64, a similarity; in practice a rotation.
  scale: float = 1.0

  def __post_init__(self):
    with np.errstate(all='ignore'):
      unscaled = self.transform[None, :3] / np.cbrt(np.linalg.det(self.transform[:3, :3]))
    if not (np.isfinite(unscaled).all() and paths.are_rigid(unscaled) and 0 < self.scale < np.inf):
      raise ValueError('applied must be a similarity and a positive scale')


@dataclasses.dataclass(frozen=True)
class Scene:
  """A capture: its pictures' files, their cameras in the normalised world, and the split."""

  loader: str  # Config.dataset_loader.
  files: tuple[str, ...]  # [n] pictures as used, relative to data_dir, with '/'.
  names: tuple[str, ...]  # [n] names in the capture's model.
  cameras: structs.Cameras  # numpy leaves, n rows.
  train: tuple[int, ...]  # Rows of the training images.
  test: tuple[int, ...]  # Rows of the held-out images.
  world_transform: np.ndarray  # [4, 4] float64, capture's to normalised world.
  background: str  # 'white': alpha is composited on white; 'none': pictures have no alpha.
  bounds: tuple[float, float] | None  # Near and far of a forward-facing capture, normalised.
  report: dict[str, Any]  # What a preflight prints.
  masks: tuple[str | None, ...] = ()  # [n] relative to data_dir, or None; () if there are none.
  weights: tuple[float, ...] = ()  # [n] weights in the data loss; () if all are 1.
  applied: Applied | None = None  # Already in the capture's world.
  sources: tuple[str, ...] = ()  # [n] full-size pictures, if `files` must still be made from them.

  def stem(self, i: int) -> str:
    """Returns image i's name for file names: no extension, '/' replaced by '_'."""
    return images.stem(self.names[i]).replace('/', '_')


def save_scene(path: str, scene: Scene) -> None:
  """Writes a scene as JSON, atomically; numbers are restored exactly."""
  cameras = scene.cameras
  fields = {field.name: getattr(scene, field.name) for field in dataclasses.fields(scene)}
  del fields['sources']  # Whoever saves a scene has made the files.
  fields['version'] = _VERSION
  fields['world_transform'] = np.asarray(scene.world_transform, np.float64).tolist()
  if scene.applied:
    fields['applied'] = {
      'transform': scene.applied.transform.tolist(), 'scale': scene.applied.scale
    }  # fmt: skip
  fields['cameras'] = {
    # JSON writes all digits of a float64, so float32 values are exact.
    **{name: np.asarray(getattr(cameras, name), dtype).tolist() for name, dtype in _ARRAYS.items()},
    'pixtocam_ndc': None if cameras.pixtocam_ndc is None else cameras.pixtocam_ndc.tolist(),
    'lenses': cameras.lenses,
    'distorted': cameras.distorted,
  }
  files.write_json(path, fields)


def load_scene(path: str) -> Scene:
  """Loads and validates what `save_scene` wrote.

  Raises:
    DataNotFoundError: the file is missing.
    DataError: the file is damaged, or its version is not supported.
  """
  if not files.is_file(path):
    raise images.DataNotFoundError(f'No such file: {path!r}. Training writes it.')
  try:
    fields = files.read_json(path)
    version = fields.pop('version')
    if version == _VERSION:
      return _checked_scene(fields)
  except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as e:
    reason = f'{type(e).__name__}: {" ".join(str(e).split())}'[:300]
    raise images.DataError(
      f'{path}: is no scene file ({reason}). Train anew to write it.'
    ) from None
  raise images.DataError(
    f'{path}: has version {reprlib.repr(version)}, but this program reads {_VERSION}. Train anew, '
    'or use the program version that wrote it.'
  )


def _checked_scene(fields: dict[str, Any]) -> Scene:
  """Returns a scene from parsed JSON; invalid data may raise any exception."""
  for name in ('files', 'names', 'train', 'test', 'masks', 'weights'):
    fields[name] = tuple(fields.get(name, ()))  # Old files have no masks or weights.
  fields['bounds'] = fields['bounds'] and tuple(map(float, fields['bounds']))
  fields['world_transform'] = _numbers(fields['world_transform'], (4, 4), np.float64)
  if fields.get('applied') is not None:  # Old files have none.
    transform = _numbers(fields['applied']['transform'], (4, 4), np.float64)
    fields['applied'] = Applied(transform, float(fields['applied']['scale']))
  scene = Scene(cameras=_checked_cameras(fields.pop('cameras'), len(fields['names'])), **fields)
  rows = {*scene.train, *scene.test}
  if not all(isinstance(row, int) and 0 <= row < len(scene.names) for row in rows):
    raise ValueError('train and test must be rows of images')
  if not scene.train or len(scene.files) != len(scene.names):
    raise ValueError('train, files or names are too short')
  if not all(map(images.is_relative, scene.files)):
    raise ValueError('files must be names inside the capture')
  if not all(mask is None or images.is_relative(mask) for mask in scene.masks):
    raise ValueError('masks must be names inside the capture')
  if not all(isinstance(weight, float) and 0 < weight < np.inf for weight in scene.weights):
    raise ValueError('weights must be positive')
  if not {len(scene.masks), len(scene.weights)} <= {0, len(scene.names)}:
    raise ValueError('masks or weights are too short')
  if not all(isinstance(name, str) and '\0' not in name for name in scene.names):
    raise ValueError('names must be strings')
  if scene.bounds is not None and not 0 < scene.bounds[0] <= scene.bounds[1] < np.inf:
    raise ValueError(f'bounds are {scene.bounds}')
  if scene.background not in ('white', 'none') or not isinstance(scene.report, dict):
    raise ValueError('background or report')
  return scene


def _checked_cameras(table: dict[str, Any], n: int) -> structs.Cameras:
  """Returns the cameras; stored derived fields must match."""
  shapes = (n, 3, 3), (n, 3, 4), (n, 6), (n,), (n, 2)
  for (name, dtype), shape in zip(_ARRAYS.items(), shapes):
    table[name] = _numbers(table[name], shape, dtype)
  if table['pixtocam_ndc'] is not None:
    table['pixtocam_ndc'] = _numbers(table['pixtocam_ndc'], (3, 3), np.float32)
  lenses, distorted = tuple(table.pop('lenses')), table.pop('distorted')
  cameras = cameras_lib.make_cameras(**table)
  if (lenses, distorted) != (cameras.lenses, cameras.distorted):
    raise ValueError('lenses or distorted do not fit the cameras')
  focal = cameras.pixtocam[:, [0, 1], [0, 1]]
  if not ((cameras.size > 0).all() and (cameras.size <= _MAX_SIDE).all() and (focal > 0).all()):
    raise ValueError('a camera has an impossible size or focal length')
  return cameras


def _numbers(values: Any, shape: tuple[int, ...], dtype) -> np.ndarray:
  """Converts lists of finite numbers to an array."""
  exact = np.array(values, np.float64)
  most = (np.iinfo if np.issubdtype(dtype, np.integer) else np.finfo)(dtype).max
  if exact.shape != shape or not (np.abs(exact) <= most).all():
    raise ValueError(f'{list(exact.shape)} numbers, must be {list(shape)} finite ones')
  return exact.astype(dtype)


def read_image(data_dir: str, scene: Scene, i: int) -> np.ndarray:
  """Reads the pixels of image i, uint8 [h, w, 3], in the size of its camera.

  Raises:
    DataError, DataNotFoundError: the picture is missing, damaged or has changed size.
  """
  path = images.inside(data_dir, scene.files[i])
  width, height = scene.cameras.size[i].tolist()
  return images.decode(path, scene.background, (width, height))


def check_pixels(data_dir: str, scene: Scene, progress: bool = True) -> None:
  """Decodes the training and test images, and their masks, as training and tests do.

  Raises:
    DataError, DataNotFoundError: some cannot be used; the message names them.
  """

  def check(i: int) -> None:
    path = images.inside(data_dir, scene.files[i])
    if scene.sources and not files.exists(path):
      images.decode(images.inside(data_dir, scene.sources[i]), scene.background)
    else:
      read_image(data_dir, scene, i)
    read_mask(data_dir, scene, i)

  rows = sorted({*scene.train, *scene.test})
  names = [scene.names[i] for i in rows]
  images.all_in_threads(check, rows, names, 'checking images' if progress else None)


def read_images(
  data_dir: str, scene: Scene, indices: Sequence[int], progress: bool = True
) -> list[np.ndarray]:
  """Reads the pixels of several images in threads: a list of uint8 [h, w, 3]."""
  label = 'reading images' if progress else None
  return images.in_threads(lambda i: read_image(data_dir, scene, i), list(indices), label)


def read_mask(data_dir: str, scene: Scene, i: int) -> np.ndarray | None:
  """Reads which pixels of image i count, bool [h, w]; None for all.

  Raises:
    DataError, DataNotFoundError: the mask is missing, damaged or all black.
  """
  if not scene.masks or scene.masks[i] is None:
    return None
  return masks.read(images.inside(data_dir, scene.masks[i]), tuple(scene.cameras.size[i].tolist()))


def read_masks(
  data_dir: str, scene: Scene, indices: Sequence[int], progress: bool = True
) -> list[np.ndarray | None]:
  """Reads the masks of several images in threads."""
  label = 'reading masks' if progress and any(scene.masks) else None
  return images.in_threads(lambda i: read_mask(data_dir, scene, i), list(indices), label)
