"""Non-finite losses and gradients: reports them, ends a run that they block, and finds their rays.

The training step leaves the affected parts unchanged (`train_step.update_finite`). `rows` are the
stats of consecutive steps, as numpy scalars (`train_step.make_train_step`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from .. import configs, structs
from ..datasets import scenes
from ..devices import memory, processes, sharding
from ..errors import UserError
from . import batches, checkpoints, pixel_store, run_folder, train_step

_SKIPPED = 'skipped_'
_MAX_LINES = 5  # Steps reported by one call of `lines`.
_MAX_RAYS = 20  # Rays printed by `replay`.


class NonFiniteError(UserError):
  """Training is blocked by non-finite losses or gradients."""


def _skipped(row: Mapping) -> dict[str, int]:
  """Returns the parts that a step did not update, with the number of consecutive skips."""
  counts = {k.removeprefix(_SKIPPED): int(v) for k, v in row.items() if k.startswith(_SKIPPED)}
  return {name: count for name, count in counts.items() if count}


def lines(step: int, rows: Sequence[Mapping]) -> list[str]:
  """Returns log lines for the first few skipped updates; `step` is that of the last row."""
  report = []
  for at, row in enumerate(rows, step - len(rows) + 1):
    if parts := _skipped(row):
      norms = ', '.join(f'{name} {row[f"grad_norm_{name}"]:.3g}' for name in parts)
      report.append(
        f'step {at:,}: skipped the update of {", ".join(parts)}, non-finite: loss '
        f'{row["loss"]:.3g}, gradient norm of {norms}; --replay_step {at} shows the rays'
      )
  if len(report) > _MAX_LINES:
    report[_MAX_LINES:] = [f'and {len(report) - _MAX_LINES} more steps up to step {step:,}']
  return report


def check(checkpoint_dir: str, limit: int, step: int, rows: Sequence[Mapping]) -> None:
  """Raises NonFiniteError if a part missed `limit` consecutive updates; all processes call this.

  Args:
    checkpoint_dir: the run's folder.
    limit: maximum number of consecutive skipped updates of a part; 0 for no limit.
    step: step of the last row.
    rows: stats of consecutive steps.
  """
  for at, row in enumerate(rows, step - len(rows) + 1):
    for name, count in _skipped(row).items():
      if 0 < limit <= count:
        first = at - count + 1
        good = checkpoints.newest(checkpoint_dir, at_most=first - 1)
        place = 'none' if good is None else checkpoints.folder_of(checkpoint_dir, good)
        raise NonFiniteError(
          f'{name} was not updated in {count} steps, {first:,} to {at:,}: loss or gradient was '
          f'non-finite (Config.max_skipped_updates). Last good checkpoint: {place}. --replay_step '
          f'{first} shows the rays. To resume, remove later checkpoints and change a setting, such '
          'as a lower Config.lr_init.'
        )


def _make_probe(settings: configs.Settings, mesh: Mesh) -> Callable:
  """Returns `probe(params, step, seed, cams, rgb, rows) -> (aux, norms)` over groups of rays.

  `rgb` [batch_size, 3] uint8 are the colours of the step's rays; `rows` [g, r] int32 indexes the
  rays of each group. Results have a leading axis [g]: the loss's auxiliary outputs, and the
  gradient norm of each part.
  """
  config = settings.config
  # Groups of rays are no patches, and a weight of 0 does not hide a non-finite loss. In a group,
  # other rays would be the n-th ones.
  single = settings.change('config', robust_quantile=0.0, interlevel_every=1)
  loss_gradient = train_step.make_loss_gradient(single)

  def probe(params, step, seed, cams, rgb, rows):
    batch_key, ray_keys = train_step.step_keys(config, step, seed)
    ids = train_step.draw_pixels(config, batch_key, cams.size, cams.supervision)
    known = batches.known_distances(batch_key, config.batch_size, cams.supervision)
    frac = train_step.train_fraction(step, config.max_steps)

    def probe_group(row):
      of_rays = jax.tree.map(lambda a: a[row], (*ids, rgb, *known))
      batch = batches.make_batch(cams, *of_rays)  # [r, ...]
      keys = ray_keys[row] if config.randomized else None
      grads, aux = loss_gradient(params, keys, batch, frac, cams)
      return aux, {name: optax.tree.norm(part) for name, part in grads.items()}

    return jax.lax.map(probe_group, rows)  # One at a time: each gradient is as large as the model.

  whole = sharding.WHOLE
  probe = sharding.per_device(probe, mesh, (whole,) * 6, whole)
  return jax.jit(probe, compiler_options=memory.compiler_options())


def find_rays(
  settings: configs.Settings, mesh: Mesh, state: structs.TrainState, cams, rgb: np.ndarray
) -> Iterator[tuple[int, dict[str, float]]]:
  """Yields the rays of the next step whose own loss or gradient is non-finite.

  Probes about sqrt(batch_size) groups of rays first, then the rays of non-finite groups.

  Args:
    settings: the run's settings.
    mesh: the devices.
    state: the state before the step.
    cams: the training cameras, replicated.
    rgb: [batch_size, 3] uint8, the colours of the step's rays.

  Yields:
    (index of the ray in the batch, its loss, loss terms and gradient norms by name).
  """
  probe, n = _make_probe(settings, mesh), settings.config.batch_size
  seed = train_step.seed_of(settings.config)
  args = state.params, state.step, seed, cams, sharding.replicate(rgb, mesh)

  def non_finite(rows):
    """Yields the non-finite groups of rays [r] and their values by name."""
    aux, norms = jax.tree.map(sharding.to_host, probe(*args, sharding.replicate(rows, mesh)))
    values = {'loss': aux['loss']}
    values |= {f'loss_{name}': value for name, value in aux['terms'].items()}
    values |= {f'grad_norm_{name}': value for name, value in norms.items()}
    finite = np.all([np.isfinite(value) for value in values.values()], axis=0)
    for k in np.flatnonzero(~finite):
      yield rows[k], {name: float(value[k]) for name, value in values.items()}

  size = math.isqrt(n - 1) + 1 if n > 1 else 1  # As many groups as rays per group.
  groups = np.arange(-(-n // size) * size, dtype=np.int32).clip(max=n - 1).reshape(-1, size)
  last = -1  # The last group is padded with the last ray.
  for group, _ in non_finite(groups):
    for (ray,), values in non_finite(group[:, None]):
      if ray > last:
        last = int(ray)
        yield last, values


def replay(settings: configs.Settings, scene: scenes.Scene, mesh: Mesh, step: int) -> None:
  """Repeats a step of a run and prints its loss terms and non-finite rays; writes nothing.

  Trains up to the step from the newest checkpoint before it.
  """
  config = settings.config
  if not 1 <= step <= config.last_step:
    raise configs.ConfigError(f'--replay_step must be in [1, {config.last_step}], got {step}.')
  say = print if processes.is_main() else lambda *_: None
  start = checkpoints.start_step(config.checkpoint_dir, at_most=step - 1)
  say(f'step {step:,}, from {f"the checkpoint of step {start:,}" if start else "the beginning"}:')
  state, _, micro_batches = run_folder.start_run(settings, mesh, start)
  step_fn = train_step.make_train_step(settings, mesh, fewest=micro_batches)
  store = pixel_store.read(config, scene, progress=processes.is_main())
  cams = pixel_store.training_cameras(settings, scene)
  cams_on_device = sharding.replicate(cams, mesh)
  draw = train_step.make_draw(config, mesh, cams_on_device.supervision)
  for done in range(start, step - 1):
    rgb = train_step.host_pixels(draw, done, store, cams.size, mesh)
    state, _ = step_fn(state, cams_on_device, rgb)
  ids = [sharding.to_host(a) for a in draw(step - 1, cams.size)]
  rays = find_rays(settings, mesh, state, cams_on_device, batches.lookup(store, cams.size, *ids))
  rays = list(itertools.islice(rays, _MAX_RAYS + 1))  # Before the step donates the state.
  rgb = train_step.host_pixels(draw, step - 1, store, cams.size, mesh)
  for name, value in jax.device_get(step_fn(state, cams_on_device, rgb)[1]).items():
    say(f'  {name} {value:.9g}')
  for ray, values in rays[:_MAX_RAYS]:
    cam, x, y = (int(a[ray]) for a in ids)
    row = scene.train[cam]
    terms = ', '.join(f'{name} {value:.6g}' for name, value in values.items())
    say(f'ray {ray}: camera {row} ({scene.names[row]}), pixel x {x}, y {y}: {terms}')
  if len(rays) > _MAX_RAYS:
    say('and others')
  if not rays:
    say(f'The loss and gradient of each of the {config.batch_size:,} rays are finite.')
