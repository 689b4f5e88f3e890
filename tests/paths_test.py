"""Pose normalisation and camera paths, on synthetic captures."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from internal import paths


def orbit(n=40, seed=0, radius=(3.0, 2.0), target=(0.3, -0.2, -0.5)):
  """Returns jittered cameras around a target, in a randomly transformed world."""
  rng = np.random.default_rng(seed)
  angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
  position = np.stack(
    [radius[0] * np.cos(angle), radius[1] * np.sin(angle), rng.uniform(-0.3, 0.3, n)], -1
  )
  poses = np.stack([paths.viewmatrix(p - target, np.array([0, 0, 1.0]), p) for p in position])
  return poses, similarity(seed)


def similarity(seed):
  rng = np.random.default_rng(seed + 100)
  transform = np.eye(4)
  transform[:3, :3] = rng.uniform(0.5, 7) * Rotation.random(random_state=seed).as_matrix()
  transform[:3, 3] = rng.uniform(-20, 20, 3)
  return transform


def apply(transform, poses):
  scale = np.cbrt(np.linalg.det(transform[:3, :3]))
  moved = transform[:3] @ paths.pad_poses(poses)
  moved[..., :3] /= scale
  return moved


def forward_facing(n=20, seed=0):
  rng = np.random.default_rng(seed)
  position = rng.uniform([-1, -0.5, -0.1], [1, 0.5, 0.1], (n, 3))
  back = np.array([0, 0, 1]) + rng.normal(0, 0.05, (n, 3))
  up = np.array([0, 1, 0]) + rng.normal(0, 0.05, (n, 3))
  return np.stack([paths.viewmatrix(b, u, p) for b, u, p in zip(back, up, position)])


def assert_are_poses(poses):
  rotation = poses[..., :3]
  eye = np.broadcast_to(np.eye(3), rotation.shape)
  np.testing.assert_allclose(rotation @ np.swapaxes(rotation, -1, -2), eye, atol=1e-9)
  np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-9)


def test_viewmatrix_has_the_opengl_axes():
  pose = paths.viewmatrix(np.array([0, 0, 2.0]), np.array([0, 3.0, 1.0]), np.array([4, 5, 6.0]))
  np.testing.assert_allclose(pose, np.concatenate([np.eye(3), [[4], [5], [6]]], 1), atol=1e-12)


@pytest.mark.parametrize('axis', [[0, 0, 1.0], [0, -2.0, 0], [1.0, 1.0, 1.0]])
def test_viewmatrix_with_up_along_the_view(axis):
  assert_are_poses(paths.viewmatrix(np.array(axis), -3 * np.array(axis), np.zeros(3)))


@pytest.mark.parametrize('seed', range(4))
def test_pca_normalises(seed):
  poses, world = orbit(seed=seed)
  old = apply(world, poses)
  new, transform = paths.transform_poses_pca(old)
  np.testing.assert_allclose(apply(transform, old), new, atol=1e-9)
  assert_are_poses(new)
  assert np.linalg.det(transform) > 0
  np.testing.assert_array_equal(transform[3], [0, 0, 0, 1])
  assert transform[0, np.argmax(np.abs(transform[0, :3]))] > 0  # Independent of the eigensolver.
  position = new[:, :, 3]
  np.testing.assert_allclose(position.mean(0), 0, atol=1e-9)
  assert np.abs(position).max() == pytest.approx(1)
  scatter = position.T @ position
  np.testing.assert_allclose(scatter - np.diag(np.diag(scatter)), 0, atol=1e-9)
  assert np.all(np.diff(np.diag(scatter)) <= 0)
  assert new[:, 2, 1].mean() > 0.9  # These cameras stand upright on the plane they move in.


def test_points_transform_like_poses():
  poses, transform = orbit()[0], similarity(5)
  points = paths.transform_points(transform, poses[:, :, 3])
  np.testing.assert_allclose(points, paths.transform_poses(transform, poses)[:, :, 3], atol=1e-12)


def test_pca_of_a_normalised_world_changes_nothing():
  new, _ = paths.transform_poses_pca(apply(similarity(3), orbit(seed=3)[0]))
  again, transform = paths.transform_poses_pca(new)
  np.testing.assert_allclose(transform, np.eye(4), atol=1e-9)
  np.testing.assert_allclose(again, new, atol=1e-9)


def test_pca_does_not_depend_on_the_original_world():
  poses, _ = orbit(seed=5)
  new = [paths.transform_poses_pca(apply(similarity(s), poses))[0] for s in range(5)]
  for other in new[1:]:  # Up to half a turn about z, as the signs are fixed.
    turned = np.diag([-1, -1, 1]) @ other
    assert min(np.abs(new[0] - other).max(), np.abs(new[0] - turned).max()) < 1e-8


@pytest.mark.parametrize('direction', [[1.0, 0, 0], [0, 0, 1.0], [1, -2, 0.5]])
def test_pca_of_cameras_on_a_line_is_upright(direction):
  """On a line only one axis is defined; the cameras' up defines the others."""
  up = np.array([0.1, 0, 1.0])
  positions = np.linspace(-2, 5, 7)[:, None] * np.array(direction)
  old = np.stack([paths.viewmatrix(np.array([0.3, 1, 0]), up, p) for p in positions])
  new, transform = paths.transform_poses_pca(old)
  assert_are_poses(new)
  np.testing.assert_allclose(apply(transform, old), new, atol=1e-9)
  np.testing.assert_allclose(new[:, 1:, 3], 0, atol=1e-9)
  mean_up = new[:, :, 1].mean(0)
  assert mean_up[2] > 0
  np.testing.assert_allclose(mean_up[1], 0, atol=1e-9)


