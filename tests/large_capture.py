"""Makes a capture of many large photographs, for measuring start-up time and memory.

    python tests/large_capture.py OUT_DIR [--images 2000 --width 2310 --height 1732]

Draws a few images and hard-links the others to them. OUT_DIR gets images/ and sparse/0/.
"""

from __future__ import annotations

import os
import pathlib
import sys

import numpy as np
import PIL.Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from internal import cli, colmap
from internal.demo import capture

DISTINCT = 8


def picture(width: int, height: int, seed: int) -> PIL.Image.Image:
  """Returns noise of several scales, which compresses like a photograph."""
  rng = np.random.default_rng(seed)
  total = np.zeros((height, width, 3), np.float32)
  for scale in (2, 8, 64, 512):
    shape = (-(-height // scale) + 1, -(-width // scale) + 1, 3)
    noise = PIL.Image.fromarray(rng.integers(0, 256, shape, np.uint8))
    total += np.asarray(noise.resize((width, height), PIL.Image.Resampling.BICUBIC)) / 4
  return PIL.Image.fromarray(total.astype(np.uint8))


def make(folder: pathlib.Path, count: int, width: int, height: int) -> None:
  """Writes a capture of `count` images."""
  (folder / 'images').mkdir(parents=True)
  names = [f'{i:06}.jpg' for i in range(count)]
  for i, name in enumerate(names):
    path = folder / 'images' / name
    if i < DISTINCT:
      picture(width, height, i).save(path, quality=90)
    else:
      os.link(folder / 'images' / names[i % DISTINCT], path)
  poses = capture.camera_poses(count, seed=0)
  images = {
    i: colmap.Image(i, colmap.quaternion(p[:, :3]), tuple(map(float, p[:, 3])), 1, name)
    for i, (p, name) in enumerate(zip(poses, names), 1)
  }
  camera = colmap.Camera(1, 'PINHOLE', width, height, (width, width, width / 2, height / 2))
  model = colmap.Model({1: camera}, images, colmap.make_points())
  colmap.write_model(str(folder / 'sparse' / '0'), model, '.bin')


def main(argv=None) -> None:
  parser = cli.make_parser(__doc__)
  parser.add_argument('out_dir', type=pathlib.Path, metavar='OUT_DIR', help='the capture')
  parser.add_argument('--images', type=int, default=2000, help='number of images')
  parser.add_argument('--width', type=int, default=2310, help='image width in pixels')
  parser.add_argument('--height', type=int, default=1732, help='image height in pixels')
  args = parser.parse_args(argv)
  make(args.out_dir, args.images, args.width, args.height)


if __name__ == '__main__':
  cli.run(main)
