"""Photographs into a capture: upright, in formats that all programs read, the originals untouched.

A photograph that is upright already is copied byte for byte. One whose EXIF data asks for a turn is
turned, since COLMAP takes pixels as they are stored and a capture half of which lies on its side
has two cameras where there is one. What is neither an 8-bit JPEG nor an 8-bit PNG becomes a PNG.
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
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..datasets import images, masks
from ..errors import UserError

FOLDER = 'images'
STAGING = '.incoming'
JPEG = {'quality': 95, 'subsampling': 0}

_SHARPNESS_SIDE = 1024  # Pixels: finer detail than this is mostly noise.
_SHOWN = 3  # Names in an error.
# What a phone makes and Pillow cannot read by itself.
_FOREIGN = ('.heic', '.heif', '.avif', '.dng', '.raw', '.cr2', '.cr3', '.nef', '.arw', '.jxl')


class PosesError(UserError):
  """Photographs or a video that cannot be posed; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Photo:
  """A picture of the capture, in the order in which it was taken as far as that is known."""

  name: str  # Below images/, '/' between folders.
  source: str  # Below the folder given, or the frame's number in the video.
  camera: str  # Pictures of one text were taken by one camera with one focal length.
  sharpness: float
  bytes: int = 0  # Of the source, by which a changed one is known.


@contextlib.contextmanager
def placed(scene_dir: str, target: str) -> Iterator[str]:
  """Yields a name to write to; then that file becomes `target`, below the capture, at once.

  What a killed run leaves behind lies beside images/, where nobody takes it for a photograph.
  """
  path = os.path.join(scene_dir, target)
  staged = os.path.join(scene_dir, STAGING, uuid.uuid4().hex + os.path.splitext(target)[1])
  for folder in (os.path.dirname(staged), os.path.dirname(path)):
    os.makedirs(folder, exist_ok=True)
  yield staged
  os.replace(staged, path)


def natural(name: str) -> list:
  """A key that sorts IMG_9 before IMG_10."""
  parts = re.split(r'(\d+)', name)  # Every other one is a number.
  return [int(part) if k % 2 else part.lower() for k, part in enumerate(parts)]


def sharpness(pixels: np.ndarray) -> float:
  """How much of a picture's variance is fine detail: its mean squared Laplacian over its variance.

  It falls as a picture is blurred and does not change with its brightness or contrast.

  Args:
    pixels: uint8 [h, w, 3] or [h, w]; taken at 1024 pixels a side where it is larger.
  """
  picture = Image.fromarray(pixels).convert('L')
  picture.thumbnail((_SHARPNESS_SIDE,) * 2, Image.Resampling.BOX)
  grey = np.asarray(picture, np.float32)
  middle = grey[1:-1, 1:-1]
  if middle.size == 0 or grey.std() < 1e-3:
    return 0.0
  around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
  return float(np.square(4 * middle - around).mean() / grey.var())


def list_photos(folder: str) -> list[str]:
  """The photographs of a folder and its subfolders, relative to it, in their natural order.

  Raises:
    PosesError: there is none, or two would have one name once they are PNG files.
  """
  names = sorted(images.list_images(folder), key=natural)
  others = [n for _, _, found in os.walk(folder) for n in found if n.lower().endswith(_FOREIGN)]
  if others and not names:
    raise PosesError(
      f'{folder}: has {len(others)} files such as {others[0]}, which cannot be read here. Export '
      'them as JPEG.'
    )
  if not names:
    raise PosesError(
      f'{folder}: has no photographs ({", ".join(images.EXTENSIONS)}). Name the folder they are '
      'in, or a video.'
    )
  if others:
    said = f'{len(others)} files such as {others[0]} cannot be read here and are left out'
    print(f'Note: {folder}: {said}.', file=sys.stderr)
  by_stem = collections.defaultdict(list)
  for name in names:
    by_stem[_without_spaces(images.stem(name)).lower()].append(name)
  for twins in by_stem.values():
    if len(twins) > 1:
      raise PosesError(
        f'{folder}: {" and ".join(map(repr, twins[:_SHOWN]))} have one name but for its ending, '
        'case or spaces. Keep one of them, or rename one.'
      )
  return names


def _without_spaces(name: str) -> str:
  """As a word in a list of COLMAP's."""
  return re.sub(r'\s', '_', name)


def take_photos(
  folder: str, scene_dir: str, masks_dir: str | None = None, known: Sequence[Photo] = ()
) -> list[Photo]:
  """Puts the photographs of a folder, upright, into `scene_dir`/images, and masks into /masks.

  Args:
    folder: of the photographs; may be `scene_dir`/images itself if none needs to be changed.
    scene_dir: the capture.
    masks_dir: black where a photograph is to be ignored: a.jpg.png or a.png for a.jpg; or None.
    known: photographs that are done and are left alone.

  Returns:
    All of them, in the order of the times they were taken where all say when, else of their names.

  Raises:
    PosesError: there is none, two have one name, or a known one is gone or has changed.
    DataError: one cannot be read, or a mask does not fit.
  """
  names = list_photos(folder)
  done = {photo.source: photo for photo in known}
  for name, photo in done.items():
    path = os.path.join(folder, name)
    if not os.path.isfile(path) or os.path.getsize(path) != photo.bytes:
      raise PosesError(
        f'{path}: has been changed or removed since {scene_dir} was begun. Put it back, or name '
        'another folder for the capture.'
      )
  missing = [name for name in names if name not in done]
  added = images.in_threads(
    lambda name: _take(folder, name, scene_dir, masks_dir),
    missing,
    'reading photographs' if missing else None,
  )
  photos = {**done, **dict(zip(missing, added))}
  return [photos[name] for name in _by_time(folder, names)]


