"""Files that are never seen half-written, and arrays from files that nobody vouches for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np


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


def read_array(path: str) -> np.ndarray:
  """The numbers of a .npy file, float64: no pickle, and no memory on the word of a header.

  Raises:
    ValueError: the file is none, cannot be opened, or is shorter than its header says.
  """
  try:
    with open(path, 'rb') as f:
      start = f.read(12)
    header = int.from_bytes(start[8:], 'little') if start[6:7] > b'\1' else 0  # Since version 2.
    if header > os.path.getsize(path):
      raise ValueError('its header says that it is longer than the file')
    # Mapped, so that the header's shape is held against the file's size.
    array = np.load(path, mmap_mode='r', allow_pickle=False)
  except Exception as e:  # The parser of the header raises nearly anything.
    raise ValueError(f'no whole .npy file: {e}') from None
  if not isinstance(array, np.ndarray) or array.dtype.kind not in 'fiu':
    raise ValueError('no .npy file of numbers')
  return np.array(array, np.float64)
