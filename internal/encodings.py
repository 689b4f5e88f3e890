"""Encodings: contracted Gaussians in, features out, behind one interface.

An encoding is a module called with `structs.Gaussians` (mean [..., 3], cov [..., 3, 3]) that
returns float32 features [..., f].
"""

import flax.linen as nn
import jax

from internal import coord, geopoly, structs


class IntegratedPositionalEncoding(nn.Module):
  """Expected sines and cosines along an off-axis basis (section 2 of arXiv:2111.12077).

  No parameters; f = 2 * (max_deg - min_deg) * b with b the number of basis directions.
  """

  min_deg: int
  max_deg: int
  basis_shape: str
  basis_subdivisions: int

  def __call__(self, gaussians: structs.Gaussians) -> jax.Array:
    basis = geopoly.generate_basis(self.basis_shape, self.basis_subdivisions)
    mean, var = coord.lift_and_diagonalize(gaussians.mean, gaussians.cov, basis)
    return coord.integrated_pos_enc(mean, var, self.min_deg, self.max_deg)
