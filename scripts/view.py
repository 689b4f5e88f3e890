"""Opens a web page to move about a trained scene.

    python scripts/view.py runs/bonsai
    python scripts/view.py runs/bonsai --port 9000 --gin_bindings "Config.far = 100"

What the page saves goes to the run's folder: camera paths for render.py to camera_paths/, pictures
to snapshots/. Only this machine can open it, unless --host says otherwise. It is an extra:
pip install -r requirements-viewer.txt
"""

from __future__ import annotations

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from internal import checkpoints, cli, sharding, train_step, viewer_ui


def parse(argv=None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  parser.add_argument('checkpoint_dir', metavar='DIR', help="the training run's folder")
  viewer_ui.add_arguments(parser)
  cli.add_arguments(parser)
  return parser.parse_args(argv)


def main() -> None:
  args = parse()
  settings, scene = checkpoints.open_run(args.checkpoint_dir, args.gin_bindings)
  cli.show_notices(settings)
  mesh = sharding.make_mesh()
  params, step = checkpoints.restore_params(args.checkpoint_dir, settings, mesh=mesh)
  watched = viewer_ui.open_page(args, settings, scene, mesh)
  watched.serve(params, step, float(train_step.train_fraction(step, settings.config.max_steps)))


if __name__ == '__main__':
  cli.run(main)
