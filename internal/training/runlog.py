"""The record of a training run: what the terminal shows, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..system import files, progress


def read_metrics(path: str) -> list[dict]:
  """The whole lines of a metrics.jsonl; a last one cut short by a crash is left out."""
  rows = []
  if os.path.exists(path):
    with open(path) as f:
      for line in f:
        try:
          rows.append(json.loads(line))
        except json.JSONDecodeError:
          break
  return rows


def _mean(values: Sequence[float]) -> float:
  """The mean of those that are finite; NaN where none is."""
  finite = [v for v in map(float, values) if math.isfinite(v)]
  return float(np.mean(finite)) if finite else math.nan


class _Board:
  """TensorBoard's file, written at once.

  Not by tensorboardX's SummaryWriter: what waits in its queue is lost in a kill, and when the disk
  is full its thread dies and the queue blocks for good.
  """

  def __init__(self, folder: str, first_step: int):
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._summary, self._proto = summary, event_pb2
    os.makedirs(folder, exist_ok=True)
    prefix = os.path.join(folder, 'events')
    self._writer = event_file_writer.EventsWriter(prefix, f'.{os.getpid()}')
    # From this step on TensorBoard drops what older files say.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(first_step, session_log=start)

  def _add(self, step: int, **what) -> None:
    self._writer.write_event(self._proto.Event(wall_time=time.time(), step=step, **what))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      if math.isfinite(value):
        self._add(step, summary=self._summary.scalar(name, value))
    self._writer.flush()

  def picture(self, step: int, name: str, image: np.ndarray) -> None:
    self._add(step, summary=self._summary.image(name, image, dataformats='HWC'))
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class RunLog:
  """Writes what happens during training; does nothing on processes that are not the main one.

  On resume, lines after the restored step are dropped: those steps are done again.

  Args:
    run_dir: the run's folder.
    start_step: the step that the run goes on from.
    last_step: the one that it ends with.
    enabled: whether this is the main process.
    pauses: what interrupts training, and every how many steps (0: never), for the time left.
  """

  def __init__(
    self,
    run_dir: str,
    start_step: int,
    last_step: int,
    enabled: bool = True,
    pauses: Mapping[str, int] | None = None,
  ):
    self.enabled, self.last_step = enabled, last_step
    self._pauses, self._took = pauses or {}, {}
    self._bar = progress.Bar('training', last_step, start_step, enabled=enabled)
    self.train_seconds = 0.0  # Of all runs so far, without compiling, rendering and saving.
    self._path = os.path.join(run_dir, 'metrics.jsonl')
    rows = [r for r in read_metrics(self._path) if r['step'] <= start_step]
    if rows:
      self.train_seconds = rows[-1].get('train_seconds', 0.0)
    if not enabled:
      return
    with files.whole(self._path) as path, open(path, 'w') as f:
      f.writelines(json.dumps(r) + '\n' for r in rows)
    self._board = _Board(os.path.join(run_dir, 'tensorboard'), start_step + 1)
    self._bar.__enter__()
    if progress.is_live():
      self._bar.show(start_step, 'compiling the step')

  @contextlib.contextmanager
  def pause(self, name: str) -> Iterator[None]:
    """Around one of `pauses`: the latest tells how long those to come will take."""
    began = time.monotonic()
    yield
    self._took[name] = time.monotonic() - began

  def _seconds_left(self, step: int, seconds_a_step: float) -> float:
    """Of steps and of pauses."""
    left = (self.last_step - step) * seconds_a_step
    for name, every in self._pauses.items():
      times = self.last_step // every - step // every if every else 0
      left += times * self._took.get(name, 0)
    return left

  def scalars(self, step: int, values: Mapping[str, float], prefix: str = 'train') -> None:
    """Appends one line to metrics.jsonl and the same scalars to TensorBoard.

    Numbers that are not finite become null, which JSON can hold.
    """
    if not self.enabled:
      return
    values = {k: float(v) for k, v in values.items()}
    row = {k: v if math.isfinite(v) else None for k, v in values.items()}
    row = {'step': step, 'time': round(time.time(), 3), **row}
    row['train_seconds'] = round(self.train_seconds, 3)
    with open(self._path, 'a') as f:
      f.write(json.dumps(row) + '\n')
    self._board.scalars(step, {f'{prefix}/{name}': value for name, value in values.items()})

  def picture(self, step: int, name: str, image: np.ndarray) -> None:
    """Adds a [h, w, 3] uint8 picture to TensorBoard."""
    if self.enabled:
      self._board.picture(step, name, image)

  def steps(
    self, step: int, rows: Sequence[Mapping], timed: int, elapsed: float, batch_size: int
  ) -> None:
    """Records the steps since the last call: the means of their finite stats, and rays/s.

    Of updates that a part was not given ('skipped_nerf_mlp', ...) it is their number.

    Args:
      step: the last of them.
      rows: stats of each, as numpy scalars.
      timed: how many of them `elapsed` is of: not those that compiled, or ran before a restart.
      elapsed: seconds that those took.
      batch_size: rays a step.
    """
    self.train_seconds += elapsed
    if not self.enabled:
      return
    values = {name: _mean([row[name] for row in rows]) for name in rows[0]}
    for name in values:
      if name.startswith('skipped_'):
        values[name] = sum(row[name] > 0 for row in rows)
    width = len(f'{self.last_step:,}')
    text = (
      f'step {step:>{width},}/{self.last_step:,}  loss {values["loss"]:.5f}  '
      f'psnr {values["psnr"]:5.2f}'
    )
    if timed:
      values['rays_per_sec'] = timed * batch_size / elapsed
      left = self._seconds_left(step, elapsed / timed)
      text += f'  {values["rays_per_sec"]:>9,.0f} rays/s  {progress.duration(left)} left'
    self.scalars(step, values)
    if progress.is_live():
      self._bar.show(step, text)
    else:
      self.say(text)

  def say(self, text: str) -> None:
    """Prints a line of news."""
    if self.enabled:
      progress.say(text)

  def close(self) -> None:
    """Closes TensorBoard's file; takes the live line away."""
    if self.enabled:
      self._bar.__exit__()
      self._board.close()
