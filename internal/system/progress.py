"""Progress on stderr: a live line on a terminal, an occasional plain line elsewhere.

`set_quiet` silences progress and `say`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO

import rich.console
import rich.live
import rich.progress
import rich.table

from . import bucket, files, signals

_SECONDS_PER_LINE = 15.0  # Without a terminal.
_quiet = False
_bars: list[Bar] = []  # Active bars, the innermost last.
_lock = threading.RLock()  # Bars come and go in several threads.


def set_quiet() -> None:
  """Silences progress and `say` in this process."""
  global _quiet
  _quiet = True


def is_live() -> bool:
  """Returns whether stdout and stderr are a terminal that can show a live line."""
  if _bars:
    return True  # rich replaces stdout and stderr while a bar is shown.
  return sys.stderr.isatty() and sys.stdout.isatty() and not _quiet


def say(text: str) -> None:
  """Prints a line above any live line; does nothing after `set_quiet`.

  If the reader of a pipe has ended, as in `| head`, the program is stopped as by a signal.
  """
  if not _quiet:
    _print(text)


def _print(text: str, file: IO[str] | None = None) -> None:
  try:
    with files.named_errors('standard output'):
      print(bucket.shown(text), file=file)
  except BrokenPipeError:
    signals.stop_for_closed_output()


def summary(rows: Mapping[str, object]) -> None:
  """Prints names and values in two columns."""
  width = max(map(len, rows))
  for name, value in rows.items():
    print(bucket.shown(f'{name:<{width}}  {value}'))


def duration(seconds: float) -> str:
  """Formats seconds: '45s', '3m20s', '2h05m'."""
  s = max(0, round(seconds))
  if s < 60:
    return f'{s}s'
  if s < 3600:
    return f'{s // 60}m{s % 60:02d}s'
  return f'{s // 3600}h{s % 3600 // 60:02d}m'


class Bar:
  """A progress bar of one task, shown inside `with`.

  Args:
    label: name of the task.
    total: amount of work; None if unknown.
    done: amount done before the start.
    scale: divisor for display, such as 1e6 to show bytes in MB.
    unit: displayed unit.
    enabled: False shows nothing.
  """

  def __init__(
    self,
    label: str,
    total: float | None = None,
    done: float = 0,
    scale: float = 1,
    unit: str = '',
    enabled: bool = True,
  ):
    self.label, self.total, self.done = label, total, done
    self._scale, self._unit, self._first = scale, f' {unit}' if unit else '', done
    self._enabled, self._shown = enabled and not _quiet, None

  def __enter__(self) -> Bar:
    self._began = self._printed = time.monotonic()
    with _lock:
      if self._enabled and is_live():
        self._shown = _bars[-1]._shown if _bars else self._start()  # Nested bars stack.
        self._task = self._shown.add_task(self.label, total=self.total, text='')
        _bars.append(self)
    return self

  def _start(self) -> rich.progress.Progress:
    columns = '{task.description}', rich.progress.BarColumn(24), '{task.fields[text]}'
    shown = rich.progress.Progress(
      *columns, console=rich.console.Console(stderr=True), transient=True
    )
    shown.start()
    shown.console.show_cursor(True)  # A kill would leave it hidden.
    return shown

  def __exit__(self, *_) -> None:
    with _lock:
      if self._shown:
        _bars.remove(self)
        self._shown.remove_task(self._task)
        if not _bars:
          self._shown.stop()
        self._shown = None

  def advance(self, count: float = 1) -> None:
    """Adds to the amount done."""
    self.show(self.done + count)

  def show(self, done: float, text: str | None = None) -> None:
    """Sets the amount done; `text` replaces the numbers and time left."""
    self.done, now = done, time.monotonic()
    if self._shown:
      self._shown.update(self._task, completed=done, text=text or self._account(now))
    elif self._enabled and now - self._printed >= _SECONDS_PER_LINE:
      _print(f'{self.label}: {text or self._account(now)}', sys.stderr)
      self._printed = now

  def _account(self, now: float) -> str:
    """Returns the numbers and time left, such as '3/12, 40s left'."""
    text = f'{self.done / self._scale:,.0f}'
    if self.total is None:
      return f'{text}{self._unit}'
    text = f'{text}/{self.total / self._scale:,.0f}{self._unit}'
    new = self.done - self._first
    if new <= 0:
      return text
    return f'{text}, {duration((now - self._began) / new * (self.total - self.done))} left'


class Table:
  """A live table on a terminal (`is_live`), between `start` and `stop`."""

  def __init__(self):
    self._live = rich.live.Live(console=rich.console.Console(stderr=True), transient=True)
    self.stop = self._live.stop

  def start(self) -> None:
    """Starts showing the table."""
    self._live.start()
    self._live.console.show_cursor(True)

  def show(self, rows: Iterable[Sequence[str]], title: str) -> None:
    """Replaces the title and rows."""
    table = rich.table.Table.grid(padding=(0, 2))
    for row in rows:
      table.add_row(*row)
    self._live.update(rich.console.Group(title, table))


def track(items: Iterable, label: str, enabled: bool = True, total: int | None = None) -> Iterator:
  """Yields the items and shows progress; `total` is their number if they have no `len`."""
  with Bar(label, len(items) if total is None else total, enabled=enabled) as bar:
    for item in items:
      yield item
      bar.advance()


def close() -> None:
  """Removes all live lines, for programs that end inside a `with`."""
  while _bars:
    _bars[-1].__exit__()
