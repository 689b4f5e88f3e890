"""Warnings about a capture, collected while it is loaded.

Any reader calls `warn`; `datasets.load_dataset` keeps what it collects in the scene's report.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

_collectors: list[tuple[list[str], bool]] = []  # What was collected, and whether it is echoed.


def warn(text: str) -> None:
  """Adds a warning to those being collected, once; without `collect` it is printed on stderr.

  A warning names the file or value, says what was done about it, and the way out.
  """
  collected, echo = _collectors[-1] if _collectors else ([], True)
  if text not in collected:
    collected.append(text)
    if echo:
      print(f'Warning: {text}', file=sys.stderr)


@contextlib.contextmanager
def collect(echo: bool = False) -> Iterator[list[str]]:
  """Yields the list to which `warn` adds in this context, in threads too; `echo` prints as well."""
  _collectors.append(([], echo))
  try:
    yield _collectors[-1][0]
  finally:
    _collectors.pop()


def some(names: Sequence[str], most: int = 3) -> str:
  """Lists quoted names for a message: "'a', 'b', 'c' and 4 more"."""
  return first([repr(name) for name in names], most)


def first(texts: Sequence[str], most: int = 3) -> str:
  """Lists texts for a message: "a, b, c and 4 more"."""
  rest = f' and {len(texts) - most} more' if len(texts) > most else ''
  return ', '.join(texts[:most]) + rest


def count(n: int, noun: str) -> str:
  """Returns a count for a message: "1 frame", "2 frames"."""
  return f'{n} {noun}' if n == 1 else f'{n} {noun}s'
