"""Finds pictures, reads their sizes and decodes them to uint8 [h, w, 3].

Rules:
- grey, palette and CMYK pictures become RGB;
- 16-bit PNGs are scaled to 8 bits (65535 is 255), other 16-bit colour files are errors;
- alpha is composited on white if the background is 'white'; if it is 'none' (photographs), pixels
  that are not opaque are errors;
- EXIF orientation is ignored, as in COLMAP, unless only the rotated picture has the size of its
  camera.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from ..errors import UserError
from ..system import files, progress
from ..system.warnings import some

JPEG = ('.jpg', '.jpeg', '.jfif', '.jpe')
EXTENSIONS = ('.png', *JPEG, '.webp', '.bmp', '.tif', '.tiff', '.ppm', '.pgm')
# Files that cameras and systems put beside photographs, and notes; no photograph ends like that.
_CLUTTER = (
  '.db', '.ini', '.aae', '.xmp', '.thm', '.lrv', '.gpx', '.srt', '.wav', '.txt', '.md', '.csv',
  '.json', '.xml', '.html', '.log', '.sh', '.py',
)  # fmt: skip

_LONGEST = 4096  # Characters of a path in a message.
_ORIENTATION = 0x0112  # The EXIF tag.
_GREY_16 = ('I;16', 'I;16B', 'I;16L', 'I;16N')
# Detected by content. Pillow's document and video readers are left out.
_FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'PPM')
_WITHOUT_ALPHA = {
  'none': 'Save it without alpha: export it as JPEG or, with '
  'ImageMagick, `mogrify -background white -alpha remove -alpha off FILES` in place.',
  'mask': 'Save it without alpha (in place: `mogrify -alpha extract FILES` if the transparent '
  'pixels are those that do not count, `mogrify -alpha off FILES` if the black ones are).',
}
_AT_ONCE = 2**28  # Pixels of pictures decoded at once: a little over 10 bytes each.
_room = threading.Condition()
_decoding: dict[int, int] = {}  # Pixels, by thread.
warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # `room_for` bounds the memory.
_PLAIN = ('1', 'L', 'P', 'RGB', 'RGBX', 'CMYK', 'YCbCr', 'HSV')


class DataError(UserError):
  """A capture that cannot be used."""


class DataNotFoundError(UserError, FileNotFoundError):
  """A required file or folder of a capture is missing."""


@dataclasses.dataclass(frozen=True)
class Header:
  """Size and EXIF orientation of a picture."""

  width: int  # As stored, in pixels.
  height: int
  orientation: int = 1  # EXIF's; 5 to 8 are quarter turns.
  animated: bool = False  # Whether it has more pictures, which are not read.

  def fit(self, size: tuple[float, float], tolerance: float = 0.0) -> tuple[int, int] | None:
    """Returns the stored or the EXIF-rotated (width, height), whichever is `size`, or None."""
    candidates = [(self.width, self.height)]
    if self.orientation >= 5:
      candidates.append((self.height, self.width))
    for width, height in candidates:
      if abs(width - size[0]) <= tolerance and abs(height - size[1]) <= tolerance:
        return width, height
    return None


def is_relative(name: str) -> bool:
  """Whether a path is relative and has no '..'; links are not followed."""
  try:
    os.fsencode(name)
  except UnicodeEncodeError:  # JSON strings can hold lone surrogates.
    return False
  parts = re.split(r'[\\/]', name)
  return all(parts) and '..' not in parts and '\0' not in name and not os.path.isabs(name)


def inside(data_dir: str, name: str) -> str:
  """Resolves the name of a picture or mask to its path, which must be inside `data_dir`.

  Names are relative, without '..'. Links are followed: `data_dir` and its top-level folders
  (images/, images_4/, train/) may be links to other disks; links inside them must stay inside.

  Raises:
    DataError: the name is absolute or climbs out of the folder, or a link leads out of it.
  """
  if not is_relative(name):
    raise DataError(
      f'{_short(name)} is not a path inside {data_dir!r}: names must be relative, without "..". '
      'Correct the name.'
    )
  path = os.path.join(data_dir, name)
  top, *deeper = re.split(r'[\\/]', name)
  target = os.path.realpath(path)
  roots = [data_dir, os.path.join(data_dir, top)] if deeper else [data_dir]
  if not any(_is_below(os.path.realpath(root), target) for root in roots):
    raise DataError(
      f'{path}: is a link that leads outside the capture, to {target}. Copy the picture here, or '
      f'make {top}/ itself the link.'
    )
  return path


def _is_below(root: str, path: str) -> bool:
  return os.path.commonpath([root, path]) == root


def _short(name: str) -> str:
  """Returns the quoted name, cut after 300 characters."""
  return repr(name if len(name) <= 300 else f'{name[:300]}...')


def join(folder: str, name: str) -> str:
  """Returns a picture's path relative to the capture; `folder` may be ''."""
  return f'{folder}/{name}' if folder else name


