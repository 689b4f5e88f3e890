"""Downsampled pictures: finds images_<factor>/, or makes it from images/.

The write is atomic: pictures go to a temporary folder that is renamed when complete. Several
processes may do this at once.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import shutil
import uuid
from collections.abc import Sequence

import numpy as np
from PIL import Image

from . import images


@dataclasses.dataclass(frozen=True)
class Pictures:
  """The files of a capture's pictures, in the order of the requested names."""

  files: tuple[str, ...]  # Relative to the capture's folder.
  headers: tuple[images.Header, ...]
  to_be_made: str | None = None  # The missing folder, if read_only.


def folder_name(folder: str, factor: int) -> str:
  """'images', 4 -> 'images_4'; factors 0 and 1 mean the full size."""
  return f'{folder}_{factor}' if factor > 1 else folder


def downsampled_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
  """Returns (width, height) over factor, halves rounded up, as in the published 360 dataset."""
  return tuple(max(1, int(side / factor + 0.5)) for side in size)


def locate(
  data_dir: str,
  folder: str,
  names: Sequence[str],
  factor: int = 0,
  background: str = 'none',
  read_only: bool = False,
) -> Pictures:
  """Finds (or makes) the pictures `names` of `folder`, downsampled by `factor`.

  Args:
    data_dir: the capture.
    folder: the folder of the full-size pictures, relative to data_dir; '' for data_dir itself.
    names: the pictures wanted, relative to the folder.
    factor: 0 or 1 for the full size.
    background: see `images.decode`.
    read_only: report a missing folder instead of making it. The caller checks with `missing`
      that the pictures exist.

  Raises:
    DataNotFoundError: a picture is missing.
    DataError: a picture cannot be read; the two folders do not match.
  """
  for name in names:
    images.inside(data_dir, images.join(folder, name))
  if not read_only:
    check_present(data_dir, folder, names, factor)
  if factor <= 1:
    files = [images.join(folder, name) for name in names]
    return Pictures(tuple(files), _read_headers(data_dir, files))
  if not folder:
    raise images.DataError(
      f'{data_dir}: Config.factor = {factor} needs pictures in a folder of their own, such as '
      'images/. Move them there or set Config.factor = 0.'
    )
  small = folder_name(folder, factor)
  if not images.list_images(os.path.join(data_dir, small)):
    if read_only:
      return _foresee(data_dir, folder, names, factor)
    make(data_dir, folder, factor, background)
  pairs = pair(data_dir, folder, small, names)
  files = [images.join(small, pairs[name]) for name in names]
  return Pictures(tuple(files), _read_headers(data_dir, files))


def missing(data_dir: str, folder: str, names: Sequence[str], factor: int = 0) -> list[str]:
  """Returns which of `names` do not exist; downsampled pictures can stand in for full-size ones."""
  if factor > 1 and images.list_images(os.path.join(data_dir, folder_name(folder, factor))):
    return []
  root = os.path.join(data_dir, folder)
  return [name for name in names if not os.path.isfile(os.path.join(root, name))]


def pair(data_dir: str, folder: str, small: str, names: Sequence[str]) -> dict[str, str]:
  """Returns the picture in the folder `small` for each of `names` in `folder`.

  Pictures are matched by name without the extension. If no names agree (LLFF numbers its
  downsampled pictures), the two sorted lists are matched by position; their lengths must be equal.

  Raises:
    DataError: a picture has no counterpart.
  """
  full = images.list_images(os.path.join(data_dir, folder)) or sorted(names)
  reduced = images.list_images(os.path.join(data_dir, small))
  by_stem = {images.stem(name): name for name in reduced}
  unmatched = [name for name in names if images.stem(name) not in by_stem]
  unique = len(by_stem) == len(reduced) and len({images.stem(n) for n in full}) == len(full)
  if not unmatched and unique:
    return {name: by_stem[images.stem(name)] for name in names}
  if len(full) == len(reduced) and (len(unmatched) == len(names) or not unique):
    by_order = dict(zip(full, reduced))
    unmatched = [name for name in names if name not in by_order]
    if not unmatched:
      return {name: by_order[name] for name in names}
  raise images.DataError(
    f'{os.path.join(data_dir, small)} does not match {folder}/: {len(reduced)} pictures for '
    f'{len(full)}, none for {_some(unmatched or names)}. Remove {small}/; it will be made again.'
  )


