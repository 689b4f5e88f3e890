"""The integrated positional encoding with points along the last axis, for TPUs.

TPUs store arrays in tiles of 8 x 128. An array [..., n, 3] takes 128 lanes for each 3 values, and
features [..., n, 2, 12, 21] are copied several times before they are the rows of a matrix. Here the
intermediate values are [features, m] for m points, which fill the tiles, and the compiler writes
the features once, in the dtype of the layers. `coord` has the readable definition that this one is
tested against.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .. import coord

Array = jax.Array


def pos_enc(
  mean: Array, cov: Array, basis: np.ndarray, min_deg: int, max_deg: int, dtype: jnp.dtype
) -> Array:
  """Computes the features of `coord.integrated_pos_enc` for lifted Gaussians, in another order.

  Args:
    mean: [..., c] means.
    cov: [..., c, c] symmetric covariances.
    basis: [c, b] directions as columns.
    min_deg: exponent of the lowest frequency, 2^min_deg.
    max_deg: exponent after that of the highest frequency.
    dtype: of the features; angles are float32.

  Returns:
    [..., b * 2 * (max_deg - min_deg)] features, ordered by coordinate, then sines before cosines,
    then frequency. `feature_order` puts a layer's rows in this order.
  """
  axes, size = basis.shape
  x = mean.reshape(-1, axes).T  # [c, m]
  cov = jnp.moveaxis(cov.reshape(-1, axes, axes), 0, -1)  # [c, c, m]
  columns = jnp.asarray(basis, x.dtype)[..., None]  # [c, b, 1]
  lifted = sum(x[i, None] * columns[i] for i in range(axes))  # [b, m]
  var = sum(
    cov[i, j, None] * (columns[i] * columns[j] * (1 if i == j else 2))
    for i in range(axes)
    for j in range(i, axes)
  )
  # Without the barrier the compiler recomputes the per-coordinate values for every feature.
  values = (*coord.to_turns(lifted), -0.5 * jnp.maximum(var, 0))
  hi, lo, fade = (v[:, None] for v in jax.lax.optimization_barrier(values))  # [b, 1, m]
  degs = max_deg - min_deg
  scale = jnp.tile(2.0 ** jnp.arange(min_deg, max_deg, dtype=x.dtype), 2)[None, :, None]
  phase = jnp.repeat(jnp.array([0, 0.25], x.dtype), degs)[None, :, None]  # [1, 2 * degs, 1]
  turns = hi * scale  # [b, 2 * degs, m]
  turns = turns - jnp.round(turns) + lo * scale
  features = (jnp.exp(fade * scale**2) * coord.sin_turns(turns + phase)).astype(dtype)
  # Without this barrier the compiler writes copies of the values for every feature, in float32.
  features = jax.lax.optimization_barrier(features)
  return features.reshape(size * 2 * degs, -1).T.reshape(*mean.shape[:-1], -1)


def feature_order(rows: Array, degs: int) -> Array:
  """Reorders rows from the features of `coord.integrated_pos_enc` to those of `pos_enc`.

  Args:
    rows: [2 * degs * b, ...], a row for each feature: all sines, then all cosines.
    degs: number of octaves.

  Returns:
    [2 * degs * b, ...] rows.
  """
  parts = rows.reshape(2 * degs, -1, *rows.shape[1:])  # [2 * degs, b, ...]
  return jnp.swapaxes(parts, 0, 1).reshape(rows.shape)
