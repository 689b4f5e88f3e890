"""Encodings: contracted Gaussians in, features out, behind one interface.

An encoding is a module called with `structs.Gaussians` (mean [..., 3], cov [..., 3, 3]) that
returns features [..., f]; if it is `multisampled`, Gaussians are [..., k, 3] and their features
averaged over the k. A layer's weights for them go through `arrange` first: an encoding may give its
features in another order than it is documented in, and padded, where that is faster.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import coord, geopoly, structs
from . import grid, packed_encoding

Array = jax.Array

_PAD_TO = 128  # Matrix products on GPUs like widths that are multiples of this.


class IntegratedPositionalEncoding(nn.Module):
  """Expected sines and cosines along an off-axis basis (section 2 of arXiv:2111.12077).

  No parameters; f = 2 * (max_deg - min_deg) * b with b the number of basis directions.

  Attributes:
    axes: of the coordinates; other than 3 have no basis but themselves.
    packed: features in bfloat16, in the order and with the padding of `packed_pos_enc`.
  """

  min_deg: int
  max_deg: int
  basis_shape: str
  basis_subdivisions: int
  axes: int = 3
  packed: bool = False
  multisampled: bool = False

  @property
  def num_features(self) -> int:
    return 2 * (self.max_deg - self.min_deg) * self._basis().shape[1]

  def __call__(self, gaussians: structs.Gaussians) -> Array:
    encode = _packed if self.packed else _plain
    features = encode(self, gaussians.mean, gaussians.cov)
    return jnp.mean(features, -2) if self.multisampled else features

  def arrange(self, rows: Array) -> Array:
    """Puts [2 * degs * b, ...] rows, sines first, in the order of the features as they are."""
    if not self.packed:
      return rows
    return packed_encoding.packed_order(rows, self.max_deg - self.min_deg, self._width())

  def _basis(self) -> Array:
    if self.axes != 3:
      return np.eye(self.axes)
    return geopoly.generate_basis(self.basis_shape, self.basis_subdivisions)

  def _width(self) -> int:
    features = 4 * ((self.max_deg - self.min_deg + 1) // 2) * self._basis().shape[1]
    return -(-features // _PAD_TO) * _PAD_TO


def _plain(encoding: IntegratedPositionalEncoding, mean: Array, cov: Array) -> Array:
  lifted, var = coord.lift_and_diagonalize(mean, cov, encoding._basis())
  return coord.integrated_pos_enc(lifted, var, encoding.min_deg, encoding.max_deg)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(encoding: IntegratedPositionalEncoding, mean: Array, cov: Array) -> Array:
  lifted, var = coord.lift_and_diagonalize(mean, cov, encoding._basis())
  degs = encoding.min_deg, encoding.max_deg
  return packed_encoding.packed_pos_enc(lifted, var, *degs, encoding._width())


def _packed_forward(encoding, mean, cov):
  return _packed(encoding, mean, cov), (mean, cov)


def _packed_backward(encoding, residuals, d_features):
  """The gradient of the plain twin: few models let one through their samples."""

  def twin(mean, cov):
    plain = jnp.moveaxis(_plain(encoding, mean, cov), -1, 0)
    return jnp.moveaxis(encoding.arrange(plain), 0, -1).astype(jnp.bfloat16)

  return jax.vjp(twin, *residuals)[1](d_features)


_packed.defvjp(_packed_forward, _packed_backward)


class HashGrid(nn.Module):
  """A pyramid of grids with learned features (arXiv:2201.05989, faded as in arXiv:2304.06706).

  f = levels * features; the parameters are a table for each level, coarse to fine. The scene has to
  be in [-2, 2]^3, as contracted space is.

  Attributes:
    levels: number of grids.
    min_resolution, max_resolution: cells along an axis of the coarsest and of the finest.
    log2_size: finer levels than have this many vertices (log2) share rows by a hash.
    features: numbers that a level has for a point.
    deterministic: gradients that repeat to the bit, slower: see `grid.lookup`.
  """

  levels: int
  min_resolution: int
  max_resolution: int
  log2_size: int
  features: int
  multisampled: bool = False
  deterministic: bool = False

  @property
  def num_features(self) -> int:
    return self.levels * self.features

  @nn.compact
  def __call__(self, gaussians: structs.Gaussians) -> Array:
    x, scale = grid.in_cube(gaussians.mean, gaussians.cov)
    of_levels, features = [], None
    for i, n in enumerate(grid.resolutions(self.levels, self.min_resolution, self.max_resolution)):
      shape = grid.table_size(n, self.log2_size), self.features
      table = self.param(f'table_{i}', _small_uniform, shape)
      features = grid.lookup(table, x, n, self.deterministic, features)
      faded = features * grid.fading(scale, n)[..., None]
      # Where levels are joined, neighbouring threads of a GPU would each do another one's sums.
      of_levels.append(grid.apart(jnp.mean(faded, -2) if self.multisampled else faded))
    return jnp.concatenate(of_levels, -1)

  def arrange(self, rows: Array) -> Array:
    """Puts [levels * features, ...] rows, coarse levels first, in the order of the features."""
    return rows


def _small_uniform(key: Array, shape: tuple[int, ...]) -> Array:
  """Within 1e-4 of zero: tables begin as next to nothing (arXiv:2201.05989, section 4)."""
  return jax.random.uniform(key, shape, jnp.float32, -1e-4, 1e-4)