def list_images(folder: str, endings: tuple[str, ...] = EXTENSIONS) -> list[str]:
  """Lists the pictures in a folder and its subfolders: relative paths with '/', sorted.

  Raises:
    DataError: a folder may not be read.
  """
  found = []
  for root, _, names in walk(folder):
    for name in names:
      if name.lower().endswith(endings) and not name.startswith('.'):
        path = os.path.relpath(os.path.join(root, name), folder)
        found.append(path.replace(os.sep, '/'))
  return sorted(found)


def is_unread(name: str) -> bool:
  """Whether a file may be a photograph by its ending, but of a format that is not read."""
  return not name.startswith('.') and not name.lower().endswith((*EXTENSIONS, *_CLUTTER))


def in_place_of(path: str) -> str:
  """Says, for a message, what lies where a picture is missing, and the way out; '' if nothing."""
  if os.path.islink(path) and not files.exists(path):
    return f' It is a link to {_short(os.readlink(path))}, where nothing is. Copy the picture here.'
  if files.exists(path):
    kind = 'a folder' if files.is_folder(path) else 'a pipe or a device'
    return f' It is {kind}. Put the picture there.'
  folder, base = os.path.split(path)
  for name in sorted(os.listdir(folder)) if files.is_folder(folder) else ():
    if stem(name).casefold() == stem(base).casefold() and is_unread(name):
      return f' There is {_short(name)}, whose format is not read: convert it to PNG or JPEG.'
  return ''


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
  """Walks a folder as os.walk does, but not into hidden folders.

  Raises:
    DataError: a folder may not be read.
  """
  for root, folders, names in os.walk(folder, onerror=_refuse_denied):
    folders[:] = [name for name in folders if not name.startswith('.')]
    yield root, folders, names


def _refuse_denied(error: OSError) -> None:
  if isinstance(error, PermissionError):
    raise DataError(f'{error.filename}: may not be read. Allow it (`chmod u+rX`).') from None


def stem(name: str) -> str:
  """Returns a file name without its extension."""
  return os.path.splitext(name)[0]


