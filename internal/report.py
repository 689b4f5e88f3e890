"""Metrics of renderings and the file that keeps them, results.json.

Images are float [h, w, 3] in [0, 1], or uint8.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internal import configs, files, image

SCHEMA_VERSION = 1  # Of results.json.
METRICS = ('psnr', 'ssim', 'cc_psnr', 'cc_ssim')

_DESCRIPTION = (
  'Test images rendered at full size, clipped and quantised to 8 bits. PSNR: -10 log10 of the mean '
  'squared error over the image, peak 1. SSIM: Gaussian window 11, sigma 1.5, k1 0.01, k2 0.03, on '
  'RGB, valid region. cc_: after five rounds of a least-squares quadratic colour fit to the true '
  'image. Means are over images.'
)


def image_metrics(
  img: np.ndarray, truth: np.ndarray, config: configs.Config, mask: np.ndarray | None = None
) -> dict[str, float]:
  """The four METRICS of one rendering [h, w, 3] against its photograph [h, w, 3].

  Config.eval_quantize_metrics and Config.eval_crop_borders are heeded; colours are corrected
  before quantisation and over the whole image. With a mask [h, w] bool only its pixels count: in
  PSNR and in the colour fit each by itself, in SSIM those whose whole window does.

  Raises:
    ValueError: the sizes differ, or too little is left of the image for SSIM.
  """
  img, truth = _as_float(img), _as_float(truth)
  if img.shape != truth.shape:
    raise ValueError(f'A rendering of {img.shape} cannot be compared with {truth.shape}.')
  if mask is not None:
    cropped = np.asarray(image.crop(jnp.asarray(mask)[..., None], config.eval_crop_borders))[..., 0]
  result = {}
  for prefix, shown in (('', img), ('cc_', image.color_correct(img, truth, mask))):
    if config.eval_quantize_metrics:
      shown = image.quantize(shown)
    shown, wanted = (image.crop(x, config.eval_crop_borders) for x in (shown, truth))
    # Summed in double precision: a million small numbers.
    square = np.square(np.asarray(shown) - np.asarray(wanted))
    mse = np.mean(square if mask is None else square[cropped], dtype=np.float64)
    result[f'{prefix}psnr'] = float(image.mse_to_psnr(jnp.float32(mse)))
    result[f'{prefix}ssim'] = float(image.ssim(shown, wanted, None if mask is None else cropped))
  return {name: result[name] for name in METRICS}


def _as_float(img: np.ndarray) -> jax.Array:
  if np.asarray(img).dtype == np.uint8:
    return jnp.asarray(img, jnp.float32) / 255
  return jnp.clip(jnp.asarray(img, jnp.float32), 0, 1)


def protocol(config: configs.Config) -> dict[str, Any]:
  """How the numbers were made: name, description, and each way in which the config departs."""
  departures = []
  if not config.eval_quantize_metrics:
    departures.append('predictions are not quantised')
  if config.eval_crop_borders:
    departures.append(f'{config.eval_crop_borders} pixels are cropped off each side')
  if config.eval_render_interval > 1:
    departures.append(f'one in {config.eval_render_interval} test images')
  if config.eval_dataset_limit is not None:
    departures.append(f'at most {config.eval_dataset_limit} test images')
  if config.dataset_loader == 'llff' and config.llffhold != 8:
    departures.append(f'every {config.llffhold}th image is a test image, not every 8th')
  name = 'mip-NeRF 360' + (', modified' if departures else '')
  return {'name': name, 'description': _DESCRIPTION, 'departures': departures}


def make_results(
  config: configs.Config, per_image: Sequence[Mapping[str, Any]], step: int, num_params: int
) -> dict[str, Any]:
  """All that results.json says.

  Args:
    config: of the evaluation.
    per_image: name, the METRICS and seconds of each image.
    step: the checkpoint's.
    num_params: of the model.
  """
  devices = jax.devices()
  packages = ('jax', 'jaxlib', 'flax', 'numpy')
  return {
    'schema_version': SCHEMA_VERSION,
    'protocol': protocol(config),
    'scene': os.path.basename(os.path.abspath(config.data_dir)) if config.data_dir else None,
    'dataset_loader': config.dataset_loader,
    'factor': config.factor,
    'step': step,
    'num_images': len(per_image),
    'mean': {name: float(np.mean([row[name] for row in per_image])) for name in METRICS},
    # The median: the first image's time has the compilation in it.
    'seconds_per_image': float(np.median([row['seconds'] for row in per_image])),
    'num_params': num_params,
    'device': {'kind': devices[0].device_kind, 'count': len(devices)},
    'software': {
      'python': platform.python_version(),
      **{name: metadata.version(name) for name in packages},
    },
    'per_image': [dict(row) for row in per_image],
  }


def _strict(value: Any) -> Any:
  """Numbers that JSON cannot hold (NaN, infinity) become null."""
  if isinstance(value, Mapping):
    return {key: _strict(v) for key, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_strict(v) for v in value]
  if isinstance(value, np.generic):
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str, value: Any) -> None:
  """Writes strict JSON, making its folder; the file is never seen half-written."""
  with files.whole(path) as temporary, open(temporary, 'w') as f:
    json.dump(_strict(value), f, indent=2, allow_nan=False)
    f.write('\n')


def format_metrics(row: Mapping[str, float]) -> str:
  """The METRICS as a piece of a line."""
  return '  '.join(f'{k} {row[k]:.2f}' if 'psnr' in k else f'{k} {row[k]:.4f}' for k in METRICS)
