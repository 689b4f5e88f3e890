"""The training loop."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from .. import configs, models, structs
from ..datasets import scenes
from ..devices import memory, processes, sharding
from ..errors import UserError
from ..system import bucket, progress, signals
from . import (
  camera_refinement,
  checkpoints,
  dispatch,
  nonfinite,
  per_camera,
  pixel_store,
  run_folder,
  run_lock,
  runlog,
  train_step,
)

OnStep = Callable[[int, dict], float]
RenderTest = Callable[[dict, int, runlog.RunLog], None]


class _Clock:
  """Times steps, without compilation, rendering, saving and callbacks."""

  def __init__(self):
    self.steps, self._start = 0, time.monotonic()

  def leave_out(self, seconds: float) -> None:
    """Excludes seconds from the current lap."""
    self._start += seconds

  def so_far(self, params: dict) -> tuple[int, float]:
    """Waits for the device and returns the (steps, seconds) of the current lap."""
    jax.block_until_ready(params)  # Steps are dispatched asynchronously.
    # Without steps, it timed a pause.
    return self.steps, time.monotonic() - self._start if self.steps else 0.0

  def lap(self, params: dict) -> tuple[int, float]:
    """Waits for the device, starts a new lap and returns the last one's (steps, seconds)."""
    lap = self.so_far(params)
    self.steps, self._start = 0, time.monotonic()
    return lap


def check_settings(settings: configs.Settings, scene: scenes.Scene) -> None:
  """Raises ConfigError unless the settings name a run folder and suit the scene."""
  if not settings.config.checkpoint_dir:
    raise configs.ConfigError("Config.checkpoint_dir is not set; set it to the run's folder.")
  if settings.config.refine_cameras:
    camera_refinement.check(scene)
  parts = per_camera.parts(settings.config).values()
  tables = settings.model.num_glo_features or any(part.rows is None for part in parts)
  # nn.Embed returns NaN for an image beyond its table.
  if tables and settings.model.num_glo_embeddings < len(scene.train):
    raise configs.ConfigError(
      f'Model.num_glo_embeddings is {settings.model.num_glo_embeddings}, fewer than the '
      f'{len(scene.train)} training images; raise it.'
    )
  smallest = int(scene.cameras.size[list(scene.train)].min())
  if settings.config.patch_size > smallest:
    raise configs.ConfigError(
      f'Config.patch_size is {settings.config.patch_size}, more than the {smallest} pixels of a '
      'training image; lower it.'
    )


def train(
  settings: configs.Settings,
  scene: scenes.Scene,
  mesh: Mesh | None = None,
  on_step: OnStep | None = None,
  render_test: RenderTest | None = None,
  on_step_every: int = 0,
) -> float | None:
  """Trains a run to its last step, resuming from its newest checkpoint.

  Args:
    settings: the run's settings; Config.checkpoint_dir is its folder.
    scene: the capture to train on.
    mesh: devices to train on; all devices by default.
    on_step: callback `on_step(step, params)`. Returns the seconds to leave out of the timing.
      `params` are valid until the callback returns.
    render_test: callback `render_test(params, step, log)`, called every Config.train_render_every
      steps to render test images.
    on_step_every: steps between calls of `on_step`, which is also called after the last step; 0
      calls it between dispatches, several times a second if steps are short.

  Returns:
    Training time in seconds, summed over all starts; None if the run was already complete.

  Raises:
    signals.Stopped: SIGTERM or SIGINT arrived; the steps under way were finished and saved.
    NonFiniteError: a part was not updated in Config.max_skipped_updates consecutive steps.
    CheckpointError: the folder holds a run that cannot be resumed.
    RunLockError: another training writes to the folder, or it vanished while training.
  """
  check_settings(settings, scene)
  mesh = mesh or sharding.make_mesh()
  folder, last = settings.config.checkpoint_dir, settings.config.last_step
  # The listing is cheap; checkpoints are verified here only if there may be nothing to do.
  newest = processes.from_main(checkpoints.latest_step(folder) or 0)
  if newest >= last and checkpoints.start_step(folder) >= last:
    print(f'Nothing to do: {folder} has step {newest:,} of {last:,}.')
    # A training that was killed after its last step may have left its lock and other files.
    with contextlib.suppress(UserError, OSError), run_lock.locked(folder):
      if processes.is_main():
        run_folder.tidy(folder, newest)
    return None
  # Before anything is restored: another training may be replacing the checkpoints.
  with run_lock.locked(folder):
    run_folder.refresh(folder)
    try:
      return _train(settings, scene, mesh, on_step, render_test, on_step_every)
    except nonfinite.NonFiniteError:
      if processes.is_main():
        bucket.push(folder)  # The log of the steps that led there.
      raise


