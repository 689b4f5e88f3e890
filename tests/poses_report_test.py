"""Tests of the report on a posed capture, and of the comparison of poses."""

import dataclasses
import json

import captures
import compare_poses
import numpy as np
import pytest
import scipy.sparse
from PIL import Image
from textured_corner import VIEWS, room_pose, true_model, turns

from internal import colmap
from internal.commands import poses as command
from internal.sfm import diagnosis, evidence, picture, pipeline, preflight


def test_errors_of_poses_are_in_degrees_and_shares_of_the_radius():
  truth = true_model()
  images = dict(truth.images)
  pose = room_pose(turns(VIEWS)[3])
  angle = np.radians(2)
  about_x = [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
  pose[:, :3] = pose[:, :3] @ np.array(about_x)
  images[4] = colmap.Image(4, *captures.to_colmap(pose), 1, images[4].name)
  del images[9]
  found = compare_poses.compare(colmap.Model(truth.cameras, images, truth.points), truth)
  assert found.only_second == ('view_8.png',)
  assert not found.only_first
  worst = found.names[int(found.rotation.argmax())]
  assert worst == 'view_3.png'
  assert abs(found.rotation.max() - 2) < 1e-6
  assert np.median(found.rotation) < 1e-5
  assert found.position.max() < 1e-6
  assert '| rotation, degrees | 0.000 | 0.400 | 2.000 |' in compare_poses.table(found)
  assert compare_poses.as_json(found)['photographs'][0].keys() >= {'name', 'rotation_degrees'}


def test_models_of_other_pictures_cannot_be_compared():
  truth = true_model()
  two = {k: truth.images[k] for k in (1, 2)}
  with pytest.raises(ValueError, match='share 2 photographs'):
    compare_poses.compare(colmap.Model(truth.cameras, two, truth.points), truth)


def test_compare_poses_prints_a_table(tmp_path, capsys):
  folders = [str(tmp_path / name) for name in 'ab']
  for folder in folders:
    colmap.write_model(folder, true_model())
  compare_poses.main([*folders, '--json', str(tmp_path / 'out.json')])
  said = capsys.readouterr().out
  assert '10 photographs in both' in said
  assert '| position, % of the radius | 0.000 |' in said
  assert json.loads((tmp_path / 'out.json').read_text())['scale'] == pytest.approx(1)


# The report.


def row(**kwargs):
  given = {'name': 'a', 'model': None, 'features': 3000, 'partners': 5, 'matches': 80}
  return diagnosis.Row(**{**given, **kwargs})


@pytest.mark.parametrize(
  ('photo', 'words'),
  [
    (row(model=0), None),
    (row(model=2), 'in a separate model of 7 photographs'),
    (row(sharpness=0.1, features=20), 'blurred: 10%'),
    (row(features=20, matches=3), 'too few features: 20'),
    (row(matches=3), 'too few matches: at most 3'),
    (row(), 'no consistent pose: up to 80 matches with 5 photographs'),
  ],
)
def test_failures_are_explained(photo, words):
  said = diagnosis.explain(photo, (40, 9, 7))
  assert said is words or words in said


def test_photographs_that_failed_alike_are_listed_together(monkeypatch, capsys):
  failed = {'a.jpg': 'dark', 'b.jpg': 'blurred: 9%', 'c.jpg': 'dark'}
  report = {'checks': [], 'refinement': None, 'failed': failed, 'capture': None, 'cameras': []}
  monkeypatch.setattr(pipeline, 'make', lambda *_: report)
  command.main(['photos', 'scene'])
  said = capsys.readouterr().out
  assert "  failed  'a.jpg', 'c.jpg': dark\n  failed  'b.jpg': blurred: 9%\n" in said


def ring(n=24, reach=360.0, outwards=False, tilt=0.3):
  """Cameras on a part of a circle, camera to world [n, 3, 4]."""
  result = []
  for turn in np.radians(np.arange(n) * reach / n):
    position = np.array([3 * np.cos(turn), 3 * np.sin(turn), 1.0])
    back = np.array([np.cos(turn), np.sin(turn), 0]) * (-1 if outwards else 1) + [0, 0, tilt]
    back /= np.linalg.norm(back)
    right = np.cross([0, 0, 1], back)
    right /= np.linalg.norm(right)
    result.append(np.stack([right, np.cross(back, right), back, position], 1))
  return np.array(result)


def test_the_spread_of_a_capture_is_told():
  assert diagnosis.describe_spread(ring()) == {
    'kind': 'around',
    'directions': 360,
    'largest_gap': 15,
    'tilt': [-17, -17],
  }
  assert diagnosis.describe_spread(ring(outwards=True))['kind'] == 'outwards'
  half = diagnosis.describe_spread(ring(reach=150))
  assert half['kind'] == 'arc'
  assert half['largest_gap'] == 216
  assert half['directions'] == 144
  assert diagnosis.describe_spread(ring(reach=40))['kind'] == 'forward'


@pytest.mark.parametrize('seed', range(4))
def test_the_world_is_levelled(seed):
  turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
  turn *= np.sign(np.linalg.det(turn))
  poses_in = ring()
  tilted = np.concatenate([turn @ poses_in[:, :, :3], turn @ poses_in[:, :, 3:] + 5], -1)
  level, move = diagnosis._level(tilted)
  np.testing.assert_allclose(level[:, 2, 3], level[0, 2, 3], atol=1e-9)
  np.testing.assert_allclose(level[:, 2, 1], poses_in[:, 2, 1], atol=1e-9)  # Up is up.
  np.testing.assert_allclose(level[:, :2, 3].mean(0), 0, atol=1e-9)
  np.testing.assert_allclose(move[:3, :3] @ move[:3, :3].T, np.eye(3), atol=1e-12)
  wall = np.repeat(np.eye(3, 4)[None], 5, 0)  # All look one way, side by side.
  wall[:, 0, 3] = np.arange(5)
  level, _ = diagnosis._level(wall)
  np.testing.assert_allclose(level[:, :, 1], [[0, 0, 1]] * 5, atol=1e-9)


def weakest(shared):
  return diagnosis.weakest_link(scipy.sparse.csr_matrix(shared))


def test_the_weakest_link_is_where_a_model_tears():
  shared = np.zeros((20, 20), int)
  for part in (range(8), range(8, 20)):
    for i in part:
      for j in part:
        shared[i, j] = 500 - 20 * abs(i - j)
  shared[7, 8] = shared[8, 7] = 40
  shared[3, 12] = shared[12, 3] = 25
  count, link, side = weakest(shared)
  assert count == 40
  assert sorted(link) == [7, 8]
  assert sorted([side.sum(), (~side).sum()]) == [8, 12]
  shared[19, :] = shared[:, 19] = 0
  shared[19, 18] = shared[18, 19] = 3  # One photograph that hangs on by little tears nothing.
  assert weakest(shared)[0] == 40
  assert weakest(np.zeros((1, 1), int)) is None


def findings(**kwargs):
  level = ring()
  rows = tuple(row(name=f'{k}.jpg', model=0, points=900, error=0.5) for k in range(24))
  camera = {
    'model': 'OPENCV',
    'photographs': 24,
    'size': [4000, 3000],
    'focal': [3000.0, 3000.0],
    'off_centre': [4.0, -3.0],
    'view_degrees': 67.0,
    'exif_focal': 2950.0,
  }
  given = {
    'rows': rows,
    'model_sizes': (24,),
    'poses': level,
    'xyz': np.random.default_rng(0).normal(size=(500, 3)),
    'rgb': np.full((500, 3), 200, np.uint8),
    'error': 1.1,
    'track_length': 5.0,
    'cameras': (camera,),
    'spread': diagnosis.describe_spread(level),
    'weakest_link': {'shared_points': 400, 'between': ['a', 'b'], 'photographs': [12, 12]},
    'evidence': evidence.Evidence(120, (), 0, 0.01),
    'mapping': {'mapper': 'global', 'attempts': [{}]},
    'factor': 4,
  }
  return diagnosis.Findings(**{**given, **kwargs})


def graded(name, **kwargs):
  checks = preflight.all_checks(findings(**kwargs))
  return next(c for c in checks if c.name == name)


def test_a_good_capture_passes_all_checks():
  assert {check.status for check in preflight.all_checks(findings())} == {preflight.GOOD}


def test_each_check_can_fail():
  camera = findings().cameras[0]
  lost = tuple(row(name=f'{k}', reason='x') for k in range(30))
  assert graded('posed', rows=findings().rows + lost).status == preflight.BAD
  assert graded('reprojection error', error=9.0).status == preflight.BAD
  assert graded('reprojection error', error=4.0, factor=4).status == preflight.DOUBTFUL
  poor = tuple(row(name=f'{k}', model=0, points=40) for k in range(24))
  assert graded('points', rows=poor).status == preflight.BAD
  assert graded('focal length', cameras=({**camera, 'view_degrees': 5},)).status == preflight.BAD
  square = {**camera, 'focal': [3000.0, 2800.0]}
  assert 'stretched' in graded('focal length', cameras=(square,)).text
  cropped = {**camera, 'off_centre': [-20.4, 38.2]}
  assert 'its axis is 20 px left, 38 px below' in graded('focal length', cameras=(cropped,)).text
  assert 'axis' not in graded('focal length').text
  odd = graded('focal length', cameras=({**camera, 'exif_focal': 2000.0},))
  assert odd.status == preflight.BAD
  assert 'EXIF says 2000' in odd.text
  parallel = {'poses': ring(reach=5), 'cameras': ({**camera, 'exif_focal': None},)}
  assert 'a guess' in graded('focal length', **parallel).text
  assert graded('focal length', poses=ring(reach=5)).status == preflight.GOOD
  assert graded('focal length', cameras=parallel['cameras']).status == preflight.GOOD
  arc = diagnosis.describe_spread(ring(reach=150))
  assert graded('spread', spread=arc).status == preflight.DOUBTFUL
  whole = {'kind': 'around', 'directions': 360, 'largest_gap': 15}
  assert graded('spread', spread=whole).text == (
    'looking inwards, on all sides; the largest gap is 15 degrees'
  )
  gap = graded('spread', spread={'kind': 'around', 'directions': 288, 'largest_gap': 72})
  assert gap.text == 'looking inwards, over 288 of 360 degrees; the largest gap is 72 degrees'
  assert gap.status == preflight.DOUBTFUL
  link = {'shared_points': 20, 'between': ['a', 'b'], 'photographs': [12, 12]}
  torn = graded('weakest link', weakest_link=link)
  assert torn.status == preflight.BAD
  assert 'torn' in torn.text
  soft = tuple(row(name=f'{k}', model=0, points=900, sharpness=0.2) for k in range(24))
  assert graded('sharpness', rows=soft).status == preflight.BAD


def test_the_picture_shows_points_cameras_and_failures(tmp_path):
  (tmp_path / 'images').mkdir()
  Image.fromarray(np.full((30, 40, 3), (10, 200, 30), np.uint8)).save(tmp_path / 'images/lost.png')
  red = np.full((500, 3), (255, 0, 0), np.uint8)
  drawn = {}
  for name, rows in (('all', findings().rows), ('one lost', (*findings().rows, row(
    name='lost.png', reason='too few matches')))):  # fmt: skip
    found = findings(rows=rows, rgb=red)
    drawn[name] = picture.draw(str(tmp_path), found, preflight.all_checks(found)).astype(int)
  whole = drawn['all']
  from_above = whole[110:750, 28:988]
  # The points are at the middle of the ring, so of the picture.
  at_points = (from_above[..., 0] > 120) & (from_above[..., 1] < 60) & (from_above[..., 2] < 60)
  y, x = np.argwhere(at_points).mean(0)
  assert at_points.sum() > 200
  assert abs(y - 320) < 25
  assert abs(x - 480) < 25
  lost = drawn['one lost']
  assert len(lost) > len(whole)
  green = (lost[..., 1] > 180) & (lost[..., 0] < 40) & (lost[..., 2] < 60)
  assert green[len(whole) :].sum() > 250
  assert not green[: len(whole) - 60].any()


def test_the_picture_lists_the_captures_warnings(tmp_path):
  checks = preflight.all_checks(findings())
  amber = picture._STATUS['doubtful']
  heights = []
  for count in (0, 8, 9, 30):
    warnings = [f'{k}: {"a mask that pairs with no photograph " * 8}' for k in range(count)]
    drawn = picture.draw(str(tmp_path), findings(), checks, warnings).astype(int)
    marks = (np.abs(drawn - amber).max(-1) < 3)[:, 28:70].any(1)
    # Each of the first eight has a mark of its own, and so has the line that counts the others.
    assert np.diff(marks.astype(int), prepend=0).clip(0).sum() >= min(count, 9)
    heights.append(len(drawn))
  assert heights[0] < heights[1] < heights[2] == heights[3]


def test_the_report_has_the_captures_warnings(tmp_path, monkeypatch):
  captures.write_colmap(tmp_path, n=4)
  load = preflight.datasets.load_dataset

  def warned(*args, **kwargs):
    scene = load(*args, **kwargs)
    return dataclasses.replace(scene, report={**scene.report, 'warnings': ['3 masks are unused']})

  monkeypatch.setattr(preflight.datasets, 'load_dataset', warned)
  monkeypatch.setattr(diagnosis, 'examine', lambda *_: findings(factor=0))
  drawn = []
  monkeypatch.setattr(
    picture, 'draw', lambda *args: drawn.append(args) or np.zeros((4, 4, 3), np.uint8)
  )
  assert preflight.write(str(tmp_path), ())['capture']['warnings'] == ['3 masks are unused']
  assert drawn[0][3] == ['3 masks are unused']


@pytest.mark.parametrize(
  ('in_order', 'status', 'says'),
  [(0, preflight.DOUBTFUL, 'places that look alike'), (1, preflight.BAD, 'doubled or torn')],
)
def test_contradicted_pairs_are_named(in_order, status, says):
  found = evidence.Evidence(200, (('a.jpg', 'b.jpg'), ('c.jpg', 'd.jpg')), in_order, 0.02)
  tried = {'mapper': 'incremental', 'attempts': [{}, {}]}
  check = graded('matches', evidence=found, mapping=tried)
  assert check.status == status
  assert check.text.startswith('2 of the 200 strongest pairs contradict the poses (a.jpg and b.jpg')
  assert says in check.text
  assert check.text.endswith('best of 2 ways, incremental')


@pytest.mark.parametrize(
  ('found', 'says'),
  [
    (
      evidence.Evidence(200, (), 0, 0.0, (('a.jpg', 'b.jpg'), ('c.jpg', 'd.jpg'))),
      'b.jpg follows a.jpg but shows something else (and 1 more jump). Two places that look alike',
    ),
    (
      evidence.Evidence(200, (), 0, 0.0, (('a.jpg', 'b.jpg'),) * 3),
      'b.jpg follows a.jpg but shows something else (and 2 more jumps). Two places that look alike',
    ),
    (
      evidence.Evidence(200, (), 0, 0.0, (('a.jpg', 'b.jpg'),)),
      'b.jpg follows a.jpg but shows something else. Two places that look alike',
    ),
    (
      evidence.Evidence(200, (), 0, 0.0, (), 0.3),
      '30% of the pairs of photographs from one place see different things. Two places that look',
    ),
    (evidence.Evidence(0, (), 0, 0.0), 'no pair of photographs has enough matches'),
  ],
)
def test_poses_that_matches_cannot_tell_are_doubtful(found, says):
  check = graded('matches', evidence=found)
  assert check.status == preflight.DOUBTFUL
  assert check.text.startswith(says)
