"""Trains a scene.

    python train.py --gin_configs configs/360_fast.gin \\
        --gin_bindings "Config.data_dir = 'my_scene'" "Config.checkpoint_dir = 'runs/my_scene'"

Everything lands in Config.checkpoint_dir, and a second start of the same command goes on from the
newest checkpoint there. `--dry_run` prints a preflight report as JSON and stops; `--replay_step N`
shows step N of a run again, term by term, and the rays whose loss or gradient is not finite.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import time
from collections.abc import Sequence

import jax

from .. import cli, configs, datasets, models
from ..datasets import scenes
from ..devices import processes, sharding
from ..evaluation import train_renders
from ..system import installation, progress, signals
from ..training import checkpoints, nonfinite, pixel_store, replay, runlog, train_step
from ..viewer import server


def preflight(settings: configs.Settings, scene: scenes.Scene, mesh) -> dict:
  """What a run would work on: the capture's report, the model's size and the devices."""
  shapes = train_step.abstract_state(settings).params
  return {
    **scene.report,
    'num_params': models.num_params(shapes),
    'devices': [str(d) for d in mesh.devices.flat],
    'processes': jax.process_count(),
    'batch_size': settings.config.batch_size,
    'batch_per_device': settings.config.batch_size // mesh.size,
  }


def tell_result(folder: str, step: int, seconds: float) -> None:
  """Says what a finished run leaves, and what is done with it next."""
  path = lambda name: os.path.join(folder, name)  # noqa: E731
  progress.summary(
    {
      'done': f'step {step:,}, {progress.duration(seconds)} of training',
      'checkpoint': path(f'checkpoints/{step}'),
      'metrics': f'{path("metrics.jsonl")}, {path("tensorboard")}',
      'pictures': path('train_renders'),
      'next': f'{installation.command_text("eval")} --checkpoint_dir {shlex.quote(folder)}',
      '': f'{installation.command_text("render")} --checkpoint_dir {shlex.quote(folder)}',
    }
  )


def train(settings: configs.Settings, scene: scenes.Scene, mesh, look=lambda *_: 0.0) -> None:
  """Runs the steps that are left; `look(params, step)` after each returns the seconds it took.

  Raises:
    signals.Stopped: SIGTERM or SIGINT came; the step that it came in is done and saved.
    BadNumbersError: a part has not been updated for too long.
    CheckpointError: the run in the folder cannot be gone on with.
  """
  config, last = settings.config, settings.config.last_step
  start = checkpoints.start_step(config.checkpoint_dir)
  if start >= last:
    print(f'Nothing to do: {config.checkpoint_dir} has step {start:,} of {last:,}.')
    return
  if start:
    checkpoints.check_same_scene(config.checkpoint_dir, scene)
  state, recent, micro_batches = checkpoints.start_run(settings, mesh, start)
  step_fn = train_step.make_train_step(settings, mesh, fewest=micro_batches)
  test_renders = train_renders.TestRenders(settings, scene, mesh)
  if processes.is_main():
    checkpoints.tidy(config.checkpoint_dir, start)
    checkpoints.write_run(config.checkpoint_dir, settings, scene)
  pixels, place = pixel_store.load(settings, scene, mesh)
  cams = pixel_store.training_cameras(config, scene)
  pauses = {'test': config.train_render_every, 'save': config.checkpoint_every}
  log = runlog.RunLog(config.checkpoint_dir, start, last, processes.is_main(), pauses)
  cams_on_device = sharding.replicate(cams, mesh)
  draw = train_step.make_draw(config, mesh, cams_on_device.supervision)
  log.say(
    f'{models.num_params(state.params):,} parameters, {len(scene.train)} training images, '
    f'pixels on the {place}, {mesh.size} x '
    f'{mesh.devices.flat[0].device_kind}; steps {start:,} to {last:,} -> {config.checkpoint_dir}'
  )
  timed, clock = 0, time.time()

  def pause_clock():
    """Waits for the device; returns the seconds since the last call."""
    nonlocal clock
    jax.block_until_ready(state.params)
    elapsed, clock = time.time() - clock, time.time()
    return elapsed

  with signals.postponed() as request:
    for step in range(start + 1, last + 1):
      source = pixels
      if place != 'device':
        source = train_step.host_pixels(draw, step - 1, pixels, cams.size, mesh)
      state, stats = step_fn(state, cams_on_device, source)
      stats.numbers.copy_to_host_async()  # While the device is busy with steps to come.
      recent.append(stats)
      timed += 1
      clock += look(state.params, step)
      if step == start + 1:
        parts = f'in {step_fn.micro_batches} micro-batches, ' if step_fn.micro_batches > 1 else ''
        log.say(
          f'first step after {progress.duration(pause_clock())} (compiling); '
          f'{parts}{step_fn.account()}'
        )
        timed = 0
      render_now = config.train_render_every > 0 and step % config.train_render_every == 0
      save_now = step % config.checkpoint_every == 0 or step == last
      if step % config.print_every == 0 or render_now or save_now:
        elapsed, rows = pause_clock() if timed else 0.0, jax.device_get(recent)
        log.steps(step, rows, timed, elapsed, config.batch_size)
        for line in nonfinite.lines(step, rows):
          log.say(line)
        nonfinite.check(config.checkpoint_dir, config.max_skipped_updates, step, rows)
        recent, timed = [], 0
      if render_now:
        with log.pause('test'):
          test_renders(state.params, step, log)
      # Processes agree where they wait for the device anyway, so that asking costs nothing.
      ask_now = jax.process_count() == 1 or step % config.print_every == 0
      signum = processes.largest(request.signum) if ask_now and step < last else 0
      if save_now or signum:
        with log.pause('save'):
          checkpoints.save_run(config, state, recent, step_fn, mesh)
      if signum:
        log.say(
          f'step {step:,} is saved in {config.checkpoint_dir}; the same command goes on from there'
        )
        log.close()
        processes.leave()
        raise signals.Stopped(signum)
      if config.gc_every and step % config.gc_every == 0:
        gc.collect()
      if render_now or save_now:
        pause_clock()
  log.close()
  if processes.is_main():
    tell_result(config.checkpoint_dir, last, log.train_seconds)


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(argv)
  settings = configs.load_config(args.gin_configs, args.gin_bindings)
  config = settings.config
  processes.initialize()
  cli.show_notices(settings)
  mesh = sharding.make_mesh()
  scene = datasets.load_dataset(config, read_only=args.dry_run)
  if args.dry_run:
    print(json.dumps(preflight(settings, scene, mesh), indent=2))
    return
  if not config.checkpoint_dir:
    raise configs.ConfigError('Config.checkpoint_dir is not set: where should the run be kept?')
  if settings.model.num_glo_features and settings.model.num_glo_embeddings < len(scene.train):
    raise configs.ConfigError(
      f'Model.num_glo_embeddings is {settings.model.num_glo_embeddings}, fewer than the '
      f'{len(scene.train)} training images; raise it.'
    )
  if args.replay_step is not None:
    replay.replay(settings, scene, mesh, args.replay_step)
  else:
    look = [server.live(args, settings, scene, mesh)] if args.viewer else []
    train(settings, scene, mesh, *look)


def parse(argv=None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  cli.add_arguments(parser)
  parser.add_argument(
    '--dry_run', action='store_true', help='print a preflight report as JSON and stop'
  )
  parser.add_argument(
    '--replay_step', type=int, metavar='N', help='show what was in step N of the run and stop'
  )
  parser.add_argument(
    '--viewer', action='store_true', help='open a web page to look at the scene meanwhile'
  )
  server.add_arguments(parser)
  return parser.parse_args(argv)
