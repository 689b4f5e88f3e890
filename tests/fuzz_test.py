"""Damaged captures, settings and runs: a usable result, or an error of our own that names the file.

FUZZ_CASES=12000 draws so many cases at random; without it a few hundred are tried, always the same.
Each case is held to a time and a memory, and may open nothing beside the capture's folder.
"""

import builtins
import contextlib
import faulthandler
import gc
import io
import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import sqlite3
import tracemalloc
import zipfile

import captures
import colmap_test
import corruption
import datasets_test
import formats_test
import hypothesis
import numpy as np
import pytest
import tiny
from hypothesis import strategies as st
from PIL import Image

from internal import cli, colmap, configs, datasets
from internal.datasets import downloads, images, masks, ply, scenes
from internal.devices import sharding
from internal.evaluation import html_report
from internal.rendering import path_files
from internal.sfm import pipeline, reconstruction
from internal.training import checkpoints, pixel_store, run_folder, runlog, train_step
from internal.vis import video

CASES = int(os.environ.get('FUZZ_CASES', 0))
SECONDS, MEGABYTES = 20, 150  # For one case.

pytestmark = pytest.mark.filterwarnings('ignore')  # Pillow's and numpy's, of damaged values.


def cases(share: float):
  """Returns the decorator for a test that runs a share of the cases."""
  return hypothesis.settings(
    max_examples=max(5, round(share * (CASES or 400))),
    derandomize=not CASES,
    database=None,
    deadline=None,  # `held` has a sterner one.
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
  )


class TooSlowError(BaseException):
  """Not an Exception, so that no reader catches it."""


def _too_slow(*_):
  raise TooSlowError(f'more than {SECONDS} seconds')


@contextlib.contextmanager
def held(outside=None, traced=True):
  """Limits the time and memory of a block; forbids opening files in the folder `outside`.

  `traced` counts Python's and numpy's memory; the process's own is looked at always. Threads of a
  library that live on would not stand the end of the count.
  """
  opened, real_open = [], builtins.open

  def watching_open(file, *args, **kwargs):
    opened.append(file)
    return real_open(file, *args, **kwargs)

  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  signal.signal(signal.SIGALRM, _too_slow)
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  faulthandler.dump_traceback_later(5 * SECONDS, exit=True)  # Where no signal is heard.
  if traced:
    tracemalloc.start()
  builtins.open = watching_open
  try:
    yield
  finally:
    builtins.open = real_open
    peak = tracemalloc.get_traced_memory()[1]  # 0 if not traced.
    tracemalloc.stop()
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_REAL, 0)
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert max(peak / 2**20, grown / 2**10) < MEGABYTES
  for file in opened if outside else ():
    if isinstance(file, str | bytes | os.PathLike) and b'\0' not in os.fsencode(file):
      real = os.path.realpath(os.fsdecode(file))
      assert not real.startswith((os.path.realpath(outside), '/dev/')), file


def attempt(function, named: str, outside=None, traced=True):
  """Returns function(), or None if it raises a user error that matches `named`."""
  with held(outside, traced):
    try:
      return function()
    except Exception as error:
      message = str(error)
      if not cli._is_user_error(error) or not re.search(named, message) or len(message) > 30_000:
        raise
  return None


def assert_usable(found: scenes.Scene, root: str, turned: bool = True) -> None:
  n = len(found.names)
  table = found.cameras
  for values in (table.pixtocam, table.camtoworld, table.distortion, found.world_transform):
    assert np.isfinite(values).all()
  assert table.camtoworld.shape == (n, 3, 4)
  assert table.size.shape == (n, 2)
  assert (table.size > 0).all()
  assert (table.pixtocam[:, [0, 1], [0, 1]] > 0).all()
  if turned:
    rotation = table.camtoworld[:, :, :3]
    np.testing.assert_allclose(np.swapaxes(rotation, 1, 2) @ rotation, [np.eye(3)] * n, atol=0.03)
  assert len(found.files) == n
  assert found.train
  assert set(found.train) | set(found.test) <= set(range(n))
  assert found.bounds is None or 0 < found.bounds[0] <= found.bounds[1] < np.inf
  for name in found.files:
    assert os.path.realpath(images.inside(root, name)).startswith(os.path.realpath(root) + os.sep)