def in_threads(function: Callable, items: Sequence, label: str | None = None) -> list:
  """Maps a function over items in threads; shows a progress bar if there is a label."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    try:
      results = pool.map(function, items)
      return list(progress.track(results, label, label is not None, len(items)))
    except BaseException:
      pool.shutdown(wait=True, cancel_futures=True)
      raise


def all_in_threads(
  function: Callable, items: Sequence, names: Sequence[str], label: str | None = None
) -> list:
  """Does what `in_threads` does, but a UserError ends it only when all items have been tried.

  Its message is that of the first one that fails, with the `names` of the others.
  """
  failed = {}

  def attempt(k: int):
    try:
      return function(items[k])
    except UserError as e:
      failed[k] = e

  results = in_threads(attempt, range(len(items)), label)
  if failed:
    first, *others = sorted(failed)
    if not others:
      raise failed[first]
    more = f'{len(others)} more cannot be used: {some([names[k] for k in others])}.'
    raise type(failed[first])(f'{failed[first]} {more}')
  return results


def _readable(function: Callable) -> Callable:
  """Decorator that turns any exception of Pillow into a DataError with the file's name."""

  @functools.wraps(function)
  def wrapped(path: str, *args, **kwargs):
    try:
      if not files.is_file(path):  # Opening a named pipe would block.
        raise DataNotFoundError(f'{path[:_LONGEST]}: no such image.{in_place_of(path)}')
      return function(path, *args, **kwargs)
    except UserError:
      raise
    except PermissionError as e:
      _refuse_denied(e)
    except Image.DecompressionBombError:
      raise DataError(
        f'{path}: cannot be read as an image: it has more than '
        f'{2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels (a decompression bomb?). Reduce it.'
      ) from None
    except Exception as e:  # Pillow's plugins raise many types.
      reason = ' '.join(str(e).split()) or type(e).__name__
      raise DataError(
        f'{path}: cannot be read as an image ({reason}). Copy it again, or convert it to PNG.'
      ) from None

  return wrapped


@_readable
def read_header(path: str) -> Header:
  """Reads size and orientation of a picture without decoding it.

  Raises:
    DataError, DataNotFoundError: the file cannot be read as an image, or is not there.
  """
  with Image.open(path, formats=_FORMATS) as image:
    return _header(image)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
  """Opens a picture from memory: from disk, Pillow allocates the size that the header claims."""
  with open(path, 'rb') as f:
    content = io.BytesIO(f.read())
  with Image.open(content, formats=_FORMATS) as image:
    yield image


@contextlib.contextmanager
def room_for(size: tuple[int, int]) -> Iterator[None]:
  """Waits until a picture of (width, height) `size` can be decoded without too many others.

  Pictures being decoded at once have at most `_AT_ONCE` pixels, or one of them is larger. In the
  context, the thread can decode this picture (as `decode` does) without waiting again.
  """
  me, pixels = threading.get_ident(), size[0] * size[1]
  if me in _decoding:
    yield
    return
  with _room:
    _room.wait_for(lambda: not _decoding or sum(_decoding.values()) + pixels <= _AT_ONCE)
    _decoding[me] = pixels
  try:
    yield
  finally:
    with _room:
      del _decoding[me]
      _room.notify_all()


def _header(image: Image.Image) -> Header:
  if min(image.size) < 1:
    raise ValueError(f'{image.width}x{image.height} pixels')
  orientation = 1
  # Pillow decodes a whole PNG to search for EXIF data after its pixels.
  if image.format != 'PNG' or 'exif' in image.info:
    with contextlib.suppress(Exception):  # Ignore damaged EXIF data.
      orientation = image.getexif().get(_ORIENTATION, 1)
  known = orientation if orientation in range(1, 9) else 1
  animated = image.format in ('WEBP', 'PNG') and getattr(image, 'is_animated', False)
  return Header(*image.size, orientation=known, animated=animated)


@_readable
def decode(path: str, background: str = 'none', size: tuple[int, int] | None = None) -> np.ndarray:
  """Decodes a picture.

  Args:
    path: the file.
    background: 'white' composites alpha on white, 'none' and 'mask' refuse it. For a 'mask', grey
      levels of 16 bits are rounded up, so that only 0 is black: they may be labels.
    size: the expected (width, height), stored or EXIF-rotated; None for the stored size.

  Returns:
    uint8 [h, w, 3].

  Raises:
    DataError, DataNotFoundError: the file is missing, damaged, of another size or in an
      unsupported pixel format.
  """
  with _opened(path) as image:
    header = _header(image)
    with room_for(image.size):
      channels = _decode_channels(path, image, round_up=background == 'mask')
      pixels = _composite(path, channels, background)
  if size is None or (header.width, header.height) == tuple(size):
    return pixels
  if header.fit(size) is None:
    raise DataError(
      f'{path}: is {header.width}x{header.height} pixels, but its camera has {size[0]}x{size[1]}. '
      'Use the pictures that were posed.'
    )
  return turn(pixels, header.orientation)


