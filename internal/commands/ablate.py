"""Trains and evaluates variants of a method on a scene, and tabulates them.

  python scripts/ablate.py --data_dir data/bonsai --out runs/ladder \\
    --gin_bindings "Config.factor = 0" "Config.max_steps = 5000"
  python scripts/ablate.py --data_dir data/bonsai --out runs/mine --rows_file rows.txt --seeds 3
  python scripts/ablate.py --data_dir data/bonsai --out runs/width --gin_configs configs/360.gin \\
    --sweep "NerfMLP.net_width = 256, 512, 1024" "Config.near = 0.1, 0.2"

The rows are the paper's ablations and baselines (configs/ablations/published.json, --rows chooses
some), or those of a file of bindings (--rows_file), or all combinations of values (--sweep);
docs/ablations.md describes them. Each row is trained in its own folder, OUT/ROW, all with the same
gin files and bindings. Each GPU runs one row at a time; without GPUs, one row at a time. A row that
fails does not stop the others. The same command skips finished rows and resumes the others;
--table_only runs nothing, and --slurm writes a job array.

OUT/ablations.md, .json, .tex and .csv have the results. The published numbers beside the paper's
rows are of other scenes: compare each row's difference from the full model, not its value.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from .. import cli
from ..experiments import ablation_tables, ablations, runs, slurm
from ..system import files


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  parser.add_argument('--data_dir', required=True, help='the scene')
  parser.add_argument('--out', required=True, help='folder of the runs and the table')
  parser.add_argument(
    '--rows', nargs='+', metavar='NAME', help="the paper's rows to run; default: all"
  )
  parser.add_argument('--rows_file', metavar='FILE', help='rows of your own')
  parser.add_argument(
    '--sweep', nargs='+', action='extend', default=[], metavar='TEXT',
    help='settings with several values: "NerfMLP.net_width = 256, 512"; all combinations are rows',
  )  # fmt: skip
  parser.add_argument(
    '--seeds', type=int, default=1,
    help='runs of each row, from Config.seed on; the table has mean and standard deviation',
  )  # fmt: skip
  parser.add_argument('--gpus', help='GPUs to use, e.g. 0,2; default: all visible ones')
  parser.add_argument('--table_only', action='store_true', help='write the table, run nothing')
  slurm.add_arguments(parser)
  cli.add_arguments(parser)
  return slurm.parse(parser, argv)


def task(args: argparse.Namespace) -> list[str]:
  """Returns the program and flags of a task of the job array; see `slurm.write`."""
  words = ['ablate', '--data_dir', os.path.abspath(args.data_dir)]
  words += ['--out', os.path.abspath(args.out), '--seeds', str(args.seeds)]
  words += ['--rows', *args.rows] if args.rows else []
  words += ['--rows_file', os.path.abspath(args.rows_file)] if args.rows_file else []
  return words + (['--sweep', *args.sweep] if args.sweep else [])


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(argv)
  rows = ablations.choose(args.rows, args.rows_file, args.sweep)
  # Loads all settings first, so that errors appear before hours of training.
  all_runs = runs.by_seed(
    [
      ablations.make_runs(
        row, args.data_dir, args.out, args.gin_configs, args.gin_bindings, args.seeds
      )
      for row in rows
    ]
  )
  ablations.check(all_runs)
  unfinished = [run for run in runs.choose(all_runs, args.only) if not runs.is_finished(run)]
  if unfinished and args.slurm is not None:
    slurm.write(args, unfinished, args.out, task(args))
    return
  failed = {}
  if unfinished and not args.table_only:
    if not files.is_folder(args.data_dir):  # Else every run would fail with this.
      raise runs.RunError(
        f'--data_dir {args.data_dir}: no such folder. Name the folder of a capture.'
      )

    def on_end() -> None:
      ablation_tables.write_table(args.out, rows, all_runs)

    failed = runs.run_all(unfinished, len(all_runs), args.gpus, on_end)
  print(ablation_tables.write_table(args.out, rows, all_runs, failed))
  runs.raise_failed(failed, len(all_runs))
