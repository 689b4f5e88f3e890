"""The training loop."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Protocol

import jax
from jax.sharding import Mesh

from .. import configs, models, structs
from ..datasets import scenes
from ..devices import memory, processes, sharding, starting
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


class RenderTest(Protocol):
  """Renders test images during training."""

  def __call__(self, params: dict, step: int, log: runlog.RunLog) -> None:
    """Renders them with the parameters after a step."""

  def warm_up(self, params: dict) -> None:
    """Compiles what that needs; called in a thread, before the first step."""


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
  _check_scene(settings, scene)


def _check_scene(settings: configs.Settings, scene: scenes.Scene) -> None:
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


def _step_shapes(config, scene, mesh, shapes: structs.TrainState, cams, place: str) -> tuple:
  """Returns the shapes of what a step takes: the state (`shapes`), cameras, pixels."""
  pixels = pixel_store.of_a_step(config, scene, mesh, place == 'device')
  return shapes, sharding.replicated_shapes(cams, mesh), pixels


def rehearse(settings: configs.Settings, scene: scenes.Scene, mesh: Mesh) -> None:
  """Raises what `train` would before its first step; compiles and writes nothing."""
  config = settings.config
  _check_scene(settings, scene)
  scenes.check_pixels(config.data_dir, scene, processes.is_main())
  place = pixel_store.place(config, scene)
  if place == 'disk':
    pixel_store.check_folder(config, scene)
  cams = pixel_store.training_cameras(settings, scene, progress=False)
  shapes = sharding.placed_shapes(train_step.abstract_state(settings), mesh)
  step_fn = train_step.make_train_step(settings, mesh, shapes=shapes)
  step_fn.lower(*_step_shapes(config, scene, mesh, shapes, cams, place))


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
    render_test: called every Config.train_render_every steps to render test images.
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
    run_folder.check_finished(settings, scene)
    more = f'; {last:,} steps were asked for' if newest > last else ''
    print(f'Nothing to do: {folder} has step {newest:,}{more}.')
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
  began = time.monotonic()
  has_tests = render_every and start // render_every < last // render_every
  state, steps, step_fn, log = _start(
    settings, scene, mesh, start, stops, render_test if has_tests else None, watched
  )
  spared = _spared(config)
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
        clock.lap(state.params)
        _say_compiled(log, step_fn, time.monotonic() - began)
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
          run_folder.save_run(config, state, steps.rows(), step_fn, mesh, spared)
      if signum:
        _stop(config, log, step, signum)
      if _is_due(step, config.gc_every):
        gc.collect()
      if render_now or save_now:
        clock.lap(state.params)  # Leaves out the pause.
  log.close()
  return log.train_seconds


def _spared(config: configs.Config) -> list[int]:
  """Returns the steps of checkpoints that an earlier start was to keep; says that they stay."""
  if not processes.is_main():  # Only the main process removes checkpoints.
    return []
  spared = checkpoints.surplus(config.checkpoint_dir, config.checkpoint_keep)
  if spared:
    print(
      f'The {len(spared)} checkpoints that are there stay, because an earlier start kept more than '
      f'Config.checkpoint_keep = {config.checkpoint_keep}, which holds for new ones.'
    )
  return spared


def _set_pace(steps: dispatch.Dispatcher, timed: int, seconds: float) -> None:
  """Chooses the steps of a dispatch by the slowest process's time of the last steps."""
  if timed and steps.is_adaptive:
    steps.set_pace(processes.largest(round(1e6 * min(seconds / timed, 1000))) / 1e6)


def _is_due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


