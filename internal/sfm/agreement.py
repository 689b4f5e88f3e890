"""Whether given poses agree with the matches of their photographs, before they are refined.

A match agrees if its second point lies near the epipolar line of its first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from .. import paths
from . import evidence, reconstruction
from .given import Given, camera_from_opengl
from .photos import PosesError

FEW = reconstruction.VERIFIED  # What fewer matches or points support is not verified.
_AGREES = 0.02  # A match agrees with two poses within this share of the longer side.
_CHANCE = 1.3  # Poses with which fewer matches agree than this times by chance are not refined,
_PLENTY = 0.5  # unless it is more than this: on a rail, shuffled cameras agree too.
_LIKELY = 0.8  # Poses in the right convention agree with more matches than this.
_SAMPLE_PAIRS, _SAMPLE_MATCHES = 400, 50


@dataclasses.dataclass(frozen=True)
class Matches:
  """A sample of the verified matches."""

  pairs: tuple  # ((name, camera id, xy [m, 2]) of either photograph, in pixels)

  @classmethod
  def sample(cls, db, cache) -> Matches:
    """Draws from a database and its DatabaseCache."""
    rng, result = np.random.default_rng(0), []
    ids, geometries = db.read_two_view_geometries()
    for k in rng.permutation(len(ids)):
      if len(geometries[k].inlier_matches) >= FEW and len(result) < _SAMPLE_PAIRS:
        pair = reconstruction.colmap().pair_id_to_image_pair(ids[k])
        chosen = rng.permutation(geometries[k].inlier_matches)[:_SAMPLE_MATCHES]  # [m, 2]
        images = [cache.image(i) for i in pair]
        keypoints = [db.read_keypoints(i)[:, :2].astype(float) for i in pair]
        result.append(
          [(im.name, im.camera_id, xy[rows]) for im, xy, rows in zip(images, keypoints, chosen.T)]
        )
    return cls(tuple(result))

  def agreement(self, poses: Mapping, cameras: Mapping) -> float | None:
    """Returns the share of matches that lie on each other's epipolar lines; None without any.

    Args:
      poses: pycolmap's, by name. Pairs without both count neither way.
      cameras: pycolmap's, by id.
    """
    agreed = total = 0
    for (first, camera_a, a), (second, camera_b, b) in self.pairs:
      if first in poses and second in poses:
        lenses = cameras[camera_a], cameras[camera_b]
        rays = [lens.cam_from_img(xy) for lens, xy in zip(lenses, (a, b))]
        side = max(max(lens.width, lens.height) / lens.mean_focal_length() for lens in lenses)
        distance = _epipolar(poses[second] * poses[first].inverse(), *rays)
        agreed += int((distance < _AGREES * side).sum())
        total += len(distance)
    return agreed / total if total else None


def _epipolar(second_from_first, a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns distances [m] of points b from the epipolar lines of a, both [m, 2] at depth 1."""
  rotation, shift = second_from_first.rotation.matrix(), second_from_first.translation
  essential = evidence.essential_matrix(rotation, shift)
  ones = np.ones((len(a), 1))
  lines = np.concatenate([a, ones], 1) @ essential.T  # [m, 3]
  signed = (lines * np.concatenate([b, ones], 1)).sum(-1)
  return np.abs(signed) / np.maximum(np.linalg.norm(lines[:, :2], axis=-1), 1e-12)


def check(given: Given, matches: Matches, before: Mapping, cameras: Mapping) -> float:
  """Returns the share of matches that agree with the given poses.

  Raises:
    PosesError: no more do than by chance, or far more would in another convention.
  """
  agreed = matches.agreement(before, cameras)
  if agreed is None:
    raise PosesError(
      f'{given.path}: no two photographs with poses have {FEW} verified matches. Are they the '
      'photographs of these poses?'
    )
  message = f'{given.path}: its poses contradict the photographs: {agreed:.0%} of the matches agree'
  for what, convert in paths.OTHER_CONVENTIONS.items():
    poses = {name: camera_from_opengl(convert(pose)) for name, pose in given.poses.items()}
    other = matches.agreement(poses, cameras)
    if other > _LIKELY and 1 - other < (1 - agreed) / 3:
      raise PosesError(f'{message}, and {other:.0%} if {what}. Convert the poses.')
  chance = _by_chance(matches, before, cameras)
  if agreed < min(_PLENTY, _CHANCE * chance):
    raise PosesError(
      f'{message}, and {chance:.0%} with these poses shuffled. Pose the photographs without --from.'
    )
  return agreed


def _by_chance(matches: Matches, poses: Mapping, cameras: Mapping) -> float:
  """Returns the mean share of matches that agree if the photographs swap their poses."""
  rng, names = np.random.default_rng(0), list(poses)
  shuffled = [dict(zip(rng.permutation(names).tolist(), poses.values())) for _ in range(3)]
  return float(np.mean([matches.agreement(table, cameras) for table in shuffled]))
