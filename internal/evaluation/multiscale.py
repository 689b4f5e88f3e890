"""Evaluation at several scales: each test image at 1, 1/2, 1/4 and 1/8 of its size.

It measures anti-aliasing: at 1/8 a pixel's cone is 8 times as wide, and a field that answers for
points instead of volumes shows detail that the reduced photograph no longer has (Barron et al.
2021, arXiv:2103.13415, section 4; Barron et al. 2023, arXiv:2304.06706, section 5).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import structs
from ..datasets import scenes
from ..devices import processes
from ..errors import UserError
from ..rendering import trained
from ..system import progress
from ..vis import pictures
from . import lpips, metrics, results

REDUCTIONS = (1, 2, 4, 8)
_SMALLEST = 11  # Pixels: SSIM's window.


def reduced_cameras(cams: structs.Cameras, n: int) -> structs.Cameras:
  """Returns the cameras of the images that `reduced_image` makes.

  A pixel of theirs covers n x n pixels, so that focal lengths and principal points are divided by
  n, and the cones that `cameras.pixels_to_rays` casts are n times as wide. The camera of NDC stays:
  it defines the space that the field was trained in.
  """
  pixtocam = cams.pixtocam * np.array([n, n, 1], np.float32)
  return cams.replace(pixtocam=pixtocam, size=cams.size // n)


def _blocks(img: np.ndarray, n: int) -> np.ndarray:
  """[h, w, ...] to [h // n, n, w // n, n, ...]; remaining rows and columns are left out."""
  height, width = img.shape[0] // n, img.shape[1] // n
  return img[: height * n, : width * n].reshape(height, n, width, n, *img.shape[2:])


def reduced_image(img: np.ndarray, n: int) -> np.ndarray:
  """Reduces an image by an area filter: the mean of each n x n pixels, rounded to 8 bits.

  Args:
    img: [h, w, 3] uint8.
    n: the factor.

  Returns:
    [h // n, w // n, 3] uint8. Up to n - 1 rows and columns at the bottom and right are left out.
  """
  return np.round(_blocks(img, n).mean((1, 3))).astype(np.uint8)


def reduced_mask(mask: np.ndarray, n: int) -> np.ndarray:
  """Reduces a mask [h, w] bool: a pixel counts if all pixels that it averages do."""
  return _blocks(mask, n).all((1, 3))


def check_sizes(scene: scenes.Scene, rows: Sequence[int]) -> None:
  """Checks that images can be measured at every scale.

  Raises:
    UserError: an image is too small at the coarsest scale.
  """
  least = _SMALLEST * REDUCTIONS[-1]
  for row in rows:
    width, height = np.asarray(scene.cameras.size[row]).tolist()
    if min(width, height) < least:
      raise UserError(
        f'{scene.names[row]}: has {width}x{height} pixels; --multiscale needs {least}x{least} or '
        f'more, for {_SMALLEST}x{_SMALLEST} at 1/{REDUCTIONS[-1]}. Evaluate without it.'
      )


def evaluate(
  run: trained.TrainedRun,
  rows: Sequence[int],
  render_image: Callable,
  folder: str,
  measure_lpips: Callable[..., dict[str, float]] | None = None,
) -> dict[int, list[dict[str, Any]]]:
  """Renders and measures test images at all scales.

  Args:
    run: the run.
    rows: the test images.
    render_image: of `run.make_image_renderer`.
    folder: gets predictions and reduced photographs as PNG files, with Config.eval_save_output.
    measure_lpips: the result of `lpips.load`, or None.

  Returns:
    For each factor of REDUCTIONS the images' entries of results.json. Empty on processes other
    than the main one.
  """
  tables = {n: reduced_cameras(run.scene.cameras, n) for n in REDUCTIONS}
  found = {n: [] for n in REDUCTIONS}
  for k, row in enumerate(progress.track(rows, 'evaluating', processes.is_main())):
    photograph = _read(run, row) if processes.is_main() else None
    for n, table in tables.items():
      began = time.monotonic()
      rendering = render_image(run.params, table, row, run.train_fraction)
      seconds = time.monotonic() - began
      if processes.is_main():
        scores, truth = _score(run, row, n, rendering['rgb'], photograph, measure_lpips)
        found[n].append({**scores, 'seconds': seconds})
        if run.settings.config.eval_save_output:
          stem = os.path.join(folder, f'{k:03d}_{run.scene.stem(row)}_{n}')
          pictures.write_png(f'{stem}_prediction.png', rendering['rgb'])
          pictures.write_png(f'{stem}_truth.png', truth)
    if processes.is_main():
      of_scales = '  '.join(
        f'{results.scale_name(n)}: {found[n][-1]["psnr"]:.2f}' for n in REDUCTIONS
      )
      progress.say(f'{k + 1}/{len(rows)} {run.scene.names[row]}  psnr at {of_scales}')
  return found if processes.is_main() else {}


def _read(run: trained.TrainedRun, row: int) -> tuple[np.ndarray, np.ndarray | None]:
  """Reads a photograph [h, w, 3] and its mask [h, w], or None for all pixels."""
  data_dir = run.settings.config.data_dir
  return scenes.read_image(data_dir, run.scene, row), scenes.read_mask(data_dir, run.scene, row)


def _score(run, row, n, rgb, photograph, measure_lpips) -> tuple[dict[str, Any], np.ndarray]:
  """Returns an image's entry at a scale, and the reduced photograph."""
  truth = reduced_image(photograph[0], n)
  mask = None if photograph[1] is None else reduced_mask(photograph[1], n)
  height, width = truth.shape[:2]
  measure_lpips = measure_lpips if min(height, width) >= lpips.MIN_SIDE else None
  scores = metrics.image_metrics(rgb, truth, run.settings.config, mask, measure_lpips)
  about = {'width': width, 'height': height, 'masked': mask is not None}
  return {'name': run.scene.names[row], **about, **scores}, truth
