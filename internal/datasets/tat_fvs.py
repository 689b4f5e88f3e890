"""Tanks and Temples in the layout of Free View Synthesis: dense/ibr3d_pw_<scale>/.

The folder has pictures `im_00000000.png` (or .jpg), their pinhole intrinsics `Ks.npy` [n, 3, 3],
and `Rs.npy` [n, 3, 3] and `ts.npy` [n, 3] (world to camera, OpenCV axes). If there are several, the
one with the largest scale is used.
"""

from __future__ import annotations

import os
import re

import numpy as np

from .. import configs
from ..system import files
from . import frames as frames_lib
from . import images, scenes

_FOLDER = re.compile(r'ibr3d_pw_(\d+(?:\.\d+)?)')


def load(config: configs.Config, read_only: bool = False) -> scenes.Scene:
  """Loads a scene in the layout of Free View Synthesis.

  Every llffhold-th picture by name is held out. `Config.factor` is relative to the pictures found.

  Raises:
    DataNotFoundError: a folder or a file is missing.
    DataError: a file is damaged or contradicts another.
  """
  data_dir = frames_lib.capture_dir(config.data_dir)
  frames = _read_frames(data_dir, find_folder(data_dir))
  return frames_lib.assemble(
    'tat_fvs',
    data_dir,
    frames,
    frames_lib.world_pca,
    frames_lib.split_every(len(frames), config.llffhold),
    factor=config.factor,
    read_only=read_only,
    config=config,
  )


def find_folder(data_dir: str) -> str:
  """Returns the folder with the largest scale, relative to data_dir.

  Raises:
    DataNotFoundError: there is none.
  """
  dense = os.path.join(data_dir, 'dense')
  names = os.listdir(dense) if files.is_folder(dense) else []
  scales = {float(found[1]): name for name in names if (found := _FOLDER.fullmatch(name))}
  if not scales:
    raise images.DataNotFoundError(
      f'No folder dense/ibr3d_pw_<scale> in {data_dir!r}, the layout of Free View '
      "Synthesis. For the layout of NeRF++ use Config.dataset_loader = 'tat_nerfpp'."
    )
  return f'dense/{scales[max(scales)]}'


def _read_frames(data_dir: str, folder: str) -> list[frames_lib.Frame]:
  root = os.path.join(data_dir, folder)
  names = [n for n in images.list_images(root) if n.startswith('im_')]
  if not names:
    raise images.DataNotFoundError(f'No pictures im_*.png in {root!r}. Download it again.')
  n = len(names)
  k, r, t = (_read(root, *which) for which in (('Ks', n, 3, 3), ('Rs', n, 3, 3), ('ts', n, 3)))
  rotations = np.swapaxes(r, 1, 2)  # Camera to world.
  poses = np.concatenate([rotations, -rotations @ t[..., None]], -1) * [1, -1, -1, 1]
  return [frames_lib.pinhole_frame(data_dir, folder, *frame) for frame in zip(names, k, poses)]


def _read(root: str, name: str, *shape: int) -> np.ndarray:
  """Reads finite numbers of the given shape from NAME.npy."""
  path = os.path.join(root, f'{name}.npy')
  if not files.is_file(path):
    raise images.DataNotFoundError(f'No such file: {path!r}. Download the scene again.')
  with frames_lib.prefix_errors(path):
    numbers = files.read_array(path)
  if numbers.shape != shape or not (np.abs(numbers) < frames_lib.LARGEST).all():
    raise images.DataError(
      f'{path}: must be finite numbers {list(shape)} for {shape[0]} pictures, has '
      f'{list(numbers.shape)}. Download it again.'
    )
  return numbers
