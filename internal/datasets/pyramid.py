"""Downsampled pictures: finds images_<factor>/, or makes it from images/.

The write is atomic: pictures go to a temporary folder that is renamed when complete. Several
processes may do this at once.

A manifest in the folder has the digests of its pictures and of those they were made from. If these
have changed, a folder that was made here is made again. One of another program is compared with
images/ (`comparison`), and refused if it shows something else.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..system import files, warnings
from . import comparison, images, masks

# How reduced pictures were made.
NOT_REDUCED, BY_DATASET, BY_AREA_FILTER = 'none', 'dataset', 'area filter'

_MANIFEST = '.sources.json'
_BLOCK, _BLOCKS = 2**14, 8  # Bytes, and how many such blocks of a file count in its digest.


@dataclasses.dataclass(frozen=True)
class Pictures:
  """The files of a capture's pictures, in the order of the requested names."""

  files: tuple[str, ...]  # Relative to the capture's folder.
  headers: tuple[images.Header, ...]
  reduction: str  # NOT_REDUCED, BY_DATASET (another program) or BY_AREA_FILTER (`make`).
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
    return Pictures(tuple(files), _read_headers(data_dir, files), NOT_REDUCED)
  if not folder:
    raise images.DataError(
      f'{data_dir}: Config.factor = {factor} needs pictures in a folder of their own, such as '
      'images/. Move them there or set Config.factor = 0.'
    )
  pairs, reduction = _find_small(data_dir, folder, names, factor, background, read_only)
  if pairs is None:
    return _foresee(data_dir, folder, names, factor)
  files = [images.join(folder_name(folder, factor), pairs[name]) for name in names]
  return Pictures(tuple(files), _read_headers(data_dir, files), reduction)


def _find_small(
  data_dir, folder, names, factor, background, read_only
) -> tuple[dict[str, str] | None, str]:
  """Returns the small picture of each name, after making or checking them, and how it was made.

  With read_only, None instead of pictures that would have to be made.
  """
  small = folder_name(folder, factor)
  root = os.path.join(data_dir, small)
  existing = bool(images.list_images(root))
  known = _read_manifest(root)
  digests = _digest_all(data_dir, folder, names) if existing else {}
  stale = not existing or (known['own'] and _is_stale(root, folder, names, known, digests))
  if stale and read_only:
    return None, BY_AREA_FILTER
  if stale:
    make(data_dir, folder, factor, background, names)
    known = _read_manifest(root)
  if known['own'] and known['files'].keys() >= set(names):
    pairs = {name: known['files'][name] for name in names}
  else:
    pairs = pair(data_dir, folder, small, names)
  changed = not stale and _verify(data_dir, folder, small, pairs, known, digests, read_only)
  return pairs, BY_AREA_FILTER if known['own'] and not changed else BY_DATASET


def _read_manifest(folder: str) -> dict[str, Any]:
  """Returns the manifest of a folder of downsampled pictures; an empty one if it has none.

  `own`: whether the folder was made here. `files`: the small picture of each full-size one.
  `digests`: those of each full-size picture and its small one.
  """
  empty = {'own': False, 'files': {}, 'digests': {}}
  try:
    known = files.read_json(os.path.join(folder, _MANIFEST))
    names = [*known['files'].values(), *known['files']]
    valid = all(map(images.is_relative, names))
    valid &= all(isinstance(pair, list) and len(pair) == 2 for pair in known['digests'].values())
    return {key: known[key] for key in empty} if valid else empty
  except (OSError, ValueError, LookupError, TypeError, AttributeError):
    return empty


def _write_manifest(folder: str, known: Mapping[str, Any]) -> None:
  files.write_json(os.path.join(folder, _MANIFEST), known)


