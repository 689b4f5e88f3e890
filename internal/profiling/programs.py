"""Programs to time: matrix products, training steps, rendered chunks. All rays are synthetic."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import flax
import jax
import jaxlib
import numpy as np

from .. import cameras, configs, models, structs
from ..devices import sharding
from ..rendering import renderer
from ..training import batches, dispatch, per_camera, train_step
from . import benchmark_tables, costs


def on_cpu() -> bool:
  """Returns whether JAX runs on a CPU, where measurements use smaller sizes."""
  return jax.default_backend() == 'cpu'


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
  """Keeps `count` cores busy inside the block. The processes end with this one, even if killed."""
  code = f'import os\nwhile os.getppid() == {os.getpid()}: pass'
  started = [subprocess.Popen([sys.executable, '-c', code]) for _ in range(count)]
  try:
    yield
  finally:
    for process in started:
      process.kill()
      process.wait()


def attempt(name: str, function: Callable[[], dict]) -> dict:
  """Returns the function's row, or a row with its error, such as running out of memory."""
  try:
    return function()
  except (RuntimeError, ValueError, MemoryError) as error:
    message = ' '.join(str(error).split())[:300]
    row = {'name': name, 'error': f'{type(error).__name__}: {message}'}
  gc.collect()
  benchmark_tables.print_row(row)
  return row


def describe(settings: configs.Settings, mesh) -> dict:
  """Returns the software, devices and settings that measurements depend on."""
  flops, config = costs.ray_flops(settings), settings.config
  return {
    'command': shlex.join(sys.argv),
    'python': platform.python_version(),
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'flax': flax.__version__,
    'platform': jax.default_backend(),
    'device_kind': mesh.devices.flat[0].device_kind,
    'device_count': jax.device_count(),
    'devices_used': mesh.size,
    'mlp_dtype': models.mlp_dtype(settings.model.mlp_dtype).name,
    'batch_size': config.batch_size,
    'render_chunk_size': config.render_chunk_size,
    'flops_per_ray_train': flops['train'],
    'flops_per_ray_render': flops['render'],
    'flops_per_step': flops['train'] * config.batch_size,
  }


def matmul_row(dtype: str, seconds: float, device=None) -> dict:
  """Measures a device's TFLOP/s in large matrix products; `device=None` is the first."""
  side, chained = (512, 4) if on_cpu() else (8192, 8)
  keys = jax.device_put(jax.random.split(jax.random.key(0)), device)
  x, w = (jax.random.normal(k, (side, side), dtype) for k in keys)
  w = w / side**0.5  # Keeps the magnitude of the products.

  @jax.jit
  def chain(x, w):
    for _ in range(chained):
      x = x @ w
    return x

  timed = costs.time_groups(lambda: chain(x, w), seconds)
  tflops = 2 * side**3 * chained / timed['ms'] / 1e9
  return {'name': f'{chained} x {side}^3, {dtype}', 'devices': 1, **timed, 'tflops': tflops}


def ring(count: int, width: int, height: int) -> structs.Cameras:
  """Returns perspective cameras on a circle of radius 1 around z, looking at the origin."""
  turn = 2 * np.pi * np.arange(count) / count
  eye = np.stack([np.cos(turn), np.sin(turn), np.full(count, 0.4)], -1)
  back = eye / np.linalg.norm(eye, axis=-1, keepdims=True)  # OpenGL: cameras look along -z.
  right = np.stack([-np.sin(turn), np.cos(turn), np.zeros(count)], -1)
  pose = np.stack([right, np.cross(back, right), back, eye], -1)
  inverse = cameras.pixtocam_from_intrinsics(0.8 * width, 0.8 * width, width / 2, height / 2)
  return cameras.make_cameras(inverse, pose, np.array([[width, height]] * count))


def synthetic() -> tuple[structs.Cameras, batches.PixelStore]:
  """Returns a ring of cameras and random pixels for them."""
  count, width, height = (8, 96, 64) if on_cpu() else (64, 800, 533)
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(count)]
  return ring(count, width, height), batches.make_store(images)


