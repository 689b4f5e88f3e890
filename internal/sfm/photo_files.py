"""Lists and opens photographs as cameras and phones write them, JPEG to HEIC, with EXIF data.

Formats are told by content: a HEIC file may be called .jpg. HEIC needs the package pillow-heif;
Pillow reads AVIF. Of an HDR file with a gain map the ordinary picture is read; HEIC files of 10
bits are reduced to 8.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import ExifTags, Image, features

from ..datasets import images, masks
from ..errors import UserError
from ..system import files, installation, warnings

ENDINGS = ('.heic', '.heif', '.hif', '.avif')  # Besides those of `images`.
VIDEOS = ('.mov', '.mp4', '.m4v', '.3gp', '.avi', '.mkv', '.webm')

_HEIF_BRANDS = {b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1'}
_SHOWN = 3  # Names in an error message.
_PQ, _HLG = 16, 18  # Transfer characteristics of HDR (ITU-T H.273).


class PosesError(UserError):
  """Photographs or a video that cannot be posed."""


@dataclasses.dataclass(frozen=True)
class Opened:
  """A decoded photograph."""

  pixels: np.ndarray  # uint8 [h, w, 3], as stored.
  orientation: int  # EXIF's, 1 to 8: what remains to be done to `pixels`.
  exif: Image.Exif
  format: str  # 'JPEG', 'PNG', 'HEIF', 'AVIF' or another of Pillow's.
  plain: bool  # Whether it is an 8-bit JPEG or PNG without alpha or palette.
  profile: bytes | None  # ICC profile.


@dataclasses.dataclass(frozen=True)
class Details:
  """What a file says of its photograph besides the pixels."""

  taken: str  # EXIF's time and its fraction of a second, '' if unknown; sorts by time.
  hdr: bool  # Whether its colours are coded as PQ or HLG.

  def seconds(self) -> float | None:
    """Returns the time in seconds since the year 1, None if it is unknown."""
    try:
      moment = datetime.datetime.strptime(self.taken[:19], '%Y:%m:%d %H:%M:%S')
      fraction = float(f'0.{self.taken[20:].strip() or 0}')
    except ValueError:
      return None
    return (moment - datetime.datetime.min).total_seconds() + fraction


def content(path: str) -> str | None:
  """Returns 'HEIF' or 'AVIF' if a file starts like one, else None."""
  if not files.is_file(path):
    return None
  with open(path, 'rb') as f:
    start = f.read(64)
  if start[4:8] != b'ftyp':
    return None
  length = min(len(start), int.from_bytes(start[:4], 'big'))
  brands = {start[k : k + 4] for k in (8, *range(16, length, 4))}
  if brands & {b'avif', b'avis'}:
    return 'AVIF'
  return 'HEIF' if brands & _HEIF_BRANDS else None


def missing_reader(kind: str | None) -> str | None:
  """Returns what to do so that 'HEIF' or 'AVIF' can be read; None if it can."""
  if kind == 'AVIF' and not features.check('avif'):
    return 'pip install --upgrade pillow'
  if kind == 'HEIF':
    try:
      import pillow_heif
    except ImportError:
      return installation.install_text('heic')
    pillow_heif.register_heif_opener(thumbnails=False)
  return None


@contextlib.contextmanager
def _pictures(path: str, kind: str) -> Iterator[Image.Image]:
  """Opens a HEIC or AVIF file; any exception of its reader becomes a DataError."""
  advice = missing_reader(kind)
  if advice:
    raise images.DataError(f'{path}: cannot be read: {advice}. Or export it as JPEG.')
  try:
    with open(path, 'rb') as f:  # From memory, damaged lengths cannot read beyond the content.
      data = io.BytesIO(f.read())
    with Image.open(data, formats=(kind,)) as image:
      yield image
  except UserError:
    raise
  except Exception as e:  # Decoders raise many types.
    reason = ' '.join(str(e).split()) or type(e).__name__
    raise images.DataError(
      f'{path}: cannot be read as an image ({reason}). Copy it again, or export it as JPEG.'
    ) from None


@contextlib.contextmanager
def opened(path: str) -> Iterator[Opened]:
  """Decodes a photograph, when there is memory for it.

  Raises:
    DataError, DataNotFoundError: the file cannot be read, or its reader is not installed.
  """
  kind = content(path)
  if kind:
    with _pictures(path, kind) as image, images.room_for(image.size):
      exif = image.getexif()
      # pillow-heif turns the pixels as the file says; the EXIF orientation merely repeats that.
      turn = exif.get(ExifTags.Base.Orientation, 1) if kind == 'AVIF' else 1
      pixels = np.asarray(image.convert('RGB'))
      found = Opened(pixels, turn, exif, kind, False, image.info.get('icc_profile'))
      yield dataclasses.replace(found, orientation=turn if turn in range(1, 9) else 1)
    return
  header = images.read_header(path)
  with images.room_for((header.width, header.height)), Image.open(path) as image:
    pixels = images.decode(path)  # Decodes files that are copied too, to find truncated ones.
    # Phones write JPEG files with a second picture in them; Pillow calls these MPO.
    form = 'JPEG' if image.format == 'MPO' else image.format
    plain = form in ('JPEG', 'PNG') and image.mode in ('RGB', 'L')
    profile = image.info.get('icc_profile') if image.mode == 'RGB' else None
    yield Opened(pixels, header.orientation, image.getexif(), form, plain, profile)


def read_details(path: str) -> Details:
  """Reads the time and the coding of colours; a file that cannot be read has none."""
  kind = content(path)
  try:
    with _pictures(path, kind) if kind else Image.open(path) as image:
      # Pillow decodes a whole PNG to search for EXIF data after its pixels.
      exif = image.getexif() if kind or image.format in ('JPEG', 'MPO') else Image.Exif()
      coding = (image.info.get('nclx_profile') or {}).get('transfer_characteristics')
  except (UserError, OSError, SyntaxError, ValueError):
    return Details('', False)
  details = exif.get_ifd(ExifTags.IFD.Exif)
  taken, fraction = (
    str(details.get(tag) or '').strip('\0 ')
    for tag in (ExifTags.Base.DateTimeOriginal, ExifTags.Base.SubsecTimeOriginal)
  )
  return Details(f'{taken} {fraction}' if taken else '', coding in (_PQ, _HLG))


def natural_key(name: str) -> list:
  """Returns a sort key that puts IMG_9 before IMG_10."""
  parts = re.split(r'(\d+)', name)  # The odd ones are numbers.
  return [int(part) if k % 2 else part.lower() for k, part in enumerate(parts)]


def list_photos(folder: str, quiet: bool = False) -> list[str]:
  """Lists the photographs of a folder and its subfolders, relative to it, in natural order.

  Unless it is `quiet`, it warns of files that may be photographs but are of a format that is not
  read, and notes on stderr what else lies there: videos, HEIC files that have been converted, and
  links to other folders.

  Raises:
    PosesError: there are none, one is a HEIC file that cannot be read here, or two of them would
      have the same name.
  """
  everything = images.list_images(folder, ('',))
  found = [name for name in everything if name.lower().endswith((*images.EXTENSIONS, *ENDINGS))]
  names = sorted(masks.photographs(found), key=natural_key)
  converted = _converted(names)
  names = [name for name in names if name not in converted]
  videos = [name for name in everything if name.lower().endswith(VIDEOS)]
  unread = [name for name in everything if images.is_unread(name) and name not in {*found, *videos}]
  if not names:
    raise PosesError(_nothing(folder, unread, videos))
  _check_readable(folder, names)
  bases = set(map(_base, names))
  twins = [name for name in unread if _base(name) in bases]  # Raw files lie beside JPEGs.
  unread = [name for name in unread if name not in twins]
  if not quiet:
    _say_skipped(folder, unread, videos, sorted([*twins, *converted]))
  _check_unique(folder, names)
  return names


def _say_skipped(
  folder: str, unread: Sequence[str], videos: Sequence[str], twins: Sequence[str]
) -> None:
  """Warns of photographs that are not used, and notes other files."""
  if unread:
    them = 'it' if len(unread) == 1 else 'them'
    warnings.warn(
      f'{folder}: {warnings.count(len(unread), "file")} of other formats or endings than '
      f'{_endings()} not used: {warnings.some(unread)}. Export {them} as JPEG to use {them}.'
    )
  for noun, what, several in (
    ('video', ', as Live Photos have beside each picture', videos),
    ('file', ' beside a JPEG or PNG of the same name', twins),
    ('link', ' to other folders; copy these to use their photographs', _linked_folders(folder)),
  ):
    if several:
      print(
        f'Note: {folder}: skips {warnings.count(len(several), noun)}{what}: '
        f'{warnings.some(several)}.',
        file=sys.stderr,
      )


def _endings() -> str:
  return ', '.join((*images.EXTENSIONS, *ENDINGS))


def _converted(names: Sequence[str]) -> set[str]:
  """Returns the HEIC and AVIF files that have a JPEG or PNG of the same name beside them."""
  others = {_base(n) for n in names if not n.lower().endswith(ENDINGS)}
  return {name for name in names if name.lower().endswith(ENDINGS) and _base(name) in others}


def _nothing(folder: str, unread: Sequence[str], videos: Sequence[str]) -> str:
  """Returns the message for a folder without readable photographs."""
  found, advice = '', 'Name a folder with photographs, or a video'
  if unread:
    found = f', but {warnings.count(len(unread), "other file")}, such as {unread[0]!r}'
    advice = 'If these are photographs, export them as JPEG; else name a folder with photographs'
  elif videos:
    found = f', but {warnings.count(len(videos), "video")}, such as {videos[0]!r}'
  return f'{folder}: has no photographs ({_endings()}){found}. {advice}.'


def _check_readable(folder: str, names: Sequence[str]) -> None:
  """Raises a PosesError if photographs need a package that is not installed."""
  needing = {}
  for name in names:
    kind = content(os.path.join(folder, name))
    advice = missing_reader(kind) if kind else None
    if advice:
      needing.setdefault((kind, advice), []).append(name)
  for (kind, advice), several in needing.items():
    raise PosesError(
      f'{folder}: {len(several)} of its {len(names)} photographs, such as {several[0]!r}, are '
      f'{"HEIC" if kind == "HEIF" else kind} files: {advice}. Or export them as JPEG.'
    )


def _check_unique(folder: str, names: Sequence[str]) -> None:
  """Raises a PosesError if two photographs would have the same name in the capture."""
  by_stem = collections.defaultdict(list)
  for name in names:
    by_stem[colmap_name(images.stem(name)).lower()].append(name)
  for twins in by_stem.values():
    if len(twins) > 1:
      raise PosesError(
        f'{folder}: {" and ".join(map(repr, twins[:_SHOWN]))} have the same name except for '
        'extension, case or spaces. Remove or rename all but one of them.'
      )


def colmap_name(name: str) -> str:
  """Replaces what COLMAP's lists of names misread: whitespace, and a # at the start."""
  return re.sub(r'\s|^#', '_', name)


def _linked_folders(folder: str) -> list[str]:
  """Lists the links to folders in a folder and below it, which `images.list_images` leaves out."""
  return sorted(
    os.path.relpath(path, folder)
    for root, folders, _ in images.walk(folder)
    for path in (os.path.join(root, name) for name in folders)
    if os.path.islink(path)
  )


def _base(name: str) -> str:
  """Returns a path without its ending, folded to compare."""
  return os.path.splitext(name)[0].casefold()
