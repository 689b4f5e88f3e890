"""What became of each photograph, and whether a posing can be trusted: numbers for the report.

Angles in degrees, reprojection errors in pixels of the full-size photographs. `n` is the number of
posed photographs; poses are [n, 3, 4], camera to world, OpenGL axes.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph

from .. import colmap, paths
from . import photos as photos_lib
from . import reconstruction

MODELS = 'sparse'
BLURRED = 0.35  # Of the median sharpness of the photographs taken before and after.
FEW_FEATURES = 500
FEW_MATCHES = 30  # What COLMAP asks of a photograph that it places.
_VERIFIED = 15
_LARGEST_PICTURE = 1600  # Pixels of the longer side that training can do with.


@dataclasses.dataclass(frozen=True)
class Row:
  """What became of one photograph."""

  name: str
  model: int | None  # 0 for the one kept, another one's number, or None.
  features: int
  partners: int  # Photographs that it shares verified matches with.
  matches: int  # Verified ones with the best of those.
  points: int = 0  # Points of the model that it sees.
  error: float | None = None  # Mean reprojection error.
  sharpness: float = 1.0  # Over the median of those taken before and after it.
  reason: str | None = None  # Why it is not in the model that was kept, likely.


@dataclasses.dataclass(frozen=True)
class Findings:
  """All that the report shows."""

  rows: tuple[Row, ...]  # In the order of the photographs.
  model_sizes: tuple[int, ...]
  poses: np.ndarray  # [n, 3, 4] of the posed ones in that order, z up, the focus point at 0.
  xyz: np.ndarray  # [p, 3] in the same world
  rgb: np.ndarray  # [p, 3] uint8
  error: float | None
  track_length: float | None
  cameras: tuple[dict, ...]
  spread: dict | None
  weakest_link: dict | None
  factor: int


def recommend_factor(size: tuple[int, int]) -> int:
  """The least of 0 (as it is), 2, 4, 8 that brings the longer side to 1600 pixels or less."""
  return next((f for f in (0, 2, 4) if max(size) / max(f, 1) <= _LARGEST_PICTURE), 8)


def examine(scene_dir: str, photos: Sequence[photos_lib.Photo]) -> Findings:
  """Reads a capture's database and models."""
  folder = os.path.join(scene_dir, MODELS)
  names = sorted(filter(str.isdigit, os.listdir(folder)), key=int) if os.path.isdir(folder) else []
  pycolmap = reconstruction.colmap()
  models = [pycolmap.Reconstruction(os.path.join(folder, name)) for name in names]
  seen = _Seen(models[0]) if models else None
  rows = _rows(scene_dir, photos, models, seen)
  poses, xyz, rgb = np.zeros((0, 3, 4)), np.zeros((0, 3)), np.zeros((0, 3), np.uint8)
  if models:
    kept = colmap.read_model(os.path.join(folder, '0'))
    by_name = {image.name: colmap.camera_to_world(image) for image in kept.images.values()}
    poses = np.stack([by_name[row.name] for row in rows if row.model == 0])
    poses, move = _level(poses)
    xyz, rgb = paths.transform_points(move, kept.points.xyz), kept.points.rgb
  return Findings(
    rows=tuple(rows),
    model_sizes=tuple(model.num_reg_images() for model in models),
    poses=poses,
    xyz=xyz,
    rgb=rgb,
    error=models[0].compute_mean_reprojection_error() if models else None,
    track_length=models[0].compute_mean_track_length() if models else None,
    cameras=tuple(_cameras(scene_dir, models[0])) if models else (),
    spread=describe_spread(poses) if models else None,
    weakest_link=seen.weakest_link() if models else None,
    factor=recommend_factor(_largest_size(scene_dir)),
  )


def _largest_size(scene_dir: str) -> tuple[int, int]:
  """(width, height) of the pictures with the longest side."""
  with reconstruction.database(scene_dir) as db:
    return max(((camera.width, camera.height) for camera in db.read_all_cameras()), key=max)


