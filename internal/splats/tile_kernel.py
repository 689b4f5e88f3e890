"""Composites the lists of all tiles in one GPU kernel: what `rasterizer` does in plain XLA.

A program of one warp draws one tile and walks its list front to back, with the pixels' colours in
registers. The gradient walks it again and writes the derivatives of each pair of Gaussian and tile
to the pair's own row, so nothing is added atomically and results are the same in every run.
`rasterizer` sums the rows of a Gaussian.

Shapes: `m` pairs, `t` tiles, `p` pixels of a tile. A pair's row has 16 numbers, of which 9 are used
(`rasterizer._FEATURES`), so that rows are aligned.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as triton
import jax.numpy as jnp

from . import gaussians

Array = jax.Array

ROW = 16
TILE = 16  # Pixels along a side of a tile.
OPAQUE = 1e-4  # A pixel is finished when less light than this passes.
_PIXELS = TILE * TILE
_CHUNK = 32  # Pairs between two looks whether the tile is finished.


def draw(
  pairs: Array, begin: Array, end: Array, across: int, interpret: bool = False
) -> tuple[Array, Array]:
  """Composites each tile's list.

  Args:
    pairs: [m, 16] x, y, conic (3), opacity and colour (3) of each pair, tile after tile, each
      tile's by depth.
    begin, end: [t] int32, where a tile's list begins and ends.
    across: tiles in a row of the picture.
    interpret: whether to run without a GPU, slowly, for tests.

  Returns:
    Colours [t, 3, p] without background, and the light that passes [t, p].
  """
  count = len(begin)
  shapes = jax.ShapeDtypeStruct((count, 3, _PIXELS), jnp.float32)
  through = jax.ShapeDtypeStruct((count, _PIXELS), jnp.float32)
  kernel = functools.partial(_draw_tile, across)
  return _call(kernel, count, (shapes, through), interpret)(pairs, begin, end)


def gradients(
  pairs: Array, begin: Array, end: Array, across: int, colors: Array, through: Array,
  g_colors: Array, g_through: Array, interpret: bool = False,
) -> Array:  # fmt: skip
  """Computes the derivatives of a scalar by the pairs' features.

  Args:
    pairs, begin, end, across, interpret: as for `draw`.
    colors, through: what `draw` returned.
    g_colors, g_through: derivatives by `colors` and `through`.

  Returns:
    [m, 16] derivatives, of which the first 9 of a row are used.
  """
  kernel = functools.partial(_differentiate_tile, across)
  out = jax.ShapeDtypeStruct(pairs.shape, jnp.float32)
  # Rows that no tile reaches stay zero.
  call = _call(kernel, len(begin), out, interpret, aliases={7: 0})
  return call(pairs, begin, end, colors, through, g_colors, g_through, jnp.zeros_like(pairs))


def _call(kernel, count: int, out: Any, interpret: bool, aliases: dict | None = None):
  return pl.pallas_call(
    kernel,
    grid=(count,),
    out_shape=out,
    input_output_aliases=aliases or {},
    compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
    interpret=interpret,
  )


def _pixel_centres(tile: Array, across: int) -> tuple[Array, Array]:
  pixel = jnp.arange(_PIXELS, dtype=jnp.int32)
  x = (tile % across * TILE + pixel % TILE).astype(jnp.float32) + 0.5
  y = (tile // across * TILE + pixel // TILE).astype(jnp.float32) + 0.5
  return x, y


def _alpha(row: list, x: Array, y: Array) -> tuple[Array, Array, Array]:
  """Returns alpha of a pair at the pixels, and the offsets from its middle, [p] each."""
  dx, dy = x - row[0], y - row[1]
  power = 0.5 * (row[2] * dx * dx + row[4] * dy * dy) + row[3] * dx * dy
  alpha = jnp.minimum(row[5] * jnp.exp(-power), gaussians.MAX_ALPHA)
  return jnp.where(alpha >= gaussians.MIN_ALPHA, alpha, 0.0), dx, dy


def _walk(begin: Array, end: Array, step, state: tuple, through: int) -> tuple:
  """Repeats `step(pair, state)` until the list ends or all of `state[through]` is opaque."""

  def unfinished(loop):
    first, state = loop
    return (first < end) & (jnp.max(state[through]) > OPAQUE)

  def chunk(loop):
    first, state = loop
    last = jnp.minimum(first + _CHUNK, end)
    return last, jax.lax.fori_loop(first, last, step, state)

  return jax.lax.while_loop(unfinished, chunk, (begin, state))[1]


def _draw_tile(across, pairs, begin, end, colors, through):
  tile = pl.program_id(0)
  x, y = _pixel_centres(tile, across)

  def step(k, state):
    red, green, blue, passing = state
    row = [pairs[k, j] for j in range(9)]
    weight = _alpha(row, x, y)[0]
    weight, passing = weight * passing, passing * (1 - weight)
    return red + weight * row[6], green + weight * row[7], blue + weight * row[8], passing

  zero = jnp.zeros(_PIXELS, jnp.float32)
  state = _walk(begin[tile], end[tile], step, (zero, zero, zero, zero + 1), 3)
  for channel in range(3):
    colors[tile, channel, :] = state[channel]
  through[tile, :] = state[3]


def _differentiate_tile(
  across, pairs, begin, end, colors, through, g_colors, g_through, _, gradient
):
  """Walks a list again; `rasterizer._blend_backward` has the equations."""
  tile = pl.program_id(0)
  x, y = _pixel_centres(tile, across)
  g = [g_colors[tile, channel, :] for channel in range(3)]
  final = g_through[tile, :] * through[tile, :]
  for channel in range(3):
    final += g[channel] * colors[tile, channel, :]

  def step(k, state):
    front, passing = state  # front: the part of `final` in front of the pair.
    row = [pairs[k, j] for j in range(9)]
    alpha, dx, dy = _alpha(row, x, y)
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

  zero = jnp.zeros(_PIXELS, jnp.float32)
  _walk(begin[tile], end[tile], step, (zero, zero + 1), 1)
