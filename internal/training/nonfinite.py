"""Steps whose loss or gradient is not finite: told of, put an end to, and looked into afterwards.

`rows` are the stats of consecutive steps, as numpy scalars (`train_step.make_train_step`); the
step itself has left the parts concerned as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from .. import configs, structs
from ..devices import memory, sharding
from ..errors import UserError
from . import batches, checkpoints, train_step

_SKIPPED = 'skipped_'
_LINES = 5  # Told of one call's steps.


class BadNumbersError(UserError):
  """Training that does not get on; the message names the last good checkpoint."""


def _skipped(row: Mapping) -> dict[str, int]:
  """The parts that a step did not update, with how many it were in a row."""
  counts = {k.removeprefix(_SKIPPED): int(v) for k, v in row.items() if k.startswith(_SKIPPED)}
  return {name: count for name, count in counts.items() if count}


def lines(step: int, rows: Sequence[Mapping]) -> list[str]:
  """What to tell of rows of which the last is of `step`: a line for each of the first few."""
  told = []
  for at, row in enumerate(rows, step - len(rows) + 1):
    if parts := _skipped(row):
      norms = ', '.join(f'{name} {row[f"grad_norm_{name}"]:.3g}' for name in parts)
      told.append(
        f'step {at:,}: no update of {", ".join(parts)}, not finite: loss {row["loss"]:.3g}, '
        f'gradient of {norms}; --replay_step {at} shows the rays'
      )
  if len(told) > _LINES:
    told[_LINES:] = [f'and {len(told) - _LINES} more such steps up to step {step:,}']
  return told


def check(checkpoint_dir: str, limit: int, step: int, rows: Sequence[Mapping]) -> None:
  """Ends a run that does not get on; to be called by all processes.

  Args:
    checkpoint_dir: the run's folder.
    limit: of updates in a row that a part is not given; 0 for none.
    step: of the last of the rows.
    rows: stats of consecutive steps.

  Raises:
    BadNumbersError: a part has reached the limit.
  """
  for at, row in enumerate(rows, step - len(rows) + 1):
    for name, count in _skipped(row).items():
      if 0 < limit <= count:
        first = at - count + 1
        good = checkpoints.newest(checkpoint_dir, at_most=first - 1)
        place = 'none' if good is None else checkpoints.folder_of(checkpoint_dir, good)
        raise BadNumbersError(
          f'No update of {name} in {count} steps, {first:,} to {at:,}: loss or gradient were not '
          f'finite (Config.max_skipped_updates). The last good checkpoint: {place}. --replay_step '
          f'{first} shows the rays. To go on, remove later checkpoints and change what led here, '
          'such as Config.lr_init.'
        )


def _make_probe(settings: configs.Settings, mesh: Mesh) -> Callable:
  """`probe(params, step, cams, rgb, rows) -> (seen, norms)` of groups of a step's rays.

  `rgb` [batch_size, 3] uint8 are the colours of its rays, `rows` [g, r] int32 the rays of each
  group; what comes has a leading axis [g]: the loss and its terms, and each part's gradient norm.
  """
  config, loss_gradient = settings.config, train_step.make_loss_gradient(settings)

  def probe(params, step, cams, rgb, rows):
    batch_key, ray_keys = train_step.step_keys(config, step)
    ids = batches.draw_pixels(
      batch_key, cams.size, config.batch_size, config.batching, cams.supervision
    )
    frac = train_step.train_fraction(step, config.max_steps)

    def of_group(row):
      batch = batches.make_batch(cams, *(a[row] for a in ids), rgb[row])
      keys = ray_keys[row] if config.randomized else None
      grads, seen = loss_gradient(params, keys, batch, frac)
      return seen, {name: optax.tree.norm(part) for name, part in grads.items()}

    return jax.lax.map(of_group, rows)  # One after the other: a gradient takes as much as a model.

  whole = sharding.WHOLE
  probe = sharding.per_device(probe, mesh, (whole,) * 5, whole)
  return jax.jit(probe, compiler_options=memory.compiler_options())


def find_rays(
  settings: configs.Settings, mesh: Mesh, state: structs.TrainState, cams, rgb: np.ndarray
) -> Iterator[tuple[int, dict[str, float]]]:
  """The rays of the next step for which loss or gradient are not finite by themselves.

  First in groups, of which only the bad ones are taken apart.

  Args:
    settings: the run's.
    mesh: of the devices.
    state: before the step.
    cams: the training cameras, replicated.
    rgb: [batch_size, 3] uint8, the colours of the step's rays.

  Yields:
    (index of the ray in the batch, its loss, terms and gradient norms by name).
  """
  probe, n = _make_probe(settings, mesh), settings.config.batch_size
  args = state.params, state.step, cams, sharding.replicate(rgb, mesh)

  def bad(rows):
    """The groups that are not finite, and what was seen of them."""
    seen, norms = jax.tree.map(sharding.to_host, probe(*args, sharding.replicate(rows, mesh)))
    values = {'loss': seen['loss']}
    values |= {f'loss_{name}': value for name, value in seen['terms'].items()}
    values |= {f'grad_norm_{name}': value for name, value in norms.items()}
    finite = np.all([np.isfinite(value) for value in values.values()], axis=0)
    for k in np.flatnonzero(~finite):
      yield rows[k], {name: float(value[k]) for name, value in values.items()}

  size = math.isqrt(n - 1) + 1 if n > 1 else 1  # About as many groups as rays in each.
  groups = np.arange(-(-n // size) * size, dtype=np.int32).clip(max=n - 1).reshape(-1, size)
  last = -1  # The last group is filled up with the last ray.
  for group, _ in bad(groups):
    for (ray,), values in bad(group[:, None]):
      if ray > last:
        last = int(ray)
        yield last, values
