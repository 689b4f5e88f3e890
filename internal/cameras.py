"""Pixels to rays: intrinsics, lens models and normalised device coordinates (NDC).

`pixtocam` maps a pixel's centre to the camera plane in OpenCV axes (x right, y down, z forward).
There it is undistorted and becomes a direction, which is flipped to the OpenGL axes (x right, y up,
z back) of `camtoworld`. The lens defines the plane:

  perspective  x = X / Z, y = Y / Z.
  fisheye      (x, y) is parallel to (X, Y); its norm is the angle to the optical axis in radians.
  panorama     x is the azimuth in [0, 2 pi] (pi is ahead), y the polar angle in [0, pi] (0 is up).
               Its pixtocam is `pixtocam_from_intrinsics(width / (2 pi), height / pi, 0, 0)`.

Notation: `...` is any batch shape, the same for all arguments; `n` is the number of cameras.
Products with 3x3 matrices are explicit sums, because a matmul on GPUs may use TF32 (10 bits).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import structs
from .errors import UserError

Array = jax.Array

_NEWTON_ITERATIONS = 16  # Real lenses need 3 to 5, pixels near a fold of the distortion more.
_MIN_DETERMINANT = 1e-3  # The Jacobian of the distortion has 1 at the centre and 0 on a fold.


def pixtocam_from_intrinsics(fx, fy, cx, cy) -> np.ndarray:
  """Builds inverse intrinsic matrices from focal lengths and principal points.

  Args:
    fx, fy: [...] focal lengths in pixels.
    cx, cy: [...] principal point in pixels; the centre of the first pixel is (0.5, 0.5).

  Returns:
    [..., 3, 3] float64 matrices that map (x, y, 1) in pixels to the plane at z = 1.

  Raises:
    UserError: a focal length is not positive.
  """
  fx, fy, cx, cy = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (fx, fy, cx, cy)))
  if not (np.all(fx > 0) and np.all(fy > 0)):
    raise UserError(f'Focal lengths must be positive, got fx {fx.min()}, fy {fy.min()}.')
  zero, one = np.zeros_like(fx), np.ones_like(fx)
  rows = [[1 / fx, zero, -cx / fx], [zero, 1 / fy, -cy / fy], [zero, zero, one]]
  return np.stack([np.stack(row, -1) for row in rows], -2)  # [..., 3, 3]


def make_cameras(
  pixtocam, camtoworld, size, distortion=None, lens=None, pixtocam_ndc=None
) -> structs.Cameras:
  """Builds a camera table (numpy leaves) and its static fields.

  Arguments other than `camtoworld` are broadcast over the n cameras.

  Args:
    pixtocam: [n, 3, 3] inverse intrinsics.
    camtoworld: [n, 3, 4] poses, from OpenGL camera axes to the world.
    size: [n, 2] width and height in pixels.
    distortion: [n, 6] coefficients k1, k2, k3, k4, p1, p2; None means zeros.
    lens: [n] lens codes from `structs`; None means perspective.
    pixtocam_ndc: [3, 3] inverse intrinsics of the NDC camera, or None for rays in world space.

  Returns:
    The table, with float32 and int32 leaves.

  Raises:
    UserError: a shape is wrong, a size is not a whole number or is below 1, a lens code is unknown,
      a value is NaN or infinite, or a pose scales, shears or mirrors.
  """
  camtoworld = np.asarray(camtoworld, np.float32)
  if camtoworld.ndim != 3 or camtoworld.shape[1:] != (3, 4) or not len(camtoworld):
    raise UserError(f'camtoworld must be [n, 3, 4] with n > 0, got {list(camtoworld.shape)}.')
  n = len(camtoworld)
  distortion = _rows('distortion', 0 if distortion is None else distortion, (n, 6), np.float32)
  lens = _rows('lens', structs.PERSPECTIVE if lens is None else lens, (n,), np.int32)
  lenses = tuple(int(code) for code in np.unique(lens))
  known = range(len(structs.LENS_NAMES))
  if not set(lenses) <= set(known):
    names = ', '.join(f'{code} ({name})' for code, name in enumerate(structs.LENS_NAMES))
    raise UserError(f'lens must contain only the codes {names}, got {list(lenses)}.')
  if pixtocam_ndc is not None:
    pixtocam_ndc = _rows('pixtocam_ndc', pixtocam_ndc, (3, 3), np.float32)
  pixtocam = _rows('pixtocam', pixtocam, (n, 3, 3), np.float32)
  for name, values in (
    ('pixtocam', pixtocam), ('camtoworld', camtoworld), ('distortion', distortion),
    ('pixtocam_ndc', 0 if pixtocam_ndc is None else pixtocam_ndc),
  ):  # fmt: skip
    if not np.isfinite(values).all():
      raise UserError(f'{name} contains NaN or inf.')
  size = _rows('size', size, (n, 2), np.int32)
  if size.min() < 1:
    raise UserError(f'size must be at least 1 pixel a side, got {size.min()}.')
  rigid = structs.are_rigid(camtoworld)
  if not rigid.all():
    raise UserError(
      f'camtoworld must be rotations and positions; pose {np.argmin(rigid)} scales, shears or '
      'mirrors. Divide the rotation by its scale.'
    )
  return structs.Cameras(
    pixtocam=pixtocam,
    camtoworld=camtoworld,
    distortion=distortion,
    lens=lens,
    size=size,
    pixtocam_ndc=pixtocam_ndc,
    lenses=lenses,
    distorted=bool(np.any(distortion)),
  )


def _rows(name: str, value, shape: tuple[int, ...], dtype) -> np.ndarray:
  value = np.asarray(value)
  try:
    made = np.array(np.broadcast_to(value, shape), dtype)
  except ValueError:
    raise UserError(f'{name} must be {list(shape)}, got {list(value.shape)}.') from None
  wrong = np.broadcast_to(value, shape)[made != value] if dtype is np.int32 else ()
  if len(wrong):
    raise UserError(f'{name} must be whole numbers, got {wrong[0]}.')
  return made


def pixels_to_rays(
  cams: structs.Cameras, cam_idx: Array, pix_x: Array, pix_y: Array
) -> structs.Rays:
  """Casts rays through the centres of pixels.

  Args:
    cams: camera table.
    cam_idx: [...] int rows of the table.
    pix_x: [...] int columns, from the left.
    pix_y: [...] int rows, from the top.

  Returns:
    Rays [...] in world space, or in NDC if the table has `pixtocam_ndc`. Directions have z = -1 in
    camera axes (perspective) or unit norm (fisheye, panorama). The cone radius at t = 1 is
    2 / sqrt(12) times the mean distance to the directions (NDC: origins) of the right and lower
    neighbours: a disc with the variance of the pixel (mip-NeRF, arXiv:2103.13415, section 3.1).
  """
  cam_idx, pix_x, pix_y = jnp.asarray(cam_idx), jnp.asarray(pix_x), jnp.asarray(pix_y)
  # Axis 0: the pixel, its right neighbour, its lower neighbour.
  x = jnp.stack([pix_x, pix_x + 1, pix_x]) + 0.5  # [3, ...]
  y = jnp.stack([pix_y, pix_y, pix_y + 1]) + 0.5
  rows = cams.replace(pixtocam_ndc=None, supervision=None)
  row = jax.tree.map(lambda leaf: jnp.asarray(leaf)[cam_idx][None], rows)  # Leaves [1, ..., k].

  x, y, _ = _transform(row.pixtocam, (x, y, jnp.ones_like(x)))
  directions = _transform(row.camtoworld[..., :3], _camera_directions(row, x, y))
  directions = jnp.stack(directions, -1)  # [3, ..., 3]
  origins = jnp.broadcast_to(row.camtoworld[..., 3], directions.shape)
  viewdirs = directions[0] / jnp.sqrt(_sum_of_squares(directions[0]))  # World space, also for NDC.

  spread = directions
  if cams.pixtocam_ndc is not None:
    origins, directions = convert_to_ndc(origins, directions, jnp.asarray(cams.pixtocam_ndc))
    spread = origins
  squared = _sum_of_squares(spread[1:] - spread[:1])  # [2, ..., 1]
  # Neighbours can coincide beyond a fold of the lens; the root has no gradient at 0.
  distances = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
  return structs.Rays(
    origins=origins[0],
    directions=directions[0],
    viewdirs=viewdirs,
    radii=(distances[0] + distances[1]) / np.sqrt(12),
    cam_idx=cam_idx.astype(jnp.int32),
  )


def convert_to_ndc(
  origins: Array, directions: Array, pixtocam_ndc: Array, near: float = 1.0
) -> tuple[Array, Array]:
  """Converts rays to normalised device coordinates (NeRF, arXiv:2003.08934, appendix C).

  For forward-facing captures. The frustum of a camera at the world's origin that looks along -z
  becomes the cube [-1, 1]^3, with t = 0 on the plane z = -near and t = 1 at infinity. The principal
  point is assumed to be the image centre.

  Args:
    origins: [..., 3] origins in world units.
    directions: [..., 3] directions with negative z.
    pixtocam_ndc: [3, 3] inverse intrinsics of the camera.
    near: distance of the near plane in world units.

  Returns:
    (origins [..., 3], directions [..., 3]) in NDC.
  """
  dz = directions[..., 2]
  # A ray parallel to the near plane never meets it. A tiny slope keeps the result finite.
  dz = jnp.where(jnp.abs(dz) < 1e-6, -1e-6, dz)
  slope_x, slope_y = directions[..., 0] / dz, directions[..., 1] / dz
  rise = -(near + origins[..., 2])  # Distance along z to the near plane.
  scale_x, scale_y = 1 / pixtocam_ndc[0, 2], 1 / pixtocam_ndc[1, 2]  # -2 f / width, -2 f / height
  x0 = -scale_x * (origins[..., 0] + rise * slope_x) / near
  y0 = -scale_y * (origins[..., 1] + rise * slope_y) / near
  ndc_origins = jnp.stack([x0, y0, jnp.full_like(x0, -1)], -1)
  at_infinity = jnp.stack([scale_x * slope_x, scale_y * slope_y, jnp.ones_like(x0)], -1)
  return ndc_origins, at_infinity - ndc_origins


def distort(x: Array, y: Array, distortion: Array, fisheye: bool) -> tuple[Array, Array]:
  """Applies lens distortion: COLMAP's OPENCV or OPENCV_FISHEYE model.

  radial(r) = 1 + k1 r^2 + k2 r^4 + k3 r^6 + k4 r^8, plus OpenCV's tangential terms in p1 and p2.

  Args:
    x, y: [...] pinhole coordinates X / Z and Y / Z in OpenCV axes.
    distortion: [..., 6] or [6] coefficients k1, k2, k3, k4, p1, p2.
    fisheye: whether r is the angle to the optical axis (p1 and p2 are then ignored) rather than the
      pinhole radius.

  Returns:
    (x [...], y [...]) distorted coordinates, float32, before the intrinsics are applied.
  """
  x, y, distortion = jnp.asarray(x), jnp.asarray(y), jnp.asarray(distortion)
  if fisheye:
    radius, centre = _radius(x, y)
    angle_over_radius = jnp.where(centre, 1, jnp.arctan(radius) / radius)  # Its limit at 0 is 1.
    x, y = angle_over_radius * x, angle_over_radius * y
    distortion = _radial_only(distortion)
  return _distort_plane(x, y, distortion)


def _distort_plane(x: Array, y: Array, distortion: Array) -> tuple[Array, Array]:
  """Applies the polynomial of both models; for a fisheye, (x, y) has the angle as its norm."""
  k1, k2, k3, k4, p1, p2 = (distortion[..., i] for i in range(6))
  r2 = x**2 + y**2
  radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
  return (
    x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2),
    y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y**2),
  )


def _radial_only(distortion: Array) -> Array:
  return distortion.at[..., 4:].set(0)  # OPENCV_FISHEYE has no tangential terms.


def _undistort_plane(xd: Array, yd: Array, distortion: Array) -> tuple[Array, Array]:
  """Inverts `_distort_plane` by damped Newton iterations from the centre.

  A step is accepted if it lowers the residual and stays where the Jacobian's determinant is
  positive. A point outside the lens's range therefore ends near the fold, neither mirrored nor at
  infinity. Gradients come from the implicit function theorem, not from the iterations.
  """
  target, fixed = lax.stop_gradient(((xd, yd), distortion))

  def body(_, state):
    point, residual, jacobian, damping = state
    step = _solve_2x2(jacobian, residual)
    new_point = tuple(u - damping * s for u, s in zip(point, step))
    new_residual, new_jacobian = _residual_and_jacobian(new_point, target, fixed)
    a, b, c, d = new_jacobian
    # Comparisons with NaN and `inf < x` are false, so steps that overflow are rejected.
    take = (_squared(new_residual) < _squared(residual)) & (a * d - b * c > _MIN_DETERMINANT)
    new, old = (new_point, new_residual, new_jacobian), (point, residual, jacobian)
    kept = jax.tree.map(lambda new, old: jnp.where(take, new, old), new, old)
    return *kept, jnp.where(take, jnp.minimum(2 * damping, 1), damping / 4)

  zero, one = jnp.zeros_like(xd), jnp.ones_like(xd)
  # At the centre the distortion is the identity: residual -target, Jacobian I.
  start = ((zero, zero), (-target[0], -target[1]), (one, zero, zero, one), one)
  point, _, jacobian, _ = lax.fori_loop(0, _NEWTON_ITERATIONS, body, start)
  fx, fy = _distort_plane(*point, distortion)
  step = _solve_2x2(jacobian, (fx - xd, fy - yd))
  # s - stop_gradient(s) is 0, with the gradient of the implicit function.
  x, y = (u - (s - lax.stop_gradient(s)) for u, s in zip(point, step))
  return x, y


@jax.jit
def check_distortion(cams: structs.Cameras, x: Array, y: Array) -> tuple[Array, Array]:
  """Undistorts points of pictures as rays do, and distorts them again.

  Args:
    cams: n cameras.
    x, y: [k] places in a picture, as fractions of its width and height.

  Returns:
    How far the results are from the points, in pixels, and how many times as far from the axis the
    distortion moves them, [n, k] each. Points beyond a fold of the distortion do not come back.
  """
  x, y = x[None] * cams.size[:, :1], y[None] * cams.size[:, 1:]  # [n, k] each.
  x, y, _ = _transform(cams.pixtocam[:, None], (x, y, jnp.ones_like(x)))
  fisheye = (cams.lens == structs.FISHEYE)[:, None]
  distortion = jnp.where(fisheye, _radial_only(cams.distortion), cams.distortion)[:, None]
  point = _undistort_plane(x, y, distortion)
  again = _distort_plane(*point, distortion)
  misses = [(b - a) / cams.pixtocam[:, None, i, i] for i, (a, b) in enumerate(zip((x, y), again))]
  return jnp.hypot(*misses), jnp.hypot(x, y) / jnp.maximum(jnp.hypot(*point), 1e-6)


def _residual_and_jacobian(point, target, distortion):
  """Returns `_distort_plane(point) - target` and its Jacobian [[a, b], [c, d]] as (a, b, c, d)."""

  def residual(x, y):
    fx, fy = _distort_plane(x, y, distortion)
    return fx - target[0], fy - target[1]

  one, zero = jnp.ones_like(point[0]), jnp.zeros_like(point[0])
  value, (a, c) = jax.jvp(residual, point, (one, zero))
  _, (b, d) = jax.jvp(residual, point, (zero, one))
  return value, (a, b, c, d)


def _solve_2x2(matrix, vector):
  (a, b, c, d), (e, f) = matrix, vector
  det = a * d - b * c
  return (d * e - b * f) / det, (a * f - c * e) / det


def _squared(vector):
  return sum(v**2 for v in vector)


def _camera_directions(row: structs.Cameras, x: Array, y: Array) -> tuple[Array, Array, Array]:
  """Converts plane coordinates to directions in OpenGL camera axes, by each camera's lens."""
  ux, uy = x, y
  if row.distorted:  # Static, so that undistorted tables compile without Newton iterations.
    fisheye = (row.lens == structs.FISHEYE)[..., None]
    distortion = jnp.where(fisheye, _radial_only(row.distortion), row.distortion)
    ux, uy = _undistort_plane(x, y, distortion)
  cast = {
    structs.PERSPECTIVE: lambda: (ux, -uy, -jnp.ones_like(ux)),
    structs.FISHEYE: lambda: _fisheye_direction(ux, uy),
    structs.PANORAMA: lambda: _panorama_direction(x, y),
  }
  directions = cast[row.lenses[0]]()
  for code in row.lenses[1:]:  # Only lenses that occur in the table are computed.
    this = row.lens == code
    directions = tuple(jnp.where(this, new, old) for new, old in zip(cast[code](), directions))
  return directions


