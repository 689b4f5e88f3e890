"""Composites the lists of all tiles in GPU kernels: what `rasterizer` does in plain XLA.

A program of one warp draws a quarter of a tile and walks the tile's list front to back, with the
pixels' colours in registers. It also stores them wherever a new segment of the list begins. The
gradient has one program for each segment, which starts from there, so that long lists do not
hold up the others. It writes the derivatives of each pair of Gaussian and tile to the pair's own
row, so nothing is added atomically and results are the same in every run. `rasterizer` sums the
rows of a Gaussian.

Shapes: `m` pairs, `t` tiles, `s` segments, `p` pixels of a tile. A pair's row has 16 numbers, of
which 9 are used (`rasterizer._FEATURES`), so that rows are aligned.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as triton
import jax.numpy as jnp

from . import gaussians

Array = jax.Array

ROW = 16
TILE = 16  # Pixels along a side of a tile.
OPAQUE = 1e-4  # A pixel is finished when less light than this passes.
SEGMENT = 128  # Pairs of a list whose gradients one program computes.
_PIXELS = TILE * TILE
_PARTS = 4  # Programs that draw a tile.
_CHUNK = 32  # Pairs between two looks whether all pixels are finished.
_AHEAD = 2  # Pairs that are loaded at once, to wait for memory once.


@flax.struct.dataclass
class Segments:
  """The tiles' lists, cut into segments of SEGMENT pairs."""

  begin: Array  # [t] int32, the first segment of a tile.
  tile: Array  # [s] int32, the tile of a segment; t for none.


