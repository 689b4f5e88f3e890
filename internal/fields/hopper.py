"""Matrix product kernels for Hopper GPUs, with the rest of a dense layer fused into them.

XLA calls cuBLAS for matrix products and runs what cuBLAS cannot fuse as separate passes over
gigabytes of activations. `product` fuses the sum of two products, a bias or an outer product, and a
ReLU or its mask; `weight_gradient` fuses the bias's gradient; `layer_gradient` fuses all gradients
of a narrow layer. They are Pallas kernels for Mosaic GPU: in each block, one warpgroup copies tiles
into a ring buffer in shared memory and two others multiply them. dense.py has the same computation
in plain XLA.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

Array = jax.Array

_SUB = 64  # Side of the squares in which shared memory is laid out and copied out.
_TRANSFORMS = (plgpu.TilingTransform((8, _SUB)), plgpu.SwizzleTransform(128))  # For bfloat16.
_DEPTH = 64  # Size of the contracted axis in one step.
_ROWS, _COLS = 128, 256  # A block's tile of the result.
_WARPGROUPS = 2  # Number that multiply, each half of a tile's rows (of a gradient's columns).
_PRODUCT_STAGES = 3  # Slots of the ring: with the result's tile they fill shared memory.
_GRADIENT_STAGES = 4
_LAYER_STAGES = 3  # The rest of shared memory holds the block's weights.
_MASK_STEP = 2  # Step at which a tile's mask is fetched; by then the previous tile is stored.
_FETCH_REGISTERS, _MULTIPLY_REGISTERS = 40, 232  # Per thread.


def available() -> bool:
  """Returns whether this process computes on Hopper GPUs."""
  if jax.default_backend() != 'gpu':
    return False
  return getattr(jax.devices()[0], 'compute_capability', '') == '9.0'


def fits(rows: int, depth: int, width: int) -> bool:
  """Returns whether the kernels support [rows, depth] x [depth, width] and its gradients."""
  whole_tiles = depth > 0 and not (rows % _ROWS or depth % _ROWS or width % _COLS)
  return whole_tiles and depth // _DEPTH >= _PRODUCT_STAGES and _parts(rows, depth, 1, 1) > 0


def fits_layer(rows: int, depth: int, width: int) -> bool:
  """Returns whether `layer_gradient` supports the layer [rows, depth] x [depth, width]."""
  whole_tiles = depth > 0 and not (rows % _SUB or depth % _ROWS)
  return whole_tiles and width == _COLS and _teams(rows, depth // _ROWS, depth // _ROWS) > 0


def _parts(rows: int, depth: int, tiles: int, blocks: int) -> int:
  """Returns the number of blocks that share the rows of each tile of a weight gradient.

  It is the largest power of two with parts * tiles <= blocks such that each part fills the ring and
  consists of whole rounds of steps (see `_gradient_kernel`); 0 if not even one part does.
  """

  def works(parts: int) -> bool:
    whole_rounds = rows % (parts * _DEPTH * (depth // _ROWS)) == 0
    return whole_rounds and rows // (parts * _DEPTH) >= _GRADIENT_STAGES

  if not works(1):
    return 0
  parts = 1
  while 2 * parts * tiles <= blocks and works(2 * parts):
    parts *= 2
  return parts


def _blocks() -> int:
  """Returns the number of multiprocessors, for one block each."""
  if jax.default_backend() != 'gpu':
    return 132  # An H200's, to lower the kernels on other machines.
  return jax.devices()[0].core_count


def _tile(*shape: int):
  """Returns the scratch type of bfloat16 tiles in shared memory."""
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=_TRANSFORMS)


def _ring(stages: int, *tiles: tuple[int, int]) -> list:
  """Returns scratch types of a ring of groups of tiles, with its `full` and `empty` barriers."""
  return [
    *(_tile(stages, *shape) for shape in tiles),
    plgpu.Barrier(num_arrivals=len(tiles), num_barriers=stages),
    plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=stages),
  ]


def _fetch_all(total, stages: int, empty, fetch) -> None:
  """Keeps a ring filled: calls `fetch(step, slot)` for each of `total` (>= `stages`) steps."""
  plgpu.set_max_registers(_FETCH_REGISTERS, action='decrease')

  def refill(step, _):
    slot = lax.rem(step, stages)
    plgpu.barrier_wait(empty.at[slot])  # Both multiplying warpgroups have read the slot.
    fetch(step, slot)

  def drain(step, _):
    plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

  lax.fori_loop(0, stages, lambda step, _: fetch(step, step), None)
  lax.fori_loop(stages, total, refill, None)
  lax.fori_loop(total, total + stages, drain, None)


def _call(body, outs, scratch, blocks: int, interpret):
  """Makes a callable kernel of `body`, with `blocks` blocks."""
  return plgpu.kernel(
    body,
    out_type=outs,
    scratch_types=scratch,
    grid=(blocks,),
    grid_names=('block',),
    num_threads=_WARPGROUPS + 1,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    **({} if interpret is None else {'interpret': interpret}),
  )


# Under a jit of their own, identical calls become one function, which is compiled once.
@functools.partial(jax.jit, static_argnames=('relu', 'blocks', 'interpret'))
def product(
  xs: Sequence[Array],
  ws: Sequence[Array],
  *,
  bias: Array | None = None,
  outer: tuple[Array, Array] | None = None,
  relu: bool = False,
  mask: Array | None = None,
  blocks: int | None = None,
  interpret=None,
) -> Array:
  """Computes sum(x @ w) + bias + outer product, then ReLU and mask; sums are float32.

  Args:
    xs: one or two arrays [m, k] in bfloat16; k may differ.
    ws: an array [k, n] in bfloat16 for each of xs.
    bias: [n] float32, or None.
    outer: ([m], [n]) float32, whose outer product is added, or None.
    relu: apply a ReLU.
    mask: [m, n] bfloat16; the result is 0 where it is not positive. Or None.
    blocks: number of concurrent blocks (None: one per multiprocessor).
    interpret: Pallas parameters for running without a GPU.

  Returns:
    [m, n] bfloat16.
  """
  (m, _), (_, n) = xs[0].shape, ws[0].shape
  blocks = min(blocks or _blocks(), (m // _ROWS) * (n // _COLS))  # No block without a tile.
  body = functools.partial(
    _product_kernel,
    depths=tuple(x.shape[1] for x in xs),
    extras=(bias is not None, outer is not None, mask is not None),
    relu=relu,
    blocks=blocks,
  )
  scratch = [
    *_ring(_PRODUCT_STAGES, (_ROWS, _DEPTH), (_DEPTH, _COLS)),
    _tile(_WARPGROUPS, _COLS // _SUB, _ROWS // _WARPGROUPS, _SUB),
    plgpu.Barrier(num_arrivals=_COLS // _SUB, num_barriers=_WARPGROUPS),
  ]
  extras = [*([] if bias is None else [bias]), *(outer or ()), *([] if mask is None else [mask])]
  out = jax.ShapeDtypeStruct((m, n), jnp.bfloat16)
  return _call(body, out, scratch, blocks, interpret)(*xs, *ws, *extras)


class _Refs(NamedTuple):
  """The arrays and barriers of `_product_kernel`; bias to mask are None if not used."""

  xs: list[Any]  # In global memory, as `product` documents them.
  ws: list[Any]
  bias: Any
  by_row: Any  # The two vectors of `outer`.
  by_col: Any
  mask: Any
  out: Any
  x_ring: Any  # In shared memory.
  w_ring: Any
  full: Any  # Barriers of the ring's slots.
  empty: Any
  result: Any  # A warpgroup's half of a tile, in pieces [half, _SUB]; holds the mask before.
  mask_ready: Any  # A barrier per warpgroup.


def _product_refs(refs: Sequence[Any], count: int, extras: tuple[bool, bool, bool]) -> _Refs:
  """Names the kernel's arguments: `count` products, and the extras (bias, outer, mask) in use."""
  refs = iter(refs)
  xs, ws = ([next(refs) for _ in range(count)] for _ in range(2))
  has_bias, has_outer, has_mask = extras
  optional = [next(refs) if used else None for used in (has_bias, has_outer, has_outer, has_mask)]
  return _Refs(xs, ws, *optional, *refs)