def _fisheye_direction(x: Array, y: Array) -> tuple[Array, Array, Array]:
  angle, centre = _radius(x, y)
  clipped = jnp.minimum(angle, np.pi)  # pi is straight behind the camera.
  sine_over_angle = jnp.where(centre, 1, jnp.sin(clipped) / angle)
  cosine = jnp.where(centre, 1 - (x**2 + y**2) / 2, jnp.cos(clipped))
  return x * sine_over_angle, -y * sine_over_angle, -cosine


def _panorama_direction(x: Array, y: Array) -> tuple[Array, Array, Array]:
  azimuth = x - np.pi
  return jnp.sin(azimuth) * jnp.sin(y), jnp.cos(y), -jnp.cos(azimuth) * jnp.sin(y)


def _radius(x: Array, y: Array) -> tuple[Array, Array]:
  """Returns |(x, y)|, and whether it is close to 0, where 1 is returned instead."""
  r2 = x**2 + y**2
  centre = r2 < 1e-12
  return jnp.sqrt(jnp.where(centre, 1, r2)), centre


def _transform(matrix: Array, vector: tuple[Array, Array, Array]) -> tuple[Array, ...]:
  """Multiplies matrices [..., 3, 3] by vectors (three arrays [...]) in full float32."""
  return tuple(sum(matrix[..., i, j] * vector[j] for j in range(3)) for i in range(3))


def _sum_of_squares(x: Array) -> Array:
  return jnp.sum(x**2, -1, keepdims=True)
