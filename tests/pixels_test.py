"""Training pixels in memory and in a mapped cache file, which is never used incomplete."""

import errno
import glob
import os
import shutil
import threading
import types
from concurrent import futures

import captures
import jax
import large_capture
import numpy as np
import pytest
import tiny

from internal import configs, datasets
from internal.datasets import images
from internal.training import batches, pixel_store, train_step


@pytest.fixture
def capture(tmp_path):
  captures.write_colmap(tmp_path, n=9)
  return str(tmp_path)


def read(capture, where='disk', **kwargs):
  config = configs.Config(data_dir=capture, pixels_on=where, **kwargs)
  return pixel_store.read(config, datasets.load_dataset(config), progress=False)


def colors(store, n=7):
  """All pixels of a store."""
  size = np.array([captures.SIZE] * n)
  cam, y, x = (a.ravel() for a in np.mgrid[:n, : captures.SIZE[1], : captures.SIZE[0]])
  return batches.lookup(store, size, cam, x, y)


def tables(folder):
  return sorted(name for name in os.listdir(folder) if name != 'lock')


@pytest.fixture
def decoded(monkeypatch):
  """Counts the pictures that are decoded."""
  seen, decode = [], images.decode
  monkeypatch.setattr(
    images, 'decode', lambda path, *args: seen.append(path) or decode(path, *args)
  )
  return seen


def test_pixels_on_disk_equal_those_in_memory(capture):
  wanted = np.stack([captures.pixels(row) for row in range(1, 8)]).reshape(-1, 3)
  for where in ('host', 'disk', 'disk'):
    np.testing.assert_array_equal(colors(read(capture, where)), wanted)
  store = read(capture)
  assert isinstance(store.rgb, pixel_store.MappedPixels)
  assert (
    store.rgb.nbytes == sum(plane.nbytes for plane in read(capture, 'host').rgb) == wanted.nbytes
  )
  np.testing.assert_array_equal(np.stack([*store.rgb.planes()], -1), wanted)


def test_the_file_is_made_once(capture, decoded):
  read(capture)
  made = len(decoded)
  assert made == 7
  read(capture)
  assert len(decoded) == made
  assert len(tables(os.path.join(capture, '.pixels'))) == 1


def test_one_of_several_concurrent_starts_makes_the_file(capture, decoded):
  with futures.ThreadPoolExecutor(3) as pool:
    stores = list(pool.map(lambda _: read(capture), range(3)))
  assert len(decoded) == 7
  wanted = colors(stores[0])
  assert all(np.array_equal(colors(store), wanted) for store in stores)


def test_pixels_on_disk_are_copied_to_the_device(capture, monkeypatch):
  settings = configs.load_config(
    [], [f"Config.data_dir = '{capture}'", "Config.pixels_on = 'disk'"]
  )
  found, mesh = datasets.load_dataset(settings.config), tiny.mesh(2)
  store, place = pixel_store.load(settings, found, mesh)
  assert place == 'disk'
  monkeypatch.setattr(pixel_store, 'keep_on_device', lambda *_: True)
  on_device, place = pixel_store.load(settings, found, mesh)
  assert place == 'device'
  assert len(on_device.rgb[0].devices()) == 2
  np.testing.assert_array_equal(colors(jax.device_get(on_device)), colors(store))


@pytest.mark.parametrize('change', ['touched', 'another', 'cut'])
def test_the_file_is_made_again_for_changed_pictures_or_if_cut(capture, decoded, change):
  old = read(capture)
  folder, picture = os.path.join(capture, '.pixels'), os.path.join(capture, 'images', '003.png')
  (name,) = tables(folder)
  if change == 'touched':
    os.utime(picture, ns=(0, 1))
  elif change == 'another':
    captures.save_image(picture, captures.pixels(99))
  else:
    os.truncate(os.path.join(folder, name), 100)
  before = colors(old) if change != 'cut' else None
  new = read(capture)
  assert len(decoded) == 14
  seen = colors(new).reshape(7, *captures.pixels(0).shape)
  np.testing.assert_array_equal(seen[2], captures.pixels(99 if change == 'another' else 3))
  assert len(tables(folder)) == 1  # The old one is gone,
  if change != 'cut':
    np.testing.assert_array_equal(colors(old), before)  # but not for who has it open.


