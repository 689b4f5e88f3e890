"""Compares drawn Gaussians, and the field that they copy, with the test photographs."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from .. import configs
from ..evaluation import metrics
from ..rendering import trained
from ..vis import pictures
from . import distil, gaussians, rasterizer, views

_METRICS = 'psnr', 'ssim'
_PANEL_WIDTH = 400  # Pixels, in the picture of the comparison.


def compare(splats: gaussians.Splats, run: trained.TrainedRun) -> tuple[dict, np.ndarray | None]:
  """Compares drawn pictures, and those of the field, with the test photographs.

  Args:
    splats: Gaussians in the normalised world.
    run: the run with the field.

  Returns:
    The figures, and the picture that `lost` makes of two photographs: those with the lowest and the
    median PSNR of the Gaussians; ({}, None) without photographs. The figures are psnr in dB and
    ssim of the Gaussians, field_psnr and field_ssim of the field on the same pixels, means over
    `images` photographs (see `views.photographs`) as eval.py computes them, and
    pictures_per_second, how fast pictures of `size` pixels are drawn.
  """
  rows, tests = views.photographs(run, run.scene.test)
  if not rows:
    return {}, None
  splats, background = jax.tree.map(jnp.asarray, splats), distil.background_of(run)
  capacity = distil.capacity_for(distil.needed_pairs(splats, tests.cameras))
  render = jax.jit(rasterizer.render, static_argnums=3)

  def draw(camera):
    return render(splats, camera, background, capacity).rgb

  cams = views.without_distortion(run.scene.cameras.take(rows))
  field = [image['rgb'] for image in views.render_teacher(run, cams)[1]]
  drawn = [np.asarray(draw(camera)) for camera in tests.cameras]
  scores = np.array(
    [
      [score for picture in pair for score in _scores(picture, truth, run.settings.config)]
      for *pair, truth in zip(drawn, field, tests.colors)
    ]
  )  # [images, 4]
  names = [prefix + name for prefix in ('', 'field_') for name in _METRICS]
  found = dict(zip(names, scores.mean(0).tolist())) | {'images': len(rows)}
  began = time.monotonic()
  jax.block_until_ready([draw(camera) for camera in tests.cameras])
  rate = len(rows) / (time.monotonic() - began)
  found |= {'size': tests.cameras[0].size, 'pictures_per_second': rate}
  by_psnr = np.argsort(scores[:, 0], kind='stable')
  shown = dict.fromkeys(by_psnr[[0, len(by_psnr) // 2]].tolist())  # One, if there is only one.
  parts = [
    (run.scene.names[rows[k]], drawn[k], field[k], tests.colors[k], scores[k]) for k in shown
  ]
  return found, lost(parts)


def _scores(picture: np.ndarray, truth: np.ndarray, config: configs.Config) -> list[float]:
  """Returns _METRICS of a picture [h, w, 3] against [h, w, 4], whose alpha is 0 outside a mask."""
  counts = truth[..., 3] > 0
  found = metrics.image_metrics(picture, truth[..., :3], config, counts, color_correct=False)
  return [found[name] for name in _METRICS]


def lost(parts: list[tuple]) -> np.ndarray:
  """Shows what the copy of a field has lost: uint8 [h, w, 3].

  Args:
    parts: of each photograph its name; the pictures of the Gaussians and of the field, [h, w, 3];
      the photograph, uint8 [h, w, 4], whose pixels of alpha 0 have no error; and the scores [4] of
      Gaussians and field, _METRICS of each.

  Returns:
    Two rows for each photograph: itself, the field, the Gaussians; what is between these two, and
    the error of each against the photograph (`pictures.error_picture`).
  """
  images, captions = [], []
  for name, own, field, photo, (psnr, _, field_psnr, _) in parts:
    truth, counts = photo[..., :3], photo[..., 3:] > 0
    images += [truth, field, own, pictures.error_picture(own, field)]
    counted = (np.where(counts, pictures.to_uint8(shown), truth) for shown in (field, own))
    images += [pictures.error_picture(shown, truth) for shown in counted]
    captions += [
      name,
      f'the field: {field_psnr:.2f} dB',
      f'the Gaussians: {psnr:.2f} dB',
      f'Gaussians against field (brightest: {pictures.ERROR_MAX:g} or more)',
      'the error of the field',
      'the error of the Gaussians',
    ]
  images = [pictures.enlarge(image, _PANEL_WIDTH) for image in images]
  return pictures.sheet(images, captions, columns=3, max_width=_PANEL_WIDTH)
