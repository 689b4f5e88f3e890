"""The .txt files of a sparse model: one line per record (two for images), '#' starts a comment.

COLMAP writes an empty line for an image without 2D points, but editors and scripts drop it. Lines
of images and of 2D points are therefore told apart by their content.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from ..system import files
from . import model as model_lib
from .model import CAMERA_MODELS, LAYOUTS, REDO, Camera, Image, ModelError, Points


def _bad_line(path: str, number: int, wanted: str, line: str) -> ModelError:
  return ModelError(f'{path}:{number}: expected {wanted}, got {line.strip()[:60]!r}; {REDO}.')


def _records(path: str) -> Iterator[tuple[int, str, bool]]:
  """Yields (line number from 1, stripped line, whether an empty line precedes it)."""
  with files.open_text(path) as f:
    after_empty = False
    for number, line in enumerate(map(str.strip, f), 1):
      if line and not line.startswith('#'):
        yield number, line, after_empty
        after_empty = False
      after_empty |= not line


def read_cameras(path: str) -> dict[int, Camera]:
  cameras = {}
  for number, line, _ in _records(path):
    words = line.split()
    name = words[1] if len(words) > 1 else ''
    if len(words) > 4 and words[0].isdigit() and name not in CAMERA_MODELS:
      raise ModelError(
        f'{path}:{number}: unknown camera model {name!r}. Use one of {", ".join(LAYOUTS)}.'
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
    model_lib.add_camera(cameras, f'{path}:{number}', camera)
  return cameras


def read_images(path: str) -> dict[int, Image]:
  """Reads images; skips their 2D points, whether or not images without any have an empty line."""
  images, last = {}, None  # `last` is the image whose 2D points may come.
  for number, line, after_empty in _records(path):
    image, numbers = _image(line), _numbers_in(line)
    if numbers:
      is_points = len(numbers) % 3 == 0 and all(map(float.is_integer, numbers[2::3]))
      follows = last is not None and not after_empty
      if is_points and (follows or (last is not None and not _image(f'{line} name'))):
        last = None
        continue
      if follows:
        wanted = f'triples X Y POINT3D_ID of {last.name!r} or an empty line'
        raise _bad_line(path, number, wanted, line)
      if is_points:  # It could be 2D points, or an image whose name is missing or a number.
        image = None
    if image is None:
      raise _bad_line(path, number, 'IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME', line)
    model_lib.add_image(images, f'{path}:{number}', image)
    last = image
  return images


def _image(line: str) -> Image | None:
  """Parses an image's line; None if it is something else."""
  try:
    image_id, *pose, camera_id, name = line.split(maxsplit=9)
    image_id, camera_id, pose = int(image_id), int(camera_id), tuple(map(float, pose))
  except ValueError:
    return None
  return Image(image_id, pose[:4], pose[4:], camera_id, name) if len(pose) == 7 else None


def _numbers_in(line: str) -> list[float] | None:
  """Returns the numbers of a line that has nothing else, or None."""
  try:
    return list(map(float, line.split()))
  except ValueError:
    return None


def read_points(path: str, with_tracks: bool = False) -> Points:
  ids, values, tracks = [], [], []
  for number, line, _ in _records(path):
    words = line.split(maxsplit=8)
    try:
      ids.append(int(words[0]))
      values.append([float(word) for word in words[1:8]])
      if with_tracks:
        entries = words[8].split() if len(words) > 8 else []  # IMAGE_ID POINT2D_IDX ...
        tracks.append(np.array([int(word) for word in entries[::2]], np.uint32))
    except (ValueError, IndexError, OverflowError):
      raise _bad_line(path, number, 'POINT3D_ID X Y Z R G B ERROR', line) from None
    colors = values[-1][3:6]
    if len(values[-1]) != 7 or not all(0 <= c <= 255 for c in colors) or not 0 <= ids[-1] < 2**64:
      raise _bad_line(path, number, 'POINT3D_ID X Y Z R G B ERROR', line)
  table = np.array(values, np.float64).reshape(-1, 7)
  points = table[:, :3], table[:, 3:6].astype(np.uint8), table[:, 6], ids
  if not tracks:
    return model_lib.make_points(*points)
  return model_lib.make_points(*points, np.concatenate(tracks), [len(track) for track in tracks])


def encode(model: model_lib.Model) -> tuple[bytes, bytes, bytes]:
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
  """Formats floats so that reading restores them exactly."""
  return ' '.join(repr(float(value)) for value in values)
