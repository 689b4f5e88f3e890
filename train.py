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
import itertools
import json
import os
import shlex
import time

import jax
import numpy as np

from internal import (
  bad_numbers,
  batches,
  checkpoints,
  cli,
  configs,
  datasets,
  evaluation,
  models,
  progress,
  report,
  runlog,
  sharding,
  signals,
  structs,
  train_step,
  viewer_ui,
  vis,
)
from internal import pixels as pixels_lib
from internal.datasets import scene as scene_lib

REPLAYED_RAYS = 20  # At most so many are shown.


def preflight(settings: configs.Settings, scene: scene_lib.Scene, mesh) -> dict:
  """What a run would work on: the capture's report, the model's size and the devices."""
  shapes = jax.eval_shape(lambda: train_step.create_state(settings).params)
  return {
    **scene.report,
    'num_params': models.num_params(shapes),
    'devices': [str(d) for d in mesh.devices.flat],
    'processes': jax.process_count(),
    'batch_size': settings.config.batch_size,
    'batch_per_device': settings.config.batch_size // mesh.size,
  }


def keep_on_device(config: configs.Config, store: batches.PixelStore) -> bool:
  """Whether the pixels go to the device: as told, or if they take under a quarter of it.

  Raises:
    ConfigError: told to, but they are more than 32-bit indices reach.
  """
  countable = store.first.dtype == np.int32
  if config.pixels_on == 'device' and not countable:
    raise configs.ConfigError(
      "Config.pixels_on = 'device' is for less than 2^31 training pixels; use 'auto', or "
      'Config.factor to downsample.'
    )
  if config.pixels_on != 'auto':
    return config.pixels_on == 'device'
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get('bytes_limit') or pixels_lib.available_memory()
  return countable and (limit is None or pixels_lib.stored_bytes(store) < limit / 4)


class TestRenders:
  """Renders a few test images during training: a sheet on disk, metrics in the log."""

  def __init__(self, settings, scene, mesh):
    self.config, self.scene = settings.config, scene
    self.render_image = evaluation.make_image_renderer(settings, mesh)
    self.probe_rays = evaluation.make_ray_probe(settings, mesh)
    count = min(self.config.train_render_images, len(scene.test))
    spread = np.linspace(0, len(scene.test) - 1, count).round().astype(int)
    self.rows = [scene.test[k] for k in spread]
    self.folder = os.path.join(self.config.checkpoint_dir, 'train_renders')

  def __call__(self, params, step: int, log: runlog.RunLog) -> None:
    frac = float(train_step.train_fraction(step, self.config.max_steps))
    scores = []
    for row in self.rows:
      began = time.time()
      out = self.render_image(params, self.scene.cameras, row, frac)
      seconds = time.time() - began
      if not sharding.is_main():
        continue
      truth = scene_lib.read_image(self.config.data_dir, self.scene, row)
      mask = scene_lib.read_mask(self.config.data_dir, self.scene, row)
      metrics = report.image_metrics(out['rgb'], truth, self.config, mask)
      scores.append({**metrics, 'seconds': seconds})
      sheet = vis.comparison_sheet(out, truth)
      name = self.scene.stem(row)
      vis.write_png(os.path.join(self.folder, f'{name}_step{step:07d}.png'), sheet)
      log.picture(step, f'test/{name}', sheet)
    if self.rows and self.config.vis_num_rays > 0:
      history = self.probe_rays(params, self.scene.cameras, self.rows[0], frac)
      picture = vis.ray_picture(*history, max_rays=self.config.vis_num_rays)
      if sharding.is_main():
        vis.write_png(os.path.join(self.folder, f'rays_step{step:07d}.png'), picture)
        log.picture(step, 'test/rays', picture)
    if scores:
      means = {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}
      log.scalars(step, {f'test_{k}': v for k, v in means.items()}, 'test')
      log.say(
        f'test of {len(scores)} images at step {step:,}: psnr {means["psnr"]:.2f}  '
        f'ssim {means["ssim"]:.3f}  {means["seconds"]:.1f}s each -> {self.folder}'
      )


