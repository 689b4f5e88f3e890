"""Sharpens a coarse picture of a moving camera with the last fine picture of the same scene.

The depth of the coarse picture says where each pixel of the new view was in the fine one. Pixels
that it did not show, or showed behind something else, keep the coarse picture. Cameras are
pinholes; depths are distances along the optical axis. A few passes over the pixels in numpy, so
that it costs much less than rendering them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

_PASSES = 2  # Corrections of the depth by the fine picture's.
_EDGE = 0.85  # A neighbour that is nearer than this fraction of a depth is another surface.
_SKY = 200.0  # What is farther, of cameras within 1 of the origin, does not move with the camera.
_TOLERANCE = 0.05  # Relative difference of depths up to which they are of the same surface.


@dataclasses.dataclass(frozen=True)
class Reference:
  """A picture with its camera."""

  image: np.ndarray  # [h, w, 3] uint8
  depth: np.ndarray  # [h, w]
  pose: np.ndarray  # [3, 4] OpenGL camera axes to world.
  fov: float  # Vertical, radians.


def sharpened(
  image: np.ndarray,
  depth: np.ndarray,
  pose: np.ndarray,
  fov: float,
  size: tuple[int, int],
  reference: Reference,
) -> tuple[np.ndarray, np.ndarray, float]:
  """Returns a coarse picture enlarged to `size`, with the reference's pixels where it shows them.

  Args:
    image: the coarse picture, uint8 [h, w, 3].
    depth: its depth [h, w].
    pose: [3, 4] OpenGL camera axes to world.
    fov: vertical field of view, radians.
    size: width and height of the result.
    reference: the fine picture.

  Returns:
    The picture, uint8 [height, width, 3], its depth [height, width], and the fraction of pixels
    taken from the reference.
  """
  depth = np.float32(depth)
  coarse = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
  near, far = (_enlarged(bound, size).ravel() for bound in _bounds(depth))
  own = _enlarged(depth, size).ravel()
  turn, shift = _between(pose, reference.pose)
  turned = _rays(size, fov).reshape(-1, 3) @ turn.T  # [n, 3]
  distance, pixels, shown = own.copy(), np.zeros(len(own), np.int32), np.zeros(len(own), bool)

  def search(start: np.ndarray, rows: np.ndarray) -> None:
    """Looks from a depth on for a surface of the reference on some of the rays."""
    bounds = near[rows], far[rows]
    found, at, there = _find(start[rows], bounds, turned[rows], shift, reference)
    distance[rows[there]], pixels[rows[there]], shown[rows[there]] = found[there], at[there], True

  search(own, np.arange(len(own)))
  search(far, np.flatnonzero(~shown))
  # A nearer surface, at the silhouettes within a coarse pixel, hides what was found.
  search(near, np.flatnonzero(near < _EDGE * own))
  fine = reference.image.reshape(-1, 3)[pixels].reshape(coarse.shape)
  picture = np.where(shown.reshape(*coarse.shape[:2], 1), fine, coarse)
  return picture, distance.reshape(coarse.shape[:2]), float(shown.mean())


def _between(pose: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns rotation and translation from a camera's axes to the reference's."""
  turn = reference[:, :3].T
  return np.float32(turn @ pose[:, :3]), np.float32(turn @ (pose[:, 3] - reference[:, 3]))


def _find(
  distance: np.ndarray,
  bounds: tuple[np.ndarray, np.ndarray],
  turned: np.ndarray,
  shift: np.ndarray,
  reference: Reference,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Finds surfaces of the reference on rays, from starting depths [n] on.

  Returns:
    Their depths [n], the reference's pixels [n], and whether it shows a surface there.
  """
  near, far = bounds
  for k in range(_PASSES + 1):
    points = distance[:, None] * turned + shift  # In the reference's axes.
    pixels, inside = _pixels(points, reference)
    behind = reference.depth.ravel()[pixels] + points[:, 2]  # How far the surface is behind it.
    if k < _PASSES:
      # That surface is at about another depth along this ray, by as much.
      corrected = distance + behind / np.maximum(-turned[:, 2], 0.1)
      usable = inside & (corrected > near) & (corrected < far)
      distance = np.where(usable, corrected, distance)
  same = np.abs(behind) < _TOLERANCE * -points[:, 2]
  sky = np.minimum(distance, reference.depth.ravel()[pixels]) > _SKY
  return distance, pixels, inside & (same | sky)


def _enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Returns values [h, w] enlarged to (width, height) by the nearest."""
  rows, columns = (np.arange(n) * m // n for n, m in zip(size[::-1], values.shape))
  return values[rows[:, None], columns]


def _bounds(depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the least and the largest depth among each pixel and its neighbours, with a margin."""
  rows, columns = depth.shape
  padded = np.pad(depth, 1, mode='edge')
  around = [padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
  return np.min(around, 0) * (1 - _TOLERANCE), np.max(around, 0) * (1 + _TOLERANCE)


def _rays(size: tuple[int, int], fov: float) -> np.ndarray:
  """Returns the directions through the centres of the pixels in camera axes, with z = -1."""
  width, height = size
  scale = 2 * np.tan(fov / 2) / height
  x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) * scale
  y = (height / 2 - np.arange(height, dtype=np.float32) - 0.5) * scale
  grid = np.stack(np.broadcast_arrays(x, y[:, None], np.float32(-1)), -1)
  return np.float32(grid)


def _pixels(points: np.ndarray, reference: Reference) -> tuple[np.ndarray, np.ndarray]:
  """Returns the number of the reference's pixel at each point, and whether it has one."""
  height, width = reference.depth.shape
  focal = height / 2 / np.tan(reference.fov / 2)
  ahead = -points[..., 2]
  scale = np.float32(focal) / np.maximum(ahead, 1e-6)
  columns = np.clip(points[..., 0] * scale + width / 2, -1, width).astype(np.int32)
  rows = np.clip(height / 2 - points[..., 1] * scale, -1, height).astype(np.int32)
  inside = (ahead > 1e-6) & (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
  return np.where(inside, rows * width + columns, 0), inside
