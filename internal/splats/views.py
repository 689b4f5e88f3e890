"""Pictures to fit Gaussians to: of the trained field, from any number of cameras, and photographs.

World means the normalised world, in which the training cameras fill [-1, 1]^3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import transform

from .. import cameras, structs
from ..datasets import images, scenes
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
  colors: list[np.ndarray]  # [v] of uint8 [h, w, 4]: r, g, b, and 255 where the pixel counts.


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
  rendered = []
  for row in progress.track(range(len(cams.size)), 'views of the field'):
    image = run.render_image(run.params, cams, row, run.train_fraction)
    rendered.append({name: image[name] for name in ('rgb', 'acc', 'distance_median')})
  rgb = [pictures.to_uint8(image['rgb']) for image in rendered]
  colors = [np.pad(c, ((0, 0), (0, 0), (0, 1)), constant_values=255) for c in rgb]
  pinholes = [gaussians.pinhole(cams, row) for row in range(len(cams.size))]
  return Views(pinholes, colors), rendered


def drawable(scene: scenes.Scene, rows: Iterable[int]) -> list[int]:
  """Returns the rows of perspective cameras that have the size of the first training image."""
  lens, size = np.asarray(scene.cameras.lens), np.asarray(scene.cameras.size)
  fits = (lens == structs.PERSPECTIVE) & (size == size[scene.train[0]]).all(-1)
  return [row for row in rows if fits[row]]


def photographs(run: trained.TrainedRun, rows: Iterable[int]) -> tuple[list[int], Views]:
  """Returns the rows and pictures of `drawable` photographs, as a pinhole sees them.

  Lens distortion is removed by cubic splines. Masked pixels do not count, and neither do those that
  the photograph does not show. Prints how many photographs are left out. If they cannot be read,
  prints why and returns none.
  """
  scene, folder, rows = run.scene, run.settings.config.data_dir or '', list(rows)
  kept = drawable(scene, rows)
  if len(kept) < len(rows):
    progress.say(
      f'Leaving out {len(rows) - len(kept)} of {len(rows)} photographs, of another size than '
      'the first one or no perspective lens.'
    )
  resample = _Pinhole(scene.cameras, kept)
  try:
    masks = scenes.read_masks(folder, scene, kept)
    photos = scenes.read_images(folder, scene, kept)
  except (UserError, OSError) as error:
    progress.say(f'Going on without photographs, since they cannot be read: {error}')
    return [], Views([], [])
  jobs = dict(zip(kept, zip(photos, masks)))
  colors = images.in_threads(lambda row: resample(row, *jobs[row]), kept, None)
  return kept, Views([gaussians.pinhole(scene.cameras, row) for row in kept], colors)


def without_distortion(cams: structs.Cameras) -> structs.Cameras:
  """Returns perspective cameras as pinholes with the same focal lengths and centres."""
  return cameras.make_cameras(cams.pixtocam, cams.camtoworld, cams.size)


class _Pinhole:
  """Turns photographs into those of pinholes with the same focal length and centre.

  Lenses are made at first, in one thread: they are computed with JAX.
  """

  def __init__(self, cams: structs.Cameras, rows: Sequence[int]):
    self._cams, self._maps = cams, {}
    for row in rows:
      if np.any(cams.distortion[row]) and self._lens(row) not in self._maps:
        self._maps[self._lens(row)] = self._map(row)

  def _lens(self, row: int) -> tuple[bytes, bytes]:
    """Returns what cameras of the same intrinsics have in common."""
    return tuple(np.asarray(x[row]).tobytes() for x in (self._cams.pixtocam, self._cams.distortion))

  def __call__(self, row: int, photo: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Returns [h, w, 4] uint8 of a photograph [h, w, 3]; alpha is 255 where a pixel counts."""
    counts = np.ones(photo.shape[:2], bool) if mask is None else mask
    if lens := self._maps.get(self._lens(row)):
      (y, x), inside = lens
      channels = [
        ndimage.map_coordinates(photo[..., k].astype(np.float32), (y, x), order=3, mode='nearest')
        for k in range(3)
      ]
      photo = np.clip(np.rint(np.stack(channels, -1)), 0, 255).astype(np.uint8)
      counts = inside & ndimage.map_coordinates(counts, (y, x), order=0, mode='nearest')
    return np.concatenate([photo, np.uint8(255) * counts[..., None]], -1)

  def _map(self, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where each pixel is in the photograph, [2, h, w] (y, x), and whether it is in it."""
    cams = self._cams
    matrix, lens = np.asarray(cams.pixtocam[row], np.float64), np.asarray(cams.distortion[row])
    width, height = np.asarray(cams.size)[row].tolist()
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    plane = np.stack([u, v, np.ones_like(u)], -1) @ matrix.T
    bent = cameras.distort(plane[..., 0], plane[..., 1], lens, fisheye=False)
    back = np.stack([*bent, np.ones_like(u)], -1) @ np.linalg.inv(matrix).T
    x, y = back[..., 0], back[..., 1]
    # Where a lens folds, positions run backwards; there it is not defined.
    folds = (np.gradient(x, axis=1) <= 0) | (np.gradient(y, axis=0) <= 0)
    inside = (abs(x - width / 2) <= width / 2 - 0.5) & (abs(y - height / 2) <= height / 2 - 0.5)
    return np.float32([y - 0.5, x - 0.5]), inside & ~folds