@pytest.mark.parametrize('n', [1, 5])
def test_pca_of_cameras_at_one_point_raises(n):
  poses = np.stack(
    [paths.viewmatrix(np.array([1.0, i, 0]), np.eye(3)[2], np.array([1e3, 2, 3])) for i in range(n)]
  )
  who = 'All 5 cameras stand' if n > 1 else 'The only camera stands'
  with pytest.raises(ValueError, match=rf'{who} at \[1000.0, 2.0, 3.0\]'):
    paths.transform_poses_pca(poses)


def test_recentering_makes_the_average_pose_the_axes():
  poses = apply(np.linalg.inv(similarity(2)), forward_facing())
  new, transform = paths.recenter_poses(poses)
  np.testing.assert_allclose(paths.average_pose(new), np.eye(3, 4), atol=1e-9)
  np.testing.assert_allclose(apply(transform, poses), new, atol=1e-9)
  assert np.linalg.det(transform) == pytest.approx(1)  # No scale.


def test_average_of_opposite_cameras_raises():
  poses = np.stack(
    [paths.viewmatrix(np.array([0, s, 0]), np.eye(3)[2], np.zeros(3)) for s in (1, -1)]
  )
  with pytest.raises(ValueError, match='opposite'):
    paths.recenter_poses(poses)


def test_focus_point_is_where_the_cameras_look():
  poses, _ = orbit()
  np.testing.assert_allclose(paths.focus_point(poses), [0.3, -0.2, -0.5], atol=1e-9)


def test_focus_point_minimises_the_distance_to_the_axes():
  poses, _ = orbit(n=9)
  rng = np.random.default_rng(0)
  poses[:, :, 3] += rng.normal(0, 0.2, (9, 3))

  def cost(point):
    offset = point - poses[:, :, 3]
    along = np.sum(offset * poses[:, :, 2], -1)
    return np.sum(offset**2) - np.sum(along**2)

  best = paths.focus_point(poses)
  for step in rng.normal(0, 0.01, (50, 3)):
    assert cost(best + step) > cost(best)


@pytest.mark.parametrize('n', [1, 6])
def test_focus_of_parallel_axes_lies_ahead(n):
  back = np.array([0.6, 0, 0.8])
  positions = np.random.default_rng(0).uniform(-1, 1, (n, 3))
  poses = np.stack([paths.viewmatrix(back, np.array([0, 1.0, 0]), p) for p in positions])
  offset = paths.focus_point(poses) - positions.mean(0)
  reach = np.linalg.norm(positions - positions.mean(0), axis=-1).max() if n > 1 else 1
  np.testing.assert_allclose(offset, -reach * back, atol=1e-9)
  path = paths.generate_ellipse_path(poses, 5)
  assert_are_poses(path)


def test_ellipse_circles_the_focus_at_constant_speed():
  poses, _ = paths.transform_poses_pca(orbit(n=60, radius=(5.0, 1.5))[0])
  path = paths.generate_ellipse_path(poses, 48)
  assert path.shape == (48, 3, 4)
  assert_are_poses(path)
  position, focus = path[:, :, 3], paths.focus_point(poses)
  np.testing.assert_allclose(position[:, 2], 0, atol=1e-12)
  half_axes = np.percentile(np.abs(poses[:, :2, 3] - focus[:2]), 90, axis=0)
  on_ellipse = np.sum(((position[:, :2] - focus[:2]) / half_axes) ** 2, -1)
  np.testing.assert_allclose(on_ellipse, 1, atol=1e-4)

  many = paths.generate_ellipse_path(poses, 500)[:, :, 3]
  steps = np.linalg.norm(many - np.roll(many, 1, axis=0), axis=-1)  # The closing one included.
  np.testing.assert_allclose(steps, steps.mean(), rtol=2e-3)


