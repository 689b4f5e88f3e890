"""Times the parts of drawing Gaussians, and compares the GPU's kernel with plain XLA.

    python tests/splats_speed.py [RUN] [--count 1000000] [--repeats 20]

Draws the Gaussians that scripts/export.py has made of RUN from its first training camera, or
`--count` random ones in a picture of 800x533 pixels. Prints the least and the median milliseconds
of each part, and how far the kernel's results are from those of plain XLA.
"""

import argparse
import functools
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from internal import cli
from internal.export import points
from internal.rendering import trained
from internal.splats import distil, fit, formats, gaussians, rasterizer

SIZE = (800, 533)


def random_scene(count: int) -> tuple[gaussians.Splats, gaussians.Pinhole]:
  """Returns Gaussians of about a pixel, within the view of a camera, and the camera."""
  rng = np.random.default_rng(0)
  depth = rng.uniform(1, 6, (count, 1))
  scales = 0.0016 * depth * rng.lognormal(0, 0.7, (count, 3))
  splats = gaussians.Splats(
    means=np.concatenate([rng.uniform(-1.1, 1.1, (count, 2)) * depth * [0.5, 0.35], depth], 1),
    log_scales=np.log(scales),
    quaternions=rng.normal(size=(count, 4)),
    opacity_logits=rng.normal(0, 2, count),
    sh=np.pad(rng.normal(size=(count, 1, 3)), ((0, 0), (0, gaussians.SH_COEFFICIENTS - 1), (0, 0))),
  )
  centre = np.float32(SIZE) / 2
  camera = gaussians.Pinhole(np.float32([800, 800]), centre, np.eye(3), np.zeros(3), SIZE)
  return jax.tree.map(np.float32, (splats, camera))


def exported_scene(folder: str) -> tuple[gaussians.Splats, gaussians.Pinhole]:
  """Returns a run's exported Gaussians and its first training camera."""
  run, out = trained.open_trained(folder), os.path.join(folder, 'export')
  to_world = np.array(run.scene.world_transform, np.float64)
  to_world[:3, 3] += to_world[:3, :3] @ points.offset(run.scene)
  splats = formats.moved(formats.read_ply(os.path.join(out, 'splats.ply')), to_world)
  camera = gaussians.pinhole(run.scene.cameras, run.scene.train[0])
  return jax.tree.map(np.float32, (splats, camera))


class Clock:
  """Times calls."""

  def __init__(self, repeats: int):
    self._repeats = repeats

  def __call__(self, name: str, call, *args):
    """Prints a call's time after the first one, and returns what it returns."""
    result, times = jax.block_until_ready(call(*args)), []
    for _ in range(self._repeats):
      began = time.perf_counter()
      jax.block_until_ready(call(*args))
      times.append(1e3 * (time.perf_counter() - began))
    print(f'{name:32}{min(times):10.3f}{np.median(times):10.3f}', flush=True)
    return result


def compare(clock: Clock, splats: gaussians.Splats, camera: gaussians.Pinhole) -> None:
  """Times projecting, sorting, drawing and gradients, with the kernel where there is a GPU."""
  projected = clock('projecting', jax.jit(gaussians.project), splats, camera)
  capacity = distil.capacity_for(int(rasterizer.count_pairs(projected, camera.size)))
  make_lists = jax.jit(rasterizer._make_lists, static_argnums=(1, 2, 3))
  side = rasterizer.TILE  # On a CPU too, so that parts can be compared.
  lists = clock('sorting', make_lists, projected, camera.size, capacity, side)
  length = np.asarray(lists.end - lists.begin)
  print(
    f'{length.sum():,} pairs; of a tile {length.mean():.0f} on average, {length.max():,} at most'
  )
  parts = projected.xy, projected.conic, projected.opacity[:, None], projected.rgb
  features, across = jnp.concatenate(parts, -1), -(-camera.size[0] // side)
  groups = functools.partial(rasterizer._blend_groups, across=across)
  plain = clock('drawing, plain XLA', jax.jit(groups), features, lists)
  rng = np.random.default_rng(0)
  wanted = tuple(jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in plain)
  groups = functools.partial(rasterizer._differentiate_groups, across)
  truth = clock('gradients, plain XLA', jax.jit(groups), features, lists, plain, wanted)
  if jax.default_backend() == 'gpu':
    forward = jax.jit(rasterizer._blend_forward, static_argnums=2)
    drawn = clock('drawing, kernel', forward, features, lists, across)[1][2]
    backward = jax.jit(functools.partial(rasterizer._sum_rows, across))
    found = clock('gradients, kernel', backward, features, lists, drawn, wanted)
    error = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(drawn, plain))
    relative = jnp.max(jnp.abs(found - truth) / jnp.max(jnp.abs(truth), 0))
    print(f'largest errors of the kernel: {error:.1e}; gradients, relative {float(relative):.1e}')
  background = np.zeros(3, np.float32)
  render = jax.jit(rasterizer.render, static_argnums=3)
  clock('a whole picture', render, splats, camera, background, capacity)
  target = np.full((*camera.size[::-1], 4), 128, np.uint8)
  state = [fit.start(splats)]

  def step(rate):  # The state's memory is reused.
    state[0], error = fit.step(state[0], camera, target, background, rate, capacity)
    return error

  clock('a step of a fit', step, np.float32(1e-6))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('run', nargs='?', help='a run with export/splats.ply')
  parser.add_argument('--count', type=int, default=1_000_000)
  parser.add_argument('--repeats', type=int, default=20)
  args = parser.parse_args()
  splats, camera = exported_scene(args.run) if args.run else random_scene(args.count)
  print(f'{len(splats.means):,} Gaussians, {camera.size[0]}x{camera.size[1]} pixels')
  print(f'{"milliseconds":32}{"least":>10}{"median":>10}')
  compare(Clock(args.repeats), *jax.device_put((splats, camera)))


if __name__ == '__main__':
  cli.run(main)
