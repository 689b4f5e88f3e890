"""Runs the paper's ablations and baselines on a scene, one after the other.

  python scripts/ablate.py --data_dir data/bonsai --out runs/ladder \\
    --gin_bindings "Config.factor = 0" "Config.max_steps = 5000"

Each row of configs/ablations/published.json is a config that is trained and evaluated in a folder
of its own, all with the same bindings. What is finished is not run again and what was interrupted
goes on, so the same command may be repeated; --table_only runs nothing. OUT/ablations.md and .json
set what is published beside it: that is of other scenes, so compare changes to the full model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .. import (
  cli,
  configs,
)
from ..errors import UserError
from ..evaluation import metrics
from ..system import files, installation, progress

_PUBLISHED = os.path.join(installation.DATA, 'configs', 'ablations', 'published.json')
_FULL = 'full'
# What the paper finds to matter most: each is to be worse than the full model.
_BIG_EFFECTS = ('a_no_interlevel', 'f_small_mlp', 'g_no_ipe', 'h_no_contraction')


class AblationError(UserError):
  """A ladder that cannot be run; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the table: a config, and what is published of it."""

  name: str
  config: str  # Relative to the repository.
  label: str
  table: int  # Of the paper.
  psnr: float
  ssim: float | None
  lpips: float | None
  million_params: float | None


def published() -> tuple[dict[str, Row], float]:
  """The rows by name, and the full model's PSNR in the terms of Table 1."""
  with open(_PUBLISHED, encoding='utf-8') as f:
    table = json.load(f)
  return {row['name']: Row(**row) for row in table['rows']}, table['full_mean_psnr']


def choose(names: Sequence[str] | None) -> list[Row]:
  """The rows of those names, in the paper's order; None: all.

  Raises:
    AblationError: an unknown name.
  """
  rows, _ = published()
  unknown = [name for name in names or () if name not in rows]
  if unknown:
    raise AblationError(f'--rows has {unknown[0]!r}; there are {", ".join(rows)}.')
  return [row for row in rows.values() if names is None or row.name in names]


def row_arguments(row: Row, args: argparse.Namespace) -> tuple[list[str], list[str]]:
  """The gin files and bindings of a row's run."""
  folders = {'data_dir': args.data_dir, 'checkpoint_dir': os.path.join(args.out, row.name)}
  here = [f'Config.{name} = {os.path.abspath(path)!r}' for name, path in folders.items()]
  return [os.path.join(installation.DATA, row.config), *args.gin_configs], [
    *args.gin_bindings,
    *here,
  ]


def results_of(row: Row, args: argparse.Namespace) -> dict[str, Any] | None:
  """The results.json of a row that is finished with these settings, None if it is not.

  Raises:
    AblationError: its folder holds a run with other settings.
  """
  folder = os.path.join(args.out, row.name)
  wanted = configs.load_config(*row_arguments(row, args))
  stored = os.path.join(folder, 'config.gin')
  if not os.path.isfile(stored):
    return None
  if dataclasses.replace(configs.load_config([stored]), text='') != dataclasses.replace(
    wanted, text=''
  ):
    raise AblationError(
      f'{folder} holds a run with other settings. Remove it, or choose another --out.'
    )
  try:
    with open(os.path.join(folder, 'eval', 'results.json'), encoding='utf-8') as f:
      results = json.load(f)
  except FileNotFoundError:
    return None
  return results if results['step'] == wanted.config.last_step else None


def run(row: Row, args: argparse.Namespace) -> bool:
  """Trains and evaluates a row, from where it is; whether both went well."""
  paths, bindings = row_arguments(row, args)
  commands = (
    ['train', '--gin_configs', *paths, '--gin_bindings', *bindings],
    ['eval', '--checkpoint_dir', os.path.join(args.out, row.name)],
  )
  for command in commands:
    words = [*installation.command(command[0]), *command[1:]]
    words += ['--quiet'] if progress.is_quiet() else []
    if subprocess.run(words, check=False).returncode:
      print(f'{row.name}: {command[0]} failed', file=sys.stderr)
      return False
  return True


