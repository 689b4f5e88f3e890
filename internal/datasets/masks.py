"""Masks: which pixels of a photograph count, in training and in metrics.

A mask has the full size of its photograph or the size that is used; black (0) pixels do not count.
It is found by name: `masks/a.jpg.png` (COLMAP) or `masks/a.png` (nerfstudio) for `images/a.jpg`,
`masks/train/rgb/a.png` for `train/rgb/a.png`. In a transforms.json, `mask_path` can name another.
In photographs without a mask all pixels count.
"""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from . import images

FOLDER = 'masks'
_PHOTOGRAPHS = 'images/'


def find(data_dir: str, picture: str) -> str | None:
  """Returns the mask of a full-size picture, or None; both paths are relative to data_dir.

  Raises:
    DataError: the mask's name, or a link, leads out of the capture.
  """
  if not os.path.isdir(os.path.join(data_dir, FOLDER)):
    return None
  name = f'{FOLDER}/{picture.removeprefix(_PHOTOGRAPHS)}'
  for candidate in (f'{name}.png', f'{images.stem(name)}.png'):
    if os.path.isfile(images.inside(data_dir, candidate)):
      return candidate
  return None


def check(data_dir: str, mask: str, full: tuple[int, int], used: tuple[int, int]) -> None:
  """Checks the size of a mask.

  Args:
    data_dir: the capture.
    mask: the mask, relative to data_dir.
    full: (width, height) of the full-size picture.
    used: (width, height) of the picture that is used.

  Raises:
    DataNotFoundError: the mask is missing.
    DataError: it is not a picture, or has neither size.
  """
  path = images.inside(data_dir, mask)
  header = images.read_header(path)
  if (header.width, header.height) not in (tuple(full), tuple(used)):
    raise images.DataError(
      f'{path}: is {header.width}x{header.height} pixels, but its picture has {full[0]}x{full[1]}. '
      'A mask must have the size of its picture.'
    )


def read(path: str, size: tuple[int, int]) -> np.ndarray:
  """Reads which pixels count, bool [h, w], at the (width, height) `size`.

  A downsampled pixel counts if all its full-size pixels do.

  Raises:
    DataNotFoundError, DataError: the file is missing, not a picture, too small, or all black.
  """
  counts = images.decode(path).any(-1)
  if counts.shape[::-1] != tuple(size):
    if counts.shape[1] < size[0] or counts.shape[0] < size[1]:
      raise images.DataError(
        f'{path}: is {counts.shape[1]}x{counts.shape[0]} pixels, smaller than its picture as used, '
        f'{size[0]}x{size[1]}. A mask must have the size of its picture.'
      )
    share = Image.fromarray(counts.astype(np.float32)).resize(size, Image.Resampling.BOX)
    counts = np.asarray(share) > 1 - 1e-5
  if not counts.any():
    raise images.DataError(
      f'{path}: leaves nothing of its picture: it is all black. Correct the mask or remove the '
      'picture.'
    )
  return counts
