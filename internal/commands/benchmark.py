"""Measures the speed, FLOPs and memory of training and rendering on this machine.

    python scripts/benchmark.py --gin_configs configs/360.gin --json bench.json
        [--data SCENE --factor N] [--profile DIR] [--sweep] [--only train,render]
        [--busy 16] [--against earlier.json]

Uses synthetic cameras and pixels, so it needs no capture; --data adds a real one. FLOPs are those
of matrix products, counted from the config, and are compared with what the chip reaches in large
products. All devices are used; scripts/scaling.py compares different numbers of them.

Training steps are dispatched as in train.py. --busy N also measures them one at a time, and both
beside N busy processes. --against FILE exits with code 1 if a rate, relative to matrix products,
has lost over 10% since FILE was written with --json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

from .. import cli, configs, datasets, models
from ..devices import memory, sharding
from ..profiling import benchmark_tables as tables
from ..profiling import costs, programs, regressions
from ..system import files
from ..training import pixel_store

PARTS = ('matmul', 'train', 'real', 'render', 'busy', 'sweep')
SWEEPS = ('batch', 'width', 'prop_samples', 'nerf_samples')
_CPU_RAYS = 256  # More rays at once would only take longer on a CPU.


def profile(folder: str, program: programs.Program, row: dict, top: int) -> dict:
  """Traces a few calls, prints the `top` slowest kernels and returns all of them."""
  steps = program.trace(folder, 3 if row['ms'] > 500 else 10)
  found = costs.kernels(folder, steps, costs.op_names(program.hlo))
  tables.print_kernels(row, found, top)
  return {
    'steps': steps,
    'kernel_ms': sum(k.ms for k in found),
    'kernels': [{**dataclasses.asdict(k), 'percent': 100 * k.ms / row['ms']} for k in found],
  }


def sweep_points(kind: str, settings: configs.Settings) -> list[tuple[str, configs.Settings]]:
  """Returns a label and the settings for each point of a sweep."""
  if kind == 'batch':
    sizes = [
      {k: max(int(getattr(settings.config, k) * f), 1) for k in ('batch_size', 'render_chunk_size')}
      for f in (0.25, 0.5, 1, 2)
    ]
    return [
      (f'{s["batch_size"]:,} / {s["render_chunk_size"]:,} rays', settings.change('config', **s))
      for s in sizes
    ]
  part, name, values = {
    'width': ('nerf_mlp', 'net_width', (256, 512, 1024)),
    'prop_samples': ('model', 'num_prop_samples', (32, 64, 128)),
    'nerf_samples': ('model', 'num_nerf_samples', (16, 32, 64)),
  }[kind]
  return [(f'{name} {v}', settings.change(part, **{name: v})) for v in values]


class Benchmark:
  """The parts of a benchmark. Writes the results so far to the --json file after each part."""

  def __init__(self, args: argparse.Namespace, settings: configs.Settings, scene=None):
    self.args, self.settings, self.scene = args, settings, scene
    if args.devices and not 1 <= args.devices <= jax.device_count():
      raise configs.ConfigError(
        f'--devices must be from 1 to {jax.device_count()}, the number of devices of this machine, '
        f'got {args.devices}.'
      )
    self.mesh = sharding.make_mesh(jax.devices()[: args.devices])
    self.cams, self.store = programs.synthetic()
    self.chip = {}  # TFLOP/s by dtype.
    self.measured = {}  # Rows by kind and settings, reused by sweeps.
    self.results = programs.describe(settings, self.mesh)
    self.before = regressions.read(args.against, self.results) if args.against else None

  def keep(self, part: str, result) -> None:
    self.results[part] = result
    if self.args.json:
      files.write_json(self.args.json, self.results, 2)

  def measure(self, name, kind, settings, make: Callable, folder=None) -> dict:
    """Makes and times a program; prints its row and, into `folder`, profiles it."""
    gc.collect()  # Memory of earlier programs would count against this one.
    program = make()
    timed = program.time(self.args.seconds)
    parts = program.facts.get('micro_batches', 1)
    name += f', in {parts} micro-batches' if parts > 1 else ''
    tflops = program.rays * costs.ray_flops(settings)[kind] / timed['ms'] / 1e9
    chip = self.chip.get(models.mlp_dtype(settings.model.mlp_dtype).name)
    row = {
      'name': name,
      'devices': self.mesh.size,
      'rays': program.rays,
      **timed,
      'tflops': tflops,
      'fraction_of_chip': tflops / (chip * self.mesh.size) if chip else None,
      'peak_bytes': memory.peak_bytes(self.mesh.devices.flat),
    }
    tables.print_row(row)
    if folder:
      row['profile'] = profile(os.path.join(folder, kind), program, row, self.args.top)
    return row

  def synthetic_row(self, name, kind, settings, folder=None) -> dict:
    """Measures training or rendering of synthetic rays, once for the same settings."""
    key = kind, repr(settings)
    if key not in self.measured:

      def make():
        return programs.synthetic_program(kind, settings, self.mesh, self.cams, self.store)

      self.measured[key] = programs.attempt(
        name, lambda: self.measure(name, kind, settings, make, folder)
      )
    return self.measured[key]

  def matmul(self) -> None:
    dtypes = {models.mlp_dtype(self.settings.model.mlp_dtype).name} | (
      set() if programs.on_cpu() else {'bfloat16'}
    )
    rows = {}
    for dtype in sorted(dtypes):
      rows[dtype] = programs.matmul_row(dtype, self.args.seconds)
      tables.print_row(rows[dtype])
      self.chip[dtype] = rows[dtype]['tflops']
    self.keep('matmul', rows)

  def train(self) -> None:
    name = 'training, synthetic'
    self.keep('train', self.synthetic_row(name, 'train', self.settings, self.args.profile))

  def render(self) -> None:
    row = self.synthetic_row('rendering', 'render', self.settings, self.args.profile)
    self.keep('render', row)

  def real(self) -> None:
    pixels, place = pixel_store.load(self.settings, self.scene, self.mesh)
    cams = self.scene.cameras.take(np.array(self.scene.train))
    name = f'training, real, {place}'

    def make():
      return programs.train_program(self.settings, self.mesh, cams, pixels)

    row = programs.attempt(name, lambda: self.measure(name, 'train', self.settings, make))
    synthetic = self.results.get('train', {})
    if 'ms' in row and 'ms' in synthetic:
      row['ms_ratio_to_synthetic'] = row['ms'] / synthetic['ms']
      print(f'real takes {row["ms_ratio_to_synthetic"]:.3f} x the time of synthetic')
    self.keep('real', {**row, 'pixels_on': place})

  def busy(self) -> None:
    """Measures training by one and by many steps a dispatch, alone and beside busy processes."""
    pixels, rows = sharding.replicate(self.store, self.mesh), {}

    def pair(how: str, single: bool) -> dict:
      program = programs.train_program(self.settings, self.mesh, self.cams, pixels, single)
      found = {}
      for count in (0, self.args.busy):
        with programs.busy_processes(count):
          found[f'{count} busy'] = self.measure(
            f'{how}, {count} busy', 'train', self.settings, lambda: program
          )
      return found

    for how, single in (('one step a dispatch', True), ('many steps a dispatch', False)):
      rows[how] = programs.attempt(how, functools.partial(pair, how, single))
    self.keep('busy', rows)

  def compare(self) -> None:
    """Ends the program with code 1 if a rate has lost too much since --against was written."""
    if self.before:
      ratios = regressions.compare(self.results, self.before)
      print('\n'.join(['', *regressions.lines(ratios)]))
      if not ratios:
        raise regressions.AgainstError(
          f'--against {self.args.against}: it has none of the parts that this run measured; choose '
          'others with --only.'
        )
      if any(map(regressions.is_lost, ratios.values())):
        raise SystemExit(1)

  def sweep(self) -> None:
    found = {}
    for sweep in self.args.sweep:
      points = found[sweep] = []
      for label, settings in sweep_points(sweep, self.settings):
        point = {'label': label}
        for kind in ('train', 'render'):
          row = self.synthetic_row(f'{kind}, {label}', kind, settings)
          point[kind] = {k: v for k, v in row.items() if k != 'profile'}
        points.append(point)
        self.keep('sweep', found)
      print(f'\n{tables.cost_table(points)}\n')


def shrink(settings: configs.Settings) -> configs.Settings:
  """Returns the settings with at most `_CPU_RAYS` rays at once."""
  names = ('batch_size', 'render_chunk_size')
  sizes = {name: min(getattr(settings.config, name), _CPU_RAYS) for name in names}
  return settings.change('config', **sizes)


def _listed(text: str, known: Sequence[str], flag: str, parser) -> list[str]:
  """Splits a flag's comma-separated names; 'all' stands for all that are known."""
  names = list(known) if text == 'all' else text.split(',')
  unknown = [name for name in names if name not in known]
  if unknown:
    parser.error(f'{flag}: choose from {", ".join(known)}, not {", ".join(unknown)}.')
  return names


