"""Colour spaces and image metrics.

Images are float [..., h, w, 3] in [0, 1], in sRGB unless a name says `linear`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .errors import UserError

Array = jax.Array

_SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5
_SSIM_BLOCK = 64  # Pixels along a side that one product computes.
_SSIM_K1, _SSIM_K2 = 0.01, 0.03
_CORRECTION_ROUNDS = 5
_CLIPPED = 0.5 / 255  # Values this close to 0 or 1 may be saturated.


def linear_to_srgb(linear: Array) -> Array:
  """Converts linear light to sRGB (IEC 61966-2-1), both in [0, 1], any shape."""
  # The gradient of the power is infinite at 0.
  curved = 1.055 * jnp.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055
  return jnp.where(linear <= 0.0031308, 12.92 * linear, curved)


def srgb_to_linear(srgb: Array) -> Array:
  """Converts sRGB to linear light (IEC 61966-2-1), both in [0, 1], any shape."""
  curved = ((jnp.maximum(srgb, 0.04045) + 0.055) / 1.055) ** 2.4
  return jnp.where(srgb <= 0.04045, srgb / 12.92, curved)


def mse_to_psnr(mse: Array) -> Array:
  """Converts mean squared error (peak 1) to PSNR in dB, -10 log10(mse); infinite for 0."""
  return -10 / np.log(10) * jnp.log(mse)


def psnr_to_mse(psnr: Array) -> Array:
  """Converts PSNR in dB to mean squared error (peak 1): the inverse of `mse_to_psnr`."""
  return jnp.exp(-np.log(10) / 10 * psnr)


def quantize(img: Array) -> Array:
  """Clips to [0, 1] and rounds to the 256 levels of an 8-bit image, any shape."""
  return jnp.round(255 * jnp.clip(img, 0, 1)) / 255


def crop(img: Array, border: int) -> Array:
  """Removes `border` pixels from each side of images [..., h, w, c].

  Raises:
    UserError: border is negative, or no pixel would remain.
  """
  height, width = img.shape[-3:-1]
  if border < 0 or 2 * border >= min(height, width):
    raise UserError(
      f'Cannot crop {border} pixels from each side of a {width}x{height} image; use 0 to '
      f'{(min(height, width) - 1) // 2}.'
    )
  return img[..., border : height - border, border : width - border, :]


def _blur(img: Array) -> Array:
  """Applies the Gaussian window: [..., h, w, c] -> [..., h - 10, w - 10, c], no padding."""
  return _blur_along(_blur_along(img, -3), -2)


def _blur_along(img: Array, axis: int) -> Array:
  """Applies the window along one axis: products of a band matrix and blocks of the image.

  Precision is the highest, because GPUs may round the inputs of products to TF32. On CPUs this is
  two to four times as fast as sums of shifted images.
  """
  margin, count = _SSIM_WINDOW - 1, img.shape[axis] - _SSIM_WINDOW + 1
  size = min(_SSIM_BLOCK, count)
  blocks = -(-count // size)
  offsets = np.arange(size + margin) - np.arange(size)[:, None] - margin / 2
  window = np.exp(-0.5 * (offsets / _SSIM_SIGMA) ** 2) * (abs(offsets) <= margin / 2)
  window = np.float32(window / window.sum(1, keepdims=True))  # [size, size + margin]
  rows = jnp.moveaxis(img, axis, 0)
  rows = jnp.pad(rows, [(0, blocks * size - count)] + [(0, 0)] * (img.ndim - 1))
  parts = jnp.stack([rows[k * size : (k + 1) * size + margin] for k in range(blocks)])
  sums = jnp.einsum('yh,kh...->ky...', window, parts, precision='highest')
  return jnp.moveaxis(sums.reshape(-1, *rows.shape[1:])[:count], 0, axis)


@jax.jit
def ssim(a: Array, b: Array, mask: Array | None = None) -> Array:
  """Computes the structural similarity (SSIM) of images (Wang et al. 2004).

  Each channel is compared with a Gaussian window (11 pixels, sigma 1.5) and constants k1 = 0.01
  and k2 = 0.03. The result is the mean over channels and over windows inside the image.

  Args:
    a: [..., h, w, c] images in [0, 1].
    b: images of the same shape.
    mask: [h, w] bool, for images without batch axes: only windows that lie inside it count.

  Returns:
    [...] similarity, at most 1. NaN if no window lies inside the mask.

  Raises:
    UserError: the shapes differ, or an image is smaller than the window.
  """
  if a.shape != b.shape:
    raise UserError(f'SSIM requires images of the same shape, got {a.shape} and {b.shape}.')
  if min(a.shape[-3:-1]) < _SSIM_WINDOW:
    height, width = a.shape[-3:-1]
    raise UserError(
      f'SSIM needs {_SSIM_WINDOW}x{_SSIM_WINDOW} pixels or more, got an image of {width}x{height}.'
    )
  mean_a, mean_b = _blur(a), _blur(b)
  # Rounding can take a variance below 0, and a covariance above its bound from the variances.
  # The gradient of the root is infinite at 0.
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
  """Returns the quadratic monomials of colours: [n, 3] -> [n, 10]."""
  x = 2 * pixels - 1  # In [-1, 1] the least-squares problem is better conditioned.
  i, j = np.triu_indices(3)
  return jnp.concatenate([x[:, i] * x[:, j], x, jnp.ones_like(x[:, :1])], -1)


def _fit_residual(features: Array, residual: Array, valid: Array) -> Array:
  """Fits features [n, 10] to residual [n] by least squares, over the rows where valid [n].

  Solved by QR, which does not square the condition number. Underdetermined problems (a grey image,
  few pixels) get the solution of minimum norm.

  Returns:
    [10] coefficients.
  """
  system = jnp.concatenate([features, residual[:, None]], -1)  # [n, 11]
  # QR needs at least as many rows as columns; zero rows do not change the solution.
  system = jnp.pad(jnp.where(valid[:, None], system, 0), ((0, system.shape[1]), (0, 0)))
  triangle = jnp.linalg.qr(system, mode='r')
  return jnp.linalg.lstsq(triangle[:-1, :-1], triangle[:-1, -1])[0]


@jax.jit
def color_correct(img: Array, ref: Array, mask: Array | None = None) -> Array:
  """Matches the colours of an image to a reference by a global quadratic colour transform.

  In each of five rounds, every channel of ref is fitted by a quadratic polynomial of the three
  channels of img. Only pixels count whose channel is unsaturated in ref, in img and in the current
  result. A channel without such pixels stays unchanged.

  Args:
    img: [h, w, 3] image to correct, in [0, 1].
    ref: [h, w, 3] reference, in [0, 1].
    mask: [h, w] bool pixels to fit; None means all.

  Returns:
    [h, w, 3] corrected image, in [0, 1].
  """

  def unclipped(x):
    return (x >= _CLIPPED) & (x <= 1 - _CLIPPED)

  start, target = img.reshape(-1, 3), ref.reshape(-1, 3)
  usable = unclipped(start) & unclipped(target)
  if mask is not None:
    usable &= mask.reshape(-1, 1)

  def correct(_, pixels):
    features = _quadratic_features(pixels)
    # Fitting the residual leaves the image unchanged where no pixel is usable.
    fit = jax.vmap(_fit_residual, (None, 1, 1), 1)
    coefficients = fit(features, target - pixels, usable & unclipped(pixels))
    change = jnp.matmul(features, coefficients, precision=jax.lax.Precision.HIGHEST)
    return jnp.clip(pixels + change, 0, 1)

  return jax.lax.fori_loop(0, _CORRECTION_ROUNDS, correct, start).reshape(img.shape)
