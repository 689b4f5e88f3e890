"""Similarities between poses, and cameras that follow others; the fit itself: refine_test."""

import numpy as np
import perturb_poses
from scipy.spatial import transform

from internal import alignment, paths


def ring(n, offset=0.0):
  """n cameras on a wavy circle that look at its centre."""
  angle = 2 * np.pi * (np.arange(n) + offset) / n
  positions = np.stack([np.cos(angle), np.sin(angle), 0.2 * np.cos(3 * angle)], -1)
  return np.stack([paths.viewmatrix(p, np.array([0.0, 0, 1]), p) for p in positions])


def test_an_alignment_takes_back_a_similarity_even_of_cameras_in_a_plane():
  turn = transform.Rotation.from_rotvec([0.4, -1.1, 2.0]).as_matrix()
  flat = ring(20) * np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
  for source in (ring(20), flat):
    rotations, centres = alignment.transform(source, 2.5, turn, np.array([1.0, -2, 3]))
    target = np.concatenate([rotations, centres[..., None]], -1)
    scale, rotation, shift = alignment.align(source, target)
    np.testing.assert_allclose(scale, 2.5, atol=1e-12)
    np.testing.assert_allclose(rotation, turn, atol=1e-12)
    np.testing.assert_allclose(shift, [1, -2, 3], atol=1e-12)
  mirrored = ring(20) * np.array([1, 1, -1])[:, None]
  assert np.linalg.det(alignment.align(ring(20), mirrored)[1]) > 0.99  # Never itself a mirror.


class TestFollow:
  def test_cameras_that_moved_each_on_its_own_are_followed_as_a_whole(self):
    source, rng = ring(60), np.random.default_rng(0)
    target = source.copy()
    target[:, :, 3] += 0.02 * rng.normal(size=(60, 3))
    moved, count = alignment.follow(source, target, ring(60, 0.5))
    assert count == 60
    np.testing.assert_allclose(moved[:, :, 3], ring(60, 0.5)[:, :, 3], atol=0.02)

  def test_cameras_that_moved_with_their_neighbours_are_followed_nearby(self):
    source, others = ring(60), ring(60, 0.5)

    def torn(poses):  # A loop that did not close: the drift grows along it.
      angle = np.arctan2(poses[:, 1, 3], poses[:, 0, 3]) % (2 * np.pi)
      poses = poses.copy()
      poses[:, :, 3] += 0.1 * angle[:, None] * [0.2, 0.5, 1]
      return poses

    moved, count = alignment.follow(source, torn(source), others)
    assert count == 8
    error = np.linalg.norm(moved[:, :, 3] - torn(others)[:, :, 3], axis=-1)
    whole = alignment.transform(others, *alignment.align(source, torn(source)))[1]
    before = np.linalg.norm(whole - torn(others)[:, :, 3], axis=-1)
    assert np.median(error) < 0.1 * np.median(before)

  def test_cameras_that_turned_in_their_own_axes_are_followed(self):
    """As where a principal point has moved: no similarity of the world does this to a ring."""
    turn = transform.Rotation.from_rotvec([0.004, 0.01, 0.002]).as_matrix()

    def turned(poses):
      centres = poses[:, :, 3:] + poses[:, :, :3] @ [[0.01], [0.02], [-0.01]]
      return np.concatenate([poses[:, :, :3] @ turn, centres], -1)

    moved, _ = alignment.follow(ring(60), turned(ring(60)), ring(60, 0.5))
    np.testing.assert_allclose(moved, turned(ring(60, 0.5)), atol=1e-3)
    whole = alignment.transform(ring(60, 0.5), *alignment.align(ring(60), turned(ring(60))))
    assert np.abs(whole[0] - turned(ring(60, 0.5))[:, :, :3]).max() > 5e-3


def test_perturbed_poses_are_off_by_what_was_asked_and_not_as_a_whole():
  poses = ring(40)
  moved = perturb_poses.perturb(poses, 1.0, 0.02, 0)
  turned, shifted = alignment.differences(moved[:, :, :3], moved[:, :, 3], poses)
  # Some more, some less, after what they have in common is taken away.
  np.testing.assert_allclose(np.median(np.degrees(turned)), 1, atol=0.2)
  np.testing.assert_allclose(np.median(shifted), 0.02, atol=0.005)
  scale, rotation, shift = alignment.align(moved, poses)
  np.testing.assert_allclose(scale, 1, atol=2e-3)
  np.testing.assert_allclose(rotation, np.eye(3), atol=2e-3)
  np.testing.assert_allclose(shift, 0, atol=2e-3)
  still = perturb_poses.perturb(poses, 0.0, 0.0, 0)
  np.testing.assert_allclose(still, poses, atol=1e-9)
