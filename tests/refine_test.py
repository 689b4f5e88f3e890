"""Tests of the refinement of given poses, on renderings of a textured room with known cameras."""

import json
import shutil
from types import SimpleNamespace

import captures
import numpy as np
import pytest
from PIL import Image
from textured_corner import FOCAL, SIZE, VIEWS, render_room, room_pose, turns

from internal import alignment, colmap, paths
from internal.commands import poses as command
from internal.datasets import images
from internal.sfm import given, moved, pipeline, refine

NAMES = [f'view_{k}.png' for k in range(VIEWS)]
TRUTH = np.stack([room_pose(turn) for turn in turns(VIEWS)])
GREY, LATE = 'view_10.png', 'view_11.png'  # Nothing to match; no given pose.
LATE_POSE = room_pose(np.radians(43))


def turned(pose, axis, degrees):
  """Turns a pose about an axis of the world, in place of its position."""
  x, y, z = np.asarray(axis) / np.linalg.norm(axis)
  cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
  angle = np.radians(degrees)
  turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
  return np.concatenate([turn @ pose[:, :3], pose[:, 3:]], 1)


def perturbed(poses, degrees=1.0, share=0.02, seed=0):
  """Turns each pose by `degrees` and moves it by a share of the radius, in random directions."""
  rng = np.random.default_rng(seed)
  result = []
  for pose in poses:
    axis, shift = rng.normal(size=(2, 3))
    pose = turned(pose, axis, degrees)
    pose[:, 3] += share * alignment.radius(poses) * shift / np.linalg.norm(shift)
    result.append(pose)
  return np.stack(result)


def write_transforms(path, poses, focal=FOCAL, names=NAMES, **keys):
  frames = [
    {'file_path': f'images/{name}', 'transform_matrix': np.vstack([pose, [0, 0, 0, 1]]).tolist()}
    for name, pose in zip(names, poses)
  ]
  table = {'w': SIZE[0], 'h': SIZE[1], 'fl_x': focal, 'camera_model': 'SIMPLE_PINHOLE', **keys}
  path.write_text(json.dumps({**table, 'frames': frames}))
  return str(path)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
  """Photographs of the room, a grey one, and one more of the room that will have no pose."""
  folder = tmp_path_factory.mktemp('given') / 'images'
  folder.mkdir()
  for name, pose in zip([*NAMES, LATE], [*TRUTH, LATE_POSE]):
    Image.fromarray(render_room(pose)).save(folder / name)
  Image.fromarray(np.full((SIZE[1], SIZE[0], 3), 90, np.uint8)).save(folder / GREY)
  return folder


@pytest.fixture(scope='module')
def refined(photographs):
  """The capture, the given poses, and the report; view_4 was given a pose that looks elsewhere."""
  poses = perturbed(TRUTH)
  poses[4] = turned(poses[4], [0, 0, 1], 70)
  root = photographs.parent
  path = write_transforms(
    root / 'transforms.json', [*poses, TRUTH[0]], 1.03 * FOCAL, [*NAMES, GREY]
  )
  report = pipeline.make(str(photographs), str(root / 'scene'), pipeline.Options(given=path))
  return root / 'scene', poses, report


def test_points_by_chance_do_not_support_a_pose():
  points = {1: 1500, 2: 15, 3: 25, 4: 85, 5: 15, 6: 14}
  matches = {(1, 2): 100, (1, 3): 1700, (1, 4): 1600, (2, 5): 200, (5, 6): 40, (1, 9): 99999}
  images = {k: SimpleNamespace(image_id=k, name=f'{k}', num_points3D=n) for k, n in points.items()}
  model = SimpleNamespace(reg_image_ids=lambda: list(images), image=images.get)
  graph = SimpleNamespace(
    num_matches_between_images=lambda a, b: matches.get((min(a, b), max(a, b)), 0)
  )
  adjuster = refine._Adjuster.__new__(refine._Adjuster)
  adjuster._matches = graph
  # Of its best pair, 3 has 1.5%, 4 has 5.3%; 6 has too few. 9 is not registered.
  assert adjuster.observed(model) == {'1', '2', '4', '5'}


