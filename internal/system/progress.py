"""What long work shows: one live line on a terminal, a plain line now and then elsewhere.

Both go to stderr. `set_quiet` silences them, and what `say` would print.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import rich.console
import rich.live
import rich.progress
import rich.table

_SECONDS_PER_LINE = 15.0  # Where nobody watches.
_quiet = False
_bars: list[Bar] = []  # Those on show, the innermost last.


def set_quiet() -> None:
  """Says nothing of this process's progress and news from now on."""
  global _quiet
  _quiet = True


def is_live() -> bool:
  """Whether there is a terminal, for nothing else, that a changing line can be on."""
  if _bars:
    return True  # While one is on show rich stands in for stdout and stderr.
  return sys.stderr.isatty() and sys.stdout.isatty() and not _quiet


def is_quiet() -> bool:
  """Whether `set_quiet` was called."""
  return _quiet


def say(text: str) -> None:
  """Prints news, above a live line if there is one; nothing after `set_quiet`."""
  if not _quiet:
    print(text)


def summary(rows: Mapping[str, object]) -> None:
  """Prints what a program leaves: names and, in a column, what they name."""
  width = max(map(len, rows))
  for name, value in rows.items():
    print(f'{name:<{width}}  {value}')


def duration(seconds: float) -> str:
  """Seconds as people say them: '45s', '3m20s', '2h05m'."""
  s = max(0, round(seconds))
  if s < 60:
    return f'{s}s'
  if s < 3600:
    return f'{s // 60}m{s % 60:02d}s'
  return f'{s // 3600}h{s % 3600 // 60:02d}m'


class Bar:
  """How far one task is, on show inside of `with`.

  Args:
    label: what is done.
    total: how much there is to do; None where nobody knows.
    done: how much of it was done before.
    scale: units of `total` in one that people count by, 1e6 for bytes to be told as MB.
    unit: the name of the latter.
    enabled: False shows nothing, for processes that are not the main one.
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
    self._began = self._told = time.monotonic()
    if self._enabled and is_live():
      self._shown = _bars[-1]._shown if _bars else self._start()  # One below the other.
      self._task = self._shown.add_task(self.label, total=self.total, text='')
      _bars.append(self)
    return self

  def _start(self) -> rich.progress.Progress:
    columns = '{task.description}', rich.progress.BarColumn(24), '{task.fields[text]}'
    shown = rich.progress.Progress(
      *columns, console=rich.console.Console(stderr=True), transient=True
    )
    shown.start()
    shown.console.show_cursor(True)  # A kill would leave the terminal without.
    return shown

  def __exit__(self, *_) -> None:
    if self._shown:
      _bars.remove(self)
      self._shown.remove_task(self._task)
      if not _bars:
        self._shown.stop()
      self._shown = None

  def advance(self, count: float = 1) -> None:
    """So much more is done."""
    self.show(self.done + count)

  def show(self, done: float, text: str | None = None) -> None:
    """So much is done in all; `text` is what to say of it instead of numbers and time left."""
    self.done, now = done, time.monotonic()
    if self._shown:
      self._shown.update(self._task, completed=done, text=text or self._account(now))
    elif self._enabled and now - self._told >= _SECONDS_PER_LINE:
      print(f'{self.label}: {text or self._account(now)}', file=sys.stderr)
      self._told = now

  def _account(self, now: float) -> str:
    """'3/12, 40s left'."""
    told = f'{self.done / self._scale:,.0f}'
    if self.total is None:
      return f'{told}{self._unit}'
    told = f'{told}/{self.total / self._scale:,.0f}{self._unit}'
    new = self.done - self._first
    if not new:
      return told
    return f'{told}, {duration((now - self._began) / new * (self.total - self.done))} left'


class Table:
  """Rows that change, on a terminal (`is_live`), between `start` and `stop`."""

  def __init__(self):
    self._live = rich.live.Live(console=rich.console.Console(stderr=True), transient=True)
    self.stop = self._live.stop

  def start(self) -> None:
    """Puts it on show."""
    self._live.start()
    self._live.console.show_cursor(True)

  def show(self, rows: Iterable[Sequence[str]], title: str) -> None:
    """Shows these rows now."""
    table = rich.table.Table.grid(padding=(0, 2))
    for row in rows:
      table.add_row(*row)
    self._live.update(rich.console.Group(title, table))


def track(items: Iterable, label: str, enabled: bool = True, total: int | None = None) -> Iterator:
  """Yields the items, showing how many are done and how long the rest will take.

  `total` is their number where `len` cannot tell.
  """
  with Bar(label, len(items) if total is None else total, enabled=enabled) as bar:
    for item in items:
      yield item
      bar.advance()


def close() -> None:
  """Takes all live lines away; for programs that end without leaving their `with`."""
  while _bars:
    _bars[-1].__exit__()