def rays_per_second(folder: str) -> float | None:
  """The median of what training logged."""
  path = os.path.join(folder, 'metrics.jsonl')
  if not os.path.isfile(path):
    return None
  with open(path, encoding='utf-8') as f:
    speeds = sorted(row['rays_per_sec'] for row in map(json.loads, f) if 'rays_per_sec' in row)
  return speeds[len(speeds) // 2] if speeds else None


def make_table(
  rows: Sequence[Row], results: Mapping[str, Mapping], speeds: Mapping[str, float | None]
) -> dict[str, Any]:
  """All that is said of a ladder.

  Args:
    rows: the rows to show.
    results: results.json of those that are finished, by name.
    speeds: rays a second in training, by name.
  """
  known, full_mean = published()
  of_table = {1: full_mean, 2: known[_FULL].psnr}
  ours_full = results[_FULL]['mean']['psnr'] if _FULL in results else None
  lines = []
  for row in rows:
    found = results.get(row.name)
    ours = found and found['mean']['psnr']
    change = None if ours is None or ours_full is None else ours - ours_full
    lines.append(
      {
        'name': row.name,
        'label': row.label,
        'published': {
          **{
            key: getattr(row, key) for key in ('table', 'psnr', 'ssim', 'lpips', 'million_params')
          },
          'psnr_change': row.psnr - of_table[row.table],
        },
        'num_params': found and found['num_params'],
        'mean': found and found['mean'],
        'psnr_change': change,
        'rays_per_second': speeds.get(row.name),
      }
    )
  seen = {line['name']: line['psnr_change'] for line in lines}
  effects = {name: seen[name] < 0 for name in _BIG_EFFECTS if seen.get(name) is not None}
  any_result = next(iter(results.values()), {})
  return {
    'scene': any_result.get('scene'),
    'steps': any_result.get('step'),
    'protocol': any_result.get('protocol'),
    'worse_than_full': effects,
    'rows': lines,
  }


def to_markdown(table: Mapping[str, Any]) -> str:
  """The table, for people; changes are to the full model of the same column."""

  def number(value: float | None, form: str = '.2f') -> str:
    return '-' if value is None else format(value, form)

  def params(line) -> str:
    told, ours = line['published']['million_params'], line['num_params']
    ours = '-' if ours is None else f'{ours:,}'
    return ours if told is None else f'{ours} ({told:.1f} M)'

  head = [
    f'Scene {table["scene"]}, {table["steps"] or 0:,} steps. Published: Table 2 on bicycle, Table '
    '1 (marked *) in the mean over nine scenes. "to full": PSNR less that of the full model.',
    '',
    '| | parameters (published) | published PSNR | to full | SSIM | LPIPS | PSNR here | to full '
    '| SSIM | LPIPS | rays/s |',
    '|---|---|---|---|---|---|---|---|---|---|---|',
  ]
  for line in table['rows']:
    told, mean = line['published'], line['mean'] or {}
    cells = (
      line['label'],
      params(line),
      number(told['psnr']) + ('*' if told['table'] == 1 else ''),
      number(told['psnr_change'], '+.2f'),
      number(told['ssim'], '.3f'),
      number(told['lpips'], '.3f'),
      number(mean.get('psnr')),
      number(line['psnr_change'], '+.2f'),
      number(mean.get('ssim'), '.3f'),
      number(mean.get('lpips_paper'), '.3f'),  # Where it is measured, as the paper does.
      number(line['rays_per_second'], ',.0f'),
    )
    head.append(f'| {" | ".join(cells)} |')
  effects = table['worse_than_full']
  if effects:
    told = ', '.join(f'{name} {"yes" if worse else "NO"}' for name, worse in effects.items())
    head += ['', f'Worse than the full model, as published: {told}.']
  return '\n'.join(head) + '\n'


def write_table(args: argparse.Namespace, rows: Sequence[Row]) -> str:
  """Writes OUT/ablations.json and .md of what is finished; returns the latter's text."""
  results = {row.name: found for row in rows if (found := results_of(row, args))}
  speeds = {name: rays_per_second(os.path.join(args.out, name)) for name in results}
  table = make_table(rows, results, speeds)
  metrics.write_json(os.path.join(args.out, 'ablations.json'), table)
  text = to_markdown(table)
  with files.whole(os.path.join(args.out, 'ablations.md')) as path, open(path, 'w') as f:
    f.write(text)
  return text


def main(argv: Sequence[str] | None = None) -> None:
  parser = cli.make_parser(__doc__)
  parser.add_argument('--data_dir', required=True, help='the scene')
  parser.add_argument('--out', required=True, help='a folder for the runs and the table')
  parser.add_argument('--rows', nargs='+', metavar='NAME', help='some of the rows; default: all')
  parser.add_argument('--table_only', action='store_true', help='run nothing')
  cli.add_arguments(parser)
  args = parser.parse_args(argv)
  rows = choose(args.rows)
  for row in rows:
    configs.load_config(*row_arguments(row, args))  # Slips are told before hours of work.
    results_of(row, args)
  failed = []
  for number, row in enumerate([] if args.table_only else rows, 1):
    if results_of(row, args) is None:
      print(f'== {number}/{len(rows)} {row.label}')
      failed += [] if run(row, args) else [row.name]
      write_table(args, rows)
  print(write_table(args, rows))
  if failed:
    raise AblationError(f'{", ".join(failed)} failed; the same command tries again.')
