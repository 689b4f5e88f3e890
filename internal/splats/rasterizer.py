"""Draws Gaussians tile by tile, differentiably (Kerbl et al. 2023, section 6), in plain XLA.

1. Gaussians are sorted by depth, and each is repeated for the tiles that its box touches: a *pair*.
   Tiles have 16 x 16 pixels, on a CPU 8 x 8: fewer pixels outside of the box, but more pairs. A
   stable sort of the pairs by tile gives every tile its list by depth.
2. Tiles are drawn in groups of similar list length. A group walks its lists in chunks, front to
   back, until the longest ends or all its pixels are opaque.
3. The gradient walks the same lists again, front to back: what lies behind a Gaussian is the
   finished picture less what lies in front, so only the picture and its transmittance are kept.

On NVIDIA GPUs, `tile_kernel` does 2 and 3 for each tile in one kernel, with the same results.

All shapes are static: the number of pairs has a capacity, and a picture tells how many did not fit.
Those are the farthest ones. Shapes: `n` Gaussians, `m` pairs, `t` tiles, `g` tiles of a group, `c`
Gaussians of a chunk, `p` pixels of a tile.

Memory: 8 bytes a pair while the lists are sorted and twice that for the sort, 100 bytes a Gaussian
for what is projected, and about ten arrays of g c p floats for a chunk. Work: about 25 operations
and one exponential for each pair and each pixel of its tile, three times that with gradients.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from . import gaussians, tile_kernel

Array = jax.Array

TILE, _CPU_TILE = tile_kernel.TILE, 8  # Pixels along a side of a tile.
_CHUNK = 32
_CPU_GROUP, _GPU_GROUP = 16, 256  # Tiles drawn at once.
_FEATURES = 9  # x, y, conic (3), opacity, rgb (3).


@flax.struct.dataclass
class Picture:
  """A drawn picture."""

  rgb: Array  # [h, w, 3]
  acc: Array  # [h, w] opacity.
  pairs: Array  # [] int32, pairs of Gaussian and tile that the picture needs.
  overflow: Array  # [] int32, those of them that did not fit and are not drawn.


@flax.struct.dataclass
class _Lists:
  """Gaussians of each tile, by depth."""

  ids: Array  # [m] int32, Gaussians of all tiles' lists, one after the other.
  begin: Array  # [t] int32, where a tile's list begins.
  end: Array  # [t] int32
  segments: tile_kernel.Segments
  needed: Array  # [] int32
  side: int = flax.struct.field(pytree_node=False)  # Of a tile, in pixels.


def render(
  splats: gaussians.Splats, camera: gaussians.Pinhole, background: Array, capacity: int
) -> Picture:
  """Draws Gaussians.

  Args:
    splats: n Gaussians.
    camera: the camera, whose size is static.
    background: [3] colour behind everything.
    capacity: static, the most pairs of Gaussian and tile; see `Picture.overflow`.
  """
  return draw(gaussians.project(splats, camera), camera.size, background, capacity)


def draw(
  projected: gaussians.Projected, size: tuple[int, int], background: Array, capacity: int
) -> Picture:
  """Draws Gaussians that are projected already; the arguments are those of `render`."""
  side = _tile_side()
  lists = _make_lists(jax.lax.stop_gradient(projected), size, capacity, side)
  parts = projected.xy, projected.conic, projected.opacity[:, None], projected.rgb
  # [t, 3, p], [t, p]
  colors, through = _blend(jnp.concatenate(parts, -1), lists, _tiles(size, side)[0])
  colors = colors + through[:, None] * background[None, :, None]
  picture = _untile(jnp.concatenate([colors, 1 - through[:, None]], 1), size, side)
  overflow = jnp.maximum(lists.needed - capacity, 0)
  return Picture(picture[..., :3], picture[..., 3], lists.needed, overflow)


@functools.partial(jax.jit, static_argnames='size')
def count_pairs(projected: gaussians.Projected, size: tuple[int, int]) -> Array:
  """Counts the pairs that a picture of width and height `size` needs: [] int32."""
  return jnp.sum(jnp.prod(jnp.diff(_boxes(projected, size, _tile_side()), axis=1)[:, 0], -1))


def _tile_side() -> int:
  return _CPU_TILE if jax.default_backend() == 'cpu' else TILE


def _tiles(size: tuple[int, int], side: int) -> tuple[int, int]:
  """Returns the number of tiles along x and y."""
  return -(-size[0] // side), -(-size[1] // side)


def _boxes(projected: gaussians.Projected, size: tuple[int, int], side: int) -> Array:
  """Returns the tiles that Gaussians touch: [n, 2, 2] int32, first and past the last, (x, y)."""
  bounds = jnp.stack([projected.xy - projected.reach, projected.xy + projected.reach], 1)
  most = jnp.array(_tiles(size, side), jnp.float32)[None, None]
  drawn = (projected.opacity > 0)[:, None, None]
  tiles = jnp.stack([jnp.floor(bounds[:, 0] / side), jnp.floor(bounds[:, 1] / side) + 1], 1)
  return jnp.where(drawn, jnp.clip(tiles, 0, most), 0).astype(jnp.int32)


def _make_lists(
  projected: gaussians.Projected, size: tuple[int, int], capacity: int, side: int = TILE
) -> _Lists:
  """Lists the Gaussians of each tile by depth."""
  across, down = _tiles(size, side)
  count, depth = across * down, jnp.where(projected.opacity > 0, projected.depth, jnp.inf)
  number = jnp.arange(len(depth), dtype=jnp.int32)
  order = jax.lax.sort((depth, number), num_keys=1, is_stable=True)[1]
  box = _boxes(projected, size, side)[order]  # [n, 2, 2]
  sides = box[:, 1] - box[:, 0]  # [n, 2]
  ends = jnp.cumsum(sides[:, 0] * sides[:, 1])
  pair = jnp.arange(capacity, dtype=jnp.int32)
  rank = jnp.searchsorted(ends, pair, side='right')  # [m] which Gaussian by depth.
  used = pair < ends[-1]
  rank = jnp.where(used, rank, 0)
  width = jnp.maximum(sides[rank, 0], 1)
  place = pair - (ends[rank] - sides[rank, 0] * sides[rank, 1])  # Number of the tile in the box.
  tile = (box[rank, 0, 1] + place // width) * across + box[rank, 0, 0] + place % width
  tile = jnp.where(used, tile, count)
  tile, ids = jax.lax.sort((tile, order[rank]), num_keys=1, is_stable=True)
  edges = jnp.searchsorted(tile, jnp.arange(count + 1, dtype=jnp.int32)).astype(jnp.int32)
  begin, end = edges[:-1], edges[1:]
  return _Lists(ids, begin, end, tile_kernel.cut(begin, end, capacity), ends[-1], side)


def _groups(lists: _Lists) -> Array:
  """Returns tiles [groups, g] by length of their lists; -1 fills the last group."""
  count = len(lists.begin)
  size = min(_CPU_GROUP if jax.default_backend() == 'cpu' else _GPU_GROUP, count)
  order = jnp.argsort(lists.begin - lists.end).astype(jnp.int32)
  return jnp.pad(order, (0, -count % size), constant_values=-1).reshape(-1, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _blend(features: Array, lists: _Lists, across: int) -> tuple[Array, Array]:
  """Composites each tile's list: colours [t, 3, p] without background, and what passes [t, p]."""
  return _blend_forward(features, lists, across)[0]


