"""How training steps are given to the device: many in one dispatch, and the next one in advance.

A slow or busy host would otherwise decide the speed of short steps. One dispatch takes about a
tenth of a second, and at most two are in flight, so that a signal is answered promptly.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from .. import configs, structs
from . import train_step

_SECONDS = 0.1  # Of a dispatch.
_WATCHED_SECONDS = 0.025  # If something happens between dispatches, as when a viewer draws.
_FIXED, _WATCHED_FIXED = 20, 5  # The same in steps of 360_fast.gin on an H200, 4 ms each.


def next_stop(step: int, last: int, intervals: Sequence[int]) -> int:
  """Returns the first step after `step` that is a multiple of an interval (0: none), or `last`."""
  return min([last, *(step - step % every + every for every in intervals if every)])


def shape(
  settings: configs.Settings, mesh: Mesh, intervals: Sequence[int], watched: bool = False
) -> tuple[int, bool]:
  """Returns (most, fixed) for `train_step.make_train_step`; a function of values that are agreed.

  On TPUs and CPUs a dispatch may have any number of steps. A GPU would wait for the host after each
  step of such a loop, so there the number is fixed, and divides `intervals` so that no step is
  computed in vain. Only steps of hash grids are short enough to need more than one.

  Args:
    settings: the run's settings.
    mesh: the devices.
    intervals: steps after whose multiples a dispatch ends (0: none).
    watched: whether something happens between dispatches.
  """
  config = settings.config
  if mesh.devices.flat[0].platform != 'gpu':
    return config.steps_per_dispatch or train_step.MOST_STEPS, False
  grids = settings.nerf_mlp.encoding == settings.prop_mlp.encoding == 'grid'
  most = config.steps_per_dispatch
  if not most:
    most = (_WATCHED_FIXED if watched else _FIXED) if grids else 1
  common = math.gcd(*intervals)  # 0, which all numbers divide, without intervals.
  return max(n for n in range(1, most + 1) if common % n == 0), True


class Dispatcher:
  """Takes steps, and keeps their stats until they are logged.

  Attributes:
    count: steps of the next dispatches, one at first.
  """

  def __init__(
    self,
    step_fn: train_step.TrainStep,
    cams: structs.Cameras,
    load_pixels: Callable[[int], object],
    on_device: bool,
    rows: Sequence[Mapping] = (),
    watched: bool = False,
  ):
    """Prepares the dispatches; nothing is compiled yet.

    Args:
      step_fn: the compiled steps.
      cams: the training cameras, replicated.
      load_pixels: returns the pixels of the step after a number of steps.
      on_device: whether these are the same for all steps. If not, a dispatch has one step.
      rows: stats of earlier steps that are not logged yet.
      watched: whether something happens between dispatches, which are short then.
    """
    self._step_fn, self._cams, self._load_pixels = step_fn, cams, load_pixels
    self._most = step_fn.most if on_device else 1
    self.count = self._most if step_fn.fixed else 1
    self._seconds = _WATCHED_SECONDS if watched else _SECONDS
    self._rows, self._in_flight = list(rows), collections.deque()

  @property
  def is_adaptive(self) -> bool:
    """Whether `set_pace` has an effect."""
    return self._most > 1 and not self._step_fn.fixed

  def set_pace(self, seconds: float) -> None:
    """Chooses the steps of a dispatch by the seconds of a step; all processes give the same."""
    if self.is_adaptive:
      self.count = int(np.clip(self._seconds / max(seconds, 1e-6), 1, self._most))

  def take(self, state: structs.TrainState, step: int, stop: int) -> tuple[structs.TrainState, int]:
    """Dispatches steps after step `step`, at most to `stop`, and waits for the dispatch before.

    The state's buffers are donated.

    Returns:
      (state, step) after them.
    """
    count = min(self.count, stop - step)
    state, stats = self._step_fn(state, self._cams, self._load_pixels(step), count)
    stats.numbers.copy_to_host_async()  # Overlaps with the steps that follow.
    self._in_flight.append((stats, count))
    if len(self._in_flight) > 1:
      self._fetch()
    return state, step + count

  @property
  def newest(self) -> jax.Array:
    """The newest dispatch's numbers, which are there once it is done."""
    return self._in_flight[-1][0].numbers

  def _fetch(self) -> None:
    """Waits for the oldest dispatch and keeps the stats of its steps."""
    stats, count = self._in_flight.popleft()
    for row in np.asarray(stats.numbers)[:count]:
      self._rows.append(dict(zip(stats.names, row)))

  def rows(self) -> list[Mapping]:
    """Returns the stats of each step since the last `clear`, once all are computed."""
    while self._in_flight:
      self._fetch()
    return self._rows

  def clear(self) -> None:
    """Forgets the stats of all steps so far."""
    self.rows()
    self._rows = []
