"""Pixels to rays: intrinsics, lens models, normalised device coordinates.

A pixel's centre goes through `pixtocam` to a plane with the OpenCV axes (x right, y down, z
forward), is undistorted there, becomes a direction, and turns to the OpenGL axes (x right, y up,
z back) of `camtoworld`. What the plane is depends on the lens:

  perspective  x = X / Z, y = Y / Z.
  fisheye      (x, y) points to (X, Y) and its length is the angle to the optical axis, in radians.
  panorama     x is the azimuth in [0, 2 pi] (pi: ahead), y the polar angle in [0, pi] (0: up);
               its pixtocam is `pixtocam_from_intrinsics(width / (2 pi), height / pi, 0, 0)`.

Shapes: `...` is any batch shape, the same for all arguments; `n` is the number of cameras. Products
with 3x3 matrices are written out as sums: on GPUs a matmul would fall to TF32, ten bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import structs
from .errors import UserError

Array = jax.Array

_NEWTON_ITERATIONS = 16  # Real lenses need 3 to 5; the rest serves pixels close to a fold.
_MIN_DETERMINANT = 1e-3  # Of the distortion's Jacobian, 1 at the centre and 0 on the fold.


def pixtocam_from_intrinsics(fx, fy, cx, cy) -> np.ndarray:
  """Inverse intrinsic matrices.

  Args:
    fx, fy: [...] focal lengths in pixels.
    cx, cy: [...] principal point in pixels; the first pixel's centre is at (0.5, 0.5).

  Returns:
    [..., 3, 3] float64.

  Raises:
    ValueError: a focal length is not positive.
  """
  fx, fy, cx, cy = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (fx, fy, cx, cy)))
  if not (np.all(fx > 0) and np.all(fy > 0)):
    raise UserError(f'Focal lengths must be positive, got fx {fx.min()}, fy {fy.min()}.')
  zero, one = np.zeros_like(fx), np.ones_like(fx)
  rows = [[1 / fx, zero, -cx / fx], [zero, 1 / fy, -cy / fy], [zero, zero, one]]
  return np.stack([np.stack(row, -1) for row in rows], -2)


def make_cameras(
  pixtocam, camtoworld, size, distortion=None, lens=None, pixtocam_ndc=None
) -> structs.Cameras:
  """Builds a camera table with numpy leaves and the static fields that belong to it.

  All but `camtoworld` may lack the axis n, and then serve every camera.

  Args:
    pixtocam: [n, 3, 3] inverse intrinsics.
    camtoworld: [n, 3, 4] OpenGL camera axes to world.
    size: [n, 2] width and height in pixels.
    distortion: [n, 6] k1, k2, k3, k4, p1, p2; None for none.
    lens: [n] codes of `structs`; None for perspective.
    pixtocam_ndc: [3, 3] if rays are to be in NDC.

  Raises:
    ValueError: a shape does not fit, or a lens code is unknown.
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
    raise UserError(f'Lens codes are {list(known)} for {structs.LENS_NAMES}, got {list(lenses)}.')
  if pixtocam_ndc is not None:
    pixtocam_ndc = _rows('pixtocam_ndc', pixtocam_ndc, (3, 3), np.float32)
  return structs.Cameras(
    pixtocam=_rows('pixtocam', pixtocam, (n, 3, 3), np.float32),
    camtoworld=camtoworld,
    distortion=distortion,
    lens=lens,
    size=_rows('size', size, (n, 2), np.int32),
    pixtocam_ndc=pixtocam_ndc,
    lenses=lenses,
    distorted=bool(np.any(distortion)),
  )


def _rows(name: str, value, shape: tuple[int, ...], dtype) -> np.ndarray:
  value = np.asarray(value)
  try:
    return np.array(np.broadcast_to(value, shape), dtype)
  except ValueError:
    raise UserError(f'{name} must be {list(shape)}, got {list(value.shape)}.') from None


