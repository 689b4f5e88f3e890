"""Trains and evaluates all scenes of a published dataset, and tabulates the results.

    python scripts/run_dataset.py --dataset 360 --root DIR [--out runs/360] [--check]

Each GPU runs one scene at a time; without GPUs, one scene at a time. Run the same command again
after an interruption: it skips finished scenes and resumes the others from their newest checkpoint.
--slurm writes a job array with one task per scene instead, and --submit submits it; afterwards, the
same command without --slurm prints the table.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess

from .. import cli, plugins
from ..evaluation import benchmarks, table_forms, tables
from ..experiments import dataset_runs, runs
from ..system import files, installation


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
  parser.add_argument(
    '--slurm', nargs='?', const='', metavar='OPTIONS',
    help='write a SLURM job array with these options: --slurm="--partition=gpu --time=8:00:00"',
  )  # fmt: skip
  parser.add_argument('--submit', action='store_true', help='submit the job array')
  cli.add_arguments(parser)
  return parser.parse_args(argv)


def write_slurm(args: argparse.Namespace, unfinished: list[runs.Run], out: str) -> None:
  """Writes a job array to `out`/slurm.sh, and submits it with --submit."""
  command = [*installation.command('run_dataset'), '--dataset', args.dataset]
  command += ['--root', os.path.abspath(args.root), '--out', os.path.abspath(out)]
  command += ['--unchecked'] if args.unchecked else []
  for flag in ('gin_configs', 'gin_bindings'):
    command += [f'--{flag}', *getattr(args, flag)] if getattr(args, flag) else []
  command += plugins.flags()
  path = os.path.join(out, 'slurm.sh')
  files.write_text(path, dataset_runs.slurm_script(unfinished, args.slurm, command))
  if args.submit:
    _submit(path)
  else:
    print(f'-> {path}; submit it with: sbatch {shlex.quote(path)}')
  print('When the jobs are done, the same command without --slurm prints the table.')


def _submit(path: str) -> None:
  try:
    subprocess.run(['sbatch', os.path.abspath(path)], check=True)
  except (OSError, subprocess.CalledProcessError) as error:
    raise runs.RunError(
      f'sbatch did not accept {path}: {error} Submit it on a SLURM login node: '
      f'sbatch {shlex.quote(path)}'
    ) from None


def write_tables(args: argparse.Namespace, benchmark, all_runs: list[runs.Run], out: str) -> None:
  """Prints the table of the finished runs; writes it to `out` unless --scenes chose some."""
  paths = [run.results for run in all_runs if runs.is_finished(run)]
  if not paths:
    return
  published = [] if args.unchecked else None
  table = tables.make(tables.group(tables.read(paths)), benchmark, published)
  print(table_forms.markdown(table))
  for ending in table_forms.FORMS if args.scenes is None else ():
    path = os.path.join(out, f'table{ending}')
    table_forms.write(path, table)
    print(f'-> {path}')


def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  benchmark = benchmarks.load(args.dataset)
  out = args.out or os.path.join('runs', args.dataset)
  all_runs = dataset_runs.make_runs(
    benchmark, args.root, out, args.scenes, args.gin_configs, args.gin_bindings
  )
  if not args.unchecked:
    dataset_runs.check_folder(benchmark, all_runs)
  if args.check:
    return
  unfinished = [run for run in all_runs if not runs.is_finished(run)]
  if unfinished and args.slurm is not None:
    write_slurm(args, unfinished, out)
    return
  failed = runs.run_all(unfinished, len(all_runs), args.gpus) if unfinished else {}
  write_tables(args, benchmark, all_runs, out)
  runs.raise_failed(failed, len(all_runs))
