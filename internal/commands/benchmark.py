"""Measures training and rendering, beside what the chip itself can do.

    python scripts/benchmark.py --gin_configs configs/360.gin --json bench.json
        [--data SCENE --factor N] [--profile DIR] [--scaling] [--sweep] [--only train,render]

Synthetic cameras and pixels stand in for a capture, so nothing else is needed. FLOPs are those of
matrix products, counted from the config. One process, with all of its devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence

import flax
import jax
import jaxlib
import numpy as np

from .. import cli, configs, datasets, models, structs
from ..devices import sharding
from ..profiling import benchmark_tables as tables
from ..profiling import costs, programs
from ..rendering import renderer
from ..system import files
from ..training import pixel_store, train_step

PARTS = ('matmul', 'train', 'real', 'render', 'scaling', 'sweep')
SWEEPS = ('batch', 'width', 'prop_samples', 'nerf_samples', 'image')
_CPU_RAYS = 256  # On a CPU more rays than these would only take longer.


def attempt(name: str, function: Callable[[], dict]) -> dict:
  """The function's row, or one that says how it failed (out of memory, most of all)."""
  try:
    return function()
  except (RuntimeError, ValueError, MemoryError) as error:
    message = ' '.join(str(error).split())[:300]
    row = {'name': name, 'error': f'{type(error).__name__}: {message}'}
  gc.collect()
  tables.say_row(row)
  return row


def profile(folder: str, program: programs.Program, row: dict, top: int) -> dict:
  """Traces a few calls: prints the `top` kernels, returns all of them."""
  steps = 3 if row['ms'] > 500 else 10
  jax.block_until_ready(program.call())
  with costs.trace(folder):
    for _ in range(steps):
      last = program.call()
    jax.block_until_ready(last)
  found = costs.kernels(folder, steps, costs.op_names(program.hlo))
  tables.say_kernels(row, found, top)
  return {
    'steps': steps,
    'kernel_ms': sum(k.ms for k in found),
    'kernels': [{**dataclasses.asdict(k), 'percent': 100 * k.ms / row['ms']} for k in found],
  }


def change(settings: configs.Settings, part: str, **values) -> configs.Settings:
  """The settings with some fields of 'config', 'model', ... replaced."""
  changed = dataclasses.replace(getattr(settings, part), **values)
  return dataclasses.replace(settings, **{part: changed})


def sweep_points(kind: str, settings: configs.Settings) -> list[tuple[str, configs.Settings]]:
  """The settings that a sweep measures, each with what is said of it."""
  if kind == 'batch':
    sizes = [
      {k: max(int(getattr(settings.config, k) * f), 1) for k in ('batch_size', 'render_chunk_size')}
      for f in (0.25, 0.5, 1, 2)
    ]
    return [
      (f'{s["batch_size"]:,} / {s["render_chunk_size"]:,} rays', change(settings, 'config', **s))
      for s in sizes
    ]
  part, name, values = {
    'width': ('nerf_mlp', 'net_width', (256, 512, 1024)),
    'prop_samples': ('model', 'num_prop_samples', (32, 64, 128)),
    'nerf_samples': ('model', 'num_nerf_samples', (16, 32, 64)),
  }[kind]
  return [(f'{name} {v}', change(settings, part, **{name: v})) for v in values]


