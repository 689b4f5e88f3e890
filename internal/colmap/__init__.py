"""Reads and writes COLMAP sparse models: cameras, images and points3D, as .bin or as .txt.

Keeps intrinsics, poses, names, the points and, if asked for, which images see them. Poses are
COLMAP's: world to camera, OpenCV axes (x right, y down, z forward), a quaternion
(w, x, y, z) and a translation. `n` is the number of 3D points.
The layout is that of https://colmap.github.io/format.html.
"""

from __future__ import annotations

import os

from ..system import files
from . import binary, contradictions, text
from .model import (
  CAMERA_MODELS,
  LAYOUTS,
  MAX_SIDE,
  REDO,
  Camera,
  Image,
  Intrinsics,
  Model,
  ModelError,
  ModelNotFoundError,
  Points,
  camera_to_world,
  intrinsics,
  make_points,
  posed_image,
  quaternion,
)

__all__ = [
  'CAMERA_MODELS',
  'LAYOUTS',
  'MAX_SIDE',
  'Camera',
  'Image',
  'Intrinsics',
  'Model',
  'ModelError',
  'ModelNotFoundError',
  'Points',
  'camera_to_world',
  'encode',
  'find_extension',
  'image_names',
  'intrinsics',
  'make_points',
  'posed_image',
  'quaternion',
  'read_model',
  'warn_of_contradictions',
  'write_model',
]

_FORMATS = {'.bin': binary, '.txt': text}
warn_of_contradictions = contradictions.warn_of
_KINDS = ('cameras', 'images', 'points3D')


def find_extension(folder: str) -> str | None:
  """Returns the extension of the model in `folder`, '.bin' (preferred) or '.txt', or None."""
  for ext in _FORMATS:
    if all(files.is_file(os.path.join(folder, kind + ext)) for kind in _KINDS[:2]):
      return ext
  return None


def image_names(folder: str) -> list[str] | None:
  """Returns the names of a model's registered images; None if it is damaged."""
  ext = find_extension(folder)
  try:
    images = _FORMATS[ext].read_images(os.path.join(folder, f'images{ext}'))
  except ModelError:
    return None
  return [image.name for image in images.values()]


def read_model(folder: str, with_tracks: bool = False) -> Model:
  """Reads cameras, images and points3D (.bin, or else .txt) from a folder.

  Without a points3D file the point cloud is empty. `with_tracks` also reads which images see each
  point. Memory use is at most a small multiple of the file sizes, even for damaged files.

  Raises:
    ModelNotFoundError: the folder does not exist or has no sparse model.
    ModelError: a file is truncated, damaged or contradicts another.
  """
  if not files.is_folder(folder):
    raise ModelNotFoundError(f'No such folder: {folder!r}.')
  ext = find_extension(folder)
  if ext is None:
    raise ModelNotFoundError(
      f'No sparse model in {folder!r}: it needs cameras and images, both as .bin or as .txt.'
    )
  cameras_file, images_file, points_file = (os.path.join(folder, kind + ext) for kind in _KINDS)
  reader = _FORMATS[ext]
  cameras = reader.read_cameras(cameras_file)
  images = reader.read_images(images_file)
  id_of = {}
  for image in images.values():
    if image.camera_id not in cameras:
      raise ModelError(
        f'{images_file}: image {image.name!r} uses camera {image.camera_id}, which is '
        f'not in {cameras_file}; {REDO}.'
      )
    if id_of.setdefault(image.name, image.id) != image.id:
      raise ModelError(
        f'{images_file}: images {id_of[image.name]} and {image.id} have the same '
        f'name, {image.name!r}; {REDO}.'
      )
  if not files.is_file(points_file):
    return Model(cameras, images, make_points())
  return Model(cameras, images, reader.read_points(points_file, with_tracks))


def encode(model: Model, ext: str) -> dict[str, bytes]:
  """Returns the contents of cameras, images and points3D, without 2D points and tracks."""
  return dict(zip(_KINDS, _FORMATS[ext].encode(model)))


def write_model(folder: str, model: Model, ext: str = '.txt') -> None:
  """Writes cameras, images and points3D, without 2D points and tracks, into `folder`.

  `ext` is '.txt' or '.bin'. `read_model` restores the numbers exactly.
  """
  os.makedirs(folder, exist_ok=True)
  for kind, content in encode(model, ext).items():
    with open(os.path.join(folder, kind + ext), 'wb') as f:
      f.write(content)
