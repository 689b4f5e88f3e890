"""Sharpening of coarse pictures: a scene of planes, seen by cameras whose pictures are known."""

import numpy as np
import pytest

from internal import paths
from internal.viewer import reprojection

SIZE, FOV = (160, 96), 0.9


def see(pose, size=SIZE, fov=FOV, screen=True):
  """Draws a textured wall at z = -4, in front of it a red screen at z = -2, x in [-0.3, 0.3]."""
  rays = reprojection._rays(size, fov).astype(np.float64) @ pose[:, :3].T
  wall = (-4 - pose[2, 3]) / rays[..., 2]
  at = pose[:, 3] + wall[..., None] * rays
  image = np.stack([128 + 100 * np.sin(9 * at[..., 0]), 128 + 100 * np.cos(7 * at[..., 1]),
                    np.full(wall.shape, 60)], -1)  # fmt: skip
  depth = wall
  near = (-2 - pose[2, 3]) / rays[..., 2]
  covered = screen & (np.abs((pose[:, 3] + near[..., None] * rays)[..., 0]) < 0.3)
  image = np.where(covered[..., None], [250, 0, 0], image)
  return image.astype(np.uint8), np.where(covered, near, depth)


def camera(x=0.0, turn=0.0):
  pose = np.eye(3, 4)
  pose[:, :3] = paths.viewmatrix(np.array([np.sin(turn), 0, np.cos(turn)]), np.array([0, 1.0, 0]),
                                 np.zeros(3))[:, :3]  # fmt: skip
  pose[0, 3] = x
  return pose


def sharpen(pose, reference_pose, coarse=8, screen=True):
  small = tuple(side // coarse for side in SIZE)
  image, depth = see(pose, small, screen=screen)
  reference = reprojection.Reference(*see(reference_pose, screen=screen), reference_pose, FOV)
  return reprojection.sharpened(image, depth, pose, FOV, SIZE, reference)


def test_the_same_view_is_the_reference():
  image, depth, coverage = sharpen(camera(), camera())
  want, distance = see(camera())
  assert coverage > 0.95
  np.testing.assert_array_equal(image[:, :50], want[:, :50])  # Left of the screen's edge.
  np.testing.assert_allclose(depth[:, :50], distance[:, :50], rtol=1e-5)


@pytest.mark.parametrize('moved', [{'x': 0.3}, {'turn': 0.15}, {'x': -0.4, 'turn': 0.1}])
def test_a_moved_camera_sees_the_wall_as_sharp_as_the_reference(moved):
  image, depth, coverage = sharpen(camera(**moved), camera(), screen=False)
  want, distance = see(camera(**moved), screen=False)
  assert coverage > 0.7
  error = np.abs(image.astype(float) - want).mean(-1)
  blurred, _ = see(camera(**moved), tuple(side // 8 for side in SIZE), screen=False)
  blurred = np.repeat(np.repeat(blurred, 8, 0), 8, 1)
  assert np.median(error) < 6  # Half a pixel of the texture.
  assert np.median(error) < 0.3 * np.median(np.abs(blurred.astype(float) - want).mean(-1))
  np.testing.assert_allclose(np.median(depth / distance), 1, atol=0.01)


def test_what_was_hidden_is_not_taken_from_what_hid_it():
  """Behind the screen the reference shows the screen; the coarse picture shows the wall there."""
  pose = camera(x=0.6)
  image, _, _ = sharpen(pose, camera(), coarse=4)
  _, depth = see(pose)
  wall = depth > 3
  clear = wall & ~_near_an_edge(wall, 5)
  red = (image[..., 0] > 200) & (image[..., 1] < 20)
  assert red[clear].mean() < 0.005
  screen = ~wall & ~_near_an_edge(wall, 5)
  assert red[screen].mean() > 0.99


def _near_an_edge(mask, reach):
  return sum(
    (np.roll(mask, k, axis=1) != mask).astype(int) for k in range(-reach, reach + 1)
  ).astype(bool)


def test_the_sky_has_no_depth_to_agree_on():
  """Depths of the sky are anything large, and those along another axis differ."""
  pose, rng = camera(turn=0.3), np.random.default_rng(0)
  texture, _ = see(camera(), screen=False)
  sky = 10 ** rng.uniform(3, 6, texture.shape[:2])
  reference = reprojection.Reference(texture, sky, camera(), FOV)
  coarse = np.full((12, 20, 3), 77, np.uint8)
  image, _, coverage = reprojection.sharpened(
    coarse, np.full((12, 20), 1e6), pose, FOV, SIZE, reference
  )
  columns = np.arange(SIZE[0]) + 0.5 - SIZE[0] / 2
  focal = SIZE[1] / 2 / np.tan(FOV / 2)
  at = focal * np.tan(np.arctan(columns / focal) + np.arctan2(*(pose[[0, 2], 2] * [-1, 1])))
  inside = np.abs(at) < SIZE[0] / 2 - 1
  row = SIZE[1] // 2
  assert coverage == pytest.approx(inside.mean(), abs=0.1)
  want = texture[row, np.floor(at[inside] + SIZE[0] / 2).astype(int)]
  np.testing.assert_allclose(image[row, inside], want, atol=12)  # A pixel's difference.


def test_what_the_reference_did_not_see_stays_coarse():
  back = camera(turn=np.pi)
  coarse = np.full((12, 20, 3), 77, np.uint8)
  reference = reprojection.Reference(*see(camera()), camera(), FOV)
  image, depth, coverage = reprojection.sharpened(
    coarse, np.full((12, 20), 5.0), back, FOV, SIZE, reference
  )
  assert coverage == 0
  assert (image == 77).all()
  assert (depth == 5).all()
  assert image.shape == (96, 160, 3)
