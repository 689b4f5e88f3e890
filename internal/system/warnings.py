"""Warnings about a capture, collected while it is loaded.

Any reader calls `warn`; `datasets.load_dataset` keeps what it collects in the scene's report.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

_collectors: list[list[str]] = []


def warn(text: str) -> None:
  """Adds a warning to those being collected, once; without `collect` it is printed on stderr.

  A warning names the file or value, says what was done about it, and the way out.
  """
  if not _collectors:
    print(f'Warning: {text}', file=sys.stderr)
  elif text not in _collectors[-1]:
    _collectors[-1].append(text)


@contextlib.contextmanager
def collect() -> Iterator[list[str]]:
  """Yields the list to which `warn` adds in this context, in threads too."""
  _collectors.append([])
  try:
    yield _collectors[-1]
  finally:
    _collectors.pop()


def some(names: Sequence[str], most: int = 3) -> str:
  """Lists quoted names for a message: "'a', 'b', 'c' and 4 more"."""
  rest = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(map(repr, names[:most])) + rest
