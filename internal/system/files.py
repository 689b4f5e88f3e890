"""Atomic file writes, and safe reading of untrusted .npy files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def whole(path: str) -> Iterator[str]:
  """Writes a file atomically: yields a temporary path, renamed to `path` when the block ends.

  Creates the folder. If the block fails, `path` is unchanged and the temporary file is removed. The
  temporary path has the extension of `path`, because some writers infer the format from it.
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
  """Loads a numeric .npy file as float64, without pickle and without trusting its header's size.

  Raises:
    ValueError: the file cannot be read, is not a numeric .npy file, or is truncated.
  """
  try:
    with open(path, 'rb') as f:
      start = f.read(12)
    header = int.from_bytes(start[8:], 'little') if start[6:7] > b'\1' else 0  # Format 2 and later.
    if header > os.path.getsize(path):
      raise ValueError('its header says that it is longer than the file')
    # Mapping checks the header's shape against the file's size.
    array = np.load(path, mmap_mode='r', allow_pickle=False)
  except Exception as e:  # The header parser raises many types.
    raise ValueError(f'no whole .npy file: {e}') from None
  if not isinstance(array, np.ndarray) or array.dtype.kind not in 'fiu':
    raise ValueError('no .npy file of numbers')
  return np.array(array, np.float64)
