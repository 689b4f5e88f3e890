"""Computes the numbers of the report: why photographs failed, and how reliable the poses are.

Angles are in degrees, reprojection errors in pixels of the full-size photographs. `n` is the number
of posed photographs; poses are [n, 3, 4], camera to world, OpenGL axes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph

from .. import colmap, paths
from ..devices import starting
from ..system import files
from . import evidence, mapping, principal_point, reconstruction
from . import photos as photos_lib

MODELS = 'sparse'
_HOW = 'mapper', 'attempts', 'principal_points'  # What the report has of the models' stamp.
BLURRED = 0.35  # Times the median sharpness of the photographs around it.
FEW_FEATURES = 500
FEW_MATCHES = 30  # COLMAP's mapper requires this many of each photograph.


@dataclasses.dataclass(frozen=True)
class Row:
  """The result of one photograph."""

  name: str
  model: int | None  # The model it is in: 0 is the largest, which is used; None: not posed.
  features: int
  partners: int  # Photographs that share verified matches with it.
  matches: int  # Verified matches with the best of its partners.
  points: int = 0  # 3D points of the model that it observes.
  error: float | None = None  # Mean reprojection error.
  sharpness: float = 1.0  # Divided by the median of the photographs around it.
  reason: str | None = None  # The likely reason why it is not in model 0.


@dataclasses.dataclass(frozen=True)
class Findings:
  """Everything that the report shows."""

  rows: tuple[Row, ...]  # In the order of the photographs.
  model_sizes: tuple[int, ...]  # Photographs in each model.
  poses: np.ndarray  # [n, 3, 4] of the rows in model 0; z is up, the focus point is the origin.
  xyz: np.ndarray  # [p, 3] in the same world
  rgb: np.ndarray  # [p, 3] uint8
  error: float | None  # Mean reprojection error.
  track_length: float | None  # Mean number of photographs that observe a point.
  cameras: tuple[dict, ...]  # As `_cameras` returns them.
  spread: dict | None  # As `describe_spread` returns it.
  weakest_link: dict | None  # As `_Observations.weakest_link` returns it.
  evidence: evidence.Evidence | None  # What the matches say about the poses of model 0.
  mapping: dict | None  # How the models were made: the stamp of `mapping.write_models`.
  factor: int  # Recommended Config.factor.


def examine(scene_dir: str, photos: Sequence[photos_lib.Photo]) -> Findings:
  """Computes the findings from a capture's database and models."""
  folder = os.path.join(scene_dir, MODELS)
  names = (
    sorted(filter(str.isdigit, os.listdir(folder)), key=int) if files.is_folder(folder) else []
  )
  pycolmap = reconstruction.colmap()
  models = [pycolmap.Reconstruction(os.path.join(folder, name)) for name in names]
  observations = _Observations(models[0]) if models else None
  rows = _rows(scene_dir, photos, models, observations)
  poses, xyz, rgb = np.zeros((0, 3, 4)), np.zeros((0, 3)), np.zeros((0, 3), np.uint8)
  if models:
    largest = colmap.read_model(os.path.join(folder, '0'))
    by_name = {image.name: colmap.camera_to_world(image) for image in largest.images.values()}
    poses, to_level = _level(np.stack([by_name[row.name] for row in rows if row.model == 0]))
    xyz, rgb = paths.transform_points(to_level, largest.points.xyz), largest.points.rgb
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
    weakest_link=observations.weakest_link() if models else None,
    evidence=_test(scene_dir, photos, models),
    mapping=_how_made(folder),
    factor=starting.recommend_factor(_largest_size(scene_dir)),
  )


def _test(scene_dir: str, photos, models) -> evidence.Evidence | None:
  if not models:
    return None
  return evidence.Matches(scene_dir, [photo.name for photo in photos]).test(models[0])


def _how_made(folder: str) -> dict | None:
  with contextlib.suppress(FileNotFoundError, files.FileError):  # A damaged one is left out.
    stamp = files.read_json(os.path.join(folder, mapping.STAMP), dict)
    return {key: stamp[key] for key in _HOW if key in stamp} or None
  return None


