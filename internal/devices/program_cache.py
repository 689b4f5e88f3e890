"""A checked and bounded store for JAX's cache of compiled programs.

JAX writes its entries in place and loads them unchecked: an entry truncated by a full disk is never
replaced, and a flipped bit can crash XLA. Here each entry ends in its SHA-256 and is written
atomically. Damaged entries are removed and compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import sys
import time

import jax
from jax._src import compilation_cache

from ..system import files

_ENDING = '-checked'  # JAX's own entries in the same folder end in '-cache'.
_SUM_BYTES = 32
_ABANDONED = 3600.0  # Seconds after which a half-written entry counts as abandoned.


class CheckedCache(compilation_cache.CacheInterface):
  """Compiled programs in a folder.

  Args:
    path: the folder.
    max_size: bytes of all its entries, above which the least recently used are removed; -1 for no
      limit.
  """

  def __init__(self, path: str, max_size: int):
    self._path, self._max_size = pathlib.Path(path), max_size
    self._has_failed = False

  def _file(self, key: str) -> str:
    return os.path.join(self._path, key + _ENDING)

  def get(self, key: str) -> bytes | None:
    """Returns an intact entry, or None."""
    path = self._file(key)
    try:
      with open(path, 'rb') as f:
        content = f.read()
    except OSError:
      return None
    entry, expected = content[:-_SUM_BYTES], content[-_SUM_BYTES:]
    intact = hashlib.sha256(entry).digest() == expected
    with contextlib.suppress(OSError):  # Folders may be read-only.
      # Entries are evicted by the time of their last use.
      os.utime(path) if intact else os.remove(path)
    return entry if intact else None

  def put(self, key: str, value: bytes) -> None:
    """Writes an entry; replaces one that could not be loaded."""
    if 0 <= self._max_size < len(value) + _SUM_BYTES:
      return
    try:
      with files.whole(self._file(key)) as path, open(path, 'wb') as f:
        f.write(value + hashlib.sha256(value).digest())
      self._evict()
    except OSError as error:  # JAX would print a Python warning for each program.
      if not self._has_failed:
        print(f'Warning: some compiled programs are not cached: {error}.', file=sys.stderr)
      self._has_failed = True

  def _evict(self) -> None:
    """Removes half-written entries of killed programs, and entries beyond the limit."""
    found = []
    for entry in os.scandir(self._path):
      with contextlib.suppress(OSError):  # Other programs may evict at the same time.
        status = entry.stat()
        if '.part' in entry.name and time.time() - status.st_mtime > _ABANDONED:
          os.remove(entry.path)
        elif entry.is_file() and entry.name.endswith((_ENDING, '-cache')):
          found.append((status.st_mtime, status.st_size, entry.path))
    excess = sum(size for _, size, _ in found) - self._max_size
    for _, size, path in sorted(found):
      if self._max_size < 0 or excess <= 0:
        return
      with contextlib.suppress(OSError):
        os.remove(path)
      excess -= size


def install() -> None:
  """Makes JAX use `CheckedCache`, bounded by jax_compilation_cache_max_size."""
  compilation_cache.get_file_cache = lambda path: (
    CheckedCache(path, jax.config.jax_compilation_cache_max_size),
    path,
  )
