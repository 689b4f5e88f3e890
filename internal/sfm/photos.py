"""Imports photographs into a capture: upright, as JPEG or PNG. The originals are not changed.

An upright photograph is copied byte for byte. One with an EXIF orientation is rotated: COLMAP reads
the pixels as stored and ignores the orientation, so portrait and landscape pictures of one camera
would count as two cameras. Anything but an 8-bit JPEG or PNG is converted to PNG.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import re
import shutil
import sys
import uuid
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..datasets import images, masks
from ..errors import UserError
from ..system import files, warnings

FOLDER = 'images'
STAGING = '.incoming'
JPEG = {'quality': 95, 'subsampling': 0}

_SHARPNESS_SIDE = 1024  # Pixels; at a higher resolution, fine detail is mostly noise.
_SHOWN = 3  # Names in an error message.
# Formats of phones and cameras that Pillow cannot read by itself.
_UNREADABLE = ('.heic', '.heif', '.avif', '.dng', '.raw', '.cr2', '.cr3', '.nef', '.arw', '.jxl')


class PosesError(UserError):
  """Photographs or a video that cannot be posed."""


@dataclasses.dataclass(frozen=True)
class Photo:
  """One picture of the capture."""

  name: str  # Path below images/, with '/' as separator.
  source: str  # Path below the source folder, or the frame's number in the video.
  camera: str  # Equal for pictures by the same camera at the same focal length.
  sharpness: float  # As `sharpness` returns it.
  bytes: int = 0  # Size of the source file, to notice changes.


@contextlib.contextmanager
def atomic_write(scene_dir: str, target: str) -> Iterator[str]:
  """Yields a temporary path, and renames that file to `target`, a path below the capture.

  The temporary file is outside images/, so that a killed run leaves no partial photograph there.
  """
  path = os.path.join(scene_dir, target)
  staged = os.path.join(scene_dir, STAGING, uuid.uuid4().hex + os.path.splitext(target)[1])
  for folder in (os.path.dirname(staged), os.path.dirname(path)):
    os.makedirs(folder, exist_ok=True)
  yield staged
  os.replace(staged, path)


def natural_key(name: str) -> list:
  """Returns a sort key that puts IMG_9 before IMG_10."""
  parts = re.split(r'(\d+)', name)  # The odd ones are numbers.
  return [int(part) if k % 2 else part.lower() for k, part in enumerate(parts)]


def sharpness(pixels: np.ndarray) -> float:
  """Returns the mean squared Laplacian of a picture divided by its variance.

  Blur lowers it; brightness and contrast do not change it.

  Args:
    pixels: uint8 [h, w, 3] or [h, w]; larger pictures are reduced to 1024 pixels a side.
  """
  picture = Image.fromarray(pixels).convert('L')
  picture.thumbnail((_SHARPNESS_SIDE,) * 2, Image.Resampling.BOX)
  grey = np.asarray(picture, np.float32)
  middle = grey[1:-1, 1:-1]  # [h - 2, w - 2]
  if middle.size == 0 or grey.std() < 1e-3:
    return 0.0
  neighbours = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
  return float(np.square(4 * middle - neighbours).mean() / grey.var())


def list_photos(folder: str) -> list[str]:
  """Lists the photographs of a folder and its subfolders, relative to it, in natural order.

  Raises:
    PosesError: there are none, or two of them would have the same name as PNG files.
  """
  names = sorted(masks.photographs(images.list_images(folder)), key=natural_key)
  others = [n for _, _, found in os.walk(folder) for n in found if n.lower().endswith(_UNREADABLE)]
  if others and not names:
    raise PosesError(
      f'{folder}: its {len(others)} photographs, such as {others[0]}, are in a format that cannot '
      'be read. Export them as JPEG.'
    )
  if not names:
    raise PosesError(
      f'{folder}: has no photographs ({", ".join(images.EXTENSIONS)}). Name a folder with '
      'photographs, or a video.'
    )
  if others:
    print(
      f'Note: {folder}: skips {len(others)} files in formats that cannot be read, such as '
      f'{others[0]}. Export them as JPEG to use them.',
      file=sys.stderr,
    )
  by_stem = collections.defaultdict(list)
  for name in names:
    by_stem[_without_spaces(images.stem(name)).lower()].append(name)
  for twins in by_stem.values():
    if len(twins) > 1:
      raise PosesError(
        f'{folder}: {" and ".join(map(repr, twins[:_SHOWN]))} have the same name except for '
        'extension, case or spaces. Remove or rename all but one of them.'
      )
  return names


def _without_spaces(name: str) -> str:
  """Replaces whitespace, which separates the names in COLMAP's lists."""
  return re.sub(r'\s', '_', name)


