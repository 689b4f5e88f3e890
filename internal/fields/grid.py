"""Multi-resolution hash grids: features of points in a cube, by lookups in tables.

Points `x` [..., 3] and their scales [...] are in units of the cube's side: [0, 1]. A level of
resolution n has n cells along each axis, and a vector of `f` numbers at each of its (n + 1)^3
vertices; `table` [size, f] has a row for each where that fits, and else a row for each value of a
hash (arXiv:2201.05989, section 3).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from .. import math

Array = jax.Array

_RADIUS = 2.0  # The cube is [-2, 2]^3 of the fields' space, around the ball of contracted points.
_PRIMES = (1, 2654435761, 805459861)  # Of arXiv:2201.05989, Eq. 4.
_CORNERS = np.arange(8, dtype=np.uint32)
_ROWS_ENOUGH = 2**18  # Tables with so many are seldom added to at one row by several at a time.


def resolutions(levels: int, low: int, high: int) -> tuple[int, ...]:
  """Cells along an axis for each level: a geometric series from `low` to `high`, rounded."""
  steps = max(levels - 1, 1)
  return tuple(round(low * (high / low) ** (i / steps)) for i in range(levels))


def table_size(resolution: int, log2_size: int) -> int:
  """Rows of a level's table: one for each vertex if at most 2^log2_size, and else that."""
  return min((resolution + 1) ** 3, 2**log2_size)


def in_cube(mean: Array, cov: Array) -> tuple[Array, Array]:
  """Gaussians as points with a scale each, in units of the cube.

  Contracted points lie inside of it. Without contraction the scene has to lie in [-2, 2]^3: points
  outside are taken at the boundary.

  Args:
    mean: [..., 3].
    cov: [..., 3, 3].

  Returns:
    x [..., 3] in [0, 1], scale [...].
  """
  x = jnp.clip(mean / (2 * _RADIUS) + 0.5, 0, 1)
  return x, isotropic_scale(cov) / (2 * _RADIUS)


