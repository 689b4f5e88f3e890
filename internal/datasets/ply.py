"""Reads the points of a PLY file, such as nerfstudio's sparse_pc.ply."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping

import numpy as np

from . import images

_TYPES = {
  'char': 'i1', 'int8': 'i1', 'uchar': 'u1', 'uint8': 'u1', 'short': 'i2', 'int16': 'i2',
  'ushort': 'u2', 'uint16': 'u2', 'int': 'i4', 'int32': 'i4', 'uint': 'u4', 'uint32': 'u4',
  'float': 'f4', 'float32': 'f4', 'double': 'f8', 'float64': 'f8',
}  # fmt: skip
_MOST_HEADER_LINES = 200


def read_points(path: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns positions [m, 3] float64 and colours uint8 [m, 3]; grey if the file has none.

  Reads ASCII and binary files whose first element is `vertex`, with 8-bit colours.

  Raises:
    DataError: the file is missing or damaged, or is not such a file.
  """
  try:
    with open(path, 'rb') as f:
      form, count, dtype = _read_header(f)
      table = _read_table(f, form, count, dtype)
    xyz = np.stack([table[name] for name in 'xyz'], -1).astype(np.float64)
    if 'red' in dtype.names:
      rgb = np.stack([table[name] for name in ('red', 'green', 'blue')], -1)
      rgb = np.clip(np.nan_to_num(rgb), 0, 255).astype(np.uint8)
    else:
      rgb = np.full(xyz.shape, 128, np.uint8)
    return xyz, rgb
  except (OSError, ValueError, LookupError, OverflowError) as e:
    reason = e.strerror if isinstance(e, OSError) else ' '.join(str(e).split())[:200]
    raise images.DataError(f'{path}: cannot be read as PLY points ({reason}).') from None


def _read_header(f) -> tuple[str, int, np.dtype]:
  """Returns the format, the number of vertices and the type of a vertex."""
  lines = []
  while len(lines) < _MOST_HEADER_LINES and lines[-1:] != [['end_header']]:
    lines.append(f.readline(1000).decode('latin1').split())
  lines = [line for line in lines if line and line[0] not in ('comment', 'obj_info')]
  (magic, *_), (_, form, *_), (_, element, count), *rest = lines
  properties = itertools.takewhile(lambda line: line[0] == 'property', rest)
  if magic != 'ply' or element != 'vertex' or int(count) < 0:
    raise ValueError('the vertices must be its first element')
  order = {'ascii': '<', 'binary_little_endian': '<', 'binary_big_endian': '>'}[form]
  return form, int(count), np.dtype([(name, order + _TYPES[kind]) for _, kind, name in properties])


def _read_table(f, form: str, count: int, dtype: np.dtype) -> Mapping[str, np.ndarray]:
  """Reads the columns of `count` vertices."""
  least = 2 * len(dtype.names) - 1 if form == 'ascii' else dtype.itemsize  # Bytes per vertex.
  if count * least > os.fstat(f.fileno()).st_size:
    raise ValueError(f'it is too short for {count} vertices')
  if form != 'ascii':
    return np.frombuffer(f.read(count * dtype.itemsize), dtype, count)
  lines = list(itertools.islice(f, count))
  values = np.array(b' '.join(lines).split(), np.float64).reshape(count, len(dtype.names))
  return dict(zip(dtype.names, values.T))
