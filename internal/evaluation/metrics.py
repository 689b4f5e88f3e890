"""Metrics of rendered images: PSNR, SSIM and LPIPS, with and without colour correction.

Images are float [h, w, 3] in [0, 1], or uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from .. import configs, image
from ..errors import UserError
from . import lpips

METRICS = ('psnr', 'ssim', 'cc_psnr', 'cc_ssim')


def image_metrics(
  img: np.ndarray,
  truth: np.ndarray,
  config: configs.Config,
  mask: np.ndarray | None = None,
  measure_lpips: Callable[..., dict[str, float]] | None = None,
  color_correct: bool = True,
) -> dict[str, float]:
  """Computes METRICS of a rendered image, and lpips.METRICS if `measure_lpips` is given.

  Colours are corrected before quantisation and over the whole image.

  Args:
    img: [h, w, 3] rendering.
    truth: [h, w, 3] photograph.
    config: for eval_quantize_metrics and eval_crop_borders, which apply to all metrics.
    mask: [h, w] bool, the pixels that count. PSNR and the colour fit use these pixels, SSIM the
      windows that lie inside the mask, LPIPS as described in `lpips.load`.
    measure_lpips: the result of `lpips.load`.
    color_correct: whether to compute the cc_ metrics too.

  Raises:
    UserError: the sizes differ, or the image is too small for SSIM or LPIPS.
  """
  img, truth = _as_float(img), _as_float(truth)
  if img.shape != truth.shape:
    raise UserError(
      f'The rendering {img.shape} and the photograph {truth.shape} must have the same shape.'
    )
  result, counted = {}, None
  if mask is not None:
    counted = np.asarray(image.crop(jnp.asarray(mask)[..., None], config.eval_crop_borders))[..., 0]
  variants = {'': img}
  if color_correct:
    variants['cc_'] = image.color_correct(img, truth, mask)
  for prefix, shown in variants.items():
    if config.eval_quantize_metrics:
      shown = image.quantize(shown)
    shown, wanted = (image.crop(x, config.eval_crop_borders) for x in (shown, truth))
    # In double precision, since a million small numbers are summed.
    square = np.square(np.asarray(shown) - np.asarray(wanted))
    mse = np.mean(square if counted is None else square[counted], dtype=np.float64)
    result[f'{prefix}psnr'] = float(image.mse_to_psnr(jnp.float32(mse)))
    result[f'{prefix}ssim'] = float(image.ssim(shown, wanted, counted))
    if not prefix and measure_lpips is not None:
      result |= measure_lpips(shown, wanted, counted)
  order = (*METRICS, *lpips.METRICS)
  return {name: result[name] for name in order if name in result}


def _as_float(img: np.ndarray) -> jax.Array:
  if np.asarray(img).dtype == np.uint8:
    return jnp.asarray(img, jnp.float32) / 255
  return jnp.clip(jnp.asarray(img, jnp.float32), 0, 1)


def format_metrics(row: Mapping[str, float | None]) -> str:
  """Formats the metrics that were measured for a log line."""
  shown = [name for name in (*METRICS, *lpips.METRICS) if row.get(name) is not None]
  return '  '.join(f'{k} {row[k]:.2f}' if 'psnr' in k else f'{k} {row[k]:.4f}' for k in shown)
