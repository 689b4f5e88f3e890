"""Tests of what tells two places that a model has folded into one."""

import numpy as np
import pose_scenes
import pytest
from evidence_test import carried, turn_and_shift, world_to_camera

from internal.sfm import folds

N = 12  # Photographs of either place.


def arc():
  angles = np.linspace(-0.4, 0.4, N)
  return [
    world_to_camera(pose_scenes.look_at([3 * np.cos(a), 3 * np.sin(a), 0.5], np.zeros(3)))
    for a in angles
  ]


def visible(pose, points):
  """Returns which points [p] are in a picture of 0.8 x 0.6 focal lengths."""
  local = points @ pose[:, :3].T + pose[:, 3]
  return (local[:, 2] > 0) & (np.abs(local[:, :2] / local[:, 2:]) < [0.4, 0.3]).all(1)


def capture(beside=400, repeatability=0.7):
  """Two places at one: a face that looks alike, with other things on its left in either.

  Returns:
    The pose, points and ids of 2 N photographs; the first half is of the first place.
  """
  rng = np.random.default_rng(0)
  face = rng.uniform((-0.1, -0.4, -1), (0.1, 1.2, 1), (1500, 3))
  left = rng.uniform((-0.1, -1.2, -1), (0.1, -0.4, 1), (2, beside, 3))
  result = []
  for k, pose in enumerate(arc() * 2):
    place = k // N
    world = np.r_[face, left[place]]
    numbers = np.r_[: len(face), len(face) + place * beside + np.arange(beside)]
    seen = visible(pose, world) & (rng.random(len(world)) < repeatability)
    result.append((pose, world[seen], numbers[seen]))
  return result


def moved(photograph, move, scale=1.0):
  pose, points, ids = photograph
  points = scale * (points @ move[:, :3].T + move[:, 3])
  return carried(pose, move) * [1, 1, 1, scale], points, ids


@pytest.mark.parametrize('repeatability', [0.9, 0.5])
def test_two_places_at_one_see_different_points(repeatability):
  photographs = capture(repeatability=repeatability)
  compared = folds._from_one_place(*list(zip(*photographs))[:2])
  across = np.mean([(i < N) != (j < N) for i, j in compared])
  assert 0.5 < across < 0.7
  assert folds.share_of_pairs(photographs) == pytest.approx(across)
  assert folds.share_of_pairs(photographs[:N]) == 0


def test_places_without_anything_of_their_own_are_not_told():
  assert folds.share_of_pairs(capture(beside=0)) == 0


def test_places_that_are_apart_in_the_model_are_not_compared():
  photographs = capture()
  apart = [moved(p, turn_and_shift(180)) for p in photographs[N:]]
  assert folds.share_of_pairs(photographs[:N] + apart) == 0


def test_the_world_and_its_scale_do_not_matter():
  photographs = capture()
  elsewhere = [moved(p, turn_and_shift(70, 2.0), 5.0) for p in photographs]
  expected = folds.share_of_pairs(photographs)
  assert folds.share_of_pairs(elsewhere) == pytest.approx(expected)


def test_cells_are_those_of_a_double_loop():
  poses, points, ids = zip(*capture())
  own, other = (folds._project(poses[3], points[k]) for k in (3, N + 3))
  smaller, common = folds._cells(own, other, np.isin(ids[N + 3], ids[3]))
  low, high = own.min(0), own.max(0)
  expected = []
  for row in range(6):
    for column in range(8):
      own_ids, other_ids = (
        {
          number
          for number, xy in zip(numbers, projected)
          if (low <= xy).all() and (xy <= high).all()
          if min(int((xy[0] - low[0]) / (high[0] - low[0]) * 8), 7) == column
          if min(int((xy[1] - low[1]) / (high[1] - low[1]) * 6), 5) == row
        }
        for numbers, projected in ((ids[3], own), (ids[N + 3], other))
      )
      if min(len(own_ids), len(other_ids)) >= 6:
        expected.append((min(len(own_ids), len(other_ids)), len(own_ids & other_ids)))
  assert list(zip(smaller, common)) == expected
  assert len(expected) > 30


@pytest.mark.parametrize(('count', 'points'), [(0, 9), (1, 9), (N, 0), (N, 1), (N, 40)])
def test_few_photographs_or_points_are_no_pairs(count, points):
  one = np.zeros((points, 3)), np.arange(points)
  assert folds.share_of_pairs([(pose, *one) for pose in arc()[:count]]) == 0