class _Seen:
  """Which photographs of a model see which points, and how far from where they should."""

  def __init__(self, model):
    self.names, self.errors, observed = [], {}, []
    column = {point_id: k for k, point_id in enumerate(model.points3D)}
    xyz = np.array([point.xyz for point in model.points3D.values()]).reshape(-1, 3)
    for image_id in model.reg_image_ids():
      image = model.image(image_id)
      points = image.get_observation_points2D()
      observed.append(np.array([column[p.point3D_id] for p in points], int))
      self.names.append(image.name)
      self.errors[image.name] = _mean_error(image, points, xyz[observed[-1]])
    counts = [len(columns) for columns in observed]
    places = np.repeat(np.arange(len(observed)), counts), np.concatenate(observed)
    shape = (len(observed), len(column))
    self._table = scipy.sparse.csr_matrix((np.ones(sum(counts)), places), shape)
    self.points = dict(zip(self.names, counts))

  def weakest_link(self) -> dict | None:
    """Where the model would come apart most easily, as `weakest_link` below, by names."""
    found = weakest_link(self._table @ self._table.T)
    if found is None:
      return None
    count, (a, b), side = found
    return {
      'shared_points': count,
      'between': [self.names[a], self.names[b]],
      'photographs': [int(side.sum()), int((~side).sum())],
    }


def _mean_error(image, points, xyz: np.ndarray) -> float | None:
  """Of a photograph's points, the mean distance in pixels from where they are seen."""
  if not len(points):
    return None
  pose = image.cam_from_world().matrix()
  projected = image.camera.img_from_cam(xyz @ pose[:, :3].T + pose[:, 3])
  return float(np.linalg.norm(projected - np.array([p.xy for p in points]), axis=-1).mean())


def weakest_link(shared: scipy.sparse.spmatrix, smallest: float = 0.1):
  """Where a model would come apart most easily into two parts of some size.

  Along the tree that joins all photographs by the strongest links there are, the weakest link is
  the best that its two sides have in common. A model that was torn and glued has a poor one.

  Args:
    shared: [n, n] how many points two photographs both see.
    smallest: the share of the photographs that each side must have.

  Returns:
    The points shared across, the two photographs that share them, and which photographs are on the
    first one's side [n] bool; None if no link of the tree has sides of that size.
  """
  n = shared.shape[0]
  strength = scipy.sparse.csr_matrix(shared, dtype=float)
  strength.setdiag(0)
  strength.eliminate_zeros()
  # The strongest tree is the lightest one of reciprocals.
  tree = scipy.sparse.csgraph.minimum_spanning_tree(strength.power(-1.0)).tocoo()
  links = sorted(zip(tree.row.tolist(), tree.col.tolist()), key=lambda link: strength[link])
  for a, b in links:
    keep = [link for link in links if link != (a, b)]
    graph = scipy.sparse.csr_matrix((np.ones(len(keep)), tuple(zip(*keep)) or ((), ())), (n, n))
    _, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    side = label == label[a]
    if smallest * n <= side.sum() <= (1 - smallest) * n:
      return int(strength[a, b]), (a, b), side
  return None


def _rows(scene_dir: str, photos, models, seen) -> list[Row]:
  """What became of each photograph."""
  ids = reconstruction.image_ids(scene_dir)
  best, partners = collections.Counter(), collections.Counter()
  with reconstruction.database(scene_dir) as db:
    features = {name: db.num_keypoints_for_image(k) for name, k in ids.items()}
    pairs, inliers = db.read_two_view_geometry_num_inliers()
  for pair, count in zip(pairs, inliers):
    if count >= _VERIFIED:
      for image_id in reconstruction.colmap().pair_id_to_image_pair(pair):
        best[image_id] = max(best[image_id], count)
        partners[image_id] += 1
  model_of = {}
  for k, model in reversed(list(enumerate(models))):
    model_of.update((model.image(i).name, k) for i in model.reg_image_ids())
  sharpness = relative_sharpness([photo.sharpness for photo in photos])
  sizes = [model.num_reg_images() for model in models]
  rows = []
  for photo, sharp in zip(photos, sharpness):
    k = ids[photo.name]
    row = Row(
      name=photo.name,
      model=model_of.get(photo.name),
      features=features[photo.name],
      partners=partners[k],
      matches=best[k],
      points=seen.points.get(photo.name, 0) if seen else 0,
      error=seen.errors.get(photo.name) if seen else None,
      sharpness=sharp,
    )
    rows.append(dataclasses.replace(row, reason=explain(row, sizes)))
  return rows


def relative_sharpness(values: Sequence[float]) -> list[float]:
  """Each photograph's sharpness over the median of the 17 around it, which show about the same."""
  values = np.asarray(values, float)
  around = [np.median(values[max(0, k - 8) : k + 9]) for k in range(len(values))]
  return (values / np.maximum(around, 1e-9)).tolist()