def _product_kernel(*refs, depths, extras, relu, blocks):
  refs = _product_refs(refs, len(depths), extras)
  across = refs.out.shape[1] // _COLS
  tiles = (refs.out.shape[0] // _ROWS) * across
  half = _ROWS // _WARPGROUPS
  steps = sum(depths) // _DEPTH  # Per tile.
  warpgroup, block = lax.axis_index('warpgroup'), lax.axis_index('block')
  my_tiles = lax.div(tiles - block + blocks - 1, blocks)  # Tiles block, block + blocks, ...

  def corner(i):
    """Returns row and column of this block's i-th tile; neighbours share rows of x in cache."""
    tile = block + i * blocks
    return lax.div(tile, across) * _ROWS, lax.rem(tile, across) * _COLS

  @pl.when(warpgroup == _WARPGROUPS)
  def _fetch():
    fetch = functools.partial(_fetch_product_step, refs, depths, corner)
    _fetch_all(my_tiles * steps, _PRODUCT_STAGES, refs.empty, fetch)

  @pl.when(warpgroup < _WARPGROUPS)
  def _multiply():
    plgpu.set_max_registers(_MULTIPLY_REGISTERS, action='increase')
    my_rows = pl.ds(warpgroup * half, half)

    def one_tile(i, _):
      row, col = corner(i)
      row = row + warpgroup * half
      fetch_mask = functools.partial(_fetch_mask, refs, warpgroup, row, col)
      accumulate = functools.partial(_accumulate_tile, refs, steps, my_rows, i, fetch_mask)
      acc = pl.run_scoped(accumulate, plgpu.ACC((half, _COLS), jnp.float32))
      _finish_tile(refs, acc, warpgroup, row, col, relu)

    lax.fori_loop(0, my_tiles, one_tile, None)
    plgpu.wait_smem_to_gmem(0)  # A block must not end before its last stores.


def _fetch_product_step(refs: _Refs, depths, corner, step, slot) -> None:
  """Starts copying the tiles of x and w for a step into a slot of the ring."""
  steps = sum(depths) // _DEPTH
  row, col = corner(lax.div(step, steps))

  def copy(x, w, k):
    depth, full = pl.ds(k * _DEPTH, _DEPTH), refs.full.at[slot]
    plgpu.copy_gmem_to_smem(x.at[pl.ds(row, _ROWS), depth], refs.x_ring.at[slot], full)
    plgpu.copy_gmem_to_smem(w.at[depth, pl.ds(col, _COLS)], refs.w_ring.at[slot], full)

  k = lax.rem(step, steps)
  if len(depths) == 1:
    copy(refs.xs[0], refs.ws[0], k)
  else:
    first = depths[0] // _DEPTH  # Steps of the first product.
    pl.when(k < first)(lambda: copy(refs.xs[0], refs.ws[0], k))
    pl.when(k >= first)(lambda: copy(refs.xs[1], refs.ws[1], k - first))


def _piece(ref, row, col, p: int):
  """Returns the p-th piece [half, _SUB] of a warpgroup's half tile in global memory."""
  return ref.at[pl.ds(row, _ROWS // _WARPGROUPS), pl.ds(col + p * _SUB, _SUB)]


def _fetch_mask(refs: _Refs, warpgroup, row, col) -> None:
  """Starts copying a half tile's mask to where its result will be."""
  ready = refs.mask_ready.at[warpgroup]
  for p in range(_COLS // _SUB):
    plgpu.copy_gmem_to_smem(_piece(refs.mask, row, col, p), refs.result.at[warpgroup, p], ready)


def _accumulate_tile(refs: _Refs, steps: int, my_rows, i, fetch_mask, acc):
  """Sums the products of half of tile i in registers [half, _COLS]; meanwhile fetches its mask."""
  stages = _PRODUCT_STAGES

  def step(k, acc):
    at = i * steps + k
    slot = lax.rem(at, stages)
    plgpu.barrier_wait(refs.full.at[slot])
    plgpu.wgmma(acc, refs.x_ring.at[slot].at[my_rows], refs.w_ring.at[slot])
    plgpu.wgmma_wait(1)  # The previous step no longer reads its slot.
    pl.when(k > 0)(lambda: plgpu.barrier_arrive(refs.empty.at[lax.rem(at - 1, stages)]))
    return acc

  lax.fori_loop(0, _MASK_STEP, step, acc)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # `result` still held the previous tile.
  if refs.mask is not None:
    fetch_mask()
  lax.fori_loop(_MASK_STEP, steps, step, acc)
  plgpu.wgmma_wait(0)
  plgpu.barrier_arrive(refs.empty.at[lax.rem(i * steps + steps - 1, stages)])
  return acc[...]


def _vector(ref, at, axis: int):
  """Loads a part `at` of a vector along `axis` of a piece [_SUB, _SUB], broadcast to all of it."""
  layout = plgpu.Layout.WGMMA.reduce(1 - axis)
  part = plgpu.load(ref, (at,), layout=layout, optimized=False)
  return lax.broadcast_in_dim(part, (_SUB, _SUB), [axis])


def _finish_tile(refs: _Refs, acc, warpgroup, row, col, relu: bool) -> None:
  """Applies bias, outer product, ReLU and mask to a half tile, and starts storing it."""
  pieces = range(_COLS // _SUB)
  if refs.mask is not None:
    plgpu.barrier_wait(refs.mask_ready.at[warpgroup])

  for p in pieces:
    piece, cols = acc[:, p * _SUB : (p + 1) * _SUB], pl.ds(col + p * _SUB, _SUB)
    if refs.bias is not None:
      piece += _vector(refs.bias, cols, 1)
    if refs.by_row is not None:
      piece += _vector(refs.by_row, pl.ds(row, _SUB), 0) * _vector(refs.by_col, cols, 1)
    if relu:
      piece = jnp.maximum(piece, 0.0)
    if refs.mask is not None:
      piece = jnp.where(refs.result[warpgroup, p] > 0, piece, 0.0)
    refs.result[warpgroup, p] = piece.astype(jnp.bfloat16)
  plgpu.commit_smem()  # Makes the writes visible to the copy engine.
  for p in pieces:
    plgpu.copy_smem_to_gmem(refs.result.at[warpgroup, p], _piece(refs.out, row, col, p))


@functools.partial(jax.jit, static_argnames=('blocks', 'interpret'))
def weight_gradient(
  x: Array, g: Array, *, blocks: int | None = None, interpret=None
) -> tuple[Array, Array]:
  """Computes a dense layer's gradients: of the kernel, x^T g, and of the bias, sum(g, 0).

  Args:
    x: [m, k] bfloat16, input of the layer.
    g: [m, n] bfloat16, gradient of the layer's output before its ReLU.
    blocks: number of concurrent blocks (None: one per multiprocessor).
    interpret: Pallas parameters for running without a GPU.

  Returns:
    [k, n] and [n], float32.
  """
  (m, k), n = x.shape, g.shape[1]
  down, across = k // _ROWS, n // _COLS
  parts = _parts(m, k, down * across, blocks or _blocks())
  body = functools.partial(_gradient_kernel, down=down, across=across, parts=parts)
  outs = (
    jax.ShapeDtypeStruct((parts, k, n), jnp.float32),
    jax.ShapeDtypeStruct((parts, down, _SUB, n), jnp.float32),
  )
  scratch = [
    *_ring(_GRADIENT_STAGES, (_DEPTH, _ROWS), (_DEPTH, _COLS)),
    _tile(_WARPGROUPS, _SUB, _DEPTH),
  ]
  dw, rows = _call(body, outs, scratch, parts * down * across, interpret)(x, g)
  # All _SUB rows of a row sum are equal.
  return jnp.sum(dw, 0), jnp.sum(rows[:, :, 0], (0, 1))  # [k, n], [n]


def _gradient_kernel(x, g, dw, row_sums, x_ring, g_ring, full, empty, ones, *, down, across, parts):
  stages, half = _GRADIENT_STAGES, _COLS // _WARPGROUPS
  warpgroup, block = lax.axis_index('warpgroup'), lax.axis_index('block')
  j = lax.rem(block, across)
  i = lax.rem(lax.div(block, across), down)
  part = lax.div(block, across * down)
  steps = x.shape[0] // (parts * _DEPTH)

  @pl.when(warpgroup == _WARPGROUPS)
  def _fetch():
    def fetch(step, slot):
      # A round is `down` steps; block i starts it with step i, whose rows of g it also sums.
      turn = lax.rem(step, down)
      row = (part * steps + step - turn + lax.rem(turn + i, down)) * _DEPTH
      rows = pl.ds(row, _DEPTH)
      plgpu.copy_gmem_to_smem(x.at[rows, pl.ds(i * _ROWS, _ROWS)], x_ring.at[slot], full.at[slot])
      plgpu.copy_gmem_to_smem(g.at[rows, pl.ds(j * _COLS, _COLS)], g_ring.at[slot], full.at[slot])

    _fetch_all(steps, stages, empty, fetch)

  @pl.when(warpgroup < _WARPGROUPS)
  def _multiply():
    plgpu.set_max_registers(_MULTIPLY_REGISTERS, action='increase')
    mine = pl.ds(warpgroup * half, half)
    ones[warpgroup] = jnp.ones((_SUB, _DEPTH), jnp.bfloat16)
    plgpu.commit_smem()

    def accumulate(acc, sums):
      def round_of_steps(r, accs):
        acc, sums = accs
        for turn in range(down):
          step = r * down + turn
          slot = lax.rem(step, stages)
          plgpu.barrier_wait(full.at[slot])
          g_part = g_ring.at[slot].at[:, mine]
          plgpu.wgmma(acc, x_ring.at[slot].transpose((1, 0)), g_part)
          if turn == 0:
            plgpu.wgmma(sums, ones.at[warpgroup], g_part)
          plgpu.wgmma_wait(2 if turn == 0 else 1)
          done = empty.at[lax.rem(step + stages - 1, stages)]  # Slot of the previous step.
          if turn == 0:
            pl.when(r > 0)(functools.partial(plgpu.barrier_arrive, done))
          else:
            plgpu.barrier_arrive(done)
        return acc, sums

      lax.fori_loop(0, steps // down, round_of_steps, (acc, sums))
      plgpu.wgmma_wait(0)
      plgpu.barrier_arrive(empty.at[(steps - 1) % stages])
      return acc[...], sums[...]

    totals = pl.run_scoped(
      accumulate, plgpu.ACC((_ROWS, half), jnp.float32), plgpu.ACC((_SUB, half), jnp.float32)
    )
    cols = pl.ds(j * _COLS + warpgroup * half, half)
    dw[part, pl.ds(i * _ROWS, _ROWS), cols] = totals[0]
    row_sums[part, i, :, cols] = totals[1]  # ones @ g: all its rows are equal.


@functools.partial(jax.jit, static_argnames=('blocks', 'interpret'))
def layer_gradient(
  x: Array,
  g: Array,
  w: Array,
  *,
  outer: tuple[Array, Array] | None = None,
  blocks: int | None = None,
  interpret=None,
) -> tuple[Array, Array, Array]:
  """Computes all gradients of a narrow layer y = x @ w of which x is the output of a ReLU.

  `product` and `weight_gradient` would each read x and g; memory bounds the time of narrow layers.

  Args:
    x: [m, k] bfloat16, input of the layer.
    g: [m, n] bfloat16, gradient of y; n is 256.
    w: [k, n] bfloat16.
    outer: ([m], [k]) float32, whose outer product is added to the gradient of x, or None.
    blocks: number of concurrent blocks (None: one per multiprocessor).
    interpret: Pallas parameters for running without a GPU.

  Returns:
    The gradient before the ReLU, g @ w^T + outer where x > 0, else 0 [m, k] bfloat16; that of w
    [k, n] float32; and the sum of the first over rows [k] float32, gradient of the bias before.
  """
  (m, k), n = x.shape, g.shape[1]
  across = k // _ROWS
  teams = _teams(m, across, blocks or _blocks())
  body = functools.partial(
    _layer_gradient_kernel, has_outer=outer is not None, across=across, teams=teams
  )
  outs = (
    jax.ShapeDtypeStruct((m, k), jnp.bfloat16),
    jax.ShapeDtypeStruct((teams, k, n), jnp.float32),
    jax.ShapeDtypeStruct((teams, _SUB, k), jnp.float32),
  )
  scratch = [
    *_ring(_LAYER_STAGES, (_SUB, _ROWS), (_SUB, n)),
    _tile(n, _ROWS),
    plgpu.Barrier(num_arrivals=1),
    _tile(_WARPGROUPS, _SUB, _SUB),
  ]
  dx, dw, sums = _call(body, outs, scratch, teams * across, interpret)(x, g, w.T, *(outer or ()))
  return dx, jnp.sum(dw, 0), jnp.sum(sums, (0, 1))


def _teams(rows: int, across: int, blocks: int) -> int:
  """Returns the number of teams of `across` blocks that share the rows; 0 if there are too few."""
  return min(blocks // across, rows // (_SUB * _LAYER_STAGES))


def _layer_gradient_kernel(x, g, wt, *refs, has_outer: bool, across: int, teams: int):
  """The blocks of a team share rows: each has _ROWS columns of x, half of them a warpgroup's."""
  by_row, by_col = refs[:2] if has_outer else (None, None)
  dx, dw, sums, x_ring, g_ring, full, empty, w, w_ready, result = refs[2 * has_outer :]
  warpgroup, block = lax.axis_index('warpgroup'), lax.axis_index('block')
  team, first = lax.div(block, across), lax.rem(block, across) * _ROWS
  steps = lax.div(x.shape[0] // _SUB - team + teams - 1, teams)  # Tiles team, team + teams, ...
  stages = _LAYER_STAGES

  def rows(step):
    return pl.ds((team + step * teams) * _SUB, _SUB)

  @pl.when(warpgroup == _WARPGROUPS)
  def _fetch():
    cols = pl.ds(first, _ROWS)
    plgpu.copy_gmem_to_smem(wt.at[:, cols], w, w_ready)

    def fetch(step, slot):
      plgpu.copy_gmem_to_smem(x.at[rows(step), cols], x_ring.at[slot], full.at[slot])
      plgpu.copy_gmem_to_smem(g.at[rows(step), :], g_ring.at[slot], full.at[slot])

    _fetch_all(steps, stages, empty, fetch)

  @pl.when(warpgroup < _WARPGROUPS)
  def _multiply():
    plgpu.set_max_registers(_MULTIPLY_REGISTERS, action='increase')
    mine = pl.ds(warpgroup * _SUB, _SUB)  # Of the block's columns.
    cols = pl.ds(first + warpgroup * _SUB, _SUB)
    plgpu.barrier_wait(w_ready)

    def accumulate(weights):
      def one_tile(step, total):
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(full.at[slot])

        def inputs(acc):
          plgpu.wgmma(acc, g_ring.at[slot], w.at[:, mine])
          return acc[...]  # Waits for all products, so also for the previous tile's.

        dx_tile = pl.run_scoped(inputs, plgpu.ACC((_SUB, _SUB), jnp.float32))
        previous = empty.at[lax.rem(step + stages - 1, stages)]
        pl.when(step > 0)(lambda: plgpu.barrier_arrive(previous))
        # Runs while the other product is finished.
        plgpu.wgmma(weights, x_ring.at[slot].at[:, mine].transpose((1, 0)), g_ring.at[slot])
        if by_row is not None:
          dx_tile += _vector(by_row, rows(step), 0) * _vector(by_col, cols, 1)
        dx_tile = jnp.where(x_ring[slot, :, mine] > 0, dx_tile, 0.0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # `result` still held the previous tile.
        result[warpgroup] = dx_tile.astype(jnp.bfloat16)
        plgpu.commit_smem()  # Makes the writes visible to the copy engine.
        plgpu.copy_smem_to_gmem(result.at[warpgroup], dx.at[rows(step), cols])
        return total + dx_tile

      zeros = plgpu.layout_cast(jnp.zeros((_SUB, _SUB), jnp.float32), plgpu.Layout.WGMMA)
      total = lax.fori_loop(0, steps, one_tile, zeros)
      plgpu.wgmma_wait(0)
      plgpu.barrier_arrive(empty.at[lax.rem(steps - 1, stages)])
      return weights[...], total

    shape = plgpu.ACC((_SUB, g.shape[1]), jnp.float32)
    dw[team, cols, :], sums[team, :, cols] = pl.run_scoped(accumulate, shape)
    plgpu.wait_smem_to_gmem(0)  # A block must not end before its last stores.
