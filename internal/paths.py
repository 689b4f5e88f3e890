"""Pose normalisation and camera paths (numpy, float64).

A pose is [3, 4], camera-to-world with OpenGL axes: columns right, up, back, position. `n` poses are
[n, 3, 4]. A transform is [4, 4], from the world before to the world after.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import UserError

_PARALLEL = 1e-6  # Mean sin^2 of the axes' angles below which they have no common point.


def pad_poses(poses: np.ndarray) -> np.ndarray:
  """[..., 3, 4] to [..., 4, 4], with the last row (0, 0, 0, 1)."""
  bottom = np.broadcast_to([0.0, 0, 0, 1], (*poses.shape[:-2], 1, 4))
  return np.concatenate([poses, bottom], -2)


def viewmatrix(back: np.ndarray, up: np.ndarray, position: np.ndarray) -> np.ndarray:
  """The pose of a camera, from where its back and (roughly) its up point.

  Args:
    back: [3] opposite to the viewing direction, any length but 0.
    up: [3] need not be orthogonal to back; if it is parallel, another up is chosen.
    position: [3]

  Returns:
    [3, 4] pose.
  """
  back = _normalize(back)
  right = np.cross(up, back)
  if np.linalg.norm(right) <= 1e-9 * np.linalg.norm(up):
    right = np.cross(np.eye(3)[np.argmin(np.abs(back))], back)
  right = _normalize(right)
  return np.stack([right, np.cross(back, right), back, position], -1)


def transform_poses_pca(poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Normalises the world by the principal axes of the camera positions.

  The new origin is the cameras' mean position, x, y and z are the axes of largest, middle and least
  variance, the mean camera up has a positive z, and the farthest coordinate of a camera is 1. The
  signs of x and y are fixed, so the result does not depend on the eigensolver. Where all cameras
  stand on a line, z is the mean camera up, as far as it is orthogonal to the line.

  Args:
    poses: [n, 3, 4]

  Returns:
    The normalised poses [n, 3, 4], and the similarity [4, 4] that was applied to the world, its
    scale included (positions are scaled, the poses' rotations stay orthonormal).

  Raises:
    ValueError: all cameras stand at one point, so the world has no scale.
  """
  poses = checked(poses)
  positions = poses[:, :, 3]
  mean = positions.mean(0)
  centred = positions - mean
  if np.abs(centred).max() <= 1e-9 * np.abs(positions).max():
    raise UserError(
      f'All {len(poses)} cameras stand at {np.round(mean, 6).tolist()}: the scene has no scale. '
      'Use photographs from at least two places.'
    )
  rotation = _principal_axes(centred, poses[:, :, 1].mean(0))  # [3, 3], rows are the new axes
  scale = 1 / np.abs(centred @ rotation.T).max()
  transform = np.eye(4)
  transform[:3, :3] = scale * rotation
  transform[:3, 3] = -scale * rotation @ mean
  new_poses = np.concatenate(
    [rotation @ poses[:, :, :3], scale * (rotation @ centred[..., None])], -1
  )
  return new_poses, transform


def _principal_axes(centred: np.ndarray, up: np.ndarray) -> np.ndarray:
  """Right-handed rows: axes of falling variance, z along up rather than against it."""
  values, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
  x, y = (v * np.sign(v[np.argmax(np.abs(v))]) for v in (vectors[:, 2], vectors[:, 1]))
  if values[1] <= 1e-12 * values[2]:  # On a line, y and z would be noise.
    y, z, _ = viewmatrix(x, up, np.zeros(3))[:, :3].T
  else:
    z = np.cross(x, y)
  if z @ up < 0:
    y, z = -y, -z
  return np.stack([x, y, z])


def transform_poses(transform: np.ndarray, poses: np.ndarray) -> np.ndarray:
  """Poses [n, 3, 4] in the world after a similarity [4, 4]; their rotations stay orthonormal."""
  scale = np.cbrt(np.linalg.det(transform[:3, :3]))
  moved = transform[:3] @ pad_poses(poses)
  return np.concatenate([moved[..., :3] / scale, moved[..., 3:]], -1)


