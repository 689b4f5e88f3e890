"""The log of a training run: terminal, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from ..system import bucket, files, progress


def read_metrics(path: str) -> list[dict]:
  """Reads metrics.jsonl, without damaged lines."""
  return _read_lines(path)[0]


def median_speed(rows: Sequence[Mapping]) -> float | None:
  """Returns the median of the rays per second that rows have; None if none has them."""
  speeds = sorted(row['rays_per_sec'] for row in rows if row.get('rays_per_sec'))
  return speeds[len(speeds) // 2] if speeds else None


def _read_lines(path: str) -> tuple[list[dict], list[bytes]]:
  """Returns the rows, and the damaged lines without a last one that was cut short by a crash."""
  if not os.path.exists(path):
    return [], []
  with open(path, 'rb') as f:
    lines = f.readlines()
  rows = [_row(line) for line in lines]
  damaged = [line for line, row in zip(lines, rows) if row is None and line.endswith(b'\n')]
  return [row for row in rows if row is not None], damaged


def _row(line: bytes) -> dict | None:
  """Returns a row of metrics.jsonl: numbers or nulls by name, and the step; None if damaged."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict) or type(row.get('step')) is not int:
    return None
  numbers = [v for v in row.values() if v is not None]
  usable = all(type(v) in (int, float) and abs(v) < 1e300 for v in numbers)  # Not NaN, either.
  return row if usable else None


def _mean(values: Sequence[float]) -> float:
  """Returns the mean of the finite values; NaN if there are none."""
  finite = [v for v in map(float, values) if math.isfinite(v)]
  return float(np.mean(finite)) if finite else math.nan