def load_pixels(settings, scene, mesh):
  """The training images' pixels, on the device where they fit; and where they are."""
  config = settings.config
  store = pixels_lib.read(config, scene, progress=sharding.is_main())
  on_disk = isinstance(store.rgb, pixels_lib.MappedPixels)
  if not keep_on_device(config, store):
    return store, 'disk' if on_disk else 'host'
  planes = store.rgb.planes() if on_disk else store.rgb
  on_device = tuple(sharding.replicate(plane, mesh) for plane in planes)
  return batches.PixelStore(on_device, sharding.replicate(store.first, mesh)), 'device'


def training_cameras(config: configs.Config, scene: scene_lib.Scene) -> structs.Cameras:
  """The cameras of the training images, with what masks and weights say of their pixels."""
  cams = scene.cameras.take(np.array(scene.train))
  masks = scene_lib.read_masks(config.data_dir, scene, scene.train, sharding.is_main())
  weights = [scene.weights[row] for row in scene.train] if scene.weights else None
  return cams.replace(supervision=batches.make_supervision(cams.size, masks, weights))


def start_run(settings, mesh, step: int):
  """The state of the checkpoint at `step`, or a fresh one at 0; and what `save_run` noted with it.

  Returns:
    (state, the stats of the print window's steps so far, the number of micro-batches).
  """
  folder = settings.config.checkpoint_dir
  if step == 0:
    return sharding.replicate(train_step.create_state(settings), mesh), [], 1
  state = checkpoints.restore(folder, settings, mesh, step)
  notes = checkpoints.notes(folder, step)
  window = [{name: np.float32(value) for name, value in row.items()} for row in notes['window']]
  return state, window, notes['micro_batches'] if notes['devices'] == mesh.size else 1


def save_run(config: configs.Config, state, window: list, step_fn, mesh) -> None:
  """A checkpoint, and with it what must not depend on interruptions.

  That is: the stats of a print window whose mean is not logged yet, and in how many micro-batches
  these devices take their rays.
  """
  rows = [{name: float(value) for name, value in row.items()} for row in jax.device_get(window)]
  notes = {'window': rows, 'micro_batches': step_fn.micro_batches, 'devices': mesh.size}
  checkpoints.save(config.checkpoint_dir, state, config.checkpoint_keep, notes)


def replay(settings: configs.Settings, scene: scene_lib.Scene, mesh, step: int) -> None:
  """Does a step of a run again, from the newest checkpoint before it, and prints what it sees.

  Nothing is written.
  """
  config = settings.config
  if not 1 <= step <= config.last_step:
    raise configs.ConfigError(f'--replay_step must be in [1, {config.last_step}], got {step}.')
  say = print if sharding.is_main() else lambda *_: None
  start = checkpoints.start_step(config.checkpoint_dir, at_most=step - 1)
  say(f'step {step:,}, from {f"the checkpoint of step {start:,}" if start else "the beginning"}:')
  state, _, micro_batches = start_run(settings, mesh, start)
  step_fn = train_step.make_train_step(settings, mesh, fewest=micro_batches)
  store = pixels_lib.read(config, scene, progress=sharding.is_main())
  cams = training_cameras(config, scene)
  cams_on_device = sharding.replicate(cams, mesh)
  draw = train_step.make_draw(config, mesh, cams_on_device.supervision)
  for done in range(start, step - 1):
    rgb = train_step.host_pixels(draw, done, store, cams.size, mesh)
    state, _ = step_fn(state, cams_on_device, rgb)
  ids = [sharding.to_host(a) for a in draw(step - 1, cams.size)]
  seen = batches.lookup(store, cams.size, *ids)
  found = bad_numbers.find_rays(settings, mesh, state, cams_on_device, seen)
  found = list(itertools.islice(found, REPLAYED_RAYS + 1))  # Before the step takes the state.
  rgb = train_step.host_pixels(draw, step - 1, store, cams.size, mesh)
  for name, value in jax.device_get(step_fn(state, cams_on_device, rgb)[1]).items():
    say(f'  {name} {value:.9g}')
  for ray, values in found[:REPLAYED_RAYS]:
    cam, x, y = (int(a[ray]) for a in ids)
    row = scene.train[cam]
    terms = ', '.join(f'{name} {value:.6g}' for name, value in values.items())
    say(f'ray {ray}: camera {row} ({scene.names[row]}), pixel x {x}, y {y}: {terms}')
  if len(found) > REPLAYED_RAYS:
    say('and others')
  if not found:
    say(f'Loss and gradient of each of the {config.batch_size:,} rays are finite by themselves.')


