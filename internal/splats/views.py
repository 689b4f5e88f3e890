"""Pictures to fit Gaussians to: of the trained field, from any number of cameras, and photographs.

World means the normalised world, in which the training cameras fill [-1, 1]^3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from scipy.spatial import transform

from .. import cameras, structs
from ..datasets import scenes
from ..errors import UserError
from ..export import points
from ..rendering import trained
from ..system import progress
from ..vis import pictures
from . import gaussians

_NEIGHBOURS = 4  # A camera between two others stands between one and one of its nearest.


@dataclasses.dataclass(frozen=True)
class Views:
  """Pictures of one size and their cameras."""

  cameras: list[gaussians.Pinhole]  # [v]
  colors: list[np.ndarray]  # [v] of uint8 [h, w, 3].

  def __add__(self, other: Views) -> Views:
    return Views(self.cameras + other.cameras, self.colors + other.colors)


def teacher_cameras(scene: scenes.Scene, count: int, width: int, seed: int = 0) -> structs.Cameras:
  """Returns `count` pinhole cameras: at most half at training poses, the others between them.

  A pose between is a random point on the line from one training camera to a near one that looks in
  a similar direction, with the rotation in between.

  Raises:
    ExportError: the rays are in NDC, or `count` or `width` is too small.
  """
  own = points.pinhole_views(scene, (count + 1) // 2, width)
  poses = np.asarray(scene.cameras.camtoworld, np.float64)[list(scene.train)]
  between = _poses_between(poses, count - len(own.size), np.random.default_rng(seed))
  poses = np.concatenate([np.asarray(own.camtoworld, np.float64), between])
  return cameras.make_cameras(np.asarray(own.pixtocam)[0], poses, np.asarray(own.size)[0])


def _poses_between(poses: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
  """Returns [count, 3, 4] poses between neighbours among `poses` [n, 3, 4]."""
  if len(poses) < 2:
    return np.repeat(poses, count, 0)
  position, back = poses[:, :, 3], poses[:, :, 2]
  apart = np.linalg.norm(position[:, None] - position, axis=-1)
  apart = apart / np.median(apart) + (1 - back @ back.T) + np.diag(np.full(len(poses), np.inf))
  nearest = np.argsort(apart, 1)[:, : min(_NEIGHBOURS, len(poses) - 1)]
  result = []
  for k in rng.permutation(np.arange(count) % len(poses)):
    pair = [k, rng.choice(nearest[k])]
    at = rng.uniform()
    turn = transform.Slerp([0, 1], transform.Rotation.from_matrix(poses[pair, :, :3]))(at)
    place = (1 - at) * position[pair[0]] + at * position[pair[1]]
    result.append(np.concatenate([turn.as_matrix(), place[:, None]], 1))
  return np.stack(result) if result else np.zeros((0, 3, 4))


def render_teacher(run: trained.TrainedRun, cams: structs.Cameras) -> tuple[Views, list[dict]]:
  """Renders the field from `cams`: the pictures, and rgb, acc and distance_median of each."""
  render_image, images = run.make_image_renderer(), []
  for row in progress.track(range(len(cams.size)), 'views of the field'):
    image = render_image(run.params, cams, row, run.train_fraction)
    images.append({name: image[name] for name in ('rgb', 'acc', 'distance_median')})
  colors = [pictures.to_uint8(image['rgb']) for image in images]
  pinholes = [gaussians.pinhole(cams, row) for row in range(len(cams.size))]
  return Views(pinholes, colors), images


def undistorted(scene: scenes.Scene, rows: Iterable[int], size: tuple[int, int]) -> list[int]:
  """Returns the images among `rows` of perspective cameras of this size, without masks."""
  cams = scene.cameras
  return [
    row
    for row in rows
    if tuple(np.asarray(cams.size)[row].tolist()) == size
    and cams.lens[row] == structs.PERSPECTIVE
    and not np.any(cams.distortion[row])
    and not (scene.masks and scene.masks[row])
  ]


def photographs(run: trained.TrainedRun, rows: list[int]) -> Views:
  """Returns the capture's photographs `rows`; none if they cannot be read, which is told."""
  try:
    colors = scenes.read_images(run.settings.config.data_dir or '', run.scene, rows)
  except (UserError, OSError) as error:
    progress.say(f'Going on without photographs, since they cannot be read: {error}')
    return Views([], [])
  return Views([gaussians.pinhole(run.scene.cameras, row) for row in rows], colors)
