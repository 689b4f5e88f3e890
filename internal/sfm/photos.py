"""Imports photographs into a capture: upright, as JPEG or PNG. The originals are not changed.

An upright photograph is copied byte for byte. One with an EXIF orientation is rotated, since COLMAP
and training read the pixels as stored. HEIC and AVIF become JPEG, anything else but an 8-bit JPEG
or PNG becomes PNG. Of photographs that repeat each other, one is used.
"""

from __future__ import annotations

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
from ..system import files, warnings
from . import photo_files, repeats
from .photo_files import PosesError, colmap_name, list_photos, natural_key

FOLDER = 'images'
STAGING = '.incoming'
JPEG = {'quality': 95, 'subsampling': 0}

_SHARPNESS_SIDE = 1024  # Pixels; at a higher resolution, fine detail is mostly noise.


@dataclasses.dataclass(frozen=True)
class Photo:
  """One picture of the capture."""

  name: str  # Path below images/, with '/' as separator.
  source: str  # Path below the source folder, or the frame's number in the video.
  camera: str  # Equal for pictures by the same camera at the same focal length.
  sharpness: float  # As `sharpness` returns it.
  bytes: int = 0  # Size of the source file, to notice changes.
  same_as: str = ''  # The photograph that is used in its place, if it repeats another.


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


