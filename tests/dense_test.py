"""The trunk against plain autodiff of the same layers, with and without fused kernels."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_test import INTERPRET, needs_interpreter

from internal import math
from internal.fields import dense, hopper

FULL, HALF = jnp.float32, jnp.bfloat16


def _parameters(depth, joins, width, features, bottleneck):
  """Returns float32 layers (those in `joins` see the features) and heads, for `_features`.

  Pre-activations are far from zero, with a sign given by the row's first feature and the unit:
  otherwise rounding would decide which units get a gradient.
  """
  rng = np.random.default_rng(depth)

  def draw(*shape):
    return rng.normal(size=shape) * 0.2 / np.sqrt(shape[0])

  def layer(of_x, of_encoded):
    sides = rng.choice([-1, 1], width)
    sides[:2] = 1, -1
    kernels = [draw(width, width) if of_x else None, draw(features, width) if of_encoded else None]
    if of_x:  # The first two units have opposite signs; their difference carries the row's sign.
      kernels[0][:2] = sides, -sides
    if of_encoded:
      kernels[1][0] = 5 * sides
    return dense.Layer(*kernels, draw(width))

  layers = tuple(layer(i > 0, i in joins) for i in range(depth))
  heads = dense.Heads(draw(width), draw(width, bottleneck) if bottleneck else None)
  return jax.tree.map(lambda p: jnp.asarray(p, FULL), (layers, heads))


def _features(rows, features, dtype=FULL):
  rng = np.random.default_rng(1)
  encoded = rng.normal(size=(rows, features))
  encoded[:, 0] = rng.choice([-1, 1], rows)
  return jnp.asarray(encoded, dtype)


def _naive(layers, heads, encoded):
  """The naive twin of `trunk`, in the dtype of `encoded`."""
  x, cast = None, lambda w: w.astype(encoded.dtype)
  for layer in layers:
    parts = [v for v, w in ((x, layer.of_x), (encoded, layer.of_encoded)) if w is not None]
    kernels = [w for w in (layer.of_x, layer.of_encoded) if w is not None]
    joined = jnp.concatenate(parts, -1) @ cast(jnp.concatenate(kernels))
    x = jax.nn.relu(joined + cast(layer.bias)[None])
  if heads is None:
    return x
  density = (x.astype(heads.density.dtype) * heads.density[None]).sum(-1)
  return density, None if heads.bottleneck is None else x @ cast(heads.bottleneck)


def _slopes(fn, layers, heads, encoded):
  """Returns gradients of a weighted sum of the outputs (layers, heads, features), and outputs."""

  def total(*args):
    outs, loss = fn(*args), 0
    for out in jax.tree.leaves(outs):
      weights = jnp.asarray(np.random.default_rng(2).normal(size=out.shape), HALF)
      loss += jnp.sum(out * weights.astype(out.dtype))
    return loss, outs

  return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(layers, heads, encoded)


def _assert_near(a, b, tolerance):
  """Compares leaves, with a tolerance relative to the largest entry of each."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(x, y, atol=tolerance * np.max(np.abs(y)), rtol=0)


SHAPES = {  # Depth, layers that see the features, width of the bottleneck (None: no heads).
  'one_layer': (1, (0,), None),
  'heads': (3, (0,), 5),
  'density_alone': (2, (0,), 0),
  'a_join': (4, (0, 2), 5),
  'joins_at_every_layer': (3, (0, 1, 2), 5),
  'a_join_at_the_end_and_no_heads': (3, (0, 2), None),
}


