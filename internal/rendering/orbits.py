"""Camera paths around the focus point of a capture: orbit, helix, dolly (numpy).

The focus is the point that the cameras look at (`paths.focus_point`). A pose is [3, 4],
camera-to-world with OpenGL axes. Elevations are angles above the horizontal plane through the
focus, which is perpendicular to the cameras' mean up.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .. import paths
from ..errors import UserError


def mean_up(poses: np.ndarray) -> np.ndarray:
  """Returns the cameras' mean up [3] of length 1; z if they cancel out."""
  up = poses[:, :, 1].mean(0)
  length = np.linalg.norm(up)
  return up / length if length > 1e-6 else np.array([0.0, 0, 1])


def level(poses: np.ndarray, up: np.ndarray) -> np.ndarray:
  """Rotates poses [n, 3, 4] so that their up is `up`, as panoramas need for a level horizon.

  Positions and compass directions stay. A camera that looks straight down turns to where the upper
  edge of its image was, one that looks straight up to where the lower edge was.
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
  """Spherical coordinates around the focus point."""

  focus: np.ndarray  # [3]
  axes: np.ndarray  # [3, 3], rows: azimuth 0, azimuth 90 degrees, up.
  elevations: np.ndarray  # [n] of the cameras, radians.
  radius: float  # Median distance of the cameras from the focus.

  def at(self, azimuth, elevation, radius) -> np.ndarray:
    """Returns world points [..., 3] for angles in radians."""
    flat = np.cos(elevation)
    around = np.stack(
      [flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation) + 0 * azimuth], -1
    )
    return self.focus + (radius * around) @ self.axes

  def look(self, positions: np.ndarray) -> np.ndarray:
    """Returns upright poses [n, 3, 4] at `positions` that look at the focus."""
    return np.stack([paths.viewmatrix(p - self.focus, self.axes[2], p) for p in positions])


def _globe(poses: np.ndarray) -> _Globe:
  """Fits the coordinates to the cameras; raises UserError if most are at the focus itself."""
  focus, up = paths.focus_point(poses), mean_up(poses)
  offsets = poses[:, :, 3] - focus
  distances = np.linalg.norm(offsets, axis=-1)
  radius = float(np.median(distances))
  if not radius > 1e-9:
    raise UserError(
      'The cameras are all at the point that they look at, so there is nothing to orbit; use a '
      'spline through photos, Config.render_spline_keyframes.'
    )
  heights = offsets @ up
  elevations = np.arcsin(np.clip(heights / np.maximum(distances, 1e-9), -1, 1))
  right, _, ahead, _ = paths.viewmatrix(offsets[0], up, focus).T
  ahead = np.cross(right, up)  # Level, towards the first camera.
  return _Globe(focus, np.stack([ahead, np.cross(up, ahead), up]), elevations, radius)


def generate_orbit_path(
  poses: np.ndarray, n_frames: int, elevation: float | None = None, radius: float = 1.0
) -> np.ndarray:
  """Makes a horizontal circle around the focus, which starts on the first camera's side.

  Args:
    poses: [n, 3, 4]
    n_frames: number of frames, equally spaced; the last is one step short of the first.
    elevation: degrees, -89 to 89; None for the cameras' median.
    radius: in multiples of the cameras' median distance from the focus.

  Returns:
    [n_frames, 3, 4] poses that look at the focus.

  Raises:
    UserError: a number is out of range, or the cameras are at the focus.
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
  """Makes a helix around the focus that rises at a constant rate.

  Args:
    poses: [n, 3, 4]
    n_frames: number of frames.
    n_rots: number of turns, from the 10th to the 90th percentile of the cameras' elevations.

  Returns:
    [n_frames, 3, 4] poses that look at the focus from the cameras' median distance.

  Raises:
    UserError: n_frames is not positive, or the cameras are at the focus.
  """
  globe = _globe(paths.checked(poses))
  paths.check_frames(n_frames)
  low, high = np.percentile(globe.elevations, [10, 90])

  def position(u):
    return globe.at(2 * np.pi * n_rots * u, low + (high - low) * u, globe.radius)

  return globe.look(position(paths.equal_steps(position, n_frames, closed=False)))


def generate_dolly_path(
  poses: np.ndarray, start: np.ndarray, n_frames: int, distance: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
  """Makes a straight path from a camera towards the focus, with a fixed viewing direction.

  Args:
    poses: [n, 3, 4]
    start: [3, 4] the first pose; it gives the direction of both view and path.
    n_frames: number of frames, equally spaced.
    distance: length of the path as a fraction of the focus's depth; negative goes backwards.

  Returns:
    Poses [n_frames, 3, 4], and the focus's depth in each frame relative to the first [n_frames]:
    focal lengths in this proportion keep it at a constant size (dolly zoom).

  Raises:
    UserError: the path reaches the focus, or the focus is behind the camera.
  """
  paths.check_frames(n_frames)
  back, position = start[:, 2], start[:, 3]
  depth = (position - paths.focus_point(paths.checked(poses))) @ back
  if not depth > 1e-9:
    raise UserError(
      'A dolly must start from a photo that has the focus of the cameras in front of it.'
    )
  if not distance < 0.99:
    raise UserError(
      f'The distance of a dolly must be below 0.99 (1 reaches the focus), got {distance}.'
    )
  travelled = np.linspace(0, distance, n_frames)
  result = np.repeat(start[None], n_frames, 0)
  result[:, :, 3] -= (travelled * depth)[:, None] * back
  return result, 1 - travelled