class _Board:
  """Writes a TensorBoard file synchronously.

  tensorboardX's SummaryWriter has a queue instead. A kill loses its contents, and on a full disk
  its thread dies and the queue blocks forever.
  """

  def __init__(self, folder: str, first_step: int):
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2, summary_pb2

    self._events, self._summary, self._folder = event_pb2, summary_pb2.Summary, folder
    os.makedirs(folder, exist_ok=True)
    prefix = os.path.join(folder, 'events')
    self._writer = event_file_writer.EventsWriter(prefix, f'.{os.getpid()}')
    # TensorBoard drops events of older files from this step on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(first_step, session_log=start)

  def _add(self, step: int, **value) -> None:
    self._writer.write_event(self._events.Event(wall_time=time.time(), step=step, **value))

  def _add_value(self, step: int, **value) -> None:
    self._add(step, summary=self._summary(value=[self._summary.Value(**value)]))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    with files.named_errors(self._folder):
      for name, value in values.items():
        if math.isfinite(value):
          self._add_value(step, tag=name, simple_value=value)
      self._writer.flush()

  def picture(self, step: int, name: str, image: np.ndarray) -> None:
    # tensorboardX needs a second for the checksums of 4 MB; a JPEG is a tenth of a PNG.
    encoded, (height, width) = io.BytesIO(), image.shape[:2]
    Image.fromarray(image).save(encoded, 'JPEG', quality=90)
    picture = self._summary.Image(
      height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue()
    )
    with files.named_errors(self._folder):
      self._add_value(step, tag=name, image=picture)
      self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class RunLog:
  """Logs a training run; does nothing unless this is the main process.

  On resume, rows after the restored step are dropped, since those steps run again.

  Args:
    run_dir: the run's folder.
    start_step: the step to resume from.
    last_step: the last step of the run.
    enabled: whether this is the main process.
    pauses: interval in steps (0: never) of each kind of pause, to estimate the time left.
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
    self.train_seconds = 0.0  # Over all starts, without compiling, rendering and saving.
    self._path = os.path.join(run_dir, 'metrics.jsonl')
    rows, damaged = _read_lines(self._path)
    rows = [r for r in rows if r['step'] <= start_step]
    if rows:
      self.train_seconds = rows[-1].get('train_seconds') or 0.0
    if not enabled:
      return
    self._keep_aside(damaged)
    with files.whole(self._path) as path, open(path, 'w') as f:
      f.writelines(json.dumps(r) + '\n' for r in rows)
    self._board = _Board(os.path.join(run_dir, 'tensorboard'), start_step + 1)
    self._bar.__enter__()
    if progress.is_live():
      self._bar.show(start_step, 'compiling the step')

  def _keep_aside(self, damaged: Sequence[bytes]) -> None:
    if not damaged:
      return
    aside = f'{self._path}.damaged'
    with files.named_errors(aside), open(aside, 'ab') as f:
      f.writelines(damaged)
    text = f'Warning: {len(damaged)} damaged lines of {self._path} were moved to {aside}.'
    print(bucket.shown(text), file=sys.stderr)

  @contextlib.contextmanager
  def pause(self, name: str) -> Iterator[None]:
    """Times one of `pauses`, as the estimate for those to come."""
    began = time.monotonic()
    yield
    self._took[name] = time.monotonic() - began

  def _seconds_left(self, step: int, seconds_a_step: float) -> float:
    """Estimates the time left for steps and pauses."""
    left = (self.last_step - step) * seconds_a_step
    for name, every in self._pauses.items():
      times = self.last_step // every - step // every if every else 0
      left += times * self._took.get(name, 0)
    return left

  def scalars(self, step: int, values: Mapping[str, float], prefix: str = 'train') -> None:
    """Appends one line to metrics.jsonl and the same scalars to TensorBoard.

    Non-finite values become null in JSON.
    """
    if not self.enabled:
      return
    values = {k: float(v) for k, v in values.items()}
    row = {k: v if math.isfinite(v) else None for k, v in values.items()}
    row = {'step': step, 'time': round(time.time(), 3), **row}
    row['train_seconds'] = round(self.train_seconds, 3)
    with files.named_errors(self._path), open(self._path, 'a') as f:
      f.write(json.dumps(row) + '\n')
    self._board.scalars(step, {f'{prefix}/{name}': value for name, value in values.items()})

  def picture(self, step: int, name: str, image: np.ndarray) -> None:
    """Adds a [h, w, 3] uint8 image to TensorBoard."""
    if self.enabled:
      self._board.picture(step, name, image)

  def steps(
    self,
    step: int,
    rows: Sequence[Mapping],
    timed: int,
    elapsed: float,
    batch_size: int,
    peak_bytes: int | None = None,
  ) -> None:
    """Logs the steps since the last call: means of their finite stats, and rays per second.

    For skipped updates ('skipped_nerf_mlp', ...) it logs the number of steps.

    Args:
      step: the last of the steps.
      rows: stats of each step, as numpy scalars.
      timed: number of steps in `elapsed`; excludes the one that compiled and those before a resume.
      elapsed: seconds of the timed steps.
      batch_size: rays per step.
      peak_bytes: highest memory use of a device so far.
    """
    self.train_seconds += elapsed
    if not self.enabled:
      return
    values = {name: _mean([row[name] for row in rows]) for name in rows[0]}
    for name in values:
      if name.startswith('skipped_'):
        values[name] = sum(row[name] > 0 for row in rows)
    width = len(f'{self.last_step:,}')
    if peak_bytes is not None:
      values['peak_bytes'] = peak_bytes
    text = (
      f'step {step:>{width},}/{self.last_step:,}  loss {values["loss"]:.5f}  '
      f'psnr {values["psnr"]:5.2f}'
    )
    if timed and elapsed > 0:
      values['rays_per_sec'] = timed * batch_size / elapsed
      left = self._seconds_left(step, elapsed / timed)
      text += f'  {values["rays_per_sec"]:>9,.0f} rays/s  {progress.duration(left)} left'
    self.scalars(step, values)
    if progress.is_live():
      self._bar.show(step, text)
    else:
      self.say(text)

  def say(self, text: str) -> None:
    """Prints a log line."""
    if self.enabled:
      progress.say(text)

  def close(self) -> None:
    """Closes TensorBoard's file and removes the live line."""
    if self.enabled:
      self._bar.__exit__()
      self._board.close()
