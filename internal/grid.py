"""Multi-resolution hash grids: features of points in a cube, by lookups in tables.

Points `x` [..., 3] and their scales [...] are in units of the cube's side: [0, 1]. A level of
resolution n has n cells along each axis, and a vector of `f` numbers at each of its (n + 1)^3
vertices; `table` [size, f] has a row for each where that fits, and else a row for each value of a
hash (arXiv:2201.05989, section 3).
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from internal import math

Array = jax.Array

_RADIUS = 2.0  # The cube is [-2, 2]^3 of the fields' space, around the ball of contracted points.
_PRIMES = (1, 2654435761, 805459861)  # Of arXiv:2201.05989, Eq. 4.


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


def _corners(x: Array, resolution: int, size: int) -> Iterator[tuple[Array, Array]]:
  """For each corner of the cells that hold x [..., 3]: row of the table, and trilinear weight."""
  position = x * resolution
  cell = jnp.clip(jnp.floor(jax.lax.stop_gradient(position)), 0, resolution - 1)
  high = position - cell  # The weight of each axis's higher corner.
  dense = (resolution + 1) ** 3 <= size
  strides = (1, resolution + 1, (resolution + 1) ** 2) if dense else _PRIMES
  ends = []
  for axis in range(3):
    stride = np.uint32(strides[axis])
    start = cell[..., axis].astype(jnp.uint32) * stride  # Modulo 2^32, as the hash would have it.
    weight = high[..., axis]
    ends.append(((start, 1 - weight), (start + stride, weight)))
  for i, u in ends[0]:
    for j, v in ends[1]:
      for k, w in ends[2]:
        row = i + j + k if dense else (i ^ j ^ k) & np.uint32(size - 1)
        yield row, u * v * w


def _interpolate(table: Array, x: Array, resolution: int) -> Array:
  """`lookup`, for autodiff in x alone."""
  # Eight small lookups: a compiler joins them with their sum and stores nothing in between.
  return sum(
    weight[..., None] * table.at[row].get(mode='promise_in_bounds')
    for row, weight in _corners(x, resolution, len(table))
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table: Array, x: Array, resolution: int, deterministic: bool = False) -> Array:
  """Trilinear interpolation of a level's features.

  Args:
    table: [size, f]; size is a power of two unless it is the number of vertices.
    x: [..., 3] in [0, 1].
    resolution: the level's cells along an axis.
    deterministic: sum the table's gradient in an order of its own, so that it repeats to the bit:
      a GPU adds in the order that its threads come in. Costs a sort of eight rows a point and
      a scan over them, several times the other way's time and memory.

  Returns:
    [..., f]
  """
  return _interpolate(table, x, resolution)


def _forward(table, x, resolution, deterministic):
  return _interpolate(table, x, resolution), (table, x)


def _backward(resolution, deterministic, residuals, d_out):
  table, x = residuals
  flat, d_rows = x.reshape(-1, 3), d_out.reshape(-1, table.shape[-1])
  corners = _corners(flat, resolution, len(table))
  updates = [(row, weight[:, None] * d_rows) for row, weight in corners]
  d_table = jnp.zeros_like(table)
  if deterministic:
    d_table = sorted_add(d_table, *(jnp.concatenate(v) for v in zip(*updates)))
  else:
    for row, update in updates:
      d_table = d_table.at[row].add(update, mode='promise_in_bounds')
  # Removed by the compiler unless somebody asks for it.
  (d_x,) = jax.vjp(lambda x: _interpolate(table, x, resolution), x)[1](d_out)
  return d_table, d_x


lookup.defvjp(_forward, _backward)


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
