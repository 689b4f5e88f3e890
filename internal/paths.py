"""Pose normalisation and camera paths (numpy, float64).

A pose is a camera-to-world matrix [3, 4] in OpenGL axes, with columns right, up, back and position.
A transform is a similarity [4, 4] from the old world to the new one. `n` is the number of poses.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import structs
from .errors import UserError

_PARALLEL = 1e-6  # Optical axes count as parallel if the mean sin^2 of their angles is below this.


def _inverse(pose: np.ndarray) -> np.ndarray:
  rotation = np.swapaxes(pose[..., :3], -1, -2)
  return np.concatenate([rotation, -rotation @ pose[..., 3:]], -1)


# How poses [..., 3, 4] are turned right that were written in another convention.
OTHER_CONVENTIONS = {
  'their axes are taken as x right, y down, z forward (OpenCV)': (
    lambda pose: pose * [1, -1, -1, 1]
  ),
  'they are taken as world to camera (OpenCV) instead of camera to world': (
    lambda pose: _inverse(pose) * [1, -1, -1, 1]
  ),
  'they are taken as world to camera (OpenGL) instead of camera to world': _inverse,
}


def pad_poses(poses: np.ndarray) -> np.ndarray:
  """Appends the row (0, 0, 0, 1) to poses: [..., 3, 4] -> [..., 4, 4]."""
  bottom = np.broadcast_to([0.0, 0, 0, 1], (*poses.shape[:-2], 1, 4))
  return np.concatenate([poses, bottom], -2)


def viewmatrix(back: np.ndarray, up: np.ndarray, position: np.ndarray) -> np.ndarray:
  """Builds a camera pose from its backward direction, approximate up and position.

  Args:
    back: [3] direction opposite to the viewing direction, any norm above 0.
    up: [3] approximate up direction. If it is parallel to back, another up is chosen.
    position: [3] camera centre.

  Returns:
    [3, 4] pose with orthonormal axes.
  """
  back = _normalize(back)
  right = np.cross(up, back)
  if np.linalg.norm(right) <= 1e-9 * np.linalg.norm(up):
    right = np.cross(np.eye(3)[np.argmin(np.abs(back))], back)
  right = _normalize(right)
  return np.stack([right, np.cross(back, right), back, position], -1)


def transform_poses_pca(poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Normalises poses by the principal axes of the camera positions.

  In the new world the mean position is the origin, and x, y and z are the axes of largest, middle
  and least variance. The mean camera up has z >= 0, and the largest absolute coordinate of a
  position is 1. Signs are fixed, so that the result does not depend on the eigensolver. If all
  cameras lie on a line, z is the part of the mean camera up orthogonal to it.

  Args:
    poses: [n, 3, 4] camera-to-world.

  Returns:
    (poses [n, 3, 4], transform [4, 4]): the normalised poses, with orthonormal rotations, and the
    similarity from the old world to the new one, including its scale.

  Raises:
    UserError: the poses are malformed, or all positions are equal.
  """
  poses = checked(poses)
  positions = poses[:, :, 3]
  mean = positions.mean(0)
  centred = positions - mean
  if np.abs(centred).max() <= 1e-9 * np.abs(positions).max():
    who = f'All {len(poses)} cameras stand' if len(poses) > 1 else 'The only camera stands'
    raise UserError(
      f'{who} at {np.round(mean, 6).tolist()}, so the scene has no scale; '
      'use photographs from at least two positions.'
    )
  rotation = _principal_axes(centred, poses[:, :, 1].mean(0))  # [3, 3], rows are the new axes.
  scale = 1 / np.abs(centred @ rotation.T).max()
  transform = np.eye(4)
  transform[:3, :3] = scale * rotation
  transform[:3, 3] = -scale * rotation @ mean
  new_positions = scale * (rotation @ centred[..., None])  # [n, 3, 1]
  return np.concatenate([rotation @ poses[:, :, :3], new_positions], -1), transform


def _principal_axes(centred: np.ndarray, up: np.ndarray) -> np.ndarray:
  """Returns right-handed axes as rows, by decreasing variance, with z in the direction of up."""
  values, vectors = np.linalg.eigh(centred.T @ centred)  # Ascending.
  x, y = (v * np.sign(v[np.argmax(np.abs(v))]) for v in (vectors[:, 2], vectors[:, 1]))
  if values[1] <= 1e-12 * values[2]:  # On a line the eigenvectors y and z are arbitrary.
    y, z, _ = viewmatrix(x, up, np.zeros(3))[:, :3].T
  else:
    z = np.cross(x, y)
  if z @ up < 0:
    y, z = -y, -z
  return np.stack([x, y, z])


