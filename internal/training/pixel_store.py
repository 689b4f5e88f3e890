"""The training pixels of a capture, in host memory or in a memory-mapped file.

Pixels that exceed memory are decoded once into a cache file, which later starts reuse. It is named
by a hash of its sources and written atomically, and a folder holds only one. The folder's lock file
holds its SHA-256, which is verified if the cache file was touched, copied or changed.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import io
import json
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import IO

import jax
import numpy as np
from jax.sharding import Mesh

from .. import configs, structs
from ..datasets import exposures, images, scenes, tracks
from ..devices import processes, sharding
from ..errors import UserError
from ..system import files
from . import batches, per_camera

_FOLDER = '.pixels'  # In the capture, unless Config.pixel_cache_dir is set.
_SHARE = 0.5  # Maximum part of the free memory.
_VERSION = 1  # Of the file format.
_MORE_SPACE = (
  'Set Config.pixel_cache_dir to a folder with more space, or Config.factor for smaller images.'
)
_OTHER_FOLDER = 'Set Config.pixel_cache_dir to a folder that can be written.'
_READERS, _PER_READER = 32, 128  # Threads, and pixels per thread.


class PixelCacheError(UserError):
  """The cache file of pixels cannot be written."""


class MappedPixels:
  """Memory-mapped pixels [n, 3] uint8; `pixels[index]` reads those of indices [m]."""

  def __init__(self, path: str):
    with open(path, 'rb') as f:
      self._file = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    self._file.madvise(mmap.MADV_RANDOM)  # Read-ahead is useless here.
    self._table = np.frombuffer(self._file, np.uint8).reshape(-1, 3)
    self._readers = futures.ThreadPoolExecutor(_READERS)
    self.nbytes = self._table.nbytes

  def __getitem__(self, index: np.ndarray) -> np.ndarray:
    parts = np.array_split(index, min(_READERS, len(index) // _PER_READER + 1))
    # Disks serve many reads in parallel.
    colors = np.concatenate(list(self._readers.map(self._table.__getitem__, parts)))
    # Pages stay in the page cache but no longer count as memory of this process.
    self._file.madvise(mmap.MADV_DONTNEED)
    return colors

  def planes(self) -> Iterator[np.ndarray]:
    """Yields one array [n] per colour channel."""
    for channel in range(3):
      yield np.ascontiguousarray(self._table[:, channel])


def _sizes(scene: scenes.Scene) -> np.ndarray:
  """Returns the widths and heights [n, 2] of the training images."""
  return scene.cameras.size[list(scene.train)]


def num_bytes(scene: scenes.Scene) -> int:
  """Returns the number of bytes of the training pixels."""
  return int(3 * _sizes(scene).astype(np.int64).prod(-1).sum())


def _number_in(path: str, before: str = '') -> int | None:
  """Reads the number after `before` in a system file; None if there is none."""
  try:
    with open(path) as f:
      return int(f.read().partition(before)[2].split()[0] if before else f.read())
  except (OSError, ValueError, IndexError):
    return None


def available_memory() -> int | None:
  """Returns the free bytes of this machine or container; None if unknown."""
  kilobytes = _number_in('/proc/meminfo', 'MemAvailable:')
  limit, used = (_number_in(f'/sys/fs/cgroup/memory.{name}') for name in ('max', 'current'))
  known = [] if kilobytes is None else [1024 * kilobytes]
  known += [] if limit is None or used is None else [limit - used]
  return min(known, default=None)


def read(
  config: configs.Config,
  scene: scenes.Scene,
  progress: bool = True,
  stop: threading.Event | None = None,
  where: str | None = None,
) -> batches.PixelStore:
  """Decodes the training images into memory, or into a file if they need over half of it.

  Args:
    config: settings of the pixels.
    scene: the capture.
    progress: whether to show a progress bar.
    stop: ends the reading once it is set.
    where: what `place` returned, if it was called: the free memory may have changed since.

  Raises:
    DataError, DataNotFoundError: as `scene.read_image`.
    PixelCacheError: the file cannot be written.
    futures.CancelledError: `stop` was set.
  """
  first, stop = batches.first_pixels(_sizes(scene)), stop or threading.Event()
  if where == 'disk' or (where != 'host' and _keep_on_disk(config, scene)):
    return batches.PixelStore(_mapped(config, scene, first, progress, stop), first)
  planes = np.empty((3, num_bytes(scene) // 3), np.uint8)

  def keep(start: int, image: np.ndarray) -> None:
    planes[:, start : start + image.size // 3] = image.reshape(-1, 3).T

  _decode(config.data_dir, scene, first, keep, progress, stop)
  return batches.PixelStore(tuple(planes), first)


def _decode(
  data_dir: str,
  scene: scenes.Scene,
  first: np.ndarray,
  keep: Callable[[int, np.ndarray], None],
  progress: bool,
  stop: threading.Event,
) -> None:
  """Calls keep(index of its first pixel, image) for each training image, from threads."""

  def decode(k: int) -> None:
    if stop.is_set():
      raise futures.CancelledError
    keep(int(first[k]), scenes.read_image(data_dir, scene, scene.train[k]))

  images.in_threads(decode, range(len(scene.train)), 'reading images' if progress else None)


def _key(data_dir: str, scene: scenes.Scene) -> str:
  """Returns a hash of the image files: names, sizes and modification times."""
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
  config: configs.Config,
  scene: scenes.Scene,
  first: np.ndarray,
  progress: bool,
  stop: threading.Event,
) -> MappedPixels:
  """Maps the cache file; one process creates it if necessary."""
  folder = _folder(config)
  path = os.path.join(folder, f'{_key(config.data_dir, scene)}.rgb')
  try:
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'lock'), 'a+') as lock:
      _lock(lock, stop)
      if not _is_intact(path, num_bytes(scene), lock, stop):
        # Outdated and incomplete files; processes that map them keep them.
        for old in glob.glob(os.path.join(glob.escape(folder), '*.rgb')):
          os.remove(old)
        _make(path, config.data_dir, scene, first, progress, stop)
        _record(path, _sha256(path, stop), lock)
      return MappedPixels(path)
  except OSError as e:
    if e.errno is None:  # From decoding an image.
      raise
    raise PixelCacheError(
      f'{path}: cannot be written ({e.strerror}). '
      f'{_MORE_SPACE if files.is_disk_full(e) else _OTHER_FOLDER}'
    ) from None


def _folder(config: configs.Config) -> str:
  return config.pixel_cache_dir or os.path.join(config.data_dir, _FOLDER)


def check_folder(config: configs.Config, scene: scenes.Scene) -> None:
  """Raises a PixelCacheError if the cache file could not be written; writes nothing."""
  place = folder = _folder(config)
  while not files.exists(place):  # The folder is made when it is needed.
    place = os.path.dirname(place) or '.'
  if not (files.is_folder(place) and os.access(place, os.W_OK | os.X_OK)):
    raise PixelCacheError(f'{folder}: cannot be written. {_OTHER_FOLDER}')
  if not glob.glob(os.path.join(glob.escape(folder), '*.rgb')):
    _check_space(folder, place, scene)


def _check_space(path: str, folder: str, scene: scenes.Scene) -> None:
  needed, free = num_bytes(scene), shutil.disk_usage(folder).free
  if needed > free:
    raise PixelCacheError(
      f'{path}: needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free. {_MORE_SPACE}'
    )


def _lock(lock: IO[str], stop: threading.Event) -> None:
  """Waits for the lock, which is released when the file is closed or the process ends."""
  while True:
    try:
      return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      if stop.wait(0.1):
        raise futures.CancelledError from None


class _Reader(io.FileIO):
  """A file whose reading ends with CancelledError once `stop` is set."""

  def __init__(self, path: str, stop: threading.Event):
    super().__init__(path)
    self._stop = stop

  def readinto(self, buffer) -> int:
    if self._stop.is_set():
      raise futures.CancelledError
    return super().readinto(buffer)


def _sha256(path: str, stop: threading.Event) -> str:
  with _Reader(path, stop) as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _stamp(path: str) -> list[int]:
  status = os.stat(path)
  return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _record(path: str, sha256: str, lock: IO[str]) -> None:
  lock.truncate(0)
  json.dump({'file': os.path.basename(path), 'stamp': _stamp(path), 'sha256': sha256}, lock)


def _is_intact(path: str, size: int, lock: IO[str], stop: threading.Event) -> bool:
  """Returns whether the cache file has the content that was recorded in the open lock file."""
  lock.seek(0)
  try:
    known = json.loads(lock.read())
    name, stamp, sha256 = known['file'], known['stamp'], known['sha256']
  except (ValueError, LookupError, TypeError, RecursionError):
    return False
  if name != os.path.basename(path) or not os.path.isfile(path) or os.path.getsize(path) != size:
    return False
  if stamp != _stamp(path):  # Hashing takes about a second per gigabyte.
    if _sha256(path, stop) != sha256:
      return False
    _record(path, sha256, lock)
  return True


def _make(
  path: str,
  data_dir: str,
  scene: scenes.Scene,
  first: np.ndarray,
  progress: bool,
  stop: threading.Event,
) -> None:
  _check_space(path, os.path.dirname(path), scene)
  with files.whole(path) as temporary, open(temporary, 'wb') as f:

    def keep(start: int, image: np.ndarray) -> None:
      rest, at = memoryview(image).cast('B'), 3 * start
      while rest:
        written = os.pwrite(f.fileno(), rest, at)
        rest, at = rest[written:], at + written

    _decode(data_dir, scene, first, keep, progress, stop)
    os.fsync(f.fileno())


def _keep_on_disk(config: configs.Config, scene: scenes.Scene) -> bool:
  free = available_memory()
  too_many = free is not None and num_bytes(scene) > _SHARE * free
  return config.pixels_on == 'disk' or (config.pixels_on == 'auto' and too_many)


def keep_on_device(config: configs.Config, scene: scenes.Scene) -> bool:
  """Returns whether pixels go to the device: if configured, or if under a quarter of its memory.

  Raises:
    ConfigError: pixels_on is 'device', but there are too many for 32-bit indices.
  """
  countable = batches.first_pixels(_sizes(scene)).dtype == np.int32
  if config.pixels_on == 'device' and not countable:
    raise configs.ConfigError(
      "Config.pixels_on = 'device' needs fewer than 2^31 training pixels; use 'auto', or "
      'Config.factor to downsample.'
    )
  if config.pixels_on != 'auto':
    return config.pixels_on == 'device'
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get('bytes_limit') or available_memory()
  return countable and (limit is None or num_bytes(scene) < limit / 4)


def place(config: configs.Config, scene: scenes.Scene) -> str:
  """Returns where `load` puts the pixels: 'device', 'host' or 'disk'."""
  if keep_on_device(config, scene):
    return 'device'
  return 'disk' if _keep_on_disk(config, scene) else 'host'


def of_a_step(
  config: configs.Config, scene: scenes.Scene, mesh: Mesh, on_device: bool
) -> batches.PixelStore | jax.ShapeDtypeStruct:
  """Returns the shapes of the pixels that a training step takes, before they are read.

  They are those of all pixels if these are kept on the device, or else of a batch's colours.
  """
  if not on_device:
    return jax.ShapeDtypeStruct((config.batch_size, 3), np.uint8, sharding=sharding.sharded(mesh))
  return sharding.replicated_shapes(batches.store_shapes(_sizes(scene)), mesh)


def load(
  settings: configs.Settings, scene: scenes.Scene, mesh: Mesh
) -> tuple[batches.PixelStore, str]:
  """Loads the training pixels, on the device if they fit.

  Returns:
    (store, place), where place is 'device', 'host' or 'disk'.
  """
  config = settings.config
  where = place(config, scene)
  store = read(config, scene, processes.is_main(), where=where)
  return (put_on_device(store, mesh) if where == 'device' else store), where


def put_on_device(store: batches.PixelStore, mesh: Mesh) -> batches.PixelStore:
  """Puts pixels that `read` has read on each device."""
  planes = store.rgb if isinstance(store.rgb, tuple) else store.rgb.planes()
  on_device = tuple(sharding.replicate(plane, mesh) for plane in planes)
  return batches.PixelStore(on_device, sharding.replicate(store.first, mesh))


def training_cameras(
  settings: configs.Settings, scene: scenes.Scene, progress: bool = True
) -> structs.Cameras:
  """Returns the cameras of the training images, with what training needs of each image."""
  config = settings.config
  cams = scene.cameras.take(np.array(scene.train))
  masks = scenes.read_masks(config.data_dir, scene, scene.train, progress and processes.is_main())
  weights = [scene.weights[row] for row in scene.train] if scene.weights else None
  supervision = batches.make_supervision(cams.size, masks, weights)
  if config.depth_loss_mult > 0:
    rays = max(1, round(config.depth_loss_rays * config.batch_size))
    supervision = (supervision or structs.Supervision()).replace(
      tracks=tracks.read(config.data_dir, scene, masks), track_rays=rays
    )
  cams, start = cams.replace(supervision=supervision), None
  if config.exposure != 'none':
    start = exposures.log_exposures(config.data_dir, scene)
  return per_camera.add_tables(settings, cams, start)
