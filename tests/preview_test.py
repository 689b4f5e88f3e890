"""The preview of a path: where things are drawn, and its numbers."""

import dataclasses

import captures
import numpy as np
import pytest
import trajectory_test

from internal import configs
from internal.datasets import llff, sparse_points
from internal.rendering import preview, trajectory

RED = np.array([[255, 0, 0]], np.uint8)


def draw(points=None, scene=None, **config):
  scene = scene or trajectory_test.make_scene()
  config = configs.Config(**{'render_path_frames': 40, **config})
  cams, _ = trajectory.make_path(config, scene)
  return preview.draw(scene, cams, 20, points, 'test'), cams


def panels(picture):
  side, margin = preview._SIDE, preview._MARGIN
  for left in (margin, 2 * margin + side):
    yield picture[margin : margin + side, left : left + side].astype(int)


def test_points_are_drawn_from_above_and_from_the_side():
  empty, _ = draw()
  # The camera circle has radius 1 about (0, 0, 0), so the panel's middle is there, give or take.
  cloud = np.array([[0.1, 0.4, -0.5]]) + 0.01 * np.random.default_rng(0).normal(size=(300, 3))
  drawn, _ = draw((cloud, np.repeat(RED, 300, 0)))
  above, side = (
    np.argwhere(np.abs(a - b).sum(-1) > 50).mean(0) for a, b in zip(panels(empty), panels(drawn))
  )
  half = preview._SIDE / 2
  scale = (half - above[0]) / (0.4 - side_centre()[1])  # Pixels a unit.
  assert 0.2 * preview._SIDE < scale < 0.5 * preview._SIDE
  assert above[1] == pytest.approx(half + scale * (0.1 - side_centre()[0]), abs=6)
  assert side[1] == pytest.approx(above[1], abs=6)  # One horizontal axis.
  assert side[0] == pytest.approx(half + scale * (0.5 + side_centre()[2]), abs=10)


def side_centre():
  """The middle of the cameras, path and focus of make_scene."""
  scene = trajectory_test.make_scene()
  path = trajectory.make_path(configs.Config(render_path_frames=40), scene)[0].camtoworld
  places = [np.asarray(scene.cameras.camtoworld)[1:, :, 3], path[:, :, 3], np.zeros((1, 3))]
  places = np.concatenate(places)
  return (places.min(0) + places.max(0)) / 2


@pytest.mark.parametrize(
  'config',
  [
    {'render_camtype': 'panorama'},
    {'render_camtype': 'fisheye'},
    {'render_path_type': 'dolly', 'render_dolly_zoom': True},
    {'render_path_frames': 1},
  ],
)
def test_draws_all_kinds_of_paths_and_lenses(config):
  picture, _ = draw(**config)
  first, second = panels(picture)
  assert (first < 200).any(-1).sum() > 500
  assert (second < 200).any(-1).sum() > 500


def test_numbers_are_in_the_captures_units(monkeypatch):
  caption = []
  monkeypatch.setattr(preview, '_draw_foot', lambda sheet, lines: caption.extend(lines))
  scene = trajectory_test.make_scene()
  scene = dataclasses.replace(scene, world_transform=np.diag([0.5, 0.5, 0.5, 1]))
  _, cams = draw(scene=scene, render_path_type='orbit', render_path_frames=400)
  first, second, third = caption
  assert '400 frames, 20.0 s at 20 frames a second' in first
  assert '60 x 40, perspective, 62 x 42 degrees' in first
  length = 2 * np.pi * np.linalg.norm(np.asarray(cams.camtoworld)[0, :2, 3]) / 0.5
  assert float(second.split()[1]) == pytest.approx(length, rel=0.03)
  assert 'even steps' in second
  assert '7 training photos' in third
  draw(scene=scene, render_spline_keyframes='dir/img_1,dir/img_2,dir/img_7',
       render_spline_const_speed=False, render_spline_smoothness=0.0)  # fmt: skip
  assert 'times the usual' in caption[4]


@pytest.mark.parametrize(('x', 'rounded'), [(0.9, 0.5), (5.0, 5), (499.0, 200), (0.001, 0.001)])
def test_scales_are_round(x, rounded):
  assert preview._round_down(x) == pytest.approx(rounded)


class TestSparsePoints:
  def save(self, tmp_path, points, monkeypatch=None):
    captures.write_colmap(str(tmp_path), points=points)
    config = configs.Config(data_dir=str(tmp_path))
    scene = llff.load(config)
    sparse_points.save(str(tmp_path / 'run'), config, scene)
    return scene, sparse_points.load(str(tmp_path / 'run'))

  def test_come_back_in_the_normalised_world(self, tmp_path):
    points = np.random.default_rng(0).normal(size=(20, 3))
    scene, (xyz, rgb) = self.save(tmp_path, points)
    wanted = points @ scene.world_transform[:3, :3].T + scene.world_transform[:3, 3]
    np.testing.assert_allclose(xyz, wanted, atol=1e-5)
    np.testing.assert_array_equal(rgb, np.full((20, 3), 128))

  def test_number_is_limited(self, tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_points, '_MAX_POINTS', 10)
    _, (xyz, _) = self.save(tmp_path, np.random.default_rng(0).normal(size=(50, 3)))
    assert xyz.shape == (10, 3)
    assert len(np.unique(xyz, axis=0)) == 10

  def test_missing_or_damaged_files_give_none(self, tmp_path):
    assert self.save(tmp_path, ())[1] is None
    path = tmp_path / 'run' / sparse_points.FILE
    for content in (b'no array', b''):
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(content)
      assert sparse_points.load(str(tmp_path / 'run')) is None
    np.save(path, np.full((3, 6), np.nan))
    assert sparse_points.load(str(tmp_path / 'run')) is None
