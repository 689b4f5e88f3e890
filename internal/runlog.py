"""The record of a training run: a line on the terminal, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence

import numpy as np

from internal import files


def duration(seconds: float) -> str:
  """Seconds as people say them: '45s', '3m20s', '2h05m'."""
  s = max(0, round(seconds))
  if s < 60:
    return f'{s}s'
  if s < 3600:
    return f'{s // 60}m{s % 60:02d}s'
  return f'{s // 3600}h{s % 3600 // 60:02d}m'


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
  """

  def __init__(self, run_dir: str, start_step: int, last_step: int, enabled: bool = True):
    self.enabled, self.last_step = enabled, last_step
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
      left = (self.last_step - step) * elapsed / timed
      text += f'  {values["rays_per_sec"]:>9,.0f} rays/s  {duration(left)} left'
    self.scalars(step, values)
    self.say(text)

  def say(self, text: str) -> None:
    """Prints a line of news."""
    if self.enabled:
      print(text)

  def close(self) -> None:
    """Closes TensorBoard's file."""
    if self.enabled:
      self._board.close()
