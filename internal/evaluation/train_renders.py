"""Renders test images during training."""

from __future__ import annotations

import os
import time

import numpy as np
from jax.sharding import Mesh

from .. import configs, coord, structs
from ..datasets import scenes
from ..devices import processes
from ..rendering import renderer
from ..training import camera_refinement, runlog, train_step
from ..vis import pictures
from . import metrics as metrics_lib


class TestRenders:
  """Renders a few test images during training: a sheet on disk, metrics in the log."""

  def __init__(self, settings: configs.Settings, scene: scenes.Scene, mesh: Mesh):
    self.settings, self.config, self.scene = settings, settings.config, scene
    self.render_image = renderer.make_image_renderer(settings, mesh)
    self.probe_rays = renderer.make_ray_probe(settings, mesh)
    count = min(self.config.train_render_images, len(scene.test))
    spread = np.linspace(0, len(scene.test) - 1, count).round().astype(int)
    self.rows = [scene.test[k] for k in spread]
    self.folder = os.path.join(self.config.checkpoint_dir, 'train_renders')

  def warm_up(self, params: dict) -> None:
    """Compiles what a call needs, by rendering a few pixels."""
    if not self.rows:
      return
    row, cams = self.rows[0], self._cameras(params)
    size = np.array(cams.size)
    width, height = size[row]
    size[row] = 4, 4
    self.render_image(params, cams.replace(size=size), row, 0.0)
    if self.config.vis_num_rays > 0:
      self.probe_rays(params, cams, row, 0.0)
    black = np.zeros((height, width, 3), np.float32)
    mask = scenes.read_mask(self.config.data_dir, self.scene, row)
    metrics_lib.image_metrics(black, black, self.config, mask)

  def _cameras(self, params: dict) -> structs.Cameras:
    return camera_refinement.refined_scene(self.settings, self.scene, params).cameras

  def __call__(self, params: dict, step: int, log: runlog.RunLog) -> None:
    frac = float(train_step.train_fraction(step, self.config.max_steps))
    cams = self._cameras(params)
    scores = []
    for row in self.rows:
      began = time.monotonic()
      out = self.render_image(params, cams, row, frac)
      seconds = time.monotonic() - began
      if not processes.is_main():
        continue
      truth = scenes.read_image(self.config.data_dir, self.scene, row)
      mask = scenes.read_mask(self.config.data_dir, self.scene, row)
      metrics = metrics_lib.image_metrics(out['rgb'], truth, self.config, mask)
      scores.append({**metrics, 'seconds': seconds})
      sheet = pictures.comparison_sheet(out, truth)
      name = self.scene.stem(row)
      pictures.write_png(os.path.join(self.folder, f'{name}_step{step:07d}.png'), sheet)
      log.picture(step, f'test/{name}', sheet)
    if self.rows and self.config.vis_num_rays > 0:
      history = self.probe_rays(params, cams, self.rows[0], frac)
      near_far, model = (self.config.near, self.config.far), self.settings.model
      _, s_to_t = coord.ray_warps(model.raydist_fn, *near_far, model.raydist_options)
      picture = pictures.ray_picture(*history, max_rays=self.config.vis_num_rays, s_to_t=s_to_t)
      if processes.is_main():
        pictures.write_png(os.path.join(self.folder, f'rays_step{step:07d}.png'), picture)
        log.picture(step, 'test/rays', picture)
    if scores:
      means = {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}
      log.scalars(step, {f'test_{k}': v for k, v in means.items()}, 'test')
      log.say(
        f'test of {len(scores)} images at step {step:,}: psnr {means["psnr"]:.2f}  '
        f'ssim {means["ssim"]:.3f}  {means["seconds"]:.1f}s each -> {self.folder}'
      )