def _rows(features: Array, lists: _Lists) -> Array:
  """Returns the features of each pair: [m, 16]."""
  return jnp.pad(features, ((0, 0), (0, tile_kernel.ROW - _FEATURES)))[lists.ids]


def _blend_groups(features: Array, lists: _Lists, across: int) -> tuple[Array, Array]:
  """Computes `_blend` in groups of tiles."""

  def draw_group(_, tiles):
    state = jnp.zeros((len(tiles), 3, lists.side**2)), jnp.ones((len(tiles), lists.side**2))

    def step(k, state):
      color, through = state
      f, _ = _chunk(features, lists, tiles, k)
      weight, after = _weights(f, _pixels(tiles, across, lists.side), through)[:2]
      return color + jnp.einsum('gcp,gcf->gfp', weight, f[..., 6:], precision='highest'), after

    return None, _walk(lists, tiles, step, state, 1)

  groups = _groups(lists)
  drawn = jax.lax.scan(draw_group, None, groups)[1]  # [groups, g, ...]
  return tuple(_by_tile(part, groups, len(lists.begin)) for part in drawn)


def _blend_forward(features, lists, across):
  in_groups = functools.partial(_blend_groups, across=across)
  if lists.side != TILE:  # The kernel draws tiles of TILE only.
    drawn = in_groups(features, lists)
    return drawn, (features, lists, drawn)

  def by_kernel(features, lists):
    rows = _rows(features, lists)
    return tile_kernel.draw(rows, lists.begin, lists.end, lists.segments, across)

  def plain(features, lists):
    return *in_groups(features, lists), jnp.zeros((len(lists.segments.tile), 4, TILE**2))

  drawn = jax.lax.platform_dependent(features, lists, cuda=by_kernel, default=plain)
  return drawn[:2], (features, lists, drawn)


