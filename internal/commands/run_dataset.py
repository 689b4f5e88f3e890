"""Trains and evaluates all scenes of a published dataset, and puts the numbers in a table.

    python scripts/run_dataset.py --dataset 360 --root DIR [--out runs/360] [--check]

Each GPU takes one scene at a time; without GPUs they come one after another. Start it again after
an interruption: finished scenes are skipped, others go on from their newest checkpoint. --slurm
writes (--submit: and submits) a job array of one scene a task instead; the same command without it
prints the table afterwards.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess

from .. import cli
from ..evaluation import benchmarks, table_forms, tables
from ..experiments import dataset_runs, jobs
from ..system import files, installation, progress


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  parser.add_argument(
    '--dataset', required=True, choices=list(benchmarks.load_all()), help='which one'
  )
  parser.add_argument('--root', required=True, metavar='DIR', help='has a folder for each scene')
  parser.add_argument('--out', metavar='DIR', help='of the runs; default: runs/DATASET')
  parser.add_argument('--scenes', nargs='+', help='only these')
  parser.add_argument('--gpus', help='e.g. 0,2; default: all that are visible')
  parser.add_argument('--check', action='store_true', help='check the folder and stop')
  parser.add_argument(
    '--unchecked', action='store_true',
    help='take the folder as it is; published numbers are then left out of the table',
  )  # fmt: skip
  parser.add_argument(
    '--slurm', nargs='?', const='', metavar='OPTIONS',
    help='write a SLURM job array, with these: --slurm="--partition=gpu --time=8:00:00"',
  )  # fmt: skip
  parser.add_argument('--submit', action='store_true', help='submit it too')
  cli.add_arguments(parser)
  return parser.parse_args(argv)


def write_slurm(args: argparse.Namespace, plans: list[dataset_runs.Plan], out: str) -> None:
  """Writes a job array beside the runs, and submits it if told to."""
  command = [*installation.command('run_dataset'), '--dataset', args.dataset]
  command += ['--root', os.path.abspath(args.root), '--out', os.path.abspath(out)]
  command += ['--unchecked'] if args.unchecked else []
  for flag in ('gin_configs', 'gin_bindings'):
    command += [f'--{flag}', *getattr(args, flag)] if getattr(args, flag) else []
  path = os.path.join(out, 'slurm.sh')
  with files.whole(path) as temporary, open(temporary, 'w', encoding='utf-8') as f:
    f.write(dataset_runs.slurm_script(plans, args.slurm, command))
  if args.submit:
    subprocess.run(['sbatch', path], check=True)
  else:
    print(f'-> {path}; submit it by: sbatch {shlex.quote(path)}')
  print('Afterwards the same command without --slurm prints the table.')


def write_tables(args: argparse.Namespace, benchmark, plans, out: str) -> None:
  """Prints the table of the finished runs; writes it beside them if all scenes were asked for."""
  paths = [plan.results for plan in plans if dataset_runs.is_finished(plan)]
  if not paths:
    return
  published = [] if args.unchecked else None
  table = tables.make(tables.group(tables.read(paths)), benchmark, published)
  print(table_forms.markdown(table))
  for ending in table_forms.FORMS if args.scenes is None else ():
    path = os.path.join(out, f'table{ending}')
    table_forms.write(path, table)
    print(f'-> {path}')


def run(args: argparse.Namespace, plans: list[dataset_runs.Plan], left: list) -> dict[str, str]:
  """Runs what is left; returns the reasons of those that failed."""
  gpus = jobs.visible_gpus() if args.gpus is None else args.gpus.split(',')
  slots = [{'CUDA_VISIBLE_DEVICES': gpu} for gpu in gpus] or [{}]
  done = len(plans) - len(left)
  where = f'GPUs {", ".join(gpus)}' if gpus else 'the CPU'
  progress.say(f'{done} of {len(plans)} scenes are finished; the others on {where}.')
  with dataset_runs.Watch(left, done, len(plans)) as watch:
    failed = jobs.run([dataset_runs.make_job(plan) for plan in left], slots, watch)
  for scene, reason in failed.items():
    print(f'{scene} failed: {reason}')
  return failed


def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  benchmark = benchmarks.load(args.dataset)
  out = args.out or os.path.join('runs', args.dataset)
  plans = dataset_runs.make_plans(
    benchmark, args.root, out, args.scenes, args.gin_configs, args.gin_bindings
  )
  if not args.unchecked:
    dataset_runs.check_folder(benchmark, plans)
  if args.check:
    return
  left = [plan for plan in plans if not dataset_runs.is_finished(plan)]
  if left and args.slurm is not None:
    write_slurm(args, left, out)
    return
  failed = run(args, plans, left) if left else {}
  write_tables(args, benchmark, plans, out)
  if failed:
    raise benchmarks.BenchmarkError(
      f'{len(failed)} of {len(plans)} scenes failed: {", ".join(failed)} (log.txt in the folder of '
      'each says more). The same command goes on.'
    )
