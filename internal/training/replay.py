"""A step of a run once more, term by term (train.py --replay_step)."""

from __future__ import annotations

import itertools

import jax
from jax.sharding import Mesh

from .. import configs
from ..datasets import scenes
from ..devices import processes, sharding
from . import batches, checkpoints, nonfinite, pixel_store, train_step

REPLAYED_RAYS = 20  # At most so many are shown.


def replay(settings: configs.Settings, scene: scenes.Scene, mesh: Mesh, step: int) -> None:
  """Does a step of a run again, from the newest checkpoint before it, and prints what it sees.

  Nothing is written.
  """
  config = settings.config
  if not 1 <= step <= config.last_step:
    raise configs.ConfigError(f'--replay_step must be in [1, {config.last_step}], got {step}.')
  say = print if processes.is_main() else lambda *_: None
  start = checkpoints.start_step(config.checkpoint_dir, at_most=step - 1)
  say(f'step {step:,}, from {f"the checkpoint of step {start:,}" if start else "the beginning"}:')
  state, _, micro_batches = checkpoints.start_run(settings, mesh, start)
  step_fn = train_step.make_train_step(settings, mesh, fewest=micro_batches)
  store = pixel_store.read(config, scene, progress=processes.is_main())
  cams = pixel_store.training_cameras(config, scene)
  cams_on_device = sharding.replicate(cams, mesh)
  draw = train_step.make_draw(config, mesh, cams_on_device.supervision)
  for done in range(start, step - 1):
    rgb = train_step.host_pixels(draw, done, store, cams.size, mesh)
    state, _ = step_fn(state, cams_on_device, rgb)
  ids = [sharding.to_host(a) for a in draw(step - 1, cams.size)]
  seen = batches.lookup(store, cams.size, *ids)
  found = nonfinite.find_rays(settings, mesh, state, cams_on_device, seen)
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