def import_photos(
  folder: str,
  scene_dir: str,
  masks_dir: str | None = None,
  known: Sequence[Photo] = (),
  stored: Container[str] = (),
) -> list[Photo]:
  """Imports the photographs of a folder into `scene_dir`/images and their masks into /masks.

  Args:
    folder: the photographs; may be `scene_dir`/images itself if none of them must be changed.
    scene_dir: the capture.
    masks_dir: folder of masks or None. `datasets.masks` says how they are named. Masks beside the
      photographs count too.
    known: photographs that an earlier run imported; they are skipped.
    stored: photographs whose EXIF orientation is ignored.

  Returns:
    All photographs, in the order of their EXIF times if all have one, else by name.

  Raises:
    PosesError: there are no photographs, two have the same name, or a known one was changed.
    DataError: a photograph cannot be read, or a mask has the wrong size.
  """
  names = list_photos(folder)
  done = {photo.source: photo for photo in known}
  for name, photo in done.items():
    path = os.path.join(folder, name)
    if not files.is_file(path) or os.path.getsize(path) != photo.bytes:
      raise PosesError(
        f'{path}: has been changed or removed since {scene_dir} was started. Put it back, or '
        'choose another folder for the capture.'
      )
  missing = [name for name in names if name not in done]
  found = _find_masks(folder, names, masks_dir)
  _refuse_late_masks({photo.name: found.get(name) for name, photo in done.items()}, scene_dir)
  added = images.in_threads(
    lambda name: _import_photo(
      folder, name, scene_dir, found.get(name), bool(found), name in stored
    ),
    missing,
    'reading photographs' if missing else None,
  )
  photos = {**done, **dict(zip(missing, added))}
  return [photos[name] for name in _sorted_by_time(folder, names)]


def _find_masks(folder: str, names: Sequence[str], masks_dir: str | None) -> dict[str, str]:
  """Returns the path of each photograph's mask, if it has one; prints warnings on stderr.

  Raises:
    DataError: no mask in masks_dir belongs to a photograph.
  """
  own = masks.list_masks(masks_dir) if masks_dir else []
  beside = set(images.list_images(folder)) - set(names)
  pool = {_without_spaces(name): os.path.join(folder, name) for name in sorted(beside)}
  pool |= {_without_spaces(name): os.path.join(masks_dir or '', name) for name in own}
  with warnings.collect() as collected:
    found, used = masks.match(folder, [_without_spaces(name) for name in names], pool)
    masks.check_paired(masks_dir or '', [_without_spaces(name) for name in own], used, names[0])
    if beside:
      warnings.warn(
        f'{folder}: used as masks, not as photographs: {warnings.some(sorted(beside))}.'
      )
  for line in collected:
    print(f'Warning: {line}', file=sys.stderr)
  return {name: pool[mask] for name, mask in zip(names, found) if mask}


def _refuse_late_masks(found: Mapping[str, str | None], scene_dir: str) -> None:
  """Raises a PosesError if photographs that an earlier run imported have got masks since."""
  folder = os.path.join(scene_dir, masks.FOLDER)
  outside = [
    name
    for name, mask in found.items()
    if mask
    and os.path.commonpath(map(os.path.realpath, (mask, scene_dir))) != os.path.realpath(scene_dir)
  ]
  late = [name for name in outside if not files.is_file(os.path.join(folder, f'{name}.png'))]
  if late:
    raise PosesError(
      f'{scene_dir}: was started before there were masks of {warnings.some(late)}. Choose another '
      'folder for the capture, or move the masks elsewhere.'
    )


