"""Kernels for TPUs that look up, and add to, the rows of a hash grid's table.

XLA compiles a gather to a loop that takes one row at a time, and a scatter-add to one that copies
2 KiB from the chip's memory for each row, adds, and copies them back. These kernels keep the whole
table in vector memory, as tiles of 128 rows. The two corners of a cell that are neighbours along
its first axis are neighbours in the table (but for one point in 128), so that one tile serves both.
grid.py has the same computation in plain XLA.

Shapes: m points, f features, 4 pairs of corners, tables of t tiles [t, f, 128].
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

Array = jax.Array

_LANES = 128  # Rows of a tile; points of a chunk.
_GROUP = 8  # Points whose weights are spread over the lanes together.
_BLOCK = 1024  # Points that are fetched together.
_PAIRS = 4  # Corners of a cell, by the upper or lower end of the second and third axis.
_CROSSES = 2**24  # Is added to a tile's number.
_SPARE = 8 * 2**20  # Bytes of vector memory beside the table.


class Places(NamedTuple):
  """Where the corners of m points are in a table, in pairs of neighbours; m whole blocks.

  Attributes:
    tiles: [8 * m] int32, in chunks of [8, 128]: the tile of the first corner of each pair, then of
      the second, plus 2^24 if any pair of the point's group is in two tiles.
    lanes: [16, m] float32: the lane of each first corner, then of each second one, plus 128 if it
      is in another tile; then both corners' weights.
  """

  tiles: Array
  lanes: Array


def vector_memory() -> int:
  """Returns the bytes of vector memory of the TPU that is traced for, 0 if kernels cannot run."""
  device = jax.sharding.get_abstract_mesh().abstract_device  # None outside of shard_map.
  platform = device.platform if device else jax.default_backend()
  # XLA cannot divide a kernel between devices.
  if platform != 'tpu' or (device is None and jax.device_count() > 1):
    return 0
  try:
    return pltpu.get_tpu_info().vmem_capacity_bytes
  except ValueError:  # A chip that this JAX does not know.
    return 0


def fits(table: Array) -> bool:
  """Returns whether the kernels run here and a table [size, f] fits into vector memory."""
  sublanes = table.shape[1]
  return sublanes in (1, 2, 4, 8) and 4 * table.size + _SPARE <= vector_memory()


def locate(rows: Array, weights: Array) -> Places:
  """Describes corners for the kernels.

  Args:
    rows: [8, m] rows of the table; corners 2i and 2i + 1 are a pair.
    weights: [8, m].
  """
  pad = (0, 0), (0, -rows.shape[1] % _BLOCK)  # With weight 0.
  rows, weights = jnp.pad(rows.astype(jnp.int32), pad), jnp.pad(weights, pad)
  tile, lane = rows // _LANES, rows % _LANES
  crosses = tile[::2] != tile[1::2]  # [4, m]
  of_group = jnp.any(crosses, 0).reshape(-1, _GROUP).any(-1)  # [m / 8]
  marked = tile[1::2] + _CROSSES * jnp.repeat(of_group, _GROUP)[None]
  tiles = jnp.concatenate([tile[::2], marked]).reshape(2 * _PAIRS, -1, _LANES)  # [8, m / 128, 128]
  lanes = [lane[::2], lane[1::2] + _LANES * crosses, weights[::2], weights[1::2]]
  lanes = jnp.concatenate([x.astype(jnp.float32) for x in lanes])
  return Places(jnp.swapaxes(tiles, 0, 1).reshape(-1), lanes)


def _tiled(table: Array) -> Array:
  """Reshapes a table [size, f] to [t, f, 128], padded with zeros."""
  table = jnp.pad(table, ((0, -len(table) % _LANES), (0, 0)))
  return jnp.swapaxes(table.reshape(-1, _LANES, table.shape[1]), 1, 2)


@functools.partial(jax.jit, static_argnames='interpret')
def read(table: Array, places: Places, *, interpret: bool = False) -> Array:
  """Sums the weighted rows of each point's corners.

  Args:
    table: [size, f].
    places: from `locate`, for m points.
    interpret: run without a TPU.

  Returns:
    Features [m, f]. A row that is not finite spoils those of all points that read its tile.
  """
  tiles = _tiled(table)
  m, features = places.lanes.shape[1], table.shape[1]
  sums = pl.pallas_call(
    _read_kernel,
    grid=(m // _BLOCK,),
    in_specs=[*_specs(), pl.BlockSpec(memory_space=pl.ANY)],
    out_specs=_block(features),
    out_shape=jax.ShapeDtypeStruct((features, m), jnp.float32),
    scratch_shapes=_scratch(tiles.shape),
    compiler_params=_parameters(tiles),
    interpret=interpret,
  )(*places, tiles)
  return sums.T


@functools.partial(jax.jit, static_argnames=('size', 'interpret'))
def add(size: int, places: Places, updates: Array, *, interpret: bool = False) -> Array:
  """Adds the weighted updates [n, f] of n <= m points to their corners' rows of a table of zeros.

  Returns:
    The table [size, f]. An update that is not finite spoils whole tiles.
  """
  m, features = places.lanes.shape[1], updates.shape[1]
  updates = jnp.pad(updates, ((0, m - len(updates)), (0, 0)))
  tiles = pl.pallas_call(
    _add_kernel,
    grid=(m // _BLOCK,),
    in_specs=[*_specs(), _block(features)],
    out_specs=pl.BlockSpec(memory_space=pl.ANY),
    out_shape=jax.ShapeDtypeStruct((pl.cdiv(size, _LANES), features, _LANES), jnp.float32),
    scratch_shapes=_scratch((pl.cdiv(size, _LANES), features, _LANES)),
    compiler_params=_parameters(jax.ShapeDtypeStruct((size, features), jnp.float32)),
    interpret=interpret,
  )(*places, updates.T)
  return jnp.swapaxes(tiles, 1, 2).reshape(-1, features)[:size]


def _block(rows: int) -> pl.BlockSpec:
  return pl.BlockSpec((rows, _BLOCK), lambda i: (0, i))


def _specs() -> list[pl.BlockSpec]:
  tiles = pl.BlockSpec((2 * _PAIRS * _BLOCK,), lambda i: (i,), memory_space=pltpu.SMEM)
  return [tiles, _block(4 * _PAIRS)]


def _scratch(table_shape: tuple[int, ...]) -> list:
  return [pltpu.VMEM(table_shape, jnp.float32), pltpu.VMEM((_LANES, 4 * _PAIRS), jnp.float32)]


def _parameters(table) -> pltpu.CompilerParams:
  return pltpu.CompilerParams(
    dimension_semantics=('arbitrary',), vmem_limit_bytes=4 * table.size + _SPARE
  )


def _iota(shape: tuple[int, int]) -> Array:
  return lax.broadcasted_iota(jnp.int32, shape, 1)


def _weights(lanes: Array, pair: int, base: int) -> Array:
  """Returns the weights [8, 128] of a tile's rows for the points of a group.

  Args:
    lanes: [8, 16], from `Places.lanes`.
    pair: which pair of corners.
    base: 0 for the first corner's tile, 128 for another that holds the second corner.
  """
  first, second, of_first, of_second = (
    jnp.broadcast_to(lanes[:, i : i + 1], (_GROUP, _LANES)) for i in range(pair, 16, _PAIRS)
  )
  lane = (_iota((_GROUP, _LANES)) + base).astype(jnp.float32)
  total = jnp.where(lane == second, of_second, 0.0)
  return total if base else total + jnp.where(lane == first, of_first, 0.0)


def _for_groups(lanes, lanes_of, start, visit, finish) -> None:
  """Goes through a block's points by chunks of 128 and groups of 8.

  Args:
    lanes: block of `Places.lanes`.
    lanes_of: scratch [128, 16], for a chunk's.
    start: function of a chunk's number that returns the state before its first group.
    visit: function of (chunk, first point in it, lanes [8, 16] of a group, state) that returns the
      next state.
    finish: function of (chunk, state), called after its last group.
  """

  def chunk(k, _):
    lanes_of[...] = lanes[:, _chunk(k)].T

    def group(g, state):
      offset = pl.multiple_of(g * _GROUP, _GROUP)
      return visit(k, offset, lanes_of[pl.ds(offset, _GROUP), :], state)

    finish(k, lax.fori_loop(0, _LANES // _GROUP, group, start(k)))
    return 0

  lax.fori_loop(0, _BLOCK // _LANES, chunk, 0)


def _chunk(k) -> pl.Slice:
  return pl.ds(pl.multiple_of(k * _LANES, _LANES), _LANES)


def _tile(tiles, at, pair: int, base: int):
  """Returns a pair's tile, from a block of `Places.tiles`; `base` as in `_weights`."""
  if base:
    return tiles[at + (_PAIRS + pair) * _LANES] % _CROSSES
  return tiles[at + pair * _LANES]


