"""Colour spaces and the metrics that renderings are judged by.

Images are float [..., h, w, 3] in [0, 1], sRGB unless a name says linear; `mse` and `psnr` have
any shape.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .errors import UserError

Array = jax.Array

_SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5
_SSIM_K1, _SSIM_K2 = 0.01, 0.03
_CORRECTION_ROUNDS = 5
_CLIPPED = 0.5 / 255  # A value this close to 0 or 1 may have been cut off there.


def linear_to_srgb(linear: Array) -> Array:
  """The sRGB transfer curve (IEC 61966-2-1), linear light to display values, any shape."""
  # The power's argument is kept off zero, where its gradient is infinite.
  curved = 1.055 * jnp.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055
  return jnp.where(linear <= 0.0031308, 12.92 * linear, curved)


def srgb_to_linear(srgb: Array) -> Array:
  """The inverse of `linear_to_srgb`, any shape."""
  curved = ((jnp.maximum(srgb, 0.04045) + 0.055) / 1.055) ** 2.4
  return jnp.where(srgb <= 0.04045, srgb / 12.92, curved)


def mse_to_psnr(mse: Array) -> Array:
  """Peak signal-to-noise ratio in dB of a mean squared error, for a peak of 1; inf for 0."""
  return -10 / np.log(10) * jnp.log(mse)


def psnr_to_mse(psnr: Array) -> Array:
  """The inverse of `mse_to_psnr`."""
  return jnp.exp(-np.log(10) / 10 * psnr)


def quantize(img: Array) -> Array:
  """Clips to [0, 1] and rounds to the 256 values that an 8-bit file can hold."""
  return jnp.round(255 * jnp.clip(img, 0, 1)) / 255


def crop(img: Array, border: int) -> Array:
  """Drops `border` pixels on each side of [..., h, w, c].

  Raises:
    ValueError: nothing would be left.
  """
  height, width = img.shape[-3:-1]
  if border < 0 or 2 * border >= min(height, width):
    raise UserError(f'Cannot crop {border} pixels off each side of a {width}x{height} image.')
  return img[..., border : height - border, border : width - border, :]


def _blur(img: Array) -> Array:
  """Gaussian window over the valid region: [..., h, w, c] -> [..., h - 10, w - 10, c].

  Written as shifted sums: a convolution would round its inputs to TF32 on a GPU.
  """
  offsets = np.arange(_SSIM_WINDOW) - (_SSIM_WINDOW - 1) / 2
  window = np.exp(-0.5 * (offsets / _SSIM_SIGMA) ** 2)
  window = [float(x) for x in window / window.sum()]
  height, width = (n - _SSIM_WINDOW + 1 for n in img.shape[-3:-1])
  img = sum(x * img[..., i : i + height, :, :] for i, x in enumerate(window))
  return sum(x * img[..., i : i + width, :] for i, x in enumerate(window))


@jax.jit
def ssim(a: Array, b: Array, mask: Array | None = None) -> Array:
  """Structural similarity of two images of peak 1, [..., h, w, c] -> [...].

  Wang et al. 2004, with its window (Gaussian, 11 pixels, sigma 1.5) and constants (0.01, 0.03),
  on each channel; the mean over channels and the pixels whose whole window lies in the image. With
  a mask [h, w] bool (of images without leading axes) all of the window must count; where no window
  does, the result is NaN.

  Raises:
    ValueError: the shapes differ, or the image is smaller than the window.
  """
  if a.shape != b.shape:
    raise UserError(f'SSIM compares images of one shape, got {a.shape} and {b.shape}.')
  if min(a.shape[-3:-1]) < _SSIM_WINDOW:
    height, width = a.shape[-3:-1]
    raise UserError(f'SSIM needs {_SSIM_WINDOW} pixels each way, got an image of {width}x{height}.')
  mean_a, mean_b = _blur(a), _blur(b)
  # Rounding can push a variance below zero, and a covariance above what the variances allow.
  # The root is kept off zero, where its gradient is infinite.
  var_a = jnp.maximum(_blur(a * a) - mean_a * mean_a, 0)
  var_b = jnp.maximum(_blur(b * b) - mean_b * mean_b, 0)
  limit = jnp.sqrt(jnp.maximum(var_a * var_b, 1e-24))
  cov = jnp.clip(_blur(a * b) - mean_a * mean_b, -limit, limit)
  c1, c2 = _SSIM_K1**2, _SSIM_K2**2
  numerator = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
  denominator = (mean_a * mean_a + mean_b * mean_b + c1) * (var_a + var_b + c2)
  similarity = numerator / denominator
  if mask is None:
    return similarity.mean((-3, -2, -1))
  window = (_SSIM_WINDOW, _SSIM_WINDOW)
  whole = jax.lax.reduce_window(mask, True, jax.lax.bitwise_and, window, (1, 1), 'VALID')
  return jnp.where(whole, similarity.mean(-1), 0).sum() / whole.sum()


def _quadratic_features(pixels: Array) -> Array:
  """Six products, three linear terms and a constant: [n, 3] -> [n, 10].

  Of 2 x - 1, not x: the fit is the same polynomial, and better conditioned.
  """
  x = 2 * pixels - 1
  i, j = np.triu_indices(3)
  return jnp.concatenate([x[:, i] * x[:, j], x, jnp.ones_like(x[:, :1])], -1)


def _fit_residual(features: Array, residual: Array, valid: Array) -> Array:
  """Least-squares coefficients [10] of residual [n] over the rows where valid [n].

  Only the triangle of a QR decomposition is needed, so the condition number is never squared;
  what the rows leave open (a grey image, few pixels) gets the smallest coefficients.
  """
  system = jnp.concatenate([features, residual[:, None]], -1)
  # Zero rows change nothing; these make the matrix tall, however small the image is.
  system = jnp.pad(jnp.where(valid[:, None], system, 0), ((0, system.shape[1]), (0, 0)))
  triangle = jnp.linalg.qr(system, mode='r')
  return jnp.linalg.lstsq(triangle[:-1, :-1], triangle[:-1, -1])[0]


@jax.jit
def color_correct(img: Array, ref: Array, mask: Array | None = None) -> Array:
  """Gives img [h, w, 3] the colours of ref [h, w, 3], as far as one colour curve can.

  Five rounds; in each, every channel of ref is fitted as a quadratic polynomial of the three
  channels of img, over the pixels where that channel is unclipped in ref, in img, and in img as
  it came. A channel without such pixels stays as it is. Only pixels of the mask [h, w] bool, where
  there is one, are fitted.
  """

  def unclipped(x):
    return (x >= _CLIPPED) & (x <= 1 - _CLIPPED)

  start, target = img.reshape(-1, 3), ref.reshape(-1, 3)
  usable = unclipped(start) & unclipped(target)
  if mask is not None:
    usable &= mask.reshape(-1, 1)

  def correct(_, pixels):
    features = _quadratic_features(pixels)
    # The fit is of what is missing: without evidence, its answer is then no change.
    fit = jax.vmap(_fit_residual, (None, 1, 1), 1)
    coefficients = fit(features, target - pixels, usable & unclipped(pixels))
    change = jnp.matmul(features, coefficients, precision=jax.lax.Precision.HIGHEST)
    return jnp.clip(pixels + change, 0, 1)

  return jax.lax.fori_loop(0, _CORRECTION_ROUNDS, correct, start).reshape(img.shape)