# Captures.


def _colmap(root, ext, **kwargs):
  captures.write_colmap(root, n=4, ext=ext, points=np.eye(3), **kwargs)
  table = np.tile(np.linspace(1.0, 17.0, 17), (4, 1))
  np.save(os.path.join(root, 'poses_bounds.npy'), table)


def _rigs(root):
  """A binary model with rigs and a text model beside it."""
  rig, model = colmap_test.rig_model()
  names = [image.name for image in model.images.values()]
  captures.write_colmap(root, names=names)
  for ext in ('.bin', '.txt'):
    colmap.write_model(os.path.join(root, 'sparse/0'), model, ext)
  for name, content in zip(('rigs', 'frames'), colmap_test.rig_files(rig)):
    pathlib.Path(root, f'sparse/0/{name}.bin').write_bytes(content)


def _transforms(root):
  table, _ = datasets_test.write_ngp(root, n=4, camera_angle_x=0.7, k1=0.01, camera_model='OPENCV')
  names = [frame['file_path'] for frame in table['frames']]
  table['frames'][0] |= {'fl_x': 22.0, 'w': 16, 'h': 12}
  table['frames'][1]['mask_path'] = 'masks/a.png'
  captures.save_image(os.path.join(root, 'masks', 'a.png'), captures.pixels(0))
  more = {
    'train_filenames': names[1:], 'test_filenames': names[:1], 'mask_path': 'masks/a.png',
    'applied_transform': np.eye(4)[:3].tolist(), 'applied_scale': 0.5, 'ply_file_path': 'a.ply',
    'fisheye_crop_radius': 3,
  }  # fmt: skip
  datasets_test.write_transforms(root, {**table, **more})


def _masks(root):
  _colmap(root, '.bin')
  for k in range(3):
    captures.save_image(os.path.join(root, 'masks', f'{k:03}.png'), captures.pixels(k) | 1)


def _small(root):
  """A capture whose images_2/ was made here, with a manifest."""
  _colmap(root, '.bin')
  load(root, {'factor': 2})


def _dtu(root):
  scan, _ = formats_test.write_dtu(os.path.join(root, 'made'), n=4)
  shutil.copytree(scan, root, dirs_exist_ok=True)
  shutil.move(os.path.join(root, 'made', 'Calibration', 'cal18'), root)
  shutil.rmtree(os.path.join(root, 'made'))


# By name: what writes it, the settings that read it, and the files that are damaged.
_MODEL = 'cameras', 'images', 'points3D'
FORMATS = {
  'binary': (lambda root: _colmap(root, '.bin'), {}, [f'sparse/0/{name}.bin' for name in _MODEL]),
  'rigs': (_rigs, {}, [f'sparse/0/{n}' for n in ('rigs.bin', 'frames.bin', 'images.txt')]),
  'text': (lambda root: _colmap(root, '.txt'), {}, [f'sparse/0/{name}.txt' for name in _MODEL]),
  'bounds': (
    lambda root: _colmap(root, '.bin'),
    {'forward_facing': True},
    ['poses_bounds.npy', 'sparse/0/images.bin', 'sparse/0/cameras.bin'],
  ),
  'points': (
    lambda root: (_colmap(root, '.txt'), os.remove(os.path.join(root, 'poses_bounds.npy'))),
    {'forward_facing': True},
    ['sparse/0/points3D.txt', 'sparse/0/images.txt', 'sparse/0/cameras.txt'],
  ),
  'transforms': (_transforms, {'dataset_loader': 'transforms'}, ['transforms.json']),
  'blender': (
    datasets_test.write_blender,
    {'dataset_loader': 'blender'},
    ['transforms_train.json', 'transforms_test.json'],
  ),
  'tat': (
    datasets_test.write_tat,
    {'dataset_loader': 'tat_nerfpp'},
    ['train/pose/00001.txt', 'train/intrinsics/00000.txt', 'test/pose/00003.txt'],
  ),
  'fvs': (
    lambda root: formats_test.write_fvs(root, n=3),
    {'dataset_loader': 'tat_fvs'},
    [f'dense/ibr3d_pw_0.50/{name}s.npy' for name in 'KRt'],
  ),
  'dtu': (_dtu, {'dataset_loader': 'dtu'}, ['cal18/pos_002.txt']),
  'multicam': (
    lambda root: formats_test.write_multicam(root, scales=1),
    {'dataset_loader': 'multicam'},
    ['metadata.json'],
  ),
  'llff': (formats_test.write_llff, {'forward_facing': True}, ['poses_bounds.npy']),
  'masks': (_masks, {}, [f'masks/{k:03}.png' for k in range(3)]),
  'manifest': (
    _small,
    {'factor': 2},
    ['images_2/.sources.json', 'images_2/000.png', 'images/001.png'],
  ),
}