def pixels_to_rays(
  cams: structs.Cameras, cam_idx: Array, pix_x: Array, pix_y: Array
) -> structs.Rays:
  """Casts the rays of pixels.

  Args:
    cams: the camera table.
    cam_idx: [...] int, rows of the table.
    pix_x: [...] int, columns, counted from the left.
    pix_y: [...] int, rows, counted from the top.

  Returns:
    Directions have z = -1 in the camera (perspective) or unit length (fisheye,
    panorama); the radius at t = 1 is 2 / sqrt(12) times the mean distance to the directions (in
    NDC: origins) of the right and lower neighbours, which gives the cone the variance of the
    pixel's square (mip-NeRF, arXiv:2103.13415, section 3.1).
  """
  cam_idx, pix_x, pix_y = jnp.asarray(cam_idx), jnp.asarray(pix_x), jnp.asarray(pix_y)
  # Axis 0: the pixel, its right and its lower neighbour.
  x = jnp.stack([pix_x, pix_x + 1, pix_x]) + 0.5  # [3, ...]
  y = jnp.stack([pix_y, pix_y, pix_y + 1]) + 0.5
  rows = cams.replace(pixtocam_ndc=None, supervision=None)
  row = jax.tree.map(lambda leaf: jnp.asarray(leaf)[cam_idx][None], rows)

  x, y, _ = _transform(row.pixtocam, (x, y, jnp.ones_like(x)))
  directions = _transform(row.camtoworld[..., :3], _camera_directions(row, x, y))
  directions = jnp.stack(directions, -1)  # [3, ..., 3]
  origins = jnp.broadcast_to(row.camtoworld[..., 3], directions.shape)
  viewdirs = directions[0] / jnp.sqrt(_sum_of_squares(directions[0]))

  spread = directions
  if cams.pixtocam_ndc is not None:
    origins, directions = convert_to_ndc(origins, directions, jnp.asarray(cams.pixtocam_ndc))
    spread = origins
  squared = _sum_of_squares(spread[1:] - spread[:1])  # [2, ..., 1]
  # Beyond a fold of the lens neighbours can coincide, where the root has no gradient.
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
  """Rays in normalised device coordinates, for forward-facing captures (NeRF, arXiv:2003.08934, C).

  The frustum of a camera at the world's origin, looking along -z, becomes the cube [-1, 1]^3: t = 0
  lies on the plane z = -near and t = 1 at infinity. The principal point is taken as the centre.

  Args:
    origins: [..., 3] world units.
    directions: [..., 3] with negative z.
    pixtocam_ndc: [3, 3] inverse intrinsics of that camera.
    near: distance of the near plane, world units.

  Returns:
    (origins, directions), [..., 3] each.
  """
  dz = directions[..., 2]
  # A ray parallel to the near plane never meets it; this one does, far away, and stays finite.
  dz = jnp.where(jnp.abs(dz) < 1e-6, -1e-6, dz)
  slope_x, slope_y = directions[..., 0] / dz, directions[..., 1] / dz
  rise = -(near + origins[..., 2])  # to the near plane, along z
  scale_x, scale_y = 1 / pixtocam_ndc[0, 2], 1 / pixtocam_ndc[1, 2]  # -2 f / width, -2 f / height
  x0 = -scale_x * (origins[..., 0] + rise * slope_x) / near
  y0 = -scale_y * (origins[..., 1] + rise * slope_y) / near
  ndc_origins = jnp.stack([x0, y0, jnp.full_like(x0, -1)], -1)
  at_infinity = jnp.stack([scale_x * slope_x, scale_y * slope_y, jnp.ones_like(x0)], -1)
  return ndc_origins, at_infinity - ndc_origins


def distort(x: Array, y: Array, distortion: Array, fisheye: bool) -> tuple[Array, Array]:
  """Where the lens shows the point (X / Z, Y / Z): COLMAP's OPENCV or OPENCV_FISHEYE model.

  Args:
    x, y: [...] ideal pinhole coordinates, OpenCV axes.
    distortion: [..., 6] or [6]: k1, k2, k3, k4, p1, p2. A fisheye has no p1, p2.
    fisheye: whether the k are of a polynomial in the angle instead of the pinhole radius.

  Returns:
    (x, y), [...] each, to be multiplied by the intrinsics. float32.
  """
  x, y, distortion = jnp.asarray(x), jnp.asarray(y), jnp.asarray(distortion)
  if fisheye:
    radius, centre = _radius(x, y)
    angle_over_radius = jnp.where(centre, 1, jnp.arctan(radius) / radius)
    x, y = angle_over_radius * x, angle_over_radius * y
    distortion = _radial_only(distortion)
  return _distort_plane(x, y, distortion)


def _distort_plane(x: Array, y: Array, distortion: Array) -> tuple[Array, Array]:
  """The polynomial of both lens models; a fisheye's plane has the angle as its radius already."""
  k1, k2, k3, k4, p1, p2 = (distortion[..., i] for i in range(6))
  r2 = x**2 + y**2
  radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
  return (
    x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2),
    y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y**2),
  )