def make(data_dir: str, folder: str, factor: int, background: str = 'none') -> None:
  """Makes `<folder>_<factor>/` from all pictures of a folder: box filter, PNG.

  Raises:
    DataError: a picture cannot be read, or the folder cannot be written.
  """
  source = os.path.join(data_dir, folder)
  target = os.path.join(data_dir, folder_name(folder, factor))
  names = images.list_images(source)
  temporary = os.path.join(
    os.path.dirname(target), f'.{os.path.basename(target)}.{uuid.uuid4().hex}'
  )

  def shrink(names: tuple[str, str]) -> None:
    path = os.path.join(temporary, names[1])
    os.makedirs(os.path.dirname(path), exist_ok=True)
    _shrink(images.inside(data_dir, images.join(folder, names[0])), path, factor, background)

  try:
    os.mkdir(temporary)
    label = f'making {folder_name(folder, factor)}/'
    images.in_threads(shrink, list(zip(names, target_names(names))), label)
    try:
      os.replace(temporary, target)
    except OSError:
      if not images.list_images(target):  # Otherwise another process was faster.
        raise
  except images.DataNotFoundError:
    raise
  except OSError as e:
    raise images.DataError(
      f'{target}: cannot be made ({e.strerror or e}). Make the parent folder writable, or change '
      'Config.factor.'
    ) from None
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def target_names(names: Sequence[str]) -> list[str]:
  """Returns a unique .png name for each picture: a.png, or a.jpg.png if there is also an a.png."""
  count = collections.Counter(map(images.stem, names))
  return [(images.stem(n) if count[images.stem(n)] == 1 else n) + '.png' for n in names]


def _shrink(source: str, target: str, factor: int, background: str) -> None:
  """Writes a downsampled PNG. Keeps the EXIF tag: only the camera tells whether it applies."""
  pixels = images.decode(source, background)
  size = downsampled_size((pixels.shape[1], pixels.shape[0]), factor)
  small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
  images.save_png(target, small, images.read_header(source).orientation)


def _foresee(data_dir: str, folder: str, names: Sequence[str], factor: int) -> Pictures:
  """Returns the pictures that `make` would make."""
  small = folder_name(folder, factor)
  everything = images.list_images(os.path.join(data_dir, folder))
  target = dict(zip(everything, target_names(everything)))
  headers = _read_headers(data_dir, [images.join(folder, name) for name in names])
  headers = tuple(
    images.Header(*downsampled_size((h.width, h.height), factor), h.orientation) for h in headers
  )
  files = tuple(images.join(small, target.get(name, images.stem(name) + '.png')) for name in names)
  return Pictures(files, headers, to_be_made=small)


def _some(names: Sequence[str]) -> str:
  more = f' and {len(names) - 1} more' if len(names) > 1 else ''
  return f'{names[0]!r}{more}'


def _read_headers(data_dir: str, files: Sequence[str]) -> tuple[images.Header, ...]:
  paths = [images.inside(data_dir, file) for file in files]
  return tuple(images.in_threads(images.read_header, paths))


def check_present(data_dir: str, folder: str, names: Sequence[str], factor: int) -> None:
  """Raises a DataNotFoundError that names the first missing picture, if one is missing."""
  absent = missing(data_dir, folder, names, factor)
  if not absent:
    return
  root = os.path.join(data_dir, folder)
  if not os.path.isdir(root):
    raise images.DataNotFoundError(f'No such folder: {root!r}. Put the pictures there.')
  raise images.DataNotFoundError(
    f'{os.path.join(root, absent[0])}: no such image, but the capture has a pose for it '
    f'({len(absent)} of {len(names)} are missing). Put it back, or pose the capture again.'
  )