def _read_kernel(tiles, lanes, source, out, table, lanes_of):
  features = out.shape[0]

  @pl.when(pl.program_id(0) == 0)
  def _fetch():
    pltpu.sync_copy(source, table)

  def sums(at, of_group, base):
    """Returns for each point of a group the sum of its weighted tiles [f, 128]."""
    weights = [_weights(of_group, pair, base) for pair in range(_PAIRS)]
    return [
      sum(w[j : j + 1] * table[_tile(tiles, at + j, pair, base)] for pair, w in enumerate(weights))
      for j in range(_GROUP)
    ]

  def visit(k, offset, of_group, state):
    at = 2 * _PAIRS * _LANES * k + offset
    near = sums(at, of_group, 0)
    far = lax.cond(
      tiles[at + _PAIRS * _LANES] >= _CROSSES,
      lambda: sums(at, of_group, _LANES),
      lambda: [jnp.zeros((features, _LANES), jnp.float32)] * _GROUP,
    )
    for j in range(_GROUP):
      total = jnp.sum(near[j] + far[j], -1, keepdims=True)  # [f, 1]
      state = jnp.where(_iota((features, _LANES)) == offset + j, total, state)
    return state

  def write(k, state):
    out[:, _chunk(k)] = state

  _for_groups(lanes, lanes_of, lambda _: jnp.zeros((features, _LANES), jnp.float32), visit, write)