def _take(folder: str, name: str, scene_dir: str, masks_dir: str | None) -> Photo:
  """Puts one photograph where it belongs."""
  source = os.path.join(folder, name)
  pixels = images.decode(source)  # Also finds out whether all of it is there.
  with Image.open(source) as image:
    exif = image.getexif()
    # A phone's JPEG with a second picture in it is an MPO.
    plain = image.format in ('JPEG', 'MPO', 'PNG') and image.mode in ('RGB', 'L')
    turn = images.read_header(source).orientation
    target_name = _without_spaces(name if plain else images.stem(name) + '.png')
    target = f'{FOLDER}/{target_name}'
    if not plain or turn != 1 or target_name != name:
      _refuse_in_place(source, os.path.join(scene_dir, FOLDER, name))
    if plain and turn == 1:
      _copy(source, scene_dir, target)
    else:
      upright = _upright(pixels, turn)
      exif[ExifTags.Base.Orientation] = 1
      with placed(scene_dir, target) as temporary:
        upright.save(temporary, exif=exif, **(JPEG if plain and image.format != 'PNG' else {}))
      pixels = np.asarray(upright)
  if masks_dir:
    _take_mask(masks_dir, name, scene_dir, target_name, turn, pixels.shape[1::-1])
  return Photo(
    name=target_name,
    source=name,
    camera=_camera(name, exif, pixels.shape[1::-1]),
    sharpness=round(sharpness(pixels), 6),
    bytes=os.path.getsize(source),
  )


def _copy(source: str, scene_dir: str, target: str) -> None:
  path = os.path.join(scene_dir, target)
  if os.path.exists(path) and os.path.samefile(source, path):
    return
  with placed(scene_dir, target) as temporary:
    shutil.copyfile(source, temporary)


def _refuse_in_place(source: str, target: str) -> None:
  folder = os.path.dirname(target)
  if os.path.isdir(folder) and os.path.samefile(os.path.dirname(source), folder):
    raise PosesError(
      f'{source}: must be turned, converted or renamed, and no photograph is changed in place. '
      'Move them all out of the capture and name their new folder.'
    )


def _upright(pixels: np.ndarray, orientation: int) -> Image.Image:
  """Turned and mirrored as the EXIF orientation (1 to 8) asks."""
  image = Image.fromarray(pixels)
  image.getexif()[ExifTags.Base.Orientation] = orientation
  return ImageOps.exif_transpose(image)


def _take_mask(
  masks_dir: str, name: str, scene_dir: str, target: str, turn: int, size: tuple[int, int]
) -> None:
  """A photograph's mask, upright as the photograph, as masks/<photograph>.png."""
  candidates = [os.path.join(masks_dir, n) for n in (f'{name}.png', f'{images.stem(name)}.png')]
  path = next((c for c in candidates if os.path.isfile(c)), None)
  # COLMAP wants a mask for each: white is all of it.
  mask = Image.fromarray(images.decode(path)) if path else Image.new('L', size, 255)
  if mask.size != tuple(size):
    mask = _upright(np.asarray(mask), turn)
  if mask.size != tuple(size):
    raise images.DataError(
      f'{path}: is {mask.width}x{mask.height} pixels, but its photograph has {size[0]}x{size[1]}. '
      'A mask must have the size of its photograph.'
    )
  target = f'{masks.FOLDER}/{target}.png'
  if path and os.path.realpath(path) == os.path.realpath(os.path.join(scene_dir, target)):
    return
  with placed(scene_dir, target) as temporary:
    mask.convert('L').save(temporary)


def _camera(name: str, exif: Image.Exif, size: tuple[int, int]) -> str:
  """What tells one camera and its focal length from another."""
  details = exif.get_ifd(ExifTags.IFD.Exif)
  tags = ExifTags.Base
  told: list[Any] = [exif.get(tags.Make), exif.get(tags.Model)]
  told += [details.get(t) for t in (tags.FocalLength, tags.FocalLengthIn35mmFilm, tags.LensModel)]
  told = [str(part).strip('\0 ') for part in told if part]
  return ' '.join([*told, f'{size[0]}x{size[1]}', os.path.dirname(name)]).strip()


def _by_time(folder: str, names: list[str]) -> list[str]:
  """Sorted by the times the photographs tell, if all tell one and hardly two are the same."""
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
  return sorted(names, key=times.__getitem__)  # Stable: names decide where times do not.
