"""DTU's multi-view stereo scans: Rectified/scan<n>/rect_001_3_r5000.png, Calibration/cal18/.

Each of 49 or 64 camera positions has pictures in seven lights (0 to 6) and in all of them ('max');
Config.dtu_light_cond chooses one, 7 means 'max'. `pos_001.txt` is the 3x4 projection matrix of a
position, K [R | t] with OpenCV axes, the same for all scans. Pictures are in the scan's folder or
in its images/, where Config.factor can make smaller ones.
"""

from __future__ import annotations

import os
import re

import numpy as np

from .. import configs
from ..system import files
from . import frames as frames_lib
from . import images, scenes

_PICTURE = r'rect_(\d{3})_%s\.\w+'
_CALIBRATIONS = ('cal18', '../cal18', '../../cal18', '../../Calibration/cal18')
_MAX_SKEW = 1e-3  # Relative to the focal length: ignoring it moves no point by a pixel.


def load(config: configs.Config, read_only: bool = False) -> scenes.Scene:
  """Loads one scan; `Config.data_dir` is its folder. Every llffhold-th position is held out.

  Raises:
    DataNotFoundError: the folder, the calibration or a picture is missing.
    DataError: a file is damaged or contradicts another.
  """
  data_dir = frames_lib.capture_dir(config.data_dir)
  frames = _read_frames(data_dir, config.dtu_light_cond)
  return frames_lib.assemble(
    'dtu',
    data_dir,
    frames,
    frames_lib.world_pca,
    frames_lib.split_every(len(frames), config.llffhold),
    factor=config.factor,
    read_only=read_only,
    config=config,
  )


def _read_frames(data_dir: str, light: int) -> list[frames_lib.Frame]:
  folder = 'images' if files.is_folder(os.path.join(data_dir, 'images')) else ''
  pattern = re.compile(_PICTURE % ('max' if light == 7 else f'{light}_r[57]000'))
  found = {n: m for n in images.list_images(os.path.join(data_dir, folder))
           if (m := pattern.fullmatch(n))}  # fmt: skip
  if not found:
    raise images.DataNotFoundError(
      f'No pictures rect_001_{light}_r5000.png in {data_dir!r}. Set Config.data_dir to the folder '
      'of one DTU scan, and Config.dtu_light_cond to one of its lights (0 to 6, 7 for all).'
    )
  calibration = _find_calibration(data_dir)
  frames = []
  for name, match in found.items():
    path = os.path.join(calibration, f'pos_{match[1]}.txt')
    frames.append(frames_lib.pinhole_frame(data_dir, folder, name, *_read_projection(path)))
  return frames


def _find_calibration(data_dir: str) -> str:
  for place in _CALIBRATIONS:
    folder = os.path.join(data_dir, place)
    if files.is_folder(folder):
      return folder
  raise images.DataNotFoundError(
    f'No calibration for {data_dir!r}: looked for {", ".join(_CALIBRATIONS)}. Copy it from '
    "Calibration/cal18 in DTU's SampleSet."
  )


def _read_projection(path: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the intrinsics [3, 3] and the pose [3, 4], OpenGL camera axes to world."""
  if not files.is_file(path):
    raise images.DataNotFoundError(f'No such file: {path!r}. Each picture needs its calibration.')
  try:
    projection = np.array(files.read_text(path).split(), np.float64).reshape(3, 4)
    k, rotation, centre = decompose(projection)
  except (ValueError, np.linalg.LinAlgError):
    raise images.DataError(f'{path}: must be a 3x4 projection matrix. Download it again.') from None
  if abs(k[0, 1]) > _MAX_SKEW * k[0, 0]:
    raise images.DataError(f'{path}: has skewed pixels ({k[0, 1]:g}), which is not supported.')
  return k, np.concatenate([rotation.T * [1, -1, -1], centre[:, None]], -1)


def decompose(projection: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Decomposes P = scale K [R | -R c] (Hartley and Zisserman, section 6.2.4).

  Args:
    projection: [3, 4].

  Returns:
    K [3, 3] upper triangular with a positive diagonal and K[2, 2] = 1, the rotation R [3, 3] and
    the centre c [3].

  Raises:
    ValueError, LinAlgError: the matrix is not a camera projection.
  """
  matrix = projection[:, :3]
  if not (np.abs(projection) < frames_lib.LARGEST).all() or np.linalg.cond(matrix) > 1e12:
    raise ValueError('not a projection')
  centre = -np.linalg.solve(matrix, projection[:, 3])
  # QR of the matrix flipped about its antidiagonal gives the RQ decomposition.
  q, r = np.linalg.qr(matrix[::-1].T)
  k, rotation = r.T[::-1, ::-1], q.T[::-1]
  signs = np.sign(np.diag(k))
  k, rotation = k * signs, signs[:, None] * rotation
  return k / k[2, 2], rotation * np.linalg.det(rotation), centre
