"""Multi-resolution hash grids: interpolated features of points in a cube.

Points x [..., 3] and scales [...] are in units of the cube's side, so x is in [0, 1]. A level with
resolution n has n cells along each axis and f features at each of its (n + 1)^3 vertices. Its table
[size, f] has a row per vertex if that fits, otherwise a row per hash value (arXiv:2201.05989,
section 3).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from .. import math
from . import grid_tpu

Array = jax.Array

_RADIUS = 2.0  # The cube is [-2, 2]^3, which encloses the ball of contracted points.
_PRIMES = (1, 2654435761, 805459861)  # The hash of arXiv:2201.05989, Eq. 4.
_CORNERS = np.arange(8, dtype=np.uint32)  # Bit i is 1 for the upper end of axis i.
_ENOUGH_ROWS = 2**18  # In tables of this size, atomic adds rarely collide in one row.


def resolutions(levels: int, low: int, high: int) -> tuple[int, ...]:
  """Returns each level's cells per axis: a geometric series from `low` to `high`, rounded."""
  steps = max(levels - 1, 1)
  return tuple(round(low * (high / low) ** (i / steps)) for i in range(levels))


def table_size(resolution: int, log2_size: int) -> int:
  """Returns the number of rows of a level's table: one per vertex, at most 2^log2_size."""
  return min((resolution + 1) ** 3, 2**log2_size)


def in_cube(mean: Array, cov: Array) -> tuple[Array, Array]:
  """Converts Gaussians to points with scales, in units of the cube.

  Contracted points lie inside the cube. Without contraction, points outside [-2, 2]^3 are clipped
  to its boundary.

  Args:
    mean: [..., 3].
    cov: [..., 3, 3].

  Returns:
    Points x [..., 3] in [0, 1], and scales [...].
  """
  x = jnp.clip(mean / (2 * _RADIUS) + 0.5, 0, 1)
  return x, isotropic_scale(cov) / (2 * _RADIUS)


def isotropic_scale(cov: Array) -> Array:
  """Computes det(cov)^(1/6), the geometric mean of a Gaussian's standard deviations.

  For an isotropic Gaussian that was warped with Jacobian J, this is its scale times det(J)^(1/3),
  as in arXiv:2304.06706. The determinant comes from Gaussian elimination: as a sum of products,
  cancellation would lose all digits for a long thin Gaussian. Pivots are at least float32's
  resolution of the largest axis, so the scale is positive.

  Args:
    cov: [..., 3, 3], positive semidefinite up to rounding.

  Returns:
    Scales [...].
  """
  a, b, c = cov[..., 0, 0], cov[..., 1, 1], cov[..., 2, 2]
  ab, ac, bc = cov[..., 0, 1], cov[..., 0, 2], cov[..., 1, 2]
  least = jnp.maximum(math.EPS * (a + b + c), math.SMALL)
  first = jnp.maximum(a, least)
  second = jnp.maximum(b - ab / first * ab, least)
  rest = bc - ab / first * ac
  third = jnp.maximum(c - ac / first * ac - rest / second * rest, least)
  return jnp.exp((jnp.log(first) + jnp.log(second) + jnp.log(third)) / 6)


def fading(scale: Array, resolution: int) -> Array:
  """Computes the weight of a level's features: near 1 for small scales, near 0 for large ones.

  This is erf(1 / sqrt(8 s^2 n^2)), the downweighting of arXiv:2304.06706: the fraction of a
  Gaussian's mass within half a cell of its mean, along one axis.
  """
  return jax.scipy.special.erf(1 / (8**0.5 * resolution * scale))


@jax.custom_vjp
def apart(x: Array) -> Array:
  """Returns x behind an optimization barrier; the gradient passes without one."""
  return jax.lax.optimization_barrier(x)


apart.defvjp(lambda x: (apart(x), None), lambda _, d_out: (d_out,))


def _cells(x: Array, resolution: int) -> list[tuple[Array, Array]]:
  """Returns for each axis the index [...] of the cell that contains x, and the position in it."""
  cells = []
  for axis in range(3):
    position = x[..., axis] * resolution  # [...]
    cell = jnp.clip(jnp.floor(jax.lax.stop_gradient(position)), 0, resolution - 1)
    cells.append((cell.astype(jnp.uint32), position - cell))
  return cells


