"""From pictures of a textured room, whose cameras are known, to poses, and what may go wrong."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import captures
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from internal import colmap, configs, datasets, poses, video, vis
from internal.poses import align, diagnosis, film, gather, pairs, picture, preflight, sfm
from scripts import compare_poses

SIZE, FOCAL, VIEWS = (256, 192), 220.0, 10


def texture(seed, n=512):
  """Blobs of many sizes, [n, n, 3] in 0..255: what SIFT finds everywhere."""
  rng = np.random.default_rng(seed)
  total = 0
  for blur in (1.5, 3, 6, 12):
    noise = scipy.ndimage.gaussian_filter(rng.normal(size=(n, n, 3)), (blur, blur, 0), mode='wrap')
    total = total + noise / noise.std()
  return np.clip(128 + 38 * total, 0, 255)


TEXTURES = [texture(seed) for seed in range(3)]


def room_pose(turn, height=1.4, distance=2.6):
  """Camera to world [3, 4], OpenGL axes, looking into the corner at 0 of floor and two walls."""
  position = np.array([distance * np.cos(turn), distance * np.sin(turn), height])
  back = position - np.array([0.35, 0.35, 0.5])
  back = back / np.linalg.norm(back)
  right = np.cross([0, 0, 1], back)
  right = right / np.linalg.norm(right)
  return np.stack([right, np.cross(back, right), back, position], 1)


def render_room(pose, size=SIZE, focal=FOCAL):
  """The corner of a room, uint8 [h, w, 3]: the nearest of the planes x = 0, y = 0, z = 0."""
  width, height = size
  y, x = np.mgrid[:height, :width] + 0.5
  rays = np.stack([(x - width / 2) / focal, (height / 2 - y) / focal, -np.ones_like(x)], -1)
  rays = rays @ pose[:, :3].T
  t = -pose[:, 3] / rays
  t = np.where(t > 1e-6, t, np.inf)
  nearest = t.argmin(-1)
  hits = pose[:, 3] + t.min(-1)[..., None] * rays
  img = np.zeros((height, width, 3))
  for axis in range(3):
    on = nearest == axis
    u, v = hits[on][:, [a for a in range(3) if a != axis]].T * 130
    for c in range(3):
      img[on, c] = scipy.ndimage.map_coordinates(
        TEXTURES[axis][..., c], [u, v], order=1, mode='grid-wrap'
      )
  return vis.to_uint8(img / 255)


def turns(n):
  return np.linspace(np.radians(15), np.radians(75), n)


@pytest.fixture(scope='session')
def room(tmp_path_factory):
  """A folder of photographs of the room: ten that go together, a blurred one, one of nothing."""
  folder = tmp_path_factory.mktemp('room')
  for k, turn in enumerate(turns(VIEWS)):
    Image.fromarray(render_room(room_pose(turn))).save(folder / f'view_{k}.png')
  blurred = scipy.ndimage.gaussian_filter(render_room(room_pose(0.8)), (7, 7, 0))
  Image.fromarray(blurred).save(folder / 'view_10.png')
  Image.fromarray(np.full((SIZE[1], SIZE[0], 3), 90, np.uint8)).save(folder / 'view_11.png')
  return folder


def true_model():
  """What the reconstruction is held against."""
  width, height = SIZE
  camera = colmap.Camera(1, 'PINHOLE', width, height, (FOCAL, FOCAL, width / 2, height / 2))
  images = {
    k + 1: colmap.Image(k + 1, *captures.to_colmap(room_pose(turn)), 1, f'view_{k}.png')
    for k, turn in enumerate(turns(VIEWS))
  }
  return colmap.Model({1: camera}, images, colmap.make_points())


def make_until(source, scene, module, name, after):
  """Poses until the call of a function after so many is made, where the process kills itself."""
  module = {'gather': gather, 'pycolmap': sfm.colmap(), 'sfm': sfm}[module]
  original, calls = getattr(module, name), []

  def patched(*args, **kwargs):
    calls.append(1)
    if len(calls) > after:
      os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

  setattr(module, name, patched)
  pairs.BLOCK, sfm._SNAPSHOT_SECONDS = 4, 0
  poses.make(str(source), str(scene))


@pytest.fixture(scope='session')
def scene(room, tmp_path_factory):
  """The room posed, after four runs that were killed, one a stage; and what each had done."""
  folder = tmp_path_factory.mktemp('scene') / 'room'
  had = {}
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['internal.poses', 'poses_test'])  # Imported but once.

  def kill(*where):
    life = context.Process(target=make_until, args=(room, folder, *where))
    life.start()
    life.join()
    assert life.exitcode == -signal.SIGKILL

  kill('gather', '_copy', 5)
  had['photographs'] = sorted(os.listdir(folder / 'images'))
  kill('pycolmap', 'extract_features', 1)
  with sfm.database(folder) as db:
    had['features'] = db.num_keypoints()
  kill('pycolmap', 'match_image_pairs', 1)
  with sfm.database(folder) as db:
    had['pairs'] = db.num_matched_image_pairs()
  kill('sfm', '_save_snapshot', 7)
  newest, found = sfm._newest_snapshot, []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sfm, '_newest_snapshot', lambda *args: found.append(newest(*args)) or found[-1])
    had['told'] = poses.make(str(room), str(folder))
  had['gone on with'] = found
  return folder, had


def test_poses_are_those_of_the_cameras(scene):
  folder, _ = scene
  found = align.compare(colmap.read_model(str(folder / 'sparse' / '0')), true_model())
  assert len(found.names) == VIEWS
  assert not found.only_first
  assert found.rotation.max() < 0.3
  assert found.position.max() < 0.02
  camera = next(iter(colmap.read_model(str(folder / 'sparse' / '0')).cameras.values()))
  assert camera.model == 'SIMPLE_RADIAL'
  assert abs(camera.params[0] / FOCAL - 1) < 0.03


def test_a_killed_run_is_gone_on_with_at_each_stage(scene):
  folder, had = scene
  assert 0 < len(had['photographs']) < VIEWS + 2  # None of them half-written:
  assert all(name.startswith('view_') and name.endswith('.png') for name in had['photographs'])
  with sfm.database(folder) as db:
    assert 0 < had['features'] < db.num_keypoints()
    assert 0 < had['pairs'] < db.num_matched_image_pairs()
  assert had['gone on with'] == [str(folder / '.mapping' / '000006')]
  assert not (folder / '.mapping').exists()


def test_what_is_done_is_not_done_again(scene, room, monkeypatch):
  folder, _ = scene
  before = {path: path.stat().st_mtime_ns for path in folder.rglob('*.bin')}

  def never(*_, **__):
    raise AssertionError('done already')

  monkeypatch.setattr(gather, '_take', never)
  for name in ('extract_features', 'match_image_pairs', 'IncrementalPipeline'):
    monkeypatch.setattr(sfm.colmap(), name, never)
  poses.make(str(room), str(folder))
  assert before
  assert {p: p.stat().st_mtime_ns for p in folder.rglob('*.bin')} == before


def test_training_finds_all_that_it_needs(scene):
  folder, _ = scene
  for factor, width in ((0, 256), (2, 128), (4, 64), (8, 32)):
    loaded = datasets.load_dataset(configs.Config(data_dir=str(folder), factor=factor), True)
    assert loaded.report['folder_to_be_made'] is None
    assert loaded.cameras.size[0].tolist() == [width, width * 3 // 4]


def test_the_report_names_the_failed_and_why(scene):
  folder, had = scene
  told = json.loads((folder / 'preflight.json').read_text())
  assert told == had['told']
  assert (told['photographs'], told['posed'], told['factor']) == (12, VIEWS, 0)
  assert set(told['failed']) == {'view_10.png', 'view_11.png'}
  assert 'blurred' in told['failed']['view_10.png']
  assert told['reprojection_error'] < 0.8
  assert told['capture']['images_unregistered'] == ['images/view_10.png', 'images/view_11.png']
  assert {check['name'] for check in told['checks']} >= {'posed', 'focal length', 'spread'}
  picture_file = Image.open(folder / 'preflight.png')
  assert picture_file.format == 'PNG'
  assert picture_file.width == 1600


def test_the_largest_model_comes_first(monkeypatch, tmp_path):
  class FakeModel:
    def __init__(self, images):
      self._images = images

    def num_reg_images(self):
      return self._images

    def num_points3D(self):
      return 1

    def write_binary(self, folder):
      Path(folder, 'images.bin').write_text(str(self._images))

  manager = type('Manager', (), {'size': lambda _: 3, 'get': lambda _, k: FakeModel((4, 9, 6)[k])})
  pipeline = type(
    'Pipeline', (), {'__init__': lambda *_: None, 'add_callback': lambda *_: 0, 'run': lambda _: 0}
  )
  monkeypatch.setattr(sfm.colmap(), 'ReconstructionManager', manager)
  monkeypatch.setattr(sfm.colmap(), 'IncrementalPipeline', pipeline)
  sfm.database(tmp_path).close()
  poses._reconstruct(str(tmp_path), ['a', 'b'], 1)
  written = [(tmp_path / 'sparse' / str(k) / 'images.bin').read_text() for k in range(3)]
  assert written == ['9', '6', '4']


def test_photographs_added_later_are_taken_in(tmp_path, scene, room):
  folder, photos = tmp_path / 'scene', tmp_path / 'photos'
  shutil.copytree(scene[0], folder)
  shutil.copytree(room, photos)
  state = json.loads((folder / 'poses.json').read_text())
  state['asked']['source'] = os.path.realpath(photos)
  (folder / 'poses.json').write_text(json.dumps(state))
  Image.fromarray(render_room(room_pose(np.radians(43)))).save(photos / 'view_12.png')
  told = poses.make(str(photos), str(folder))
  assert (told['photographs'], told['posed']) == (13, VIEWS + 1)
  assert len(os.listdir(folder / 'images_2')) == 13
  with sfm.database(folder) as db:
    assert db.num_cameras() == 1  # The new one was taken by the same camera.
  (photos / 'view_3.png').unlink()
  with pytest.raises(poses.PosesError, match=r'view_3\.png: has been changed or removed'):
    poses.make(str(photos), str(folder))


def test_pictures_that_share_nothing_are_an_error_with_a_report(tmp_path):
  (tmp_path / 'photos').mkdir()
  for k in range(3):
    noise = np.random.default_rng(k).integers(0, 256, (64, 80, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / 'photos' / f'{k} ö.png')
  with pytest.raises(poses.PosesError, match='None of the 3 photographs could be placed'):
    poses.make(str(tmp_path / 'photos'), str(tmp_path / 'scene'))
  told = json.loads((tmp_path / 'scene' / 'preflight.json').read_text())
  assert told['posed'] == 0
  assert len(told['failed']) == 3
  assert (tmp_path / 'scene' / 'preflight.png').is_file()


# Photographs.


def save_turned(path, pixels, orientation, **exif_tags):
  """As a camera writes it that was held askew."""
  exif = Image.Exif()
  exif[0x0112] = orientation
  details = exif.get_ifd(0x8769)
  for tag, value in exif_tags.items():
    details[{'taken': 0x9003, 'focal': 0xA405}[tag]] = value
  exif[0x0110] = 'Phone 5'
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path, exif=exif, quality=95)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_photographs_stand_upright_and_originals_are_untouched(tmp_path, orientation):
  upright = np.zeros((48, 64, 3), np.uint8)
  upright[:24, :32] = (250, 20, 20)  # Top left.
  upright[:24, 32:] = (20, 250, 20)
  stored = {
    1: upright,
    2: upright[:, ::-1],
    3: upright[::-1, ::-1],
    4: upright[::-1],
    5: upright.swapaxes(0, 1),
    6: np.rot90(upright),
    7: upright[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(upright, -1),
  }[orientation]
  source = tmp_path / 'photos' / 'a.jpg'
  save_turned(source, np.ascontiguousarray(stored), orientation, focal=28)
  before = source.read_bytes()
  photo = gather.take_photos(str(tmp_path / 'photos'), str(tmp_path / 'scene'))[0]
  assert source.read_bytes() == before
  with Image.open(tmp_path / 'scene' / 'images' / 'a.jpg') as taken:
    assert taken.getexif().get(0x0112, 1) == 1
    assert taken.getexif().get_ifd(0x8769)[0xA405] == 28  # COLMAP's first guess of the focal.
    assert abs(np.asarray(taken, int) - upright).mean() < 3  # It is a JPEG.
  assert photo.camera == 'Phone 5 28 64x48'


def test_upright_photographs_are_copied_and_odd_ones_become_png(tmp_path):
  photos, scene = tmp_path / 'photos', tmp_path / 'scene'
  pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  save_turned(photos / 'sub' / 'a.jpg', pixels, 1)
  Image.fromarray(pixels).save(photos / 'b.webp', lossless=True)
  Image.fromarray(pixels).save(photos / 'c ä (1).png')  # COLMAP's lists part names by spaces.
  names = [photo.name for photo in gather.take_photos(str(photos), str(scene))]
  assert names == ['b.png', 'c_ä_(1).png', 'sub/a.jpg']
  assert (scene / 'images/sub/a.jpg').read_bytes() == (photos / 'sub/a.jpg').read_bytes()
  np.testing.assert_array_equal(np.asarray(Image.open(scene / 'images/b.png')), pixels)


def test_order_is_that_of_the_times_else_of_the_numbers(tmp_path):
  pixels = np.zeros((8, 8, 3), np.uint8)
  for name, taken in (('IMG_10', '2024:01:01 10:00:00'), ('IMG_9', '2024:01:01 11:00:00')):
    save_turned(tmp_path / 'timed' / f'{name}.jpg', pixels, 1, taken=taken)
    save_turned(tmp_path / 'plain' / f'{name}.jpg', pixels, 1)
  order = [
    [
      photo.name
      for photo in gather.take_photos(str(tmp_path / kind), str(tmp_path / f'{kind}_scene'))
    ]
    for kind in ('timed', 'plain')
  ]
  assert order == [['IMG_10.jpg', 'IMG_9.jpg'], ['IMG_9.jpg', 'IMG_10.jpg']]


def test_masks_are_turned_with_their_photographs(tmp_path):
  stored = np.zeros((30, 20, 3), np.uint8)
  save_turned(tmp_path / 'photos/a.jpg', stored, 6)
  save_turned(tmp_path / 'photos/b.jpg', np.zeros((20, 30, 3), np.uint8), 1)
  mask = np.zeros((30, 20), np.uint8)
  mask[:5] = 255
  (tmp_path / 'masks').mkdir()
  Image.fromarray(mask).save(tmp_path / 'masks/a.png')
  gather.take_photos(str(tmp_path / 'photos'), str(tmp_path / 'scene'), str(tmp_path / 'masks'))
  upright = np.asarray(Image.open(tmp_path / 'scene/masks/a.jpg.png'))
  np.testing.assert_array_equal(upright, np.rot90(mask, -1))
  Image.fromarray(mask[:-1]).save(tmp_path / 'masks/b.png')
  with pytest.raises(ValueError, match=r'b\.png: is 20x29 pixels, but its photograph has 30x20'):
    gather.take_photos(str(tmp_path / 'photos'), str(tmp_path / 'other'), str(tmp_path / 'masks'))


def test_features_are_not_found_where_masked(tmp_path, room):
  photos, masks = tmp_path / 'photos', tmp_path / 'masks'
  photos.mkdir()
  masks.mkdir()
  for k in range(2):
    shutil.copy(room / f'view_{k}.png', photos)
  mask = np.full((SIZE[1], SIZE[0]), 255, np.uint8)
  mask[:, :128] = 0
  Image.fromarray(mask).save(masks / 'view_0.png')
  taken = gather.take_photos(str(photos), str(tmp_path / 'scene'), str(masks))
  sfm.extract(str(tmp_path / 'scene'), taken, None)
  ids = sfm.image_ids(str(tmp_path / 'scene'))
  with sfm.database(tmp_path / 'scene') as db:
    across = [db.read_keypoints(ids[f'view_{k}.png'])[:, 0] for k in range(2)]
  assert across[0].min() >= 127
  assert len(across[0]) > 50
  assert across[1].min() < 60  # It has no mask.


def test_bad_input_is_one_line_that_says_what_to_do(tmp_path, room):
  def fails(source, scene, words, **kwargs):
    with pytest.raises((poses.PosesError, OSError, ValueError), match=words) as error:
      poses.make(str(source), str(scene), poses.Options(**kwargs))
    assert '\n' not in str(error.value)

  new = tmp_path / 'new'
  fails(tmp_path / 'nothing', new, 'no such video or folder')
  (tmp_path / 'empty').mkdir()
  fails(tmp_path / 'empty', new / '1', 'has no photographs')
  (tmp_path / 'empty' / 'a.HEIC').write_bytes(b'x')
  fails(tmp_path / 'empty', new / '2', r'a\.HEIC, which cannot be read here\. Export')
  shutil.copytree(room, tmp_path / 'twins')
  shutil.copy(room / 'view_1.png', tmp_path / 'twins' / 'VIEW_1.jpg')
  fails(tmp_path / 'twins', new / '3', 'have one name')
  shutil.copytree(room, tmp_path / 'cut')
  whole = (room / 'view_4.png').read_bytes()
  (tmp_path / 'cut' / 'view_4.png').write_bytes(whole[: len(whole) // 2])
  fails(tmp_path / 'cut', new / '4', r'view_4\.png: cannot be read as an image')
  (tmp_path / 'film.mp4').write_bytes(b'no film')
  fails(tmp_path / 'film.mp4', new / '5', 'cannot be read as a video')
  fails(room, new / '5', 'begun with source')
  fails(room, new / '7', 'is a folder, and --frames is for a video', frames=9)
  fails(tmp_path / 'film.mp4', new / '7', 'Masks are for photographs', masks='m')
  fails(room, room / 'scene', 'lies in the folder of the photographs')
  (tmp_path / 'mine' / 'sparse').mkdir(parents=True)
  fails(room, tmp_path / 'mine', 'was not made by this command')
  (tmp_path / 'two').mkdir()
  for k in range(2):
    shutil.copy(room / f'view_{k}.png', tmp_path / 'two')
  fails(tmp_path / 'two', new / '6', 'has 2 photographs')


def test_photographs_may_lie_in_the_capture_but_are_not_turned_there(tmp_path):
  folder = tmp_path / 'scene' / 'images'
  save_turned(folder / 'a.jpg', np.zeros((8, 12, 3), np.uint8), 1)
  before = (folder / 'a.jpg').stat().st_mtime_ns
  assert len(gather.take_photos(str(folder), str(tmp_path / 'scene'))) == 1
  assert (folder / 'a.jpg').stat().st_mtime_ns == before
  save_turned(folder / 'b.jpg', np.zeros((8, 12, 3), np.uint8), 6)
  with pytest.raises(
    poses.PosesError, match=r'b\.jpg: must be turned, .* is ever changed in place'
  ):
    gather.take_photos(str(folder), str(tmp_path / 'scene'))


# Videos.


def write_film(path, sharp, frames=24):
  """A film of which only the frames in `sharp` are; all have the number as a grey stripe."""
  rng = np.random.default_rng(0)
  base = scipy.ndimage.gaussian_filter(rng.uniform(0, 255, (96, 128, 3)), (1, 1, 0))
  base = (base - base.min()) / np.ptp(base)
  names = []
  for k in range(frames):
    img = base if k in sharp else scipy.ndimage.gaussian_filter(base, (3, 3, 0))
    img = img.copy()
    img[:16] = k / frames
    names.append(str(path.parent / f'{k:03d}.png'))
    vis.write_png(names[-1], img)
  video.write_video(names, str(path), fps=8, crf=10)


def test_the_sharpest_frame_of_each_window_is_taken(tmp_path):
  sharp = (2, 11, 12, 23)
  write_film(tmp_path / 'film.mp4', sharp)
  photos = film.take_frames(str(tmp_path / 'film.mp4'), str(tmp_path / 'scene'), 4)
  assert [photo.source for photo in photos] == [str(k) for k in sharp]
  assert [photo.name for photo in photos] == [f'frame_{k:04d}.jpg' for k in range(4)]
  for photo, number in zip(photos, sharp):
    with Image.open(tmp_path / 'scene' / 'images' / photo.name) as frame:
      assert frame.size == (128, 96)
      assert abs(np.asarray(frame)[2:12].mean() - 255 * number / 24) < 5
  with pytest.raises(poses.PosesError, match='has 2 frames, too few'):
    film.take_frames(str(tmp_path / 'film.mp4'), str(tmp_path / 'other'), 2)


def test_windows_cover_all_frames_evenly():
  for frames, count in ((24, 4), (100, 7), (5, 9), (1, 1)):
    found = film.windows(frames, count)
    assert [k for window in found for k in window] == list(range(frames))
    lengths = [len(window) for window in found]
    assert len(found) == min(frames, count)
    assert max(lengths) - min(lengths) <= 1 <= min(lengths)
  assert film.sensible_count(3000, 100.0) == 200
  assert film.sensible_count(3000, 10.0) == 100
  assert film.sensible_count(60, 10.0) == 60
  assert film.sensible_count(90_000, 3000.0) == 300


def test_sharpness_falls_with_blur_and_not_with_light():
  img = texture(5, 200).astype(np.uint8)
  blurred = [vis.to_uint8(scipy.ndimage.gaussian_filter(img, (s, s, 0)) / 255.0) for s in (1, 2, 4)]
  scores = [gather.sharpness(i) for i in (img, *blurred)]
  assert scores == sorted(scores, reverse=True)
  assert scores[2] < diagnosis.BLURRED * scores[0]
  assert abs(gather.sharpness((img * 0.5).astype(np.uint8)) / scores[0] - 1) < 0.05
  assert gather.sharpness(np.full((9, 9, 3), 7, np.uint8)) == 0
  assert gather.sharpness(np.zeros((2, 2, 3), np.uint8)) == 0


# Pairs.


def walk_descriptors(n, seed=0):
  """Descriptors of `n` places along a closed walk: neighbours share most of what they see."""
  rng = np.random.default_rng(seed)
  landmarks = rng.integers(0, 200, (n * 12, 128)).astype(np.uint8)

  def read(i):
    seen = (np.arange(120) + 12 * i) % len(landmarks)
    noise = np.random.default_rng(i).integers(0, 6, (120, 128))
    return np.clip(landmarks[seen] + noise, 0, 255).astype(np.uint8)

  return read


def test_loops_are_closed_by_what_looks_alike():
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


def test_pairs_are_all_or_the_near_ones():
  assert pairs.exhaustive(4) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
  near = pairs.sequential(300)
  assert {(0, 1), (0, 10), (0, 16), (0, 32), (0, 64), (0, 128), (289, 299)} <= near
  assert not {(0, 11), (0, 129), (0, 299)} & near
  assert all(0 <= i < j < 300 for i, j in near)
  blocks = pairs.blocks(near)
  assert sorted(p for block in blocks for p in block) == sorted(near)
  assert max(len({k for p in block for k in p}) for block in blocks) <= 2 * pairs.BLOCK


@pytest.mark.parametrize(
  ('n', 'matching', 'ordered', 'expected'),
  [
    (200, 'auto', False, 'all'),
    (201, 'auto', True, 'near'),
    (201, 'auto', False, 'alike'),  # Descriptors of no order.
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
  found = sfm.choose_pairs(str(tmp_path), names, matching, ordered)
  neighbours = {(k, k + 1) for k in range(n - 1)}
  assert (len(found) == n * (n - 1) // 2) == (expected == 'all')
  assert (neighbours <= found) == (expected in ('all', 'near'))


# Alignment.


def test_an_alignment_takes_back_a_similarity():
  rng = np.random.default_rng(0)
  points = rng.normal(size=(20, 3))
  turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
  turn *= np.sign(np.linalg.det(turn))
  found = align.fit(points, 2.5 * points @ turn.T + [1, -2, 3])
  np.testing.assert_allclose(found.rotation, turn, atol=1e-12)
  np.testing.assert_allclose(found.shift, [1, -2, 3], atol=1e-12)
  assert abs(found.scale - 2.5) < 1e-12
  mirrored = align.fit(points, points * [1, 1, -1])
  assert np.linalg.det(mirrored.rotation) == pytest.approx(1)  # Never itself a mirror.
  flat = points * [1, 1, 0]  # Cameras in a plane: no mirror image of it either.
  assert np.linalg.det(align.fit(flat, flat @ turn.T).rotation) > 0.99
  np.testing.assert_allclose(align.fit(flat, flat @ turn.T)(flat), flat @ turn.T, atol=1e-12)


def test_errors_of_poses_are_in_degrees_and_shares_of_the_radius():
  truth = true_model()
  images = dict(truth.images)
  pose = room_pose(turns(VIEWS)[3])
  angle = np.radians(2)
  about_x = [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
  pose[:, :3] = pose[:, :3] @ np.array(about_x)
  images[4] = colmap.Image(4, *captures.to_colmap(pose), 1, images[4].name)
  del images[9]
  found = align.compare(colmap.Model(truth.cameras, images, truth.points), truth)
  assert found.only_second == ('view_8.png',)
  assert not found.only_first
  worst = found.names[int(found.rotation.argmax())]
  assert worst == 'view_3.png'
  assert abs(found.rotation.max() - 2) < 1e-6
  assert np.median(found.rotation) < 1e-5
  assert found.position.max() < 1e-6
  assert '| rotation, degrees | 0.000 | 0.400 | 2.000 |' in align.table(found)
  assert align.as_json(found)['photographs'][0].keys() >= {'name', 'rotation_degrees'}


def test_models_of_other_pictures_cannot_be_compared():
  truth = true_model()
  two = {k: truth.images[k] for k in (1, 2)}
  with pytest.raises(ValueError, match='share 2 photographs'):
    align.compare(colmap.Model(truth.cameras, two, truth.points), truth)


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
    (row(model=2), 'in another model, of 7 photographs'),
    (row(sharpness=0.1, features=20), 'blurred: 10%'),
    (row(features=20, matches=3), 'too few features: 20'),
    (row(matches=3), 'too few matches: at most 3'),
    (row(), 'fit no one place'),
  ],
)
def test_failures_are_explained(photo, words):
  said = diagnosis.explain(photo, (40, 9, 7))
  assert said is words or words in said


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


def test_the_weakest_link_is_where_a_model_tears():
  shared = np.zeros((20, 20), int)
  for part in (range(8), range(8, 20)):
    for i in part:
      for j in part:
        shared[i, j] = 500 - 20 * abs(i - j)
  shared[7, 8] = shared[8, 7] = 40
  shared[3, 12] = shared[12, 3] = 25
  count, link, side = diagnosis.weakest_link(shared)
  assert count == 40
  assert sorted(link) == [7, 8]
  assert sorted([side.sum(), (~side).sum()]) == [8, 12]
  shared[19, :] = shared[:, 19] = 0
  shared[19, 18] = shared[18, 19] = 3  # One photograph that hangs on by little tears nothing.
  assert diagnosis.weakest_link(shared)[0] == 40
  assert diagnosis.weakest_link(np.zeros((1, 1), int)) is None


def findings(**kwargs):
  level = ring()
  rows = tuple(row(name=f'{k}.jpg', model=0, points=900, error=0.5) for k in range(24))
  camera = {
    'model': 'OPENCV',
    'photographs': 24,
    'size': [4000, 3000],
    'focal': [3000.0, 3000.0],
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
  odd = graded('focal length', cameras=({**camera, 'exif_focal': 2000.0},))
  assert odd.status == preflight.BAD
  assert 'EXIF says 2000' in odd.text
  arc = diagnosis.describe_spread(ring(reach=150))
  assert graded('spread', spread=arc).status == preflight.DOUBTFUL
  link = {'shared_points': 20, 'between': ['a', 'b'], 'photographs': [12, 12]}
  torn = graded('weakest link', weakest_link=link)
  assert torn.status == preflight.BAD
  assert 'torn' in torn.text
  soft = tuple(row(name=f'{k}', model=0, points=900, sharpness=0.2) for k in range(24))
  assert graded('sharpness', rows=soft).status == preflight.BAD


def test_the_factor_is_that_of_the_published_scenes():
  sizes = {(4946, 3286): 4, (3118, 2078): 2, (1600, 900): 0, (1080, 1920): 2, (12000, 9000): 8}
  assert {size: diagnosis.recommend_factor(size) for size in sizes} == sizes


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