@contextlib.contextmanager
def _threads() -> Iterator[tuple[futures.ThreadPoolExecutor, threading.Event]]:
  """Yields threads, and an event that is set if the block is left by an exception."""
  stop = threading.Event()
  with futures.ThreadPoolExecutor() as pool:
    try:
      yield pool, stop
    except BaseException:
      stop.set()
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _start(
  settings: configs.Settings,
  scene: scenes.Scene,
  mesh: Mesh,
  start: int,
  stops: Sequence[int],
  render_test: RenderTest | None,
  watched: bool,
) -> tuple[structs.TrainState, dispatch.Dispatcher, train_step.TrainStep, runlog.RunLog]:
  """Compiles the steps; meanwhile, threads read the photographs and create the state.

  Args:
    settings: the run's settings.
    scene: the capture.
    mesh: the devices.
    start: the step to resume from, or 0.
    stops: intervals after which a dispatch ends.
    render_test: also to be compiled, if this process is alone and has an accelerator.
    watched: see `dispatch.shape`.
  """
  config, alone = settings.config, jax.process_count() == 1
  most, fixed = dispatch.shape(settings, mesh, stops, watched)
  if start:
    run_folder.check_same_scene(config.checkpoint_dir, scene)  # `write_run` changes scene.json.
  # It is left when all threads have ended: XLA times kernels to choose among them, so no step may
  # run before test renders are compiled.
  with _threads() as (pool, stop):
    free, place = memory.free_memory(mesh), pixel_store.place(config, scene)
    reading = pool.submit(pixel_store.read, config, scene, processes.is_main(), stop, place)
    cams = pixel_store.training_cameras(settings, scene)
    create = train_step.creation(settings)
    shapes = sharding.placed_shapes(jax.eval_shape(create), mesh)
    # From here on, on a CPU one thread at a time computes: two that wait for each other can hang.
    creating = pool.submit(run_folder.start_run, settings, mesh, start, create, shapes)

    def load():
      pixels = reading.result()
      if place == 'device':
        pixels = pixel_store.put_on_device(pixels, mesh)
      return sharding.replicate(cams, mesh), pixels

    loading = pool.submit(load) if starting.has_accelerator() else None
    # While several processes restore, they wait for each other; and a run that cannot be restored
    # must leave its folder unchanged.
    fewest = 1 if alone and not start else creating.result()[2]
    args = _step_shapes(config, scene, mesh, shapes, cams, place)
    if free is not None:  # Whether or not the arguments are on the devices already.
      free -= memory.sharded_bytes(args)
    step_fn = train_step.make_train_step(
      settings, mesh, lambda _: free, fewest=fewest, most=most, fixed=fixed, shapes=shapes
    )
    _prepare_folder(settings, scene, start)
    log = _open_log(settings, start, config.train_render_every if render_test else 0)
    log.say(_describe(settings, scene, mesh, start, models.num_params(shapes.params), place))

    def warm_up():
      loading.result()  # Which leaves less memory.
      render_test.warm_up(creating.result()[0].params)

    def on_lowered():
      for done in (reading, creating):
        if done.done():
          done.result()  # Raises what has gone wrong.
      if alone and render_test and loading:  # Other processes would have to do it together.
        pool.submit(warm_up)  # What fails here fails again when it is needed.

    step_fn.fit(*args, on_lowered=on_lowered)
    state, rows, _ = creating.result()
    on_mesh, pixels = loading.result() if loading else load()
  load_pixels = train_step.make_load_pixels(config, mesh, pixels, cams.size, on_mesh.supervision)
  steps = dispatch.Dispatcher(step_fn, on_mesh, load_pixels, place == 'device', rows, watched)
  return state, steps, step_fn, log


def _prepare_folder(settings: configs.Settings, scene: scenes.Scene, start: int) -> None:
  """Tidies the run's folder and writes its settings and scene (main process only)."""
  if processes.is_main():
    run_lock.check()
    run_folder.tidy(settings.config.checkpoint_dir, start)
    run_folder.write_run(settings.config.checkpoint_dir, settings, scene, start)


def _open_log(settings: configs.Settings, start: int, render_every: int) -> runlog.RunLog:
  config = settings.config
  pauses = {'test': render_every, 'save': config.checkpoint_every}
  return runlog.RunLog(config.checkpoint_dir, start, config.last_step, processes.is_main(), pauses)


def _describe(
  settings: configs.Settings,
  scene: scenes.Scene,
  mesh: Mesh,
  start: int,
  num_params: int,
  place: str,
) -> str:
  config = settings.config
  return (
    f'{num_params:,} parameters, {len(scene.train)} training images, '
    f'pixels on the {place}, {mesh.size} x {mesh.devices.flat[0].device_kind}; '
    f'steps {start:,} to {config.last_step:,} -> {config.checkpoint_dir}'
  )


def _say_compiled(log: runlog.RunLog, step_fn: train_step.TrainStep, seconds: float) -> None:
  parts = f'in {step_fn.micro_batches} micro-batches, ' if step_fn.micro_batches > 1 else ''
  took = f'first step after {progress.duration(seconds)} (reading and compiling)'
  log.say(f'{took}; {parts}{step_fn.account()}')


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