def _largest_size(scene_dir: str) -> tuple[int, int]:
  """Returns (width, height) of the photographs with the longest side."""
  with reconstruction.database(scene_dir) as db:
    return max(((camera.width, camera.height) for camera in db.read_all_cameras()), key=max)


class _Observations:
  """Which photographs of a model observe which points, and with which reprojection error."""

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
    entries = np.repeat(np.arange(len(observed)), counts), np.concatenate(observed)
    shape = (len(observed), len(column))
    self._table = scipy.sparse.csr_matrix((np.ones(sum(counts)), entries), shape)  # [n, points]
    self.points = dict(zip(self.names, counts))

  def weakest_link(self) -> dict | None:
    """Applies `weakest_link` below to this model; returns names instead of indices."""
    found = weakest_link(self._table @ self._table.T)  # [n, n]
    if found is None:
      return None
    count, (a, b), side = found
    return {
      'shared_points': count,
      'between': [self.names[a], self.names[b]],
      'photographs': [int(side.sum()), int((~side).sum())],
    }


def _mean_error(image, points, xyz: np.ndarray) -> float | None:
  """Returns the mean reprojection error of a photograph's points, None if it has none."""
  if not len(points):
    return None
  in_camera = paths.transform_points(image.cam_from_world().matrix(), xyz)  # [p, 3]
  projected = image.camera.img_from_cam(in_camera)  # [p, 2]
  return float(np.linalg.norm(projected - np.array([p.xy for p in points]), axis=-1).mean())


def weakest_link(shared: scipy.sparse.spmatrix, smallest: float = 0.1):
  """Finds the weakest link between two large parts of a model.

  In the maximum spanning tree of the shared points, each edge is the strongest link between the two
  parts that it joins. A weak one means that the parts may be posed wrongly relative to each other.

  Args:
    shared: [n, n] number of points that two photographs both observe.
    smallest: the least fraction of the photographs that each part must have.

  Returns:
    The number of shared points, the two photographs (a, b) that share them, and the part of the
    photographs on the side of a, [n] bool. None if no edge of the tree has two parts that large.
  """
  n = shared.shape[0]
  strength = scipy.sparse.csr_matrix(shared, dtype=float)
  strength.setdiag(0)
  strength.eliminate_zeros()
  # scipy has minimum spanning trees; reciprocals turn them into maximum ones.
  tree = scipy.sparse.csgraph.minimum_spanning_tree(strength.power(-1.0)).tocoo()
  links = sorted(zip(tree.row.tolist(), tree.col.tolist()), key=lambda link: strength[link])
  for a, b in links:
    keep = [link for link in links if link != (a, b)]
    graph = scipy.sparse.csr_matrix((np.ones(len(keep)), tuple(zip(*keep)) or ((), ())), (n, n))
    _, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    side = label == label[a]  # [n]
    if smallest * n <= side.sum() <= (1 - smallest) * n:
      return int(strength[a, b]), (a, b), side
  return None


def _rows(scene_dir: str, photos, models, observations: _Observations | None) -> list[Row]:
  """Returns the row of each photograph."""
  ids = reconstruction.image_ids(scene_dir)
  best, partners = collections.Counter(), collections.Counter()
  with reconstruction.database(scene_dir) as db:
    features = {name: db.num_keypoints_for_image(k) for name, k in ids.items()}
    pairs, inliers = db.read_two_view_geometry_num_inliers()
  for pair, count in zip(pairs, inliers):
    if count >= reconstruction.VERIFIED:
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
      points=observations.points.get(photo.name, 0) if observations else 0,
      error=observations.errors.get(photo.name) if observations else None,
      sharpness=sharp,
    )
    rows.append(dataclasses.replace(row, reason=explain(row, sizes)))
  return rows


def relative_sharpness(values: Sequence[float]) -> list[float]:
  """Divides each sharpness by the median of the 17 photographs around it.

  Sharpness depends on the subject, and neighbours show about the same one.
  """
  values = np.asarray(values, float)
  medians = [np.median(values[max(0, k - 8) : k + 9]) for k in range(len(values))]
  return (values / np.maximum(medians, 1e-9)).tolist()