class TestTrunk:
  @pytest.mark.parametrize('shape', SHAPES)
  def test_matches_autodiff(self, shape):
    self._check(shape, FULL, 2e-6)

  @pytest.mark.parametrize('shape', ['joins_at_every_layer', 'a_join_at_the_end_and_no_heads'])
  def test_matches_autodiff_in_bfloat16(self, shape):
    self._check(shape, HALF, 0.02)

  @pytest.mark.parametrize('shape', SHAPES)
  def test_blocks_of_rows_match_autodiff(self, shape, monkeypatch):
    """TPUs compute the rows in blocks, here 3 of 8."""
    monkeypatch.setattr(math, 'by_platform', lambda tpu, default: tpu)
    monkeypatch.setattr(dense, '_VALUES', 8 * 16)
    monkeypatch.setattr(dense, '_LEAST', 8)
    self._check(shape, FULL, 2e-6, rows=24)
    program = jax.make_jaxpr(dense.trunk)(*_parameters(2, (0,), 16, 11, 5), _features(24, 11))
    assert 'scan' in str(program)
    assert 'length=3' in str(program)

  def test_rows_that_make_no_large_blocks_stay_together(self, monkeypatch):
    monkeypatch.setattr(math, 'by_platform', lambda tpu, default: tpu)
    monkeypatch.setattr(dense, '_LEAST', 16)
    self._check('a_join', FULL, 2e-6, rows=36)
    program = jax.make_jaxpr(dense.trunk)(*_parameters(2, (0,), 16, 11, 5), _features(36, 11))
    assert 'length=1' in str(program)

  def _check(self, shape, dtype, tolerance, rows=40):
    depth, joins, bottleneck = SHAPES[shape]
    layers, heads = _parameters(depth, joins, 16, 11, bottleneck or 0)
    args = layers, None if bottleneck is None else heads, _features(rows, 11, dtype)
    out, naive = _slopes(dense.trunk, *args), _slopes(_naive, *args)
    assert all(np.max(np.abs(np.float32(g))) > 0.01 for g in jax.tree.leaves(naive[0]))
    _assert_near(out, naive, tolerance)

  def test_types(self):
    layers, heads = _parameters(3, (0, 2), 16, 11, 5)
    (d_layers, d_heads, d_encoded), (density, bottleneck) = _slopes(
      dense.trunk, layers, heads, _features(40, 11, HALF)
    )
    assert density.dtype == FULL
    assert bottleneck.dtype == d_encoded.dtype == HALF
    assert all(leaf.dtype == FULL for leaf in jax.tree.leaves((d_layers, d_heads)))

  def test_a_unit_at_exactly_zero_has_no_gradient(self):
    layers, heads = _parameters(3, (0,), 16, 11, 5)
    still = [
      dense.Layer(*(None if p is None else p.at[..., 3].set(0) for p in layer)) for layer in layers
    ]
    for i in range(3):
      changed = tuple(still[i] if j == i else layer for j, layer in enumerate(layers))
      for h in (heads, None):
        (d_layers, d_heads, _), _ = _slopes(dense.trunk, changed, h, _features(40, 11))
        for leaf in jax.tree.leaves(d_layers[i]):
          np.testing.assert_array_equal(leaf[..., 3], 0)
        assert np.all(np.any(d_layers[i].bias[:3] != 0))
        if i == 2 and h is not None:
          assert d_heads.density[3] == 0

  def test_bfloat16_sums_weight_gradients_in_float32(self):
    layers, _ = _parameters(1, (0,), 16, 11, 0)
    encoded = _features(2000, 11, HALF)
    with jax.enable_x64(True):
      # One layer, and a loss of numbers exact in bfloat16: only the sums are rounded.
      wide = jax.tree.map(lambda p: p.astype(jnp.float64), (layers, encoded))
      exact = jax.device_get(_slopes(_naive, wide[0], None, wide[1])[0][0])
    out, naive = (_slopes(fn, layers, None, encoded)[0][0] for fn in (dense.trunk, _naive))
    for a, b, wanted in zip(*map(jax.tree.leaves, (out, naive, exact))):
      assert wanted.dtype == np.float64
      largest = np.max(np.abs(wanted))
      assert np.max(np.abs(np.asarray(a) - wanted)) < 1e-6 * largest
      assert np.max(np.abs(np.asarray(b) - wanted)) > 1e-4 * largest

  def test_unused_gradient_of_the_features_is_not_computed(self):
    layers, heads = _parameters(2, (0, 1), 16, 11, 5)

    def slopes(layers, encoded, argnums):
      total = lambda p, e: jnp.sum(dense.trunk(p, heads, e)[0])  # noqa: E731
      return jax.grad(total, argnums)(layers, encoded)

    of_features = 'f32[40,11]'
    for argnums, times in ((0, 0), ((0, 1), 2)):
      program = jax.jit(slopes, static_argnums=2).lower(layers, _features(40, 11), argnums)
      assert program.compile().as_text().count(f'= {of_features}{{1,0}} dot(') == times


@pytest.mark.parametrize(('platform', 'loops'), [('cuda', False), ('cpu', False), ('tpu', True)])
def test_only_tpus_compute_in_blocks(platform, loops):
  args = *_parameters(2, (0, 1), 1024, 11, 5), _features(8192, 11, HALF)
  total = lambda *args: jnp.sum(dense.trunk(*args)[0])  # noqa: E731
  program = jax.jit(jax.grad(total)).trace(*args).lower(lowering_platforms=(platform,))
  assert ('stablehlo.while' in program.as_text()) == loops


