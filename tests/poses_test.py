"""Tests of pose estimation on renderings of a textured room, whose cameras are known."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import sys
from pathlib import Path

import compare_poses
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image
from textured_corner import FOCAL, SIZE, VIEWS, render_room, room_pose, true_model, turns

from internal import colmap, configs, datasets
from internal.datasets import images
from internal.sfm import incremental, mapping, pairs, principal_point, reconstruction
from internal.sfm import photos as photos_lib
from internal.sfm import pipeline as pipeline_lib


@pytest.fixture(scope='session')
def room(tmp_path_factory):
  """A folder of photographs of the room: ten good ones, a blurred one and a uniformly grey one."""
  folder = tmp_path_factory.mktemp('room')
  for k, turn in enumerate(turns(VIEWS)):
    Image.fromarray(render_room(room_pose(turn))).save(folder / f'view_{k}.png')
  blurred = scipy.ndimage.gaussian_filter(render_room(room_pose(0.8)), (7, 7, 0))
  Image.fromarray(blurred).save(folder / 'view_10.png')
  Image.fromarray(np.full((SIZE[1], SIZE[0], 3), 90, np.uint8)).save(folder / 'view_11.png')
  return folder


def make_until(source, scene, module, name, after):
  """Runs `make`; kills the process when the function is called for the (after + 1)-th time."""
  modules = {'photos': photos_lib, 'pycolmap': reconstruction.colmap(), 'incremental': incremental}
  module = modules[module]
  original, calls = getattr(module, name), []

  def patched(*args, **kwargs):
    calls.append(1)
    if len(calls) > after:
      os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

  setattr(module, name, patched)
  reconstruction._FEATURES_AT_ONCE, incremental._SNAPSHOT_SECONDS = 8, 0
  pipeline_lib.make(str(source), str(scene))


def make_until_some_match(source, scene):
  """Runs `make`; kills the process when some pairs are matched."""
  original = reconstruction._count_matched

  def patched(db):
    count = original(db)
    if count:
      os.kill(os.getpid(), signal.SIGKILL)
    return count

  reconstruction._PAIRS_AT_ONCE, reconstruction._POLL_SECONDS = 4, 0.01
  reconstruction._count_matched = patched
  pipeline_lib.make(str(source), str(scene))


@pytest.fixture(scope='session')
def scene(room, tmp_path_factory):
  """The capture after four runs that were killed, one in each stage, and the progress of each."""
  folder = tmp_path_factory.mktemp('scene') / 'room'
  progress = {}
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['internal.sfm.pipeline', 'poses_test'])  # One import for all.

  def kill(*args, target=make_until):
    process = context.Process(target=target, args=(room, folder, *args))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL

  kill('photos', '_copy', 5)
  progress['photographs'] = sorted(os.listdir(folder / 'images'))
  kill('pycolmap', 'extract_features', 1)
  with reconstruction.database(folder) as db:
    progress['features'] = db.num_keypoints()
  kill(target=make_until_some_match)
  with reconstruction.database(folder) as db:
    progress['pairs'] = db.num_matched_image_pairs()
  kill('incremental', '_save_snapshot', 7)
  progress['attempts'] = sorted(n for n in os.listdir(folder / '.mapping') if not n.isdigit())
  newest, snapshots = incremental._newest_snapshot, []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      incremental,
      '_newest_snapshot',
      lambda *args: snapshots.append(newest(*args)) or snapshots[-1],
    )
    progress['report'] = pipeline_lib.make(str(room), str(folder))
  progress['snapshots'] = snapshots
  return folder, progress


def test_poses_are_those_of_the_cameras(scene):
  folder, _ = scene
  found = compare_poses.compare(colmap.read_model(str(folder / 'sparse' / '0')), true_model())
  assert len(found.names) == VIEWS
  assert not found.only_first
  assert found.rotation.max() < 0.3
  assert found.position.max() < 0.02
  camera = next(iter(colmap.read_model(str(folder / 'sparse' / '0')).cameras.values()))
  assert camera.model == 'SIMPLE_RADIAL'
  assert abs(camera.params[0] / FOCAL - 1) < 0.03


def test_a_killed_run_is_resumed_at_each_stage(scene):
  folder, progress = scene
  assert 0 < len(progress['photographs']) < VIEWS + 2  # None of them half-written:
  assert all(name.startswith('view_') and name.endswith('.png') for name in progress['photographs'])
  with reconstruction.database(folder) as db:
    assert 0 < progress['features'] < db.num_keypoints()
    assert 0 < progress['pairs'] < db.num_matched_image_pairs()
  assert progress['attempts'] == ['global']
  assert progress['snapshots'] == [str(folder / '.mapping' / '000006')]
  assert not (folder / '.mapping').exists()


def test_a_finished_capture_is_not_computed_again(scene, room, monkeypatch):
  folder, _ = scene
  before = {path: path.stat().st_mtime_ns for path in folder.rglob('*.bin')}

  def never(*_, **__):
    raise AssertionError('was done before')

  monkeypatch.setattr(photos_lib, '_import_photo', never)
  for name in ('extract_features', 'match_image_pairs', 'IncrementalPipeline', 'global_mapping'):
    monkeypatch.setattr(reconstruction.colmap(), name, never)
  pipeline_lib.make(str(room), str(folder))
  assert before
  assert {p: p.stat().st_mtime_ns for p in folder.rglob('*.bin')} == before


def test_the_capture_loads_at_every_factor(scene):
  folder, _ = scene
  for factor, width in ((0, 256), (2, 128), (4, 64), (8, 32)):
    loaded = datasets.load_dataset(configs.Config(data_dir=str(folder), factor=factor), True)
    assert loaded.report['folder_to_be_made'] is None
    assert loaded.cameras.size[0].tolist() == [width, width * 3 // 4]


def test_the_report_gives_reasons_for_failures(scene):
  folder, progress = scene
  report = json.loads((folder / 'preflight.json').read_text())
  assert report == progress['report']
  assert (report['photographs'], report['posed'], report['factor']) == (12, VIEWS, 0)
  assert set(report['failed']) == {'view_10.png', 'view_11.png'}
  assert 'blurred' in report['failed']['view_10.png']
  assert report['reprojection_error'] < 0.8
  errors = [row['error'] for row in report['per_photograph'] if row['model'] == 0]
  assert np.mean(errors) == pytest.approx(report['reprojection_error'], rel=0.2)
  assert report['capture']['images_unregistered'] == ['images/view_10.png', 'images/view_11.png']
  assert {check['name'] for check in report['checks']} >= {'posed', 'focal length', 'spread'}
  picture_file = Image.open(folder / 'preflight.png')
  assert picture_file.format == 'PNG'
  assert picture_file.width == 1600


def test_the_largest_model_comes_first(monkeypatch, tmp_path):
  class FakeModel:
    def __init__(self, images):
      self._images = images

    def num_reg_images(self):
      return self._images

    def reg_image_ids(self):
      return []

    def num_points3D(self):
      return 1

    def point3D_ids(self):
      return []

    def write_binary(self, folder):
      Path(folder, 'images.bin').write_text(str(self._images))

  manager = type('Manager', (), {'size': lambda _: 3, 'get': lambda _, k: FakeModel((4, 9, 6)[k])})
  pipeline = type(
    'Pipeline', (), {'__init__': lambda *_: None, 'add_callback': lambda *_: 0, 'run': lambda _: 0}
  )
  monkeypatch.setattr(reconstruction.colmap(), 'ReconstructionManager', manager)
  monkeypatch.setattr(reconstruction.colmap(), 'IncrementalPipeline', pipeline)
  reconstruction.database(tmp_path).close()
  monkeypatch.setattr(principal_point, 'refine', lambda model: (model, [{'camera': 1}]))
  pipeline_lib._reconstruct(str(tmp_path), [], 1, 'incremental')
  written = [(tmp_path / 'sparse' / str(k) / 'images.bin').read_text() for k in range(3)]
  assert written == ['9', '6', '4']
  stamp = json.loads((tmp_path / 'sparse' / mapping.STAMP).read_text())
  assert stamp['principal_points'] == [{'camera': 1}]


def test_a_missing_colmap_says_what_to_install(monkeypatch, room, tmp_path):
  monkeypatch.setitem(sys.modules, 'pycolmap', None)
  with pytest.raises(pipeline_lib.PosesError, match=r'pip install -r requirements-poses\.txt'):
    pipeline_lib.make(str(room), str(tmp_path / 'scene'))
  assert not (tmp_path / 'scene').exists()


def test_a_capture_is_locked(scene, room):
  folder, _ = scene
  with (
    pipeline_lib._locked(str(folder)),
    pytest.raises(pipeline_lib.PosesError, match='another run is working on this capture'),
  ):
    pipeline_lib.make(str(room), str(folder))
  assert not (folder / '.incoming').exists()


def test_photographs_can_be_added_later(tmp_path, scene, room):
  folder, photos = tmp_path / 'scene', tmp_path / 'photos'
  shutil.copytree(scene[0], folder)
  shutil.copytree(room, photos)
  state = json.loads((folder / 'poses.json').read_text())
  state['asked']['source'] = os.path.realpath(photos)
  (folder / 'poses.json').write_text(json.dumps(state))
  Image.fromarray(render_room(room_pose(np.radians(43)))).save(photos / 'view_12.png')
  report = pipeline_lib.make(str(photos), str(folder))
  assert (report['photographs'], report['posed']) == (13, VIEWS + 1)
  assert len(images.list_images(str(folder / 'images_2'))) == 13
  with reconstruction.database(folder) as db:
    assert db.num_cameras() == 1  # The new one was taken by the same camera.
  (photos / 'view_3.png').unlink()
  with pytest.raises(pipeline_lib.PosesError, match=r'view_3\.png: has been changed or removed'):
    pipeline_lib.make(str(photos), str(folder))


def test_without_a_pose_there_is_an_error_and_a_report(tmp_path):
  (tmp_path / 'photos').mkdir()
  for k in range(3):
    noise = np.random.default_rng(k).integers(0, 256, (64, 80, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / 'photos' / f'{k} ö.png')
  with pytest.raises(pipeline_lib.PosesError, match='None of the 3 photographs could be posed'):
    pipeline_lib.make(str(tmp_path / 'photos'), str(tmp_path / 'scene'))
  report = json.loads((tmp_path / 'scene' / 'preflight.json').read_text())
  assert report['posed'] == 0
  assert len(report['failed']) == 3
  assert (tmp_path / 'scene' / 'preflight.png').is_file()


def test_masked_areas_have_no_features(tmp_path, room):
  photos, masks = tmp_path / 'photos', tmp_path / 'masks'
  photos.mkdir()
  masks.mkdir()
  for k in range(2):
    shutil.copy(room / f'view_{k}.png', photos)
  mask = np.full((SIZE[1], SIZE[0]), 255, np.uint8)
  mask[:, :128] = 0
  Image.fromarray(mask).save(masks / 'view_0.png')
  imported = photos_lib.import_photos(str(photos), str(tmp_path / 'scene'), str(masks))
  reconstruction.extract_features(str(tmp_path / 'scene'), imported, None)
  ids = reconstruction.image_ids(str(tmp_path / 'scene'))
  with reconstruction.database(tmp_path / 'scene') as db:
    across = [db.read_keypoints(ids[f'view_{k}.png'])[:, 0] for k in range(2)]
  assert across[0].min() >= 127
  assert len(across[0]) > 50
  assert across[1].min() < 60  # It has no mask.


def test_bad_input_is_a_one_line_error(tmp_path, room):
  def fails(source, scene, words, **kwargs):
    with pytest.raises((pipeline_lib.PosesError, OSError, ValueError), match=words) as error:
      pipeline_lib.make(str(source), str(scene), pipeline_lib.Options(**kwargs))
    assert '\n' not in str(error.value)

  new = tmp_path / 'new'
  fails(tmp_path / 'nothing', new, 'no such video or folder')
  (tmp_path / 'empty').mkdir()
  fails(tmp_path / 'empty', new / '1', 'has no photographs')
  (tmp_path / 'empty' / 'a.DNG').write_bytes(b'x')
  fails(
    tmp_path / 'empty', new / '2', r'but 1 other file, such as .a\.DNG.\. .* export them as JPEG'
  )
  shutil.copytree(room, tmp_path / 'twins')
  shutil.copy(room / 'view_1.png', tmp_path / 'twins' / 'VIEW_1.jpg')
  fails(tmp_path / 'twins', new / '3', 'have the same name')
  shutil.copytree(room, tmp_path / 'cut')
  whole = (room / 'view_4.png').read_bytes()
  (tmp_path / 'cut' / 'view_4.png').write_bytes(whole[: len(whole) // 2])
  fails(tmp_path / 'cut', new / '4', r'view_4\.png: cannot be read as an image')
  (tmp_path / 'cut' / 'view_7.png').write_bytes(whole[:100])
  fails(tmp_path / 'cut', new / '4', r"view_4\.png: .* 1 more cannot be used: 'view_7\.png'")
  fails(tmp_path / 'cut' / 'view_5.png', new / '4', r'view_5\.png: is one photograph\. Name the')
  fails(room, tmp_path / 'cut' / 'view_5.png', r'view_5\.png: is a file\. Name a folder')
  (tmp_path / 'video.mp4').write_bytes(b'not a video')
  fails(tmp_path / 'video.mp4', new / '5', 'cannot be read as a video: it is damaged or incomplete')
  shutil.copy(tmp_path / 'video.mp4', tmp_path / 'notes')
  fails(tmp_path / 'notes', new / 'notes', r'cannot be read as a video\. Name a video')
  fails(room, new / '5', 'was started with source')
  fails(room, new / '7', '--frames works with a video, not with a folder', frames=9)
  fails(
    tmp_path / 'video.mp4', new / '7', '--frames must be at least 3, better 100, got 2', frames=2
  )
  fails(room, new / '7', 'no such folder of masks', masks=str(new / 'no'))
  fails(room, new / '7', '--camera_model must be one of .* got FOV', camera_model='FOV')
  fails(tmp_path / 'video.mp4', new / '7', '--masks works with photographs', masks='m')
  fails(room, room / 'scene', 'must not be inside the folder of photographs')
  (tmp_path / 'mine' / 'sparse').mkdir(parents=True)
  fails(room, tmp_path / 'mine', 'was not made by this command')
  (tmp_path / 'two').mkdir()
  for k in range(2):
    shutil.copy(room / f'view_{k}.png', tmp_path / 'two')
  fails(tmp_path / 'two', new / '6', 'has 2 photographs; at least 3 are needed')
  (tmp_path / 'two' / 'view_0.png').unlink()
  fails(tmp_path / 'two', new / '8', 'has 1 photograph; at least 3 are needed')
  for name in ('images', 'images_4'):
    (tmp_path / 'capture' / name).mkdir(parents=True)
  fails(tmp_path / 'capture', new / '9', r'Name the folder of its photographs, .*capture/images\.')


# Pairs.


def walk_descriptors(n, seed=0):
  """Descriptors of `n` places on a closed walk: neighbours have most features in common."""
  rng = np.random.default_rng(seed)
  landmarks = rng.integers(0, 200, (n * 12, 128)).astype(np.uint8)

  def read(i):
    visible = (np.arange(120) + 12 * i) % len(landmarks)
    noise = np.random.default_rng(i).integers(0, 6, (120, 128))
    return np.clip(landmarks[visible] + noise, 0, 255).astype(np.uint8)

  return read


def test_similar_photographs_close_loops():
  n = 60
  similarity = pairs.similarities(walk_descriptors(n), n)
  np.testing.assert_allclose(np.diagonal(similarity), 1, atol=1e-5)
  assert pairs.is_ordered(similarity)
  closing = pairs.alike(similarity, 6)
  assert (0, n - 1) in closing
  assert (1, n - 1) in closing
  assert (0, n - 1) not in pairs.sequential(n)
  shuffled = np.random.default_rng(1).permutation(n)
  assert not pairs.is_ordered(similarity[np.ix_(shuffled, shuffled)])


def test_exhaustive_and_sequential_pairs():
  assert pairs.exhaustive(4) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
  near = pairs.sequential(300)
  assert {(0, 1), (0, 4), (0, 6), (0, 12), (0, 32), (287, 299)} <= near
  assert not {(0, 5), (0, 33), (0, 299)} & near
  assert all(0 <= i < j < 300 for i, j in near)
  in_blocks = pairs.in_blocks(near)
  assert sorted(in_blocks) == sorted(near)
  # Few photographs have other pairs before and after.
  assert max(len({k for p in in_blocks[i : i + 100] for k in p}) for i in range(900)) < 60


def test_matching_ends_early_if_interrupted(scene, tmp_path, monkeypatch):
  folder, _ = scene
  shutil.copy(folder / reconstruction.DATABASE, tmp_path)
  with contextlib.closing(sqlite3.connect(tmp_path / reconstruction.DATABASE)) as db:
    db.execute('DELETE FROM matches')
    db.execute('DELETE FROM two_view_geometries')
    db.commit()
  count = reconstruction._count_matched

  def interrupt_once_some_are_matched(db):
    if count(db):
      raise KeyboardInterrupt
    return 0

  def matched():
    with reconstruction.database(str(tmp_path)) as db:
      return count(db)

  monkeypatch.setattr(reconstruction, '_PAIRS_AT_ONCE', 4)
  monkeypatch.setattr(reconstruction, '_POLL_SECONDS', 0.01)
  names = sorted(reconstruction.image_ids(str(tmp_path)))
  wanted = pairs.exhaustive(len(names))
  with monkeypatch.context() as patch:
    patch.setattr(reconstruction, '_count_matched', interrupt_once_some_are_matched)
    with pytest.raises(KeyboardInterrupt):
      reconstruction.match_pairs(str(tmp_path), names, wanted)
  assert 0 < matched() < len(wanted)
  reconstruction.match_pairs(str(tmp_path), names, wanted)
  assert matched() == len(wanted)


@pytest.mark.parametrize(
  ('n', 'matching', 'ordered', 'expected'),
  [
    (60, 'auto', True, 'all'),
    (61, 'auto', True, 'near'),
    (200, 'auto', False, 'all'),
    (201, 'auto', True, 'near'),
    (201, 'auto', False, 'alike'),  # The descriptors are in no order.
    (80, 'sequential', False, 'near'),
    (80, 'alike', True, 'alike'),
    (201, 'exhaustive', True, 'all'),
  ],
)
def test_which_pairs_are_matched(monkeypatch, tmp_path, n, matching, ordered, expected):
  rng = np.random.default_rng(0)
  similarity = rng.uniform(size=(n, n))
  monkeypatch.setattr(pairs, 'similarities', lambda *_: similarity + similarity.T)
  names = [str(k) for k in range(n)]
  found = reconstruction.choose_pairs(str(tmp_path), names, matching, ordered)
  neighbours = {(k, k + 1) for k in range(n - 1)}
  assert (len(found) == n * (n - 1) // 2) == (expected == 'all')
  assert (neighbours <= found) == (expected in ('all', 'near'))
