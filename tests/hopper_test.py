"""Kernels for Hopper GPUs: results in the interpreter, supported shapes, lowering."""

import functools
import re

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from internal.fields import dense, hopper

# Interprets kernels on the CPU: blocks in sequence, warpgroups as threads.
_HAS_INTERPRETER = hasattr(plgpu, 'InterpretGPUParams')
INTERPRET = plgpu.InterpretGPUParams() if _HAS_INTERPRETER else None
needs_interpreter = pytest.mark.skipif(
  not _HAS_INTERPRETER, reason='before JAX 0.11 Pallas cannot interpret these kernels'
)


@pytest.fixture
def interpret(capsys):
  """Parameters for interpreting kernels; fails the test if a race is detected."""
  yield plgpu.InterpretGPUParams(detect_races=True)
  assert 'RACE DETECTED' not in capsys.readouterr().out


def _normal(seed, *shape, dtype=jnp.bfloat16):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _wide(x):
  return np.asarray(x, np.float64)


def _product_twin(xs, ws, bias=None, outer=None, relu=False, mask=None):
  out = sum(_wide(x) @ _wide(w) for x, w in zip(xs, ws))
  if bias is not None:
    out = out + _wide(bias)
  if outer is not None:
    out = out + np.outer(_wide(outer[0]), _wide(outer[1]))
  if relu:
    out = np.maximum(out, 0)
  return out if mask is None else np.where(_wide(mask) > 0, out, 0)


def _assert_rounded(out, exact):
  """Checks that `out` is `exact` rounded to bfloat16, up to errors of float32 sums."""
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(_wide(out), exact, rtol=1.01 * 2**-8, atol=1e-4)


@needs_interpreter
class TestProduct:
  def _check(self, interpret, m, n, depths, blocks, **extras):
    xs = [_normal(i, m, k) for i, k in enumerate(depths)]
    ws = [_normal(10 + i, k, n) / 16 for i, k in enumerate(depths)]
    out = hopper.product(xs, ws, blocks=blocks, interpret=interpret, **extras)
    exact = _product_twin(xs, ws, **extras)
    assert np.std(exact) > 0.1
    _assert_rounded(out, exact)

  def test_two_tiles_of_one_block_and_one_of_another(self, interpret):
    self._check(interpret, 384, 256, (256,), 2)  # Four steps per tile wrap around a ring of three.

  def test_bias_and_relu_with_fewer_tiles_than_blocks(self, interpret):
    bias = _normal(20, 512, dtype=jnp.float32)
    self._check(interpret, 128, 512, (192,), 132, bias=bias, relu=True)

  def test_mask_keeps_what_is_positive(self, interpret):
    mask = _normal(21, 384, 256).at[:, ::3].set(0)
    self._check(interpret, 384, 256, (192,), 1, mask=mask)

  def test_outer_product(self, interpret):
    outer = _normal(22, 256, dtype=jnp.float32), _normal(23, 512, dtype=jnp.float32)
    self._check(interpret, 256, 512, (192,), 3, outer=outer)

  def test_two_products_and_everything(self, interpret):
    extras = {
      'bias': _normal(24, 256, dtype=jnp.float32),
      'outer': (_normal(25, 384, dtype=jnp.float32), _normal(26, 256, dtype=jnp.float32)),
      'mask': _normal(27, 384, 256),
      'relu': True,
    }
    self._check(interpret, 384, 256, (192, 128), 1, **extras)  # Three tiles.


