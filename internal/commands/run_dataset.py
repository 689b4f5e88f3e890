"""Trains and evaluates all scenes of a published dataset, and tabulates the results.

    python scripts/run_dataset.py --dataset 360 --root DIR [--out runs/360] [--check]

Each GPU runs one scene at a time; without GPUs, one scene at a time. Run the same command again
after an interruption: it skips finished scenes and resumes the others from their newest checkpoint.
--slurm writes a job array with one task per run instead, and --submit submits it; afterwards, the
same command without --slurm prints the table. With --seeds N, each scene is trained N times, and
the table has means and standard deviations.
"""

from __future__ import annotations

import argparse
import os

from .. import cli
from ..evaluation import benchmarks, table_forms, tables
from ..experiments import dataset_runs, runs, slurm


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  parser.add_argument(
    '--dataset', required=True, choices=list(benchmarks.load_all()), help='the dataset'
  )
  parser.add_argument('--root', required=True, metavar='DIR', help='has a folder for each scene')
  parser.add_argument('--out', metavar='DIR', help='folder of the runs; default: runs/DATASET')
  parser.add_argument('--scenes', nargs='+', help='scenes to run; default: all')
  parser.add_argument('--gpus', help='GPUs to use, e.g. 0,2; default: all visible ones')
  parser.add_argument('--check', action='store_true', help='check the dataset and exit')
  parser.add_argument(
    '--unchecked', action='store_true',
    help='skip the check of the dataset, and leave published numbers out of the table',
  )  # fmt: skip
  parser.add_argument('--seeds', type=int, default=1, help='runs of each scene; default: 1')
  slurm.add_arguments(parser)
  cli.add_arguments(parser)
  return slurm.parse(parser, argv)


def task(args: argparse.Namespace, out: str) -> list[str]:
  """Returns the program and flags of a task of the job array; see `slurm.write`."""
  root = os.path.abspath(args.root)
  words = ['run_dataset', '--dataset', args.dataset, '--root', root, '--out', os.path.abspath(out)]
  words += ['--seeds', str(args.seeds)] if args.seeds > 1 else []
  return words + (['--unchecked'] if args.unchecked else [])


def write_tables(args: argparse.Namespace, benchmark, all_runs: list[runs.Run], out: str) -> None:
  """Prints the table of the finished runs; writes it to `out` unless some were chosen."""
  paths = [run.results for run in all_runs if runs.is_finished(run)]
  if not paths:
    return
  published = [] if args.unchecked else None
  table = tables.make(tables.group(tables.read(paths)), benchmark, published)
  print(table_forms.markdown(table))
  for ending in () if args.scenes or args.only else table_forms.FORMS:
    path = os.path.join(out, f'table{ending}')
    table_forms.write(path, table)
    print(f'-> {path}')


def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  benchmark = benchmarks.load(args.dataset)
  out = args.out or os.path.join('runs', args.dataset)
  all_runs = dataset_runs.make_runs(
    benchmark, args.root, out, args.scenes, args.gin_configs, args.gin_bindings, args.seeds
  )
  all_runs = runs.choose(all_runs, args.only)
  if not args.unchecked:
    dataset_runs.check_folder(benchmark, all_runs)
  if args.check:
    return
  unfinished = [run for run in all_runs if not runs.is_finished(run)]
  if unfinished and args.slurm is not None:
    slurm.write(args, unfinished, out, task(args, out))
    return
  failed = runs.run_all(unfinished, len(all_runs), args.gpus) if unfinished else {}
  write_tables(args, benchmark, all_runs, out)
  runs.raise_failed(failed, len(all_runs))
