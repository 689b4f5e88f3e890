"""Refines the training cameras while the field is trained (CamP, arXiv:2308.10902).

Each training camera has 11 changes: a rotation and a translation in camera axes, the logarithm of
the focal length, the principal point in focal lengths, and k1 and k2. The last two are not used if
no camera has distortion. Pixels respond to some changes a thousand times more than to others, and
to pairs of them alike. Training therefore moves preconditioned parameters z with changes = P z,
such that every unit of z moves the pictures about equally far. z starts at 0.

`n` is the number of training cameras, `k` = 11. Distances in pictures are in focal lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import alignment, cameras, configs, coord, math, structs
from ..datasets import scenes
from ..devices import sharding
from ..errors import UserError

Array = jax.Array

PART = 'cameras'  # Name in TrainState.params.
WIDTH = 11  # k: rotation 3, translation 3, log focal length 1, principal point 2, k1 and k2.
_POSE = 6  # The first of them are the pose, the others the intrinsics.
_POINTS = 1000  # Per camera, for the preconditioner.
_NEAREST, _FARTHEST = 0.1, 100.0  # Bounds of their distances, in the normalised world.
_DAMPING, _LEAST = 0.1, 1e-8  # Added to the diagonal: this share of it, and at least this.
_SIDEWAYS = 0.1  # Cosine of the angle to the optical axis.
_CHUNK = 16  # Cameras whose Jacobians are computed at a time.


def learning_rate(config: configs.Config) -> Callable[[Array], Array]:
  """Returns the schedule: 0 up to a fraction of the training, then log-linear decay."""

  def schedule(step):
    done = step / config.max_steps
    rate = math.log_lerp(done, config.camera_lr_init, config.camera_lr_final)
    return jnp.where(done < config.camera_start, 0.0, rate)

  return schedule


def changes(preconditioner: Array, z: Array) -> Array:
  """Returns the changes P z [n, k] of preconditioned parameters z [n, k]; P is [n, k, k]."""
  return jnp.sum(preconditioner * z[:, None], -1)


def apply(cams: structs.Cameras, change: Array) -> structs.Cameras:
  """Returns the table of n cameras with changes [n, k] applied; differentiable.

  The rotation is the Cayley transform of the first three, a rotation by about their norm in
  radians about their direction. Unlike the exponential it is smooth at 0 without a special case.
  """
  turn, shift, log_focal, centre, radial = jnp.split(jnp.asarray(change), (3, 6, 7, 9), -1)
  rotation, position = cams.camtoworld[..., :3], cams.camtoworld[..., 3:]
  camtoworld = jnp.concatenate(
    [_product(rotation, _cayley(turn)), position + _product(rotation, shift[..., None])], -1
  )
  row = jnp.asarray(cams.pixtocam)
  plane = (row[:, :2] - centre[..., None] * row[:, 2:]) * jnp.exp(-log_focal)[..., None]
  cams = cams.replace(pixtocam=jnp.concatenate([plane, row[:, 2:]], 1), camtoworld=camtoworld)
  if not cams.distorted:  # The pictures have been undistorted.
    return cams
  return cams.replace(distortion=cams.distortion + jnp.pad(radial, ((0, 0), (0, 4))))


def cast(
  config: configs.Config, cams: structs.Cameras, z: Array, cam_idx: Array, x: Array, y: Array
) -> tuple[structs.Rays, Array]:
  """Casts the rays of pixels with the refined cameras.

  The cones' radii follow the cameras, but pass on no gradient: a change of the focal length must
  not pay because it blurs.

  Args:
    config: the multiplier of the prior.
    cams: the n training cameras, with their preconditioner.
    z: [at least n, k] preconditioned parameters.
    cam_idx, x, y: [...] the cameras and their pixels.

  Returns:
    The rays [...], and the prior: the mean over cameras of the squared changes of intrinsics.
  """
  preconditioner = cams.supervision.preconditioner
  change = changes(preconditioner, z[: len(preconditioner)])
  rays = cameras.pixels_to_rays(apply(cams, change), cam_idx, x, y)
  prior = config.camera_prior * jnp.mean(jnp.sum(change[:, _POSE:] ** 2, -1))
  return rays.replace(radii=jax.lax.stop_gradient(rays.radii)), prior


def _product(a: Array, b: Array) -> Array:
  """Multiplies matrices [n, 3, 3] and [n, 3, m] in full float32."""
  return jnp.sum(a[..., :, :, None] * b[..., None, :, :], -2)


def _cayley(turn: Array) -> Array:
  """Returns the rotations [n, 3, 3] of vectors [n, 3]: (I - K)^-1 (I + K), K = [turn / 2]_x."""
  x, y, z = jnp.moveaxis(turn / 2, -1, 0)
  zero = jnp.zeros_like(x)
  rows = [[zero, -z, y], [z, zero, -x], [-y, x, zero]]
  cross = jnp.stack([jnp.stack(row, -1) for row in rows], -2)  # [n, 3, 3]
  factor = 2 / (1 + jnp.sum((turn / 2) ** 2, -1))[..., None, None]
  return jnp.eye(3)[None] + factor * (cross + _product(cross, cross))


def project(cams: structs.Cameras, points: Array, change: Array) -> Array:
  """Projects points with changed cameras to where they land on the planes of the unchanged ones.

  Args:
    cams: n cameras with perspective or fisheye lenses.
    points: [n, m, 3] in the world.
    change: [n, k].

  Returns:
    [n, m, 2] in focal lengths: pixels x of the picture are at (x - cx) / fx.
  """
  changed = apply(cams, change)
  position, rotation = changed.camtoworld[:, None, :, 3], changed.camtoworld[..., :3]
  x, y, z = jnp.moveaxis(jnp.sum((points - position)[..., None] * rotation[:, None], -2), -1, 0)
  x, y = x / -z, y / z  # From OpenGL to OpenCV axes.
  plane = cameras.distort(x, y, changed.distortion[:, None], False)
  if structs.FISHEYE in cams.lenses:
    fisheye = cameras.distort(x, y, changed.distortion[:, None], True)
    is_fisheye = (cams.lens == structs.FISHEYE)[:, None]
    plane = [jnp.where(is_fisheye, f, p) for f, p in zip(fisheye, plane)]
  focal, centre = jnp.exp(change[:, None, 6:7]), change[:, None, 7:9]
  return focal * jnp.stack(plane, -1) + centre


def preconditioners(cams: structs.Cameras, settings: configs.Settings) -> np.ndarray:
  """Computes each camera's P = (Sigma + diag(max(0.1 diag Sigma, 1e-8)))^(-1/2), [n, k, k].

  Sigma is the mean of J^T J over points in the camera's frustum (arXiv:2308.10902, section 4). J is
  the derivative of a point's projection with respect to the changes. The points are uniform in the
  picture and in normalised ray distance.
  """
  n = len(cams.size)
  # All chunks are equally large, so that one program computes them.
  rows = np.arange(-(-n // _CHUNK) * _CHUNK).clip(max=n - 1).reshape(-1, _CHUNK)
  sigma = np.concatenate([_sigma(cams.take(chunk), settings) for chunk in rows])[:n]  # [n, k, k]
  diagonal = np.einsum('nii->ni', sigma)
  diagonal += np.maximum(_DAMPING * diagonal, _LEAST)  # In place: also in sigma.
  values, vectors = np.linalg.eigh(sigma)
  return np.float32((vectors / np.sqrt(values)[:, None]) @ vectors.swapaxes(-1, -2))


def add_tables(settings: configs.Settings, cams: structs.Cameras) -> structs.Cameras:
  """Returns the training cameras with their preconditioners, if the settings ask for refinement."""
  if not settings.config.refine_cameras:
    return cams
  supervision = cams.supervision or structs.Supervision()
  table = preconditioners(cams, settings)
  return cams.replace(supervision=supervision.replace(preconditioner=table))


def _sigma(cams: structs.Cameras, settings: configs.Settings) -> np.ndarray:
  """Returns the mean of J^T J [n, k, k], float64."""
  config, unit = settings.config, np.random.default_rng(0).random((3, _POINTS))
  near = max(config.near, _NEAREST)
  far = max(min(config.far, _FARTHEST), 2 * near)
  _, s_to_t = coord.ray_warps(settings.model.raydist_fn, near, far)
  x, y = (np.int32(cams.size[:, axis, None] * unit[axis]) for axis in (0, 1))  # [n, m]
  jacobian = np.asarray(_jacobian(cams, x, y, s_to_t(jnp.float32(unit[2]))), np.float64)
  return np.einsum('nmai,nmaj->nij', jacobian, jacobian) / _POINTS


@jax.jit
def _jacobian(cams: structs.Cameras, x: Array, y: Array, t: Array) -> Array:
  """Returns J [n, m, 2, k] of points at distances t [m] on the rays of pixels x, y [n, m]."""
  n = len(x)
  rows = jnp.broadcast_to(jnp.arange(n)[:, None], x.shape)
  rays = cameras.pixels_to_rays(cams, rows, x, y)
  points = rays.origins + t[None, :, None] * rays.directions  # [n, m, 3]
  one = lambda change: project(cams, points, jnp.broadcast_to(change, (n, WIDTH)))  # noqa: E731
  # A fisheye also sees sideways and behind, where this projection has no finite derivative.
  back = jnp.sum(rays.viewdirs * cams.camtoworld[:, None, :, 2], -1)[..., None, None]
  return jnp.where(back < -_SIDEWAYS, jax.jacfwd(one)(jnp.zeros(WIDTH)), 0)


def check(scene: scenes.Scene) -> None:
  """Raises UserError if the cameras of a scene cannot be refined."""
  cams = scene.cameras
  if cams.pixtocam_ndc is not None:
    what = 'Cameras of forward-facing captures, whose rays are in NDC,'
  elif structs.PANORAMA in cams.lenses:
    what = 'Cameras that take panoramas'
  else:
    return
  raise UserError(
    f'{what} cannot be refined. Set Config.refine_cameras and Config.eval_refine_cameras to False.'
  )


def refined_scene(
  settings: configs.Settings, scene: scenes.Scene, params: dict[str, Any]
) -> scenes.Scene:
  """Returns the scene with the refined training cameras, in the world of the trained field.

  Nothing ties the world in which the field was trained to the capture's, so the training cameras
  may have drifted together. Their similarity to the given ones goes into `world_transform`: what
  is converted to the capture's world is where it was before. Other cameras follow them
  (`alignment.follow`), and get the mean change of the intrinsics that they share.

  Args:
    settings: the run's settings.
    scene: the scene with its given cameras.
    params: the parameters; without refined cameras, `scene` is returned.
  """
  if PART not in params:
    return scene
  train = np.array(scene.train)
  others = np.setdiff1d(np.arange(len(scene.names)), train)
  given = scene.cameras.take(train)
  z = sharding.to_host(params[PART]['rows'])[: len(train)]
  change = np.asarray(changes(preconditioners(given, settings), z))  # [n, k]
  refined = apply(given, change)
  poses, found = (np.asarray(c.camtoworld, np.float64) for c in (given, refined))
  table = jax.tree.map(np.array, scene.cameras)
  _place(table, train, refined)
  if len(others):
    cams = scene.cameras.take(others)
    _place(table, others, apply(cams, _shared_intrinsics(given, change, cams)))
  transform = np.eye(4)
  if len(train) >= 3:
    scale, rotation, shift = alignment.align(poses, found)
    transform[:3] = np.concatenate([scale * rotation, shift[:, None]], 1)
    followed, _ = alignment.follow(poses, found, table.camtoworld[others].astype(np.float64))
    table.camtoworld[others] = followed
  return dataclasses.replace(
    scene, cameras=table, world_transform=transform @ scene.world_transform
  )


def _place(table: structs.Cameras, rows: np.ndarray, cams: structs.Cameras) -> None:
  """Overwrites rows of a table with cameras."""
  for name in ('pixtocam', 'camtoworld', 'distortion'):
    getattr(table, name)[rows] = np.asarray(getattr(cams, name))


def _shared_intrinsics(
  given: structs.Cameras, change: np.ndarray, cams: structs.Cameras
) -> np.ndarray:
  """Returns changes [m, k] of intrinsics: the mean of the given cameras with the same ones."""
  result = np.zeros((len(cams.size), WIDTH), np.float32)
  key = lambda c: np.concatenate([c.pixtocam.reshape(-1, 9), c.distortion, c.lens[:, None]], 1)  # noqa: E731
  for row, own in enumerate(key(cams)):
    same = (key(given) == own).all(1)
    if same.any():
      result[row, _POSE:] = change[same, _POSE:].mean(0)
  return result
