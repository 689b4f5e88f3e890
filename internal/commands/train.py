"""Trains a scene.

    python train.py --config fast --data data/my_scene --out runs/my_scene
    python train.py --config paper --data data/my_scene --out runs/paper --factor 4 --steps 50000 \\
        --gin_bindings Config.lr_init=0.001 NerfMLP.net_width=512

All output goes to the folder of --out; its config.gin has all settings. Run the same command again
to resume from the newest checkpoint there. Flags override the config, and --gin_bindings override
flags; --list_knobs WORD prints the settings that have to do with a word. --dry_run decodes all
pictures and traces a step, as a training does, and prints a preflight report as JSON instead.
--replay_step N repeats step N of a run and prints its loss terms and the rays whose loss or
gradient is non-finite.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence

import jax
import numpy as np

from .. import cli, configs, datasets, models
from ..datasets import scenes
from ..devices import processes, sharding, starting
from ..evaluation import train_renders
from ..system import installation, progress
from ..training import loop, nonfinite, run_folder, train_step
from ..viewer import server

_DEFAULT_CONFIG = 'fast'  # With --data, if no config is given.
_MANY_PARAMS = 5_000_000  # Too many to train on a CPU in minutes.
_GRID_NOTE = (
  'Note: hash grids have not been timed on a TPU. From counts of compiled instructions we expect '
  'at most 51,000 rays/s on a v5e chip for 360_fast.gin. One H200 trains at 2,530,000 rays/s '
  '(docs/tpu.md).'
)


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
  metrics, board, pictures = (
    os.path.join(folder, name) for name in ('metrics.jsonl', 'tensorboard', 'train_renders')
  )
  progress.summary(
    {
      'done': f'step {step:,}, {progress.duration(seconds)} of training',
      'checkpoint': os.path.join(folder, f'checkpoints/{step}'),
      'metrics': f'{metrics}, {board}',
      'pictures': pictures,
      'next': cli.run_text('eval', folder),
    }
  )


def print_next(settings: configs.Settings, scene: scenes.Scene, argv: Sequence[str] | None) -> None:
  """Prints on stderr, beside the report's JSON, the command that trains."""
  words = [word for word in (sys.argv[1:] if argv is None else argv) if word != '--dry_run']
  lines = [f'To train: {installation.command_text("train", *words)}']
  many = models.num_params(train_step.abstract_state(settings).params) > _MANY_PARAMS
  if many and not starting.has_accelerator():
    config = settings.config
    size = max(map(tuple, np.asarray(scene.cameras.size) * max(config.factor, 1)), key=max)
    command = starting.train_command(config.data_dir, size, accelerator=False)
    lines.append(f'Without a GPU or TPU, that takes hours. In ten minutes: {command}')
  if processes.is_main():
    print('\n'.join(lines), file=sys.stderr)


def show_grid_note(settings: configs.Settings) -> None:
  """Prints on stderr what to expect of hash grids on a TPU (main process only)."""
  encodings = settings.prop_mlp.encoding, settings.nerf_mlp.encoding
  if jax.default_backend() == 'tpu' and 'grid' in encodings and processes.is_main():
    print(_GRID_NOTE, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(argv)
  uses_default = 'data_dir' in args.set_by_flag and not args.gin_configs
  if uses_default:
    args.gin_configs = [configs.config_path(_DEFAULT_CONFIG)]
  settings = cli.load_settings(args)
  config = settings.config
  processes.initialize()
  if uses_default and processes.is_main():
    print(f'Note: no --config given; using --config {_DEFAULT_CONFIG}.', file=sys.stderr)
  cli.show_notices(settings, args)
  show_grid_note(settings)
  mesh = sharding.make_mesh()
  scene = datasets.load_dataset(config, read_only=args.dry_run)
  cli.show_warnings(scene.report)
  if args.dry_run:
    loop.rehearse(settings, scene, mesh)
    print(json.dumps(preflight(settings, scene, mesh), indent=2))
    print_next(settings, scene, argv)
    return
  loop.check_settings(settings, scene)
  settings = run_folder.with_local_folder(settings)
  config = settings.config
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
  setting = functools.partial(cli.add_setting, parser)
  setting('--data', 'data_dir', metavar='DIR', help='folder of the capture: photographs and poses')
  setting('--out', 'checkpoint_dir', metavar='DIR', help='folder of the run')
  setting(
    '--factor', 'factor', type=int, metavar='N',
    help='use images_N/, downsampled by N and made if missing; 0 uses images/ as it is',
  )  # fmt: skip
  setting('--steps', 'max_steps', type=int, metavar='N', help='length of the training')
  cli.add_arguments(parser)
  parser.add_argument(
    '--dry_run',
    action='store_true',
    help='decode all pictures, trace a step, print a preflight report as JSON and exit',
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
