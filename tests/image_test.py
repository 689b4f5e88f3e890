"""Metrics against independent float64 implementations (scipy filters, numpy least squares)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from internal import image


def natural(rng, height=40, width=48):
  """Returns a smooth random image [h, w, 3] that spans [0, 1]."""
  noise = ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (3, 3, 0.5))
  return (noise - noise.min()) / (noise.max() - noise.min())


@pytest.fixture
def rng():
  return np.random.default_rng(7)


class TestColourSpaces:
  def test_known_points(self):
    linear = jnp.array([0.0, 0.0031308, 0.2158605, 1.0])
    srgb = jnp.array([0.0, 0.0404499, 0.5019608, 1.0])  # The third is 128 / 255.
    np.testing.assert_allclose(image.linear_to_srgb(linear), srgb, atol=1e-6)
    np.testing.assert_allclose(image.srgb_to_linear(srgb), linear, atol=1e-6)

  def test_round_trip(self):
    x = jnp.linspace(0, 1, 513)
    np.testing.assert_allclose(image.srgb_to_linear(image.linear_to_srgb(x)), x, atol=1e-6)

  @pytest.mark.parametrize('fn', [image.linear_to_srgb, image.srgb_to_linear])
  def test_gradient_is_finite_and_positive(self, fn):
    gradient = jax.vmap(jax.grad(fn))(jnp.array([0.0, 1e-6, 0.003, 0.0031308, 0.04045, 0.5, 1.0]))
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient > 0)


class TestPsnr:
  def test_definition(self):
    assert image.mse_to_psnr(0.01) == pytest.approx(20, abs=1e-5)
    assert image.mse_to_psnr(1.0) == 0
    assert np.isposinf(image.mse_to_psnr(jnp.float32(0)))

  def test_round_trip(self):
    psnr = jnp.array([3.0, 24.37, 33.46, 60.0])
    np.testing.assert_allclose(image.mse_to_psnr(image.psnr_to_mse(psnr)), psnr, rtol=1e-5)


class TestQuantizeAndCrop:
  def test_quantize_returns_8_bit_levels(self):
    x = jnp.array([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 0.5, 1.0, 1.7])
    np.testing.assert_array_equal(
      np.round(image.quantize(x) * 255), np.array([0, 0, 0, 1, 128, 255, 255])
    )

  def test_quantize_keeps_8_bit_levels(self):
    levels = jnp.arange(256, dtype=jnp.float32) / 255
    np.testing.assert_array_equal(image.quantize(levels), levels)

  def test_crop_keeps_the_middle(self):
    x = jnp.arange(2 * 6 * 8 * 3).reshape(2, 6, 8, 3)
    np.testing.assert_array_equal(image.crop(x, 2), x[:, 2:4, 2:6])
    np.testing.assert_array_equal(image.crop(x, 0), x)

  @pytest.mark.parametrize('border', [3, 4, -1])
  def test_crop_of_everything_raises(self, border):
    with pytest.raises(ValueError, match='8x6'):
      image.crop(jnp.zeros((6, 8, 3)), border)


def ssim_twin(a, b):
  """SSIM in float64, by scipy's filter over the whole image and a crop."""
  window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
  window /= window.sum()

  def blur(x):
    x = ndimage.correlate1d(ndimage.correlate1d(x, window, axis=0), window, axis=1)
    return x[5:-5, 5:-5]

  a, b = a.astype(np.float64), b.astype(np.float64)
  ma, mb = blur(a), blur(b)
  va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
  c1, c2 = 0.01**2, 0.03**2
  index = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
  return index.mean()


class TestSsim:
  def test_agrees_with_double_precision(self, rng):
    for noise in (0.003, 0.05, 0.4):
      a = natural(rng)
      b = np.clip(a + rng.normal(0, noise, a.shape), 0, 1)
      assert image.ssim(jnp.float32(a), jnp.float32(b)) == pytest.approx(ssim_twin(a, b), abs=2e-6)

  def test_golden_numbers(self):
    y, x = np.mgrid[:24, :32] / 8.0
    a = np.stack([0.5 + 0.4 * np.sin(x + y), 0.5 + 0.4 * np.cos(x), np.full_like(x, 0.3)], -1)
    b = np.stack([a[..., 0] ** 1.2, 0.9 * a[..., 1], a[..., 2] + 0.02 * np.sin(9 * x)], -1)
    # Computed once by `ssim_twin`; detects a change of both. In the constant channel, variances
    # cancel: rounding left 2.1e-6 on one of two processors.
    assert image.ssim(jnp.float32(a), jnp.float32(b)) == pytest.approx(0.92824786, abs=4e-6)

  def test_is_symmetric_and_one_for_equal_images(self, rng):
    a, b = jnp.float32(natural(rng)), jnp.float32(natural(rng))
    assert image.ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert image.ssim(a, b) == pytest.approx(float(image.ssim(b, a)), abs=1e-6)
    assert image.ssim(a, b) < 0.9

  def test_batches_are_independent(self, rng):
    a = jnp.float32(np.stack([natural(rng) for _ in range(4)])).reshape(2, 2, 40, 48, 3)
    b = a[::-1]
    got = image.ssim(a, b)
    assert got.shape == (2, 2)
    assert got[0, 1] == pytest.approx(float(image.ssim(a[0, 1], b[0, 1])), abs=1e-6)

  @pytest.mark.parametrize('value', [0.0, 0.1, 1.0])
  def test_constant_images_are_in_range(self, value):
    flat = jnp.full((16, 16, 3), value)
    assert image.ssim(flat, flat) == pytest.approx(1, abs=1e-5)
    assert 0 <= image.ssim(flat, 1 - flat) <= 1 + 1e-6

  def test_gradient_is_finite(self, rng):
    a, b, flat = jnp.float32(natural(rng)), jnp.float32(natural(rng)), jnp.zeros((40, 48, 3))
    for x, y in ((a, b), (a, a), (flat, flat), (flat, a)):
      assert np.all(np.isfinite(jax.grad(image.ssim)(x, y)))

  def test_the_smallest_image_has_one_window(self, rng):
    a, b = natural(rng, 11, 11), natural(rng, 11, 11)
    assert image.ssim(jnp.float32(a), jnp.float32(b)) == pytest.approx(ssim_twin(a, b), abs=1e-5)

  def test_smaller_images_raise(self):
    with pytest.raises(ValueError, match=r'11x11 pixels.*20x10'):
      image.ssim(jnp.zeros((10, 20, 3)), jnp.zeros((10, 20, 3)))

  def test_different_shapes_raise(self):
    with pytest.raises(ValueError, match='same shape'):
      image.ssim(jnp.zeros((20, 20, 3)), jnp.zeros((1, 20, 20, 3)))


