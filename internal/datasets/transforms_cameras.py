"""Cameras of a transforms.json: size, lens model, focal lengths, principal point, distortion.

Each of these groups of keys comes whole from the frame if the frame has a key of the group, else
from the file, so values of two lenses are never mixed; only `w` and `h` count one by one. Focal
lengths are `fl_x` (or `fx`) in pixels, or fields of view: `x_fov` in degrees (instant-ngp),
`camera_angle_x` in radians; the same with y, which is by default equal to x. As in instant-ngp and
nerfstudio, fields of view mean f = w / (2 tan(fov / 2)), for fisheyes too.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .. import colmap, structs
from ..system import warnings
from . import frames as frames_lib
from . import images

# Lens, and the distortion coefficients that the model has.
_MODELS = {
  'PINHOLE': (structs.PERSPECTIVE, ''),
  'SIMPLE_PINHOLE': (structs.PERSPECTIVE, ''),
  'SIMPLE_RADIAL': (structs.PERSPECTIVE, 'k1'),
  'RADIAL': (structs.PERSPECTIVE, 'k1 k2'),
  'OPENCV': (structs.PERSPECTIVE, 'k1 k2 k3 p1 p2'),
  'OPENCV_FISHEYE': (structs.FISHEYE, 'k1 k2 k3 k4'),
  'SIMPLE_RADIAL_FISHEYE': (structs.FISHEYE, 'k1'),
  'RADIAL_FISHEYE': (structs.FISHEYE, 'k1 k2'),
}
_COEFFICIENTS = ('k1', 'k2', 'k3', 'k4', 'p1', 'p2')
_OTHER_LENSES = ('latlong', 'equirectangular', 'ftheta_p0')  # Of instant-ngp; not supported.
_LENS = ('camera_model', 'is_fisheye', *_OTHER_LENSES)
_FOCAL = ('fl_x', 'fl_y', 'fx', 'fy', 'x_fov', 'y_fov', 'camera_angle_x', 'camera_angle_y')
_CENTER = ('cx', 'cy')
_DISTORTION = (*_COEFFICIENTS, 'k5', 'k6')
KEYS = frozenset(('w', 'h', *_LENS, *_FOCAL, *_CENTER, *_DISTORTION))


def choose(own: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the camera's values, each group from the frame (`own`) or from the file (`table`)."""
  values = {}
  for group in (('w',), ('h',), _LENS, _FOCAL, _CENTER, _DISTORTION):
    source = own if any(own.get(key) is not None for key in group) else table
    if group is _DISTORTION and any(own.get(k) not in (None, table.get(k)) for k in _LENS):
      source = own  # The file's coefficients are those of another lens model.
    values |= {key: source[key] for key in group if source.get(key) is not None}
  return values


def read_size(where: str, values: Mapping[str, Any], picture: str) -> tuple[int, int]:
  """Returns the (width, height) in the file, or that of the full-size picture."""
  width, height = _number(where, values, 'w'), _number(where, values, 'h')
  if width is None or height is None:
    header = images.read_header(picture)
    return header.width, header.height
  fits = all(1 <= side <= colmap.MAX_SIDE and side % 1 == 0 for side in (width, height))
  if not fits:
    raise images.DataError(f'{where}: w and h must be whole pixels, got {width:g} and {height:g}.')
  return int(width), int(height)


def read_model(where: str, values: Mapping[str, Any]) -> str:
  """Returns the name of the camera model."""
  fisheye = values.get('is_fisheye')
  if fisheye not in (None, False, True):  # 0 and 1 are equal to these.
    raise images.DataError(
      f'{where}: is_fisheye must be true or false, got {reprlib.repr(fisheye)}. Export it again.'
    )
  model = next((key for key in _OTHER_LENSES if values.get(key)), None)
  model = model or values.get('camera_model')
  model = model or ('OPENCV_FISHEYE' if fisheye else 'OPENCV')
  if not isinstance(model, str) or model not in _MODELS:
    raise images.DataError(
      f'{where}: unknown camera model {reprlib.repr(model)}. Undistort the pictures, or use one of '
      f'{", ".join(_MODELS)}.'
    )
  return model