def test_ellipse_looks_at_the_focus_and_is_upright():
  poses, _ = paths.transform_poses_pca(orbit()[0])
  path = paths.generate_ellipse_path(poses, 12)
  focus = paths.focus_point(poses)
  to_focus = focus - path[:, :, 3]
  to_focus /= np.linalg.norm(to_focus, axis=-1, keepdims=True)
  np.testing.assert_allclose(-path[:, :, 2], to_focus, atol=1e-9)
  np.testing.assert_allclose(path[:, 2, 0], 0, atol=1e-9)  # The horizon is level.
  assert np.all(path[:, 2, 1] > 0)


def test_ellipse_up_is_the_world_axis_nearest_to_the_cameras():
  poses, _ = orbit()
  turned = apply(np.diag([1.0, -1, -1, 1]), poses)  # Upside down: up is -z.
  assert np.all(paths.generate_ellipse_path(turned, 6)[:, 2, 1] < 0)
  sideways = apply(np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]]), poses)
  path = paths.generate_ellipse_path(sideways, 6)
  np.testing.assert_allclose(path[:, 0, 0], 0, atol=1e-9)
  assert np.all(path[:, 0, 1] > 0)


def test_ellipse_swings_between_the_height_percentiles():
  poses, _ = paths.transform_poses_pca(orbit(n=80)[0])
  low, high = np.percentile(poses[:, 2, 3], [10, 90])
  height = paths.generate_ellipse_path(poses, 200, z_variation=1)[:, 2, 3]
  assert height[0] == pytest.approx(high)
  assert height.max() == pytest.approx(high)
  assert height.min() == pytest.approx(low, abs=1e-3)
  shifted = paths.generate_ellipse_path(poses, 200, z_variation=1, z_phase=0.5)[:, 2, 3]
  assert shifted[0] == pytest.approx(low)
  half = paths.generate_ellipse_path(poses, 200, z_variation=0.5)[:, 2, 3]
  assert half.max() == pytest.approx(high / 2)


def test_spiral_circles_the_average_pose_and_looks_at_one_point():
  poses = forward_facing(60)
  poses[:, :, 3] += [3, -2, 1]
  near, far = 1.5, 8.0
  path = paths.generate_spiral_path(poses, (near, far), n_frames=240)
  assert path.shape == (240, 3, 4)
  assert_are_poses(path)
  centre = paths.average_pose(poses)
  local = (path[:, :, 3] - centre[:, 3]) @ centre[:, :3]
  radii = np.percentile(np.abs((poses[:, :, 3] - centre[:, 3]) @ centre[:, :3]), 90, axis=0)
  np.testing.assert_allclose(np.abs(local).max(0), radii, rtol=1e-3)
  np.testing.assert_allclose(local[:120, :2], local[120:, :2], atol=1e-9)  # Two equal turns.
  turned = np.unwrap(np.arctan2(-local[:, 1] / radii[1], local[:, 0] / radii[0]))
  assert (turned[-1] - turned[0]) / (2 * np.pi) == pytest.approx(2 * 239 / 240)
  focus = paths.focus_point(path)
  depth = (centre[:, 3] - focus) @ centre[:, 2]
  np.testing.assert_allclose(focus, centre[:, 3] - depth * centre[:, 2], atol=1e-6)
  assert near < depth < 5 * far
  assert 1 / depth == pytest.approx(0.25 / (0.9 * near) + 0.75 / (5 * far), rel=1e-6)


def test_spiral_with_a_near_bound_of_zero_raises():
  with pytest.raises(ValueError, match=r'0 < near <= far, got 0\.0 and 3\.0'):
    paths.generate_spiral_path(forward_facing(), (0, 3))


def test_spline_without_smoothing_interpolates_its_keyframes():
  poses, _ = paths.transform_poses_pca(orbit(n=8)[0])
  path = paths.generate_spline_path(poses, 300, smoothness=0)
  assert path.shape == (300 * 7, 3, 4)
  assert_are_poses(path)
  nearest = np.abs(path[:, None] - poses[None]).max((2, 3))  # [frames, k]
  assert nearest.min(0).max() < 0.01
  assert np.all(np.diff(np.argmin(nearest, 0)) > 0)  # In the order of the path.
  np.testing.assert_allclose(path[[0, -1]], poses[[0, -1]], atol=1e-6)


def test_smoothness_smooths_the_spline():
  rng = np.random.default_rng(0)
  poses, _ = paths.transform_poses_pca(orbit(n=12)[0])
  poses[:, :, 3] += rng.normal(0, 0.05, (12, 3))

  def curvature(smoothness):
    positions = paths.generate_spline_path(poses, 30, smoothness=smoothness)[:, :, 3]
    return np.abs(np.diff(positions, 2, axis=0)).sum()

  assert curvature(0.3) < curvature(0.03) < curvature(0)
  path = paths.generate_spline_path(poses, 30)
  steps = np.linalg.norm(np.diff(path[:, :, 3], axis=0), axis=-1)
  assert steps.max() < 3 * steps.mean()


