"""The .bin files of a sparse model: little-endian, without padding."""

from __future__ import annotations

import os
import struct

import numpy as np

from . import model as model_lib
from .model import CAMERA_MODELS, MODEL_NAMES, REDO, Camera, Image, ModelError, Points


class _Bytes:
  """A .bin file in memory and the current position."""

  def __init__(self, path: str):
    self.path = path
    with open(path, 'rb') as f:
      self.data = f.read()
    self.at = 0

  def fail(self, what: str, size: int):
    raise ModelError(
      f'{self.path}: truncated or damaged at byte {self.at}, reading {what}: needs {size} bytes, '
      f'has {len(self.data) - self.at}; {REDO}.'
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
    """Reads a number of records; fails if the file is too short for `record` bytes each."""
    (n,) = self.unpack('Q', f'the number of {what}')
    if n * record > len(self.data) - self.at:
      self.fail(f'{n} {what}', n * record)
    return n

  def string(self, what: str) -> str:
    end = self.data.find(b'\0', self.at)
    if end < 0:
      self.fail(f'{what} (not terminated)', len(self.data) - self.at + 1)
    start, self.at = self.at, end + 1
    return os.fsdecode(self.data[start:end])

  def finish(self) -> None:
    if self.at != len(self.data):
      raise ModelError(
        f'{self.path}: {len(self.data) - self.at} unexpected bytes after byte {self.at}; {REDO}.'
      )


def read_cameras(path: str) -> dict[int, Camera]:
  data = _Bytes(path)
  cameras = {}
  for _ in range(data.count(24, 'cameras')):
    camera_id, model_id, width, height = data.unpack('IiQQ', 'a camera')
    if not 0 <= model_id < len(MODEL_NAMES):
      raise ModelError(
        f'{path}: camera {camera_id} has the unknown camera model id {model_id} (COLMAP has 0 to '
        f'{len(MODEL_NAMES) - 1}). Use another model, such as OPENCV, or {REDO}.'
      )
    name = MODEL_NAMES[model_id]
    params = data.unpack(f'{CAMERA_MODELS[name]}d', f'the parameters of camera {camera_id}')
    camera = Camera(camera_id, name, width, height, params)
    model_lib.add_camera(cameras, path, camera)
  data.finish()
  return cameras


def read_images(path: str) -> dict[int, Image]:
  data = _Bytes(path)
  images = {}
  for _ in range(data.count(73, 'images')):
    image_id, *pose, camera_id = data.unpack('I7dI', 'an image')
    name = data.string(f'the name of image {image_id}')
    # Skip the 2D points: x, y and a point's id each.
    data.skip(24 * data.count(24, f'2D points of {name!r}'), f'2D points of {name!r}')
    image = Image(image_id, tuple(pose[:4]), tuple(pose[4:]), camera_id, name)
    model_lib.add_image(images, path, image)
  data.finish()
  return images


_POINT = np.dtype(
  [('id', '<u8'), ('xyz', '<f8', 3), ('rgb', 'u1', 3), ('error', '<f8'), ('track', '<u8')]
)


def read_points(path: str, with_tracks: bool = False) -> Points:
  data = _Bytes(path)
  n = data.count(_POINT.itemsize, 'points')
  track_length = struct.Struct('<Q').unpack_from
  starts, views = np.empty(n, np.int64), np.zeros(n, np.int64)
  # Tracks vary in length: find the start of each record, then read all at once.
  for i in range(n):
    starts[i] = data.at
    data.skip(_POINT.itemsize, f'point {i + 1} of {n}')
    (length,) = track_length(data.data, data.at - 8)
    data.skip(8 * length, f'the track of point {i + 1} of {n}')
    views[i] = length
  data.finish()
  raw = np.frombuffer(data.data, np.uint8)
  table = raw[starts[:, None] + np.arange(_POINT.itemsize)]  # [n, 51]
  table = np.ascontiguousarray(table).view(_POINT)[:, 0]
  points = table['xyz'], table['rgb'], table['error'], table['id']
  if not with_tracks:
    return model_lib.make_points(*points)
  # An entry of a track is an image's id and the index of a 2D point, four bytes each.
  nth = np.arange(views.sum()) - np.repeat(np.cumsum(views) - views, views)  # In its track.
  entries = np.repeat(starts + _POINT.itemsize, views) + 8 * nth
  seen_by = np.ascontiguousarray(raw[entries[:, None] + np.arange(4)]).view('<u4')[:, 0]
  return model_lib.make_points(*points, seen_by, views)


def encode(model: model_lib.Model) -> tuple[bytes, bytes, bytes]:
  cameras = [struct.pack('<Q', len(model.cameras))]
  for c in model.cameras.values():
    cameras.append(struct.pack('<IiQQ', c.id, MODEL_NAMES.index(c.model), c.width, c.height))
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