@pytest.fixture(scope='module')
def outside(tmp_path_factory):
  folder = tmp_path_factory.mktemp('parent') / 'outside'
  captures.save_image(str(folder / 'secret.png'), captures.pixels(7))
  return folder


@pytest.fixture(scope='module', params=FORMATS)
def capture(request, outside):
  """A folder, the settings that read it, the files to damage; with traps among its pictures."""
  write, kwargs, names = FORMATS[request.param]
  root = str(outside.parent / request.param)
  write(root)
  if 'dataset_loader' not in kwargs or kwargs['dataset_loader'] == 'transforms':
    _set_traps(root, outside)
  return root, kwargs, {name: pathlib.Path(root, name).read_bytes() for name in names}


def _set_traps(root: str, outside) -> None:
  """Adds traps to the pictures: links to the outside, a folder and a pipe."""
  folder = pathlib.Path(root, 'images')
  (folder / 'link.png').symlink_to(outside / 'secret.png')
  (folder / 'out').symlink_to(outside)
  (folder / 'folder.png').mkdir()
  os.mkfifo(folder / 'pipe.png')


def load(root, kwargs, read_only=False):
  return datasets.load_dataset(configs.Config(data_dir=root, **kwargs), read_only)


@contextlib.contextmanager
def replaced(path: str, content: bytes | None):
  """Temporarily replaces the content of a file; None puts a folder in its place."""
  before = pathlib.Path(path).read_bytes()
  if content is None:
    os.remove(path)
    os.mkdir(path)
  else:
    pathlib.Path(path).write_bytes(content)
  try:
    yield
  finally:
    if content is None:
      os.rmdir(path)
    pathlib.Path(path).write_bytes(before)


@cases(0.08)
@hypothesis.given(data=st.data())
def test_damaged_captures(capture, outside, data):
  root, kwargs, contents = capture
  name = data.draw(st.sampled_from(sorted(contents)))
  path, content = os.path.join(root, name), contents[name]
  os.makedirs(os.path.dirname(path), exist_ok=True)
  pathlib.Path(path).write_bytes(content)  # Loading may have made it again, in other words.
  damage = corruption.of_file(path, content, corruption.names(str(outside)))
  if data.draw(st.integers(0, 50)) == 0:
    damage = st.none()
  with replaced(path, data.draw(damage)):
    read_only = data.draw(st.booleans())
    found = attempt(lambda: load(root, kwargs, read_only), re.escape(root), str(outside))
    if found is not None:
      assert_usable(found, root)
      again = os.path.join(root, 'scene.json')
      scenes.save_scene(again, found)
      assert_usable(scenes.load_scene(again), root)


@pytest.mark.parametrize('ext', ['.bin', '.txt'])
@cases(0.03)
@hypothesis.given(data=st.data())
def test_names_in_a_sparse_model(outside, ext, data):
  root = str(outside.parent / f'names{ext}')
  if not os.path.isdir(root):
    _colmap(root, ext)
    _set_traps(root, outside)
  model = colmap.read_model(os.path.join(root, 'sparse', '0'))
  name = data.draw(corruption.names(str(outside)))
  good = model.images[2]
  model.images[2] = colmap.Image(good.id, good.qvec, good.tvec, good.camera_id, name)
  path = os.path.join(root, 'sparse', '0', f'images{ext}')
  try:
    content = colmap.encode(model, ext)['images']
  except UnicodeEncodeError:
    return  # No file could hold it.
  with replaced(path, content):
    read_only = data.draw(st.booleans())
    found = attempt(lambda: load(root, {}, read_only), re.escape(root), str(outside))
    if found is not None:
      assert_usable(found, root)


