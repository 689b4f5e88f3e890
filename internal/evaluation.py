"""Whole-image rendering: one compiled program for every image and camera of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from internal import cameras, configs, models, sharding, structs


def make_chunk_renderer(settings: configs.Settings, mesh: Mesh) -> Callable:
  """The jit-compiled `render_chunk(params, cams, i, start, train_frac) -> dict of [chunk, ...]`.

  Renders render_chunk_size pixels of camera i, row by row, from pixel number `start`; those past
  the image's end repeat its last pixel. Deterministic: no jitter, no noise, appearance zero.

  Raises:
    ValueError: a chunk that the devices do not divide.
  """
  chunk = settings.config.render_chunk_size
  sharding.check_divisible('Config.render_chunk_size', chunk, mesh)
  model = models.build(settings)

  def render_chunk(params, cams, i, start, train_frac):
    width, height = cams.size[i, 0], cams.size[i, 1]
    pixel = jnp.minimum(start + jnp.arange(chunk, dtype=jnp.int32), width * height - 1)
    pixel = sharding.shard_rays(pixel, mesh)
    rays = cameras.pixels_to_rays(cams, jnp.full_like(pixel, i), pixel % width, pixel // width)
    renderings, _ = model.apply({'params': params}, None, rays, train_frac, False)
    final = renderings[-1]
    return {
      'rgb': final.rgb,
      'acc': final.acc,
      'distance_mean': final.distance_mean,
      'distance_percentiles': final.distance_percentiles,
    }

  return jax.jit(render_chunk, out_shardings=sharding.replicated(mesh))


def make_image_renderer(settings: configs.Settings, mesh: Mesh) -> Callable:
  """A function that renders whole images.

  Returns:
    `render_image(params, cams, i, step_fraction=1.0, progress=None)` -> dict of numpy arrays:
    rgb [h, w, 3] in [0, 1]; acc, distance_mean and distance_median [h, w];
    distance_percentiles [h, w, 3] at 5, 50 and 95 percent. `progress(done, total)` is called
    with numbers of rays.
  """
  render_chunk = make_chunk_renderer(settings, mesh)
  chunk = settings.config.render_chunk_size

  def render_image(
    params,
    cams: structs.Cameras,
    i: int,
    step_fraction: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
  ) -> dict[str, np.ndarray]:
    width, height = (int(v) for v in np.asarray(cams.size)[i])
    total = width * height
    table = sharding.replicate(cams, mesh)
    parts, pending = [], []

    def fetch():
      parts.append({k: sharding.to_host(v) for k, v in pending.pop(0).items()})
      if progress is not None:
        progress(min(len(parts) * chunk, total), total)

    for start in range(0, total, chunk):
      pending.append(render_chunk(params, table, i, start, step_fraction))
      if len(pending) > 2:  # Two chunks in flight keep the device busy and its memory small.
        fetch()
    while pending:
      fetch()
    joined = {k: np.concatenate([p[k] for p in parts])[:total] for k in parts[0]}
    result = {k: v.reshape(height, width, *v.shape[1:]) for k, v in joined.items()}
    result['rgb'] = np.clip(result['rgb'], 0, 1)
    result['distance_median'] = result['distance_percentiles'][..., 1]
    return result

  return render_image


def make_ray_probe(settings: configs.Settings, mesh: Mesh) -> Callable:
  """A function that shows how rays were sampled: what `vis.ray_picture` draws.

  Returns:
    `probe_rays(params, cams, i, train_frac)` -> (sdist, weights, rgb), each a list over levels of
    numpy arrays [r, ...] (rgb: None where a level has no colour), of vis_num_rays pixels spread
    evenly over camera i's diagonal.
  """
  model, count = models.build(settings), settings.config.vis_num_rays

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def probe(params, cams, i, train_frac):
    along = (jnp.arange(count) + 0.5) / count
    x, y = (jnp.floor(along * cams.size[i, axis]).astype(jnp.int32) for axis in (0, 1))
    rays = cameras.pixels_to_rays(cams, jnp.full_like(x, i), x, y)
    _, history = model.apply({'params': params}, None, rays, train_frac, False)
    return history

  def probe_rays(params, cams: structs.Cameras, i: int, train_frac: float = 1.0):
    history = probe(params, sharding.replicate(cams, mesh), i, train_frac)
    history = jax.tree.map(sharding.to_host, history)
    return tuple([getattr(h, name) for h in history] for name in ('sdist', 'weights', 'rgb'))

  return probe_rays