def digest(path: str) -> str | None:
  """Returns a digest of a file's size and of blocks spread over it; None if there is no file."""
  if not files.is_file(path):
    return None
  size = os.path.getsize(path)
  found = hashlib.blake2b(str(size).encode(), digest_size=16)
  with open(path, 'rb') as f:
    if size <= _BLOCK * _BLOCKS:
      found.update(f.read())
    else:
      for k in range(_BLOCKS):
        f.seek(k * (size - _BLOCK) // (_BLOCKS - 1))
        found.update(f.read(_BLOCK))
  return found.hexdigest()


def _digest_all(data_dir: str, folder: str, names: Sequence[str]) -> dict[str, str]:
  """Returns the digests of the pictures that exist."""
  paths = [images.inside(data_dir, images.join(folder, name)) for name in names]
  return {n: d for n, d in zip(names, images.in_threads(digest, paths)) if d}


def _is_stale(root: str, folder: str, names, known, digests) -> bool:
  """Returns whether pictures have changed or been added since the folder `root` was made here.

  Raises:
    DataError: they have, but the folder cannot be made again.
  """

  def is_current(name: str) -> bool:
    made = os.path.join(root, known['files'].get(name, ''))
    return digests[name] == known['digests'].get(name, [None])[0] and files.is_file(made)

  changed = [name for name in digests if not is_current(name)]
  if not changed:
    return False
  what = f'{root}: is out of date for {len(changed)} of {len(names)} pictures of {folder}/'
  if len(digests) < len(names) or os.path.islink(root):
    raise images.DataError(f'{what}: {warnings.some(changed)}. Remove the folder.')
  warnings.warn(f'{what}: {warnings.some(changed)}. It is made again, unless this is a dry run.')
  return True


def _verify(data_dir, folder, small, pairs, known, digests, read_only) -> bool:
  """Compares the contents of small pictures that the manifest does not know; then it does.

  Returns whether there were any.

  Raises:
    DataError: a small picture shows something else than its full-size one.
  """
  reduced = _digest_all(data_dir, small, [pairs[name] for name in digests])
  current = {name: [own, reduced.get(pairs[name])] for name, own in digests.items()}
  new = [name for name in current if current[name] != known['digests'].get(name)]
  if not new:
    return False
  root = os.path.join(data_dir, small)
  comparison.check(os.path.join(data_dir, folder), root, pairs, new, f'{folder}/', f'{small}/')
  if not read_only:
    merged = {
      'own': False,  # Not any more, if somebody has changed its pictures.
      'files': {**known['files'], **{name: pairs[name] for name in current}},
      'digests': {**known['digests'], **current},
    }
    with contextlib.suppress(OSError):  # In a folder that is not writable, they are compared again.
      _write_manifest(root, merged)
  return True


def missing(data_dir: str, folder: str, names: Sequence[str], factor: int = 0) -> list[str]:
  """Returns which of `names` do not exist; downsampled pictures can stand in for full-size ones."""
  if factor > 1 and images.list_images(os.path.join(data_dir, folder_name(folder, factor))):
    return []
  root = os.path.join(data_dir, folder)
  return [name for name in names if not files.is_file(os.path.join(root, name))]


def pair(data_dir: str, folder: str, small: str, names: Sequence[str]) -> dict[str, str]:
  """Returns the picture in the folder `small` for each of `names` in `folder`.

  Pictures are matched by name without the extension. If no names agree (LLFF numbers its
  downsampled pictures), the two sorted lists are matched by position; their lengths must be equal.

  Raises:
    DataError: a picture has no counterpart.
  """
  full = _photographs(data_dir, folder, names) or sorted(names)
  reduced = _photographs(data_dir, small, names)
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
    f'{len(full)}, none for {warnings.some(unmatched or names, 1)}. Remove {small}/; it will be '
    'made again.'
  )


def _photographs(data_dir: str, folder: str, names: Sequence[str]) -> list[str]:
  """Lists the pictures in a folder that are not masks; `names` are photographs."""
  return masks.photographs(images.list_images(os.path.join(data_dir, folder)), names)