# Settings.

GIN = b"""# A comment.
Config.data_dir = '360/garden'
Config.factor = 4
Config.near = 0.2
Config.far = 1e6
Config.render_resolution = (10, 20)
Config.weight_decay_mults = {'nerf_mlp': 0.1}
Model.raydist_fn = @jnp.reciprocal
NerfMLP.warp_fn = @coord.contract
NerfMLP.net_width = %width
width = 64
"""


@cases(0.1)
@hypothesis.given(damage=corruption.of_lines(GIN, corruption.GIN_TOKENS) | corruption.of_bytes(GIN))
def test_damaged_gin_files(tmp_path_factory, damage):
  folder = tmp_path_factory.getbasetemp()
  path = str(folder / 'a.gin')
  pathlib.Path(path).write_bytes(damage)
  where = os.getcwd()
  os.chdir(folder)  # For files that include themselves.
  try:
    named = rf'{re.escape(path)}|\b(Config|Model|NerfMLP|PropMLP)\.\w+'
    settings = attempt(lambda: configs.load_config([path]), named)
  finally:
    os.chdir(where)
  if settings is not None:
    pathlib.Path(path).write_text(settings.text)
    assert configs.load_config([path]).config == settings.config


# Runs.


@cases(0.15)
@hypothesis.given(data=st.data())
def test_damaged_scenes(tmp_path_factory, outside, data):
  path = str(outside.parent / 'scene.json')
  if not os.path.isfile(path):
    root = str(tmp_path_factory.mktemp('good'))
    _colmap(root, '.bin')
    scenes.save_scene(path, load(root, {'forward_facing': True}))
  content = pathlib.Path(path).read_bytes()
  with replaced(path, data.draw(corruption.of_file(path, content, corruption.names(str(outside))))):
    found = attempt(lambda: scenes.load_scene(path), re.escape(path))
  if found is not None:
    # A number may become another one: only the capture's own reader can tell a turn from a bend.
    assert_usable(found, str(outside.parent / 'nowhere'), turned=False)
    assert all(isinstance(found.stem(i), str) for i in range(len(found.names)))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run's folder with one checkpoint, its settings, and the small files in it."""
  folder, settings, mesh = str(tmp_path_factory.mktemp('run')), tiny.settings(), tiny.mesh(1)
  state = sharding.replicate(train_step.create_state(settings), mesh)
  checkpoints.save(folder, state.replace(step=state.step + 3), notes={'window': []})
  files = [p for p in pathlib.Path(folder).rglob('*') if p.is_file()]
  return folder, settings, mesh, sorted((str(p) for p in files), key=os.path.getsize)


@cases(0.03)
@hypothesis.given(data=st.data())
def test_damaged_checkpoints(run, data):
  folder, settings, mesh, files = run
  path = data.draw(st.sampled_from(files))
  content = pathlib.Path(path).read_bytes()
  damage = corruption.of_bytes(content) | st.sampled_from([b'', b'{}', b'[]', b'null', b'\xff'])
  if content[:1] == b'{':
    damage |= corruption.of_json(content)
  step = pathlib.Path(folder, 'checkpoints', '3')
  manifest = step / 'manifest.json'
  with contextlib.ExitStack() as stack:
    stack.enter_context(replaced(path, data.draw(damage)))
    for sealed in (manifest, step / 'notes.json'):  # Are written anew here.
      stack.enter_context(replaced(str(sealed), sealed.read_bytes()))
    if path != str(manifest) and data.draw(st.booleans()):
      manifest.unlink()
      checkpoints._seal(str(step), {})  # So that orbax gets to read it.
    found = attempt(
      lambda: checkpoints.restore_params(folder, settings, mesh=mesh),
      re.escape(folder),
      traced=False,
    )
  assert found is None or found[1] == 3
  gc.collect()  # Reads that orbax left unfinished complain once, here.


