"""Measures how training, rendering and whole datasets scale with the devices of one machine.

    python scripts/scaling.py --out runs/scaling                       # all of its devices
    python scripts/scaling.py --out runs/scaling --devices 1 2 --only rates \\
        --gin_configs configs/360.gin --batches 16384

There are three parts. `rates`: speed on synthetic rays with a fixed batch on 1, 2, 4, ... devices,
and with the smallest batch multiplied by the number of devices; also memory, the time in
collectives, and the losses of the first steps on one device and on all. `start`: how long train.py
takes to its first step. `dataset`: how long run_dataset.py takes for a short scene per device.
OUT/scaling.json has the results so far, OUT/scaling.md the tables, OUT/scaling.svg a chart. Run the
same command again to resume.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np

from .. import cli, configs, plugins
from ..devices import sharding
from ..errors import UserError
from ..evaluation import benchmarks
from ..experiments import jobs
from ..profiling import costs, programs
from ..profiling import scaling_tables as tables
from ..system import files, installation, progress

PARTS = ('rates', 'start', 'dataset')
_CONFIGS = ('configs/360.gin', 'configs/360_grid.gin')
_COLLECTIVE = re.compile(
  r'nccl|all.?reduce|all.?gather|reduce.?scatter|collective|psum|pmean', re.IGNORECASE
)  # Names of kernels on GPUs, and of operations on CPUs.
_TRACED_STEPS = 5


class ScalingError(UserError):
  """A measurement that cannot be made."""


class Results:
  """The results so far, stored in --out after each measurement and loaded on the next start."""

  def __init__(self, args: argparse.Namespace):
    """Raises ScalingError if the folder has results with other settings."""
    self.folder = args.out
    names = ('devices', 'batches', 'seconds', 'steps', 'scene_steps', 'gin_bindings')
    settings = {name: getattr(args, name) for name in names}
    settings |= {'jax': jax.__version__, 'device_kind': args.kind}
    self.found = {**settings, 'configs': {}}
    path = self._path('json')
    if os.path.exists(path):
      self.found = files.read_json(path, dict, ScalingError, 'Remove it to measure again.')
      for name, value in settings.items():
        if self.found.get(name) != value:
          raise ScalingError(
            f'{path} was measured with {name} {self.found.get(name)!r}, not {value!r}: use the '
            'same settings, or choose another --out.'
          )

  def _path(self, ending: str) -> str:
    return os.path.join(self.folder, f'scaling.{ending}')

  def of(self, gin: str) -> dict:
    """Returns the results of a config by part."""
    return self.found['configs'].setdefault(gin, {})

  def keep(self, gin: str, part: str, value) -> None:
    self.of(gin)[part] = value
    texts = {
      'json': json.dumps(self.found, indent=2),
      'md': tables.markdown(self.found),
      'svg': tables.picture(self.found),
    }
    for ending, text in texts.items():
      files.write_text(self._path(ending), text)


def points(batches: Sequence[int], devices: Sequence[int]) -> list[tuple[int, int]]:
  """Returns (rays, devices) for each batch on all counts, and for the smallest batch grown."""
  grown = [(min(batches) * n, n) for n in devices]
  return sorted({(batch, n) for batch in batches for n in devices} | set(grown))


def traced_ms(program: programs.Program) -> dict:
  """Returns milliseconds per step in collectives and in other kernels, from a trace.

  Collectives are averaged over devices and include waiting for other devices. Other kernels are
  those of the fastest and of the slowest device.
  """
  with tempfile.TemporaryDirectory() as folder:
    steps = program.trace(folder, _TRACED_STEPS)
    found = costs.kernel_ms(folder, steps).values()
  if not found:
    raise ScalingError('The trace has no kernels.')
  together, own = [], []
  for names in found:
    together.append(sum(ms for name, ms in names.items() if _COLLECTIVE.search(name)))
    own.append(sum(names.values()) - together[-1])
  return {
    'collective_ms': float(np.mean(together)),
    'own_ms_fastest': min(own),
    'own_ms_slowest': max(own),
  }


def missing(rows: Sequence[dict], args: argparse.Namespace) -> list[tuple[str, int, int]]:
  """Returns (kind, rays, devices) of missing rows, those with growing batches first."""
  done = {(row['kind'], row['batch'], row['devices']) for row in rows}
  both = [(kind, *point) for point in points(args.batches, args.devices) for kind in tables.KINDS]
  both.sort(key=lambda point: point[1] != min(args.batches) * point[2])
  return [point for point in both if point not in done]


def measure_rows(gin: str, args: argparse.Namespace, results: Results) -> None:
  """Measures the missing rows of a config and stores each.

  Compiles a few programs at a time, in threads, then runs them one by one.
  """
  cams, store = programs.synthetic()
  settings = configs.load_config([gin], args.gin_bindings)

  def make(kind, batch, n):
    mesh = sharding.make_mesh(jax.devices()[:n])
    sized = settings.change('config', batch_size=batch, render_chunk_size=batch)
    return programs.synthetic_program(kind, sized, mesh, cams, store)

  rows = [row for row in results.of(gin).get('rates', []) if 'error' not in row]
  todo = missing(rows, args)
  while todo:
    now, todo = todo[: args.threads], todo[args.threads :]
    with concurrent.futures.ThreadPoolExecutor(len(now)) as pool:
      made = [pool.submit(make, *point) for point in now]
      concurrent.futures.wait(made)  # Collectives of two programs at a time could deadlock.
    for point in now:
      rows.append(make_row(point, made.pop(0), args))
      tables.add_speedups(rows, min(args.batches))
      results.keep(gin, 'rates', rows)
      gc.collect()  # Frees the program and its parameters.


def make_row(point: tuple[str, int, int], made: concurrent.futures.Future, args) -> dict:
  """Measures a compiled program; returns its row, or a row with the error."""
  kind, batch, n = point
  compared = kind == 'train' and batch == min(args.batches) and n in (1, args.devices[-1])
  name, steps = f'{kind}, {batch:,} rays on {n}', args.steps if compared else 0
  row = programs.attempt(name, lambda: measure(made.result(), args.seconds, steps))
  if 'ms' in row:
    progress.say(
      f'{name}: {row["ms"]:.2f} ms, {row["rays_per_second"]:,.0f} rays/s, '
      f'{row["collective_ms"]:.2f} ms in collectives'
    )
  return {'kind': kind, 'batch': batch, 'devices': n, **row}


def products(devices: Sequence, seconds: float) -> dict[str, list[float]]:
  """Measures TFLOP/s in large products: the first device alone, then all at once.

  Chips differ in speed and a step waits for the slowest, which limits the speed-up.
  """
  dtype = 'float32' if programs.on_cpu() else 'bfloat16'
  alone = [programs.matmul_row(dtype, seconds, devices[0])['tflops']]
  with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
    rows = pool.map(lambda device: programs.matmul_row(dtype, seconds, device), devices)
    return {'alone': alone, 'together': [row['tflops'] for row in rows]}


def measure(program: programs.Program, seconds: float, steps: int) -> dict:
  """Runs `steps` steps to record their losses, then times and traces the program."""
  losses = {'losses': program.losses(steps)} if steps else {}
  return {**losses, **program.time(seconds), **traced_ms(program)}


def make_scenes(folder: str, count: int) -> list[str]:
  """Makes a small capture and `count` links to it, named like scenes of the 360 dataset."""
  capture = os.path.join(folder, 'capture')
  subprocess.run([*installation.command('demo_scene'), capture, '--images', '32'], check=True)
  names = list(benchmarks.load('360').scenes)
  if count > len(names):
    raise ScalingError(
      f'--devices {count}: the dataset part has {len(names)} scenes, one per device; leave it out '
      'with --only rates start.'
    )
  for name in names[:count]:
    if not os.path.lexists(os.path.join(folder, name)):
      os.symlink(capture, os.path.join(folder, name))
  return names[:count]


def start_seconds(gin: str, capture: str, args: argparse.Namespace) -> dict[str, float]:
  """Measures train.py's time to its first step, without and with a compilation cache."""
  took, count = {}, args.devices[-1]
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    env = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': os.path.join(folder, 'cache')}
    env |= {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1', **visible(args.platform, count)}
    for name in ('first', 'second'):
      run = os.path.join(folder, name)
      bindings = [
        *args.gin_bindings,
        f'Config.data_dir = {capture!r}',
        f'Config.checkpoint_dir = {run!r}',
      ]
      bindings += ['Config.factor = 0', 'Config.max_steps = 1', 'Config.train_render_every = 0']
      command = [*installation.command('train'), *plugins.flags(), '--gin_configs', gin]
      began = time.monotonic()
      process = subprocess.Popen(
        [*command, '--gin_bindings', *bindings], env=env, text=True, stdout=subprocess.PIPE
      )
      lines = []
      for line in process.stdout:
        lines.append(line)
        if line.startswith('first step'):
          took[name] = time.monotonic() - began
      if process.wait():
        raise ScalingError(f'train.py on {count} devices failed: {"".join(lines[-3:])}')
  first, second = took['first'], took['second']
  progress.say(f'first step on {count} devices: after {first:.1f} s, cached {second:.1f} s')
  return took


def probe() -> tuple[str, str, int]:
  """Returns platform, kind and number of devices, found in a subprocess so that they stay free."""
  code = 'import jax; d = jax.devices(); print(d[0].platform, len(d), d[0].device_kind)'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  platform, count, kind = done.stdout.split(maxsplit=2)
  return platform, kind.strip(), int(count)


def visible(platform: str, count: int) -> dict[str, str]:
  """Returns environment variables that limit a program to `count` GPUs or virtual CPU devices."""
  if platform == 'gpu':
    return {'CUDA_VISIBLE_DEVICES': ','.join(jobs.visible_gpus()[:count])}
  return {'XLA_FLAGS': f'--xla_force_host_platform_device_count={count}'}


def dataset_seconds(gin: str, folder: str, names: Sequence[str], args: argparse.Namespace) -> float:
  """Measures run_dataset.py on these scenes, one per device, without a compilation cache."""
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as out:
    env = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': os.path.join(out, 'cache')}
    env |= visible(args.platform, len(names))
    command = [
      *installation.command('run_dataset'), '--dataset', '360', '--unchecked', *plugins.flags(),
      '--root', folder, '--out', os.path.join(out, 'runs'), '--scenes', *names,
      '--gin_configs', gin, '--gin_bindings', *args.gin_bindings,
      'Config.factor = 0', f'Config.max_steps = {args.scene_steps}',
      'Config.train_render_every = 0', 'Config.eval_report = False',
    ]  # fmt: skip
    began = time.monotonic()
    subprocess.run(command, env=env, check=True)
    return time.monotonic() - began


def parse(argv=None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  cli.add_arguments(parser)
  parser.add_argument('--out', required=True, metavar='DIR', help='folder of the results')
  parser.add_argument(
    '--devices', type=int, nargs='+', metavar='N', help='device counts; default: 1, 2, 4, ..., all'
  )
  parser.add_argument(
    '--batches', type=int, nargs='+', default=[16384, 131072], metavar='RAYS',
    help='rays per step and rendered chunk; the smallest is also grown with the devices',
  )  # fmt: skip
  parser.add_argument('--only', nargs='+', choices=PARTS, default=PARTS, help='parts to run')
  parser.add_argument('--seconds', type=float, default=3.0, help='measuring time per program')
  parser.add_argument('--steps', type=int, default=100, help='steps whose losses are compared')
  parser.add_argument(
    '--scene_steps', type=int, default=300, help='training steps per scene of the dataset part'
  )
  parser.add_argument('--threads', type=int, default=8, help='programs to compile at a time')
  args = parser.parse_args(argv)
  args.gin_configs = args.gin_configs or [
    os.path.join(installation.DATA, name) for name in _CONFIGS
  ]
  args.platform, args.kind, count = probe()
  args.devices = sorted(args.devices or {2**k for k in range(count.bit_length())} | {count})
  if not 1 <= args.devices[0] <= args.devices[-1] <= count:
    raise ScalingError(
      f'--devices must be from 1 to {count}, the number of devices of this machine, got '
      f'{" ".join(map(str, args.devices))}.'
    )
  multiple = np.lcm.reduce(args.devices)
  for batch in args.batches:
    if batch % multiple:
      raise ScalingError(
        f'--batches must be multiples of all device counts (a multiple of {multiple}), got {batch}.'
      )
  return args


def measure_rates(gin: str, args: argparse.Namespace, results: Results) -> None:
  """Runs the part `rates`, in this process."""
  settings = configs.load_config([gin], args.gin_bindings)
  mesh = sharding.make_mesh(jax.devices()[: args.devices[-1]])
  results.keep(gin, 'facts', programs.describe(settings, mesh))
  if 'products' not in results.of(gin):
    results.keep(gin, 'products', products(list(mesh.devices.flat), args.seconds))
  measure_rows(gin, args, results)


def measure_programs(gin: str, args: argparse.Namespace, results: Results) -> None:
  """Runs the parts that start other programs, which need the devices."""
  most, found = args.devices[-1], results.of(gin)
  todo = {'start', 'dataset'} & set(args.only) - found.keys()
  if not todo:
    return
  folder = os.path.join(os.path.abspath(args.out), 'scenes')
  names = make_scenes(folder, most)
  if 'start' in todo:
    took = start_seconds(gin, os.path.join(folder, 'capture'), args)
    results.keep(gin, 'start', {most: took})
  if 'dataset' in todo:
    one = dataset_seconds(gin, folder, names[:1], args)
    many = dataset_seconds(gin, folder, names, args)
    results.keep(gin, 'dataset', {'scenes': most, 'one_seconds': one, 'seconds': many})


def main(argv=None) -> None:
  argv = sys.argv[1:] if argv is None else argv
  args = parse(argv)
  others = {'start', 'dataset'} & set(args.only)
  if 'rates' in args.only and others:  # A process of its own, since JAX never frees devices.
    subprocess.run([*installation.command('scaling'), *argv, '--only', 'rates'], check=True)
  results = Results(args)
  for gin in args.gin_configs:
    progress.say(f'== {gin}')
    if others:
      measure_programs(gin, args, results)
    else:
      measure_rates(gin, args, results)
  print(tables.markdown(results.found))
  progress.summary(
    {ending: os.path.join(args.out, f'scaling.{ending}') for ending in ('json', 'md', 'svg')}
  )
