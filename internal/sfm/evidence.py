"""Tests a model against the matches of its photographs: a torn or doubled scene contradicts some.

The mapper drops the matches that its model contradicts, so reprojection errors stay small when half
of a scene is in the wrong place. The matches themselves still know: under right poses, the two
photographs that match best see the same points in the same places.

Matches can also be wrong, where two parts of a scene look alike. Those seldom count: they cover a
part of the pictures, and true neighbours match better. So a pair counts if it is one of the
strongest of either photograph and its matches cover the whole overlap of the pictures. Neighbours
in the order are seldom look-alikes: they count whatever their matches cover, but then prove less.

Two places that match as one contradict no pair. What stands beside them can tell (`folds`), and the
order of the photographs: who goes from one to the other without a photograph leaves a jump.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import folds, pairs, reconstruction

STRONGEST = 10  # Pairs of each photograph that count.
CONTRADICTED = 0.01  # Error of a pair (`pair_error`), in focal lengths: half a degree.
COVERED = 0.7  # Share of the overlap that has matches, from which a pair cannot be a look-alike.
FOLDED = 0.2  # Share of the pairs from one place that see different points; .06 in right poses.
GOOD, DOUBTFUL, BAD = 'good', 'doubtful', 'bad'  # Verdicts.
_INLIERS = 30
_AT_A_JUMP = 3  # Photographs before and after a jump in the order, no two of which match strongly.
_GRID = (8, 6)  # Cells of a picture, in which coverage is counted.
_OCCUPIED = 5  # Features of a cell, each matched twice or more, from which it should have matches.


@dataclasses.dataclass(frozen=True)
class Pair:
  """A pair of photographs, `a` and `b`, with verified matches."""

  a: str
  b: str
  rows: np.ndarray  # [m, 2], the features of a and of b that match.


@dataclasses.dataclass(frozen=True)
class View:
  """A photograph in a model."""

  name: str
  pose: np.ndarray  # [3, 4], world to camera.
  rays: np.ndarray  # [f, 2], the direction of each feature in camera coordinates, at z = 1.
  points: np.ndarray  # [f, 3], the 3D point of each feature, NaN without one.
  ids: np.ndarray  # [f], the number of that point, -1 without one.


@dataclasses.dataclass(frozen=True)
class Evidence:
  """What the matches say about a model."""

  tested: int  # Strong pairs whose photographs are both in the model.
  contradicted: tuple[tuple[str, str], ...]  # The strong pairs that the model contradicts.
  in_order: int  # Those of them that cover the overlap and are neighbours in the order.
  share: float  # Of all matches, those in contradicted pairs, strong or weak.
  jumps: tuple[tuple[str, str], ...] = ()  # As `Matches.jumps` returns them.
  folded: float = 0.0  # Share of the pairs from one place that see different points.
  beside: int = 0  # Contradicted pairs of neighbours in the order, whatever they cover.

  @property
  def is_clean(self) -> bool:
    return not self.contradicted

  @property
  def verdict(self) -> str:
    """Returns GOOD, DOUBTFUL or BAD; neighbours that cover the overlap are no look-alikes."""
    if self.in_order:
      return BAD
    untold = self.jumps or self.folded > FOLDED or not self.tested
    return DOUBTFUL if self.contradicted or untold else GOOD

  def as_json(self) -> dict[str, Any]:
    """Returns the fields as JSON has them."""
    tuples = {'contradicted': self.contradicted, 'jumps': self.jumps}
    return {**dataclasses.asdict(self), **{k: list(map(list, v)) for k, v in tuples.items()}}

  def photographs(self) -> list[str]:
    """Returns the photographs of the contradicted pairs, sorted."""
    return sorted({name for pair in self.contradicted for name in pair})


class Matches:
  """The verified matches of a capture.

  Args:
    scene_dir: the capture, with a database.
    names: the photographs, in order.
  """

  def __init__(self, scene_dir: str, names: Sequence[str]):
    self.names = list(names)
    self._place = {name: k for k, name in enumerate(names)}
    ids = reconstruction.image_ids(scene_dir)
    name_of = {k: name for name, k in ids.items()}
    with reconstruction.database(scene_dir) as db:
      self._features = {
        name: db.read_keypoints(ids[name])[:, :2].astype(np.float64) for name in names
      }
      cameras = {name: db.read_camera(db.read_image(ids[name]).camera_id) for name in names}
      self._sizes = {name: (camera.width, camera.height) for name, camera in cameras.items()}
      self.pairs = list(_read_pairs(db, name_of))
    self.pairs = [p for p in self.pairs if p.a in self._features and p.b in self._features]
    self._cells = {name: self._cell(name) for name in names}
    self._occupied = self._find_occupied()

  def _cell(self, name: str) -> np.ndarray:
    """Returns the grid cell of each feature, [f]."""
    column, row = np.floor(self._features[name] / self._sizes[name] * _GRID).astype(int).T
    return np.clip(row, 0, _GRID[1] - 1) * _GRID[0] + np.clip(column, 0, _GRID[0] - 1)

  def _find_occupied(self) -> dict[str, np.ndarray]:
    """Returns which cells of each photograph [cells] have features that can be matched."""
    counts = {name: np.zeros(len(rows), int) for name, rows in self._features.items()}
    for pair in self.pairs:
      counts[pair.a][pair.rows[:, 0]] += 1
      counts[pair.b][pair.rows[:, 1]] += 1
    return {
      name: np.bincount(self._cells[name][count >= 2], minlength=_GRID[0] * _GRID[1]) >= _OCCUPIED
      for name, count in counts.items()
    }

  def strongest(self, among: set[str]) -> list[Pair]:
    """Returns the pairs that are among the strongest of either photograph, both in `among`."""
    partners = {name: [] for name in among}
    for k, pair in enumerate(self.pairs):
      if pair.a in among and pair.b in among:
        for name in (pair.a, pair.b):
          partners[name].append((len(pair.rows), -k))
    kept = {-k for rows in partners.values() for _, k in sorted(rows, reverse=True)[:STRONGEST]}
    return [self.pairs[k] for k in sorted(kept) if len(self.pairs[k].rows) >= _INLIERS]

  def jumps(self, strong: Sequence[Pair], among: set[str]) -> list[tuple[str, str]]:
    """Returns the photographs before and after each jump in the order, if there is an order.

    At a jump, no pair of `strong` joins the last three photographs before to the first three after.
    If all are in one model, others join them; those may be of two places that look alike.

    Args:
      strong: the pairs that `strongest` returns.
      among: the photographs in the model.
    """
    order = [name for name in self.names if name in among]
    cuts = range(_AT_A_JUMP - 1, len(order) - _AT_A_JUMP)
    if not cuts or not self.is_ordered:
      return []
    place = {name: k for k, name in enumerate(order)}
    joined = set()  # k: a strong pair joins k or one shortly before to one shortly after k.
    for pair in strong:
      i, j = sorted((place[pair.a], place[pair.b]))
      joined.update(range(max(i, j - _AT_A_JUMP), min(j, i + _AT_A_JUMP)))
    return [(order[k], order[k + 1]) for k in cuts if k not in joined]

  def coverage(self, pair: Pair) -> float:
    """Returns the share of the overlap of two pictures that has matches, the smaller of both ways.

    The overlap is where an affine map, fitted to the matches, takes one picture into the other.
    """
    a, b = pair.rows.T
    return min(self._covered(pair.a, pair.b, a, b), self._covered(pair.b, pair.a, b, a))

  def _covered(self, first: str, second: str, i: np.ndarray, j: np.ndarray) -> float:
    source = np.c_[self._features[first][i], np.ones(len(i))]  # [m, 3]
    target, keep = self._features[second][j], np.ones(len(i), bool)
    for _ in range(3):  # Drops the matches that fit worst: depths differ.
      affine = np.linalg.lstsq(source[keep], target[keep], rcond=None)[0]  # [3, 2]
      distance = np.linalg.norm(source @ affine - target, axis=1)
      keep = distance <= 2 * np.median(distance)
    row, column = np.divmod(np.arange(_GRID[0] * _GRID[1]), _GRID[0])
    centres = (np.c_[column, row] + 0.5) / _GRID * self._sizes[first]  # [cells, 2]
    mapped = np.c_[centres, np.ones(len(centres))] @ affine / self._sizes[second]
    expected = ((mapped > 0.05) & (mapped < 0.95)).all(1) & self._occupied[first]  # [cells]
    if expected.sum() < 4:
      return 0.0
    matched = np.bincount(self._cells[first][i], minlength=len(centres)) > 0
    return float((matched & expected).sum() / expected.sum())

  def test(self, model) -> Evidence:
    """Tests a pycolmap Reconstruction against the matches."""
    views = self._views(model)
    against = self._against(views, CONTRADICTED)
    numbers = {id(pair) for pair in against}
    strong = self.strongest(set(views))
    against_strong = [p for p in strong if id(p) in numbers]
    beside = {id(p) for p in against_strong if self._are_neighbours(p)}
    covered = {id(p) for p in against_strong if self.coverage(p) >= COVERED}
    total = sum(len(p.rows) for p in self.pairs if p.a in views and p.b in views)
    seen = [(v.pose, v.points[v.ids >= 0], v.ids[v.ids >= 0]) for v in views.values()]
    return Evidence(
      tested=len(strong),
      contradicted=tuple((p.a, p.b) for p in against_strong if id(p) in beside | covered),
      in_order=len(beside & covered),
      share=sum(len(p.rows) for p in against) / max(total, 1),
      jumps=tuple(self.jumps(strong, set(views))),
      folded=folds.share_of_pairs(seen),
      beside=len(beside),
    )

  def contradicting(self, model, tolerance: float) -> list[Pair]:
    """Returns the pairs with an error (`pair_error`) above a tolerance, in focal lengths."""
    return self._against(self._views(model), tolerance)

  def _against(self, views: dict[str, View], tolerance: float) -> list[Pair]:
    posed = [pair for pair in self.pairs if pair.a in views and pair.b in views]
    return [p for p in posed if pair_error(views[p.a], views[p.b], p.rows) > tolerance]

  def _views(self, model) -> dict[str, View]:
    views = {}
    known = np.sort(np.fromiter(model.point3D_ids(), np.int64))
    xyz = np.array([model.points3D[k].xyz for k in known.tolist()]).reshape(-1, 3)
    for k in model.reg_image_ids():
      image = model.image(k)
      features = self._features.get(image.name)
      if features is None:
        continue
      points, ids = np.full((len(features), 3), np.nan), np.full(len(features), -1, np.int64)
      if image.num_points2D() == len(features):  # Otherwise the model has features of its own.
        rows = image.get_observation_point2D_idxs()
        ids[rows] = [point.point3D_id for point in image.get_observation_points2D()]
        points[rows] = xyz[np.searchsorted(known, ids[rows])]
      rays = image.camera.cam_from_img(features)  # [f, 2]
      pose = image.cam_from_world().matrix()
      views[image.name] = View(image.name, pose, rays, points, ids)
    return views

  @functools.cached_property
  def is_ordered(self) -> bool:
    """Whether the photographs were taken one after the other, as their matches tell.

    In a scene that looks the same from four sides, photographs of the others match like the next.
    """
    n = len(self.names)
    counts = np.zeros((n, n))
    for pair in self.pairs:
      i, j = self._place[pair.a], self._place[pair.b]
      counts[i, j] = counts[j, i] = len(pair.rows)
    np.fill_diagonal(counts, np.inf)
    return pairs.is_ordered(counts, min(STRONGEST, n / 5))

  def apart(self, pair: Pair) -> int:
    """Returns how far apart two photographs are in the order."""
    return abs(self._place[pair.a] - self._place[pair.b])

  @property
  def neighbours(self) -> int:
    """How far apart neighbours in the order are at most; they are no look-alikes."""
    return max(2, len(self.names) // 20)

  def _are_neighbours(self, pair: Pair) -> bool:
    return self.is_ordered and self.apart(pair) <= self.neighbours


def _read_pairs(db, name_of: dict[int, str]):
  ids, geometries = db.read_two_view_geometries()
  for pair_id, geometry in zip(ids, geometries):
    rows = np.asarray(geometry.inlier_matches)
    if len(rows) >= reconstruction.VERIFIED:
      a, b = reconstruction.colmap().pair_id_to_image_pair(pair_id)
      yield Pair(name_of[a], name_of[b], rows)


def pair_error(a: View, b: View, rows: np.ndarray) -> float:
  """Returns how far a model is from the matches of a pair, in focal lengths.

  The larger of the median distance from the epipolar lines and, where at least ten matches have 3D
  points, the median distance of a point of one photograph from its match in the other. The lines
  say little about cameras that move in a plane.

  Args:
    a, b: the photographs.
    rows: [m, 2], the features of a and of b that match.
  """
  errors = [epipolar_error(a.pose, b.pose, a.rays[rows[:, 0]], b.rays[rows[:, 1]])]
  for first, second, (i, j) in ((a, b, rows.T), (b, a, rows[:, ::-1].T)):
    local = first.points[i] @ second.pose[:, :3].T + second.pose[:, 3]  # [m, 3]
    local = np.where(local[:, 2:] > 1e-9, local, np.nan)
    apart = np.linalg.norm(local[:, :2] / local[:, 2:] - second.rays[j], axis=1)
    behind = np.isfinite(first.points[i, 0]) & np.isnan(local[:, 0])
    apart[behind] = np.inf
    if np.sum(~np.isnan(apart)) >= 10:
      errors.append(np.nanmedian(apart))
  return float(np.nanmax(errors))


def essential_matrix(rotation: np.ndarray, shift: np.ndarray) -> np.ndarray:
  """Returns E [3, 3] with b @ E @ a = 0 for a point at a in one camera and b in the other.

  Args:
    rotation, shift: [3, 3] and [3], b = rotation @ a + shift.
  """
  x, y, z = shift
  return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ rotation


def epipolar_error(
  pose_a: np.ndarray, pose_b: np.ndarray, rays_a: np.ndarray, rays_b: np.ndarray
) -> float:
  """Returns the median Sampson distance of matches from their epipolar lines, in focal lengths.

  Args:
    pose_a, pose_b: [3, 4], world to camera.
    rays_a, rays_b: [m, 2], matching directions in camera coordinates, at z = 1.
  """
  rotation = pose_b[:, :3] @ pose_a[:, :3].T
  shift = pose_b[:, 3] - rotation @ pose_a[:, 3]
  essential = essential_matrix(rotation, shift / max(np.linalg.norm(shift), 1e-12))
  rays_a, rays_b = (np.c_[rays, np.ones(len(rays))] for rays in (rays_a, rays_b))  # [m, 3]
  lines_b, lines_a = rays_a @ essential.T, rays_b @ essential  # [m, 3]
  slope = (lines_b[:, :2] ** 2).sum(1) + (lines_a[:, :2] ** 2).sum(1)
  distance = np.abs((rays_b * lines_b).sum(1)) / np.sqrt(np.maximum(slope, 1e-18))
  return float(np.nanmedian(distance))