def _is_dense(resolution: int, size: int) -> bool:
  """Returns whether a table of so many rows has one per vertex."""
  return (resolution + 1) ** 3 <= size


def _strides(resolution: int | Array, dense: bool) -> tuple[Array, Array, Array]:
  """Returns the factors of the coordinates x, y and z in the number of a row."""
  side = jnp.uint32(resolution) + 1
  return (jnp.uint32(1), side, side * side) if dense else tuple(map(np.uint32, _PRIMES))


def _corner(cells, resolution: int, size: int, corner: np.ndarray) -> tuple[Array, Array]:
  """Returns the table row and the trilinear weight of a corner of the cells.

  Args:
    cells: from `_cells`.
    resolution: cells per axis.
    size: rows of the table.
    corner: 0 to 7, one bit per axis; they broadcast with [...].
  """
  dense = _is_dense(resolution, size)
  strides = _strides(resolution, dense)
  row, weight = jnp.uint32(0), 1.0
  for axis, ((cell, high), stride) in enumerate(zip(cells, strides)):
    upper = corner >> axis & 1
    along = (cell + upper) * stride  # Wraps at 2^32, as the hash requires.
    row = row + along if dense else row ^ along
    weight *= jnp.where(upper, high, 1 - high)
  return (row if dense else row & np.uint32(size - 1)), weight


def _places(table: Array, x: Array, resolution: int) -> grid_tpu.Places:
  """Returns where the corners around points x [..., 3] are in a table, for the TPU kernels."""
  cells = [(cell[None], high[None]) for cell, high in _cells(x.reshape(-1, 3), resolution)]
  return grid_tpu.locate(*_corner(cells, resolution, len(table), _CORNERS[:, None]))  # [8, m]


def _features(table: Array, x: Array, resolution: int) -> Array:
  """Computes `lookup` with the TPU kernels where they run."""
  if not grid_tpu.fits(table):
    return _interpolate(table, x, resolution)
  features = grid_tpu.read(table, _places(table, x, resolution))  # [m, f], padded
  shape = *x.shape[:-1], table.shape[1]
  return features[: np.prod(shape[:-1], dtype=int)].reshape(shape)


def _interpolate(table: Array, x: Array, resolution: int) -> Array:
  """Computes `lookup`, differentiable by autodiff with respect to x."""
  return _weighted_sum(table, x, resolution, _is_dense(resolution, len(table)))


# Traced once for all levels that hash into tables of one size.
@functools.partial(jax.jit, static_argnames='dense', inline=True)
def _weighted_sum(table: Array, x: Array, resolution: int | Array, dense: bool) -> Array:
  """Computes `lookup` for a level whose table has a row per vertex (`dense`), or hashes."""
  cells, total = _cells(x, resolution), 0.0
  strides = _strides(resolution, dense)
  # Of each axis, the parts of row and weight at the lower and at the upper end of the cell.
  rows = [(cell * n, cell * n + n) for (cell, _), n in zip(cells, strides)]
  weights = [(1 - high, high) for _, high in cells]
  # XLA fuses eight small gathers with their sum, and stores no intermediate results. `_corner` for
  # each of them would be slower to trace.
  for ends in itertools.product((0, 1), repeat=3):  # Of z, y and x.
    x_row, y_row, z_row = (row[end] for row, end in zip(rows, ends[::-1]))
    x_weight, y_weight, z_weight = (weight[end] for weight, end in zip(weights, ends[::-1]))
    row = x_row + y_row + z_row if dense else (x_row ^ y_row ^ z_row) & np.uint32(len(table) - 1)
    weight = x_weight * y_weight * z_weight
    total += weight[..., None] * table.at[row].get(mode='promise_in_bounds')  # [..., f]
  return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(
  table: Array, x: Array, resolution: int, deterministic: bool = False, after: Array | None = None
) -> Array:
  """Interpolates a level's features trilinearly.

  Args:
    table: [size, f]; size is the number of vertices or a power of two.
    x: [..., 3] in [0, 1].
    resolution: cells per axis of the level.
    deterministic: make the table's gradient bitwise reproducible. By default a GPU adds in the
      order in which its threads arrive. Sorting and scanning eight rows per point instead takes
      several times the time and memory.
    after: an array to compute first, such as another level's features, or None.

  Returns:
    Features [..., f].
  """
  # GPUs are faster with one small kernel per level than with one that fuses several levels.
  x, _ = jax.lax.optimization_barrier((x, after))
  return jax.lax.optimization_barrier(_features(table, x, resolution))