def read_poses(scene):
  model = colmap.read_model(str(scene / 'sparse' / '0'))
  return {image.name: colmap.camera_to_world(image) for image in model.images.values()}, model


def errors(poses, truth):
  """Degrees and shares of the radius after alignment, both [n]."""
  aligned = alignment.transform(poses, *alignment.align(poses, truth))
  rotation, position = alignment.differences(*aligned, truth)
  return np.degrees(rotation), position


def test_refined_poses_have_a_small_fraction_of_the_error(refined):
  scene, poses, _ = refined
  found, model = read_poses(scene)
  others = [k for k in range(VIEWS) if k != 4]
  before = errors(poses[others], TRUTH[others])
  after = errors(np.stack([found[name] for name in [*NAMES, LATE]]), np.stack([*TRUTH, LATE_POSE]))
  assert after[0].max() < 0.1 * np.median(before[0])
  assert after[1].max() < 0.15 * np.median(before[1])
  (camera,) = model.cameras.values()
  assert camera.model == 'SIMPLE_PINHOLE'
  assert abs(camera.params[0] / FOCAL - 1) < 0.01


def test_the_given_world_and_scale_are_kept(refined):
  scene, poses, report = refined
  found, _ = read_poses(scene)
  last = np.stack([found[name] for name in NAMES])
  scale, rotation, shift = alignment.align(last, poses)
  assert abs(scale - 1) < 0.01
  np.testing.assert_allclose(rotation, np.eye(3), atol=0.01)
  np.testing.assert_allclose(shift, 0, atol=0.02 * alignment.radius(poses))
  assert report['capture']['images_registered'] == VIEWS + 2


def test_the_report_says_how_far_cameras_moved(refined):
  _, _, report = refined
  found = report['refinement']
  assert (found['given'], found['verified']) == (VIEWS + 1, VIEWS)
  assert found['unverified'] == [GREY]
  assert found['registered'] == [LATE]
  assert 0.5 < found['rotation_degrees']['median'] < 2
  assert 0.01 < found['position_share']['median'] < 0.04
  assert 60 < found['rotation_degrees']['max'] < 80
  assert found['per_photograph'][0]['name'] == 'view_4.png'
  assert found['error_after'] < 0.3 < 1.5 < found['error_before'] < 6
  assert found['agreement_before'] < 0.9 < 0.99 < found['agreement_after']
  (camera,) = found['cameras']
  assert camera['focal_before'] == pytest.approx(1.03 * FOCAL)
  assert abs(camera['focal_after'] / FOCAL - 1) < 0.01
  assert {'given poses', 'refinement'} <= {check['name'] for check in report['checks']}
  assert not any('EXIF' in check['text'] for check in report['checks'])
  said = '\n'.join(moved.lines(found))
  assert 'moved  view_4.png' in said
  assert f"1 not verified by matches, given pose kept: '{GREY}'" in said
  assert f"1 posed that had no given pose: '{LATE}'" in said


def test_a_pose_without_matches_stays_as_given(refined):
  found, _ = read_poses(refined[0])
  np.testing.assert_allclose(found[GREY], TRUTH[0], atol=1e-9)


def test_a_refined_capture_is_not_computed_again(refined, photographs, monkeypatch, capsys):
  scene, _, report = refined

  def never(*_):
    raise AssertionError('was done before')

  monkeypatch.setattr(refine, 'refine', never)
  path = str(photographs.parent / 'transforms.json')
  command.main([str(photographs), str(scene), '--from', path])
  assert json.loads((scene / 'preflight.json').read_text()) == report
  said = capsys.readouterr().out
  assert f'Given poses of {path}' in said
  assert 'percent of the radius' in said


def with_poses(refined, tmp_path, path, **changes):
  """Refines other poses with the features and matches of `refined`; returns capture and report."""
  folder = tmp_path / 'scene'
  shutil.copytree(refined[0], folder)
  shutil.rmtree(folder / 'sparse')
  state = json.loads((folder / 'poses.json').read_text())
  state['asked'] |= {'given': path, **changes}
  (folder / 'poses.json').write_text(json.dumps(state))
  options = pipeline.Options(given=path, **changes)
  return folder, pipeline.make(state['asked']['source'], str(folder), options)


