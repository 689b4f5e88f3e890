"""Opens a web page to explore a trained scene interactively.

    python scripts/view.py runs/bonsai
    python scripts/view.py runs/bonsai --port 9000 --gin_bindings Config.far=100

The page saves camera paths for render.py to camera_paths/ in the run's folder, and pictures to
snapshots/. If the run has Gaussians (scripts/export.py RUN --what splats), the browser draws them
while the camera moves. Only this machine can open it unless --host allows others. It needs an
optional package: pip install -r requirements-viewer.txt
"""

from __future__ import annotations

import argparse

from .. import cli
from ..rendering import trained
from ..splats import sketch
from ..viewer import server


def parse(argv=None) -> argparse.Namespace:
  parser = cli.make_run_parser(__doc__)
  server.add_arguments(parser)
  return parser.parse_args(argv)


def main(argv=None) -> None:
  args = parse(argv)
  run = trained.open_trained(cli.run_folder(args), cli.bindings(args))
  cli.show_notices(run.settings, args)
  cli.show_warnings(run.scene.report)
  drawn = sketch.find(run.folder, run.scene)
  page = server.open_page(args, run.settings, run.scene, run.mesh, drawn)
  page.serve(run.params, run.step, run.train_fraction)