def import_photos(
  folder: str,
  scene_dir: str,
  masks_dir: str | None = None,
  known: Sequence[Photo] = (),
  stored: Container[str] | None = None,
) -> list[Photo]:
  """Imports the photographs of a folder into `scene_dir`/images and their masks into /masks.

  Args:
    folder: the photographs; may be `scene_dir`/images itself if none of them must be changed.
    scene_dir: the capture.
    masks_dir: folder of masks or None. `datasets.masks` says how they are named. Masks beside the
      photographs count too.
    known: photographs that an earlier run imported; they are skipped.
    stored: photographs whose EXIF orientation is ignored. Unless it is None, those that repeat
      others are used too, since they have poses.

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
  used = {photo.name: found.get(name) for name, photo in done.items() if not photo.same_as}
  _refuse_late_masks(used, scene_dir)
  added = images.all_in_threads(
    lambda name: _import_photo(
      folder, name, scene_dir, found.get(name), bool(found), name in (stored or ())
    ),
    missing,
    missing,
    'reading photographs' if missing else None,
  )
  photos = {**done, **dict(zip(missing, added))}
  details = {name: photo_files.read_details(os.path.join(folder, name)) for name in names}
  _note_kinds(folder, [photos[name] for name in missing], details)
  in_place = os.path.realpath(folder) == os.path.realpath(os.path.join(scene_dir, FOLDER))
  if stored is None and missing and not in_place:
    photos |= _drop_repeats(folder, scene_dir, photos, details, missing)
  return [photos[name] for name in _sorted_by_time(names, details)]


def _note_kinds(
  folder: str, photos: Sequence[Photo], details: Mapping[str, photo_files.Details]
) -> None:
  """Notes on stderr which photographs have no camera in their EXIF data, or colours of HDR."""
  without = [photo.source for photo in photos if re.match(r'\d+x\d+\b', photo.camera)]
  if without:
    print(
      f'Note: {folder}: {len(without)} of {len(photos)} photographs, such as {without[0]!r}, have '
      'no camera in their EXIF data (edited, or sent by a messenger?). Those of one folder and '
      'size count as taken by one camera at one focal length.',
      file=sys.stderr,
    )
  hdr = [photo.source for photo in photos if details[photo.source].hdr]
  if hdr:
    warnings.warn(
      f'{folder}: {warnings.some(hdr)} have colours coded for HDR displays (PQ or HLG), which are '
      'used as they are and look pale. Export them as JPEG for natural colours.'
    )


def _drop_repeats(
  folder: str,
  scene_dir: str,
  photos: Mapping[str, Photo],
  details: Mapping[str, photo_files.Details],
  new: Sequence[str],
) -> dict[str, Photo]:
  """Returns the `new` photographs, by source, that repeat others; removes them from the capture."""
  used = [name for name in sorted(photos, key=natural_key) if not photos[name].same_as]
  groups = repeats.find(
    used,
    {name: details[name].seconds() for name in used},
    {name: photos[name].camera for name in used},
    {name: os.path.join(folder, name) for name in used},
    lambda name: repeats.thumbnail(
      images.decode(os.path.join(scene_dir, FOLDER, photos[name].name))
    ),
    new,
  )
  result = {}
  for group in groups:
    best = max(group, key=lambda name: (name not in new, photos[name].sharpness))
    for name in group:
      if name != best and name in new:
        result[name] = dataclasses.replace(photos[name], same_as=photos[best].name)
        for path in (f'{FOLDER}/{photos[name].name}', f'{masks.FOLDER}/{photos[name].name}.png'):
          with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(scene_dir, path))
  if result:
    first = min(result, key=natural_key)
    print(
      f'Note: {folder}: {len(result)} of {len(photos)} photographs repeat others (bursts, copies) '
      f'and are left out; of each group the sharpest is used, such as '
      f'{result[first].same_as!r} for {first!r}.',
      file=sys.stderr,
    )
  return result


def _find_masks(folder: str, names: Sequence[str], masks_dir: str | None) -> dict[str, str]:
  """Returns the path of each photograph's mask, if it has one; warns of doubtful ones.

  Raises:
    DataError: no mask in masks_dir belongs to a photograph.
  """
  own = masks.list_masks(masks_dir) if masks_dir else []
  beside = set(images.list_images(folder)) - set(names)
  pool = {colmap_name(name): os.path.join(folder, name) for name in sorted(beside)}
  pool |= {colmap_name(name): os.path.join(masks_dir or '', name) for name in own}
  found, used = masks.match(folder, [colmap_name(name) for name in names], pool)
  masks.check_paired(masks_dir or '', [colmap_name(name) for name in own], used, names[0])
  if beside:
    warnings.warn(f'{folder}: used as masks, not as photographs: {warnings.some(sorted(beside))}.')
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
  with photo_files.opened(source) as found:
    turn = 1 if stored else found.orientation
    as_jpeg = found.format in (('JPEG', 'HEIF', 'AVIF') if found.plain else ('HEIF', 'AVIF'))
    target_name = colmap_name(_target_name(name, found, as_jpeg))
    target = f'{FOLDER}/{target_name}'
    if not found.plain or turn != 1 or target_name != name:
      _refuse_in_place(source, os.path.join(scene_dir, FOLDER, name))
    pixels = found.pixels
    if found.plain and turn == 1:
      _copy(source, scene_dir, target)
    else:
      upright = _upright(pixels, turn)
      found.exif[ExifTags.Base.Orientation] = 1
      with atomic_write(scene_dir, target) as temporary:
        how = JPEG if as_jpeg else {}
        upright.save(temporary, exif=found.exif, icc_profile=found.profile, **how)
      pixels = np.asarray(upright)
    if masked:
      _import_mask(mask, scene_dir, target_name, turn, pixels.shape[1::-1])
    return Photo(
      name=target_name,
      source=name,
      camera=_camera(name, found.exif, pixels.shape[1::-1]),
      sharpness=round(sharpness(pixels), 6),
      bytes=os.path.getsize(source),
    )


def _target_name(name: str, found: photo_files.Opened, as_jpeg: bool) -> str:
  """Returns the name in the capture; COLMAP and the datasets go by the ending."""
  if found.plain and name.lower().endswith(images.EXTENSIONS):
    return name
  return images.stem(name) + ('.jpg' if as_jpeg else '.png')


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
  """Returns a text that identifies the camera, its lens and focal length, and the picture size.

  If EXIF has no camera or no focal length, the folder stands for them.
  """
  details = exif.get_ifd(ExifTags.IFD.Exif)
  tags = ExifTags.Base
  values: list[Any] = [exif.get(tags.Make), exif.get(tags.Model)]
  focal = [details.get(tag) for tag in (tags.FocalLength, tags.FocalLengthIn35mmFilm)]
  values += [*focal, details.get(tags.LensModel)]
  zoom = details.get(tags.DigitalZoomRatio)
  values += [f'zoom {zoom}'] if zoom and zoom > 0 and zoom != 1 else []
  values.append(details.get(tags.BodySerialNumber))
  known = exif.get(tags.Model) and any(focal)
  values = [str(value).strip('\0 ') for value in values if value]
  folder = '' if known else os.path.dirname(name)
  return ' '.join([*values, f'{size[0]}x{size[1]}', folder]).strip()


def _sorted_by_time(
  names: Sequence[str], details: Mapping[str, photo_files.Details]
) -> Sequence[str]:
  """Sorts by EXIF time if all photographs have one and at least 80% of the times are distinct."""
  times = {name: details[name].taken for name in names}
  if not all(times.values()) or len(set(times.values())) < 0.8 * len(names):
    return names
  return sorted(names, key=times.__getitem__)  # Stable: equal times stay sorted by name.