def _blend_backward(across, kept, gradients):
  features, lists, drawn = kept
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), lists)
  in_groups = functools.partial(_differentiate_groups, across)
  by_kernel = functools.partial(_sum_rows, across)
  if lists.side != TILE:
    return in_groups(features, lists, drawn, gradients), zeros
  total = jax.lax.platform_dependent(
    features, lists, drawn, gradients, cuda=by_kernel, default=in_groups
  )
  return total, zeros


def _sum_rows(across, features, lists, drawn, gradients):
  """Sums the derivatives of a Gaussian's pairs: [n, 9]."""
  rows = _rows(features, lists)
  parts = tile_kernel.gradients(
    rows, lists.begin, lists.end, lists.segments, across, drawn, *gradients
  )
  used = jnp.arange(len(rows)) < lists.end[-1]
  ids = jnp.where(used, lists.ids, len(features))  # Others would all be added to one row.
  return jnp.zeros_like(features).at[ids].add(parts[:, :_FEATURES], mode='drop')


def _differentiate_groups(across, features, lists, drawn, gradients):
  """Walks the lists again. With T_i the light that reaches Gaussian i, S_i what lies behind it:

  d color / d alpha_i = T_i c_i - S_i / (1 - alpha_i), and d through / d alpha_i is
  -through / (1 - alpha_i).
  """
  colors, through = drawn[:2]
  groups = _groups(lists)

  def group(total, tiles):
    row = jnp.maximum(tiles, 0)
    g_color, g_through = gradients[0][row], gradients[1][row]  # [g, 3, p], [g, p]
    final = jnp.sum(g_color * colors[row], 1) + g_through * through[row]  # [g, p]

    def step(k, state):
      total, front, reach = state  # front [g, p]: the part of `final` in front of the chunk.
      f, ids = _chunk(features, lists, tiles, k)
      weight, after, alpha, dx, dy, before = _weights(f, _pixels(tiles, across, lists.side), reach)
      own = jnp.einsum('gcf,gfp->gcp', f[..., 6:], g_color, precision='highest')
      so_far = front[:, None] + _running(jnp.add, weight * own, 0)
      g_alpha = before * own - (final[:, None] - so_far) / (1 - alpha)
      g_alpha = jnp.where((alpha > 0) & (alpha < gaussians.MAX_ALPHA), g_alpha, 0)
      slope = g_alpha * alpha  # The derivative by the logarithm of alpha.
      sums = [jnp.sum(slope * part, -1) for part in (dx, dy, dx * dx, dx * dy, dy * dy, 1)]
      g_rgb = jnp.einsum('gcp,gfp->gcf', weight, g_color, precision='highest')
      update = jnp.concatenate([_feature_gradients(f, sums), g_rgb], -1)
      return total.at[ids].add(update, mode='drop'), so_far[:, -1], after

    state = total, jnp.zeros_like(final), jnp.ones_like(final)
    return _walk(lists, tiles, step, state, 2)[0], None

  return jax.lax.scan(group, jnp.zeros_like(features), groups)[0]


_blend.defvjp(_blend_forward, _blend_backward)


def _feature_gradients(f: Array, sums: list[Array]) -> Array:
  """Turns sums over pixels of d loss / d log alpha times 1 and offsets into gradients [g, c, 6]."""
  x, y, xx, xy, yy, one = sums
  gradients = [
    f[..., 2] * x + f[..., 3] * y,
    f[..., 3] * x + f[..., 4] * y,
    -0.5 * xx,
    -xy,
    -0.5 * yy,
    one / jnp.where(f[..., 5] > 0, f[..., 5], 1),
  ]
  return jnp.stack(gradients, -1)