def _train(
  settings: configs.Settings,
  scene: scenes.Scene,
  mesh: Mesh,
  on_step: OnStep | None,
  render_test: RenderTest | None,
  on_step_every: int,
) -> float:
  """Trains in a locked folder; see `train`."""
  config, last = settings.config, settings.config.last_step
  # Asked again, because another training may have ended between the first look and the lock.
  start = step = checkpoints.start_step(config.checkpoint_dir)
  render_every = config.train_render_every if render_test else 0
  own_every = on_step_every if on_step else 0
  stops = config.print_every, config.checkpoint_every, render_every, config.gc_every, own_every
  watched = on_step is not None and not on_step_every
  most, fixed = dispatch.shape(settings, mesh, stops, watched)
  state, rows, step_fn = _start(settings, scene, mesh, start, most, fixed)
  cams, load_pixels, place = _load_data(settings, scene, mesh)
  steps = dispatch.Dispatcher(step_fn, cams, load_pixels, place == 'device', rows, watched)
  log = _open_log(settings, start, render_every)
  log.say(_describe(settings, scene, mesh, start, place))
  clock = _Clock()
  with signals.postponed() as request:  # A signal ends the loop between two dispatches.
    while step < last:
      before, stop = step, dispatch.next_stop(step, last, stops)
      state, step = steps.take(state, step, stop if step > start else step + 1)
      clock.steps += step - before
      if on_step and (not on_step_every or _is_due(step, on_step_every) or step == last):
        # Before the next dispatch, which donates the buffers of state.params.
        clock.leave_out(on_step(step, state.params))
      if step == start + 1:
        _say_compiled(log, step_fn, clock.lap(state.params)[1])
      elif before == start + 1 and steps.is_adaptive:  # The first dispatch without compiling.
        _set_pace(steps, *clock.so_far(state.params))
      render_now = _is_due(step, render_every)  # 0 without `render_test`.
      save_now = _is_due(step, config.checkpoint_every) or step == last
      # Logged before each pause, so that pauses do not count as time of the steps.
      if render_now or save_now or _is_due(step, config.print_every):
        timed = clock.lap(state.params)
        _log_steps(config, log, step, steps.rows(), *timed)
        steps.clear()
        _set_pace(steps, *timed)
      if render_now:
        with log.pause('test'):
          render_test(state.params, step, log)
      # Processes agree only where they wait for the device anyway, so it costs nothing.
      ask_now = jax.process_count() == 1 or _is_due(step, config.print_every)
      # The last step is saved anyway, and a finished run exits with 0.
      signum = processes.largest(request.signum) if ask_now and step < last else 0
      if save_now or signum:
        with log.pause('save'):
          run_folder.save_run(config, state, steps.rows(), step_fn, mesh)
      if signum:
        _stop(config, log, step, signum)
      if _is_due(step, config.gc_every):
        gc.collect()
      if render_now or save_now:
        clock.lap(state.params)  # Leaves out the pause.
  log.close()
  return log.train_seconds


