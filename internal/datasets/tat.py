"""Tanks and Temples in the layout of NeRF++: {train,test}/{rgb,pose,intrinsics}/.

There is a text file for each matrix. Poses are 4x4, camera to world with OpenCV axes; intrinsics
are 4x4 pinhole matrices. The world is normalised by PCA, as for a COLMAP-posed folder.
"""

from __future__ import annotations

import os

import numpy as np

from .. import configs
from ..system import files
from . import frames as frames_lib
from . import images, scenes


def load(config: configs.Config, read_only: bool = False) -> scenes.Scene:
  """Loads a scene in NeRF++'s layout; `Config.factor` uses (and makes) rgb_<factor>/.

  Raises:
    DataNotFoundError: a folder or a file is missing.
    DataError: a file is damaged or contradicts another.
  """
  data_dir = frames_lib.capture_dir(config.data_dir)
  frames, split = frames_lib.train_then_test(lambda part: _read_part(data_dir, part))
  return frames_lib.assemble(
    'tat_nerfpp',
    data_dir,
    frames,
    frames_lib.world_pca,
    split,
    factor=config.factor,
    read_only=read_only,
    config=config,
  )


def _read_part(data_dir: str, part: str) -> list[frames_lib.Frame]:
  """Returns the frames of train/ or test/, sorted by name."""
  folder = f'{part}/rgb'
  names = images.list_images(os.path.join(data_dir, folder))
  if not names:
    raise images.DataNotFoundError(
      f'No images in {os.path.join(data_dir, folder)!r}: Tanks and Temples in the layout of '
      'NeRF++ has train/ and test/, each with rgb/, pose/ and intrinsics/.'
    )
  frames = []
  for name in names:
    text = images.stem(name) + '.txt'
    path = os.path.join(data_dir, part, 'pose', text)
    pose = frames_lib.top_rows(f'{path}: the last row', _read_matrix(path))
    k = _read_matrix(os.path.join(data_dir, part, 'intrinsics', text))
    pose = pose * [1, -1, -1, 1]  # OpenCV to OpenGL axes.
    label = f'{part}/{images.stem(name)}'
    frames.append(frames_lib.pinhole_frame(data_dir, folder, name, k, pose, label))
  return frames


def _read_matrix(path: str) -> np.ndarray:
  """Reads a [4, 4] matrix from 16 numbers on one or four lines."""
  if not files.is_file(path):
    raise images.DataNotFoundError(
      f'No such file: {path!r}. Each picture needs a file in pose/ and one in intrinsics/.'
    )
  try:
    matrix = np.array(files.read_text(path).split(), np.float64).reshape(4, 4)
  except ValueError:
    matrix = np.full((4, 4), np.nan)
  if not np.isfinite(matrix).all():
    raise images.DataError(f'{path}: must be a 4x4 matrix of numbers. Download it again.')
  return matrix
