"""Measures training and rendering, beside what the chip itself can do.

    python scripts/benchmark.py --gin_configs configs/360.gin --json bench.json
        [--data SCENE --factor N] [--profile DIR] [--scaling] [--sweep] [--only train,render]

Synthetic cameras and pixels stand in for a capture, so nothing else is needed. FLOPs are those of
matrix products, counted from the config. One process, all of its devices.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable

import flax
import jax
import jaxlib
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from internal import (
  batches,
  cameras,
  cli,
  configs,
  datasets,
  evaluation,
  files,
  profiling,
  sharding,
  structs,
  train_step,
)

PARTS = ('matmul', 'train', 'real', 'render')
_CPU_RAYS = 256  # On a CPU more rays than these would only take longer.
_GIB = 2**30
_COLUMNS = (
  ('', 'name', '<30', '{}'),
  ('devices', 'devices', '>7', '{}'),
  ('rays', 'rays', '>7', '{:,}'),
  ('compile s', 'compile_seconds', '>9', '{:.1f}'),
  ('ms', 'ms', '>9', '{:.2f}'),
  ('10..90%', 'range', '>19', '{}'),
  ('rays/s', 'rays_per_second', '>10', '{:,.0f}'),
  ('TFLOP/s', 'tflops', '>8', '{:.3g}'),
  ('of chip', 'fraction_of_chip', '>7', '{:.0%}'),
  ('temp GiB', 'temp_bytes', '>8', '{:.2f}'),
  ('args GiB', 'argument_bytes', '>8', '{:.2f}'),
  ('peak GiB', 'peak_bytes', '>8', '{:.2f}'),
)


def on_cpu() -> bool:
  return jax.default_backend() == 'cpu'


def say(text: str = '') -> None:
  print(text, flush=True)


def say_row(row: dict | None = None) -> None:
  """Prints a measurement as a line of the table; None prints the heading."""
  cells = []
  for title, key, align, form in _COLUMNS:
    value = title if row is None else row.get(key)
    if row is not None and value is not None:
      value = form.format(value / _GIB if key.endswith('_bytes') else value)
    cells.append(format('' if value is None else value, align))
  say(' '.join(cells).rstrip())


def time_groups(call: Callable, seconds: float) -> dict:
  """Milliseconds of `call`, which returns arrays to wait for: the median over groups of calls.

  Groups are long enough for the wait at their end not to count.
  """
  jax.block_until_ready([call(), call()])
  began = time.perf_counter()
  jax.block_until_ready([call() for _ in range(3)])
  size = int(np.clip(round(0.3 * 3 / (time.perf_counter() - began)), 1, 100))
  times, end = [], time.perf_counter() + seconds
  while time.perf_counter() < end or len(times) < 3:
    began = time.perf_counter()
    for _ in range(size):
      last = call()
    jax.block_until_ready(last)
    times.append((time.perf_counter() - began) / size * 1e3)
  low, middle, high = (float(v) for v in np.percentile(times, [10, 50, 90]))
  return {
    'ms': middle,
    'ms_10': low,
    'ms_90': high,
    'range': f'{low:.2f}..{high:.2f}',
    'groups': len(times),
    'calls_per_group': size,
  }


def measure_matmul(dtype: str, seconds: float) -> dict:
  """TFLOP/s of one device in large matrix products, several in one program."""
  side, chained = (512, 4) if on_cpu() else (8192, 8)
  keys = jax.random.split(jax.random.key(0))
  x, w = (jax.random.normal(k, (side, side), dtype) for k in keys)
  w = w / side**0.5  # The products keep their size.

  @jax.jit
  def chain(x):
    for _ in range(chained):
      x = x @ w
    return x

  timed = time_groups(lambda: chain(x), seconds)
  flops = 2 * side**3 * chained
  name = f'{chained} products of {side}^3, {dtype}'
  return {'name': name, 'devices': 1, **timed, 'tflops': flops / timed['ms'] / 1e9}


def ring(count: int, width: int, height: int) -> structs.Cameras:
  """Perspective cameras on a circle of radius 1 about the origin, looking at it."""
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


@contextlib.contextmanager
def cache_hits():
  """Counts the programs that the compilation cache answers meanwhile, in the yielded list."""
  hits, active = [], [True]

  def listen(event, **_):
    if active and event == '/jax/compilation_cache/cache_hits':
      hits.append(event)

  jax.monitoring.register_event_listener(listen)
  try:
    yield hits
  finally:
    active.clear()


def compile_first(function: Callable, *args) -> tuple[dict, str]:
  """Compiles a jit-compiled function ahead of its first call: what that took, and its HLO."""
  began = time.perf_counter()
  with cache_hits() as hits:
    if not hasattr(function, 'lower'):
      return {}, ''
    lowered = function.lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
  done = time.perf_counter()
  memory = compiled.memory_analysis()
  facts = {
    'trace_seconds': traced - began,
    'compile_seconds': done - began,
    'compiled_from_cache': bool(hits),
  }
  if memory is not None:
    facts['temp_bytes'] = memory.temp_size_in_bytes
    facts['argument_bytes'] = memory.argument_size_in_bytes
  return facts, compiled.as_text() or ''


def peak_bytes(mesh) -> int | None:
  """The most memory that any of the devices has held since the process began, where it says."""
  peaks = [(d.memory_stats() or {}).get('peak_bytes_in_use') for d in mesh.devices.flat]
  return max((p for p in peaks if p is not None), default=None)


def measure(name: str, call, facts: dict, rays: int, flops: int, mesh, args, chip) -> dict:
  """Times a program whose compilation is told by `facts`: a row of the table."""
  timed = time_groups(call, args.seconds)
  tflops = rays * flops / timed['ms'] / 1e9
  return {
    'name': name,
    'devices': mesh.size,
    'rays': rays,
    **facts,
    **timed,
    'rays_per_second': rays / timed['ms'] * 1e3,
    'tflops': tflops,
    'fraction_of_chip': tflops / (chip * mesh.size) if chip else None,
    'peak_bytes': peak_bytes(mesh),
  }


def profile(folder: str, call: Callable, row: dict, hlo: str, top: int) -> dict:
  """Traces a few calls, prints the kernels that took the most time, returns all of them."""
  steps = 3 if row['ms'] > 500 else 10
  jax.block_until_ready(call())
  with profiling.trace(folder):
    for _ in range(steps):
      last = call()
    jax.block_until_ready(last)
  found = profiling.kernels(folder, steps, profiling.op_names(hlo))
  busy = sum(k.ms for k in found)
  say(f'\n{row["name"]}: kernels take {busy:.2f} of {row["ms"]:.2f} ms; {len(found)} names')
  say(f'{"ms":>9} {"%":>6} {"count":>7}  kernel')
  for k in found[:top]:
    say(f'{k.ms:9.3f} {100 * k.ms / row["ms"]:6.1f} {k.count:7.1f}  {k.name[:80]}  {k.source}')
  say()
  return {
    'steps': steps,
    'kernel_ms': busy,
    'kernels': [{**dataclasses.asdict(k), 'percent': 100 * k.ms / row['ms']} for k in found],
  }


def train_call(settings, mesh, cams, pixels):
  """A call that takes the next training step as train.py does, and the facts of compiling it."""
  step_fn = train_step.make_train_step(settings, mesh)
  state = sharding.replicate(train_step.create_state(settings), mesh)
  table = sharding.replicate(cams, mesh)
  on_device = isinstance(pixels.first, jax.Array)
  draw, counter = train_step.make_draw(settings.config, mesh), itertools.count()

  def source():
    if on_device:
      return pixels
    return train_step.host_pixels(draw, next(counter), pixels, cams.size, mesh)

  def call():
    nonlocal state
    state, stats = step_fn(state, table, source())
    return stats

  facts, hlo = compile_first(step_fn, state, table, source())
  began = time.perf_counter()
  jax.block_until_ready(call())
  facts.setdefault('compile_seconds', time.perf_counter() - began)
  facts['first_call_seconds'] = time.perf_counter() - began
  return call, facts, hlo


def render_call(settings, mesh, cams):
  """A call that renders the next chunk of camera 0, and the facts of compiling it."""
  render_chunk = evaluation.make_chunk_renderer(settings, mesh)
  params = sharding.replicate(train_step.create_state(settings).params, mesh)
  table = sharding.replicate(cams, mesh)
  width, height = cams.size[0]
  chunk = settings.config.render_chunk_size
  starts = itertools.cycle(range(0, max(int(width * height) - chunk, 0) + 1, chunk))
  call = lambda: render_chunk(params, table, 0, next(starts), 1.0)  # noqa: E731
  facts, hlo = compile_first(render_chunk, params, table, 0, 0, 1.0)
  began = time.perf_counter()
  jax.block_until_ready(call())
  facts.setdefault('compile_seconds', time.perf_counter() - began)
  facts['first_call_seconds'] = time.perf_counter() - began
  return call, facts, hlo


class Benchmark:
  """The parts of a run, and the results so far, which are on disk after each."""

  def __init__(self, args: argparse.Namespace, settings: configs.Settings):
    self.args, self.settings = args, settings
    self.mesh = sharding.make_mesh(jax.devices()[: args.devices])
    self.chip = {}  # TFLOP/s by dtype.
    self.results = describe(settings, self.mesh)

  def keep(self, part: str, result) -> None:
    self.results[part] = result
    if self.args.json:
      with files.whole(self.args.json) as path, open(path, 'w') as f:
        json.dump(self.results, f, indent=2)

  def matmul(self) -> None:
    dtypes = {self.settings.model.mlp_dtype} | (set() if on_cpu() else {'bfloat16'})
    rows = {dtype: measure_matmul(dtype, self.args.seconds) for dtype in sorted(dtypes)}
    for dtype, row in rows.items():
      say_row(row)
      self.chip[dtype] = row['tflops']
    self.keep('matmul', rows)

  def measure_train(self, name, settings, mesh, cams, pixels, folder=None) -> dict:
    call, facts, hlo = train_call(settings, mesh, cams, pixels)
    return self.finish(name, call, facts, hlo, settings, 'train', mesh, folder)

  def measure_render(self, name, settings, mesh, cams, folder=None) -> dict:
    call, facts, hlo = render_call(settings, mesh, cams)
    return self.finish(name, call, facts, hlo, settings, 'render', mesh, folder)

  def finish(self, name, call, facts, hlo, settings, kind, mesh, folder) -> dict:
    config = settings.config
    rays = config.batch_size if kind == 'train' else config.render_chunk_size
    flops = profiling.ray_flops(settings)[kind]
    chip = self.chip.get(settings.model.mlp_dtype)
    row = measure(name, call, facts, rays, flops, mesh, self.args, chip)
    say_row(row)
    if folder:
      row['profile'] = profile(os.path.join(folder, kind), call, row, hlo, self.args.top)
    return row

  def train(self) -> None:
    cams, store = synthetic()
    pixels = sharding.replicate(store, self.mesh)
    row = self.measure_train(
      'training, synthetic', self.settings, self.mesh, cams, pixels, self.args.profile
    )
    self.keep('train', row)

  def real(self) -> None:
    import train  # Imports what only a training run needs.

    scene = datasets.load_dataset(self.settings.config)
    pixels, on_device = train.load_pixels(self.settings, scene, self.mesh)
    cams = scene.cameras.take(np.array(scene.train))
    row = self.measure_train('training, real', self.settings, self.mesh, cams, pixels)
    row['pixels_on'] = 'device' if on_device else 'host'
    other = self.results.get('train')
    if other:
      row['ms_ratio_to_synthetic'] = row['ms'] / other['ms']
      say(f'real / synthetic: {row["ms_ratio_to_synthetic"]:.3f} x the time a step')
    self.keep('real', row)

  def render(self) -> None:
    row = self.measure_render(
      'rendering', self.settings, self.mesh, synthetic()[0], self.args.profile
    )
    self.keep('render', row)


def describe(settings: configs.Settings, mesh) -> dict:
  """Where and on what the numbers were taken."""
  flops, config = profiling.ray_flops(settings), settings.config
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
    'mlp_dtype': settings.model.mlp_dtype,
    'batch_size': config.batch_size,
    'render_chunk_size': config.render_chunk_size,
    'flops_per_ray': flops,
    'flops_per_step': flops['train'] * config.batch_size,
  }


def shrink(settings: configs.Settings) -> configs.Settings:
  """The same with fewer rays at once, for a CPU."""
  config = settings.config
  sizes = {
    name: min(getattr(config, name), _CPU_RAYS) for name in ('batch_size', 'render_chunk_size')
  }
  return dataclasses.replace(settings, config=dataclasses.replace(config, **sizes))


def parse(argv=None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  cli.add_arguments(parser)
  parser.add_argument('--json', metavar='PATH', help='where all the numbers go')
  parser.add_argument('--data', metavar='DIR', help='train on this capture too')
  parser.add_argument('--factor', type=int, help="of the capture's pictures; sets Config.factor")
  parser.add_argument('--devices', type=int, metavar='N', help='use the first N devices')
  parser.add_argument('--seconds', type=float, help='to measure each program for')
  parser.add_argument('--profile', metavar='DIR', help='trace some steps, list their kernels')
  parser.add_argument('--top', type=int, default=25, help='how many kernels to print')
  parser.add_argument('--only', help=f'parts, with commas between: {",".join(PARTS)}')
  args = parser.parse_args(argv)
  args.only = args.only.split(',') if args.only else [p for p in PARTS if p != 'real' or args.data]
  unknown = set(args.only) - set(PARTS)
  if unknown:
    parser.error(f'--only knows {", ".join(PARTS)}, not {", ".join(sorted(unknown))}.')
  if args.data:
    args.gin_bindings.append(f'Config.data_dir = {args.data!r}')
  if args.factor is not None:
    args.gin_bindings.append(f'Config.factor = {args.factor}')
  return args


def main(argv=None) -> None:
  args = parse(argv)
  settings = configs.load_config(args.gin_configs, args.gin_bindings)
  if args.seconds is None:
    args.seconds = 2.0 if on_cpu() else 8.0
  shrunk = on_cpu() and settings != shrink(settings)
  if shrunk:
    settings = shrink(settings)
    say(f'On a CPU: shrunk to {_CPU_RAYS} rays at once.')
  benchmark = Benchmark(args, settings)
  benchmark.results['shrunk'] = shrunk
  for key, value in benchmark.results.items():
    say(f'{key:20} {value}')
  say()
  say_row()
  for part in PARTS:
    if part in args.only:
      getattr(benchmark, part)()
      gc.collect()


if __name__ == '__main__':
  cli.run(main)