@needs_interpreter
class TestWeightGradient:
  def _check(self, interpret, m, k, n, blocks, parts):
    assert hopper._parts(m, k, (k // 128) * (n // 256), blocks) == parts
    x, g = _normal(0, m, k), _normal(1, m, n) / 16 + 0.01
    dw, sums = hopper.weight_gradient(x, g, blocks=blocks, interpret=interpret)
    assert dw.dtype == sums.dtype == jnp.float32
    np.testing.assert_allclose(dw, _wide(x).T @ _wide(g), atol=1e-4)
    np.testing.assert_allclose(sums, _wide(g).sum(0), atol=1e-4)

  def test_one_part(self, interpret):
    self._check(interpret, 384, 128, 256, 1, 1)

  def test_parts_of_rows_and_tiles_across(self, interpret):
    self._check(interpret, 512, 128, 512, 4, 2)

  def test_parts_of_rows_and_two_tiles_down(self, interpret):
    self._check(interpret, 512, 256, 256, 4, 2)

  def test_three_tiles_down(self, interpret):
    self._check(interpret, 384, 384, 256, 5, 1)


@needs_interpreter
class TestLayerGradient:
  def _check(self, interpret, m, k, blocks, teams, outer=None):
    assert hopper._teams(m, k // 128, blocks) == teams
    x, g = _normal(0, m, k).at[:, ::5].set(0), _normal(1, m, 256) / 16 + 0.01
    w = _normal(2, k, 256) / 4
    dx, dw, sums = hopper.layer_gradient(x, g, w, outer=outer, blocks=blocks, interpret=interpret)
    exact = _product_twin([g], [w.T], outer=outer, mask=x)
    assert np.std(exact) > 0.1
    _assert_rounded(dx, exact)
    assert dw.dtype == sums.dtype == jnp.float32
    np.testing.assert_allclose(dw, _wide(x).T @ _wide(g), atol=1e-4)
    np.testing.assert_allclose(sums, exact.sum(0), atol=1e-3)

  def test_one_team_of_two_blocks(self, interpret):
    self._check(interpret, 64 * 5, 256, 2, 1)  # Five tiles wrap around a ring of three.

  def test_teams_with_unequal_shares_of_the_rows(self, interpret):
    outer = _normal(3, 64 * 7, dtype=jnp.float32), _normal(4, 256, dtype=jnp.float32)
    self._check(interpret, 64 * 7, 256, 5, 2, outer)

  def test_one_block_a_team(self, interpret):
    self._check(interpret, 64 * 6, 128, 132, 2)  # Of 132 blocks, two fill their rings.

  def test_wider_input(self, interpret):
    self._check(interpret, 64 * 3, 384, 3, 1)


class TestFits:
  def test_a_gradient_s_parts_fill_the_ring_with_whole_rounds(self):
    checked = 0
    for rows in range(64, 70000, 64):
      for depth in range(0, 1664, 128):
        if not hopper.fits(rows, depth, 256):
          continue
        down = depth // 128
        for across, blocks in ((1, 1), (1, 132), (2, 78), (4, 132)):
          parts = hopper._parts(rows, depth, down * across, blocks)
          assert parts > 0
          steps, rest = divmod(rows, parts * hopper._DEPTH)
          assert rest == 0
          assert steps % down == 0
          assert steps >= hopper._GRADIENT_STAGES
          assert parts == 1 or parts * down * across <= blocks
          checked += 1
    assert checked > 5000

  @pytest.mark.parametrize(
    ('rows', 'depth', 'parts'),
    [
      (4096, 256, 16),  # 32 parts would have two steps each, fewer than the ring has slots.
      (4096 * 3, 384, 32),
      (16384 * 32, 1024, 16),
      (256, 256, 1),
    ],
  )
  def test_number_of_parts(self, rows, depth, parts):
    assert hopper.fits(rows, depth, 256)
    assert hopper._parts(rows, depth, depth // 128, 132) == parts

  @pytest.mark.parametrize(
    'sizes',
    [
      (1023, 256, 256),
      (1024 + 64, 256, 256),
      (1024, 256 + 64, 256),
      (1024, 256, 256 + 128),
      (1024, 128, 256),  # Fewer steps than the ring has slots.
      (1024, 0, 256),
      (1024, 384, 256),  # Not a whole number of rounds of three.
      (128, 256, 256),
      (0, 256, 256),
    ],
  )
  def test_unsupported_shapes(self, sizes):
    assert not hopper.fits(*sizes)

  def test_supports_the_layers_of_the_paper(self):
    rows = 16384 * 32
    for depth, width in ((1024, 1024), (512, 1024), (256, 1024), (1024, 256)):
      assert hopper.fits(rows, depth, width)
    for depth, width in ((256, 256), (512, 256)):
      assert hopper.fits(2 * rows, depth, width)

  @pytest.mark.parametrize(
    ('sizes', 'expected'),
    [
      ((192, 256, 256), True),
      ((16384 * 32, 1024, 256), True),
      ((16384 * 128 + 64, 256, 256), True),
      ((16384 * 128 + 32, 256, 256), False),
      ((1024, 192, 256), False),
      ((1024, 256, 512), False),
      ((1024, 0, 256), False),
      ((128, 256, 256), False),  # Fewer tiles than the ring has slots.
    ],
  )
  def test_narrow_layers(self, sizes, expected):
    assert hopper.fits_layer(*sizes) is expected

  @pytest.mark.parametrize(
    ('backend', 'capability', 'expected'),
    [('cpu', '9.0', False), ('gpu', '8.0', False), ('gpu', '9.0', True), ('gpu', '10.0', False)],
  )
  def test_available_only_on_hopper(self, monkeypatch, backend, capability, expected):
    device = type('Device', (), {'compute_capability': capability})
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    monkeypatch.setattr(jax, 'devices', lambda: [device])
    assert hopper.available() is expected


def lower_for_cuda(fn, *args) -> str:
  """Lowers `fn` for CUDA, which needs no GPU; `args` may be ShapeDtypeStructs."""
  return fn.trace(*args).lower(lowering_platforms=('cuda',)).as_text()


def kernels(text: str) -> list[str]:
  """Returns the hashes of the Mosaic GPU kernels in a lowered program."""
  assert 'custom_call @mosaic_gpu' in text
  hashes = re.findall(r'kernel_hash = "([^"]*)"', text)
  assert len(hashes) == len(re.findall(r'custom_call @mosaic_gpu', text))
  return hashes


def _shape(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


class TestLowering:
  def test_product(self):
    def everything(xs, ws, bias, outer, mask):
      return hopper.product(xs, ws, bias=bias, outer=outer, relu=True, mask=mask)

    def plain(x, w):
      return hopper.product([x], [w])

    xs, ws = [_shape(1024, 256), _shape(1024, 384)], [_shape(256, 512), _shape(384, 512)]
    vectors = [_shape(k, dtype=jnp.float32) for k in (512, 1024, 512)]
    args = xs, ws, vectors[0], tuple(vectors[1:]), _shape(1024, 512)
    texts = lower_for_cuda(jax.jit(everything), *args), lower_for_cuda(jax.jit(plain), xs[0], ws[0])
    hashes = [kernels(text) for text in texts]
    assert [len(h) for h in hashes] == [1, 1]
    assert hashes[0] != hashes[1]

  def test_weight_gradient(self):
    args = _shape(4096, 256), _shape(4096, 512)
    assert len(kernels(lower_for_cuda(hopper.weight_gradient, *args))) == 1

  def test_layer_gradient(self):
    def gradient(x, g, w, outer):
      return hopper.layer_gradient(x, g, w, outer=outer)

    outer = _shape(4096, dtype=jnp.float32), _shape(512, dtype=jnp.float32)
    args = _shape(4096, 512), _shape(4096, 256), _shape(512, 256)
    texts = [lower_for_cuda(jax.jit(gradient), *args, o) for o in (None, outer)]
    hashes = [kernels(text) for text in texts]
    assert [len(h) for h in hashes] == [1, 1]
    assert hashes[0] != hashes[1]

  def test_identical_calls_share_a_kernel(self):
    """The gradient of eight layers has 19 products; compiling each separately takes minutes."""
    full = functools.partial(_shape, dtype=jnp.float32)
    layers = [
      dense.Layer(full(512, 512) if i else None, full(256, 512) if i in (0, 5) else None, full(512))
      for i in range(8)
    ]
    heads = dense.Heads(full(512), full(512, 256))

    def total(layers, heads, encoded):
      density, bottleneck = dense.trunk(layers, heads, encoded, True)
      return jnp.sum(density) + jnp.sum(bottleneck.astype(jnp.float32))

    text = lower_for_cuda(jax.jit(jax.grad(total, (0, 1))), tuple(layers), heads, _shape(4096, 256))
    calls = len(re.findall(r'call @(?:product|weight_gradient|layer_gradient)', text))
    assert calls == 18
    assert len(set(kernels(text))) <= 6
    assert len(kernels(text)) <= 7
