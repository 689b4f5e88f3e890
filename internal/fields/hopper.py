"""Matrix products for Hopper GPUs that finish a dense layer's work while its tile is on the chip.

XLA calls cuBLAS for products; what cuBLAS does not finish, XLA does in passes over gigabytes of
activations. `product` also joins two products, adds a bias or an outer product, and applies a
ReLU or its mask; `weight_gradient` also sums the rows for the bias. They are kernels in Pallas
for Mosaic GPU: one warpgroup of a block fetches tiles into a ring in shared memory, two multiply.
internal/dense.py has the same in plain XLA.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

Array = jax.Array

_SUB = 64  # Shared memory is laid out, and copied out, in squares of so many.
_TRANSFORMS = (plgpu.TilingTransform((8, _SUB)), plgpu.SwizzleTransform(128))  # Of bfloat16.
_DEPTH = 64  # What is multiplied at a time.
_ROWS, _COLS = 128, 256  # A block's tile of the result.
_WARPGROUPS = 2  # Those that multiply: each half of the tile's rows (columns, of a gradient).
_PRODUCT_STAGES = 3  # Places in the ring: with the result's tile, all that shared memory holds.
_GRADIENT_STAGES = 4
_MASK_STEP = 2  # When a tile's mask is fetched: by then the tile before has been stored.
_FETCH_REGISTERS, _MULTIPLY_REGISTERS = 40, 232


def available() -> bool:
  """Whether this process computes on Hopper GPUs."""
  if jax.default_backend() != 'gpu':
    return False
  return getattr(jax.devices()[0], 'compute_capability', '') == '9.0'


def fits(rows: int, depth: int, width: int) -> bool:
  """Whether [rows, depth] times [depth, width], and its gradients, can be done here."""
  whole_tiles = depth > 0 and not (rows % _ROWS or depth % _ROWS or width % _COLS)
  return whole_tiles and depth // _DEPTH >= _PRODUCT_STAGES and _parts(rows, depth, 1, 1) > 0


def _parts(rows: int, depth: int, tiles: int, blocks: int) -> int:
  """In how many parts blocks share the rows of a weight gradient of so many tiles; 0: in none.

  A power of two. Each part must fill the ring, and be whole rounds of steps (see the kernel).
  """
  works = lambda parts: (  # noqa: E731
    rows % (parts * _DEPTH * (depth // _ROWS)) == 0 and rows // (parts * _DEPTH) >= _GRADIENT_STAGES
  )
  if not works(1):
    return 0
  parts = 1
  while 2 * parts * tiles <= blocks and works(2 * parts):
    parts *= 2
  return parts


def _blocks() -> int:
  """One block for each multiprocessor."""
  if jax.default_backend() != 'gpu':
    return 132  # An H200's, for lowering elsewhere.
  return jax.devices()[0].core_count


def _ring(stages: int, a: tuple[int, int], b: tuple[int, int]) -> list:
  """Shared memory of a ring of pairs of tiles; barriers that say full, and empty."""
  return [
    plgpu.SMEM((stages, *a), jnp.bfloat16, transforms=_TRANSFORMS),
    plgpu.SMEM((stages, *b), jnp.bfloat16, transforms=_TRANSFORMS),
    plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=stages),
  ]


def _fetch_all(total, stages: int, empty, fetch) -> None:
  """Keeps a ring filled: `fetch(step, slot)` for each of `total` steps, at least `stages`."""
  plgpu.set_max_registers(_FETCH_REGISTERS, action='decrease')

  def refill(step, _):
    slot = lax.rem(step, stages)
    plgpu.barrier_wait(empty.at[slot])
    fetch(step, slot)

  lax.fori_loop(0, stages, lambda step, _: fetch(step, step), None)
  lax.fori_loop(stages, total, refill, None)
  drain = lambda step, _: plgpu.barrier_wait(empty.at[lax.rem(step, stages)])  # noqa: E731
  lax.fori_loop(total, total + stages, drain, None)


def _call(body, outs, scratch, blocks: int, interpret):
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


# Compiled by themselves, calls alike are one kernel to the compiler, and cost its time once.
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
  """The sum of one or two matrix products, finished: [m, n] bfloat16.

  Args:
    xs: one or two of [m, k] bfloat16; k may differ.
    ws: as many of [k, n] bfloat16.
    bias: [n] float32, added.
    outer: [m] and [n] float32, whose outer product is added.
    relu: clip at zero from below.
    mask: [m, n] bfloat16: keep only where it is positive.
    blocks: how many run at a time (None: one for each multiprocessor).
    interpret: Pallas' parameters for running without a GPU.
  """
  (m, _), (_, n) = xs[0].shape, ws[0].shape
  blocks = min(blocks or _blocks(), (m // _ROWS) * (n // _COLS))
  body = functools.partial(
    _product_kernel,
    depths=tuple(x.shape[1] for x in xs),
    extras=(bias is not None, outer is not None, mask is not None),
    relu=relu,
    blocks=blocks,
  )
  scratch = [
    *_ring(_PRODUCT_STAGES, (_ROWS, _DEPTH), (_DEPTH, _COLS)),
    plgpu.SMEM(
      (_WARPGROUPS, _COLS // _SUB, _ROWS // _WARPGROUPS, _SUB),
      jnp.bfloat16,
      transforms=_TRANSFORMS,
    ),
    plgpu.Barrier(num_arrivals=_COLS // _SUB, num_barriers=_WARPGROUPS),
  ]
  extras = [*([] if bias is None else [bias]), *(outer or ()), *([] if mask is None else [mask])]
  out = jax.ShapeDtypeStruct((m, n), jnp.bfloat16)
  return _call(body, out, scratch, blocks, interpret)(*xs, *ws, *extras)


def _product_kernel(*refs, depths, extras, relu, blocks):
  refs = list(refs)
  take = lambda wanted: refs.pop(0) if wanted else None  # noqa: E731
  has_bias, has_outer, has_mask = extras
  xs, ws = [take(True) for _ in depths], [take(True) for _ in depths]
  bias, by_row, by_col, mask = take(has_bias), take(has_outer), take(has_outer), take(has_mask)
  out, x_ring, w_ring, full, empty, result, mask_came = refs

  across = out.shape[1] // _COLS
  tiles = (out.shape[0] // _ROWS) * across
  steps = sum(depths) // _DEPTH  # Of each tile.
  stages, half = _PRODUCT_STAGES, _ROWS // _WARPGROUPS
  warpgroup, block = lax.axis_index('warpgroup'), lax.axis_index('block')
  mine = lax.div(tiles - block + blocks - 1, blocks)

  def corner(i):
    """Where this block's i-th tile begins: blocks side by side share rows of x in the cache."""
    tile = block + i * blocks
    return lax.div(tile, across) * _ROWS, lax.rem(tile, across) * _COLS

  @pl.when(warpgroup == _WARPGROUPS)
  def _fetch():
    def fetch(step, slot):
      row, col = corner(lax.div(step, steps))

      def copy(x, w, k):
        depth = pl.ds(k * _DEPTH, _DEPTH)
        plgpu.copy_gmem_to_smem(x.at[pl.ds(row, _ROWS), depth], x_ring.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(w.at[depth, pl.ds(col, _COLS)], w_ring.at[slot], full.at[slot])

      k = lax.rem(step, steps)
      if len(xs) == 1:
        copy(xs[0], ws[0], k)
      else:
        first = depths[0] // _DEPTH
        pl.when(k < first)(lambda: copy(xs[0], ws[0], k))
        pl.when(k >= first)(lambda: copy(xs[1], ws[1], k - first))

    _fetch_all(mine * steps, stages, empty, fetch)

  @pl.when(warpgroup < _WARPGROUPS)
  def _multiply():
    plgpu.set_max_registers(_MULTIPLY_REGISTERS, action='increase')
    my_rows = pl.ds(warpgroup * half, half)
    pieces = range(_COLS // _SUB)

    def one_tile(i, _):
      row, col = corner(i)
      row = row + warpgroup * half

      def piece_of(ref, p):
        return ref.at[pl.ds(row, half), pl.ds(col + p * _SUB, _SUB)]

      def accumulate(acc):
        def step(k, acc):
          at = i * steps + k
          slot = lax.rem(at, stages)
          plgpu.barrier_wait(full.at[slot])
          plgpu.wgmma(acc, x_ring.at[slot].at[my_rows], w_ring.at[slot])
          plgpu.wgmma_wait(1)  # The step before is done with its place in the ring.
          pl.when(k > 0)(lambda: plgpu.barrier_arrive(empty.at[lax.rem(at - 1, stages)]))
          return acc

        lax.fori_loop(0, _MASK_STEP, step, acc)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if has_mask:
          for p in pieces:
            plgpu.copy_gmem_to_smem(
              piece_of(mask, p), result.at[warpgroup, p], mask_came.at[warpgroup]
            )
        lax.fori_loop(_MASK_STEP, steps, step, acc)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(empty.at[lax.rem(i * steps + steps - 1, stages)])
        return acc[...]

      acc = pl.run_scoped(accumulate, plgpu.ACC((half, _COLS), jnp.float32))
      if has_mask:
        plgpu.barrier_wait(mask_came.at[warpgroup])

      def vector(ref, start, size, axis):
        """Part of a vector, spread over the axis of a piece that it does not run along."""
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        part = plgpu.load(ref, (pl.ds(start, size),), layout=layout, optimized=False)
        return lax.broadcast_in_dim(part, (half, _SUB), [axis])

      for p in pieces:
        piece = acc[:, p * _SUB : (p + 1) * _SUB]
        if has_bias:
          piece += vector(bias, col + p * _SUB, _SUB, 1)
        if has_outer:
          piece += vector(by_row, row, half, 0) * vector(by_col, col + p * _SUB, _SUB, 1)
        if relu:
          piece = jnp.maximum(piece, 0.0)
        if has_mask:
          piece = jnp.where(result[warpgroup, p] > 0, piece, 0.0)
        result[warpgroup, p] = piece.astype(jnp.bfloat16)
      plgpu.commit_smem()
      for p in pieces:
        plgpu.copy_smem_to_gmem(result.at[warpgroup, p], piece_of(out, p))

    lax.fori_loop(0, mine, one_tile, None)
    plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnames=('blocks', 'interpret'))
def weight_gradient(
  x: Array, g: Array, *, blocks: int | None = None, interpret=None
) -> tuple[Array, Array]:
  """A dense layer's gradients: x^T g [k, n] and the sum of g's rows [n], float32.

  Args:
    x: [m, k] bfloat16, the layer's input.
    g: [m, n] bfloat16, the gradient of what it gave before its ReLU.
    blocks: how many run at a time (None: one for each multiprocessor).
    interpret: Pallas' parameters for running without a GPU.
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
    plgpu.SMEM((_WARPGROUPS, _SUB, _DEPTH), jnp.bfloat16, transforms=_TRANSFORMS),
  ]
  dw, rows = _call(body, outs, scratch, parts * down * across, interpret)(x, g)
  return jnp.sum(dw, 0), jnp.sum(rows[:, :, 0], (0, 1))


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
      # Of every `down` steps block i begins with the i-th, whose rows it also sums.
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
          done = empty.at[lax.rem(step + stages - 1, stages)]  # The step before.
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
    row_sums[part, i, :, cols] = totals[1]  # Each of its rows is the sum.
