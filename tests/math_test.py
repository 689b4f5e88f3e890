"""Numerical primitives: equal to the plain functions where those are finite, finite elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite import assert_finite

from internal import math


def test_sine_matches_float64():
  # Contracted coordinates reach 2 and frequencies 2^11; uncontracted ones go far beyond.
  x = np.concatenate([np.linspace(-4096, 4096, 2001), [-1e9, -1e5, 0, 1e5, 1e9]])
  x = x.astype(np.float32)
  y, dy = jax.jit(jax.vmap(jax.value_and_grad(math.safe_sin)))(x)
  np.testing.assert_allclose(y, np.sin(x.astype(np.float64)), atol=1e-6)
  np.testing.assert_allclose(dy, np.cos(x.astype(np.float64)), atol=1e-6)
  assert_finite(math.safe_sin, [np.inf, -np.inf, 3e38])


def test_exp_is_clipped_but_its_gradient_never_vanishes():
  x = jnp.array([-1e10, -1.0, 0.0, 3.0, 88.0, 89.0, 1e10])
  y, dy = jax.vmap(jax.value_and_grad(math.safe_exp))(x)
  expected = np.exp(np.minimum(np.asarray(x, np.float64), 88))
  np.testing.assert_allclose(y, expected, rtol=1e-5)
  np.testing.assert_allclose(dy, y)
  assert dy[-1] > 1e38


def test_truncated_exp_has_a_bounded_gradient():
  x = jnp.array([-200.0, -1.0, 0.0, 3.0, 15.0, 16.0, 80.0, 1e10])
  y, dy = jax.vmap(jax.value_and_grad(math.truncated_exp))(x)
  exact = np.exp(np.minimum(np.asarray(x, np.float64), 88))
  np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-38)
  np.testing.assert_allclose(dy, np.minimum(exact, np.exp(15)), rtol=1e-5, atol=1e-38)


def test_scale_gradient_changes_no_bit_of_the_value():
  x, factor = jnp.float32([0.1, -3e38, 0.0, 7.0]), jnp.float32([0, 0.5, 0.25, 1])
  y, back = jax.vjp(math.scale_gradient, x, factor)
  np.testing.assert_array_equal(y, x)
  dx, d_factor = back(jnp.float32([1, 2, 4, 8]))
  np.testing.assert_array_equal(dx, [0, 1, 1, 8])
  np.testing.assert_array_equal(d_factor, 0)


def test_log_is_exact_for_normal_numbers_and_finite_below():
  x = np.array([1e-37, 1e-3, 1.0, 1e30], np.float32)
  np.testing.assert_allclose(math.safe_log(x), np.log(x.astype(np.float64)), rtol=1e-6)
  np.testing.assert_allclose(math.safe_log(jnp.zeros(1)), np.log(math.TINY), rtol=1e-6)
  assert_finite(math.safe_log, [0.0, -1.0, 1e-37, 1e30])


def test_narrow_dot_is_in_float32():
  rng = np.random.default_rng(0)
  x, m = rng.normal(size=(4, 5, 300)), rng.normal(size=(300, 3))
  out = math.narrow_dot(jnp.float32(x), jnp.float32(m))
  expected = np.float32(x) @ np.float32(m).astype(np.float64)
  np.testing.assert_allclose(out, expected, atol=2e-5)
  half = jnp.bfloat16(x)
  out = math.narrow_dot(half, jnp.float32(m))
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, np.float64(half) @ np.float32(m).astype(np.float64), atol=2e-5)


def test_polynomial_matches_numpy():
  x = np.linspace(-2, 2, 9, dtype=np.float32)
  expected = np.polynomial.polynomial.polyval(x, (1, -3, 0.5, 2))
  np.testing.assert_allclose(math.polynomial((1, -3, 0.5, 2), jnp.asarray(x)), expected, atol=1e-5)


def test_log_lerp():
  # The log-linear midpoint of 2e-3 and 2e-5 is their geometric mean, 2e-4.
  out = math.log_lerp(jnp.array([-1.0, 0.0, 0.5, 1.0, 2.0]), 2e-3, 2e-5)
  np.testing.assert_allclose(out, [2e-3, 2e-3, 2e-4, 2e-5, 2e-5], rtol=1e-5)
  with pytest.raises(ValueError, match='positive'):
    math.log_lerp(jnp.zeros(()), 0, 1)


def test_sorted_interp_matches_numpy():
  rng = np.random.default_rng(1)
  xp = np.sort(rng.uniform(size=(6, 9)), -1).astype(np.float32)
  fp = np.sort(rng.normal(size=(6, 9)), -1).astype(np.float32)
  x = rng.uniform(-0.2, 1.2, size=(6, 50)).astype(np.float32)
  x[:, :9] = xp  # The knots themselves.
  expected = [np.interp(a, b, c) for a, b, c in zip(x, xp, fp)]
  np.testing.assert_allclose(jax.jit(math.sorted_interp)(x, xp, fp), expected, atol=2e-5)


def test_sorted_interp_jumps_at_ties():
  # Two knots at x = 1: the function jumps there from 2 to 5, and is 5 from the jump onwards.
  xp, fp = jnp.array([0.0, 1.0, 1.0, 2.0]), jnp.array([0.0, 2.0, 5.0, 6.0])
  x = jnp.array([0.5, np.nextafter(np.float32(1), np.float32(0)), 1.0, 1.5])
  np.testing.assert_allclose(math.sorted_interp(x, xp, fp), [1, 2, 5, 5.5], rtol=1e-6)


def test_sorted_interp_is_finite_if_all_knots_are_equal():
  ramp = [0.0, 1.0, 2.0]
  assert_finite(math.sorted_interp, [-1.0, 0.5, 2.0], [0.5, 0.5, 0.5], ramp)
  assert_finite(math.sorted_interp, [0.0, 1.0], ramp, [3.0, 3.0, 3.0])


def _knots(rng, rows, n):
  """Ascending knots with many ties."""
  return np.sort(rng.choice(np.linspace(0, 1, 1 + n), (rows, n)), -1).astype(np.float32)


SIZES = (1, 2, 3, 7, 8, 9, 33)


@pytest.mark.parametrize('n', SIZES)
def test_num_below_counts(n):
  rng = np.random.default_rng(n)
  knots = _knots(rng, 20, n)
  x = np.float32(rng.uniform(-0.2, 1.2, (20, 31)))
  x[:, :n] = knots[:, :31]  # A knot equal to x counts.
  x[:, -2:] = -np.inf, np.inf
  counts = jax.jit(math.num_below)(knots, x)
  assert counts.dtype == jnp.int32
  np.testing.assert_array_equal(counts, np.sum(knots[:, None] <= x[..., None], -1))


def test_pick():
  rng = np.random.default_rng(3)
  values, index = rng.normal(size=(4, 5, 7)), rng.integers(0, 7, (4, 5, 9))
  out = math.pick(jnp.float32(values), jnp.asarray(index))
  np.testing.assert_array_equal(out, np.take_along_axis(np.float32(values), index, -1))


class TestTwins:
  """The implementation with gathers and the one with masks, for TPUs."""

  @pytest.mark.parametrize('n', SIZES)
  def test_brackets_are_equal(self, n):
    rng = np.random.default_rng(n)
    xp, fp = _knots(rng, 20, n), _knots(rng, 20, n)
    x = np.float32(rng.uniform(-0.2, 1.2, (20, 31)))
    x[:, :n] = xp[:, :31]
    x[:, -4:] = 0, 1, -1e30, 1e30
    twins = [jax.jit(fn)(x, xp, fp) for fn in (math._bracket_by_mask, math._bracket_by_search)]
    for a, b in zip(*twins):
      np.testing.assert_array_equal(a, b)

  def test_interpolation_has_equal_gradients(self, monkeypatch):
    rng = np.random.default_rng(5)
    x, xp, fp = (np.sort(rng.normal(size=(6, n)), -1).astype(np.float32) for n in (20, 9, 9))
    gradients = []
    for twin in range(2):
      monkeypatch.setattr(math, 'by_platform', lambda *twins, twin=twin: twins[twin])
      grad = jax.grad(lambda *args: jnp.sum(math.sorted_interp(*args) ** 2), (0, 1, 2))
      gradients.append(jax.jit(grad)(x, xp, fp))
    for a, b in zip(*gradients):
      assert np.max(np.abs(b)) > 0.1
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

  @pytest.mark.parametrize(('platform', 'gathers'), [('tpu', False), ('cuda', True), ('cpu', True)])
  def test_only_tpus_avoid_gathers(self, platform, gathers):
    grad = jax.grad(lambda *args: jnp.sum(math.sorted_interp(*args)), (0, 1, 2))
    shapes = [jax.ShapeDtypeStruct((4, n), jnp.float32) for n in (20, 9, 9)]
    for fn in (math.sorted_interp, grad):
      text = jax.jit(fn).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
      assert ('stablehlo.gather' in text) == gathers


class TestRandomness:
  keys = jax.random.split(jax.random.key(0), (4, 3))

  def test_each_key_of_an_array_draws_independently(self):
    out = math.draw(jax.random.uniform, self.keys, (4, 3, 5), minval=2.0, maxval=3.0)
    assert out.shape == (4, 3, 5)
    for i in range(4):
      for j in range(3):
        alone = jax.random.uniform(self.keys[i, j], (5,), minval=2.0, maxval=3.0)
        np.testing.assert_array_equal(out[i, j], alone)
    part = math.draw(jax.random.uniform, self.keys[1:3], (2, 3, 5), minval=2.0, maxval=3.0)
    np.testing.assert_array_equal(part, out[1:3])

  @pytest.mark.parametrize('key', [jax.random.key(1), jax.random.PRNGKey(1)], ids=['new', 'raw'])
  def test_one_key_draws_the_whole_array(self, key):
    out = math.draw(jax.random.normal, key, (4, 5), jnp.float32)
    np.testing.assert_array_equal(out, jax.random.normal(key, (4, 5)))
    a, b = math.split_keys(key, 2)
    assert jax.random.uniform(a) != jax.random.uniform(b)

  def test_split_keys(self):
    assert math.split_keys(None, 3) == (None, None, None)
    parts = math.split_keys(self.keys, 2)
    assert [p.shape for p in parts] == [(4, 3)] * 2
    alone = jax.random.split(self.keys[2, 1], 2)
    assert all(p[2, 1] == k for p, k in zip(parts, alone))