def explain(row: Row, sizes: Sequence[int] = ()) -> str | None:
  """Why a photograph is not in the model that was kept, likely; None if it is.

  Args:
    row: the photograph; its own `reason` does not count.
    sizes: how many photographs each model has.
  """
  if row.model == 0:
    return None
  blurred = f'blurred: {max(row.sharpness, 0.01):.0%} as sharp as its neighbours'
  if row.model is not None:
    return (
      f'in another model, of {sizes[row.model]} photographs, that nothing joins to this one: '
      'photograph what lies between'
    )
  if row.sharpness < BLURRED:
    return blurred
  if row.features < FEW_FEATURES:
    return f'too few features: {row.features}; a bare wall, sky, or too dark'
  if row.matches < FEW_MATCHES:
    return f'too few matches: at most {row.matches} with any other; too little overlap'
  return (
    f'its {row.matches} matches with the best of {row.partners} others fit no one place: something '
    'moved, mirrors or repeats'
  )


def _cameras(scene_dir: str, model) -> list[dict]:
  """Focal lengths and distortion of the cameras that took the posed photographs."""
  count = collections.Counter(model.image(i).camera_id for i in model.reg_image_ids())
  result = []
  for camera_id, photographs in sorted(count.items()):
    camera = model.cameras[camera_id]
    with reconstruction.database(scene_dir) as db:
      before = db.read_camera(camera_id)
    focal = np.array([camera.focal_length_x, camera.focal_length_y])
    size = np.array([camera.width, camera.height])
    result.append(
      {
        'model': camera.model.name,
        'photographs': photographs,
        'size': size.tolist(),
        'focal': focal.tolist(),
        'view_degrees': float(np.degrees(2 * np.arctan(size / focal / 2)).max()),
        'exif_focal': before.mean_focal_length() if before.has_prior_focal_length else None,
      }
    )
  return result


def _level(poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The poses with z up, the focus point at 0 and the longer way across along x; and the [4, 4].

  Up is what the cameras' right-hand axes, level as a rule, are least along, and what they call up.
  """
  right, up = poses[:, :, 0], poses[:, :, 1].mean(0)
  up = up / max(np.linalg.norm(up), 1e-9)
  z = np.linalg.eigh(right.T @ right / len(right) - 0.1 * np.outer(up, up))[1][:, 0]
  z = z if z @ up >= 0 else -z
  centred = poses[:, :, 3] - poses[:, :, 3].mean(0)
  flat = centred - np.outer(centred @ z, z)
  x = np.linalg.eigh(flat.T @ flat)[1][:, -1]
  x = paths.viewmatrix(z, x, np.zeros(3))[:, 1]  # Orthogonal to z, even where all stand on a line.
  move = np.eye(4)
  move[:3, :3] = np.stack([x, np.cross(z, x), z])
  move[:3, 3] = -move[:3, :3] @ paths.focus_point(poses)
  return move[:3] @ paths.pad_poses(poses), move


def describe_spread(poses: np.ndarray) -> dict:
  """How the cameras stand and look, z up.

  Returns:
    kind: 'around' (looking in, from more than half way round), 'outwards', 'forward' (all in about
      one direction) or 'arc'; directions: how many of the 360 degrees of the compass cameras look
      in, to within 15; largest_gap: the widest angle in which none looks; heights: the lowest and
      highest angle that cameras look up or down at.
  """
  ahead = -poses[:, :, 2]
  azimuth = np.sort(np.degrees(np.arctan2(ahead[:, 1], ahead[:, 0])) % 360)
  gaps = np.diff(azimuth, append=azimuth[0] + 360)
  tilt = np.degrees(np.arcsin(np.clip(ahead[:, 2], -1, 1)))
  centre = poses[:, :, 3].mean(0)
  outwards = ((poses[:, :, 3] - centre) * ahead).sum(-1) > 0
  gap = float(gaps.max())
  if np.linalg.norm(ahead.mean(0)) > 0.85:
    kind = 'forward'
  elif outwards.mean() > 0.7:
    kind = 'outwards'
  else:
    kind = 'around' if gap < 180 else 'arc'
  return {
    'kind': kind,
    'directions': round(360 - float(gaps[gaps > 30].sum())),
    'largest_gap': round(gap),
    'tilt': [round(float(tilt.min())), round(float(tilt.max()))],
  }