def _add_kernel(tiles, lanes, updates, out, table, lanes_of):
  features = updates.shape[0]

  @pl.when(pl.program_id(0) == 0)
  def _clear():
    def clear(i, _):
      table[i] = jnp.zeros((features, _LANES), jnp.float32)
      return 0

    lax.fori_loop(0, table.shape[0], clear, 0)

  def add_group(at, of_group, of_chunk, base):
    weights = [_weights(of_group, pair, base) for pair in range(_PAIRS)]
    for j in range(_GROUP):
      update = jnp.broadcast_to(of_chunk[:, j : j + 1], (features, _LANES))
      for pair, w in enumerate(weights):
        tile = _tile(tiles, at + j, pair, base)
        table[tile] += update * w[j : j + 1]

  def visit(k, offset, of_group, of_chunk):
    at = 2 * _PAIRS * _LANES * k + offset
    add_group(at, of_group, of_chunk, 0)
    crosses = tiles[at + _PAIRS * _LANES] >= _CROSSES
    pl.when(crosses)(lambda: add_group(at, of_group, of_chunk, _LANES))
    return pltpu.roll(of_chunk, _LANES - _GROUP, 1)  # Brings the next group's to the front.

  _for_groups(lanes, lanes_of, lambda k: updates[:, _chunk(k)], visit, lambda *_: None)

  @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
  def _store():
    pltpu.sync_copy(table, out)
