"""Trains and evaluates the paper's ablations and baselines on a scene, and tabulates them.

  python scripts/ablate.py --data_dir data/bonsai --out runs/ladder \\
    --gin_bindings "Config.factor = 0" "Config.max_steps = 5000"

Each row of configs/ablations/published.json is trained in its own folder, OUT/ROW, all with the
same bindings. Each GPU runs one row at a time; without GPUs, one row at a time. The same command
skips finished rows and resumes the others; --table_only runs nothing. OUT/ablations.md and .json
show our numbers beside the published ones. The published ones are means over other scenes: compare
each row's difference from the full model, not its value.
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import cli
from ..experiments import ablations, runs


def main(argv: Sequence[str] | None = None) -> None:
  parser = cli.make_parser(__doc__)
  parser.add_argument('--data_dir', required=True, help='the scene')
  parser.add_argument('--out', required=True, help='folder of the runs and the table')
  parser.add_argument('--rows', nargs='+', metavar='NAME', help='rows to run; default: all')
  parser.add_argument('--gpus', help='GPUs to use, e.g. 0,2; default: all visible ones')
  parser.add_argument('--table_only', action='store_true', help='write the table, run nothing')
  cli.add_arguments(parser)
  args = parser.parse_args(argv)
  rows = ablations.choose(args.rows)
  # Loads all settings first, so that errors appear before hours of training.
  all_runs = [
    ablations.make_run(row, args.data_dir, args.out, args.gin_configs, args.gin_bindings)
    for row in rows
  ]
  unfinished = [run for run in all_runs if not runs.is_finished(run)]
  failed = {}
  if unfinished and not args.table_only:

    def on_end() -> None:
      ablations.write_table(args.out, rows, all_runs)

    failed = runs.run_all(unfinished, len(rows), args.gpus, on_end)
  print(ablations.write_table(args.out, rows, all_runs))
  runs.raise_failed(failed, len(rows))
