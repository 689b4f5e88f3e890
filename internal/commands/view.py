"""Opens a web page to explore a trained scene interactively.

    python scripts/view.py runs/bonsai
    python scripts/view.py runs/bonsai --port 9000 --gin_bindings "Config.far = 100"

The page saves camera paths for render.py to camera_paths/ in the run's folder, and pictures to
snapshots/. Only this machine can open it unless --host allows others. It needs an optional package:
pip install -r requirements-viewer.txt
"""

from __future__ import annotations

import argparse

from .. import cli
from ..devices import sharding
from ..training import checkpoints, run_folder, train_step
from ..viewer import server


def parse(argv=None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  parser.add_argument('checkpoint_dir', metavar='DIR', help="the training run's folder")
  server.add_arguments(parser)
  cli.add_arguments(parser)
  return parser.parse_args(argv)


def main(argv=None) -> None:
  args = parse(argv)
  settings, scene = run_folder.open_run(args.checkpoint_dir, args.gin_bindings)
  cli.show_notices(settings)
  mesh = sharding.make_mesh()
  params, step = checkpoints.restore_params(args.checkpoint_dir, settings, mesh=mesh)
  watched = server.open_page(args, settings, scene, mesh)
  watched.serve(params, step, float(train_step.train_fraction(step, settings.config.max_steps)))