class Benchmark:
  """The parts of a run, and the results so far, which are on disk after each."""

  def __init__(self, args: argparse.Namespace, settings: configs.Settings, scene=None):
    self.args, self.settings, self.scene = args, settings, scene
    if args.devices and not 1 <= args.devices <= jax.device_count():
      raise configs.ConfigError(f'--devices {args.devices}: there are {jax.device_count()}.')
    self.mesh = sharding.make_mesh(jax.devices()[: args.devices])
    self.cams, self.store = programs.synthetic()
    self.chip = {}  # TFLOP/s by dtype.
    self.measured = {}  # Rows, for parts that want the same one again.
    self.render_image = self.params = None  # Made when they are wanted.
    self.results = describe(settings, self.mesh)

  def keep(self, part: str, result) -> None:
    self.results[part] = result
    if self.args.json:
      with files.whole(self.args.json) as path, open(path, 'w') as f:
        json.dump(self.results, f, indent=2)

  def finish(self, name, kind, settings, mesh, make: Callable, folder=None) -> dict:
    """Makes and times a program, prints its row and its profile."""
    gc.collect()  # What earlier programs left would count against this one's memory.
    program = make()
    timed = program.time(self.args.seconds)
    parts = program.facts.get('micro_batches', 1)
    name += f', in {parts} parts' if parts > 1 else ''
    tflops = program.rays * costs.ray_flops(settings)[kind] / timed['ms'] / 1e9
    chip = self.chip.get(models.mlp_dtype(settings.model.mlp_dtype).name)
    row = {
      'name': name,
      'devices': mesh.size,
      'rays': program.rays,
      **timed,
      'tflops': tflops,
      'fraction_of_chip': tflops / (chip * mesh.size) if chip else None,
      'peak_bytes': costs.peak_bytes(mesh.devices.flat),
    }
    tables.say_row(row)
    if folder:
      row['profile'] = profile(os.path.join(folder, kind), program, row, self.args.top)
    return row

  def synthetic_row(self, name, kind, settings, mesh, folder=None) -> dict:
    """Training or rendering of synthetic rays; what has been measured already is not again."""
    key = kind, mesh.size, repr(settings)
    if key not in self.measured:

      def make():
        if kind == 'render':
          return programs.render_program(settings, mesh, self.cams)
        pixels = sharding.replicate(self.store, mesh)
        return programs.train_program(settings, mesh, self.cams, pixels)

      run = lambda: self.finish(name, kind, settings, mesh, make, folder)  # noqa: E731
      self.measured[key] = attempt(name, run)
    return self.measured[key]

  def matmul(self) -> None:
    dtypes = {models.mlp_dtype(self.settings.model.mlp_dtype).name} | (
      set() if programs.on_cpu() else {'bfloat16'}
    )
    rows = {}
    for dtype in sorted(dtypes):
      rows[dtype] = programs.matmul_row(dtype, self.args.seconds)
      tables.say_row(rows[dtype])
      self.chip[dtype] = rows[dtype]['tflops']
    self.keep('matmul', rows)

  def train(self) -> None:
    name = 'training, synthetic'
    row = self.synthetic_row(name, 'train', self.settings, self.mesh, self.args.profile)
    self.keep('train', row)

  def render(self) -> None:
    row = self.synthetic_row('rendering', 'render', self.settings, self.mesh, self.args.profile)
    self.keep('render', row)

  def real(self) -> None:
    pixels, place = pixel_store.load(self.settings, self.scene, self.mesh)
    cams = self.scene.cameras.take(np.array(self.scene.train))
    name = f'training, real, {place}'
    make = lambda: programs.train_program(self.settings, self.mesh, cams, pixels)  # noqa: E731
    row = attempt(name, lambda: self.finish(name, 'train', self.settings, self.mesh, make))
    other = self.results.get('train', {})
    if 'ms' in row and 'ms' in other:
      row['ms_ratio_to_synthetic'] = row['ms'] / other['ms']
      tables.say(f'real takes {row["ms_ratio_to_synthetic"]:.3f} x the time of synthetic')
    self.keep('real', {**row, 'pixels_on': place})

  def scaling(self) -> None:
    counts = [2**k for k in range(self.mesh.size.bit_length())]
    counts += [self.mesh.size] if self.mesh.size not in counts else []
    found = []
    for kind, name in (('train', 'training'), ('render', 'rendering')):
      first = None
      for n in counts:
        mesh = sharding.make_mesh(self.mesh.devices.flat[:n])
        row = self.synthetic_row(f'{name}, {n} devices', kind, self.settings, mesh)
        row = {k: v for k, v in row.items() if k != 'profile'}
        first = first or row
        if 'ms' in row and 'ms' in first:
          row['speedup'] = row['rays_per_second'] / first['rays_per_second']
          tables.say(f'{name} on {n}: {row["speedup"]:.2f} x as fast as on {first["devices"]}')
        found.append({'kind': kind, **row})
        self.keep('scaling', found)

  def sweep(self) -> None:
    found = {}
    for kind in self.args.sweep:
      is_image = kind == 'image'
      points = found[kind] = []
      for point in self.image_points() if is_image else self.cost_points(kind):
        points.append(point)
        self.keep('sweep', found)
      tables.say(f'\n{tables.image_table(points) if is_image else tables.cost_table(points)}\n')

  def cost_points(self, kind: str):
    """Training and rendering at each point of a sweep."""
    for label, settings in sweep_points(kind, self.settings):
      point = {'label': label}
      for which in ('train', 'render'):
        row = self.synthetic_row(f'{which}, {label}', which, settings, self.mesh)
        point[which] = {k: v for k, v in row.items() if k != 'profile'}
      yield point

  def image_points(self):
    """Seconds for a whole image: those of smaller ones measured too, beside those computed."""
    sizes = [(48, 32), (96, 64)] if programs.on_cpu() else [(400, 267), (800, 533)]
    measured = len(sizes)
    sizes += [(2**k * sizes[-1][0], 2**k * sizes[-1][1]) for k in (1, 2)]
    row = self.synthetic_row('rendering', 'render', self.settings, self.mesh)
    for k, (width, height) in enumerate(sizes):
      point = {'name': f'image, {width} x {height}', 'rays': width * height}
      if 'ms' in row:
        point['computed_seconds'] = math.ceil(point['rays'] / row['rays']) * row['ms'] / 1e3
      if k < measured:
        cams = programs.ring(1, width, height)
        point |= attempt(point['name'], lambda cams=cams: self.image_seconds(cams))
      yield point

  def image_seconds(self, cams: structs.Cameras) -> dict:
    """The median of a few whole images, with what is done to bring them to the host."""
    if self.render_image is None:
      self.params = sharding.replicate(train_step.create_state(self.settings).params, self.mesh)
      self.render_image = renderer.make_image_renderer(self.settings, self.mesh)
    self.render_image(self.params, cams, 0)
    times = []
    for _ in range(3):
      began = time.perf_counter()
      self.render_image(self.params, cams, 0)
      times.append(time.perf_counter() - began)
    return {'measured_seconds': float(np.median(times))}


