"""The contents of a COLMAP sparse model, and their conversion to `structs.Cameras` terms."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .. import structs
from ..errors import UserError

# COLMAP's camera models in the order of their ids: number of parameters.
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
MODEL_NAMES = tuple(CAMERA_MODELS)

# Supported models: projection and parameters, in order.
LAYOUTS = {
  'SIMPLE_PINHOLE': (structs.PERSPECTIVE, 'f cx cy'),
  'PINHOLE': (structs.PERSPECTIVE, 'fx fy cx cy'),
  'SIMPLE_RADIAL': (structs.PERSPECTIVE, 'f cx cy k1'),
  'RADIAL': (structs.PERSPECTIVE, 'f cx cy k1 k2'),
  'OPENCV': (structs.PERSPECTIVE, 'fx fy cx cy k1 k2 p1 p2'),
  'OPENCV_FISHEYE': (structs.FISHEYE, 'fx fy cx cy k1 k2 k3 k4'),
  'SIMPLE_RADIAL_FISHEYE': (structs.FISHEYE, 'f cx cy k1'),
  'RADIAL_FISHEYE': (structs.FISHEYE, 'f cx cy k1 k2'),
}

# Pixels. A larger side means that the file is damaged.
MAX_SIDE = 1_000_000
REDO = 'copy the model again, or write it anew with `colmap model_converter`'


class ModelError(UserError):
  """A sparse model that cannot be used."""


class ModelNotFoundError(UserError, FileNotFoundError):
  """The folder has no sparse model."""


@dataclasses.dataclass(frozen=True)
class Camera:
  """Intrinsics in pixels of the full-size image, in the order of COLMAP's `model`."""

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
  # Images that see each point, point after point; empty unless they were asked for.
  seen_by: np.ndarray  # [k] uint32, ids of images.
  views: np.ndarray  # [n] int64, how many of them are of each point.


@dataclasses.dataclass(frozen=True)
class Model:
  """A sparse model."""

  cameras: dict[int, Camera]
  images: dict[int, Image]
  points: Points


@dataclasses.dataclass(frozen=True)
class Intrinsics:
  """Intrinsics as in `structs.Cameras`, in pixels of the full-size image."""

  fx: float
  fy: float
  cx: float
  cy: float
  distortion: tuple[float, ...]  # k1, k2, k3, k4, p1, p2
  lens: int  # structs.PERSPECTIVE or structs.FISHEYE


def intrinsics(camera: Camera) -> Intrinsics:
  """Returns focal lengths, principal point and distortion of a COLMAP camera.

  Raises:
    ModelError: the camera model is not supported, or a focal length is not positive.
  """
  if camera.model not in LAYOUTS:
    raise ModelError(
      f'Camera {camera.id} has the unsupported model {camera.model}. Undistort the '
      f'images with `colmap image_undistorter`, or use one of {", ".join(LAYOUTS)}.'
    )
  lens, layout = LAYOUTS[camera.model]
  value = dict(zip(layout.split(), camera.params))
  fx, fy = value.get('fx', value.get('f')), value.get('fy', value.get('f'))
  if not min(fx, fy) > 0:
    raise ModelError(
      f'Camera {camera.id} has focal lengths {fx}, {fy}; they must be positive; {REDO}.'
    )
  distortion = tuple(value.get(k, 0.0) for k in ('k1', 'k2', 'k3', 'k4', 'p1', 'p2'))
  return Intrinsics(fx, fy, value['cx'], value['cy'], distortion, lens)


def camera_to_world(image: Image) -> np.ndarray:
  """Returns the pose of an image, [3, 4] float64: OpenGL camera axes (y up, z back) to world."""
  w, x, y, z = np.asarray(image.qvec) / math.hypot(*image.qvec)
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


def quaternion(rotation: np.ndarray) -> tuple[float, ...]:
  """Returns the unit quaternion (w, x, y, z) of a rotation [3, 3].

  It is the eigenvector of the largest eigenvalue of Bar-Itzhack's symmetric matrix K.
  """
  m = rotation
  k = np.array([
    [m[0, 0] + m[1, 1] + m[2, 2], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
    [0, m[0, 0] - m[1, 1] - m[2, 2], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0]],
    [0, 0, m[1, 1] - m[0, 0] - m[2, 2], m[1, 2] + m[2, 1]],
    [0, 0, 0, m[2, 2] - m[0, 0] - m[1, 1]],
  ])  # fmt: skip
  q = np.linalg.eigh(k, UPLO='U')[1][:, -1]
  return tuple(map(float, q if q[0] >= 0 else -q))


def posed_image(id: int, pose: np.ndarray, camera_id: int, name: str) -> Image:
  """Returns the image of a pose [3, 4], OpenGL camera axes to world: inverts `camera_to_world`."""
  rotation = (pose[:, :3] * [1, -1, -1]).T
  shift = -rotation @ pose[:, 3]
  return Image(id, quaternion(rotation), tuple(map(float, shift)), camera_id, name)


def make_points(xyz=(), rgb=None, error=None, ids=None, seen_by=(), views=None) -> Points:
  """Makes a point cloud from positions [n, 3]; default: grey, no error, ids from 1, no tracks."""
  xyz = np.asarray(xyz, np.float64).reshape(-1, 3)
  n = len(xyz)
  return Points(
    ids=np.arange(1, n + 1, dtype=np.uint64) if ids is None else np.asarray(ids, np.uint64),
    xyz=xyz,
    rgb=np.full((n, 3), 128, np.uint8) if rgb is None else np.asarray(rgb, np.uint8),
    error=np.zeros(n) if error is None else np.asarray(error, np.float64),
    seen_by=np.asarray(seen_by, np.uint32),
    views=np.zeros(n, np.int64) if views is None else np.asarray(views, np.int64),
  )


def add_camera(cameras: dict[int, Camera], where: str, camera: Camera) -> None:
  """Adds a camera read at `where`; raises a ModelError if it is invalid or its id repeats."""
  if not (1 <= camera.width <= MAX_SIDE and 1 <= camera.height <= MAX_SIDE):
    raise ModelError(
      f'{where}: camera {camera.id} has the impossible size {camera.width}x{camera.height}; {REDO}.'
    )
  if not all(map(math.isfinite, camera.params)):
    raise ModelError(
      f'{where}: camera {camera.id} has non-finite parameters {camera.params}; {REDO}.'
    )
  if camera.id in cameras:
    raise ModelError(f'{where}: camera {camera.id} is defined twice; {REDO}.')
  cameras[camera.id] = camera


def add_image(images: dict[int, Image], where: str, image: Image) -> None:
  """Adds an image read at `where`; raises a ModelError if it is invalid or its id repeats."""
  if not all(map(math.isfinite, image.qvec + image.tvec)) or not any(image.qvec):
    raise ModelError(
      f'{where}: image {image.name!r} has an invalid pose, {image.qvec} {image.tvec}; {REDO}.'
    )
  if image.id in images:
    raise ModelError(f'{where}: image {image.id} is defined twice; {REDO}.')
  images[image.id] = image
