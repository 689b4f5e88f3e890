"""First Gaussians: discs on the surfaces that a trained field shows, and a shell behind them."""

from __future__ import annotations

import numpy as np
from scipy import spatial

from .. import structs
from ..datasets.images import in_threads
from ..errors import UserError
from . import gaussians

SHELL = 500.0  # Normalised units: what lies deeper in a picture is put at this depth.
DEAD_LOGIT = -12.0  # Opacity of a row without a Gaussian.
# Of the first Gaussians: opacity, deviation as a part of the distance to their neighbours, and its
# limit in pixels. Faint ones that overlap leave a fit free to move them; opaque ones without holes
# between them, in the sky too, are nearer to the pictures from the start.
_FREE, _COVERING = (0.5, 1.0, 8.0), (0.9, 0.6, 30.0)
_THICKNESS = 0.2  # Deviation along the normal, in those of the disc.
_STEEPEST = 8.0  # Neighbours farther apart than so many pixels lie on two surfaces.


def initial(
  cams: structs.Cameras, images: list[dict], count: int, rows: int, covering: bool = False
) -> gaussians.Splats:
  """Makes Gaussians of `count` random pixels of rendered pictures, in arrays of `rows` rows.

  Half of the pixels are drawn evenly, half in proportion to the change of the picture's colour
  there. A Gaussian stands at the median distance along its pixel's ray and has the pixel's colour.
  It is a disc across the normal of the depth map. Its deviation is a part of the distance to its
  neighbours among the Gaussians, within limits in pixels. At edges it is a ball. With `covering`,
  for short fits, the Gaussians are opaque and leave no holes.

  Raises:
    UserError: no pixel is opaque.
  """
  most = -(-2 * count // len(images))  # Of a picture. Keeping all pixels would take gigabytes.
  parts = in_threads(lambda row: _pixels(cams, row, images[row], most), range(len(images)))
  xyz, rgb, normal, footprint = (np.concatenate(each) for each in zip(*parts))
  if not len(xyz):
    raise UserError('The run shows no surface: all pixels are transparent. Train longer.')
  chosen = np.random.default_rng(0).choice(len(xyz), min(count, rows, len(xyz)), replace=False)
  xyz, rgb, normal, footprint = (a[chosen] for a in (xyz, rgb, normal, footprint))
  near = spatial.cKDTree(xyz).query(xyz, min(4, len(xyz)), workers=-1)[0][:, 1:]
  opacity, part, widest = _COVERING if covering else _FREE
  radius = np.clip(
    part * near.mean(-1) if near.size else footprint, 0.5 * footprint, widest * footprint
  )
  flat = np.linalg.norm(normal, axis=-1, keepdims=True) > 0
  scales = radius[:, None] * np.where(flat, [1, 1, _THICKNESS], 1)
  return _padded(xyz, rgb, _turn_z_to(normal), np.log(scales), opacity, rows)


def _pixels(cams: structs.Cameras, row: int, image: dict, most: int) -> tuple[np.ndarray, ...]:
  """Draws opaque pixels: their positions, colours, normals (0 at edges) and widths in the world."""
  # In numpy and for the drawn pixels only: threads must not compute with JAX.
  camera = gaussians.pinhole(cams, row)
  reach = np.minimum(np.nan_to_num(image['distance_median'], nan=SHELL), SHELL)  # [h, w]
  change = np.hypot(*np.gradient(np.asarray(image['rgb'], np.float64), axis=(0, 1))).sum(-1)
  share = 1 + change / max(change.mean(), 1e-6)
  # The least of exponential variables with these rates are a draw without replacement.
  times = np.random.default_rng(row).exponential(size=share.shape) / share
  times = np.where(image['acc'] >= 0.5, times, np.inf).ravel()
  drawn = np.argpartition(times, min(most, times.size) - 1)[:most]
  y, x = np.unravel_index(drawn[np.isfinite(times[drawn])], share.shape)
  last = np.array(share.shape)[:, None] - 1

  def point(y, x):
    plane = (np.stack([x, y], -1) + 0.5 - camera.centre) / camera.focal
    ray = np.concatenate([plane, np.ones_like(plane[:, :1])], -1) @ camera.rotation
    return camera.position + reach[y, x, None] * ray

  def slope(axis):  # Per pixel, from the pixel before to the one behind.
    low, high = (np.clip([y, x] + sign * axis, 0, last) for sign in (-1, 1))
    return (point(*high) - point(*low)) / (axis * (high - low)).sum(0)[:, None]

  across, down = (slope(np.array(axis)[:, None]) for axis in ((0, 1), (1, 0)))
  xyz, normal = point(y, x), np.cross(across, down)
  width = reach[y, x] * float(np.asarray(cams.pixtocam)[row, 0, 0])
  steps = np.maximum(*(np.linalg.norm(step, axis=-1) for step in (across, down)))
  length = np.linalg.norm(normal, axis=-1)
  flat = (steps < _STEEPEST * width) & (length > 0)
  normal = np.where(flat[:, None], normal / np.where(length > 0, length, 1)[:, None], 0)
  kept = np.isfinite(xyz).all(-1) & (width > 0)
  return tuple(values[kept] for values in (xyz, image['rgb'][y, x], normal, width))


def _turn_z_to(normal: np.ndarray) -> np.ndarray:
  """Returns quaternions [n, 4] (w first) that turn z to unit vectors [n, 3]; the identity for 0."""
  x, y, z = normal.T
  # The half-way rotation: (1 + cos, axis sin); the lower half turns to -normal, the same disc.
  sign = np.where(z < 0, -1.0, 1.0)
  return np.stack([1 + sign * z, -sign * y, sign * x, np.zeros_like(x)], -1)


def _padded(xyz, rgb, quaternions, log_scales, opacity: float, rows: int) -> gaussians.Splats:
  """Returns the Gaussians followed by dead rows."""
  n = len(xyz)
  sh = np.zeros((rows, gaussians.SH_COEFFICIENTS, 3), np.float32)
  sh[:n, 0] = (rgb - 0.5) / gaussians.SH_0

  def padded(values, fill):
    return np.concatenate([values, np.broadcast_to(fill, (rows - n, *values.shape[1:]))]).astype(
      np.float32
    )

  logits = np.full(n, np.log(opacity / (1 - opacity)))
  return gaussians.Splats(
    means=padded(xyz, xyz[0]),
    log_scales=padded(log_scales, 0.0),
    quaternions=padded(quaternions, [1.0, 0, 0, 0]),
    opacity_logits=padded(logits, DEAD_LOGIT),
    sh=sh,
  )
