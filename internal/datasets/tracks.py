"""Where training images see the capture's sparse points, and how far these are: a prior for depth.

n is the number of training images, m that of observations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import cameras, colmap, paths, structs
from . import images, llff, scenes

_FEWEST_VIEWS = 3  # Two rays meet somewhere whatever they show; a third one confirms it.


def read(
  data_dir: str | None, scene: scenes.Scene, allowed: Sequence[np.ndarray | None]
) -> structs.Tracks:
  """Reads the observations of a COLMAP capture.

  A point counts if at least three images see it. Its pixel is its projection, which is where it was
  seen up to its reprojection error e. Its certainty is exp(-(e / mean e)^2), as in DS-NeRF
  (arXiv:2107.02791). Observations by test images are left out.

  Args:
    data_dir: the capture's folder.
    scene: the capture.
    allowed: [h, w] bool per training image, True for pixels that may be used; None for all.

  Raises:
    DataError: the capture is of another format or its rays are in NDC, or no training image sees a
      point that counts.
  """
  if scene.cameras.pixtocam_ndc is not None or scene.loader != 'llff':
    raise images.DataError(
      "Config.depth_loss_mult needs a COLMAP capture (Config.dataset_loader = 'llff') without "
      'Config.forward_facing; set it to 0.'
    )
  folder = llff.find_model(data_dir or '')
  model = colmap.read_model(folder, with_tracks=True)
  points = model.points
  xyz = paths.transform_points(scene.world_transform, points.xyz)
  usual = np.sum(points.error) / max(len(points.error), 1) or 1  # Some programs write 0.
  certainty = np.exp(-((points.error / usual) ** 2))
  cams = scene.cameras.take(np.array(scene.train))
  row, point = _observations(model, [scene.names[k] for k in scene.train])
  x, y, distance = _project(cams, row, xyz[point])
  kept = _inside(x, y, distance, cams.size, row, allowed)
  table = [v[kept] for v in (row, np.floor(x), np.floor(y), distance, certainty[point])]
  if not len(table[0]):
    raise images.DataError(
      f'{folder}: Config.depth_loss_mult needs points that three or more images see; the model '
      'has none. Keep points3D with its tracks, or set Config.depth_loss_mult = 0.'
    )
  kinds = (np.int32,) * 3 + (np.float32,) * 2
  return structs.Tracks(*(v.astype(kind) for v, kind in zip(table, kinds)))


def _observations(model: colmap.Model, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Returns pairs (row of an image in `names`, row of a point that it and two others see), [m]."""
  points = model.points
  point = np.repeat(np.arange(len(points.views)), points.views)  # Of each entry of all tracks.
  row_of = dict(zip(names, range(len(names))))
  row_of_id = {image.id: row_of.get(image.name, -1) for image in model.images.values()}
  ids, place = np.unique(points.seen_by, return_inverse=True)
  row = np.array([row_of_id.get(int(k), -1) for k in ids], np.int64)[place]
  pairs = np.stack([row, point])[:, (row >= 0) & (points.views[point] >= _FEWEST_VIEWS)]
  return tuple(np.unique(pairs, axis=1))


def _inside(x, y, distance, size, row, allowed: Sequence[np.ndarray | None]) -> np.ndarray:
  """Returns which projections are in front of the camera, in the picture and allowed, bool [m]."""
  width, height = np.asarray(size)[row].T
  kept = (distance > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
  for k, mask in enumerate(allowed):
    if mask is not None:
      own = np.flatnonzero(kept & (row == k))
      kept[own] = mask[y[own].astype(int), x[own].astype(int)]
  return kept


def _project(
  cams: structs.Cameras, row: np.ndarray, xyz: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Projects points [m, 3] in the world into the images of cameras `row` [m].

  Returns:
    Pixel coordinates x [m] and y [m], whose integer parts are column and row, and the parameter t
    [m] of the ray that `cameras.pixels_to_rays` casts there; t is -1 behind the camera.
  """
  pose = np.asarray(cams.camtoworld, np.float64)[row]
  offset = xyz - pose[:, :, 3]
  right, up, back = np.einsum('mi,mij->jm', offset, pose[:, :, :3])
  fisheye = np.asarray(cams.lens)[row] == structs.FISHEYE
  with np.errstate(all='ignore'):  # Points behind the camera are dropped later.
    plane, distortion = (right / -back, -up / -back), np.asarray(cams.distortion)[row]
    by_lens = [cameras.distort(*plane, distortion, lens) for lens in (False, True)]
    x, y = (np.where(fisheye, curved, flat) for flat, curved in zip(*by_lens))
    camtopix = np.linalg.inv(np.asarray(cams.pixtocam, np.float64))[row]
    x, y, _ = np.einsum('mij,jm->im', camtopix, np.stack([x, y, np.ones(len(x))]))
  distance = np.where(fisheye, np.linalg.norm(offset, axis=-1), -back)
  return x, y, np.where(back < 0, distance, -1)
