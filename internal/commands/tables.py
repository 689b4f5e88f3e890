"""Makes tables of results.json files, with published numbers.

    python scripts/tables.py runs/360/*/eval/results.json
    python scripts/tables.py --method base runs/a/*/eval/results.json \\
        --method 'no distortion' runs/b/*/eval/results.json --out tables.md tables.tex tables.csv

Files without --method are grouped by their config. Runs that differ only in their seed become a
mean with its standard deviation. All files must have the same protocol, which must also be that of
the published numbers. LaTeX has all metrics side by side; the best number of each column is bold.
"""

from __future__ import annotations

import argparse
import os

from .. import cli
from ..evaluation import benchmarks, table_forms, tables


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  parser.add_argument('results', nargs='*', metavar='RESULTS', help='results.json files')
  parser.add_argument(
    '--method', nargs='+', action='append', default=[], metavar=('NAME', 'RESULTS'),
    help='a row of the table: its name and its files; repeatable',
  )  # fmt: skip
  parser.add_argument(
    '--dataset', help=f'{", ".join(benchmarks.load_all())}; default: found by the scenes'
  )
  parser.add_argument(
    '--published', nargs='+', metavar='METHOD',
    help="published rows, starting with the one to compare with; or 'none'; default: all",
  )  # fmt: skip
  parser.add_argument('--metrics', nargs='+', help='default: psnr, ssim, and LPIPS where measured')
  parser.add_argument(
    '--out', nargs='+', default=[], metavar='FILE',
    help='.md, .tex or .csv files to write; default: print Markdown',
  )  # fmt: skip
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  for path in args.out:
    if os.path.splitext(path)[1] not in table_forms.FORMS:
      raise tables.TablesError(f'--out {path}: must end in {", ".join(table_forms.FORMS)}.')
  methods = tables.group(tables.read(args.results))
  for name, *paths in args.method:
    if name in methods or not paths:
      raise tables.TablesError(f'--method {name}: needs a unique name and results.json files.')
    methods[name] = tables.read(paths)
  runs = [run for found in methods.values() for run in found]
  if not runs:
    raise tables.TablesError('No results.json given; name some, e.g. runs/*/eval/results.json.')
  benchmark = benchmarks.load(args.dataset) if args.dataset else tables.find_benchmark(runs)
  published = [] if args.published == ['none'] else args.published
  table = tables.make(methods, benchmark, published, args.metrics)
  if not args.out:
    print(table_forms.markdown(table), end='')
  for path in args.out:
    table_forms.write(path, table)
    print(f'-> {path}')
