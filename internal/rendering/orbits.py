"""Camera paths about the point that a capture's cameras look at: orbit, helix, dolly (numpy).

A pose is [3, 4], camera-to-world with OpenGL axes, as in `paths`. Elevations are angles over the
plane through that point which is level, going by the cameras' mean up.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .. import paths
from ..errors import UserError


def mean_up(poses: np.ndarray) -> np.ndarray:
  """The cameras' mean up [3], of length 1; z where they cancel."""
  up = poses[:, :, 1].mean(0)
  length = np.linalg.norm(up)
  return up / length if length > 1e-6 else np.array([0.0, 0, 1])


def level(poses: np.ndarray, up: np.ndarray) -> np.ndarray:
  """Poses [n, 3, 4] at the same places, turned so that their up is `up`: a panorama's horizon.

  They look where they did, as seen from above; one that looks straight down or up looks to where
  the upper edge of its picture was, or the lower one.
  """
  result = []
  for _, own_up, back, position in np.moveaxis(poses, -1, 1):
    flat = back - (back @ up) * up
    if np.linalg.norm(flat) < 1e-6:
      flat = -np.sign(back @ up) * own_up
    result.append(paths.viewmatrix(flat, up, position))
  return np.stack(result)


@dataclasses.dataclass(frozen=True)
class _Globe:
  """Spherical coordinates about the point that cameras look at."""

  focus: np.ndarray  # [3]
  axes: np.ndarray  # [3, 3], rows: azimuth 0, azimuth 90 degrees, up.
  elevations: np.ndarray  # [n] of the cameras, radians.
  radius: float  # Their median distance.

  def at(self, azimuth, elevation, radius) -> np.ndarray:
    """Points [..., 3]."""
    flat = np.cos(elevation)
    around = np.stack(
      [flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation) + 0 * azimuth], -1
    )
    return self.focus + (radius * around) @ self.axes

  def look(self, positions: np.ndarray) -> np.ndarray:
    """Poses [n, 3, 4] at `positions` that look at the focus and stand upright."""
    return np.stack([paths.viewmatrix(p - self.focus, self.axes[2], p) for p in positions])


def _globe(poses: np.ndarray) -> _Globe:
  """Raises a ValueError where the cameras are all at the point that they look at."""
  focus, up = paths.focus_point(poses), mean_up(poses)
  offsets = poses[:, :, 3] - focus
  distances = np.linalg.norm(offsets, axis=-1)
  radius = float(np.median(distances))
  if not radius > 1e-9:
    raise UserError(
      'The cameras stand where they look at: nothing is there to go around. Use a spline through '
      'photos, Config.render_spline_keyframes.'
    )
  heights = offsets @ up
  elevations = np.arcsin(np.clip(heights / np.maximum(distances, 1e-9), -1, 1))
  right, _, ahead, _ = paths.viewmatrix(offsets[0], up, focus).T
  ahead = np.cross(right, up)  # Level, towards the first camera.
  return _Globe(focus, np.stack([ahead, np.cross(up, ahead), up]), elevations, radius)


def generate_orbit_path(
  poses: np.ndarray, n_frames: int, elevation: float | None = None, radius: float = 1.0
) -> np.ndarray:
  """A level circle around what the cameras look at, from the first camera's side on.

  Args:
    poses: [n, 3, 4]
    n_frames: number of frames, equally far apart; the one after the last would be the first again.
    elevation: degrees over the level plane, -89 to 89; None for the cameras' median.
    radius: in the cameras' median distance from the point that they look at.

  Returns:
    [n_frames, 3, 4] poses that look at that point.

  Raises:
    ValueError: a number out of range, or cameras that stand where they look at.
  """
  globe = _globe(paths.checked(poses))
  paths.check_frames(n_frames)
  if elevation is not None and not abs(elevation) <= 89:
    raise UserError(f"An orbit's elevation must be in -89 to 89 degrees, got {elevation}.")
  if not radius > 0:
    raise UserError(f"An orbit's radius must be positive, got {radius}.")
  angle = float(np.median(globe.elevations)) if elevation is None else np.radians(elevation)
  azimuth = np.linspace(0, 2 * np.pi, n_frames, endpoint=False)
  return globe.look(globe.at(azimuth, angle, radius * globe.radius))


def generate_helix_path(poses: np.ndarray, n_frames: int, n_rots: int = 2) -> np.ndarray:
  """A spiral around what the cameras look at, rising at a constant speed.

  Args:
    poses: [n, 3, 4]
    n_frames: number of frames.
    n_rots: number of turns, from the 10th to the 90th percentile of the cameras' elevations.

  Returns:
    [n_frames, 3, 4] poses that look at that point, from their median distance.

  Raises:
    ValueError: n_frames is not positive, or the cameras stand where they look at.
  """
  globe = _globe(paths.checked(poses))
  paths.check_frames(n_frames)
  low, high = np.percentile(globe.elevations, [10, 90])
  position = lambda u: globe.at(2 * np.pi * n_rots * u, low + (high - low) * u, globe.radius)  # noqa: E731
  return globe.look(position(paths.equal_steps(position, n_frames, closed=False)))


def generate_dolly_path(
  poses: np.ndarray, start: np.ndarray, n_frames: int, distance: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
  """A straight way from a camera towards what all look at, seen in one unchanging direction.

  Args:
    poses: [n, 3, 4]
    start: [3, 4] the pose that it starts from and that gives the direction of view and of the way.
    n_frames: number of frames, equally far apart.
    distance: of the way, in the depth of the point that the cameras look at; negative: backwards.

  Returns:
    [n_frames, 3, 4] poses, and [n_frames] the depths of that point over its depth at the start:
    focal lengths in these proportions keep it at one size (a dolly zoom).

  Raises:
    ValueError: the way ends at that point or beyond, or it lies behind the camera.
  """
  paths.check_frames(n_frames)
  back, position = start[:, 2], start[:, 3]
  depth = (position - paths.focus_point(paths.checked(poses))) @ back
  if not depth > 1e-9:
    raise UserError('A dolly must start from a photo that has before it what the others look at.')
  if not distance < 0.99:
    raise UserError(
      f'The distance of a dolly must be below 0.99, as 1 is all the way, got {distance}.'
    )
  way = np.linspace(0, distance, n_frames)
  result = np.repeat(start[None], n_frames, 0)
  result[:, :, 3] -= (way * depth)[:, None] * back
  return result, 1 - way