@pytest.fixture(scope='module')
def sealed_run(outside, tmp_path_factory):
  """A run's folder without checkpoints, and what it opens as."""
  root, folder = str(tmp_path_factory.mktemp('capture')), str(tmp_path_factory.mktemp('sealed'))
  _colmap(root, '.bin')
  settings = tiny.settings(f'Config.data_dir = {root!r}', 'Config.factor = 0')
  run_folder.write_run(folder, settings, datasets.load_dataset(settings.config))
  return folder, _opened(folder)


def _opened(folder):
  """Returns the settings and scene of a run, as text, and whether opening it printed a warning."""
  with contextlib.redirect_stderr(io.StringIO()) as err:
    settings, scene = run_folder.open_run(folder)
  fields = {**vars(scene), **vars(scene.cameras), 'cameras': None}
  return settings.text, repr({k: np.asarray(v, object).tolist() for k, v in fields.items()}), bool(
    err.getvalue()
  )  # fmt: skip


@cases(0.15)
@hypothesis.given(data=st.data())
def test_damaged_files_of_a_run_are_never_misread_in_silence(sealed_run, data):
  folder, intact = sealed_run
  path = os.path.join(folder, data.draw(st.sampled_from(['config.gin', 'scene.json', 'run.json'])))
  content = pathlib.Path(path).read_bytes()
  with replaced(path, data.draw(corruption.of_file(path, content))):
    found = attempt(lambda: _opened(folder), '.', traced=False)
  assert found is None or found[2] or found[:2] == intact[:2]


# Pictures.

_KINDS = {'png': 'RGB', 'jpg': 'RGB', 'webp': 'RGB', 'tif': 'RGB', 'bmp': 'RGB', 'ppm': 'RGB',
          'rgba.png': 'RGBA', 'palette.png': 'P', 'grey16.png': 'I;16'}  # fmt: skip


def _encoded(kind: str) -> bytes:
  grey = Image.fromarray(np.full((12, 16), 300, np.uint16))
  exif = Image.Exif()
  exif[0x0112] = 6
  file = io.BytesIO()
  image = (
    grey if _KINDS[kind] == 'I;16' else Image.fromarray(captures.pixels(0)).convert(_KINDS[kind])
  )
  ending = kind.rpartition('.')[2]
  image.save(file, {'jpg': 'jpeg', 'tif': 'tiff'}.get(ending, ending), exif=exif)
  return file.getvalue()


@cases(0.15)
@hypothesis.given(kind=st.sampled_from(sorted(_KINDS)), data=st.data())
def test_damaged_pictures(tmp_path_factory, kind, data):
  path = str(tmp_path_factory.getbasetemp() / kind)
  pathlib.Path(path).write_bytes(data.draw(corruption.of_bytes(_encoded(kind))))
  header = attempt(lambda: images.read_header(path), re.escape(path))
  if header is not None:
    assert min(header.width, header.height) > 0
  size = data.draw(st.sampled_from([None, (16, 12)]))
  pixels = attempt(lambda: images.decode(path, 'white', size), re.escape(path))
  if pixels is not None:
    assert pixels.dtype == np.uint8
    assert size is None or pixels.shape == (12, 16, 3)


# Arrays.