def test_a_colmap_model_with_fixed_intrinsics(refined, tmp_path):
  camera = colmap.Camera(7, 'OPENCV', *SIZE, (FOCAL, FOCAL, 128, 96, 0.001, 0, 0.001, 0))
  views = {
    k + 1: colmap.Image(k + 1, *captures.to_colmap(pose), 7, name)
    for k, (name, pose) in enumerate(zip(NAMES, perturbed(TRUTH, seed=1)))
  }
  model = colmap.Model({7: camera}, views, colmap.make_points())
  colmap.write_model(str(tmp_path / 'sparse'), model, '.bin')
  folder, report = with_poses(refined, tmp_path, str(tmp_path / 'sparse'), fix_intrinsics=True)
  found, written = read_poses(folder)
  assert errors(np.stack([found[name] for name in NAMES]), TRUTH)[0].max() < 0.15
  assert report['refinement']['cameras'][0]['kept']
  assert camera.params in [c.params for c in written.cameras.values()]
  assert set(report['refinement']['registered']) == {LATE}


@pytest.mark.parametrize(
  ('convert', 'words'),
  [
    (lambda pose: pose * [1, -1, -1, 1], r'x right, y down, z forward \(OpenCV\)'),
    (lambda pose: paths._inverse(pose * [1, -1, -1, 1]), r'world to camera \(OpenCV\)'),
  ],
)
def test_poses_in_another_convention_are_recognised(refined, tmp_path, convert, words):
  path = write_transforms(tmp_path / 'transforms.json', [convert(pose) for pose in TRUTH])
  with pytest.raises(pipeline.PosesError, match=f'contradict the photographs: .*{words}'):
    with_poses(refined, tmp_path, path)


def test_poses_of_other_photographs_are_refused(refined, tmp_path):
  mixed = TRUTH[[5, 8, 2, 9, 0, 7, 1, 3, 6, 4]]
  mixed = [turned(pose, [0, 1, 2], 40 * k) for k, pose in enumerate(mixed)]
  path = write_transforms(tmp_path / 'transforms.json', mixed)
  with pytest.raises(
    pipeline.PosesError, match=r'contradict .* shuffled\. Pose the photographs without'
  ):
    with_poses(refined, tmp_path, path)


def test_names_find_their_photographs(tmp_path):
  def frame(name):
    return given.frames_lib.Frame(name, '', name, None, SIZE, TRUTH[0], 'PINHOLE')

  def find(names, photos):
    frames = [frame(name) for name in names]
    found = given.find_photographs('t.json', frames, '/data/me/images', photos)
    return {photo: f.name for photo, f in found.items()}

  assert find(
    ['./images/A.JPG', 'images/b', '/other/images/c.png', 'left/d.jpg', 'images/right/d.jpg'],
    ['a.jpg', 'b.png', 'c.jpeg', 'left/d.jpg', 'right/d.jpg'],
  ) == {
    'a.jpg': './images/A.JPG',
    'b.png': 'images/b',
    'c.jpeg': '/other/images/c.png',
    'left/d.jpg': 'left/d.jpg',
    'right/d.jpg': 'images/right/d.jpg',
  }
  with pytest.raises(pipeline.PosesError, match=r"'d\.jpg' may be 'left/d\.jpg', 'right/d\.jpg'"):
    find(['d.jpg'], ['left/d.jpg', 'right/d.jpg'])
  with pytest.raises(pipeline.PosesError, match='1 of its 2 poses have a photograph'):
    find(['a.jpg', 'x.jpg'], ['a.jpg', 'b.jpg'])