def cut(begin: Array, end: Array, capacity: int) -> Segments:
  """Cuts the lists of t tiles, from `begin` to `end` among `capacity` pairs, into segments."""
  count = (end - begin + SEGMENT - 1) // SEGMENT
  ends = jnp.cumsum(count)
  number = jnp.arange(capacity // SEGMENT + len(begin), dtype=jnp.int32)
  tile = jnp.searchsorted(ends, number, side='right')
  return Segments((ends - count).astype(jnp.int32), tile.astype(jnp.int32))


def draw(
  pairs: Array,
  begin: Array,
  end: Array,
  segments: Segments,
  across: int,
  interpret: bool = False,
) -> tuple[Array, Array, Array]:
  """Composites each tile's list.

  Args:
    pairs: [m, 16] x, y, conic (3), opacity and colour (3) of each pair, tile after tile, each
      tile's by depth.
    begin, end: [t] int32, where a tile's list begins and ends.
    segments: `cut(begin, end, m)`.
    across: tiles in a row of the picture.
    interpret: whether to run without a GPU, slowly, for tests.

  Returns:
    Colours [t, 3, p] without background; the light that passes [t, p]; and for `gradients` both
    where a segment begins, [s, 4, p]. All of it is 0 where a tile is opaque before.
  """
  count = len(begin)
  out = (
    jax.ShapeDtypeStruct((count, 3, _PIXELS), jnp.float32),
    jax.ShapeDtypeStruct((count, _PIXELS), jnp.float32),
    jax.ShapeDtypeStruct((len(segments.tile), 4, _PIXELS), jnp.float32),
  )
  call = _call(functools.partial(_draw_part, across), count * _PARTS, out, interpret, {4: 2})
  return call(pairs, begin, end, segments.begin, jnp.zeros(out[2].shape, jnp.float32))


def gradients(
  pairs: Array, begin: Array, end: Array, segments: Segments, across: int, drawn: tuple,
  g_colors: Array, g_through: Array, interpret: bool = False,
) -> Array:  # fmt: skip
  """Computes the derivatives of a scalar by the pairs' features.

  Args:
    pairs, begin, end, segments, across, interpret: as for `draw`.
    drawn: what `draw` returned.
    g_colors, g_through: derivatives by colours and light that passes.

  Returns:
    [m, 16] derivatives, of which the first 9 of a row are used.
  """
  kernel = functools.partial(_differentiate_segment, across)
  out = jax.ShapeDtypeStruct(pairs.shape, jnp.float32)
  # Rows that no program reaches stay zero.
  call = _call(kernel, len(segments.tile), out, interpret, {10: 0})
  return call(
    pairs, begin, end, segments.begin, segments.tile, *drawn, g_colors, g_through,
    jnp.zeros_like(pairs),
  )  # fmt: skip


def _call(kernel, count: int, out: Any, interpret: bool, aliases: dict):
  return pl.pallas_call(
    kernel,
    grid=(count,),
    out_shape=out,
    input_output_aliases=aliases,
    compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
    interpret=interpret,
  )


def _pixel_centres(tile: Array, across: int, first: Array, count: int) -> tuple[Array, Array]:
  """Returns x and y [count] of the pixels of a tile from the `first` on."""
  pixel = first + jnp.arange(count, dtype=jnp.int32)
  x = (tile % across * TILE + pixel % TILE).astype(jnp.float32) + 0.5
  y = (tile // across * TILE + pixel // TILE).astype(jnp.float32) + 0.5
  return x, y


def _alpha(row: list, x: Array, y: Array, passing: Array) -> tuple[Array, Array, Array]:
  """Returns alpha of a pair at the pixels, and the offsets from its middle, [p] each.

  Alpha is 0 at pixels that are finished, so drawing and gradient add up the same pairs, wherever
  the programs of both stop.
  """
  dx, dy = x - row[0], y - row[1]
  power = 0.5 * (row[2] * dx * dx + row[4] * dy * dy) + row[3] * dx * dy
  alpha = jnp.minimum(row[5] * jnp.exp(-power), gaussians.MAX_ALPHA)
  shown = (alpha >= gaussians.MIN_ALPHA) & (passing > OPAQUE)
  return jnp.where(shown, alpha, 0.0), dx, dy


def _walk(pairs, first: Array, end: Array, step, state: tuple, through: int) -> tuple:
  """Repeats `step(pair, row, state)` until the list ends or all of `state[through]` is opaque."""

  def several(count):
    def steps(k, loop):
      start, state = loop
      rows = [[pairs[start + i, j] for j in range(9)] for i in range(count)]
      for i, row in enumerate(rows):
        state = step(start + i, row, state)
      return start + count, state

    return steps

  def unfinished(loop):
    start, state = loop
    return (start < end) & (jnp.max(state[through]) > OPAQUE)

  def chunk(loop):
    left = jnp.minimum(end - loop[0], _CHUNK)
    loop = jax.lax.fori_loop(0, left // _AHEAD, several(_AHEAD), loop)
    return jax.lax.fori_loop(0, left % _AHEAD, several(1), loop)

  return jax.lax.while_loop(unfinished, chunk, (first, state))[1]


def _draw_part(across, pairs, begin, end, segment, _, colors, through, states):
  tile, part = pl.program_id(0) // _PARTS, pl.program_id(0) % _PARTS
  count = _PIXELS // _PARTS
  own = pl.ds(part * count, count)
  x, y = _pixel_centres(tile, across, part * count, count)
  last = end[tile]

  def step(_, row, state):
    red, green, blue, passing = state
    weight = _alpha(row, x, y, passing)[0]
    weight, passing = weight * passing, passing * (1 - weight)
    return red + weight * row[6], green + weight * row[7], blue + weight * row[8], passing

  def unfinished(loop):
    _, first, state = loop
    return (first < last) & (jnp.max(state[3]) > OPAQUE)

  def draw_segment(loop):
    number, first, state = loop
    for channel in range(4):
      states[number, channel, own] = state[channel]
    stop = jnp.minimum(first + SEGMENT, last)
    return number + 1, first + SEGMENT, _walk(pairs, first, stop, step, state, 3)

  zero = jnp.zeros(count, jnp.float32)
  start = segment[tile], begin[tile], (zero, zero, zero, zero + 1)
  state = jax.lax.while_loop(unfinished, draw_segment, start)[2]
  for channel in range(3):
    colors[tile, channel, own] = state[channel]
  through[tile, own] = state[3]


def _differentiate_segment(
  across, pairs, begin, end, segment, tiles, colors, through, states, g_colors, g_through, _,
  gradient,
):  # fmt: skip
  """Walks a segment again; `rasterizer._differentiate_groups` has the equations."""
  number, count = pl.program_id(0), begin.shape[0]
  listed = tiles[number] < count
  tile = jnp.where(listed, tiles[number], 0)
  first = begin[tile] + (number - segment[tile]) * SEGMENT
  last = jnp.where(listed, jnp.minimum(first + SEGMENT, end[tile]), 0)
  x, y = _pixel_centres(tile, across, 0, _PIXELS)
  g = [g_colors[tile, channel, :] for channel in range(3)]
  final = g_through[tile, :] * through[tile, :]
  front = jnp.zeros(_PIXELS, jnp.float32)  # The part of `final` in front of the pair.
  for channel in range(3):
    final += g[channel] * colors[tile, channel, :]
    front += g[channel] * states[number, channel, :]

  def step(k, row, state):
    front, passing = state
    alpha, dx, dy = _alpha(row, x, y, passing)
    weight = alpha * passing
    own = g[0] * row[6] + g[1] * row[7] + g[2] * row[8]
    front += weight * own
    g_alpha = passing * own - (final - front) / (1 - alpha)
    slope = jnp.where((alpha > 0) & (alpha < gaussians.MAX_ALPHA), g_alpha * alpha, 0.0)
    sx, sy = slope * dx, slope * dy
    sum_x, sum_y = jnp.sum(sx), jnp.sum(sy)
    gradient[k, 0] = row[2] * sum_x + row[3] * sum_y
    gradient[k, 1] = row[3] * sum_x + row[4] * sum_y
    gradient[k, 2] = -0.5 * jnp.sum(sx * dx)
    gradient[k, 3] = -jnp.sum(sx * dy)
    gradient[k, 4] = -0.5 * jnp.sum(sy * dy)
    gradient[k, 5] = jnp.sum(slope) / jnp.where(row[5] > 0, row[5], 1.0)
    for channel in range(3):
      gradient[k, 6 + channel] = jnp.sum(weight * g[channel])
    return front, passing * (1 - alpha)

  _walk(pairs, first, last, step, (front, states[number, 3, :]), 1)