class _Trap:
  """Creates a file when unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


@cases(0.1)
@hypothesis.given(data=st.data())
def test_damaged_pose_files(tmp_path_factory, data):
  folder = tmp_path_factory.getbasetemp()
  path, trap = str(folder / 'poses.npy'), folder / 'sprung'
  file, archive, pickled = io.BytesIO(), io.BytesIO(), io.BytesIO()
  np.save(file, captures.circle_poses(5))
  np.savez_compressed(archive, np.zeros((1000, 1000)))
  np.save(pickled, np.array([[_Trap(trap)] * 17], object), allow_pickle=True)
  fixed = [archive.getvalue(), pickled.getvalue(), pickle.dumps(_Trap(trap)), b'']
  damage = st.sampled_from(fixed) | corruption.of_npy(file.getvalue())
  pathlib.Path(path).write_bytes(data.draw(damage))
  told = attempt(lambda: path_files.read(path), re.escape(path))
  assert not trap.exists()
  if told is not None:
    poses = told.poses
    assert poses.shape[1:] == (3, 4)
    assert np.isfinite(poses).all()


@cases(0.1)
@hypothesis.given(data=st.data())
def test_damaged_nerfstudio_paths(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp('path', numbered=True)
  path, frames = folder / 'path.json', [{'camera_to_world': np.eye(4).ravel().tolist(), 'fov': 50}]
  whole = {'camera_path': frames, 'render_width': 30, 'render_height': 20, 'fps': 24}
  account = {'transform': np.eye(4)[:3].tolist(), 'scale': 0.5}
  for file, table in ((path, whole), (folder / 'dataparser_transforms.json', account)):
    content = json.dumps(table).encode()
    file.write_bytes(data.draw(st.just(content) | corruption.of_file(str(file), content)))
  applied = scenes.Applied(np.eye(4), 2.0)
  found = attempt(lambda: path_files.read(str(path), applied), re.escape(str(folder)))
  assert found is None or np.isfinite(found.poses).all()


@cases(0.1)
@hypothesis.given(data=st.data())
def test_damaged_points(tmp_path_factory, data):
  path = str(tmp_path_factory.getbasetemp() / 'points.ply')
  form = data.draw(st.sampled_from(['ascii', 'binary_little_endian', 'binary_big_endian']))
  axes = '\n'.join(f'property float {axis}' for axis in 'xyz')
  header = f'ply\nformat {form} 1.0\nelement vertex 2\n{axes}\nend_header\n'.encode()
  body = b'1 2 3\n4 5 6\n' if form == 'ascii' else bytes(24)
  pathlib.Path(path).write_bytes(data.draw(corruption.of_bytes(header + body)))
  found = attempt(lambda: ply.read_points(path), re.escape(path))
  assert found is None or found[0].shape == found[1].shape == (len(found[0]), 3)


# What runs and posing write and read back.

_METRICS = b''.join(
  b'{"step": %d, "loss": 0.1, "psnr": 20.0, "rays_per_sec": 9.0, "train_seconds": 1.0}\n' % step
  for step in (1, 2, 3)
)


@cases(0.1)
@hypothesis.given(damage=corruption.of_lines(_METRICS) | corruption.of_bytes(_METRICS))
def test_damaged_metrics(tmp_path_factory, damage):
  path = tmp_path_factory.getbasetemp() / 'metrics.jsonl'
  path.write_bytes(damage)
  rows = attempt(lambda: runlog.read_metrics(str(path)), 'UTF-16')
  html_report._make_charts(rows or [], [])


@cases(0.05)
@hypothesis.given(data=st.data())
def test_damaged_pictures_of_the_report_and_the_video(tmp_path_factory, data):
  path = str(tmp_path_factory.getbasetemp() / '000_a_prediction.png')
  pathlib.Path(path).write_bytes(data.draw(corruption.of_bytes(_encoded('png'))))
  with held():
    assert isinstance(html_report._webp(path, 8), bytes)
  attempt(lambda: video._read_even(path), re.escape(path))


@cases(0.05)
@hypothesis.given(data=st.data())
def test_damaged_masks(tmp_path_factory, data):
  path = str(tmp_path_factory.getbasetemp() / 'mask.png')
  pathlib.Path(path).write_bytes(data.draw(corruption.of_bytes(_encoded('png'))))
  mask = attempt(lambda: masks.read(path, (16, 12)), re.escape(path))
  assert mask is None or mask.shape == (12, 16)


@cases(0.05)
@hypothesis.given(data=st.data())
def test_damaged_archives(tmp_path_factory, data):
  folder = tmp_path_factory.getbasetemp() / 'archives'
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  path, packed = str(folder / 'a.zip'), io.BytesIO()
  with zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as f:
    for name in ('top/room/images/0.png', 'top/room/poses.npy', 'top/../../outside'):
      f.writestr(name, name * 20)
  pathlib.Path(path).write_bytes(data.draw(corruption.of_bytes(packed.getvalue())))
  archive = downloads.Archive('a.zip', 'http://nowhere', 'page', ('room',), 'top/')
  attempt(lambda: downloads.unpack(path, archive, str(folder)), re.escape(path))
  assert not (folder.parent / 'outside').exists()
  assert {p.name for p in folder.iterdir()} <= {'a.zip', 'room', 'room.part'}


@pytest.fixture(scope='module')
def mapped(outside, tmp_path_factory):
  """A capture whose pixels are mapped from a cache file, the pixels, and the cache's files."""
  root = str(tmp_path_factory.mktemp('mapped'))
  _colmap(root, '.bin')
  config = tiny.settings(
    f'Config.data_dir = {root!r}', "Config.pixels_on = 'disk'", 'Config.factor = 0'
  ).config
  scene = datasets.load_dataset(config)
  pixels = np.stack([*pixel_store.read(config, scene, progress=False).rgb.planes()])
  return config, scene, pixels, {p: p.read_bytes() for p in pathlib.Path(root, '.pixels').iterdir()}


