"""Perturbs the poses of a COLMAP model, to measure how well they are refined.

    python tests/perturb_poses.py data/bonsai/sparse/0 data/perturbed/sparse/0 --degrees 1

Each camera is turned by `--degrees` about a random axis and moved by `--share` of the radius, the
median distance of the cameras from their mean, in a random direction. Every `--hold`-th image by
name keeps its pose: these are the test images. The perturbed cameras have no movement in common.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from internal import alignment, cli, colmap


def perturb(poses: np.ndarray, degrees: float, share: float, seed: int) -> np.ndarray:
  """Returns poses [n, 3, 4] turned and moved at random, aligned to the given ones."""
  rng = np.random.default_rng(seed)
  axis, step = (_unit(rng.normal(size=(len(poses), 3))) for _ in range(2))
  turn = poses[:, :, :3] @ _rotations(np.radians(degrees) * axis)
  centre = poses[:, :, 3] + share * alignment.radius(poses) * step
  moved = np.concatenate([turn, centre[..., None]], -1)
  for _ in range(10):  # Each alignment leaves out other outliers than the one before.
    rotation, centre = alignment.transform(moved, *alignment.align(moved, poses))
    moved = np.concatenate([rotation, centre[..., None]], -1)
  return moved


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _rotations(vectors: np.ndarray) -> np.ndarray:
  """Returns the rotations [n, 3, 3] about vectors [n, 3] by their norms (Rodrigues' formula)."""
  angle = np.linalg.norm(vectors, axis=-1)[:, None, None]
  x, y, z = np.moveaxis(_unit(vectors), -1, 0) if angle.any() else np.zeros((3, len(vectors)))
  zero = np.zeros_like(x)
  cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
  return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__)
  parser.add_argument('model', metavar='MODEL', help='folder of the model')
  parser.add_argument('out', metavar='OUT', help='folder of the perturbed model')
  parser.add_argument('--degrees', type=float, default=1.0, help='rotation of each camera')
  parser.add_argument('--share', type=float, default=0.02, help='movement, in radii')
  parser.add_argument('--hold', type=int, default=8, help='as Config.llffhold')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args(argv)
  model = colmap.read_model(args.model)
  ids = sorted(model.images, key=lambda i: model.images[i].name)
  ids = [i for k, i in enumerate(ids) if k % args.hold]
  poses = np.stack([colmap.camera_to_world(model.images[i]) for i in ids])
  images = dict(model.images)
  for i, pose in zip(ids, perturb(poses, args.degrees, args.share, args.seed)):
    old = images[i]
    images[i] = colmap.posed_image(i, pose, old.camera_id, old.name)
  colmap.write_model(args.out, dataclasses.replace(model, images=images), '.bin')


if __name__ == '__main__':
  cli.run(main)