def read_intrinsics(
  where: str,
  values: Mapping[str, Any],
  size: tuple[int, int],
  model: str,
  other_keys: Iterable[str] = (),
) -> colmap.Intrinsics:
  """Returns the intrinsics; the principal point is by default the centre.

  If there is no focal length, the error names those of `other_keys` that may be meant as one.
  """
  fx, fy = (
    (_focal_lengths(where, values, axis, side) or [('', None)])[0][1]
    for axis, side in zip('xy', size)
  )
  fx, fy = fx if fx is not None else fy, fy if fy is not None else fx
  if fx is None or not (fx > 0 and fy > 0):
    like_focal = re.compile('fov|foc|angle|intrin|^k$|^fl?_?[xy]?$', re.IGNORECASE)
    similar = [key for key in other_keys if like_focal.search(key)]
    similar = sorted(set(similar) - KEYS)
    notes = [f'{key} is {values[key]:g}' for key in _FOCAL if key in values]
    notes += [f'the unit of {warnings.some(similar)} is not defined'] if similar else []
    given = f' ({"; ".join(notes)})' if notes else ''
    raise images.DataError(
      f'{where}: has no focal length{given}. Add a positive '
      "'fl_x' in pixels, an 'x_fov' below 180 degrees or a 'camera_angle_x' below pi."
    )
  cx, cy = (_number(where, values, key) for key in _CENTER)
  return colmap.Intrinsics(
    fx,
    fy,
    size[0] / 2 if cx is None else cx,
    size[1] / 2 if cy is None else cy,
    tuple(_number(where, values, key) or 0.0 for key in _COEFFICIENTS),
    _MODELS[model][0],
  )


def contradictions(
  own: Mapping[str, Any],
  table: Mapping[str, Any],
  size: tuple[int, int],
  model: str,
  usual: tuple[int, int],
) -> Iterator[tuple[str, str]]:
  """Yields what contradicts itself in a camera that was read without errors, and the values.

  `usual` is the size of most frames; the file's values are taken to be of it if it has no size.
  """
  values = choose(own, table)
  file_size = table.get('w'), table.get('h')
  if not all(isinstance(side, int | float) and side >= 1 for side in file_size):
    file_size = usual
  if file_size != size:
    yield from _of_another_size(own, values, size, file_size)
  lens, coefficients = _MODELS[model]
  fisheye = values.get('is_fisheye')
  if fisheye is not None and fisheye != (lens == structs.FISHEYE):
    yield 'camera_model contradicts is_fisheye, which is ignored', f'{model} and {fisheye}'
  read = _COEFFICIENTS[: 4 if lens == structs.FISHEYE else 6]
  for key in _DISTORTION:
    if values.get(key) and key not in coefficients.split():
      what = 'used nevertheless' if key in read else 'ignored'
      yield f'{model} has no coefficient {key}; it is {what}', reprlib.repr(values[key])
  for axis, side in zip('xy', size):
    found = _focal_lengths('', values, axis, side)
    for key, pixels in found[1:]:
      first, chosen = found[0]
      if not abs(pixels / chosen - 1) <= 0.01:  # True for nan.
        yield (
          f'{first} contradicts {key}, which is ignored',
          f'{_in_pixels(first, values, chosen)} and {_in_pixels(key, values, pixels)}',
        )


def _in_pixels(key: str, values: Mapping[str, Any], pixels: float) -> str:
  if key in _FOCAL[:4]:
    return f'{key} = {pixels:g} pixels'
  return f'{key} = {values[key]:g}, which means {pixels:g} pixels'


def _of_another_size(
  own: Mapping[str, Any], values: Mapping[str, Any], size: tuple[int, int], file_size: tuple
) -> Iterator[tuple[str, str]]:
  """Yields the file's values that do not hold for a frame of another size."""
  example = f'{size[0]}x{size[1]}, the file {"x".join(map(reprlib.repr, file_size))}'
  focal = [key for key in _FOCAL[:4] if key in values]
  angles = [] if focal else [k for k in _FOCAL[4:] if k in values and own.get(k) is None]
  if angles and abs(size[0] * file_size[1] / (size[1] * file_size[0]) - 1) > 0.02:
    yield (
      f'frames of another shape than the file use its {", ".join(angles)}; give each frame its own',
      example,
    )
  if file_size == size[::-1] and np.ptp([values[k] for k in focal] or [0]) <= 0.01 * size[0]:
    focal = []  # A camera on its side has the same focal length.
  inherited = [k for k in (*focal, *_CENTER) if k in values and own.get(k) is None]
  if inherited:
    yield (
      f'frames of another size than the file use its {", ".join(inherited)} unscaled; give each '
      'frame its own',
      example,
    )


def _focal_lengths(
  where: str, values: Mapping[str, Any], axis: str, side: int
) -> list[tuple[str, float]]:
  """Lists the keys that give the focal length along an axis, best first, and it in pixels.

  It is nan for a field of view that no perspective picture can have.
  """
  found = []
  for key, unit in (
    (f'fl_{axis}', None),
    (f'f{axis}', None),
    (f'{axis}_fov', math.pi / 180),
    (f'camera_angle_{axis}', 1.0),
  ):
    value = _number(where, values, key)
    if value is not None and unit is not None:
      angle = value * unit
      value = 0.5 * side / math.tan(0.5 * angle) if 1e-6 < angle < math.pi else math.nan
    if value is not None:
      found.append((key, value))
  return found


def _number(where: str, values: Mapping[str, Any], key: str) -> float | None:
  value = values.get(key)
  if value is None:
    return None
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not (number and abs(value) < frames_lib.LARGEST):
    raise images.DataError(
      f'{where}: {key} must be a number, got {reprlib.repr(value)}. Export it again.'
    )
  return float(value)