def describe(settings: configs.Settings, mesh) -> dict:
  """Where and of what the numbers are."""
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


def shrink(settings: configs.Settings) -> configs.Settings:
  """The same with fewer rays at once, for a CPU."""
  names = ('batch_size', 'render_chunk_size')
  sizes = {name: min(getattr(settings.config, name), _CPU_RAYS) for name in names}
  return change(settings, 'config', **sizes)


def _listed(text: str, known: Sequence[str], flag: str, parser) -> list[str]:
  names = list(known) if text == 'all' else text.split(',')
  unknown = [name for name in names if name not in known]
  if unknown:
    parser.error(f'{flag} knows {", ".join(known)}, not {", ".join(unknown)}.')
  return names


def parse(argv=None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  cli.add_arguments(parser)
  parser.add_argument('--json', metavar='PATH', help='where all the numbers go')
  parser.add_argument('--data', metavar='DIR', help='train on this capture too')
  parser.add_argument('--factor', type=int, help="of the capture's pictures: Config.factor")
  parser.add_argument('--devices', type=int, metavar='N', help='use the first N devices')
  parser.add_argument('--seconds', type=float, help='to measure each program for')
  parser.add_argument('--profile', metavar='DIR', help='trace some steps, list their kernels')
  parser.add_argument('--top', type=int, default=25, help='how many kernels to print')
  parser.add_argument('--scaling', action='store_true', help='measure 1, 2, 4.. devices')
  kinds = ','.join(SWEEPS)
  parser.add_argument('--sweep', nargs='?', const='all', metavar=kinds, help='how cost grows')
  parser.add_argument('--only', metavar=','.join(PARTS), help='these parts')
  args = parser.parse_args(argv)
  if args.only:
    parts = _listed(args.only, PARTS, '--only', parser)
  else:
    parts = ['matmul', 'train', 'render'] + (['real'] if args.data else [])
  parts += [name for name in ('scaling', 'sweep') if getattr(args, name)]
  args.parts = [name for name in PARTS if name in parts]
  args.sweep = _listed(args.sweep or 'all', SWEEPS, '--sweep', parser)
  if args.data:
    args.gin_bindings.append(f'Config.data_dir = {args.data!r}')
  if args.factor is not None:
    args.gin_bindings.append(f'Config.factor = {args.factor}')
  return args


def main(argv=None) -> None:
  args = parse(argv)
  settings = configs.load_config(args.gin_configs, args.gin_bindings)
  if args.profile:  # A kept program may carry the names that its operations had in older source.
    jax.config.update('jax_compilation_cache_include_metadata_in_key', True)
  if args.seconds is None:
    args.seconds = 2.0 if programs.on_cpu() else 6.0
  shrunk = programs.on_cpu() and shrink(settings) != settings
  if shrunk:
    settings = shrink(settings)
    tables.say(f'A CPU: shrunk to at most {_CPU_RAYS} rays at once.')
  scene = datasets.load_dataset(settings.config) if 'real' in args.parts else None
  benchmark = Benchmark(args, settings, scene)
  benchmark.results['shrunk'] = shrunk
  for key, value in benchmark.results.items():
    tables.say(f'{key:20} {value:,}' if type(value) is int else f'{key:20} {value}')
  tables.say()
  tables.say_row()
  for part in args.parts:
    getattr(benchmark, part)()
    gc.collect()
