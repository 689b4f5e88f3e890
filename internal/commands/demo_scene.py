"""Makes the demo capture: a still life in an endless landscape, as a COLMAP folder.

    python scripts/make_demo_scene.py OUT_DIR [--width 160 --height 120 --images 72 --seed 0]

Cameras circle the still life at two heights. OUT_DIR gets images/ and sparse/0/; it appears when it
is complete, and a second run with the same settings finds it and stops.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile

import numpy as np
import PIL.Image

from ..demo import world
from ..system import progress

SUBSAMPLES = 3  # Each pixel is the mean of 3 x 3 rays.


def camera_poses(count: int, seed: int) -> np.ndarray:
  """World-to-camera [count, 3, 4], OpenCV axes: a ring at each of two heights, jittered."""
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
  """Image uint8 [h, w, 3] and distances [h, w] of each pixel's middle ray."""
  solids, land = world.build_solids(seed), world.Landscape(seed)
  origin = (-pose[:, :3].T @ pose[:, 3]).astype(np.float32)
  total, middle = 0, None
  offsets = (np.arange(SUBSAMPLES) + 0.5) / SUBSAMPLES
  suns = world.sun_samples(SUBSAMPLES)
  for s in range(SUBSAMPLES**2):
    y, x = np.mgrid[:height, :width].reshape(2, -1) + offsets[[[s // SUBSAMPLES], [s % SUBSAMPLES]]]
    plane = np.stack([(x - width / 2) / focal, (y - height / 2) / focal, np.ones_like(x)], -1)
    dirs = world.unit(plane @ pose[:, :3]).astype(np.float32)
    color, t = world.render_rays(solids, land, origin, dirs, 1 / focal, suns[s])
    total = total + color
    if s == SUBSAMPLES**2 // 2:
      middle = t / np.linalg.norm(plane, axis=-1)  # Depth along the optical axis.
  linear = np.clip(total / SUBSAMPLES**2, 0, 1)
  image = (linear ** (1 / 2.2) * 255 + 0.5).astype(np.uint8)
  return image.reshape(height, width, 3), middle.reshape(height, width)


def qvec(rotation: np.ndarray) -> tuple[float, ...]:
  """Unit quaternion (w, x, y, z) of a rotation [3, 3]: the top eigenvector of its K matrix."""
  m = rotation
  k = np.array([
    [m[0, 0] + m[1, 1] + m[2, 2], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
    [0, m[0, 0] - m[1, 1] - m[2, 2], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0]],
    [0, 0, m[1, 1] - m[0, 0] - m[2, 2], m[1, 2] + m[2, 1]],
    [0, 0, 0, m[2, 2] - m[0, 0] - m[1, 1]],
  ])  # fmt: skip
  q = np.linalg.eigh(k, UPLO='U')[1][:, -1]
  return tuple(map(float, q if q[0] >= 0 else -q))


def _surface_points(poses, images, depths, focal, seed, count=600):
  """True surface points under random pixels, no farther than 30: xyz and rgb [count, 3]."""
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


def make_scene(folder: pathlib.Path, width: int, height: int, count: int, seed: int) -> None:
  """Renders all views into `folder`/images and writes the model into `folder`/sparse/0."""
  from .. import colmap  # Imports JAX, which workers and a skipped run can do without.

  focal = 0.8 * width
  poses = camera_poses(count, seed)
  (folder / 'images').mkdir(parents=True)
  names = [f'view_{i:03d}.png' for i in range(count)]
  images, depths = [], []
  os.environ['OPENBLAS_NUM_THREADS'] = '1'  # The workers are as many as the cores.
  # Spawned: a fork of a process with threads (JAX's, in the tests) may hang.
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
    jobs = [pool.submit(render_view, pose, width, height, focal, seed) for pose in poses]
    for job, name in zip(progress.track(jobs, 'rendering the demo scene'), names):
      image, depth = job.result()
      PIL.Image.fromarray(image).save(folder / 'images' / name)
      images.append(image)
      depths.append(depth)
  camera = colmap.Camera(1, 'PINHOLE', width, height, (focal, focal, width / 2, height / 2))
  registered = {
    i: colmap.Image(i, qvec(pose[:, :3]), tuple(map(float, pose[:, 3])), 1, name)
    for i, (pose, name) in enumerate(zip(poses, names), 1)
  }
  xyz, rgb = _surface_points(poses, images, depths, focal, seed)
  ids = np.arange(1, len(xyz) + 1, dtype=np.uint64)
  points = colmap.Points(ids, xyz, rgb, np.full(len(xyz), 0.5))
  sparse = folder / 'sparse' / '0'
  colmap.write_model(str(sparse), colmap.Model({1: camera}, registered, points), '.bin')


def _parse_arguments(argv=None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(  # Not of cli, which imports JAX.
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('out_dir', type=pathlib.Path, metavar='OUT_DIR', help='the capture')
  parser.add_argument('--width', type=int, default=160, help='of an image, pixels')
  parser.add_argument('--height', type=int, default=120, help='of an image, pixels')
  parser.add_argument('--images', type=int, default=72, help='how many')
  parser.add_argument('--seed', type=int, default=0, help='of the landscape')
  args = parser.parse_args(argv)
  if min(args.width, args.height) < 8 or args.images < 3 or args.seed < 0:
    parser.error('at least 3 images of 8 x 8 pixels, and a seed of 0 or more.')
  return args


def _source_hash() -> str:
  """Of what makes the pixels: a changed script makes a new scene."""
  sources = [pathlib.Path(__file__), pathlib.Path(world.__file__)]
  return hashlib.sha256(b''.join(source.read_bytes() for source in sources)).hexdigest()


def main(argv=None) -> None:
  args = _parse_arguments(argv)
  out = args.out_dir.resolve()
  settings = {name: getattr(args, name) for name in ('width', 'height', 'images', 'seed')}
  settings['source'] = _source_hash()
  stamp = out / 'demo_scene.json'
  if stamp.is_file() and json.loads(stamp.read_text()) == settings:
    print(f'{out} is there already.')
    return
  if out.exists() and not stamp.is_file() and (not out.is_dir() or any(out.iterdir())):
    sys.exit(f'{out} exists and is no demo scene: name another folder, or remove it.')
  out.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as temp:
    made = pathlib.Path(temp) / 'scene'
    make_scene(made, args.width, args.height, args.images, args.seed)
    (made / stamp.name).write_text(json.dumps(settings, indent=2) + '\n')
    if out.exists():
      os.replace(out, pathlib.Path(temp) / 'old')  # Goes with the temporary folder.
    os.replace(made, out)
  print(f'{out}: {args.images} images of {args.width} x {args.height}.')