@_readable
def thumbnail(path: str, size: tuple[int, int]) -> np.ndarray:
  """Returns the picture reduced to (width, height) `size`, float32 [h, w, 3]; alpha is on white.

  JPEGs are decoded at a fraction of their resolution, which is much faster.
  """
  with _opened(path) as image:
    if image.format in ('JPEG', 'MPO') and image.mode != 'CMYK':
      image.draft('RGB', (4 * size[0], 4 * size[1]))
    with room_for(image.size):
      pixels = _composite(path, _decode_channels(path, image), 'white')
      small = Image.fromarray(pixels).resize(size, Image.Resampling.BOX)
  return np.asarray(small, np.float32)


def _decode_channels(path: str, image: Image.Image, round_up: bool = False) -> np.ndarray:
  """[h, w, 3] or, with alpha, [h, w, 4] uint8; rounds grey levels of 16 bits."""
  if image.mode in _GREY_16:
    grey = _to_8_bits(np.asarray(image), 256 if round_up else 128)
    return np.repeat(grey[..., None], 3, -1)
  raw_mode = image.tile[0][3] if image.tile else ''
  raw_mode = raw_mode[0] if isinstance(raw_mode, tuple) else raw_mode
  if ';16' in str(raw_mode):
    return _decode_16_bits(path, image, raw_mode)
  if image.has_transparency_data:
    return np.asarray(image.convert('RGBA'))
  if image.mode not in _PLAIN:
    raise DataError(
      f'{path}: has the unsupported pixel format {image.mode!r} ({image.format}). '
      'Convert it to an 8-bit PNG or JPEG.'
    )
  return np.asarray(image if image.mode == 'RGB' else image.convert('RGB'))  # No needless copy.


def _decode_16_bits(path: str, image: Image.Image, raw_mode: str) -> np.ndarray:
  """Decodes 16-bit colours. Pillow returns the high byte only, so the file is read twice."""
  if raw_mode not in ('RGB;16B', 'RGBA;16B') or image.format != 'PNG':
    raise DataError(
      f'{path}: has an unsupported format with 16 bits per channel ({image.format}, {raw_mode}). '
      'Convert it to 8 bits, or to an RGB PNG.'
    )
  high = np.asarray(image).astype(np.uint16)
  with _opened(path) as again:
    # With the byte order swapped, the decoder returns the low byte.
    again.tile = [tile._replace(args=raw_mode.replace('16B', '16L')) for tile in again.tile]
    low = np.asarray(again)
  return _to_8_bits(high * 256 + low)


def _to_8_bits(values: np.ndarray, offset: int = 128) -> np.ndarray:
  """Rounds uint16 values to uint8 (65535 = 255 * 257), up with the offset 256."""
  return ((values.astype(np.uint32) + offset) // 257).astype(np.uint8)


def _composite(path: str, pixels: np.ndarray, background: str) -> np.ndarray:
  """[h, w, 3 or 4] to [h, w, 3]."""
  if pixels.shape[-1] == 3:
    return np.ascontiguousarray(pixels)
  color, alpha = pixels[..., :3], pixels[..., 3:].astype(np.uint32)
  if (alpha == 255).all():
    return np.ascontiguousarray(color)
  if background != 'white':
    raise DataError(f'{path}: has transparent pixels. {_WITHOUT_ALPHA[background]}')
  return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Applies the EXIF orientations 5 to 8, which swap width and height."""
  turned = {
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
  }[orientation](pixels)
  return np.ascontiguousarray(turned)


def save_png(path: str, pixels: np.ndarray, orientation: int = 1) -> None:
  """Writes uint8 [h, w, 3] as PNG, with an EXIF orientation tag."""
  exif = Image.Exif()
  if orientation != 1:
    exif[_ORIENTATION] = orientation
  Image.fromarray(pixels).save(path, exif=exif)
