"""The integrated positional encoding in bfloat16, four features to a 64-bit word.

On GPUs the encoding of `coord.integrated_pos_enc` is bound by instructions and by narrow stores.
Here a sine and a cosine at two octaves share one range reduction and one exponential, and are
stored together. `coord` has the readable definition that this one is tested against.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .. import math

Array = jax.Array

_TURN = 1 / (2 * np.pi)
_MAX_ANGLE = 2.0**23  # Beyond it float32 has no fraction of a turn.

# sin(2 pi r) / r and cos(2 pi r) for |r| <= 1/8 as polynomials in r^2, fitted at Chebyshev points:
# errors 2e-9 and 1e-10.
_SIN_EIGHTH = (6.28318522, -41.341628, 81.5881184, -75.2398368)
_COS_EIGHTH = (1, -19.7392087, 64.9393162, -85.4428484, 59.2202883)


def _sincos_turns(turns: Array) -> tuple[Array, Array]:
  """Computes sin and cos of 2 pi `turns` from one range reduction, to the nearest quarter turn."""
  quarter = jnp.round(4 * turns)
  r = turns - 0.25 * quarter  # In [-1/8, 1/8].
  s, c = r * math.polynomial(_SIN_EIGHTH, r**2), math.polynomial(_COS_EIGHTH, r**2)
  quarter = quarter.astype(jnp.int32)
  swapped = (quarter & 1) == 1  # An odd number of quarter turns exchanges sine and cosine.
  sin, cos = jnp.where(swapped, c, s), jnp.where(swapped, s, c)
  sin = jnp.where((quarter & 2) == 2, -sin, sin)
  return sin, jnp.where(((quarter + 1) & 2) == 2, -cos, cos)


def _bits(x: Array) -> Array:
  """Returns the bits of bfloat16(x), zero-extended to uint64."""
  return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint64)


def packed_pos_enc(mean: Array, var: Array, min_deg: int, max_deg: int, width: int) -> Array:
  """Computes `coord.integrated_pos_enc` in bfloat16 (arXiv:2103.13415, Eq. 14), packed and padded.

  Angles are reduced in float32 turns, which costs about 1e-7 of the angle. Not differentiable.

  Args:
    mean: [..., b] means of the coordinates, radians at frequency 1.
    var: [..., b] variances.
    min_deg: exponent of the lowest frequency, 2^min_deg.
    max_deg: exponent after that of the highest frequency. With an odd number of octaves, one more
      is encoded.
    width: number of features returned, a multiple of 4; those after the encoding are zero.

  Returns:
    [..., width] bfloat16 features, ordered by coordinate, then octave, then sine before cosine.
    `packed_order` puts a layer's rows in this order.
  """
  turns = jnp.clip(mean, -_MAX_ANGLE, _MAX_ANGLE) * (2.0**min_deg * _TURN)
  fade = var * (-0.5 * 4.0**min_deg)
  # Compilers would otherwise repeat these for every feature.
  turns, fade = jax.lax.optimization_barrier((turns, fade))
  pairs = (max_deg - min_deg + 1) // 2
  scale = (4.0 ** jnp.arange(pairs, dtype=mean.dtype)).reshape((1,) * mean.ndim + (-1,))
  sin, cos = _sincos_turns(turns[..., None] * scale)  # [..., b, pairs]
  damping = jnp.exp(fade[..., None] * scale**2)
  finer = damping**4  # Twice the frequency, four times the exponent.
  features = [
    damping * sin,
    damping * cos,
    finer * 2 * sin * cos,  # Double-angle formulas give the second octave.
    finer * (cos - sin) * (cos + sin),
  ]
  with jax.enable_x64(True):
    word = sum(_bits(f) << jnp.uint64(16 * i) for i, f in enumerate(features))
    word = word.reshape(*mean.shape[:-1], pairs * mean.shape[-1])  # [..., b * pairs]
    padding = [(0, 0)] * (mean.ndim - 1) + [(0, width // 4 - word.shape[-1])]
    word = jnp.pad(word, padding)  # [..., width / 4]
    out = jax.lax.bitcast_convert_type(word, jnp.bfloat16)  # [..., width / 4, 4]
  return out.reshape(*mean.shape[:-1], width)


def packed_order(rows: Array, degs: int, width: int) -> Array:
  """Reorders rows from the features of `integrated_pos_enc` to those of `packed_pos_enc`.

  Args:
    rows: [2 * degs * b, ...], a row for each feature: all sines, then all cosines.
    degs: number of octaves.
    width: number of rows returned; padding rows are zero.

  Returns:
    [width, ...] rows.
  """
  tail = rows.shape[1:]
  rows = jnp.moveaxis(rows.reshape(2, degs, -1, *tail), (0, 1, 2), (2, 1, 0))  # [b, degs, 2, ...]
  rows = jnp.pad(rows, [(0, 0), (0, degs % 2)] + [(0, 0)] * (1 + len(tail)))  # An even number.
  rows = rows.reshape(-1, *tail)
  return jnp.pad(rows, [(0, width - len(rows))] + [(0, 0)] * len(tail))
