"""Masks: which pixels of a photograph count, in training and in metrics.

A mask is a picture of the photograph's full size or of the size that is used; where it is black (0)
the photograph's pixel does not count. It is found by name: the photograph `images/a.jpg` has
`masks/a.jpg.png` (COLMAP's way) or `masks/a.png` (nerfstudio's), one in another folder, say
`train/rgb/a.png`, has `masks/train/rgb/a.png`. A transforms.json may name others by `mask_path`.
Photographs without a mask count in full.
"""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from . import images

FOLDER = 'masks'
_PHOTOGRAPHS = 'images/'


def find(data_dir: str, picture: str) -> str | None:
  """The mask of a full-size picture, both relative to data_dir; None if it has none.

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
  """Looks at a mask's header.

  Args:
    data_dir: the capture.
    mask: relative to it.
    full: (width, height) of the full-size picture.
    used: of the picture that is used.

  Raises:
    DataNotFoundError: there is no such mask.
    DataError: it is no picture, or of neither size.
  """
  path = images.inside(data_dir, mask)
  header = images.read_header(path)
  if (header.width, header.height) not in (tuple(full), tuple(used)):
    raise images.DataError(
      f'{path}: is {header.width}x{header.height} pixels, but its picture has {full[0]}x{full[1]}. '
      'A mask must have the size of its picture.'
    )


def read(path: str, size: tuple[int, int]) -> np.ndarray:
  """Which pixels count, bool [h, w], in the (width, height) `size`.

  A pixel of a downsampled picture counts if all that it is made of does.

  Raises:
    DataNotFoundError, DataError: the file is missing, no picture, too small, or black all over.
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
      f'{path}: leaves nothing of its picture. Remove the picture, or mend the mask (black pixels '
      'do not count).'
    )
  return counts
