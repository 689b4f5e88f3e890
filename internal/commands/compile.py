"""Compiles the training step and the renderer for a TPU that is not attached, to see if they fit.

  python scripts/compile_for.py --topology v5e:4x4 --gin_configs configs/360.gin
  python scripts/compile_for.py --topology v5p:2x2x1 v6e:4x4 --json tpu.json \\
    --gin_configs configs/360.gin --gin_bindings "Config.batch_size = 65536"

Prints for each device: the memory needed and available, the time of matrix products at the chip's
peak FLOP/s, the time of memory traffic at its peak bandwidth, the maximum rays per second (the
longer of the two times), and the collectives. Nothing is executed, so these are bounds. Exits with
status 1 if a program does not fit. Needs pip install -r requirements-tpu-compile.txt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax

from .. import cli, configs
from ..profiling import described
from ..system import files, progress


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  parser.add_argument(
    '--topology', nargs='+', required=True, metavar='CHIP:SHAPE',
    help=f'machines, such as v5e:4x4; chips: {", ".join(described.CHIPS)}',
  )  # fmt: skip
  parser.add_argument(
    '--only', nargs='+', choices=list(described.ROWS), default=list(described.ROWS),
    help='which programs (default: both)',
  )  # fmt: skip
  parser.add_argument(
    '--capture', nargs=3, type=int, default=(200, 1237, 822), metavar=('IMAGES', 'WIDTH', 'HEIGHT'),
    help='size of the capture, whose pixels take memory (default: 200 1237 822)',
  )  # fmt: skip
  parser.add_argument('--json', metavar='FILE', help='write all numbers here')
  cli.add_arguments(parser)
  return parser.parse_args(argv)


def load_settings(args: argparse.Namespace) -> configs.Settings:
  """Loads the settings with Model.mlp_dtype as on a TPU, since 'auto' would give this CPU's."""
  settings = configs.load_config(args.gin_configs, args.gin_bindings)
  if settings.model.mlp_dtype != 'auto':
    return settings
  return configs.load_config(args.gin_configs, [*args.gin_bindings, "Model.mlp_dtype = 'bfloat16'"])


def show(row: dict) -> str:
  """Formats a row as a line of text."""
  name = f'{row["topology"]:<11} {row["program"]:<7}'
  if 'error' in row:
    return f'{name} DOES NOT FIT: {row["error"]}'
  share = ', '.join(f'{n["count"]} {kind}' for kind, n in row['collectives'].items()) or 'none'
  fits = '' if row['fits'] else ' DOES NOT FIT'
  return (
    f'{name}{fits} {row["needed_bytes"] / 1e9:6.2f} of {row["memory_bytes"] / 1e9:.1f} GB '
    f'({row["temp_bytes"] / 1e9:.2f} temporary)  products {row["products_ms"]:7.2f} ms  memory '
    f'{row["memory_ms"]:7.2f} ms ({row["traffic_bytes"] / 1e9:.1f} GB)  at most '
    f'{row["rays_per_second_at_most"]:,.0f} rays/s  collectives: {share}  compiled in '
    f'{row["compile_seconds"]:.0f} s  choice {row["choice"]}'
  )


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(argv)
  settings = load_settings(args)
  rows = []
  for topology in args.topology:
    chip, mesh, hosts = described.describe(topology)
    progress.say(f'{topology}: {mesh.size} devices on {hosts} hosts, JAX {jax.__version__}')
    for program in args.only:
      row = described.ROWS[program](settings, chip, mesh, tuple(args.capture))
      facts = {'topology': topology, 'devices': mesh.size, 'hosts': hosts, 'program': program}
      rows.append({**facts, 'batch_size': settings.config.batch_size, **row})
      print(show(rows[-1]))
  if args.json:
    files.write_json(args.json, {'jax': jax.__version__, 'rows': rows}, 2)
  if not all(row['fits'] for row in rows):
    sys.exit(1)
