"""Encodings: contracted Gaussians in, features out, behind one interface.

An encoding is a module called with `structs.Gaussians` (mean [..., 3], cov [..., 3, 3]) that
returns features [..., f]. A layer's weights for them go through `arrange` first: an encoding may
give its features in another order than it is documented in, and padded, where that is faster.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from internal import coord, geopoly, structs

Array = jax.Array

_PAD_TO = 128  # Matrix products on GPUs like widths that are multiples of this.


class IntegratedPositionalEncoding(nn.Module):
  """Expected sines and cosines along an off-axis basis (section 2 of arXiv:2111.12077).

  No parameters; f = 2 * (max_deg - min_deg) * b with b the number of basis directions.

  Attributes:
    packed: features in bfloat16, in the order and with the padding of `coord.packed_pos_enc`.
  """

  min_deg: int
  max_deg: int
  basis_shape: str
  basis_subdivisions: int
  packed: bool = False

  @property
  def num_features(self) -> int:
    return 2 * (self.max_deg - self.min_deg) * self._basis().shape[1]

  def __call__(self, gaussians: structs.Gaussians) -> Array:
    encode = _packed if self.packed else _plain
    return encode(self, gaussians.mean, gaussians.cov)

  def arrange(self, rows: Array) -> Array:
    """Puts [2 * degs * b, ...] rows, sines first, in the order of the features as they are."""
    if not self.packed:
      return rows
    return coord.packed_order(rows, self.max_deg - self.min_deg, self._width())

  def _basis(self) -> Array:
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
  return coord.packed_pos_enc(lifted, var, *degs, encoding._width())


def _packed_forward(encoding, mean, cov):
  return _packed(encoding, mean, cov), (mean, cov)


def _packed_backward(encoding, residuals, d_features):
  """The gradient of the plain twin: few models let one through their samples."""

  def twin(mean, cov):
    plain = jnp.moveaxis(_plain(encoding, mean, cov), -1, 0)
    return jnp.moveaxis(encoding.arrange(plain), 0, -1).astype(jnp.bfloat16)

  return jax.vjp(twin, *residuals)[1](d_features)


_packed.defvjp(_packed_forward, _packed_backward)