def transform_points(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
  """Points [m, 3] in the world after a similarity [4, 4]."""
  return points @ transform[:3, :3].T + transform[:3, 3]


def are_rigid(poses: np.ndarray) -> np.ndarray:
  """[n] whether poses [n, 3, 4] turn and shift; false if they scale, shear or mirror."""
  rotation = poses[:, :, :3]
  with np.errstate(all='ignore'):
    skew = np.abs(np.swapaxes(rotation, -1, -2) @ rotation - np.eye(3)).max((-1, -2))
    return (skew < 0.01) & (np.linalg.det(rotation) > 0)


def average_pose(poses: np.ndarray) -> np.ndarray:
  """The pose [3, 4] at the mean position, looking and standing as `poses` [n, 3, 4] on average."""
  poses = checked(poses)
  _, up, back, position = poses.mean(0).T
  if np.linalg.norm(back) < 1e-9:
    raise UserError('The cameras look in opposite directions: they have no average pose.')
  return viewmatrix(back, up, position)


def recenter_poses(poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Makes the average pose the world's axes, for forward-facing captures. Does not scale.

  Args:
    poses: [n, 3, 4]

  Returns:
    The poses [n, 3, 4] in the new world, and the rigid transform [4, 4] that was applied.

  Raises:
    ValueError: the viewing directions cancel, so there is no average.
  """
  transform = np.linalg.inv(pad_poses(average_pose(poses)))
  return transform[:3] @ pad_poses(checked(poses)), transform


def focus_point(poses: np.ndarray) -> np.ndarray:
  """The point [3] nearest to all optical axes, in the least-squares sense.

  Where all axes are parallel (one camera is such a case) no depth is nearest; then it is the point
  beside the others that lies as far ahead as the cameras are spread (1 if they are at one place).

  Args:
    poses: [n, 3, 4]
  """
  poses = checked(poses)
  axes, positions = poses[:, :, 2], poses[:, :, 3]
  mean = positions.mean(0)
  off_axis = np.eye(3) - axes[:, :, None] * axes[:, None, :]  # projections orthogonal to each axis
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
  """A closed elliptic path through a capture that goes around something.

  The plane of the ellipse is z = 0, the mean height of the cameras in a normalised world, and its
  centre lies at the cameras' focus point, seen from above. Half-axes are the 90th percentile of the
  cameras' distance from it in x and in y. Frames are equally far apart, look at the focus point,
  and stand upright along the world axis nearest to the cameras' mean up.

  Args:
    poses: [n, 3, 4] in a normalised world (`transform_poses_pca`).
    n_frames: number of frames; the one after the last would be the first again.
    z_variation: 0 keeps the height, 1 swings it once per turn between the 10th and the 90th
      percentile of the cameras' heights.
    z_phase: phase of that swing, in turns; at 0 the path starts at its highest.

  Returns:
    [n_frames, 3, 4] poses.

  Raises:
    ValueError: n_frames is not positive.
  """
  poses = checked(poses)
  check_frames(n_frames)
  focus, heights = focus_point(poses), poses[:, 2, 3]
  half_axes = np.percentile(np.abs(poses[:, :2, 3] - focus[:2]), 90, axis=0)
  low, high = np.percentile(heights, [10, 90])

  def position(turn):
    angle = 2 * np.pi * turn
    swing = 0.5 + 0.5 * np.cos(angle + 2 * np.pi * z_phase)
    return np.stack(
      [
        focus[0] + half_axes[0] * np.cos(angle),
        focus[1] + half_axes[1] * np.sin(angle),
        z_variation * (low + (high - low) * swing),
      ],
      -1,
    )

  positions = position(equal_steps(position, n_frames))
  up = _nearest_axis(poses[:, :, 1].mean(0))
  return np.stack([viewmatrix(p - focus, up, p) for p in positions])


def equal_steps(
  curve: Callable[[np.ndarray], np.ndarray], n: int, closed: bool = True
) -> np.ndarray:
  """Parameters [n] in [0, 1] at which points on a curve are equally far apart along it.

  Args:
    curve: takes parameters [m] to points [m, k].
    n: number of points.
    closed: the point after the last would be the first again; otherwise the last is at 1.
  """
  fine = np.linspace(0, 1, 100 * n + 1000)
  steps = np.linalg.norm(np.diff(curve(fine), axis=0), axis=-1)
  length = np.concatenate([[0], np.cumsum(steps)])
  parts = np.linspace(0, 1, n, endpoint=not closed)
  return np.interp(parts * length[-1], length, fine) if length[-1] > 0 else parts


def motion_steps(poses: np.ndarray, reach: float) -> np.ndarray:
  """How far each pose is from the next [n - 1]: translation and rotation in one length.

  It is sqrt(|dp|^2 + (reach da)^2), with dp the way and da the angle, small, that the camera turns
  by: how far what is seen at the distance `reach` moves through the picture, if both add up.

  Args:
    poses: [n, 3, 4]
    reach: the distance at which the scene is looked at, in the poses' units.
  """
  return np.linalg.norm(np.diff(_motion(poses[:, :, :3], poses[:, :, 3], reach), axis=0), axis=-1)


def _motion(rotation: np.ndarray, position: np.ndarray, reach: float) -> np.ndarray:
  """Points [n, 12] whose distances are those of `motion_steps`."""
  # A turn by a small da changes the nine numbers of a rotation by sqrt(2) da.
  return np.concatenate([position, reach / np.sqrt(2) * rotation.reshape(-1, 9)], -1)


def generate_spiral_path(
  poses: np.ndarray,
  bounds: tuple[float, float],
  n_frames: int = 120,
  n_rots: int = 2,
  z_rate: float = 0.5,
) -> np.ndarray:
  """A spiral around the average pose of a forward-facing capture (the videos of NeRF and LLFF).

  Args:
    poses: [n, 3, 4]
    bounds: (near, far), distances of the scene's content, in the units of the poses.
    n_frames: number of frames.
    n_rots: number of turns.
    z_rate: swings forward and back per turn.

  Returns:
    [n_frames, 3, 4] poses.

  Raises:
    ValueError: n_frames is not positive, or not 0 < near <= far.
  """
  poses = checked(poses)
  check_frames(n_frames)
  near, far = float(np.min(bounds)), float(np.max(bounds))
  if not near > 0:
    raise UserError(f'A spiral needs bounds with 0 < near <= far, got {near} and {far}.')
  # A harmonic mean: what matters is the parallax, which goes by the inverse distance.
  focus_distance = 1 / (0.25 / (0.9 * near) + 0.75 / (5 * far))
  centre = average_pose(poses)
  offsets = (poses[:, :, 3] - centre[:, 3]) @ centre[:, :3]  # [n, 3] in the average camera's axes
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
  """A smooth path along key cameras: a B-spline through (position, look-at, up) triples.

  Args:
    poses_keyframes: [k, 3, 4] in a normalised world, in the order of the path.
    n_interp: frames per gap between neighbouring keyframes.
    degree: of the spline, 1 to 5; lowered to k - 1 where there are few keyframes.
    smoothness: bound on the sum of squared distances from the triples; 0 meets them exactly.
    rot_weight: distance of the look-at and up points from the position: how much the orientation
      counts against the position.
    const_speed: frames are equally far apart by `motion_steps`, at the distance of the point that
      the keyframes look at; otherwise by the spline's parameter, slower where they are dense.
    closed: the path goes on from the last keyframe to the first, and is smooth there.

  Returns:
    [n_interp * (k - 1), 3, 4] poses, from the first keyframe to the last; closed [n_interp * k, 3,
    4], of which the one after the last would be the first again.

  Raises:
    ValueError: fewer than two keyframes, two equal ones in a row, n_interp not positive, or a
      degree outside 1 to 5.
  """
  poses = checked(poses_keyframes)
  check_frames(n_interp)
  if len(poses) < 2:
    raise UserError('A spline path needs at least two keyframes, got 1.')
  if not 1 <= degree <= 5:
    raise UserError(f'The degree of a spline path must be 1 to 5, got {degree}.')
  pose_at = _spline(poses, degree, smoothness, rot_weight, closed)
  count = n_interp * (len(poses) - (not closed))
  if const_speed:
    reach = np.median(np.linalg.norm(poses[:, :, 3] - focus_point(poses), axis=-1))
    where = equal_steps(lambda u: _motion(*pose_at(u), reach), count, closed)
  else:
    where = np.linspace(0, 1, count, endpoint=not closed)
  rotation, position = pose_at(where)
  return np.concatenate([rotation, position[..., None]], -1)


def _spline(poses: np.ndarray, degree: int, smoothness: float, rot_weight: float, closed: bool):
  """A function from parameters [m] in [0, 1] to rotations [m, 3, 3] and positions [m, 3]."""
  from scipy import interpolate  # A second to import, and needed nowhere else.

  count = len(poses)
  if closed:
    poses = np.concatenate([poses, poses[:1]])
  _, up, back, position = np.moveaxis(poses, -1, 0)
  triples = np.concatenate([position, position - rot_weight * back, position + rot_weight * up], -1)
  gaps = np.linalg.norm(np.diff(triples, axis=0), axis=-1)
  if np.any(gaps < 1e-9):
    first = np.argmin(gaps)
    raise UserError(
      f'Keyframes {first} and {(first + 1) % count} of the spline path are the same camera: drop '
      'one.'
    )
  spline, _ = interpolate.splprep(
    triples.T, k=min(degree, len(poses) - 1), s=smoothness, per=closed
  )

  def pose_at(u):
    position, look_at, up = np.split(np.stack(interpolate.splev(u, spline), -1), 3, -1)
    back = _normalize(position - look_at)
    right = _normalize(np.cross(up - position, back))
    return np.stack([right, np.cross(back, right), back], -1), position

  return pose_at


def _normalize(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _nearest_axis(direction: np.ndarray) -> np.ndarray:
  """The signed world axis [3] nearest to `direction` [3]."""
  i = np.argmax(np.abs(direction))
  return np.eye(3)[i] * (-1.0 if direction[i] < 0 else 1.0)


def checked(poses: np.ndarray) -> np.ndarray:
  """`poses` as float64.

  Raises:
    ValueError: they are not finite [n, 3, 4], n > 0.
  """
  poses = np.asarray(poses, np.float64)
  if poses.ndim != 3 or poses.shape[1:] != (3, 4) or not len(poses):
    raise UserError(f'Poses must be [n, 3, 4] with n > 0, got {list(poses.shape)}.')
  if not np.all(np.isfinite(poses)):
    raise UserError(f'Pose {np.argmin(np.isfinite(poses).all((1, 2)))} has a NaN or inf in it.')
  return poses


def check_frames(n: int) -> None:
  """Raises a ValueError if a path would have no frame."""
  if n < 1:
    raise UserError(f'A camera path needs at least one frame, got {n}.')
