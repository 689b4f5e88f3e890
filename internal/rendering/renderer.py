"""Renders whole images in chunks of rays; one compiled program serves all cameras of a run."""

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
  """Makes a function that renders a chunk of consecutive pixels.

  Rendering is deterministic: no jitter, no density noise, zero appearance vector.

  Args:
    settings: model and rendering settings.
    mesh: the devices, over which the rays are sharded.
    free_memory: `free_memory(mesh)` returns the free device memory. On the first call the chunk
      size is halved, from Config.render_chunk_size, until the program fits.
    with_normals: whether to render normals as well.

  Returns:
    `render_chunk(params, cams, i, start, train_frac, bounds=())` -> dict of [chunk, ...]: the
    pixels of camera i in row-major order from `start`; past the image's end, the last pixel is
    repeated. `bounds` are near and far as float32, instead of Config.near and Config.far.
    `render_chunk.choice` is the chunk size, once called.

  Raises:
    UserError: Config.render_chunk_size is not divisible by the number of devices.
  """
  largest = settings.config.render_chunk_size
  sharding.check_divisible('Config.render_chunk_size', largest, mesh)
  full_model = models.build(settings)
  extras = {'normals': normals.make_normals(settings)} if with_normals else {}

  def render_rays(params, rays, train_frac, bounds):
    model = full_model.clone(near=bounds[0], far=bounds[1]) if bounds else full_model
    renderings, history = model.apply({'params': params}, None, rays, train_frac, False)
    final = renderings[-1]
    return {
      'rgb': final.rgb,
      'acc': final.acc,
      'distance_mean': final.distance_mean,
      'distance_percentiles': final.distance_percentiles,
      **{name: fn(params, rays, history[-1], train_frac) for name, fn in extras.items()},
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
  """Makes a function that renders whole images. Arguments are those of `make_chunk_renderer`.

  Returns:
    `render_image(params, cams, i, step_fraction=1.0, progress=None, bounds=None)` -> dict of numpy
    arrays: rgb [h, w, 3] in [0, 1]; acc, distance_mean and distance_median [h, w];
    distance_percentiles [h, w, 3] at 5, 50 and 95 percent; with `with_normals` also normals
    [h, w, 3] (`normals.make_normals`). The callback `progress(done, total)` gets numbers of rays;
    an exception in it aborts the rendering. `bounds` are the rays' near and far distances, by
    default Config.near and Config.far.
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
      scalars = np.int32(i), np.int32(start), np.float32(step_fraction)
      scalars += (tuple(map(np.float32, bounds)),) if bounds else ()
      pending.append(render_chunk(params, table, *scalars))
      start += render_chunk.choice
      if len(pending) > 2:  # Two chunks in flight keep the device busy with little memory.
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
  """Makes a function that returns the samples along a few rays, for `pictures.ray_picture`.

  Returns:
    `probe_rays(params, cams, i, train_frac)` -> (sdist, weights, rgb), each a list over levels of
    numpy arrays [r, ...]; rgb is None at levels without colour. The rays belong to
    r = Config.vis_num_rays pixels, evenly spaced along the diagonal of camera i's image.
  """
  model, count = models.build(settings), settings.config.vis_num_rays

  def probe(params, cams, i, train_frac):
    along = (jnp.arange(count) + 0.5) / count
    x, y = (jnp.floor(along * cams.size[i, axis]).astype(jnp.int32) for axis in (0, 1))
    rays = cameras.pixels_to_rays(cams, jnp.full_like(x, i), x, y)
    _, history = model.apply({'params': params}, None, rays, train_frac, False)
    return history

  # Too few rays to shard: each device renders all of them.
  replicated_probe = sharding.per_device(probe, mesh, sharding.WHOLE, sharding.WHOLE)
  probe = jax.jit(replicated_probe, out_shardings=sharding.replicated(mesh))

  def probe_rays(params, cams: structs.Cameras, i: int, train_frac: float = 1.0):
    history = probe(sharding.whole(params, mesh), sharding.replicate(cams, mesh), i, train_frac)
    history = jax.tree.map(sharding.to_host, history)
    return tuple([getattr(h, name) for h in history] for name in ('sdist', 'weights', 'rgb'))

  return probe_rays
