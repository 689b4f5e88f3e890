"""Makes the demo capture: images and exact poses of a still life in an endless landscape."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import tempfile
from collections.abc import Iterator

import numpy as np
import PIL.Image

from ..errors import UserError
from ..system import progress
from . import passers_by as passers_by_lib
from . import world

_SUBSAMPLES = 3  # A pixel is the mean of 3 x 3 rays.
_STAMP = 'demo_scene.json'


class DemoSceneError(UserError):
  """Invalid settings, or a folder that must not be replaced."""


def camera_poses(count: int, seed: int) -> np.ndarray:
  """Returns jittered poses on two rings, one above the other.

  World to camera, OpenCV axes (x right, y down, z forward): [count, 3, 4].
  """
  rng = np.random.default_rng(seed + 2)
  turn = 2 * np.pi * (np.arange(count) + rng.uniform(-0.3, 0.3, count)) / count
  radius = rng.uniform(2.75, 3.15, count)
  height = np.where(np.arange(count) % 2, 1.75, 0.95) + rng.uniform(-0.1, 0.1, count)
  eye = np.stack([radius * np.cos(turn), radius * np.sin(turn), height], -1)
  target = np.array([0, 0, 0.72]) + rng.uniform(-0.08, 0.08, (count, 3))
  forward = world.unit(target - eye)
  right = world.unit(np.cross(forward, [0, 0, 1]))
  rotation = np.stack([right, np.cross(forward, right), forward], 1)  # Rows: camera axes.
  return np.concatenate([rotation, -rotation @ eye[..., None]], -1)


def render_view(pose, width: int, height: int, focal: float, seed: int):
  """Renders a view: image uint8 [h, w, 3] and the depth of each pixel's central ray [h, w]."""
  solids, land = world.build_solids(seed), world.Landscape(seed)
  origin = (-pose[:, :3].T @ pose[:, 3]).astype(np.float32)
  total, middle = 0, None
  offsets = (np.arange(_SUBSAMPLES) + 0.5) / _SUBSAMPLES
  suns = world.sun_samples(_SUBSAMPLES)
  for s in range(_SUBSAMPLES**2):
    row, column = divmod(s, _SUBSAMPLES)
    y, x = np.mgrid[:height, :width].reshape(2, -1) + offsets[[[row], [column]]]
    plane = np.stack([(x - width / 2) / focal, (y - height / 2) / focal, np.ones_like(x)], -1)
    dirs = world.unit(plane @ pose[:, :3]).astype(np.float32)
    color, t = world.render_rays(solids, land, origin, dirs, 1 / focal, suns[s])
    total = total + color
    if s == _SUBSAMPLES**2 // 2:
      middle = t / np.linalg.norm(plane, axis=-1)  # Depth along the optical axis.
  linear = np.clip(total / _SUBSAMPLES**2, 0, 1)
  image = (linear ** (1 / 2.2) * 255 + 0.5).astype(np.uint8)
  return image.reshape(height, width, 3), middle.reshape(height, width)


def _surface_points(poses, images, depths, focal, seed, count=600):
  """Returns exact surface points under random pixels, at most 30 away: xyz, rgb [count, 3]."""
  rng = np.random.default_rng(seed + 3)
  height, width = depths[0].shape
  xyz, rgb = [], []
  while len(xyz) < count:
    i, y, x = rng.integers([len(poses), height, width])
    if depths[i][y, x] < 30:
      ray = [(x + 0.5 - width / 2) / focal, (y + 0.5 - height / 2) / focal, 1]
      xyz.append(poses[i][:, :3].T @ (depths[i][y, x] * np.array(ray) - poses[i][:, 3]))
      rgb.append(images[i][y, x])
  return np.array(xyz, np.float64), np.array(rgb, np.uint8)


@contextlib.contextmanager
def _workers() -> Iterator[concurrent.futures.Executor]:
  """Yields a pool with a single-threaded process for each core."""
  name = 'OPENBLAS_NUM_THREADS'  # Read when a worker imports NumPy.
  before = os.environ.get(name)
  os.environ[name] = '1'
  # Spawned, because forking a process with threads, such as JAX's, can deadlock.
  context = multiprocessing.get_context('spawn')
  pool = concurrent.futures.ProcessPoolExecutor(
    os.cpu_count(), context, signal.signal, (signal.SIGINT, signal.SIG_DFL)
  )
  try:
    yield pool
  finally:
    pool.shutdown(cancel_futures=True)
    os.environ.pop(name)
    if before is not None:
      os.environ[name] = before


