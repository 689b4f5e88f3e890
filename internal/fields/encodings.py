"""Encodings: from contracted Gaussians to features, behind one interface.

The built-in ones average the features of k Gaussians per interval [..., k, 3] if `multisampled`.
For speed an encoding may reorder and pad its features; `arrange` does the same to the rows of the
kernel that multiplies them.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import coord, geopoly, math, plugins, structs
from . import grid, packed_encoding, tpu_encoding

Array = jax.Array

_PAD_TO = 128  # Matrix products on GPUs are fastest if widths are multiples of this.


class Encoding(nn.Module):
  """Base class: maps Gaussians, mean [..., 3] and cov [..., 3, 3], to features [..., f].

  A plug-in overrides `__call__(gaussians)`. Its attributes are set by NerfMLP.encoding_options.
  """

  @property
  def num_features(self) -> int | None:
    """Number of features without padding; None if there is no padding."""
    return None

  @classmethod
  def arguments(cls, field: Any) -> dict[str, Any]:
    """Returns the constructor's arguments for an `mlp.MLP`; its encoding_options override them."""
    return {'name': 'encoding'}

  def arrange(self, rows: Array) -> Array:
    """Reorders and pads kernel rows [num_features, ...] to match the features."""
    return rows

  def detail(self, train_frac: float | Array) -> Array | None:
    """Returns factors [f] on the features after a fraction of training; None for 1 each."""
    return None