def test_spline_of_two_keyframes_is_a_straight_line():
  poses = orbit(n=8)[0][:2]
  path = paths.generate_spline_path(poses, 10)
  assert path.shape == (10, 3, 4)
  line = poses[1, :, 3] - poses[0, :, 3]
  offset = path[:, :, 3] - poses[0, :, 3]
  np.testing.assert_allclose(np.cross(offset, line), 0, atol=1e-9)


@pytest.mark.parametrize(
  ('keys', 'kwargs', 'message'),
  [
    ([0], {}, 'at least two keyframes'),
    ([0, 1, 1, 2], {}, 'Keyframes 1 and 2 of the spline path are the same'),
    ([0, 1], {'degree': 6}, '1 to 5, got 6'),
    ([0, 1], {'n_interp': 0}, 'at least one frame, got 0'),
  ],
)
def test_spline_with_invalid_arguments_raises(keys, kwargs, message):
  with pytest.raises(ValueError, match=message):
    paths.generate_spline_path(orbit(n=5)[0][keys], **{'n_interp': 5, **kwargs})


def test_poses_of_another_shape_or_with_nan_raise():
  with pytest.raises(ValueError, match=r'Poses must be \[n, 3, 4\] with n > 0, got \[2, 4, 4\]'):
    paths.focus_point(np.zeros((2, 4, 4)))
  poses = orbit(n=5)[0]
  poses[3, 1, 1] = np.nan
  with pytest.raises(ValueError, match='Pose 3 contains NaN'):
    paths.transform_poses_pca(poses)


def test_constant_speed_includes_rotation_and_translation():
  rng = np.random.default_rng(3)
  poses, _ = paths.transform_poses_pca(orbit(n=7)[0])
  poses[:, :, 3] *= rng.uniform(0.5, 2, (7, 1))  # Gaps of different lengths.
  reach = np.median(np.linalg.norm(poses[:, :, 3] - paths.focus_point(poses), axis=-1))
  for closed in (False, True):
    path = paths.generate_spline_path(poses, 60, smoothness=0, const_speed=True, closed=closed)
    assert_are_poses(path)
    steps = paths.motion_steps(path, reach)
    assert steps.max() < 1.02 * steps.min()
    plain = paths.motion_steps(paths.generate_spline_path(poses, 60, smoothness=0), reach)
    assert plain.max() > 1.5 * plain.min()
    nearest = np.abs(path[:, None] - poses[None]).max((2, 3)).min(0)
    assert nearest.max() < 0.03  # The path passes all keyframes, possibly between frames.
    if closed:
      again = paths.motion_steps(path[[-1, 0]], reach)
      assert again[0] == pytest.approx(steps.mean(), rel=0.02)
      np.testing.assert_allclose(path[0], poses[0], atol=1e-6)


def test_motion_of_a_rotation_and_of_a_translation():
  angle = 0.01
  turn = Rotation.from_rotvec([0, 0, angle]).as_matrix()
  still, turned = np.eye(4)[:3], np.concatenate([turn, np.zeros((3, 1))], 1)
  assert paths.motion_steps(np.stack([still, turned]), 5.0)[0] == pytest.approx(0.05, rel=1e-3)
  both = np.concatenate([turn, [[0.03], [0], [0.04]]], 1)
  step = paths.motion_steps(np.stack([still, both]), 5.0)[0]
  assert step == pytest.approx(np.hypot(0.05, 0.05), rel=1e-3)


def test_a_closed_spline_with_equal_ends_raises():
  poses = orbit(n=5)[0]
  with pytest.raises(ValueError, match='Keyframes 3 and 0 of the spline path are the same'):
    paths.generate_spline_path(poses[[0, 1, 2, 0]], 5, closed=True)


@pytest.mark.parametrize('seed', range(3))
def test_poses_round_trip_through_a_similarity(seed):
  poses, world = orbit(seed=seed)
  moved = paths.transform_poses(world, poses)
  assert_are_poses(moved)
  np.testing.assert_allclose(moved, apply(world, poses), atol=1e-9)
  np.testing.assert_allclose(paths.transform_poses(np.linalg.inv(world), moved), poses, atol=1e-9)


def test_mirrored_or_scaled_poses_are_not_rigid():
  poses = np.tile(np.eye(4)[:3], (4, 1, 1))
  poses[1, :, 0] *= -1
  poses[2, :, :3] *= 1.1
  poses[3, 0, 1] = np.nan
  np.testing.assert_array_equal(paths.are_rigid(poses), [True, False, False, False])