def parse(argv=None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  cli.add_arguments(parser)
  parser.add_argument('--json', metavar='PATH', help='file for all results')
  parser.add_argument('--data', metavar='DIR', help='also measure training on this capture')
  parser.add_argument('--factor', type=int, help="Config.factor, the capture's downsampling")
  parser.add_argument('--devices', type=int, metavar='N', help='use the first N devices')
  parser.add_argument('--seconds', type=float, help='measuring time per program')
  parser.add_argument('--profile', metavar='DIR', help='trace some steps and list their kernels')
  parser.add_argument('--top', type=int, default=25, help='number of kernels to print')
  sweeps = ','.join(SWEEPS)
  parser.add_argument(
    '--sweep', nargs='?', const='all', metavar=sweeps, help='vary one setting at a time'
  )
  parser.add_argument('--only', metavar=','.join(PARTS), help='parts to run')
  parser.add_argument(
    '--busy', type=int, metavar='N', help='also train beside N busy processes, and step by step'
  )
  parser.add_argument(
    '--against', metavar='FILE', help='compare with the --json file of an earlier run'
  )
  args = parser.parse_args(argv)
  if args.only:
    parts = _listed(args.only, PARTS, '--only', parser)
  else:
    parts = ['matmul', 'train', 'render'] + (['real'] if args.data else [])
  parts += ['sweep'] if args.sweep else []
  parts += ['matmul'] if args.against else []
  if args.busy is not None and args.busy < 1:
    parser.error(f'--busy must be at least 1, got {args.busy}.')
  if 'busy' in parts and not args.busy:
    parser.error('--only busy needs --busy N, the number of busy processes.')
  parts += ['busy'] if args.busy else []
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
  if args.profile:  # Programs in the cache may have operation names from older source.
    jax.config.update('jax_compilation_cache_include_metadata_in_key', True)
  if args.seconds is None:
    args.seconds = 2.0 if programs.on_cpu() else 6.0
  shrunk = programs.on_cpu() and shrink(settings) != settings
  if shrunk:
    settings = shrink(settings)
    print(f'On a CPU: reduced to at most {_CPU_RAYS} rays at once.')
  scene = datasets.load_dataset(settings.config) if 'real' in args.parts else None
  benchmark = Benchmark(args, settings, scene)
  benchmark.results['shrunk'] = shrunk
  for key, value in benchmark.results.items():
    print(f'{key:20} {value:,}' if type(value) is int else f'{key:20} {value}')
  print()
  tables.print_row()
  for part in args.parts:
    getattr(benchmark, part)()
    gc.collect()
  benchmark.compare()
