"""The packed positional encoding, against float64 and against the order it documents."""

import jax
import jax.numpy as jnp
import numpy as np

from internal.fields import packed_encoding


def test_matches_float64():
  # Ordered by coordinate, octave, then sine before cosine; an odd octave count is rounded up.
  rng = np.random.default_rng(0)
  mean, var = np.float32(rng.uniform(-2, 2, (50, 3))), np.float32(rng.uniform(0, 1, (50, 3)))
  var *= np.float32([1e-8, 1e-4, 1])
  fn = jax.jit(packed_encoding.packed_pos_enc, static_argnums=(2, 3, 4))
  for low, high in ((0, 12), (-1, 4)):
    degs = np.arange(low, high + (high - low) % 2)
    out = fn(mean, var, low, high, 128)
    scale = 2.0**degs
    angle = mean.astype(np.float64)[..., None] * scale
    damping = np.exp(-0.5 * var.astype(np.float64)[..., None] * scale**2)
    expected = np.stack([damping * np.sin(angle), damping * np.cos(angle)], -1).reshape(50, -1)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[:, expected.shape[1] :], 0)
    out = np.asarray(out[:, : expected.shape[1]], np.float64)
    # Rounding to bfloat16, and of float32 angles at the highest octave.
    np.testing.assert_allclose(out, expected, rtol=1.01 * 2**-8, atol=2e-7 * scale[-1])


def test_sines_of_turns():
  turns = np.float32(np.linspace(-3, 3, 4801))
  sin, cos = jax.jit(packed_encoding._sincos_turns)(turns)
  angle = 2 * np.pi * turns.astype(np.float64)
  np.testing.assert_allclose(sin, np.sin(angle), atol=2e-7)
  np.testing.assert_allclose(cos, np.cos(angle), atol=2e-7)
  # Exact quarter turns, including ties that round to even.
  quarters = np.arange(-9, 10)
  sin, cos = packed_encoding._sincos_turns(jnp.float32(quarters / 4))
  np.testing.assert_array_equal(sin, np.round(np.sin(np.pi / 2 * quarters)))
  np.testing.assert_array_equal(cos, np.round(np.cos(np.pi / 2 * quarters)))


def test_order_is_by_coordinate_then_octave():
  b, degs, width = 3, 5, 128
  rows = np.random.default_rng(1).normal(size=(2 * degs * b, 4)).astype(np.float32)
  out = packed_encoding.packed_order(jnp.asarray(rows), degs, width)
  expected = np.zeros((width, 4))
  for wave in range(2):
    for octave in range(degs):
      for i in range(b):
        expected[i * 12 + octave * 2 + wave] = rows[wave * degs * b + octave * b + i]
  np.testing.assert_array_equal(out, expected)


def test_finite_for_infinite_inputs():
  large = [0.0, -2.0, 1e6, -3e38, np.inf, -np.inf]
  mean, var = np.meshgrid(large, [0.0, 1e-12, 1.0, 1e30, np.inf])
  fn = jax.jit(packed_encoding.packed_pos_enc, static_argnums=(2, 3, 4))
  out = np.float32(fn(jnp.float32(mean), jnp.float32(var), 0, 16, 256))
  assert np.all(np.abs(out) <= 1)
  np.testing.assert_array_equal(out[-2:], 0)