@pytest.mark.parametrize('harm', ['flipped', 'copied', 'lock'])
def test_the_file_is_known_by_its_content(capture, decoded, harm):
  wanted = colors(read(capture))
  folder = os.path.join(capture, '.pixels')
  (name,) = tables(folder)
  path, lock = os.path.join(folder, name), os.path.join(folder, 'lock')
  status = os.stat(path)
  if harm == 'flipped':
    with open(path, 'r+b') as f:
      first = f.read(1)
      f.seek(0)
      f.write(bytes([first[0] ^ 4]))
  elif harm == 'copied':
    shutil.copy2(path, f'{path}.copy')
    os.replace(f'{path}.copy', path)
  else:
    with open(lock, 'w') as f:
      f.write('[')
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
  np.testing.assert_array_equal(colors(read(capture)), wanted)
  assert len(decoded) == (7 if harm == 'copied' else 14)
  read(capture)
  assert len(decoded) == (7 if harm == 'copied' else 14)


def test_unfinished_files_are_removed(capture, monkeypatch):
  folder = os.path.join(capture, '.pixels')
  pwrite = os.pwrite
  written = []

  def full(fd, data, at):
    """A disk that takes half of what it is given, and no more than three pieces."""
    written.append(at)
    if len(written) > 3:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return pwrite(fd, data[: len(data) // 2 + 1], at)

  with monkeypatch.context() as patch:
    patch.setattr(os, 'pwrite', full)
    with pytest.raises(
      pixel_store.PixelCacheError,
      match=r'\.rgb: cannot be written \(No space.*Config\.pixel_cache_dir',
    ):
      read(capture)
  assert tables(folder) == []
  with open(os.path.join(folder, 'ab.123.part.rgb'), 'wb') as f:  # As a kill leaves it.
    f.write(b'x')
  read(capture)
  (name,) = tables(folder)
  assert 'part' not in name


def test_short_writes_are_continued(capture, monkeypatch):
  pwrite = os.pwrite
  monkeypatch.setattr(os, 'pwrite', lambda fd, data, at: pwrite(fd, data[:100], at))
  np.testing.assert_array_equal(colors(read(capture)), colors(read(capture, 'host')))


def test_too_little_space_is_noticed_before_writing(capture, monkeypatch):
  monkeypatch.setattr(
    pixel_store.shutil, 'disk_usage', lambda folder: type('Usage', (), {'free': 100})
  )
  with pytest.raises(pixel_store.PixelCacheError, match=r'needs 0\.0 GB, but only 0\.0 GB are'):
    read(capture)


def test_the_folder_can_be_another(capture, tmp_path):
  place = str(tmp_path / 'elsewhere')
  read(capture, pixel_cache_dir=place)
  assert len(tables(place)) == 1
  assert not os.path.exists(os.path.join(capture, '.pixels'))
  with pytest.raises(pixel_store.PixelCacheError, match='File exists'):
    read(capture, pixel_cache_dir=os.path.join(capture, 'images', '001.png'))


def test_a_missing_picture_is_named(capture):
  config = configs.Config(data_dir=capture, pixels_on='disk')
  found = datasets.load_dataset(config)
  os.remove(os.path.join(capture, 'images', '004.png'))
  with pytest.raises(images.DataNotFoundError, match=r'004\.png: no such image'):
    pixel_store.read(config, found, progress=False)


@pytest.mark.parametrize(('free', 'mapped'), [(None, False), (9000, False), (8000, True)])
def test_pixels_over_half_the_memory_go_to_disk(capture, monkeypatch, free, mapped):
  monkeypatch.setattr(pixel_store, 'available_memory', lambda: free)
  found = datasets.load_dataset(configs.Config(data_dir=capture))
  assert pixel_store.num_bytes(found) == 7 * 16 * 12 * 3 == 4032
  assert isinstance(read(capture, 'auto').rgb, pixel_store.MappedPixels) == mapped
  assert not isinstance(read(capture, 'host').rgb, pixel_store.MappedPixels)


def test_available_memory():
  free = pixel_store.available_memory()
  assert free is None or 2**20 < free < 2**50
  assert pixel_store._number_in('/nowhere') is None


def test_more_pixels_than_32_bits_can_index_stay_off_the_device(monkeypatch):
  size = np.array([[50_000, 50_000], [4, 4]])
  first = batches.first_pixels(size)
  assert first.tolist() == [0, 2_500_000_000]
  assert first.dtype == np.int64
  assert batches.first_pixels(size[1:]).dtype == np.int32

  class Far:
    nbytes = 3 * 2_500_000_016

    def __getitem__(self, index):
      return index

  store = batches.PixelStore(Far(), first)
  assert batches.lookup(store, size, np.array([1]), np.array([2]), np.array([3])) == [
    2_500_000_000 + 3 * 4 + 2
  ]
  monkeypatch.setattr(pixel_store, 'available_memory', lambda: 2**50)
  found = types.SimpleNamespace(cameras=types.SimpleNamespace(size=size), train=(0, 1))
  assert pixel_store.place(configs.Config(), found) == 'host'
  with pytest.raises(configs.ConfigError, match=r'fewer than 2\^31 training pixels'):
    pixel_store.place(configs.Config(pixels_on='device'), found)


@pytest.mark.parametrize('on', ['device', 'host', 'disk'])
def test_what_a_step_takes_is_known_before_the_pictures_are_read(capture, on):
  settings = configs.load_config(
    (), [f"Config.data_dir = '{capture}'", f"Config.pixels_on = '{on}'", 'Config.batch_size = 8']
  )
  found, mesh = datasets.load_dataset(settings.config), tiny.mesh(2)
  expected = pixel_store.of_a_step(settings.config, found, mesh, on == 'device')
  pixels, place = pixel_store.load(settings, found, mesh)
  assert place == on == pixel_store.place(settings.config, found)
  if on != 'device':
    cams = pixel_store.training_cameras(settings, found)
    draw = train_step.make_draw(settings.config, mesh)
    pixels = train_step.host_pixels(draw, 0, pixels, cams.size, mesh)
  want, got = (jax.tree.flatten(tree) for tree in (pixels, expected))
  assert want[1] == got[1]
  for a, b in zip(want[0], got[0]):
    assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    assert jax.typeof(a) == jax.typeof(b)


@pytest.mark.parametrize('on', ['host', 'disk'])
def test_reading_can_be_stopped_and_leaves_nothing(capture, on):
  config, stop = configs.Config(data_dir=capture, pixels_on=on), threading.Event()
  found = datasets.load_dataset(config)
  stop.set()
  with pytest.raises(futures.CancelledError):
    pixel_store.read(config, found, False, stop)
  assert not glob.glob(os.path.join(capture, '.pixels', '*.rgb*'))


def test_checking_the_file_can_be_stopped(capture):
  config, stop = configs.Config(data_dir=capture, pixels_on='disk'), threading.Event()
  found = datasets.load_dataset(config)
  pixel_store.read(config, found, False)
  (path,) = glob.glob(os.path.join(capture, '.pixels', '*.rgb'))
  os.utime(path, (0, 0))  # Its time differs from the recorded one, so it is hashed.
  stop.set()
  with pytest.raises(futures.CancelledError):
    pixel_store.read(config, found, False, stop)
  assert os.path.exists(path)
  stop.clear()
  pixel_store.read(config, found, False, stop)
  assert os.path.getmtime(path) == 0  # It was intact, and was not made again.


def test_reads_the_large_synthetic_capture(tmp_path):
  large_capture.main([str(tmp_path / 'c'), '--images=12', '--width=32', '--height=24'])
  store = read(str(tmp_path / 'c'))
  assert store.rgb.nbytes == 3 * 10 * 32 * 24