def _walk(lists: _Lists, tiles: Array, step, state, through: int):
  """Repeats `step(chunk, state)` until all lists end or `state[through]`, [g, p], is opaque."""
  row = jnp.maximum(tiles, 0)
  length = jnp.where(tiles >= 0, lists.end[row] - lists.begin[row], 0)  # [g]

  def unfinished(loop):
    k, state = loop
    return jnp.any((length > k * _CHUNK) & (jnp.max(state[through], -1) > tile_kernel.OPAQUE))

  return jax.lax.while_loop(
    unfinished, lambda loop: (loop[0] + 1, step(loop[0], loop[1])), (jnp.int32(0), state)
  )[1]


def _chunk(features: Array, lists: _Lists, tiles: Array, k: Array) -> tuple[Array, Array]:
  """Returns the k-th chunk of the tiles' lists: features [g, c, 9], and rows [g, c], n for none."""
  row = jnp.maximum(tiles, 0)
  place = lists.begin[row][:, None] + k * _CHUNK + jnp.arange(_CHUNK)[None]  # [g, c]
  listed = (place < lists.end[row][:, None]) & (tiles >= 0)[:, None]
  ids = lists.ids[jnp.minimum(place, len(lists.ids) - 1)]
  f = jnp.where(listed[..., None], features[ids], 0)  # No opacity: alpha is 0.
  return f, jnp.where(listed, ids, len(features))


def _pixels(tiles: Array, across: int, side: int) -> tuple[Array, Array]:
  """Returns the centres x, y [g, p] of the pixels of tiles [g], in rows of `across` tiles."""
  pixel = np.arange(side**2)
  x = (tiles % across * side)[:, None] + (pixel % side + 0.5)[None]
  y = (tiles // across * side)[:, None] + (pixel // side + 0.5)[None]
  return x, y


def _weights(f: Array, pixels: tuple[Array, Array], through: Array) -> tuple[Array, ...]:
  """Computes a chunk's compositing weights.

  Args:
    f: [g, c, 9] features.
    pixels: x and y [g, p] of the tiles' pixels.
    through: [g, p] light that passes what lies in front.

  Returns:
    Weights [g, c, p]; the light that passes the chunk [g, p]; alpha, the offsets of pixels from
    Gaussians dx and dy, and the light that reaches each Gaussian, [g, c, p] each.
  """
  x, y = pixels
  dx, dy = x[:, None] - f[..., 0, None], y[:, None] - f[..., 1, None]  # [g, c, p]
  xx, xy, yy, opacity = (f[..., k, None] for k in (2, 3, 4, 5))
  power = 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy
  alpha = jnp.minimum(opacity * jnp.exp(-power), gaussians.MAX_ALPHA)
  alpha = jnp.where(alpha >= gaussians.MIN_ALPHA, alpha, 0)
  passed = _running(jnp.multiply, 1 - alpha, 1)
  before = jnp.pad(passed[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=1) * through[:, None]
  shown = before > tile_kernel.OPAQUE  # The pixel is not finished.
  alpha = jnp.where(shown, alpha, 0)
  after = jnp.max(jnp.where(shown, (through * passed[:, -1])[:, None], before), 1)
  return alpha * before, after, alpha, dx, dy, before


def _running(combine, x: Array, start: float) -> Array:
  """Accumulates along axis 1 of [g, c, p] in log2(c) steps, where XLA's own scans take longer."""
  reach = 1
  while reach < x.shape[1]:
    shifted = jnp.pad(x[:, :-reach], ((0, 0), (reach, 0), (0, 0)), constant_values=start)
    x, reach = combine(x, shifted), 2 * reach
  return x


def _by_tile(parts: Array, groups: Array, count: int) -> Array:
  """Orders results of groups [groups, g, ...] by tile: [t, ...]."""
  flat = parts.reshape(-1, *parts.shape[2:])
  place = jnp.zeros(count + 1, jnp.int32).at[groups.ravel()].set(jnp.arange(len(flat)))
  return flat[place[:-1]]


def _untile(tiles: Array, size: tuple[int, int], side: int) -> Array:
  """Joins tiles [t, k, p] to a picture [h, w, k]."""
  (across, down), k = _tiles(size, side), tiles.shape[1]
  picture = tiles.reshape(down, across, k, side, side).transpose(0, 3, 1, 4, 2)
  return picture.reshape(down * side, across * side, k)[: size[1], : size[0]]