def isotropic_scale(cov: Array) -> Array:
  """det(cov)^(1/6): the geometric mean of a Gaussian's standard deviations.

  For an isotropic one that went through a linearised warp it is its scale times det(J)^(1/3), as in
  arXiv:2304.06706. By elimination: rounding would leave nothing of the determinant of
  a long thin Gaussian as a sum of products, while here each pivot keeps its digits. A pivot below
  float32's resolution of the largest axis is taken to be that, so the scale is positive.

  Args:
    cov: [..., 3, 3], positive semidefinite but for rounding.

  Returns:
    [...]
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
  """How much of a level is left to points of a scale: 1 for small ones, 0 for large ones.

  erf(1 / sqrt(8 s^2 n^2)), the downweighting of arXiv:2304.06706: the part of a Gaussian that is
  within half a cell of its mean, along one axis.
  """
  return jax.scipy.special.erf(1 / (8**0.5 * resolution * scale))


@jax.custom_vjp
def apart(x: Array) -> Array:
  """The same, computed before anything that is made of it begins; gradients pass as they are."""
  return jax.lax.optimization_barrier(x)


apart.defvjp(lambda x: (apart(x), None), lambda _, d_out: (d_out,))


def _cells(x: Array, resolution: int) -> list[tuple[Array, Array]]:
  """For each axis: the cells that hold x [..., 3], counted from 0, and where in them it is."""
  cells = []
  for axis in range(3):
    position = x[..., axis] * resolution
    cell = jnp.clip(jnp.floor(jax.lax.stop_gradient(position)), 0, resolution - 1)
    cells.append((cell.astype(jnp.uint32), position - cell))
  return cells


def _corner(cells, resolution: int, size: int, corner: np.ndarray) -> tuple[Array, Array]:
  """Row of the table, and trilinear weight, of a corner of `_cells`.

  Corners are numbered 0 to 7, a bit for each axis; several broadcast with [...].
  """
  dense = (resolution + 1) ** 3 <= size
  strides = (1, resolution + 1, (resolution + 1) ** 2) if dense else _PRIMES
  row, weight = jnp.uint32(0), 1.0
  for axis, ((cell, high), stride) in enumerate(zip(cells, strides)):
    upper = corner >> axis & 1
    along = (cell + upper) * np.uint32(stride)  # Modulo 2^32, as the hash would have it.
    row = row + along if dense else row ^ along
    weight *= jnp.where(upper, high, 1 - high)
  return (row if dense else row & np.uint32(size - 1)), weight


def _interpolate(table: Array, x: Array, resolution: int) -> Array:
  """`lookup`, for autodiff in x alone."""
  # Eight small lookups: a compiler joins them with their sum and stores nothing in between.
  cells, total = _cells(x, resolution), 0.0
  for corner in _CORNERS:
    row, weight = _corner(cells, resolution, len(table), corner)
    total += weight[..., None] * table.at[row].get(mode='promise_in_bounds')
  return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(
  table: Array, x: Array, resolution: int, deterministic: bool = False, after: Array | None = None
) -> Array:
  """Trilinear interpolation of a level's features.

  Args:
    table: [size, f]; size is a power of two unless it is the number of vertices.
    x: [..., 3] in [0, 1].
    resolution: the level's cells along an axis.
    deterministic: sum the table's gradient in an order of its own, so that it repeats to the bit:
      a GPU adds in the order that its threads come in. Costs a sort of eight rows a point and
      a scan over them, several times the other way's time and memory.
    after: what has to be there first, such as another level's features.

  Returns:
    [..., f]
  """
  # One kernel of several levels, or of what becomes of them, takes a GPU longer than many small.
  x, _ = jax.lax.optimization_barrier((x, after))
  return jax.lax.optimization_barrier(_interpolate(table, x, resolution))


def _forward(table, x, resolution, deterministic, after):
  after = None if after is None else after.value
  out = lookup(table.value, x.value, resolution, deterministic, after)
  return out, (table.value, x.value, x.value if x.perturbed else None)


def _backward(resolution, deterministic, residuals, d_out):
  table, x, moving = residuals
  flat, d_rows = x.reshape(-1, 1, 3), d_out.reshape(-1, 1, table.shape[-1])
  cells = _cells(flat, resolution)
  rows, weights = _corner(cells, resolution, len(table), _CORNERS[None])  # [m, 8]
  updates = weights[..., None] * d_rows
  if deterministic:
    d_table = sorted_add(
      jnp.zeros_like(table), rows.reshape(-1), updates.reshape(-1, d_rows.shape[-1])
    )
  else:
    copies = _copies(len(table)) if jax.default_backend() == 'gpu' else 1
    d_table = scatter_add(jnp.zeros_like(table), rows, updates, copies)
  d_x = None  # Half of all there is to trace, where positions do not depend on parameters.
  if moving is not None:
    (d_x,) = jax.vjp(lambda x: _interpolate(table, x, resolution), moving)[1](d_out)
  return d_table, d_x, None


lookup.defvjp(_forward, _backward, symbolic_zeros=True)


def scatter_add(table: Array, rows: Array, updates: Array, copies: int = 1) -> Array:
  """Adds updates [m, k, f] to a table's rows [m, k].

  A GPU adds to one address one after the other, and many points share a small table's rows:
  with several copies of the table, summed in the end, neighbours along m do not.
  """
  if copies == 1:
    return table.at[rows].add(updates, mode='promise_in_bounds')
  own = jnp.arange(len(rows), dtype=jnp.uint32)[:, None] % copies * len(table)
  many = jnp.zeros((copies * len(table), table.shape[1]), table.dtype)
  many = many.at[rows + own].add(updates, mode='promise_in_bounds')
  return table + many.reshape(copies, *table.shape).sum(0)


def _copies(size: int) -> int:
  """How many a GPU adds to: a power of two, for about as many rows as need no copies."""
  copies = 1
  while 2 * copies * size <= _ROWS_ENOUGH:
    copies *= 2
  return copies


def sorted_add(table: Array, rows: Array, updates: Array) -> Array:
  """Adds updates [m, f] to a table's rows [m], in an order that only the rows decide.

  Sorted by row, ties in their own order; then a scan restarts at each row's first update and has
  its sum at the last, which is the only one written.
  """
  rows, order = jax.lax.sort_key_val(rows, jnp.arange(len(rows), dtype=jnp.int32))
  changes = rows[1:] != rows[:-1]
  one = jnp.ones((1,), bool)

  def join(a, b):
    return a[0] | b[0], jnp.where(b[0], b[1], a[1] + b[1])

  starts = jnp.concatenate([one, changes])[:, None]
  _, sums = jax.lax.associative_scan(join, (starts, updates[order]))
  last = jnp.concatenate([changes, one])
  return table.at[jnp.where(last, rows, len(table))].add(sums, mode='drop')
