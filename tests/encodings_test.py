"""The positional encodings for GPUs and TPUs, against the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internal import geopoly, math, structs
from internal.fields import encodings

CASES = {  # min_deg, max_deg, basis.
  '360': (0, 12, ('icosahedron', 2)),
  'octahedron': (0, 16, ('octahedron', 1)),
  'an_odd_number_of_octaves': (0, 3, ('icosahedron', 2)),
  'one_octave': (2, 3, ('octahedron', 1)),
  'not_from_zero': (-2, 5, ('tetrahedron', 2)),
}


def _pair(case):
  """Returns the plain and the packed encoding of a case."""
  low, high, basis = CASES[case]
  return tuple(
    encodings.IntegratedPositionalEncoding(low, high, *basis, packed=p) for p in (False, True)
  )


def _gaussians(*batch):
  rng = np.random.default_rng(0)
  mean, a = rng.uniform(-2, 2, (*batch, 3)), rng.normal(size=(*batch, 3, 3))
  cov = a @ np.swapaxes(a, -1, -2) * rng.choice([1e-10, 1e-6, 1e-2], (*batch, 1, 1))
  return structs.Gaussians(jnp.float32(mean), jnp.float32(cov))


GAUSSIANS = _gaussians(2, 100)


@functools.cache
def _features(case):
  return [jax.jit(lambda g, e=e: e(g))(GAUSSIANS) for e in _pair(case)]


def _arrange(case, rows):
  return np.asarray(_pair(case)[1].arrange(jnp.asarray(rows)))


def _octaves(case):
  """Returns the octave of each feature, in the documented order."""
  low, high, _ = CASES[case]
  octaves = np.repeat(np.arange(low, high), _pair(case)[0].num_features // 2 // (high - low))
  return np.tile(octaves, 2)


@pytest.mark.parametrize('case', CASES)
class TestPacked:
  def test_is_a_reordering_of_the_plain_encoding(self, case):
    plain, packed = _features(case)
    assert plain.dtype == jnp.float32
    assert packed.dtype == jnp.bfloat16
    assert plain.shape[:-1] == packed.shape[:-1] == (2, 100)
    # Rounding of bfloat16 below 1, and of the angles in float32.
    allowed = _arrange(case, 2**-9 + 2e-7 * 2.0 ** _octaves(case))
    wanted = _arrange(case, np.moveaxis(plain, -1, 0))
    found = np.moveaxis(np.float32(packed), -1, 0)
    used = allowed > 0
    assert np.all(np.std(wanted[used], (1, 2)) > 0.02)
    assert np.all(np.abs(found - wanted)[used] <= allowed[used][:, None, None])

  def test_width(self, case):
    low, high, basis = CASES[case]
    directions = geopoly.generate_basis(*basis).shape[1]
    num, pairs = 2 * (high - low) * directions, (high - low + 1) // 2
    plain, packed = _features(case)
    assert [e.num_features for e in _pair(case)] == [num, num]
    assert plain.shape[-1] == num
    assert packed.shape[-1] == -(-4 * pairs * directions // 128) * 128
    np.testing.assert_array_equal(np.float32(packed[..., 4 * pairs * directions :]), 0)

  def test_arrange_keeps_every_row_and_pads_with_zeros(self, case):
    num = _pair(case)[0].num_features
    rows = _arrange(case, 1 + np.arange(num))
    assert rows.shape == _features(case)[1].shape[-1:]
    np.testing.assert_array_equal(np.sort(rows[rows != 0]), 1 + np.arange(num))

  def test_layers_on_both_encodings_agree(self, case):
    # Features of a superfluous octave are multiplied by zero rows.
    plain, packed = (np.float64(f) for f in _features(case))
    kernel = np.random.default_rng(5).normal(size=(plain.shape[-1], 7))
    wanted = plain @ kernel
    off = packed @ _arrange(case, np.float32(kernel)) - wanted
    assert np.sqrt(np.mean(off**2)) < 5e-3 * np.std(wanted)


@pytest.mark.parametrize('case', ['360', 'an_odd_number_of_octaves'])
def test_gradient_matches_the_plain_encoding(case):
  num = _pair(case)[0].num_features
  weights = np.random.default_rng(6).normal(size=(2, 100, num))

  def slopes(encoding):
    arranged = encoding.arrange(jnp.moveaxis(jnp.asarray(weights, jnp.bfloat16), -1, 0))
    total = lambda g: jnp.sum(jnp.moveaxis(encoding(g), -1, 0) * arranged)  # noqa: E731
    return jax.tree.leaves(jax.jit(jax.grad(total))(GAUSSIANS))

  for a, b in zip(*map(slopes, _pair(case))):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=1e-2 * np.std(b), rtol=1e-2)


def test_finite_for_the_largest_numbers():
  _, packed = _pair('360')
  means, covs = np.meshgrid([0, -2, 1e6, -1e38], [0, 1e-12, 1, 1e30, 1e38])
  gaussians = structs.Gaussians(
    jnp.float32(means.reshape(-1, 1) * np.ones(3)),
    jnp.float32(covs.reshape(-1, 1, 1) * np.ones((3, 3))),
  )

  def total(gaussians):
    features = packed(gaussians)
    return jnp.sum(features.astype(jnp.float32)), features

  slope, features = jax.jit(jax.grad(total, has_aux=True))(gaussians)
  assert np.all(np.abs(np.float32(features)) <= 1)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))


def test_64_bit_types_do_not_leak():
  _, packed = _pair('an_odd_number_of_octaves')

  def around(gaussians):
    features = packed(gaussians)
    return features, features.astype(float), jnp.arange(3), jnp.sum(features > 0), jnp.zeros(3)

  types = [str(x.dtype) for x in jax.jit(around)(GAUSSIANS)]
  assert types == ['bfloat16', 'float32', 'int32', 'int32', 'float32']
  total = lambda g: jnp.sum(packed(g).astype(float))  # noqa: E731
  program = jax.jit(jax.value_and_grad(total)).lower(GAUSSIANS).as_text()
  assert 'ui64' in program  # The packed words.
  assert 'f64' not in program
  assert not jax.config.jax_enable_x64


def test_plain_arrange_is_the_identity():
  rows = np.random.default_rng(0).normal(size=(504, 2)).astype(np.float32)
  np.testing.assert_array_equal(_pair('360')[0].arrange(rows), rows)


class TestTpu:
  """The encoding for TPUs, which `math.by_platform` selects when a program is lowered for one."""

  @pytest.fixture(autouse=True)
  def on_tpu(self, monkeypatch):
    monkeypatch.setattr(math, 'by_platform', lambda tpu, default: tpu)

  @pytest.mark.parametrize('case', CASES)
  def test_is_a_reordering_of_the_plain_encoding(self, case, monkeypatch):
    encoding = _pair(case)[0]
    found = np.moveaxis(jax.jit(lambda g: encoding(g))(GAUSSIANS), -1, 0)
    wanted = encoding.arrange(jnp.moveaxis(_features(case)[0], -1, 0))
    assert found.shape == wanted.shape == (encoding.num_features, 2, 100)
    octaves = np.asarray(encoding.arrange(2.0 ** _octaves(case)))[:, None, None]
    assert np.all(np.abs(found - wanted) <= 1e-6 + 2e-7 * octaves)

  def test_a_layer_gives_the_same(self):
    kernel = np.random.default_rng(1).normal(size=(504, 8)).astype(np.float32)
    encoding = _pair('360')[0]
    found = encoding(GAUSSIANS) @ encoding.arrange(kernel)
    np.testing.assert_allclose(found, _features('360')[0] @ kernel, atol=0.02)

  def test_features_have_the_dtype_of_the_layers_and_are_averaged_in_float32(self):
    low, high, basis = CASES['360']
    kind = functools.partial(
      encodings.IntegratedPositionalEncoding, low, high, *basis, dtype=jnp.bfloat16
    )
    several = _gaussians(2, 10, 6)
    assert kind()(several).dtype == jnp.bfloat16
    assert kind(multisampled=True)(several).dtype == jnp.float32

  def test_four_coordinates(self):
    encoding = encodings.IntegratedPositionalEncoding(0, 4, 'octahedron', 1, axes=4)
    mean = jnp.linspace(-1, 1, 20).reshape(5, 4)
    features = encoding(structs.Gaussians(mean, jnp.zeros((5, 4, 4))))
    sines = np.sin(np.asarray(mean)[..., None] * 2.0 ** np.arange(4))  # [5, axis, octave]
    np.testing.assert_allclose(features.reshape(5, 4, 2, 4)[:, :, 0], sines, atol=1e-5)
