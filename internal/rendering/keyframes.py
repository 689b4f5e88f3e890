"""Camera paths through keyframes, and the file that stores them.

The file is nerfstudio's camera path as JSON: `camera_to_world` and `matrix` are 4x4 matrices in
row-major order, from OpenGL camera axes to the capture's own world; `fov` is vertical, in degrees.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence

import numpy as np

from .. import paths
from ..errors import UserError
from ..system import files
from . import path_files

_DEGREE = 3


@dataclasses.dataclass(frozen=True)
class Keyframe:
  """A camera that the path passes through."""

  pose: np.ndarray  # [3, 4] OpenGL camera axes to the normalised world.
  fov: float  # Vertical, radians.


def between(
  keyframes: Sequence[Keyframe], frames_per_segment: int
) -> tuple[np.ndarray, np.ndarray]:
  """Interpolates the frames of a path by a spline through the keyframes.

  Returns:
    Poses [n, 3, 4] in the normalised world, and vertical fields of view [n] in radians, with
    frames_per_segment frames per segment between two keyframes.

  Raises:
    UserError: fewer than two keyframes, equal consecutive keyframes, or frames_per_segment < 1.
  """
  keys = np.stack([key.pose for key in keyframes]) if keyframes else np.zeros((0, 3, 4))
  if len(keys) < 2:
    raise UserError(f'A path needs at least two keyframes, got {len(keys)}.')
  poses = paths.generate_spline_path(keys, frames_per_segment, _DEGREE, smoothness=0)
  # Segments differ in length, so find the frame nearest to each keyframe, in order.
  distances = np.linalg.norm((poses[:, None] - keys).reshape(len(poses), len(keys), -1), axis=-1)
  nearest = [0]
  for k in range(1, len(keys)):
    nearest.append(nearest[-1] + int(np.argmin(distances[nearest[-1] :, k])))
  nearest[-1] = len(poses) - 1
  return poses, np.interp(np.arange(len(poses)), nearest, [key.fov for key in keyframes])


def to_capture(poses: np.ndarray, world_transform: np.ndarray) -> np.ndarray:
  """Converts poses [n, 3, 4] from the normalised to the capture's world, without scaling rotations.

  `world_transform` [4, 4] is the similarity from the capture's world to the normalised one.
  """
  return paths.transform_poses(np.linalg.inv(world_transform), poses)


def document(
  keyframes: Sequence[Keyframe],
  world_transform: np.ndarray,
  size: tuple[int, int],
  fps: int,
  seconds_per_gap: float,
) -> dict:
  """Returns the path in nerfstudio's JSON format; `size` is (width, height) of the frames.

  Raises:
    UserError: as `between`.
  """
  width, height = size
  poses, fovs = between(keyframes, max(1, round(fps * seconds_per_gap)))

  def flat(poses):
    return paths.pad_poses(to_capture(poses, world_transform)).reshape(-1, 16).tolist()

  keys = flat(np.stack([key.pose for key in keyframes]))
  aspect = width / height
  return {
    'world': path_files.CAPTURE,  # nerfstudio ignores it.
    'camera_type': 'perspective',
    'render_width': width,
    'render_height': height,
    'fps': fps,
    'seconds': len(poses) / fps,
    'is_cycle': False,
    'smoothness_value': 0.0,
    'default_fov': float(np.degrees(keyframes[0].fov)),
    'default_transition_sec': seconds_per_gap,
    'keyframes': [
      {
        'matrix': matrix,
        'fov': float(np.degrees(key.fov)),
        'aspect': aspect,
        'override_transition_enabled': False,
        'override_transition_sec': None,
      }
      for matrix, key in zip(keys, keyframes)
    ],
    'camera_path': [
      {'camera_to_world': matrix, 'fov': float(np.degrees(fov)), 'aspect': aspect}
      for matrix, fov in zip(flat(poses), fovs)
    ],
  }


def free_name(folder: str, name: str, ending: str) -> str:
  """Returns an unused path in the folder: `name` reduced to letters, digits, - and _, numbered.

  `ending` is the file's extension, e.g. '.json'.
  """
  stem = re.sub(r'[^A-Za-z0-9_-]+', '_', name.removesuffix(ending)).strip('_')[:80] or 'unnamed'
  path, number = os.path.join(folder, stem + ending), 2
  while os.path.lexists(path):
    path, number = os.path.join(folder, f'{stem}_{number}{ending}'), number + 1
  return path


def save(path: str, path_document: dict) -> None:
  """Writes a result of `document` atomically."""
  files.write_json(path, path_document, 1)