def _one_step(_: float) -> int:
  return 1


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program that has not run yet."""

  call: Callable  # Starts the next steps or chunk; returns arrays to wait for.
  rays: int  # Per step or chunk.
  facts: dict  # From `costs.compile_first`.
  hlo: str
  pace: Callable[[float], int] = _one_step  # Takes a step's seconds; returns the steps of a call.
  rows: Callable[[], list] = list  # Returns the stats of each training step so far.

  def time(self, seconds: float) -> dict:
    """Returns the facts, the first call's seconds and the timing of `costs.time_groups`.

    Milliseconds are those of a step or chunk; `steps_per_call` tells how many a call has.
    """
    steps = self.pace(math.inf)  # As few as possible.
    first, again = (self._call_seconds() for _ in range(2))
    steps = self.pace(again / steps)
    timed = costs.time_groups(self.call, seconds)
    timed |= {name: timed[name] / steps for name in ('ms', 'ms_10', 'ms_90')}
    rate = {'rays_per_second': self.rays / timed['ms'] * 1e3, 'steps_per_call': steps}
    return {**self.facts, 'first_call_seconds': first, **timed, **rate}

  def _call_seconds(self) -> float:
    began = time.perf_counter()
    jax.block_until_ready(self.call())
    return time.perf_counter() - began

  def losses(self, steps: int) -> list[float]:
    """Returns the losses of the first training steps, which it runs."""
    while len(self.rows()) < steps:
      self.call()
    return [float(row['loss']) for row in self.rows()[:steps]]

  def trace(self, folder: str, steps: int) -> int:
    """Records a trace in `folder` of at least so many steps or chunks; returns their number."""
    jax.block_until_ready(self.call())
    a_call = self.pace(math.inf)
    calls = -(-steps // a_call)
    with costs.trace(folder):
      for _ in range(calls):
        last = self.call()
      jax.block_until_ready(last)
    return calls * a_call


def train_program(settings, mesh, cams, pixels, single: bool = False) -> Program:
  """Compiles the training steps; a call is a dispatch as in train.py, or a `single` step."""
  config, on_device = settings.config, isinstance(pixels.first, jax.Array)
  stops = (1,) if single else (config.print_every, config.checkpoint_every, config.gc_every)
  most, fixed = dispatch.shape(settings, mesh, stops)
  step_fn = train_step.make_train_step(settings, mesh, most=most, fixed=fixed)
  state = sharding.place(train_step.create_state(settings), mesh)
  table = sharding.replicate(per_camera.add_tables(settings, cams), mesh)
  load_pixels = train_step.make_load_pixels(config, mesh, pixels, cams.size)
  facts, hlo = costs.compile_first(step_fn, state, table, load_pixels(0))
  facts['micro_batches'] = step_fn.micro_batches
  steps, step = dispatch.Dispatcher(step_fn, table, load_pixels, on_device), 0

  def call():
    nonlocal state, step
    state, step = steps.take(state, step, step + (1 if single else steps.count))
    return steps.newest

  def pace(seconds):
    steps.set_pace(seconds)
    return 1 if single else steps.count

  return Program(call, config.batch_size, facts, hlo, pace, steps.rows)


def render_program(settings, mesh, cams) -> Program:
  """Compiles the renderer; each call renders the next chunk of camera 0."""
  render_chunk = renderer.make_chunk_renderer(settings, mesh)
  params = sharding.replicate(train_step.create_state(settings).params, mesh)
  table = sharding.replicate(cams, mesh)

  def chunk_at(start):
    return np.int32(0), np.int32(start), np.float32(1)  # Camera, first pixel, train_frac.

  facts, hlo = costs.compile_first(render_chunk, params, table, *chunk_at(0))
  chunk = render_chunk.choice  # It may have been reduced to fit in memory.
  starts = itertools.cycle(range(0, max(int(cams.size[0].prod()) - chunk, 0) + 1, chunk))

  def call():
    return render_chunk(params, table, *chunk_at(next(starts)))

  return Program(call, chunk, facts, hlo)


def synthetic_program(kind: str, settings, mesh, cams, store) -> Program:
  """Compiles the 'train' or 'render' program for synthetic cameras and pixels."""
  if kind == 'render':
    return render_program(settings, mesh, cams)
  return train_program(settings, mesh, cams, sharding.replicate(store, mesh))