def explain(row: Row, sizes: Sequence[int] = ()) -> str | None:
  """Returns the likely reason why a photograph is not in model 0; None if it is.

  Args:
    row: the photograph; its `reason` is ignored.
    sizes: number of photographs in each model.
  """
  if row.model == 0:
    return None
  if row.model is not None:
    return (
      f'in a separate model of {sizes[row.model]} photographs, not joined to the largest one: '
      'photograph the way between, or pose them alone'
    )
  if row.sharpness < BLURRED:
    return f'blurred: {max(row.sharpness, 0.01):.0%} as sharp as its neighbours'
  if row.features < FEW_FEATURES:
    return f'too few features: {row.features}; too dark, or a bare wall or sky?'
  if row.matches < FEW_MATCHES:
    return (
      f'too few matches: at most {row.matches} with any other photograph; take some in between, '
      'with more overlap'
    )
  return (
    f'no consistent pose: up to {row.matches} matches with {row.partners} photographs contradict '
    'each other; movement, mirrors or repeats?'
  )


def _cameras(scene_dir: str, model) -> list[dict]:
  """Returns the model, size and focal length of each camera with posed photographs."""
  count = collections.Counter(model.image(i).camera_id for i in model.reg_image_ids())
  result = []
  for camera_id, photographs in sorted(count.items()):
    camera = model.cameras[camera_id]
    with reconstruction.database(scene_dir) as db:
      initial = db.read_camera(camera_id)  # From EXIF, if it has a focal length.
    focal = np.array([camera.focal_length_x, camera.focal_length_y])
    size = np.array([camera.width, camera.height])
    result.append(
      {
        'model': camera.model.name,
        'photographs': photographs,
        'size': size.tolist(),
        'focal': focal.tolist(),
        'off_centre': principal_point.off_centre(camera).tolist(),
        'view_degrees': float(np.degrees(2 * np.arctan(size / focal / 2)).max()),
        'exif_focal': initial.mean_focal_length() if initial.has_prior_focal_length else None,
      }
    )
  return result


def _level(poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Moves the poses into a world with z up, the focus point at 0 and the widest extent along x.

  Most people hold a camera level, so up is the direction to which the cameras' right axes are most
  orthogonal; the mean of their own up decides where that is ambiguous.

  Returns:
    The poses [n, 3, 4] in that world, and the transformation [4, 4] to it.
  """
  right, up = poses[:, :, 0], poses[:, :, 1].mean(0)  # [n, 3], [3]
  up = up / max(np.linalg.norm(up), 1e-9)
  z = np.linalg.eigh(right.T @ right / len(right) - 0.1 * np.outer(up, up))[1][:, 0]
  z = z if z @ up >= 0 else -z
  centred = poses[:, :, 3] - poses[:, :, 3].mean(0)
  flat = centred - np.outer(centred @ z, z)  # [n, 3], in the horizontal plane.
  x = np.linalg.eigh(flat.T @ flat)[1][:, -1]
  x = paths.viewmatrix(z, x, np.zeros(3))[:, 1]  # Orthogonal to z, even for cameras on a line.
  move = np.eye(4)
  move[:3, :3] = np.stack([x, np.cross(z, x), z])
  move[:3, 3] = -move[:3, :3] @ paths.focus_point(poses)
  return move[:3] @ paths.pad_poses(poses), move


def describe_spread(poses: np.ndarray) -> dict:
  """Describes the viewing directions of cameras in a world with z up.

  Returns:
    A dict with
      kind: 'around' (looking inwards from more than half a circle), 'arc' (from less), 'outwards',
        or 'forward' (all in about the same direction);
      directions: degrees of azimuth that are covered, to within 15;
      largest_gap: the largest angle of azimuth without a camera;
      tilt: the lowest and the highest elevation of the viewing directions.
  """
  ahead = -poses[:, :, 2]  # [n, 3]
  azimuth = np.sort(np.degrees(np.arctan2(ahead[:, 1], ahead[:, 0])) % 360)
  gaps = np.diff(azimuth, append=azimuth[0] + 360)
  tilt = np.degrees(np.arcsin(np.clip(ahead[:, 2], -1, 1)))  # [n]
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