def product_in_xla(xs, ws, *, bias=None, outer=None, relu=False, mask=None):
  """The twin of hopper.product."""
  assert all(hopper.fits(*x.shape, w.shape[1]) for x, w in zip(xs, ws))
  out = sum(jnp.dot(x, w, preferred_element_type=FULL) for x, w in zip(xs, ws))
  out += 0 if bias is None else bias[None]
  out += 0 if outer is None else outer[0][:, None] * outer[1][None]
  out = jnp.maximum(out, 0) if relu else out
  return jnp.where(True if mask is None else mask > 0, out, 0).astype(HALF)


def weight_gradient_in_xla(x, g):
  """The twin of hopper.weight_gradient."""
  assert hopper.fits(*x.shape, g.shape[1])
  return jnp.dot(x.T, g, preferred_element_type=FULL), jnp.sum(g.astype(FULL), 0)


def layer_gradient_in_xla(x, g, w, *, outer=None):
  """The twin of hopper.layer_gradient."""
  assert hopper.fits_layer(*x.shape, g.shape[1])
  dx = jnp.dot(g, w.T, preferred_element_type=FULL)
  dx += 0 if outer is None else outer[0][:, None] * outer[1][None]
  dx = jnp.where(x > 0, dx, 0)
  return dx.astype(HALF), jnp.dot(x.T, g, preferred_element_type=FULL), jnp.sum(dx, 0)


TWINS = product_in_xla, weight_gradient_in_xla, layer_gradient_in_xla


def spy(monkeypatch, kernels=TWINS):
  """Replaces the kernels; returns a list that collects calls as names with the options used."""
  calls = []

  def spied(name, fn, *args, **options):
    used = [k for k, v in options.items() if v is not None and v is not False]
    calls.append(' '.join([name, *sorted(used)]))
    return fn(*args, **options)

  for name, fn in zip(('product', 'weight_gradient', 'layer_gradient'), kernels, strict=True):
    monkeypatch.setattr(hopper, name, functools.partial(spied, name, fn))
  return calls


_fused = functools.partial(dense.trunk, fused=True)


class TestFused:
  def _compare(self, calls, *args):
    """Checks the fused trunk against the plain one; returns the number of calls per kernel."""
    plain = _slopes(dense.trunk, *args)
    assert not calls
    _assert_near(_slopes(_fused, *args), plain, 0.02)
    return collections.Counter(calls)

  @pytest.mark.parametrize(
    ('depth', 'joins', 'sizes', 'rows', 'wanted'),
    [
      # All kernels fit: wide layers, narrow ones, and narrow ones with the density alone.
      (2, (0, 1), (512, 384, 512), 768, (0, 0, 4, 1, 1, 1)),
      (3, (0, 1), (256, 384, 256), 384, (2, 1, 2, 1, 0, 0)),
      (3, (0,), (256, 384, 0), 384, (2, 0, 1, 0, 0, 0)),
      # Some do not: because of the rows, the width, the features, the bottleneck.
      (2, (0, 1), (256, 256, 256), 200, (0, 0, 0, 0, 0, 0)),
      (2, (0, 1), (128, 256, 200), 256, (0, 0, 0, 0, 0, 0)),
      (2, (0, 1), (256, 200, 256), 256, (1, 1, 0, 0, 0, 0)),
      (2, (0, 1), (256, 256, 200), 256, (1, 0, 2, 1, 0, 0)),
    ],
  )
  def test_what_fits_is_fused(self, monkeypatch, depth, joins, sizes, rows, wanted):
    """`sizes` are width, features and bottleneck; `wanted` are numbers of calls."""
    calls = spy(monkeypatch)
    args = *_parameters(depth, joins, *sizes), _features(rows, sizes[1], HALF)
    names = (
      'layer_gradient', 'layer_gradient outer', 'weight_gradient', 'product bias relu',
      'product mask', 'product mask outer',
    )  # fmt: skip
    assert self._compare(calls, *args) == {k: n for k, n in zip(names, wanted) if n}

  def test_no_heads(self, monkeypatch):
    calls = spy(monkeypatch)
    layers, _ = _parameters(3, (0,), 256, 256, 0)
    wanted = {'layer_gradient': 2, 'weight_gradient': 1}
    assert self._compare(calls, layers, None, _features(256, 256, HALF)) == wanted

  @needs_interpreter
  def test_kernels_compute_what_xla_does(self, monkeypatch):
    options = {'interpret': INTERPRET, 'blocks': 3}
    kernels = hopper.product, hopper.weight_gradient, hopper.layer_gradient
    calls = spy(monkeypatch, [functools.partial(k, **options) for k in kernels])
    args = *_parameters(2, (0, 1), 256, 256, 256), _features(256, 256, HALF)
    assert sum(self._compare(calls, *args).values()) == 5
