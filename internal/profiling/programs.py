"""What the benchmark times: matrix products, training steps, rendered chunks."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable

import jax
import numpy as np

from .. import cameras, structs
from ..devices import sharding
from ..rendering import renderer
from ..training import batches, train_step
from . import costs


def on_cpu() -> bool:
  return jax.default_backend() == 'cpu'


def matmul_row(dtype: str, seconds: float, device=None) -> dict:
  """TFLOP/s of a device (None: the first) in large matrix products, several in one program."""
  side, chained = (512, 4) if on_cpu() else (8192, 8)
  keys = jax.device_put(jax.random.split(jax.random.key(0)), device)
  x, w = (jax.random.normal(k, (side, side), dtype) for k in keys)
  w = w / side**0.5  # The products keep their size.

  @jax.jit
  def chain(x, w):
    for _ in range(chained):
      x = x @ w
    return x

  timed = costs.time_groups(lambda: chain(x, w), seconds)
  tflops = 2 * side**3 * chained / timed['ms'] / 1e9
  return {'name': f'{chained} x {side}^3, {dtype}', 'devices': 1, **timed, 'tflops': tflops}


def ring(count: int, width: int, height: int) -> structs.Cameras:
  """Perspective cameras on a circle of radius 1 around the z axis, looking at the origin."""
  turn = 2 * np.pi * np.arange(count) / count
  eye = np.stack([np.cos(turn), np.sin(turn), np.full(count, 0.4)], -1)
  back = eye / np.linalg.norm(eye, axis=-1, keepdims=True)  # OpenGL: cameras look along -z.
  right = np.stack([-np.sin(turn), np.cos(turn), np.zeros(count)], -1)
  pose = np.stack([right, np.cross(back, right), back, eye], -1)
  inverse = cameras.pixtocam_from_intrinsics(0.8 * width, 0.8 * width, width / 2, height / 2)
  return cameras.make_cameras(inverse, pose, np.array([[width, height]] * count))


def synthetic() -> tuple[structs.Cameras, batches.PixelStore]:
  """A ring of cameras, and random pixels of theirs."""
  count, width, height = (8, 96, 64) if on_cpu() else (64, 800, 533)
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(count)]
  return ring(count, width, height), batches.make_store(images)


@dataclasses.dataclass(frozen=True)
class Program:
  """Something to be timed, compiled and not yet run."""

  call: Callable  # Starts the next step or chunk and returns what to wait for.
  rays: int  # Of one call.
  facts: dict  # Of compiling it.
  hlo: str

  def time(self, seconds: float) -> dict:
    """Facts and milliseconds (`profiling.time_groups`), after a first call that is a fact too."""
    began = time.perf_counter()
    jax.block_until_ready(self.call())
    first = {'first_call_seconds': time.perf_counter() - began}
    timed = costs.time_groups(self.call, seconds)
    return {**self.facts, **first, **timed, 'rays_per_second': self.rays / timed['ms'] * 1e3}


def train_program(settings, mesh, cams, pixels) -> Program:
  """Takes training steps as train.py does."""
  step_fn = train_step.make_train_step(settings, mesh)
  state = sharding.place(train_step.create_state(settings), mesh)
  table = sharding.replicate(cams, mesh)
  draw, counter = train_step.make_draw(settings.config, mesh), itertools.count()

  def source():
    if isinstance(pixels.first, jax.Array):
      return pixels
    return train_step.host_pixels(draw, next(counter), pixels, cams.size, mesh)

  def call():
    nonlocal state
    state, stats = step_fn(state, table, source())
    return stats

  facts, hlo = costs.compile_first(step_fn, state, table, source())
  facts['micro_batches'] = getattr(step_fn, 'micro_batches', 1)
  return Program(call, settings.config.batch_size, facts, hlo)


def render_program(settings, mesh, cams) -> Program:
  """Renders chunks of camera 0, one after the other."""
  render_chunk = renderer.make_chunk_renderer(settings, mesh)
  params = sharding.replicate(train_step.create_state(settings).params, mesh)
  table = sharding.replicate(cams, mesh)
  where = lambda start: (np.int32(0), np.int32(start), np.float32(1))  # noqa: E731
  facts, hlo = costs.compile_first(render_chunk, params, table, *where(0))
  # The renderer may have settled for fewer rays at once than it was told.
  chunk = getattr(render_chunk, 'choice', None) or settings.config.render_chunk_size
  starts = itertools.cycle(range(0, max(int(cams.size[0].prod()) - chunk, 0) + 1, chunk))

  def call():
    return render_chunk(params, table, *where(next(starts)))

  return Program(call, chunk, facts, hlo)