def _import_photo(
  folder: str, name: str, scene_dir: str, mask: str | None, masked: bool, stored: bool = False
) -> Photo:
  """Imports a photograph, as it is `stored` or upright; if any is `masked`, also its mask."""
  source = os.path.join(folder, name)
  header = images.read_header(source)
  with images.room_for((header.width, header.height)), Image.open(source) as image:
    pixels = images.decode(source)  # Decodes copied files too, to find truncated ones.
    exif = image.getexif()
    # Phones write JPEG files with a second picture in them; Pillow calls these MPO.
    plain = image.format in ('JPEG', 'MPO', 'PNG') and image.mode in ('RGB', 'L')
    turn = 1 if stored else header.orientation
    target_name = _without_spaces(name if plain else images.stem(name) + '.png')
    target = f'{FOLDER}/{target_name}'
    if not plain or turn != 1 or target_name != name:
      _refuse_in_place(source, os.path.join(scene_dir, FOLDER, name))
    if plain and turn == 1:
      _copy(source, scene_dir, target)
    else:
      upright = _upright(pixels, turn)
      exif[ExifTags.Base.Orientation] = 1
      with atomic_write(scene_dir, target) as temporary:
        upright.save(temporary, exif=exif, **(JPEG if plain and image.format != 'PNG' else {}))
      pixels = np.asarray(upright)
    if masked:
      _import_mask(mask, scene_dir, target_name, turn, pixels.shape[1::-1])
    return Photo(
      name=target_name,
      source=name,
      camera=_camera(name, exif, pixels.shape[1::-1]),
      sharpness=round(sharpness(pixels), 6),
      bytes=os.path.getsize(source),
    )


def _copy(source: str, scene_dir: str, target: str) -> None:
  path = os.path.join(scene_dir, target)
  if files.exists(path) and os.path.samefile(source, path):
    return
  with atomic_write(scene_dir, target) as temporary:
    shutil.copyfile(source, temporary)


def _refuse_in_place(source: str, target: str) -> None:
  folder = os.path.dirname(target)
  if files.is_folder(folder) and os.path.samefile(os.path.dirname(source), folder):
    raise PosesError(
      f'{source}: must be rotated, converted or renamed, but no photograph is changed in place. '
      'Move the photographs out of the capture, and name their new folder.'
    )


def _upright(pixels: np.ndarray, orientation: int) -> Image.Image:
  """Applies an EXIF orientation (1 to 8)."""
  image = Image.fromarray(pixels)
  image.getexif()[ExifTags.Base.Orientation] = orientation
  return ImageOps.exif_transpose(image)


def _import_mask(
  path: str | None, scene_dir: str, target: str, turn: int, size: tuple[int, int]
) -> None:
  """Writes a photograph's mask, rotated like the photograph, to masks/<photograph>.png."""
  target = f'{masks.FOLDER}/{target}.png'
  if path and os.path.realpath(path) == os.path.realpath(os.path.join(scene_dir, target)):
    return
  # With masks, COLMAP needs one for each photograph; an all-white one hides nothing.
  counts = masks.decode(path) if path else np.ones(size[::-1], bool)
  mask = Image.fromarray(np.where(counts, np.uint8(255), np.uint8(0)))
  if mask.size != tuple(size):
    mask = _upright(np.asarray(mask), turn)
  if mask.size != tuple(size):
    raise images.DataError(
      f'{path}: is {mask.width}x{mask.height} pixels, but its photograph is {size[0]}x{size[1]}. '
      'A mask must have the size of its photograph.'
    )
  with atomic_write(scene_dir, target) as temporary:
    mask.save(temporary)


def _camera(name: str, exif: Image.Exif, size: tuple[int, int]) -> str:
  """Returns a text that identifies the camera, its lens and focal length, and the picture size."""
  details = exif.get_ifd(ExifTags.IFD.Exif)
  tags = ExifTags.Base
  values: list[Any] = [exif.get(tags.Make), exif.get(tags.Model)]
  values += [details.get(t) for t in (tags.FocalLength, tags.FocalLengthIn35mmFilm, tags.LensModel)]
  values = [str(value).strip('\0 ') for value in values if value]
  return ' '.join([*values, f'{size[0]}x{size[1]}', os.path.dirname(name)]).strip()


def _sorted_by_time(folder: str, names: list[str]) -> list[str]:
  """Sorts by EXIF time if all photographs have one and at least 80% of the times are distinct."""
  times = {}
  for name in names:
    with Image.open(os.path.join(folder, name)) as image:
      details = image.getexif().get_ifd(ExifTags.IFD.Exif) if image.format == 'JPEG' else {}
    taken = str(details.get(ExifTags.Base.DateTimeOriginal) or '').strip('\0 ')
    if not taken:
      return names
    times[name] = (taken, str(details.get(ExifTags.Base.SubsecTimeOriginal) or ''))
  if len(set(times.values())) < 0.8 * len(names):
    return names
  return sorted(names, key=times.__getitem__)  # Stable: equal times stay sorted by name.
