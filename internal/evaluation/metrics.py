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
) -> dict[str, float]:
  """The four METRICS of one rendering [h, w, 3] against its photograph [h, w, 3].

  With `measure_lpips` (of `lpips.load`) also those of LPIPS. Config.eval_quantize_metrics and
  Config.eval_crop_borders are heeded by all; colours are corrected before quantisation and over
  the whole image. With a mask [h, w] bool only its pixels count: in PSNR and in the colour fit each
  by itself, in SSIM those whose whole window does, in LPIPS as `lpips.load` says.

  Raises:
    ValueError: the sizes differ, or too little is left of the image for SSIM or LPIPS.
  """
  img, truth = _as_float(img), _as_float(truth)
  if img.shape != truth.shape:
    raise UserError(f'A rendering of {img.shape} cannot be compared with {truth.shape}.')
  result, counted = {}, None
  if mask is not None:
    counted = np.asarray(image.crop(jnp.asarray(mask)[..., None], config.eval_crop_borders))[..., 0]
  for prefix, shown in (('', img), ('cc_', image.color_correct(img, truth, mask))):
    if config.eval_quantize_metrics:
      shown = image.quantize(shown)
    shown, wanted = (image.crop(x, config.eval_crop_borders) for x in (shown, truth))
    # Summed in double precision: a million small numbers.
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
  """The METRICS, and those of LPIPS where measured, as a piece of a line."""
  shown = [name for name in (*METRICS, *lpips.METRICS) if row.get(name) is not None]
  return '  '.join(f'{k} {row[k]:.2f}' if 'psnr' in k else f'{k} {row[k]:.4f}' for k in shown)