@plugins.encoding('ipe')
class IntegratedPositionalEncoding(Encoding):
  """Integrated positional encoding along an off-axis basis (section 2 of arXiv:2111.12077).

  Has no parameters; num_features = 2 * (max_deg - min_deg) * b for b basis directions.

  Attributes:
    min_deg, max_deg: frequencies are 2^min_deg to 2^(max_deg - 1).
    basis_shape, basis_subdivisions: see `geopoly.generate_basis`.
    axes: number of coordinates; if not 3, the basis is the identity.
    packed: compute bfloat16 features in the packed order, padded.
    multisampled: average over k Gaussians per interval.
    dtype: of the features, unless packed or multisampled.
  """

  min_deg: int
  max_deg: int
  basis_shape: str
  basis_subdivisions: int
  axes: int = 3
  packed: bool = False
  multisampled: bool = False
  dtype: jnp.dtype = jnp.float32

  @property
  def num_features(self) -> int:
    return 2 * (self.max_deg - self.min_deg) * self._basis().shape[1]

  @classmethod
  def arguments(cls, field: Any) -> dict[str, Any]:
    cfg = field.config
    on_gpu = field.gpu_kernels and jax.default_backend() == 'gpu'
    return {
      'min_deg': cfg.min_deg_point,
      'max_deg': cfg.max_deg_point,
      'basis_shape': cfg.basis_shape,
      'basis_subdivisions': cfg.basis_subdivisions,
      # A direction and an inverse distance.
      'axes': 4 if cfg.warp_fn == 'inverted_sphere' else 3,
      'packed': on_gpu and field.dtype == jnp.bfloat16,
      'multisampled': field.multisampled,
      'dtype': field.dtype,
    }

  def __call__(self, gaussians: structs.Gaussians) -> Array:
    encode = _packed if self.packed else _plain
    features = encode(self, gaussians.mean, gaussians.cov)  # [..., f], or [..., k, f]
    return jnp.mean(features, -2) if self.multisampled else features

  def arrange(self, rows: Array) -> Array:
    """Reorders kernel rows [num_features, ...], sines first, to match the features."""
    degs = self.max_deg - self.min_deg
    if self.packed:
      return packed_encoding.packed_order(rows, degs, self._width())
    return math.by_platform(lambda r: tpu_encoding.feature_order(r, degs), lambda r: r)(rows)

  def _basis(self) -> np.ndarray:
    """Returns the basis directions as columns [axes, b]."""
    if self.axes != 3:
      return np.eye(self.axes)
    return geopoly.generate_basis(self.basis_shape, self.basis_subdivisions)

  def _width(self) -> int:
    """Returns the number of packed features, with padding."""
    # Packing works on pairs of octaves: sine and cosine of two, for each basis direction.
    features = 4 * ((self.max_deg - self.min_deg + 1) // 2) * self._basis().shape[1]
    return -(-features // _PAD_TO) * _PAD_TO


def _plain(encoding: IntegratedPositionalEncoding, mean: Array, cov: Array) -> Array:
  args = encoding._basis(), encoding.min_deg, encoding.max_deg
  dtype = jnp.float32 if encoding.multisampled else encoding.dtype  # Averaged in float32.

  def general(mean, cov):
    lifted, var = coord.lift_and_diagonalize(mean, cov, args[0])  # [..., b]
    return coord.integrated_pos_enc(lifted, var, *args[1:]).astype(dtype)

  return math.by_platform(lambda *g: tpu_encoding.pos_enc(*g, *args, dtype), general)(mean, cov)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(encoding: IntegratedPositionalEncoding, mean: Array, cov: Array) -> Array:
  lifted, var = coord.lift_and_diagonalize(mean, cov, encoding._basis())  # [..., b]
  degs = encoding.min_deg, encoding.max_deg
  return packed_encoding.packed_pos_enc(lifted, var, *degs, encoding._width())


def _packed_forward(encoding, mean, cov):
  return _packed(encoding, mean, cov), (mean, cov)


def _packed_backward(encoding, residuals, d_features):
  """Differentiates the plain encoding instead: few models need this gradient."""

  def arranged(mean, cov):
    plain = jnp.moveaxis(_plain(encoding, mean, cov), -1, 0)  # [f, ...]: `arrange` takes rows.
    features = jnp.moveaxis(encoding.arrange(plain), 0, -1)  # [..., width]
    return features.astype(jnp.bfloat16)

  return jax.vjp(arranged, *residuals)[1](d_features)


_packed.defvjp(_packed_forward, _packed_backward)


@plugins.encoding('grid')
class HashGrid(Encoding):
  """Multi-resolution hash grid (arXiv:2201.05989) with downweighting (arXiv:2304.06706).

  num_features = levels * features, and levels more with `fading_features`. The parameters are one
  table per level, coarse to fine, and the fading features' scales. Positions must be in [-2, 2]^3,
  like contracted space.

  Attributes:
    levels: number of resolution levels.
    min_resolution, max_resolution: cells per axis of the coarsest and the finest level.
    log2_size: log2 of the maximum number of rows of a table; levels with more vertices hash them.
    features: features per level.
    multisampled: average over k Gaussians per interval.
    deterministic: bitwise reproducible gradients, slower; see `grid.lookup`.
    init_bound: tables start uniform in [-init_bound, init_bound].
    gain: factor on the tables' features.
    fading_features: append 2 w - 1 times a learned scale to each level's features, where w is its
      downweighting (`grid.fading`): the network can tell features near 0 from faded ones.
    coarse_to_fine: fraction of training over which levels come in, coarse to fine; 0 for all from
      the start. See `detail`.
  """

  levels: int
  min_resolution: int
  max_resolution: int
  log2_size: int
  features: int
  multisampled: bool = False
  deterministic: bool = False
  init_bound: float = 1e-4  # As in arXiv:2201.05989, section 4.
  gain: float = 1.0
  fading_features: bool = False
  coarse_to_fine: float = 0.0

  @property
  def num_features(self) -> int:
    return self.levels * (self.features + self.fading_features)

  @classmethod
  def arguments(cls, field: Any) -> dict[str, Any]:
    cfg = field.config
    return {
      'levels': cfg.grid_levels,
      'min_resolution': cfg.grid_min_resolution,
      'max_resolution': cfg.grid_max_resolution,
      'log2_size': cfg.grid_log2_size,
      'features': cfg.grid_features,
      'multisampled': field.multisampled,
      'deterministic': field.deterministic,
      'init_bound': cfg.grid_init,
      'gain': cfg.grid_gain,
      'fading_features': cfg.grid_fading_features,
      'coarse_to_fine': cfg.grid_coarse_to_fine,
      'name': 'grid',
    }

  @nn.compact
  def __call__(self, gaussians: structs.Gaussians) -> Array:
    x, scale = grid.in_cube(gaussians.mean, gaussians.cov)  # [..., 3], [...]
    if self.fading_features:  # They start as large as the tables' features.
      start = nn.initializers.constant(self.init_bound * self.gain)
      fading_scale = self.param('fading_scale', start, (self.levels,))
    by_level, features = [], None
    for i, n in enumerate(grid.resolutions(self.levels, self.min_resolution, self.max_resolution)):
      shape = grid.table_size(n, self.log2_size), self.features  # A row per vertex or hash value.
      table = self.param(f'table_{i}', _uniform(self.init_bound), shape)
      features = grid.lookup(table, x, n, self.deterministic, features)  # [..., features]
      weight = grid.fading(scale, n)[..., None]  # [..., 1], or [..., k, 1]
      faded = features * weight  # [..., features], or [..., k, features]
      if self.gain != 1:
        faded *= self.gain
      if self.fading_features:
        faded = jnp.concatenate([faded, (2 * weight - 1) * fading_scale[i]], -1)
      # Fused into the concatenation, neighbouring GPU threads would work on different levels.
      by_level.append(grid.apart(jnp.mean(faded, -2) if self.multisampled else faded))
    return jnp.concatenate(by_level, -1)  # [..., num_features]

  def detail(self, train_frac: float | Array) -> Array | None:
    """Returns factors [num_features] that bring in one level after the other, or None.

    Level 0 has factor 1. The factor of level i rises linearly from 0 to 1 between fractions
    (i - 1) c / (levels - 1) and i c / (levels - 1) of training, where c is `coarse_to_fine`.
    """
    if not self.coarse_to_fine:
      return None
    level = jnp.arange(self.levels, dtype=jnp.float32)
    factors = jnp.clip(train_frac / self.coarse_to_fine * (self.levels - 1) - level + 1, 0, 1)
    return jnp.repeat(factors, self.features + self.fading_features)


def _uniform(bound: float) -> Callable[[Array, tuple[int, ...]], Array]:
  """Returns an initializer that draws uniformly from [-bound, bound]."""
  return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)
