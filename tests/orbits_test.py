"""Paths around the focus: their properties, in randomly rotated and scaled worlds."""

import numpy as np
import paths_test
import pytest

from internal import paths
from internal.rendering import orbits


@pytest.fixture(params=range(3))
def poses(request):
  cams, world = paths_test.orbit(seed=request.param)
  return paths.transform_poses(world, cams)


def about(poses, path):
  """Positions of a path relative to the focus point, and heights over it along mean up."""
  offsets = path[:, :, 3] - paths.focus_point(poses)
  return offsets, offsets @ orbits.mean_up(poses)


def assert_looks_at_the_focus(poses, path):
  paths_test.assert_are_poses(path)
  offsets, _ = about(poses, path)
  cosine = (path[:, :, 2] * offsets).sum(-1) / np.linalg.norm(offsets, axis=-1)
  np.testing.assert_allclose(cosine, 1, atol=1e-9)
  np.testing.assert_allclose(path[:, :, 0] @ orbits.mean_up(poses), 0, atol=1e-9)  # Level.


def test_orbit_is_a_closed_circle_at_constant_speed(poses):
  path = orbits.generate_orbit_path(poses, 36, elevation=25, radius=1.5)
  assert_looks_at_the_focus(poses, path)
  offsets, heights = about(poses, path)
  distances = np.linalg.norm(poses[:, :, 3] - paths.focus_point(poses), axis=-1)
  np.testing.assert_allclose(np.linalg.norm(offsets, axis=-1), 1.5 * np.median(distances))
  np.testing.assert_allclose(heights, np.linalg.norm(offsets[0]) * np.sin(np.radians(25)))
  ring = np.concatenate([path, path[:1]])[:, :, 3]
  steps = np.linalg.norm(np.diff(ring, axis=0), axis=-1)
  np.testing.assert_allclose(steps, steps[0])
  around = np.cross(offsets[0], offsets[1]) @ orbits.mean_up(poses)
  assert around > 0  # Anticlockwise, seen from above.


def test_orbit_starts_on_the_first_cameras_side_at_the_cameras_elevation(poses):
  path = orbits.generate_orbit_path(poses, 8)
  first, heights = about(poses, poses)
  offsets, own = about(poses, path)
  elevation = np.arcsin(heights / np.linalg.norm(first, axis=-1))
  np.testing.assert_allclose(
    own / np.linalg.norm(offsets, axis=-1), np.sin(np.median(elevation)), atol=1e-9
  )
  up = orbits.mean_up(poses)
  assert abs(np.cross(first[0], offsets[0]) @ up) < 1e-6 * np.linalg.norm(first[0]) ** 2
  assert (first[0] - heights[0] * up) @ offsets[0] > 0


def test_helix_rises_at_constant_speed(poses):
  path = orbits.generate_helix_path(poses, 200, n_rots=2)
  assert_looks_at_the_focus(poses, path)
  offsets, heights = about(poses, path)
  assert np.all(np.diff(heights) > 0)
  steps = np.linalg.norm(np.diff(offsets, axis=0), axis=-1)
  assert steps.max() < 1.01 * steps.min()
  up = orbits.mean_up(poses)
  flat = offsets - heights[:, None] * up
  cosine = (flat[1:] * flat[:-1]).sum(-1) / np.linalg.norm(flat[1:], axis=-1)
  turned = np.arccos(np.clip(cosine / np.linalg.norm(flat[:-1], axis=-1), -1, 1)).sum()
  assert turned == pytest.approx(4 * np.pi, rel=1e-3)


@pytest.mark.parametrize('distance', [0.5, -1.0])
def test_dolly_is_straight_and_returns_depths(poses, distance):
  path, depths = orbits.generate_dolly_path(poses, poses[3], 11, distance)
  np.testing.assert_array_equal(path[:, :, :3], np.tile(poses[3, :, :3], (11, 1, 1)))
  np.testing.assert_allclose(path[0], poses[3])
  way = path[:, :, 3] - poses[3, :, 3]
  np.testing.assert_allclose(np.cross(way, poses[3, :, 2]), 0, atol=1e-9)
  depth = ((path[:, :, 3] - paths.focus_point(poses)) * poses[3, :, 2]).sum(-1)
  np.testing.assert_allclose(depth / depth[0], depths, atol=1e-9)
  assert depths[-1] == pytest.approx(1 - distance)


def test_level_turns_about_the_position():
  up = np.array([0.0, 0, 1])
  tilted = paths.viewmatrix(np.array([1.0, 0, 1]), up, np.array([4.0, 5, 6]))
  down = paths.viewmatrix(up, np.array([0.0, 1, 0]), np.zeros(3))  # Upper edge of the picture: y.
  flat = orbits.level(np.stack([tilted, down]), up)
  paths_test.assert_are_poses(flat)
  np.testing.assert_allclose(flat[:, :, 1], [up, up], atol=1e-12)
  np.testing.assert_allclose(flat[0, :, 2:], np.array([[1, 4], [0, 5], [0, 6]]), atol=1e-12)
  np.testing.assert_allclose(flat[1, :, 2], [0, -1, 0], atol=1e-12)


def test_invalid_arguments_are_errors():
  poses = paths_test.orbit()[0]
  with pytest.raises(ValueError, match='-89 to 89 degrees, got 90'):
    orbits.generate_orbit_path(poses, 5, elevation=90)
  with pytest.raises(ValueError, match=r'radius must be positive, got 0\.0'):
    orbits.generate_orbit_path(poses, 5, radius=0.0)
  with pytest.raises(ValueError, match='at least one frame, got 0'):
    orbits.generate_helix_path(poses, 0)
  with pytest.raises(ValueError, match=r'below 0\.99.*got 1\.5'):
    orbits.generate_dolly_path(poses, poses[0], 5, 1.5)
  away = poses[0].copy()
  away[:, :3] *= [-1, 1, -1]
  with pytest.raises(ValueError, match='focus of the cameras in front of it'):
    orbits.generate_dolly_path(poses, away, 5)
  outward = poses.copy()
  outward[:, :, 3] = 0
  with pytest.raises(ValueError, match='all at the point that they look at'):
    orbits.generate_orbit_path(outward, 5)