def _write_capture(
  folder: pathlib.Path, width: int, height: int, count: int, seed: int, passers_by: float
) -> None:
  """Renders all views into `folder`/images and writes the COLMAP model into `folder`/sparse/0."""
  from .. import colmap  # Imports JAX, which the workers do not need.

  focal = 0.8 * width
  poses = camera_poses(count, seed)
  (folder / 'images').mkdir(parents=True)
  names = [f'view_{i:03d}.png' for i in range(count)]
  images, depths = [], []
  rng = np.random.default_rng(seed + 4)
  crowded = passers_by_lib.choose(count, passers_by, rng)
  with _workers() as pool:
    jobs = [pool.submit(render_view, pose, width, height, focal, seed) for pose in poses]
    for i, job in enumerate(progress.track(jobs, 'rendering the demo scene')):
      image, depth = job.result()
      shown = passers_by_lib.paste(image, rng) if i in crowded else image
      PIL.Image.fromarray(shown).save(folder / 'images' / names[i])
      images.append(image)
      depths.append(depth)
  camera = colmap.Camera(1, 'PINHOLE', width, height, (focal, focal, width / 2, height / 2))
  registered = {
    i: colmap.Image(i, colmap.quaternion(pose[:, :3]), tuple(map(float, pose[:, 3])), 1, name)
    for i, (pose, name) in enumerate(zip(poses, names), 1)
  }
  xyz, rgb = _surface_points(poses, images, depths, focal, seed)
  points = colmap.make_points(xyz, rgb, np.full(len(xyz), 0.5))
  sparse = folder / 'sparse' / '0'
  colmap.write_model(str(sparse), colmap.Model({1: camera}, registered, points), '.bin')


def _source_hash() -> str:
  """Returns a hash of the code behind the pixels, so that changed code renders a new scene."""
  modules = [__file__, world.__file__, passers_by_lib.__file__]
  sources = [pathlib.Path(module) for module in modules]
  return hashlib.sha256(b''.join(source.read_bytes() for source in sources)).hexdigest()


def make_demo_scene(
  folder: str | os.PathLike,
  width: int = 160,
  height: int = 120,
  images: int = 72,
  seed: int = 0,
  passers_by: float = 0.0,
) -> bool:
  """Makes the demo capture, a COLMAP folder with images/ and sparse/0/.

  The folder is written atomically. An existing demo scene with the same settings is kept, one with
  others is replaced. The pixels are a function of the arguments. Rendering starts worker processes,
  so a script must call this below `if __name__ == '__main__':`.

  Args:
    folder: where the capture goes.
    width, height: image size in pixels, at least 8x8.
    images: number of images, at least 3.
    seed: of the landscape, 0 or more.
    passers_by: fraction, 0 to 1, of the photographs that are not held out for tests into which
      people walk.

  Returns:
    True if the scene was rendered, False if it existed with these settings.

  Raises:
    DemoSceneError: an argument is out of range, or `folder` exists and is not a demo scene.
  """
  if min(width, height) < 8 or images < 3 or seed < 0:
    raise DemoSceneError(
      'The demo scene needs at least 3 images of at least 8x8 pixels and a seed of 0 or more, got '
      f'{images} images of {width}x{height} and seed {seed}.'
    )
  if not 0 <= passers_by <= 1:
    raise DemoSceneError(f'The fraction of passers-by must be 0 to 1, got {passers_by}.')
  out = pathlib.Path(folder).resolve()
  settings = {'width': width, 'height': height, 'images': images, 'seed': seed}
  settings |= {'passers_by': passers_by, 'source': _source_hash()}
  stamp = out / _STAMP
  if stamp.is_file() and json.loads(stamp.read_text()) == settings:
    return False
  if out.exists() and not stamp.is_file() and (not out.is_dir() or any(out.iterdir())):
    raise DemoSceneError(
      f'{out} exists and is not a demo scene: choose another folder, or remove it.'
    )
  out.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as temp:
    made = pathlib.Path(temp) / 'scene'
    _write_capture(made, width, height, images, seed, passers_by)
    (made / stamp.name).write_text(json.dumps(settings, indent=2) + '\n')
    if out.exists():
      os.replace(out, pathlib.Path(temp) / 'old')  # Deleted with the temporary folder.
    os.replace(made, out)
  return True
