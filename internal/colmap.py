"""Reads and writes COLMAP sparse models: cameras, images and points3D, as .bin or as .txt.

Only what a radiance field needs is kept: intrinsics, poses, names, and the points without their
tracks. Poses are COLMAP's: world to camera, OpenCV axes (x right, y down, z forward), a
quaternion (w, x, y, z) and a translation. `n` is the number of 3D points.
The layout is that of https://colmap.github.io/format.html.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Iterator

import numpy as np

from internal import structs

# The models that COLMAP knows, in the order of their ids, with their numbers of parameters.
CAMERA_MODELS = {
  'SIMPLE_PINHOLE': 3,
  'PINHOLE': 4,
  'SIMPLE_RADIAL': 4,
  'RADIAL': 5,
  'OPENCV': 8,
  'OPENCV_FISHEYE': 8,
  'FULL_OPENCV': 12,
  'FOV': 5,
  'SIMPLE_RADIAL_FISHEYE': 4,
  'RADIAL_FISHEYE': 5,
  'THIN_PRISM_FISHEYE': 12,
  'RAD_TAN_THIN_PRISM_FISHEYE': 16,
  'SIMPLE_DIVISION': 4,
  'DIVISION': 5,
  'SIMPLE_FISHEYE': 3,
  'FISHEYE': 4,
  'EUCM': 6,
  'EQUIRECTANGULAR': 2,
}
_MODEL_NAMES = tuple(CAMERA_MODELS)

# What the parameters of the models that we can use mean, in their order.
_LAYOUTS = {
  'SIMPLE_PINHOLE': (structs.PERSPECTIVE, 'f cx cy'),
  'PINHOLE': (structs.PERSPECTIVE, 'fx fy cx cy'),
  'SIMPLE_RADIAL': (structs.PERSPECTIVE, 'f cx cy k1'),
  'RADIAL': (structs.PERSPECTIVE, 'f cx cy k1 k2'),
  'OPENCV': (structs.PERSPECTIVE, 'fx fy cx cy k1 k2 p1 p2'),
  'OPENCV_FISHEYE': (structs.FISHEYE, 'fx fy cx cy k1 k2 k3 k4'),
  'SIMPLE_RADIAL_FISHEYE': (structs.FISHEYE, 'f cx cy k1'),
  'RADIAL_FISHEYE': (structs.FISHEYE, 'f cx cy k1 k2'),
}

# An image with this many pixels a side is no photograph: the file is damaged.
_MAX_SIDE = 1_000_000
_REDO = 'copy the model again, or write it anew with `colmap model_converter`'


class ModelError(ValueError):
  """A sparse model that cannot be used; the message names the file and the way out."""


class ModelNotFoundError(FileNotFoundError):
  """No sparse model where one was looked for."""


@dataclasses.dataclass(frozen=True)
class Camera:
  """Intrinsics in pixels of the full-size image, the way that COLMAP's `model` orders them."""

  id: int
  model: str
  width: int
  height: int
  params: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Image:
  """A registered image: its pose (world to camera, OpenCV axes), its camera and its name."""

  id: int
  qvec: tuple[float, ...]  # w, x, y, z
  tvec: tuple[float, ...]
  camera_id: int
  name: str  # Relative to the image folder, '/' between folders.


@dataclasses.dataclass(frozen=True)
class Points:
  """The sparse point cloud."""

  ids: np.ndarray  # [n] uint64
  xyz: np.ndarray  # [n, 3] float64, world
  rgb: np.ndarray  # [n, 3] uint8
  error: np.ndarray  # [n] float64, mean reprojection error in pixels


@dataclasses.dataclass(frozen=True)
class Model:
  """A sparse model."""

  cameras: dict[int, Camera]
  images: dict[int, Image]
  points: Points


@dataclasses.dataclass(frozen=True)
class Intrinsics:
  """A camera in the terms of `structs.Cameras`, in pixels of the full-size image."""

  fx: float
  fy: float
  cx: float
  cy: float
  distortion: tuple[float, ...]  # k1, k2, k3, k4, p1, p2
  lens: int  # structs.PERSPECTIVE or structs.FISHEYE


def intrinsics(camera: Camera) -> Intrinsics:
  """Focal lengths, principal point and distortion of a COLMAP camera.

  Raises:
    ModelError: a camera model that has no counterpart here, or impossible focal lengths.
  """
  if camera.model not in _LAYOUTS:
    raise ModelError(
      f'Camera {camera.id} has the model {camera.model}, which cannot be used here. Undistort the '
      f'images with `colmap image_undistorter`, or use one of {", ".join(_LAYOUTS)}.'
    )
  lens, layout = _LAYOUTS[camera.model]
  value = dict(zip(layout.split(), camera.params))
  fx, fy = value.get('fx', value.get('f')), value.get('fy', value.get('f'))
  if not min(fx, fy) > 0:
    raise ModelError(f'Camera {camera.id} has focal lengths {fx}, {fy}, must be positive: {_REDO}.')
  distortion = tuple(value.get(k, 0.0) for k in ('k1', 'k2', 'k3', 'k4', 'p1', 'p2'))
  return Intrinsics(fx, fy, value['cx'], value['cy'], distortion, lens)


