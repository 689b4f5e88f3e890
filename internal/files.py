"""Files that are never seen half-written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def whole(path: str) -> Iterator[str]:
  """Yields a name to write to; once the block is done, that file becomes `path`, at once.

  The folder is made. If the block fails, `path` stays as it was and the piece is removed. The name
  keeps the ending of `path`, from which some writers know the format.
  """
  os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
  stem, ending = os.path.splitext(path)
  temporary = f'{stem}.{os.getpid()}.part{ending}'
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    if os.path.exists(temporary):
      os.remove(temporary)
