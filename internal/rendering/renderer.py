"""Whole-image rendering: one compiled program for every image and camera of a run."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .. import cameras, configs, models, structs
from ..devices import memory, sharding
from . import normals


def make_chunk_renderer(
  settings: configs.Settings,
  mesh: Mesh,
  free_memory: Callable = memory.free_memory,
  with_normals: bool = False,
) -> memory.FirstFit:
  """`render_chunk(params, cams, i, start, train_frac, bounds=()) -> dict of [chunk, ...]`.

  Renders `chunk` pixels of camera i, row by row, from pixel number `start`; those past the
  image's end repeat its last pixel. Deterministic: no jitter, no noise, appearance zero. Rays go
  from Config.near to Config.far, or as `bounds`, two float32, tells. The chunk is
  Config.render_chunk_size, on the first call halved until it fits in the memory which
  `free_memory(mesh)` says is free; `render_chunk.choice` tells it from then on.

  Raises:
    ValueError: a render_chunk_size that the devices do not divide.
  """
  largest = settings.config.render_chunk_size
  sharding.check_divisible('Config.render_chunk_size', largest, mesh)
  whole_model = models.build(settings)
  more = {'normals': normals.make_normals(settings)} if with_normals else {}

  def render_rays(params, rays, train_frac, bounds):
    model = whole_model.clone(near=bounds[0], far=bounds[1]) if bounds else whole_model
    renderings, history = model.apply({'params': params}, None, rays, train_frac, False)
    final = renderings[-1]
    return {
      'rgb': final.rgb,
      'acc': final.acc,
      'distance_mean': final.distance_mean,
      'distance_percentiles': final.distance_percentiles,
      **{name: function(params, rays, history[-1]) for name, function in more.items()},
    }

  def variant(chunk):
    whole, split = sharding.WHOLE, sharding.SPLIT
    render_all = sharding.per_device(render_rays, mesh, (whole, split, whole, whole), split)

    def render_chunk(params, cams, i, start, train_frac, bounds=()):
      width, height = cams.size[i, 0], cams.size[i, 1]
      pixel = jnp.minimum(start + jnp.arange(chunk, dtype=jnp.int32), width * height - 1)
      pixel = sharding.shard_rays(pixel, mesh)
      rays = cameras.pixels_to_rays(cams, jnp.full_like(pixel, i), pixel % width, pixel // width)
      return render_all(params, rays, train_frac, bounds)

    return jax.jit(render_chunk, out_shardings=sharding.replicated(mesh))

  choices = [largest]
  while choices[-1] % (2 * mesh.size) == 0:
    choices.append(choices[-1] // 2)
  return memory.FirstFit(variant, choices, lambda: free_memory(mesh))


def make_image_renderer(
  settings: configs.Settings,
  mesh: Mesh,
  free_memory: Callable = memory.free_memory,
  with_normals: bool = False,
) -> Callable:
  """A function that renders whole images.

  Returns:
    `render_image(params, cams, i, step_fraction=1.0, progress=None, bounds=None)` -> dict of numpy
    arrays: rgb [h, w, 3] in [0, 1]; acc, distance_mean and distance_median [h, w];
    distance_percentiles [h, w, 3] at 5, 50 and 95 percent; if asked for, normals [h, w, 3]
    (`normals.make_normals`). `progress(done, total)` is called with numbers of rays; what it raises
    ends the rendering. `bounds` are the rays' near and far distances, None: those of Config.
  """
  render_chunk = make_chunk_renderer(settings, mesh, free_memory, with_normals)

  def render_image(
    params,
    cams: structs.Cameras,
    i: int,
    step_fraction: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    bounds: tuple[float, float] | None = None,
  ) -> dict[str, np.ndarray]:
    width, height = (int(v) for v in np.asarray(cams.size)[i])
    total = width * height
    table, params = sharding.replicate(cams, mesh), sharding.whole(params, mesh)
    parts, pending = [], []

    def fetch():
      parts.append({k: sharding.to_host(v) for k, v in pending.pop(0).items()})
      if progress is not None:
        progress(min(len(parts) * render_chunk.choice, total), total)

    start = 0
    while start < total:
      where = np.int32(i), np.int32(start), np.float32(step_fraction)
      where += (tuple(map(np.float32, bounds)),) if bounds else ()
      pending.append(render_chunk(params, table, *where))
      start += render_chunk.choice
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

  def probe(params, cams, i, train_frac):
    along = (jnp.arange(count) + 0.5) / count
    x, y = (jnp.floor(along * cams.size[i, axis]).astype(jnp.int32) for axis in (0, 1))
    rays = cameras.pixels_to_rays(cams, jnp.full_like(x, i), x, y)
    _, history = model.apply({'params': params}, None, rays, train_frac, False)
    return history

  # So few rays that each device may as well follow all of them.
  each = sharding.per_device(probe, mesh, sharding.WHOLE, sharding.WHOLE)
  probe = jax.jit(each, out_shardings=sharding.replicated(mesh))

  def probe_rays(params, cams: structs.Cameras, i: int, train_frac: float = 1.0):
    history = probe(sharding.whole(params, mesh), sharding.replicate(cams, mesh), i, train_frac)
    history = jax.tree.map(sharding.to_host, history)
    return tuple([getattr(h, name) for h in history] for name in ('sdist', 'weights', 'rgb'))

  return probe_rays