def _set_pace(steps: dispatch.Dispatcher, timed: int, seconds: float) -> None:
  """Chooses the steps of a dispatch by the slowest process's time of the last steps."""
  if timed and steps.is_adaptive:
    steps.set_pace(processes.largest(round(1e6 * min(seconds / timed, 1000))) / 1e6)


def _is_due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _start(
  settings: configs.Settings, scene: scenes.Scene, mesh: Mesh, start: int, most: int, fixed: bool
) -> tuple[structs.TrainState, list, train_step.TrainStep]:
  """Restores or creates the state and the step function, then prepares the run's folder."""
  folder = settings.config.checkpoint_dir
  if start:
    run_folder.check_same_scene(folder, scene)  # Before `write_run` overwrites scene.json.
  state, rows, micro_batches = run_folder.start_run(settings, mesh, start)
  step_fn = train_step.make_train_step(settings, mesh, fewest=micro_batches, most=most, fixed=fixed)
  if processes.is_main():
    # Only now, so that a run that cannot be restored leaves its folder unchanged.
    run_lock.check()
    run_folder.tidy(folder, start)
    run_folder.write_run(folder, settings, scene)
  return state, rows, step_fn


def _load_data(
  settings: configs.Settings, scene: scenes.Scene, mesh: Mesh
) -> tuple[structs.Cameras, Callable, str]:
  """Returns the replicated cameras, `load_pixels(step)` for the step function, and the place."""
  pixels, place = pixel_store.load(settings, scene, mesh)
  cams = pixel_store.training_cameras(settings, scene)
  replicated = sharding.replicate(cams, mesh)
  if place == 'device':
    return replicated, lambda _: pixels, place  # The step function looks up its own pixels.
  draw = train_step.make_draw(settings.config, mesh, replicated.supervision)
  load_pixels = lambda step: train_step.host_pixels(draw, step, pixels, cams.size, mesh)  # noqa: E731
  return replicated, load_pixels, place


def _open_log(settings: configs.Settings, start: int, render_every: int) -> runlog.RunLog:
  config = settings.config
  pauses = {'test': render_every, 'save': config.checkpoint_every}
  return runlog.RunLog(config.checkpoint_dir, start, config.last_step, processes.is_main(), pauses)


def _describe(
  settings: configs.Settings, scene: scenes.Scene, mesh: Mesh, start: int, place: str
) -> str:
  config, params = settings.config, train_step.abstract_state(settings).params
  return (
    f'{models.num_params(params):,} parameters, {len(scene.train)} training images, '
    f'pixels on the {place}, {mesh.size} x {mesh.devices.flat[0].device_kind}; '
    f'steps {start:,} to {config.last_step:,} -> {config.checkpoint_dir}'
  )


def _say_compiled(log: runlog.RunLog, step_fn: train_step.TrainStep, seconds: float) -> None:
  parts = f'in {step_fn.micro_batches} micro-batches, ' if step_fn.micro_batches > 1 else ''
  log.say(f'first step after {progress.duration(seconds)} (compiling); {parts}{step_fn.account()}')


def _log_steps(
  config: configs.Config, log: runlog.RunLog, step: int, rows: list, timed: int, seconds: float
) -> None:
  """Logs the steps since the last call, and ends a run that makes no progress."""
  run_lock.check()
  peak = memory.peak_bytes(jax.local_devices())
  log.steps(step, rows, timed, seconds, config.batch_size, peak)
  for line in nonfinite.lines(step, rows):
    log.say(line)
  # Last, so that the log shows the steps that end the run.
  nonfinite.check(config.checkpoint_dir, config.max_skipped_updates, step, rows)


def _stop(config: configs.Config, log: runlog.RunLog, step: int, signum: int) -> None:
  """Ends a saved run after a signal."""
  log.say(
    f'step {step:,} is saved in {config.checkpoint_dir}; run the same command again to resume'
  )
  log.close()
  processes.leave()  # The others stop at the same step; none must take this for a failure.
  raise signals.Stopped(signum)
