"""3D Gaussians: parameters, colours by spherical harmonics, and projection into a picture.

A Gaussian has a mean m, a covariance R S S^T R^T from a unit quaternion (R) and scales (S), an
opacity, and a colour by direction (Kerbl et al. 2023, "3D Gaussian Splatting", section 4). In a
picture it is a Gaussian again, that of the projection linearised at m (Zwicker et al. 2001, "EWA
Splatting", Eq. 24 to 31). `n` is the number of Gaussians.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from .. import structs

Array = jax.Array

SH_COEFFICIENTS = 16  # Up to degree 3.
SH_0 = 0.5 / np.sqrt(np.pi)  # The constant harmonic.
LOW_PASS = 0.3  # Variance of the screen filter in pixels^2, as programs that draw splats have it.
MIN_ALPHA = 1 / 255  # A fainter contribution to a pixel is left out.
MAX_ALPHA = 0.99  # A Gaussian lets at least a hundredth of the light through.
NEAR = 0.01  # Gaussians whose means are nearer to the camera's plane are not drawn.
_MAX_LOG_SCALE = 20.0
_LARGEST = 1e4  # Deviations in pixels are limited to this, so that squares of areas are finite.
_FIELD_MARGIN = 1.3  # The projection is linearised at most this far outside the picture.


@flax.struct.dataclass
class Splats:
  """Parameters of n Gaussians, all unconstrained."""

  means: Array  # [n, 3] world.
  log_scales: Array  # [n, 3] logarithms of the standard deviations along the own axes.
  quaternions: Array  # [n, 4] w, x, y, z; of any length.
  opacity_logits: Array  # [n]
  sh: Array  # [n, 16, 3] coefficients of the colour minus 0.5.


@flax.struct.dataclass
class Pinhole:
  """A camera without distortion. Axes: x right, y down, z forward (OpenCV)."""

  focal: Array  # [2] pixels.
  centre: Array  # [2] principal point; the centre of the first pixel is (0.5, 0.5).
  rotation: Array  # [3, 3] world to camera.
  position: Array  # [3] world.
  size: tuple[int, int] = flax.struct.field(pytree_node=False)  # Width, height.


@flax.struct.dataclass
class Projected:
  """Gaussians in a picture."""

  xy: Array  # [n, 2] pixels.
  depth: Array  # [n] along the optical axis.
  conic: Array  # [n, 3] inverse covariance: xx, xy, yy.
  opacity: Array  # [n] at the centre; 0 if it is not drawn.
  rgb: Array  # [n, 3] at least 0.
  reach: Array  # [n, 2] half the sides of the box outside of which alpha < MIN_ALPHA, pixels.


def pinhole(cams: structs.Cameras, row: int) -> Pinhole:
  """Returns a perspective camera of the table, without its distortion."""
  matrix = np.linalg.inv(np.asarray(cams.pixtocam[row], np.float64))
  pose = np.asarray(cams.camtoworld[row], np.float64)
  return Pinhole(
    focal=np.float32(matrix[[0, 1], [0, 1]]),
    centre=np.float32(matrix[:2, 2]),
    rotation=np.float32((pose[:, :3] * [1, -1, -1]).T),  # OpenGL to OpenCV axes.
    position=np.float32(pose[:, 3]),
    size=tuple(np.asarray(cams.size)[row].tolist()),
  )


def rotations(quaternions: Array) -> Array:
  """Converts quaternions [n, 4] of any length to rotations [n, 3, 3]; zeros to the identity."""
  square = jnp.sum(quaternions**2, -1, keepdims=True)
  safe = square > 1e-24
  unit = jnp.where(safe, quaternions / jnp.sqrt(jnp.where(safe, square, 1)), 0)
  unit = jnp.where(safe, unit, jnp.array([1.0, 0, 0, 0])[None])
  w, x, y, z = jnp.moveaxis(unit, -1, 0)
  rows = [
    [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
    [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
    [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
  ]
  return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def axes(splats: Splats) -> Array:
  """Returns the matrices R S [n, 3, 3], whose columns are the axes scaled by the deviations."""
  scales = jnp.exp(jnp.clip(splats.log_scales, -_MAX_LOG_SCALE, _MAX_LOG_SCALE))
  return rotations(splats.quaternions) * scales[:, None, :]


def sh_basis(directions: Array) -> Array:
  """Evaluates the real spherical harmonics to degree 3 at unit vectors [n, 3]: [n, 16].

  Order and signs are those of splat files: by degree, then by order from -l to l, with the
  Condon-Shortley phase, so that degree 1 is proportional to (-y, z, -x).
  """
  x, y, z = jnp.moveaxis(directions, -1, 0)
  xx, yy, zz = x * x, y * y, z * z
  root = lambda a: float(np.sqrt(a / np.pi))  # noqa: E731
  values = [
    jnp.full_like(x, SH_0),
    -0.5 * root(3) * y,
    0.5 * root(3) * z,
    -0.5 * root(3) * x,
    0.5 * root(15) * x * y,
    -0.5 * root(15) * y * z,
    0.25 * root(5) * (2 * zz - xx - yy),
    -0.5 * root(15) * x * z,
    0.25 * root(15) * (xx - yy),
    -0.25 * root(17.5) * y * (3 * xx - yy),
    0.5 * root(105) * x * y * z,
    -0.25 * root(10.5) * y * (4 * zz - xx - yy),
    0.25 * root(7) * z * (2 * zz - 3 * xx - 3 * yy),
    -0.25 * root(10.5) * x * (4 * zz - xx - yy),
    0.25 * root(105) * z * (xx - yy),
    -0.25 * root(17.5) * x * (xx - 3 * yy),
  ]
  return jnp.stack(values, -1)


def sh_colors(sh: Array, directions: Array) -> Array:
  """Evaluates colours [n, 3] of coefficients [n, 16, 3] seen along unit vectors [n, 3]."""
  # A sum, since GPUs have one small product per Gaussian for a batched one.
  return jnp.maximum(0.5 + jnp.sum(sh_basis(directions)[..., None] * sh, 1), 0)


def rotate_sh(sh: np.ndarray, rotation: np.ndarray) -> np.ndarray:
  """Rotates coefficients [n, 16, 3]: the colour seen along `rotation @ d` becomes that along d.

  Each degree is closed under rotations, so its matrix follows from as many directions as wanted.
  """
  directions = np.random.default_rng(0).normal(size=(64, 3))
  directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
  before, after = (
    np.asarray(sh_basis(d.astype(np.float32)), np.float64)
    for d in (directions, directions @ np.asarray(rotation).T)
  )
  rotated = np.array(sh, np.float64)
  for degree in (1, 2, 3):
    band = slice(degree**2, (degree + 1) ** 2)
    matrix = np.linalg.lstsq(after[:, band], before[:, band], rcond=None)[0]
    rotated[:, band] = np.einsum('ij,njc->nic', matrix, rotated[:, band], optimize=True)
  return rotated


def project(splats: Splats, camera: Pinhole) -> Projected:
  """Projects Gaussians into a picture (Zwicker et al. 2001, Eq. 24 to 31).

  The covariance is J W R S S^T R^T W^T J^T + s I, with the Jacobian J of the perspective at the
  mean. The filter s I keeps a Gaussian from falling between pixels; the opacity is multiplied by
  sqrt(|cov| / |cov + s I|), which keeps its integral (the 2D Mip filter, Yu et al. 2024,
  "Mip-Splatting", Eq. 10).
  """
  local = _matmul(splats.means - camera.position[None], camera.rotation.T)  # [n, 3]
  # Guarded before the division: `where` differentiates both branches.
  ahead = local[:, 2] > NEAR
  z = jnp.where(ahead, local[:, 2], 1)
  plane = jnp.where(ahead[:, None], local[:, :2], 0) / z[:, None]  # [n, 2]
  xy = camera.focal[None] * plane + camera.centre[None]
  first, second = _image_axes(splats, camera, plane, z)  # Rows of J W R S, [n, 3] each.
  a, b, c = (jnp.sum(p * q, -1) for p, q in ((first, first), (first, second), (second, second)))
  # |cov| by Lagrange's identity: exact for needles, where a c - b^2 cancels.
  area = _norm(jnp.cross(first, second))
  full = area**2 + LOW_PASS * (a + c) + LOW_PASS**2  # |cov + s I|
  opacity = jax.nn.sigmoid(splats.opacity_logits) * area / jnp.sqrt(full)
  drawn = ahead & (opacity >= MIN_ALPHA)
  across = jnp.stack([a, c], -1) + LOW_PASS  # [n, 2]
  ratio = jnp.where(drawn, opacity / MIN_ALPHA, 1)
  reach = jnp.sqrt(jax.lax.stop_gradient(2 * jnp.log(ratio)[:, None] * across))
  conic = jnp.stack([c + LOW_PASS, -b, a + LOW_PASS], -1) / full[:, None]
  toward = splats.means - camera.position[None]
  length = _norm(toward)[:, None]
  view = toward / jnp.where(length > 0, length, 1)
  rgb = sh_colors(splats.sh, view)
  return Projected(xy, z, conic, jnp.where(drawn, opacity, 0), rgb, reach)


def _image_axes(splats: Splats, camera: Pinhole, plane: Array, z: Array) -> tuple[Array, Array]:
  """Returns the two rows of J W R S, [n, 3] each, in pixels.

  Far outside the picture the linearisation is taken at its margin: farther out it would stretch
  Gaussians over the whole picture.
  """
  size = jnp.array(camera.size, jnp.float32)
  low, high = -camera.centre / camera.focal, (size - camera.centre) / camera.focal
  middle, half = (low + high) / 2, _FIELD_MARGIN * (high - low) / 2
  plane = jnp.clip(plane, (middle - half)[None], (middle + half)[None])
  world = axes(splats)  # [n, 3, 3]
  rows = jnp.sum(camera.rotation[None, :, :, None] * world[:, None], 2)  # W R S
  scale = camera.focal[None] / z[:, None]  # [n, 2]
  first, second = (
    scale[:, k, None] * (rows[:, k] - plane[:, k, None] * rows[:, 2]) for k in (0, 1)
  )
  limit = jnp.maximum(jnp.maximum(_norm(first), _norm(second)), _LARGEST)[:, None] / _LARGEST
  return first / limit, second / limit


def _matmul(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision='highest')


def _norm(x: Array) -> Array:
  """Returns the norm of vectors [n, 3], with gradient 0 at 0."""
  square = jnp.sum(x**2, -1)
  safe = square > 1e-30
  return jnp.where(safe, jnp.sqrt(jnp.where(safe, square, 1)), 0)
