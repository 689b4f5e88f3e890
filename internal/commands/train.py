"""Trains a scene.

    python train.py --gin_configs configs/360_fast.gin \\
        --gin_bindings "Config.data_dir = 'my_scene'" "Config.checkpoint_dir = 'runs/my_scene'"

All output goes to Config.checkpoint_dir. Run the same command again to resume from the newest
checkpoint there. --dry_run prints a preflight report as JSON and exits. --replay_step N repeats
step N of a run and prints its loss terms and the rays whose loss or gradient is non-finite.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence

import jax

from .. import cli, configs, datasets, models, plugins
from ..datasets import scenes
from ..devices import processes, sharding
from ..evaluation import train_renders
from ..system import installation, progress
from ..training import loop, nonfinite, train_step
from ..viewer import server


def preflight(settings: configs.Settings, scene: scenes.Scene, mesh) -> dict:
  """Returns the preflight report: the capture, the model's size and the devices."""
  shapes = train_step.abstract_state(settings).params
  return {
    **scene.report,
    'num_params': models.num_params(shapes),
    'devices': [str(d) for d in mesh.devices.flat],
    'processes': jax.process_count(),
    'batch_size': settings.config.batch_size,
    'batch_per_device': settings.config.batch_size // mesh.size,
  }


def print_summary(folder: str, step: int, seconds: float) -> None:
  """Prints where a finished run's files are, and which commands to run next."""
  run = f'--checkpoint_dir {shlex.join([folder, *plugins.flags()])}'
  metrics, board, pictures = (
    os.path.join(folder, name) for name in ('metrics.jsonl', 'tensorboard', 'train_renders')
  )
  progress.summary(
    {
      'done': f'step {step:,}, {progress.duration(seconds)} of training',
      'checkpoint': os.path.join(folder, f'checkpoints/{step}'),
      'metrics': f'{metrics}, {board}',
      'pictures': pictures,
      'next': f'{installation.command_text("eval")} {run}',
      '': f'{installation.command_text("render")} {run}',
    }
  )


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(argv)
  settings = configs.load_config(args.gin_configs, args.gin_bindings)
  config = settings.config
  processes.initialize()
  cli.show_notices(settings)
  mesh = sharding.make_mesh()
  scene = datasets.load_dataset(config, read_only=args.dry_run)
  cli.show_warnings(scene.report)
  if args.dry_run:
    print(json.dumps(preflight(settings, scene, mesh), indent=2))
    return
  loop.check_settings(settings, scene)
  if args.replay_step is not None:
    nonfinite.replay(settings, scene, mesh, args.replay_step)
    return
  on_step = server.live(args, settings, scene, mesh) if args.viewer else None
  render_test = train_renders.TestRenders(settings, scene, mesh)
  seconds = loop.train(settings, scene, mesh, on_step=on_step, render_test=render_test)
  if seconds is not None and processes.is_main():
    print_summary(config.checkpoint_dir, config.last_step, seconds)


def parse(argv=None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  cli.add_arguments(parser)
  parser.add_argument(
    '--dry_run', action='store_true', help='print a preflight report as JSON and exit'
  )
  parser.add_argument(
    '--replay_step',
    type=int,
    metavar='N',
    help='repeat step N, print its loss terms and non-finite rays, and exit',
  )
  parser.add_argument(
    '--viewer', action='store_true', help='open a web page that shows the scene while it trains'
  )
  server.add_arguments(parser)
  return parser.parse_args(argv)