def camera_to_world(image: Image) -> np.ndarray:
  """The pose of an image as [3, 4] float64: OpenGL camera axes (y up, z back) to world."""
  w, x, y, z = np.asarray(image.qvec) / np.linalg.norm(image.qvec)
  world_to_camera = np.array(
    [
      [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
      [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
      [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
  )
  rotation = world_to_camera.T
  position = -rotation @ np.asarray(image.tvec)
  return np.concatenate([rotation * [1, -1, -1], position[:, None]], axis=1)


def find_extension(folder: str) -> str | None:
  """'.bin' or '.txt', whichever a whole sparse model in `folder` has ('.bin' first), or None."""
  for ext in ('.bin', '.txt'):
    if all(os.path.isfile(os.path.join(folder, kind + ext)) for kind in ('cameras', 'images')):
      return ext
  return None


def read_model(folder: str) -> Model:
  """Reads cameras, images and points3D (.bin, else .txt) from a folder.

  A missing points3D file is taken as an empty point cloud.

  Raises:
    ModelNotFoundError: there is no such folder, or no sparse model in it.
    ModelError: a file is truncated, damaged or contradicts another; names the file and the place.
  """
  if not os.path.isdir(folder):
    raise ModelNotFoundError(f'No such folder: {folder!r}.')
  ext = find_extension(folder)
  if ext is None:
    raise ModelNotFoundError(
      f'No sparse model in {folder!r}: it takes cameras and images, both as .bin or as .txt.'
    )
  cameras_file, images_file, points_file = (
    os.path.join(folder, kind + ext) for kind in ('cameras', 'images', 'points3D')
  )
  readers = _BINARY if ext == '.bin' else _TEXT
  cameras = readers[0](cameras_file)
  images = readers[1](images_file)
  for image in images.values():
    if image.camera_id not in cameras:
      raise ModelError(
        f'{images_file}: image {image.name!r} is of camera {image.camera_id}, which '
        f'{cameras_file} does not have: {_REDO}.'
      )
  points = readers[2](points_file) if os.path.isfile(points_file) else make_points()
  return Model(cameras, images, points)


def make_points(xyz=(), rgb=None, error=None, ids=None) -> Points:
  """A point cloud from positions [n, 3]; grey, without error and numbered from 1 by default."""
  xyz = np.asarray(xyz, np.float64).reshape(-1, 3)
  n = len(xyz)
  return Points(
    ids=np.arange(1, n + 1, dtype=np.uint64) if ids is None else np.asarray(ids, np.uint64),
    xyz=xyz,
    rgb=np.full((n, 3), 128, np.uint8) if rgb is None else np.asarray(rgb, np.uint8),
    error=np.zeros(n) if error is None else np.asarray(error, np.float64),
  )


def _checked_camera(where: str, camera: Camera) -> Camera:
  if not (1 <= camera.width <= _MAX_SIDE and 1 <= camera.height <= _MAX_SIDE):
    raise ModelError(
      f'{where}: camera {camera.id} has the size {camera.width}x{camera.height}: {_REDO}.'
    )
  if not all(map(math.isfinite, camera.params)):
    raise ModelError(f'{where}: camera {camera.id} has parameters {camera.params}: {_REDO}.')
  return camera


def _checked_image(where: str, image: Image) -> Image:
  if not all(map(math.isfinite, image.qvec + image.tvec)) or not any(image.qvec):
    raise ModelError(
      f'{where}: image {image.name!r} has no proper pose, {image.qvec} {image.tvec}: {_REDO}.'
    )
  return image


# Binary files: little-endian, without padding.


class _Bytes:
  """A .bin file in memory and the place reached in it."""

  def __init__(self, path: str):
    self.path = path
    with open(path, 'rb') as f:
      self.data = f.read()
    self.at = 0

  def fail(self, what: str, size: int):
    raise ModelError(
      f'{self.path}: truncated or damaged at byte {self.at}, reading {what}: {size} bytes wanted, '
      f'{len(self.data) - self.at} left; {_REDO}.'
    )

  def skip(self, size: int, what: str) -> None:
    if size > len(self.data) - self.at:
      self.fail(what, size)
    self.at += size

  def unpack(self, layout: str, what: str) -> tuple:
    start = self.at
    self.skip(struct.calcsize('<' + layout), what)
    return struct.unpack_from('<' + layout, self.data, start)

  def count(self, record: int, what: str) -> int:
    """A count of records of at least `record` bytes each: refused if the file can't hold them."""
    (n,) = self.unpack('Q', f'the number of {what}')
    if n * record > len(self.data) - self.at:
      self.fail(f'{n} {what}', n * record)
    return n

  def string(self, what: str) -> str:
    end = self.data.find(b'\0', self.at)
    if end < 0:
      self.fail(f'{what} (no end of it)', len(self.data) - self.at + 1)
    start, self.at = self.at, end + 1
    return os.fsdecode(self.data[start:end])

  def finish(self) -> None:
    if self.at != len(self.data):
      raise ModelError(
        f'{self.path}: {len(self.data) - self.at} bytes too many after byte {self.at}; {_REDO}.'
      )


def _read_cameras_bin(path: str) -> dict[int, Camera]:
  data = _Bytes(path)
  cameras = {}
  for _ in range(data.count(24, 'cameras')):
    camera_id, model_id, width, height = data.unpack('IiQQ', 'a camera')
    if not 0 <= model_id < len(_MODEL_NAMES):
      raise ModelError(
        f'{path}: camera {camera_id} has the unknown camera model id {model_id} (COLMAP has 0 to '
        f'{len(_MODEL_NAMES) - 1}). Use another model, such as OPENCV, or {_REDO}.'
      )
    name = _MODEL_NAMES[model_id]
    params = data.unpack(f'{CAMERA_MODELS[name]}d', f'the parameters of camera {camera_id}')
    camera = Camera(camera_id, name, width, height, params)
    cameras[camera_id] = _checked_camera(path, camera)
  data.finish()
  return cameras


def _read_images_bin(path: str) -> dict[int, Image]:
  data = _Bytes(path)
  images = {}
  for _ in range(data.count(73, 'images')):
    image_id, *pose, camera_id = data.unpack('I7dI', 'an image')
    name = data.string(f'the name of image {image_id}')
    # Each 2D point is x, y and a point's id: none of it is needed.
    data.skip(24 * data.count(24, f'2D points of {name!r}'), f'2D points of {name!r}')
    image = Image(image_id, tuple(pose[:4]), tuple(pose[4:]), camera_id, name)
    images[image_id] = _checked_image(path, image)
  data.finish()
  return images


_POINT = np.dtype(
  [('id', '<u8'), ('xyz', '<f8', 3), ('rgb', 'u1', 3), ('error', '<f8'), ('track', '<u8')]
)


def _read_points_bin(path: str) -> Points:
  data = _Bytes(path)
  n = data.count(_POINT.itemsize, 'points')
  track_length = struct.Struct('<Q').unpack_from
  starts = np.empty(n, np.int64)
  # Tracks make the records unequal: walk over them, then read all of them at once.
  for i in range(n):
    starts[i] = data.at
    data.skip(_POINT.itemsize, f'point {i + 1} of {n}')
    (length,) = track_length(data.data, data.at - 8)
    data.skip(8 * length, f'the track of point {i + 1} of {n}')
  data.finish()
  raw = np.frombuffer(data.data, np.uint8)
  table = raw[starts[:, None] + np.arange(_POINT.itemsize)]  # [n, 51]
  table = np.ascontiguousarray(table).view(_POINT)[:, 0]
  return make_points(table['xyz'], table['rgb'], table['error'], table['id'])


# Text files: a record a line (images: two lines), '#' opens a comment.


def _bad_line(path: str, number: int, wanted: str, line: str) -> ModelError:
  return ModelError(f'{path}:{number}: expected {wanted}, got {line.strip()[:60]!r}; {_REDO}.')


def _lines(path: str) -> Iterator[tuple[int, str]]:
  """All lines with their numbers from 1, without their ends."""
  with open(path, encoding='utf-8', errors='surrogateescape') as f:
    for number, line in enumerate(f, 1):
      yield number, line.strip()


def _records(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
  return ((number, line) for number, line in lines if line and not line.startswith('#'))


def _read_cameras_txt(path: str) -> dict[int, Camera]:
  cameras = {}
  for number, line in _records(_lines(path)):
    words = line.split()
    name = words[1] if len(words) > 1 else ''
    if len(words) > 4 and words[0].isdigit() and name not in CAMERA_MODELS:
      raise ModelError(
        f'{path}:{number}: unknown camera model {name!r}. Use one of {", ".join(_LAYOUTS)}.'
      )
    wanted = f'CAMERA_ID MODEL WIDTH HEIGHT and {CAMERA_MODELS.get(name, "the")} parameters'
    try:
      camera_id, width, height = int(words[0]), int(words[2]), int(words[3])
      params = tuple(map(float, words[4:]))
    except (ValueError, IndexError):
      raise _bad_line(path, number, wanted, line) from None
    if len(params) != CAMERA_MODELS.get(name):
      raise _bad_line(path, number, wanted, line)
    camera = Camera(camera_id, name, width, height, params)
    cameras[camera_id] = _checked_camera(f'{path}:{number}', camera)
  return cameras


def _read_images_txt(path: str) -> dict[int, Image]:
  images = {}
  lines = _lines(path)
  for number, line in _records(lines):
    try:
      image_id, *pose, camera_id, name = line.split(maxsplit=9)
      image_id, camera_id, pose = int(image_id), int(camera_id), tuple(map(float, pose))
    except ValueError:
      wanted = 'IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME'
      raise _bad_line(path, number, wanted, line) from None
    if len(pose) != 7:
      raise _bad_line(path, number, 'IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME', line)
    image = Image(image_id, pose[:4], pose[4:], camera_id, name)
    images[image_id] = _checked_image(f'{path}:{number}', image)
    # The next line holds 2D points, or nothing. Not needed, but its shape tells a lost line.
    number, line = next(lines, (number, ''))
    if len(line.split()) % 3:
      raise _bad_line(path, number, f'triples X Y POINT3D_ID of {name!r} or an empty line', line)
  return images


def _read_points_txt(path: str) -> Points:
  ids, values = [], []
  for number, line in _records(_lines(path)):
    words = line.split(maxsplit=8)
    try:
      ids.append(int(words[0]))
      values.append([float(word) for word in words[1:8]])
    except (ValueError, IndexError):
      raise _bad_line(path, number, 'POINT3D_ID X Y Z R G B ERROR', line) from None
    if len(values[-1]) != 7 or not all(0 <= c <= 255 for c in values[-1][3:6]):
      raise _bad_line(path, number, 'POINT3D_ID X Y Z R G B ERROR', line)
  table = np.array(values, np.float64).reshape(-1, 7)
  return make_points(table[:, :3], table[:, 3:6].astype(np.uint8), table[:, 6], ids)


_BINARY = (_read_cameras_bin, _read_images_bin, _read_points_bin)
_TEXT = (_read_cameras_txt, _read_images_txt, _read_points_txt)


def write_model(folder: str, model: Model, ext: str = '.txt') -> None:
  """Writes cameras, images and points3D, without 2D points and tracks, into `folder`.

  `ext` is '.txt' or '.bin'. Numbers come back from `read_model` exactly.
  """
  os.makedirs(folder, exist_ok=True)
  encode = {'.txt': _encode_txt, '.bin': _encode_bin}[ext]
  for kind, content in zip(('cameras', 'images', 'points3D'), encode(model)):
    with open(os.path.join(folder, kind + ext), 'wb') as f:
      f.write(content)


def _encode_txt(model: Model) -> tuple[bytes, bytes, bytes]:
  cameras = [
    f'{c.id} {c.model} {c.width} {c.height} {_numbers(c.params)}' for c in model.cameras.values()
  ]
  images = [
    f'{i.id} {_numbers(i.qvec + i.tvec)} {i.camera_id} {i.name}\n' for i in model.images.values()
  ]
  p = model.points
  points = [
    f'{i} {_numbers(xyz)} {r} {g} {b} {_numbers([error])}'
    for i, xyz, (r, g, b), error in zip(p.ids, p.xyz, p.rgb, p.error)
  ]
  tables = (
    ('# CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]', cameras),
    ('# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of 2D points', images),
    ('# POINT3D_ID X Y Z R G B ERROR TRACK[]', points),
  )
  return tuple(os.fsencode('\n'.join([header, *lines, ''])) for header, lines in tables)


def _numbers(values) -> str:
  """Floats in as many digits as bring them back exactly."""
  return ' '.join(repr(float(value)) for value in values)


def _encode_bin(model: Model) -> tuple[bytes, bytes, bytes]:
  cameras = [struct.pack('<Q', len(model.cameras))]
  for c in model.cameras.values():
    cameras.append(struct.pack('<IiQQ', c.id, _MODEL_NAMES.index(c.model), c.width, c.height))
    cameras.append(struct.pack(f'<{len(c.params)}d', *c.params))
  images = [struct.pack('<Q', len(model.images))]
  for i in model.images.values():
    images.append(struct.pack('<I7dI', i.id, *i.qvec, *i.tvec, i.camera_id))
    images.append(os.fsencode(i.name) + b'\0' + struct.pack('<Q', 0))
  table = np.zeros(len(model.points.ids), _POINT)
  table['id'], table['xyz'] = model.points.ids, model.points.xyz
  table['rgb'], table['error'] = model.points.rgb, model.points.error
  points = struct.pack('<Q', len(table)) + table.tobytes()
  return b''.join(cameras), b''.join(images), points
