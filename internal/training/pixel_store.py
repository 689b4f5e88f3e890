"""The training pixels of a capture, on the host: in memory, or in a file that is mapped into it.

What memory cannot hold is decoded once, into one file of all pixels that later starts find again.
Its name is a hash of what it was made of, it gets it when it is whole, and a folder has one.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent import futures

import jax
import numpy as np
from jax.sharding import Mesh

from .. import configs, structs
from ..datasets import images, scenes
from ..devices import processes, sharding
from ..errors import UserError
from ..system import files
from . import batches

_FOLDER = '.pixels'  # In the capture, unless Config.pixel_cache_dir says another.
_SHARE = 0.5  # Of the memory that is free: the rest is for what runs beside the pixels.
_VERSION = 1  # Of the file.
_READERS, _PER_READER = 32, 128  # Threads, and pixels that are worth another one.


class PixelCacheError(UserError):
  """The file of pixels cannot be made; the message says where and what to do."""


class MappedPixels:
  """Pixels [n, 3] uint8 in a file; `pixels[index]` reads those of indices [m]."""

  def __init__(self, path: str):
    with open(path, 'rb') as f:
      self._file = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    self._file.madvise(mmap.MADV_RANDOM)  # Reading ahead would be in vain.
    self._table = np.frombuffer(self._file, np.uint8).reshape(-1, 3)
    self._readers = futures.ThreadPoolExecutor(_READERS)
    self.nbytes = self._table.nbytes

  def __getitem__(self, index: np.ndarray) -> np.ndarray:
    parts = np.array_split(index, min(_READERS, len(index) // _PER_READER + 1))
    # A disk answers many questions at a time.
    colors = np.concatenate(list(self._readers.map(self._table.__getitem__, parts)))
    # What was read stays in the system's cache, but no more counts as memory of this process.
    self._file.madvise(mmap.MADV_DONTNEED)
    return colors

  def planes(self) -> Iterator[np.ndarray]:
    """Each colour's own array [n], one after the other."""
    for channel in range(3):
      yield np.ascontiguousarray(self._table[:, channel])


def num_bytes(scene: scenes.Scene) -> int:
  """What the training pixels take."""
  return int(3 * scene.cameras.size[list(scene.train)].astype(np.int64).prod(-1).sum())


def stored_bytes(store: batches.PixelStore) -> int:
  """What the pixels of a store take."""
  return sum(p.nbytes for p in store.rgb) if isinstance(store.rgb, tuple) else store.rgb.nbytes


def _number_in(path: str, before: str = '') -> int | None:
  """The number behind `before` in a file of the system's, None if there is none."""
  try:
    with open(path) as f:
      return int(f.read().partition(before)[2].split()[0] if before else f.read())
  except (OSError, ValueError, IndexError):
    return None


def available_memory() -> int | None:
  """Bytes that are free on this machine, or in this container; None where nothing says so."""
  kilobytes = _number_in('/proc/meminfo', 'MemAvailable:')
  limit, used = (_number_in(f'/sys/fs/cgroup/memory.{name}') for name in ('max', 'current'))
  known = [] if kilobytes is None else [1024 * kilobytes]
  known += [] if limit is None or used is None else [limit - used]
  return min(known, default=None)