def make(
  data_dir: str, folder: str, factor: int, background: str = 'none', names: Sequence[str] = ()
) -> None:
  """Makes `<folder>_<factor>/` from all photographs of a folder: box filter, PNG.

  Replaces an existing folder that was made here. `names` are photographs even if they are named
  like masks.

  Raises:
    DataError: a picture cannot be read, or the folder cannot be written.
  """
  target = os.path.join(data_dir, folder_name(folder, factor))
  names = _photographs(data_dir, folder, names)
  stem = os.path.join(os.path.dirname(target), f'.{os.path.basename(target)}.')
  temporary, lock = stem + uuid.uuid4().hex, contextlib.ExitStack()

  def shrink(names: tuple[str, str]) -> list[str | None]:
    source = images.inside(data_dir, images.join(folder, names[0]))
    path = os.path.join(temporary, names[1])
    os.makedirs(os.path.dirname(path), exist_ok=True)
    before = digest(source)  # Before it is read: a change from then on is noticed.
    _shrink(source, path, factor, background)
    return [before, digest(path)]

  try:
    _remove_abandoned(stem)
    os.mkdir(temporary)
    with contextlib.suppress(OSError):  # Some shared disks have no locks.
      lock.enter_context(_locked(temporary))
    label = f'making {folder_name(folder, factor)}/'
    made = dict(zip(names, target_names(names)))
    digests = images.in_threads(shrink, list(made.items()), label)
    known = {'own': True, 'files': made, 'digests': dict(zip(names, digests))}
    _write_manifest(temporary, known)
    _move(temporary, target, known)
  except images.DataNotFoundError:
    raise
  except OSError as e:
    raise images.DataError(
      f'{target}: cannot be made ({e.strerror or e}). Make the parent folder writable, or change '
      'Config.factor.'
    ) from None
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(f'{temporary}.old', ignore_errors=True)
    lock.close()


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
  """Locks a folder, until the block or the process ends.

  Raises:
    OSError: another process has locked it.
  """
  opened = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  finally:
    os.close(opened)


def _remove_abandoned(stem: str) -> None:
  """Removes temporary folders whose process was killed; those at work are locked."""
  for folder in glob.glob(glob.escape(stem) + '*'):
    with contextlib.suppress(OSError), _locked(folder):
      shutil.rmtree(folder)


def _move(temporary: str, target: str, known: Mapping[str, Any]) -> None:
  """Renames a finished folder to `target`; replaces one made here that is stale or incomplete."""
  existing = _read_manifest(target)
  made = [os.path.join(target, name) for name in existing['files'].values()]
  if existing['own'] and not (existing == known and all(map(files.is_file, made))):
    with contextlib.suppress(FileNotFoundError):  # Another process was faster.
      os.rename(target, f'{temporary}.old')
  try:
    os.replace(temporary, target)
  except OSError:
    if not images.list_images(target):  # Otherwise another process was faster.
      raise


def target_names(names: Sequence[str]) -> list[str]:
  """Returns a unique .png name for each picture: a.png, or a.jpg.png if there is also an a.png."""
  count = collections.Counter(map(images.stem, names))
  return [(images.stem(n) if count[images.stem(n)] == 1 else n) + '.png' for n in names]


def _shrink(source: str, target: str, factor: int, background: str) -> None:
  """Writes a downsampled PNG. Keeps the EXIF tag: only the camera tells whether it applies."""
  header = images.read_header(source)
  size = downsampled_size((header.width, header.height), factor)
  with images.room_for((header.width, header.height)):
    pixels = images.decode(source, background)
    small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
  images.save_png(target, small, header.orientation)


def _foresee(data_dir: str, folder: str, names: Sequence[str], factor: int) -> Pictures:
  """Returns the pictures that `make` would make."""
  small = folder_name(folder, factor)
  everything = _photographs(data_dir, folder, names)
  target = dict(zip(everything, target_names(everything)))
  headers = _read_headers(data_dir, [images.join(folder, name) for name in names])
  headers = tuple(
    images.Header(*downsampled_size((h.width, h.height), factor), h.orientation) for h in headers
  )
  files = tuple(images.join(small, target.get(name, images.stem(name) + '.png')) for name in names)
  return Pictures(files, headers, BY_AREA_FILTER, to_be_made=small)


def _read_headers(data_dir: str, files: Sequence[str]) -> tuple[images.Header, ...]:
  paths = [images.inside(data_dir, file) for file in files]
  return tuple(images.in_threads(images.read_header, paths))


def check_present(data_dir: str, folder: str, names: Sequence[str], factor: int) -> None:
  """Raises a DataNotFoundError that names the first missing picture, if one is missing."""
  absent = missing(data_dir, folder, names, factor)
  if not absent:
    return
  root = os.path.join(data_dir, folder)
  if not files.is_folder(root):
    raise images.DataNotFoundError(f'No such folder: {root!r}. Put the pictures there.')
  raise images.DataNotFoundError(
    f'{os.path.join(root, absent[0])}: no such image, but the capture has a pose for it '
    f'({len(absent)} of {len(names)} are missing). Put it back, or pose the capture again.'
    f'{images.in_place_of(os.path.join(root, absent[0]))}'
  )