@cases(0.03)
@hypothesis.given(data=st.data())
def test_damaged_pixel_caches_are_made_again(mapped, data):
  config, scene, pixels, contents = mapped
  folder = pathlib.Path(config.data_dir, '.pixels')
  path = data.draw(st.sampled_from(sorted(contents)))
  path.write_bytes(data.draw(corruption.of_bytes(contents[path])))
  found = attempt(lambda: pixel_store.read(config, scene, progress=False), re.escape(str(folder)))
  np.testing.assert_array_equal(np.stack([*found.rgb.planes()]), pixels)


_STATE = {
  'asked': {'source': '/photos', 'frames': None, 'masks': None, 'camera_model': None},
  'photos': [{'name': 'a.png', 'source': 'a.png', 'camera': 'x', 'sharpness': 1.5, 'bytes': 3}],
}


@cases(0.1)
@hypothesis.given(damage=corruption.of_file('poses.json', json.dumps(_STATE).encode()))
def test_damaged_state_of_posing(tmp_path_factory, damage):
  folder = str(tmp_path_factory.getbasetemp())
  path = os.path.join(folder, 'poses.json')
  pathlib.Path(path).write_bytes(damage)
  photos = attempt(lambda: pipeline._resume(path, _STATE['asked']), re.escape(folder))
  assert all(isinstance(photo.name, str) for photo in photos or ())


@cases(0.05)
@hypothesis.given(data=st.data())
def test_damaged_database_of_posing(tmp_path_factory, data):
  folder = tmp_path_factory.getbasetemp() / 'database'
  path = folder / reconstruction.DATABASE
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  with contextlib.closing(sqlite3.connect(path)) as db:
    db.execute('CREATE TABLE images (name TEXT)')
    db.executemany('INSERT INTO images VALUES (?)', [('x' * 100,)] * 100)
    db.commit()
  path.write_bytes(data.draw(corruption.of_bytes(path.read_bytes())))
  attempt(lambda: reconstruction.check_database(str(folder)), re.escape(str(path)))


def test_nothing_reads_pickles():
  """numpy and torch would, on request; nothing in here asks.

  The weights of LPIPS are one, of a known hash, read by what knows arrays alone.
  """
  root = pathlib.Path(__file__).parent.parent
  sources = [*root.glob('*.py'), *root.glob('internal/**/*.py'), *root.glob('scripts/**/*.py')]
  assert len(sources) > 30
  for source in sources:
    text = source.read_text()
    if source.name == 'lpips.py':
      assert 'pickle.load' not in text
      continue
    assert not re.search(r'(import|from) +(c?[Pp]ickle|marshal|shelve|dill|joblib)', text), source
    for call in re.findall(r'np\.load\([^)]*\)', text):
      assert 'allow_pickle=False' in call, source