def read(config: configs.Config, scene: scenes.Scene, progress: bool = True) -> batches.PixelStore:
  """Decodes the training images into memory or, where they would fill half of it, into a file.

  Raises:
    DataError, DataNotFoundError: as `scene.read_image`.
    PixelCacheError: the file cannot be made.
  """
  first = batches.first_pixels(scene.cameras.size[list(scene.train)])
  free = available_memory()
  too_many = free is not None and num_bytes(scene) > _SHARE * free
  if config.pixels_on == 'disk' or (config.pixels_on == 'auto' and too_many):
    return batches.PixelStore(_mapped(config, scene, first, progress), first)
  planes = np.empty((3, num_bytes(scene) // 3), np.uint8)

  def keep(start: int, image: np.ndarray) -> None:
    planes[:, start : start + image.size // 3] = image.reshape(-1, 3).T

  _decode(config.data_dir, scene, first, keep, progress)
  return batches.PixelStore(tuple(planes), first)


def _decode(
  data_dir: str,
  scene: scenes.Scene,
  first: np.ndarray,
  keep: Callable[[int, np.ndarray], None],
  progress: bool,
) -> None:
  """Calls keep(where its pixels begin, image) for each training image, from threads."""

  def decode(k: int) -> None:
    keep(int(first[k]), scenes.read_image(data_dir, scene, scene.train[k]))

  images.in_threads(decode, range(len(scene.train)), 'reading images' if progress else None)


def _key(data_dir: str, scene: scenes.Scene) -> str:
  """A hash of what the pixels are made of: the files, as far as one sees without reading them."""
  made_of = []
  for row in scene.train:
    path = images.inside(data_dir, scene.files[row])
    if not os.path.isfile(path):
      raise images.DataNotFoundError(f'{path}: no such image.')
    status = os.stat(path)
    size = scene.cameras.size[row].tolist()
    made_of.append([scene.files[row], status.st_size, status.st_mtime_ns, *size])
  text = json.dumps([_VERSION, scene.background, made_of])
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def _mapped(
  config: configs.Config, scene: scenes.Scene, first: np.ndarray, progress: bool
) -> MappedPixels:
  """The file of pixels, made if it is not there; of several processes one makes it."""
  folder = config.pixel_cache_dir or os.path.join(config.data_dir, _FOLDER)
  path = os.path.join(folder, f'{_key(config.data_dir, scene)}.rgb')
  try:
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'lock'), 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # Until it is closed, or this process ends.
      if not os.path.isfile(path) or os.path.getsize(path) != num_bytes(scene):
        # Others, and what was never finished; who has them open keeps them.
        for old in glob.glob(os.path.join(glob.escape(folder), '*.rgb')):
          os.remove(old)
        _make(path, config.data_dir, scene, first, progress)
      return MappedPixels(path)
  except OSError as e:
    if e.errno is None:  # Of a picture.
      raise
    raise PixelCacheError(f'{path}: cannot be made ({e.strerror}). {_way_out()}') from None


def _way_out() -> str:
  return (
    'Config.pixel_cache_dir can name a folder with more room, Config.factor takes smaller pictures.'
  )


def _make(path: str, data_dir: str, scene: scenes.Scene, first: np.ndarray, progress: bool) -> None:
  needed, free = num_bytes(scene), shutil.disk_usage(os.path.dirname(path)).free
  if needed > free:
    raise PixelCacheError(
      f'{path}: would take {needed / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free. '
      f'{_way_out()}'
    )
  with files.whole(path) as temporary, open(temporary, 'wb') as f:

    def keep(start: int, image: np.ndarray) -> None:
      rest, at = memoryview(image).cast('B'), 3 * start
      while rest:
        written = os.pwrite(f.fileno(), rest, at)
        rest, at = rest[written:], at + written

    _decode(data_dir, scene, first, keep, progress)
    os.fsync(f.fileno())


def keep_on_device(config: configs.Config, store: batches.PixelStore) -> bool:
  """Whether the pixels go to the device: as told, or if they take under a quarter of it.

  Raises:
    ConfigError: told to, but they are more than 32-bit indices reach.
  """
  countable = store.first.dtype == np.int32
  if config.pixels_on == 'device' and not countable:
    raise configs.ConfigError(
      "Config.pixels_on = 'device' is for less than 2^31 training pixels; use 'auto', or "
      'Config.factor to downsample.'
    )
  if config.pixels_on != 'auto':
    return config.pixels_on == 'device'
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get('bytes_limit') or available_memory()
  return countable and (limit is None or stored_bytes(store) < limit / 4)


def load(
  settings: configs.Settings, scene: scenes.Scene, mesh: Mesh
) -> tuple[batches.PixelStore, str]:
  """The training images' pixels, on the device where they fit; and where they are."""
  config = settings.config
  store = read(config, scene, progress=processes.is_main())
  on_disk = isinstance(store.rgb, MappedPixels)
  if not keep_on_device(config, store):
    return store, 'disk' if on_disk else 'host'
  planes = store.rgb.planes() if on_disk else store.rgb
  on_device = tuple(sharding.replicate(plane, mesh) for plane in planes)
  return batches.PixelStore(on_device, sharding.replicate(store.first, mesh)), 'device'


def training_cameras(config: configs.Config, scene: scenes.Scene) -> structs.Cameras:
  """The cameras of the training images, with what masks and weights say of their pixels."""
  cams = scene.cameras.take(np.array(scene.train))
  masks = scenes.read_masks(config.data_dir, scene, scene.train, processes.is_main())
  weights = [scene.weights[row] for row in scene.train] if scene.weights else None
  return cams.replace(supervision=batches.make_supervision(cams.size, masks, weights))