def test_exif_turns_only_what_its_pose_did_not_see_as_stored(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  for name in ('stored', 'upright', 'other'):
    Image.new('RGB', (40, 30)).save(tmp_path / f'{name}.jpg', exif=exif)
  sizes = {'stored.jpg': (80, 60), 'upright.jpg': (30, 40), 'other.jpg': (40, 30)}
  frames = [
    given.frames_lib.Frame(name, '', name, None, size, TRUTH[0], 'PINHOLE')
    for name, size in sizes.items()
  ]
  found = given.posed_as_stored('t.json', frames, str(tmp_path))
  assert found == {'stored.jpg', 'other.jpg'}
  frames[2] = given.dataclasses.replace(frames[2], size=(40, 40))
  with pytest.raises(pipeline.PosesError, match=r'other\.jpg: is 40x30 pixels, .* has 40x40'):
    given.posed_as_stored('t.json', frames, str(tmp_path))


def test_cameras_are_scaled_to_their_photographs_and_shared():
  def frame(focal, model='OPENCV', distortion=(0.0,) * 6, other=None):
    lens = given.colmap.Intrinsics(focal, other or focal, 52, 38, distortion, 0)
    return given.frames_lib.Frame('a', '', 'a', lens, (100, 80), TRUTH[0], model)

  camera = given._camera(frame(90), (200, 160), None)
  assert (camera.model, camera.params) == ('RADIAL', (180, 104, 76, 0, 0))
  camera = given._camera(frame(90, other=99), (200, 160), None)
  assert (camera.model, camera.params[:4]) == ('OPENCV', (180, 198, 104, 76))
  tangential = given._camera(frame(90, distortion=(0.1, 0, 0, 0, 0.2, 0)), (100, 80), None)
  assert (tangential.model, tangential.params[4:]) == ('OPENCV', (0.1, 0, 0.2, 0))
  assert given._camera(frame(90, 'PINHOLE'), (100, 80), 'OPENCV').model == 'OPENCV'


def test_near_cameras_that_look_the_same_way_are_paired():
  back = TRUTH.copy()
  back[:, :, 0] *= -1
  back[:, :, 2] *= -1  # Looks away from the corner.
  names = [f'{k}' for k in range(21)]  # The last has no pose.
  poses = dict(zip(names, np.concatenate([TRUTH, back])))
  pairs = given.near_pairs(names, given.Given('', poses, {}, {}), count=2)
  assert (0, 1) in pairs
  assert (10, 11) in pairs
  assert not any(i < 10 <= j for i, j in pairs)
  assert all(abs(i - j) <= 2 for i, j in pairs)


def test_cameras_on_a_line_are_aligned_by_their_axes_too():
  line = np.stack([np.concatenate([np.eye(3), [[x], [0], [0]]], 1) for x in (0, 1, 2.5, 3)])
  pose = turned(line[0], [1, 2, 3], 50)
  turn = pose[:, :3]
  target = np.concatenate([turn @ line[:, :, :3], 2 * turn @ line[:, :, 3:]], 2)
  scale, rotation, shift = alignment.align(line, target)
  assert abs(scale - 2) < 1e-9
  np.testing.assert_allclose(rotation, turn, atol=1e-9)
  np.testing.assert_allclose(shift, 0, atol=1e-9)


def test_what_cannot_be_refined_is_a_one_line_error(photographs, tmp_path):
  def fails(words, error=pipeline.PosesError, source=photographs, **options):
    with pytest.raises(error, match=words) as raised:
      pipeline.make(str(source), str(tmp_path / 'scene'), pipeline.Options(**options))
    assert '\n' not in str(raised.value)

  fails('no poses there', given=str(tmp_path / 'nothing'))
  fails('add it', fix_intrinsics=True)
  (tmp_path / 'video.mp4').touch()
  fails('not a video', source=tmp_path / 'video.mp4', given=str(tmp_path))
  path = write_transforms(tmp_path / 'transforms.json', TRUTH[:2])
  fails('has 2 poses; at least 3', given=path)
  write_transforms(tmp_path / 'transforms.json', TRUTH, names=[f'x{k}' for k in range(VIEWS)])
  fails('0 of its 10 poses have a photograph', given=str(tmp_path))
  (tmp_path / 'transforms.json').write_text('{"frames": []}')
  fails("list of 'frames' is empty", images.DataError, given=str(tmp_path))