def tell_result(folder: str, step: int, seconds: float) -> None:
  """Says what a finished run leaves, and what is done with it next."""
  path = lambda name: os.path.join(folder, name)  # noqa: E731
  progress.summary(
    {
      'done': f'step {step:,}, {progress.duration(seconds)} of training',
      'checkpoint': path(f'checkpoints/{step}'),
      'metrics': f'{path("metrics.jsonl")}, {path("tensorboard")}',
      'pictures': path('train_renders'),
      'next': f'python eval.py --checkpoint_dir {shlex.quote(folder)}',
      '': f'python render.py --checkpoint_dir {shlex.quote(folder)}',
    }
  )


def train(settings: configs.Settings, scene: scene_lib.Scene, mesh, look=lambda *_: 0.0) -> None:
  """Runs the steps that are left; `look(params, step)` after each returns the seconds it took.

  Raises:
    signals.Stopped: SIGTERM or SIGINT came; the step that it came in is done and saved.
    BadNumbersError: a part has not been updated for too long.
  """
  config, last = settings.config, settings.config.last_step
  start = checkpoints.start_step(config.checkpoint_dir)
  if start >= last:
    print(f'Nothing to do: {config.checkpoint_dir} has step {start:,} of {last:,}.')
    return
  state, recent, micro_batches = start_run(settings, mesh, start)
  step_fn = train_step.make_train_step(settings, mesh, fewest=micro_batches)
  test_renders = TestRenders(settings, scene, mesh)
  if sharding.is_main():
    checkpoints.tidy(config.checkpoint_dir, start)
    checkpoints.write_run(config.checkpoint_dir, settings, scene)
  pixels, place = load_pixels(settings, scene, mesh)
  cams = training_cameras(config, scene)
  pauses = {'test': config.train_render_every, 'save': config.checkpoint_every}
  log = runlog.RunLog(config.checkpoint_dir, start, last, sharding.is_main(), pauses)
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
        for line in bad_numbers.lines(step, rows):
          log.say(line)
        bad_numbers.check(config.checkpoint_dir, config.max_skipped_updates, step, rows)
        recent, timed = [], 0
      if render_now:
        with log.pause('test'):
          test_renders(state.params, step, log)
      # Processes agree where they wait for the device anyway, so that asking costs nothing.
      ask_now = jax.process_count() == 1 or step % config.print_every == 0
      signum = sharding.largest(request.signum) if ask_now and step < last else 0
      if save_now or signum:
        with log.pause('save'):
          save_run(config, state, recent, step_fn, mesh)
      if signum:
        log.say(
          f'step {step:,} is saved in {config.checkpoint_dir}; the same command goes on from there'
        )
        log.close()
        sharding.leave()
        raise signals.Stopped(signum)
      if step % config.gc_every == 0:
        gc.collect()
      if render_now or save_now:
        pause_clock()
  log.close()
  if sharding.is_main():
    tell_result(config.checkpoint_dir, last, log.train_seconds)


def main(args: argparse.Namespace) -> None:
  settings = configs.load_config(args.gin_configs, args.gin_bindings)
  config = settings.config
  sharding.initialize()
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
    replay(settings, scene, mesh, args.replay_step)
  else:
    look = viewer_ui.live(args, settings, scene, mesh) if args.viewer else None
    train(settings, scene, mesh, *filter(None, [look]))


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
  viewer_ui.add_arguments(parser)
  return parser.parse_args(argv)


if __name__ == '__main__':
  cli.run(lambda: main(parse()))