def transform_poses(transform: np.ndarray, poses: np.ndarray) -> np.ndarray:
  """Applies a similarity [4, 4] to poses [n, 3, 4]; their rotations stay orthonormal."""
  scale = np.cbrt(np.linalg.det(transform[:3, :3]))
  moved = transform[:3] @ pad_poses(poses)
  return np.concatenate([moved[..., :3] / scale, moved[..., 3:]], -1)


def transform_points(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
  """Applies a transform [4, 4] to points [m, 3]."""
  return points @ transform[:3, :3].T + transform[:3, 3]


are_rigid = structs.are_rigid  # Defined there because cameras need it too.


def average_pose(poses: np.ndarray) -> np.ndarray:
  """Averages poses [n, 3, 4]: the mean position, viewing direction and up, as a pose [3, 4].

  Raises:
    UserError: the poses are malformed, or their viewing directions cancel.
  """
  poses = checked(poses)
  _, up, back, position = poses.mean(0).T
  if np.linalg.norm(back) < 1e-9:
    raise UserError(
      'The cameras look in opposite directions and have no average pose; remove some of them.'
    )
  return viewmatrix(back, up, position)


def recenter_poses(poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Makes the average pose the origin and axes of the world, without scaling.

  For forward-facing captures.

  Args:
    poses: [n, 3, 4] camera-to-world.

  Returns:
    (poses [n, 3, 4], transform [4, 4]): the poses in the new world, and the rigid transform to it.

  Raises:
    UserError: the poses are malformed, or their viewing directions cancel.
  """
  transform = np.linalg.inv(pad_poses(average_pose(poses)))
  return transform[:3] @ pad_poses(checked(poses)), transform


def focus_point(poses: np.ndarray) -> np.ndarray:
  """Finds the point nearest to all optical axes, by least squares.

  If the axes are parallel, or there is one camera, the depth is undetermined. The point then lies
  ahead of the mean position by the largest distance of a camera from it (1 if that is 0).

  Args:
    poses: [n, 3, 4] camera-to-world.

  Returns:
    [3] point in world space.

  Raises:
    UserError: the poses are malformed.
  """
  poses = checked(poses)
  axes, positions = poses[:, :, 2], poses[:, :, 3]
  mean = positions.mean(0)
  # Projections orthogonal to each axis, [n, 3, 3].
  off_axis = np.eye(3) - axes[:, :, None] * axes[:, None, :]
  normal = off_axis.mean(0)
  target = (off_axis @ (positions - mean)[..., None]).mean(0)[:, 0]
  values, vectors = np.linalg.eigh(normal)
  if values[0] > _PARALLEL:
    return mean + np.linalg.solve(normal, target)
  known = vectors[:, 1:]
  reach = np.linalg.norm(positions - mean, axis=-1).max() or 1.0
  return mean + known @ (known.T @ target / values[1:]) - reach * axes.mean(0)


def generate_ellipse_path(
  poses: np.ndarray, n_frames: int, z_variation: float = 0.0, z_phase: float = 0.0
) -> np.ndarray:
  """Generates a closed elliptical path for captures around an object.

  The ellipse lies in the plane z = 0, centred on the focus point of the cameras. Its semi-axes are
  the 90th percentiles of the cameras' distances from it in x and y. Frames are equidistant and look
  at the focus point; their up is the world axis nearest to the mean camera up.

  Args:
    poses: [n, 3, 4] camera-to-world, normalised by `transform_poses_pca`.
    n_frames: number of frames. The path is a loop: the first frame is not repeated.
    z_variation: height variation; 0 for none, 1 for one oscillation per turn between the 10th and
      90th percentile of the cameras' heights.
    z_phase: phase of the oscillation in turns; at 0 the path starts at its highest point.

  Returns:
    [n_frames, 3, 4] poses.

  Raises:
    UserError: n_frames is below 1, or the poses are malformed.
  """
  poses = checked(poses)
  check_frames(n_frames)
  focus, heights = focus_point(poses), poses[:, 2, 3]
  half_axes = np.percentile(np.abs(poses[:, :2, 3] - focus[:2]), 90, axis=0)
  low, high = np.percentile(heights, [10, 90])

  def position(turn):
    angle = 2 * np.pi * turn
    swing = 0.5 + 0.5 * np.cos(angle + 2 * np.pi * z_phase)
    height = z_variation * (low + (high - low) * swing)
    circle = np.stack([np.cos(angle), np.sin(angle)], -1)  # [..., 2]
    return np.concatenate([focus[:2] + half_axes * circle, height[..., None]], -1)

  positions = position(equal_steps(position, n_frames))
  mean_up = poses[:, :, 1].mean(0)
  axis = np.argmax(np.abs(mean_up))
  up = np.eye(3)[axis] * (-1.0 if mean_up[axis] < 0 else 1.0)
  return np.stack([viewmatrix(p - focus, up, p) for p in positions])


def equal_steps(
  curve: Callable[[np.ndarray], np.ndarray], n: int, closed: bool = True
) -> np.ndarray:
  """Returns curve parameters at equal arc-length steps.

  Args:
    curve: maps parameters [m] in [0, 1] to points [m, k].
    n: number of steps.
    closed: whether the curve is a loop, so that its end (parameter 1) is left out.

  Returns:
    [n] ascending parameters in [0, 1].
  """
  fine = np.linspace(0, 1, 100 * n + 1000)
  steps = np.linalg.norm(np.diff(curve(fine), axis=0), axis=-1)
  length = np.concatenate([[0], np.cumsum(steps)])
  parts = np.linspace(0, 1, n, endpoint=not closed)
  return np.interp(parts * length[-1], length, fine) if length[-1] > 0 else parts


def motion_steps(poses: np.ndarray, reach: float) -> np.ndarray:
  """Computes the motion between consecutive poses: translation and rotation as one length.

  sqrt(|dp|^2 + (reach da)^2), with the translation dp and the (small) rotation angle da in radians.
  It bounds how far points at distance `reach` move relative to the camera.

  Args:
    poses: [n, 3, 4] camera-to-world.
    reach: typical distance of the scene from the cameras, in world units.

  Returns:
    [n - 1] lengths in world units.
  """
  return np.linalg.norm(np.diff(_motion(poses[:, :, :3], poses[:, :, 3], reach), axis=0), axis=-1)


def _motion(rotation: np.ndarray, position: np.ndarray, reach: float) -> np.ndarray:
  """Embeds poses as points [n, 12] whose distances are those of `motion_steps`."""
  # A small rotation by da changes the rotation matrix by sqrt(2) da in the Frobenius norm.
  return np.concatenate([position, reach / np.sqrt(2) * rotation.reshape(-1, 9)], -1)


def generate_spiral_path(
  poses: np.ndarray,
  bounds: tuple[float, float],
  n_frames: int = 120,
  n_rots: int = 2,
  z_rate: float = 0.5,
) -> np.ndarray:
  """Generates a spiral path for forward-facing captures, as in the videos of LLFF and NeRF.

  The camera circles the average pose, with the 90th percentile of the cameras' offsets as radii,
  and looks at a fixed point ahead.

  Args:
    poses: [n, 3, 4] camera-to-world.
    bounds: (near, far) distances of the scene content in world units.
    n_frames: number of frames.
    n_rots: number of turns.
    z_rate: oscillations forward and back per turn.

  Returns:
    [n_frames, 3, 4] poses.

  Raises:
    UserError: n_frames is below 1, near is not positive, or the poses are malformed.
  """
  poses = checked(poses)
  check_frames(n_frames)
  near, far = float(np.min(bounds)), float(np.max(bounds))
  if not near > 0:
    raise UserError(f'A spiral path requires bounds with 0 < near <= far, got {near} and {far}.')
  # A harmonic mean, because parallax is proportional to inverse distance.
  focus_distance = 1 / (0.25 / (0.9 * near) + 0.75 / (5 * far))
  centre = average_pose(poses)
  offsets = (poses[:, :, 3] - centre[:, 3]) @ centre[:, :3]  # [n, 3], axes of the average camera.
  radii = np.percentile(np.abs(offsets), 90, axis=0)
  angle = np.linspace(0, 2 * np.pi * n_rots, n_frames, endpoint=False)
  spiral = np.stack([np.cos(angle), -np.sin(angle), -np.sin(z_rate * angle)], -1)
  positions = centre[:, 3] + (radii * spiral) @ centre[:, :3].T
  focus = centre[:, 3] - focus_distance * centre[:, 2]
  return np.stack([viewmatrix(p - focus, centre[:, 1], p) for p in positions])


def generate_spline_path(
  poses_keyframes: np.ndarray,
  n_interp: int,
  degree: int = 5,
  smoothness: float = 0.03,
  rot_weight: float = 0.1,
  const_speed: bool = False,
  closed: bool = False,
) -> np.ndarray:
  """Generates a smooth path along keyframes: a B-spline through (position, look-at, up) triples.

  Args:
    poses_keyframes: [k, 3, 4] keyframes in the order of the path, in a normalised world.
    n_interp: frames per segment between consecutive keyframes.
    degree: degree of the spline, 1 to 5; at most k - 1 is used.
    smoothness: upper bound on the sum of squared distances from the triples; 0 interpolates.
    rot_weight: distance of the look-at and up points from the position, in world units. Larger
      values weigh orientation more against position.
    const_speed: whether frames are spaced equally by `motion_steps`, with the median distance to
      the focus point as reach, rather than by the spline parameter.
    closed: whether the path returns smoothly from the last keyframe to the first.

  Returns:
    [n_interp * (k - 1), 3, 4] poses from the first keyframe to the last. If closed,
    [n_interp * k, 3, 4] poses of a loop, without repeating the first.

  Raises:
    UserError: there are fewer than two keyframes, consecutive ones are equal, n_interp is below 1,
      degree is not 1 to 5, or the poses are malformed.
  """
  poses = checked(poses_keyframes)
  check_frames(n_interp)
  if len(poses) < 2:
    raise UserError('A spline path requires at least two keyframes, got 1.')
  if not 1 <= degree <= 5:
    raise UserError(f'The degree of a spline path must be from 1 to 5, got {degree}.')
  pose_at = _spline(poses, degree, smoothness, rot_weight, closed)
  count = n_interp * (len(poses) - (not closed))
  if const_speed:
    reach = np.median(np.linalg.norm(poses[:, :, 3] - focus_point(poses), axis=-1))
    steps = equal_steps(lambda u: _motion(*pose_at(u), reach), count, closed)
  else:
    steps = np.linspace(0, 1, count, endpoint=not closed)
  rotation, position = pose_at(steps)
  return np.concatenate([rotation, position[..., None]], -1)


def _spline(poses: np.ndarray, degree: int, smoothness: float, rot_weight: float, closed: bool):
  """Returns a function from parameters [m] to rotations [m, 3, 3] and positions [m, 3]."""
  from scipy import interpolate  # Imported here because the import takes a second.

  count = len(poses)
  if closed:
    poses = np.concatenate([poses, poses[:1]])
  _, up, back, position = np.moveaxis(poses, -1, 0)
  # The look-at and up points encode the rotation, [k, 9].
  triples = np.concatenate([position, position - rot_weight * back, position + rot_weight * up], -1)
  gaps = np.linalg.norm(np.diff(triples, axis=0), axis=-1)
  if np.any(gaps < 1e-9):
    first = np.argmin(gaps)
    raise UserError(
      f'Keyframes {first} and {(first + 1) % count} of the spline path are the same; remove one.'
    )
  degree = min(degree, len(poses) - 1)
  spline, _ = interpolate.splprep(triples.T, k=degree, s=smoothness, per=closed)

  def pose_at(u):
    position, look_at, up = np.split(np.stack(interpolate.splev(u, spline), -1), 3, -1)
    back = _normalize(position - look_at)
    right = _normalize(np.cross(up - position, back))
    return np.stack([right, np.cross(back, right), back], -1), position

  return pose_at


def _normalize(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def checked(poses: np.ndarray) -> np.ndarray:
  """Returns poses as float64.

  Raises:
    UserError: the shape is not [n, 3, 4] with n > 0, or a value is not finite.
  """
  poses = np.asarray(poses, np.float64)
  if poses.ndim != 3 or poses.shape[1:] != (3, 4) or not len(poses):
    raise UserError(f'Poses must be [n, 3, 4] with n > 0, got {list(poses.shape)}.')
  if not np.all(np.isfinite(poses)):
    first = np.argmin(np.isfinite(poses).all((1, 2)))
    raise UserError(f'Pose {first} contains NaN or inf; correct or remove it.')
  return poses


def check_frames(n: int) -> None:
  """Raises a UserError if the number of frames of a path is below 1."""
  if n < 1:
    raise UserError(f'A camera path requires at least one frame, got {n}.')