def _forward(table, x, resolution, deterministic, after):
  after = None if after is None else after.value
  out = lookup(table.value, x.value, resolution, deterministic, after)
  return out, (table.value, x.value, x.value if x.perturbed else None)


def _backward(resolution, deterministic, residuals, d_out):
  table, x, perturbed_x = residuals
  d_table = _table_gradient(table, x, resolution, deterministic, d_out)
  d_x = None
  if perturbed_x is not None:  # Not in training: skipping it halves the time to trace.
    (d_x,) = jax.vjp(lambda x: _interpolate(table, x, resolution), perturbed_x)[1](d_out)
  return d_table, d_x, None


def _table_gradient(table, x, resolution, deterministic, d_out):
  """Returns the gradient [size, f] of a table, for a gradient [..., f] of features at x."""
  if grid_tpu.fits(table):  # Adds in the order of the points: reproducible.
    places = _places(table, x, resolution)
    return grid_tpu.add(len(table), places, d_out.reshape(-1, table.shape[1]))
  flat, d_rows = x.reshape(-1, 1, 3), d_out.reshape(-1, 1, table.shape[-1])  # [m, 1, 3], [m, 1, f]
  cells = _cells(flat, resolution)
  rows, weights = _corner(cells, resolution, len(table), _CORNERS[None])  # [m, 8]
  updates = weights[..., None] * d_rows  # [m, 8, f]
  if deterministic:
    return sorted_add(
      jnp.zeros_like(table), rows.reshape(-1), updates.reshape(-1, d_rows.shape[-1])
    )
  copies = _copies(len(table)) if jax.default_backend() == 'gpu' else 1
  return scatter_add(jnp.zeros_like(table), rows, updates, copies)


lookup.defvjp(_forward, _backward, symbolic_zeros=True)


def scatter_add(table: Array, rows: Array, updates: Array, copies: int = 1) -> Array:
  """Adds updates [m, k, f] to rows [m, k] of a table [size, f].

  GPUs serialise atomic adds to the same address, and in a small table many points share a row. With
  several copies of the table, which are summed at the end, neighbours along m do not collide.
  """
  if copies == 1:
    return table.at[rows].add(updates, mode='promise_in_bounds')
  offset = jnp.arange(len(rows), dtype=jnp.uint32)[:, None] % copies * len(table)  # [m, 1]
  sums = jnp.zeros((copies * len(table), table.shape[1]), table.dtype)
  sums = sums.at[rows + offset].add(updates, mode='promise_in_bounds')
  return table + sums.reshape(copies, *table.shape).sum(0)  # [size, f]


def _copies(size: int) -> int:
  """Returns the number of copies of a table for `scatter_add` on GPUs, a power of two."""
  copies = 1
  while 2 * copies * size <= _ENOUGH_ROWS:
    copies *= 2
  return copies


def sorted_add(table: Array, rows: Array, updates: Array) -> Array:
  """Adds updates [m, f] to rows [m] of a table, in an order that depends only on the rows.

  A stable sort brings the updates of a row together. A segmented scan sums them, and only the last
  partial sum of each row is written.
  """
  rows, order = jax.lax.sort_key_val(rows, jnp.arange(len(rows), dtype=jnp.int32))
  changes = rows[1:] != rows[:-1]
  one = jnp.ones((1,), bool)

  def join(a, b):
    return a[0] | b[0], jnp.where(b[0], b[1], a[1] + b[1])

  starts = jnp.concatenate([one, changes])[:, None]
  _, sums = jax.lax.associative_scan(join, (starts, updates[order]))  # [m, f]
  last = jnp.concatenate([changes, one])
  return table.at[jnp.where(last, rows, len(table))].add(sums, mode='drop')
