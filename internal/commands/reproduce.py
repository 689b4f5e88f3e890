"""Trains and evaluates a row of the results table, and compares it with the stored figures.

    python scripts/reproduce.py                    # lists the rows
    python scripts/reproduce.py demo
    python scripts/reproduce.py bonsai_fast --data data/bonsai_closed

Exits with 1 if a metric is outside of the tolerance (docs/results.md). The same command resumes
after an interruption, and only compares once the run is finished. One GPU is used. Captures are not
part of the program: --data names their folder, which must hold the capture of the stored figures.

RUN/record.json has all that the table shows. --store puts such files into configs/results.json and
writes the tables of README.md and docs/results.md anew, which --table does without new records.
"""

from __future__ import annotations

import argparse
import os

from .. import cli
from ..demo import capture
from ..evaluation import results
from ..experiments import reproduce, result_tables, runs
from ..system import installation


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  parser.add_argument('row', nargs='?', metavar='ROW', help='the row; without it, lists all')
  parser.add_argument('--data', metavar='DIR', help='folder of the capture')
  parser.add_argument(
    '--out', metavar='DIR', default=os.path.join('runs', 'reproduce'),
    help='gets a folder for each row; default: runs/reproduce',
  )  # fmt: skip
  parser.add_argument('--check', action='store_true', help='check the capture and exit')
  parser.add_argument(
    '--commit', metavar='HASH', help="the program's commit, where git cannot tell it"
  )
  parser.add_argument('--store', nargs='+', metavar='FILE', help='record.json files to store')
  parser.add_argument('--table', action='store_true', help='write the tables into the docs')
  args = parser.parse_args(argv)
  if not args.row and (args.data or args.check or args.commit):
    parser.error('--data, --check and --commit need a ROW')
  if args.row and (args.store or args.table):
    parser.error('--store and --table take no ROW')
  return args


def list_rows(table: reproduce.Table) -> None:
  """Prints all rows: what they cost and what is stored of them."""
  width = max(map(len, table.rows))
  for row in table.rows.values():
    record = table.measured.get(row.name)
    state = f'{record["psnr"]:.2f} dB' if record else 'not measured'
    print(f'{row.name:<{width}} {row.scene}; {os.path.basename(row.config)}; {row.time}; {state}')


def find_data(row: reproduce.Row, args: argparse.Namespace) -> str:
  """Returns the folder of the row's capture; makes it if the program can.

  Raises:
    ReproduceError: --data is missing.
  """
  if args.data:
    return args.data
  if row.data:
    wanted = row.capture.text if row.capture else f'{row.of} of the dataset {row.dataset}'
    raise reproduce.ReproduceError(f'{row.name} needs --data DIR, a folder with {wanted}.')
  folder = os.path.join(args.out, 'still_life')
  capture.make_demo_scene(folder)
  return folder


def report(row: reproduce.Row, record: dict, table: reproduce.Table) -> None:
  """Prints a run's figures beside the stored ones.

  Raises:
    ReproduceError: they do not agree.
  """
  stored = table.measured.get(row.name)
  if stored is None:
    for metric in reproduce.METRICS:
      print(f'{metric:<12} {_shown(record[metric])}')
    print(f'{row.name} has no stored figures to compare with.')
    return
  print(f'{"":<12} {"here":>8} {"stored":>8} {"tolerance":>10}')
  compared = reproduce.compare(record, stored, table.tolerance)
  for c in compared:
    verdict = {True: 'agrees', False: 'DIFFERS', None: 'not compared'}[c.agrees]
    print(f'{c.metric:<12} {_shown(c.here):>8} {_shown(c.stored):>8} {c.tolerance:>10g}  {verdict}')
  for name in ('train_seconds', 'seconds_per_image'):
    print(f'{name:<18} {_shown(record[name])} (stored: {_shown(stored[name])})')
  others = reproduce.differences(record, stored)
  for line in others:
    print(f'differs in {line}')
  wrong = [c for c in compared if c.agrees is False]
  if wrong:
    parts = [f'{c.metric} is {c.here:.4g}, stored {c.stored:.4g} ± {c.tolerance:g}' for c in wrong]
    why = f' Also different: {"; ".join(others)}.' if others else ''
    raise reproduce.ReproduceError(f'{row.name} is not as stored: {"; ".join(parts)}.{why}')
  print(f'{row.name} agrees with the stored figures.')


def _shown(value: float | None) -> str:
  return '–' if value is None else f'{value:.4g}'


def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  if args.store or args.table:
    if not installation.is_checkout():
      raise reproduce.ReproduceError('--store and --table need the repository: run them there.')
    if args.store:
      reproduce.store(args.store)
    for page in result_tables.write(reproduce.load()):
      print(f'-> {page}')
    return
  table = reproduce.load()
  if args.row is None:
    list_rows(table)
    return
  row = reproduce.choose(table, args.row)
  run = reproduce.make_run(row, find_data(row, args), args.out)
  reproduce.check_capture(row, run.settings.config)
  if args.check:
    print(f'{run.settings.config.data_dir}: the capture of {row.name}.')
    return
  if not runs.is_finished(run):
    runs.raise_failed(runs.run_all([run], 1), 1)
  record = reproduce.make_record(row, run, args.commit)
  path = os.path.join(run.folder, 'record.json')
  results.write_json(path, record)
  print(f'-> {path}')
  report(row, record, table)
