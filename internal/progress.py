"""How far a long loop is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

import tqdm

_SECONDS_PER_LINE = 15.0


def track(items: Sequence, label: str, enabled: bool = True) -> Iterator:
  """Yields the items, telling on stderr how many are done and how long the rest will take."""
  if not enabled:
    yield from items
  elif sys.stderr.isatty():
    yield from tqdm.tqdm(items, label)
  else:
    began = told = time.monotonic()
    for done, item in enumerate(items):
      now = time.monotonic()
      if done and now - told >= _SECONDS_PER_LINE:
        told, left = now, (now - began) / done * (len(items) - done)
        print(f'{label}: {done}/{len(items)}, {left:.0f}s left', file=sys.stderr, flush=True)
      yield item