def correct_twin(img, ref, rounds=5):
  """Colour correction in float64 by numpy's least squares on plain monomials."""
  x, y = img.reshape(-1, 3).astype(np.float64), ref.reshape(-1, 3).astype(np.float64)
  first = x

  def inside(z):
    return (z >= 0.5 / 255) & (z <= 1 - 0.5 / 255)

  for _ in range(rounds):
    r, g, b = x.T
    terms = np.stack([r * r, r * g, r * b, g * g, g * b, b * b, r, g, b, np.ones(len(x))], -1)
    fitted = np.empty_like(x)
    for c in range(3):
      rows = inside(first[:, c]) & inside(x[:, c]) & inside(y[:, c])
      fitted[:, c] = terms @ np.linalg.lstsq(terms[rows], y[rows, c], rcond=None)[0]
    x = np.clip(fitted, 0, 1)
  return x.reshape(img.shape)


def corrected(img, ref):
  return np.asarray(image.color_correct(jnp.float32(img), jnp.float32(ref)))


class TestColorCorrect:
  def test_agrees_with_double_precision(self, rng):
    ref = natural(rng)
    img = np.clip(1.3 * ref**1.4 - 0.15 + rng.normal(0, 0.03, ref.shape), 0, 1)
    assert np.mean(img == 0) > 0.01  # Clipped pixels take part in the test.
    np.testing.assert_allclose(corrected(img, ref), correct_twin(img, ref), atol=2e-4)

  def test_inverts_a_mix_of_channels(self, rng):
    ref = 0.1 + 0.6 * natural(rng)
    mixed = ref @ np.array([[0.8, 0.1, 0.0], [0.1, 0.7, 0.1], [0.0, 0.2, 0.9]])
    # `ref` is a polynomial of degree 1 of `mixed`: the fit has it exactly.
    np.testing.assert_allclose(corrected(mixed, ref), ref, atol=1e-4)

  def test_leaves_an_equal_image_unchanged(self, rng):
    ref = natural(rng)
    np.testing.assert_allclose(corrected(ref, ref), ref, atol=1e-5)

  def test_a_dark_narrow_range_is_still_fitted(self, rng):
    ref = natural(rng)
    np.testing.assert_allclose(corrected(0.05 + 0.02 * ref, ref), ref, atol=2e-3)

  def test_never_raises_the_error_on_unclipped_images(self, rng):
    ref = 0.05 + 0.9 * natural(rng)
    img = np.clip(0.8 * ref + 0.1 + rng.normal(0, 0.05, ref.shape), 0.01, 0.99)
    assert np.mean((corrected(img, ref) - ref) ** 2) < np.mean((img - ref) ** 2)

  def test_grey_images_are_finite_and_fitted(self, rng):
    grey = np.repeat(0.1 + 0.8 * natural(rng)[..., :1], 3, -1)
    ref = np.clip(0.7 * grey + 0.1, 0, 1)
    np.testing.assert_allclose(corrected(grey, ref), ref, atol=1e-4)

  def test_without_usable_pixels_nothing_changes(self, rng):
    img = natural(rng)
    np.testing.assert_array_equal(corrected(img, np.ones_like(img)), img.astype(np.float32))
    black = np.zeros_like(img)
    np.testing.assert_array_equal(corrected(black, img), black)

  @pytest.mark.parametrize('usable', [1, 3, 11])
  def test_few_usable_pixels_give_finite_colours(self, rng, usable):
    ref = np.zeros((16, 16, 3))
    ref[0, :usable] = 0.5
    out = corrected(natural(rng, 16, 16), ref)
    assert np.all((out >= 0) & (out <= 1))

  def test_works_on_a_single_pixel(self):
    out = corrected(np.full((1, 1, 3), 0.3), np.full((1, 1, 3), 0.6))
    np.testing.assert_allclose(out, 0.6, atol=0.01)


def test_the_gradient_of_ssim_is_that_of_finite_differences():
  rng = np.random.default_rng(0)
  a, b, way = (jnp.float32(rng.uniform(size=(14, 17, 3))) for _ in range(3))
  slope = (image.ssim(a + 1e-2 * way, b) - image.ssim(a - 1e-2 * way, b)) / 2e-2
  assert jnp.vdot(jax.grad(image.ssim)(a, b), way) == pytest.approx(float(slope), rel=0.01)