def _radial_only(distortion: Array) -> Array:
  return distortion.at[..., 4:].set(0)


def _undistort_plane(xd: Array, yd: Array, distortion: Array) -> tuple[Array, Array]:
  """Inverts `_distort_plane` by damped Newton iterations from the centre.

  A step is taken if it lowers the residual and stays where the distortion keeps the orientation,
  so a point that the lens never shows ends near the fold, not mirrored or at infinity. Gradients
  are those of the implicit function at the solution, not of the iterations.
  """
  target, fixed = lax.stop_gradient(((xd, yd), distortion))

  def body(_, state):
    point, residual, jacobian, damping = state
    step = _solve_2x2(jacobian, residual)
    new_point = tuple(u - damping * s for u, s in zip(point, step))
    new_residual, new_jacobian = _residual_and_jacobian(new_point, target, fixed)
    a, b, c, d = new_jacobian
    # Comparisons with NaN are false and with inf too: an overflowing step is refused as well.
    take = (_squared(new_residual) < _squared(residual)) & (a * d - b * c > _MIN_DETERMINANT)
    new, old = (new_point, new_residual, new_jacobian), (point, residual, jacobian)
    kept = jax.tree.map(lambda new, old: jnp.where(take, new, old), new, old)
    return *kept, jnp.where(take, jnp.minimum(2 * damping, 1), damping / 4)

  zero, one = jnp.zeros_like(xd), jnp.ones_like(xd)
  start = ((zero, zero), (-target[0], -target[1]), (one, zero, zero, one), one)
  point, _, jacobian, _ = lax.fori_loop(0, _NEWTON_ITERATIONS, body, start)
  fx, fy = _distort_plane(*point, distortion)
  step = _solve_2x2(jacobian, (fx - xd, fy - yd))
  # The last term is zero in value; its derivative is the implicit function's.
  x, y = (u - (s - lax.stop_gradient(s)) for u, s in zip(point, step))
  return x, y


def _residual_and_jacobian(point, target, distortion):
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
  """Plane coordinates to directions in OpenGL camera axes, for the lens models in the table."""
  ux, uy = x, y
  if row.distorted:
    fisheye = (row.lens == structs.FISHEYE)[..., None]
    distortion = jnp.where(fisheye, _radial_only(row.distortion), row.distortion)
    ux, uy = _undistort_plane(x, y, distortion)
  cast = {
    structs.PERSPECTIVE: lambda: (ux, -uy, -jnp.ones_like(ux)),
    structs.FISHEYE: lambda: _fisheye_direction(ux, uy),
    structs.PANORAMA: lambda: _panorama_direction(x, y),
  }
  directions = cast[row.lenses[0]]()
  for code in row.lenses[1:]:
    this = row.lens == code
    directions = tuple(jnp.where(this, new, old) for new, old in zip(cast[code](), directions))
  return directions


def _fisheye_direction(x: Array, y: Array) -> tuple[Array, Array, Array]:
  angle, centre = _radius(x, y)
  seen = jnp.minimum(angle, np.pi)  # Nothing is farther from the axis than straight behind.
  sine_over_angle = jnp.where(centre, 1, jnp.sin(seen) / angle)
  cosine = jnp.where(centre, 1 - (x**2 + y**2) / 2, jnp.cos(seen))
  return x * sine_over_angle, -y * sine_over_angle, -cosine


def _panorama_direction(x: Array, y: Array) -> tuple[Array, Array, Array]:
  azimuth = x - np.pi
  return jnp.sin(azimuth) * jnp.sin(y), jnp.cos(y), -jnp.cos(azimuth) * jnp.sin(y)


def _radius(x: Array, y: Array) -> tuple[Array, Array]:
  """|(x, y)| and whether it is too small to be told from 0; it is 1 there, safe to divide by."""
  r2 = x**2 + y**2
  centre = r2 < 1e-12
  return jnp.sqrt(jnp.where(centre, 1, r2)), centre


def _transform(matrix: Array, vector: tuple[Array, Array, Array]) -> tuple[Array, ...]:
  """[..., 3, 3] times a vector of three [...], as sums in full float32."""
  return tuple(sum(matrix[..., i, j] * vector[j] for j in range(3)) for i in range(3))


def _sum_of_squares(x: Array) -> Array:
  return jnp.sum(x**2, -1, keepdims=True)
