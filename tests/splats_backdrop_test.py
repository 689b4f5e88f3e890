"""Tests of the background where no camera looked."""

import dataclasses

import jax
import numpy as np
import pytest
import trajectory_test

from internal import cameras, structs
from internal.splats import backdrop, gaussians, rasterizer, surfaces

SIZE = (64, 48)
_render = jax.jit(rasterizer.render, static_argnums=3)


def make_cams(n=12):
  """Cameras on the unit circle that look to its centre, 53 degrees high."""
  scene = trajectory_test.make_scene(n)
  matrix = np.float32([[1 / 48, 0, -32 / 48], [0, 1 / 48, -24 / 48], [0, 0, 1]])
  return dataclasses.replace(
    scene.cameras,
    pixtocam=np.repeat(matrix[None], n, 0),
    size=np.tile(SIZE, (n, 1)),
  )


def sky(directions):
  """Bluer upwards, redder to one side."""
  x, _, z = directions.T
  return np.stack([0.5 + 0.3 * x, np.full_like(x, 0.4), 0.6 + 0.3 * z], -1)


def shell_of(directions, colors):
  n = len(directions)
  sh = np.zeros((n, 16, 3), np.float32)
  sh[:, 0] = (colors - 0.5) / gaussians.SH_0
  return gaussians.Splats(
    means=np.float32(surfaces.SHELL * directions),
    log_scales=np.full((n, 3), np.log(0.06 * surfaces.SHELL), np.float32),
    quaternions=np.tile(np.float32([1, 0, 0, 0]), (n, 1)),
    opacity_logits=np.full(n, 5, np.float32),
    sh=sh,
  )


def looking(forward):
  """A wide camera at the centre."""
  forward = np.asarray(forward, float)
  right = np.cross(forward, [0, 0, 1] if abs(forward[2]) < 0.9 else [0, 1, 0])
  right /= np.linalg.norm(right)
  turn = np.stack([right, np.cross(forward, right), forward])
  return gaussians.Pinhole(
    np.full(2, 32, np.float32),
    np.float32([32, 24]),
    np.float32(turn),
    np.zeros(3, np.float32),
    SIZE,
  )


def draw(splats, camera, background=0):
  splats = jax.tree.map(np.float32, splats)
  return np.asarray(_render(splats, camera, np.full(3, background, np.float32), 2**15).rgb)


def test_directions_are_evenly_spread():
  for count in (1, 7, 500):
    directions = backdrop.sphere(count)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1)
  apart = np.linalg.norm(directions[:, None] - directions, axis=-1) + 9 * np.eye(500)
  assert (
    0.7 * backdrop._spacing(500)
    < apart.min(1).min()
    <= apart.min(1).max()
    < 1.1 * (backdrop._spacing(500))
  )


@pytest.mark.parametrize('most', [500, 100_000])
def test_unseen_is_what_lies_outside_all_pictures(most):
  gaps = backdrop.unseen(make_cams(), most)
  assert len(gaps) == min(700, most // 10)
  elevation = np.degrees(np.arcsin(backdrop.sphere(len(gaps))[:, 2]))
  # Pictures reach about 26.6 degrees up and down.
  margin = np.degrees(backdrop._spacing(len(gaps)))
  assert gaps[np.abs(elevation) > 26.6 + 1.5 * margin].all()
  assert not gaps[np.abs(elevation) < 18].any()
  assert not backdrop.unseen(make_cams(), 9).any()


def test_panoramas_see_everything():
  matrix = cameras.pixtocam_from_intrinsics(64 / (2 * np.pi), 32 / np.pi, 0, 0)
  cams = cameras.make_cameras(matrix, np.eye(3, 4)[None], (64, 32), lens=structs.PANORAMA)
  assert not backdrop.unseen(cams, 10**6).any()


class TestClosed:
  @pytest.fixture(scope='class')
  @classmethod
  def made(cls):
    """A shell where the cameras look, before and after closing, with dark things close by."""
    gaps = backdrop.unseen(make_cams(), 10**5)
    directions = backdrop.sphere(4000)
    around = np.abs(directions[:, 2]) < 0.45
    shell = shell_of(directions[around], sky(directions[around]))
    near = shell.replace(
      means=shell.means / 400, log_scales=np.full_like(shell.log_scales, -5.0), sh=0 * shell.sh - 1
    )
    splats = jax.tree.map(lambda *parts: np.concatenate(parts), shell, near)
    return splats, backdrop.closed(splats, gaps, np.zeros(3)), gaps

  def test_no_direction_is_empty_and_colours_go_on_smoothly(self, made):
    before, after, gaps = made
    assert len(after.means) == len(before.means) + gaps.sum()
    for forward in ([0, 0, 1], [0, 0, -1]):
      camera = looking(forward)
      assert np.median(draw(before, camera)) < 0.01
      black, white = draw(after, camera), draw(after, camera, 1)
      assert np.abs(white - black).max() < 0.05  # Opaque.
      edge = sky(np.array([[0.0, 0, 0.4 * forward[2]]]))[0]
      np.testing.assert_allclose(black[24, 32], edge, atol=0.06)
      steps = np.abs(np.diff(black, axis=1)).max(), np.abs(np.diff(black, axis=0)).max()
      assert max(steps) < 0.06

  def test_what_cameras_see_stays(self, made):
    before, after, _ = made
    camera = looking([1.0, 0, 0])
    middle = np.s_[12:36]  # 20 degrees up and down.
    np.testing.assert_allclose(draw(after, camera)[middle], draw(before, camera)[middle], atol=0.02)

  def test_without_gaps_nothing_is_added(self, made):
    before, _, gaps = made
    assert backdrop.closed(before, 0 * gaps > 0, np.zeros(3)) is before

  def test_nothing_known_is_grey(self):
    empty = shell_of(np.zeros((0, 3)), np.zeros((0, 3)))
    after = backdrop.closed(empty, np.ones(50, bool), np.zeros(3))
    assert len(after.means) == 50
    np.testing.assert_allclose(after.sh, 0)
