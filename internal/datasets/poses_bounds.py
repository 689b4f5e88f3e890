"""Cameras from LLFF's poses_bounds.npy, for captures without a COLMAP model.

There is one row per picture, sorted by name: a 3x5 matrix in row-major order and two bounds. The
first three columns are the camera's axes in the world (down, right, back), the fourth its position,
the fifth height, width and focal length of the full-size picture in pixels.
"""

from __future__ import annotations

import os

import numpy as np

from .. import colmap, structs
from ..system import files
from . import frames as frames_lib
from . import images, masks

FILE = 'poses_bounds.npy'


def read_table(path: str) -> np.ndarray:
  """Reads the table, [n, 17] finite numbers.

  Raises:
    DataError: the file has other contents.
  """
  with frames_lib.prefix_errors(path):
    table = files.read_array(path)
  if table.ndim != 2 or table.shape[1] != 17 or not table.size or not np.isfinite(table).all():
    raise images.DataError(
      f'{path}: must have finite numbers [n, 17], n > 0, has {list(table.shape)}. '
      'Make it again, or pose the pictures with COLMAP.'
    )
  return table


def read_bounds(path: str) -> tuple[float, float]:
  """Returns the smallest near and the largest far bound, in the capture's units.

  Raises:
    DataError: the file is damaged, or not 0 < near <= far.
  """
  table = read_table(path)
  near, far = float(table[:, 15].min()), float(table[:, 16].max())
  if not 1 / frames_lib.LARGEST < near <= far < frames_lib.LARGEST:
    raise images.DataError(
      f'{path}: bounds must be 0 < near <= far, got {near} and {far}. Remove the file to take '
      'the bounds from the sparse points.'
    )
  return near, far


def read_frames(data_dir: str) -> list[frames_lib.Frame]:
  """Returns the pictures of images/ with their poses.

  Raises:
    DataError: the file is damaged, or the number of pictures differs.
  """
  path = os.path.join(data_dir, FILE)
  table = read_table(path)
  names = masks.photographs(images.list_images(os.path.join(data_dir, 'images')))
  if len(names) != len(table):
    raise images.DataError(
      f'{path}: has {len(table)} poses for {len(names)} pictures in images/. Restore the missing '
      'pictures, or pose the pictures with COLMAP.'
    )
  frames = []
  for name, row in zip(names, table):
    matrix = row[:15].reshape(3, 5)
    down, right, back, position = matrix[:, :4].T
    height, width, focal = matrix[:, 4]
    if not all(1 <= side <= colmap.MAX_SIDE and side % 1 == 0 for side in (width, height)):
      raise images.DataError(
        f'{path}: {name!r} has the impossible size {width:g}x{height:g}. Make the file again.'
      )
    lens = focal, focal, width / 2, height / 2
    frame = frames_lib.Frame(
      name=name,
      folder='images',
      file=name,
      intrinsics=colmap.Intrinsics(*lens, (0.0,) * 6, structs.PERSPECTIVE),
      size=(int(width), int(height)),
      pose=np.stack([right, -down, back, position], -1),
      model='SIMPLE_PINHOLE',
    )
    frames.append(frame)
  return frames
