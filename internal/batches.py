"""Training pixels and the draw of a batch from them.

Batch k is a pure function of (seed, k): pixels are drawn by a key folded with the step, whether
they live on the device or on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from internal import cameras, structs

Array = jax.Array


@flax.struct.dataclass
class PixelStore:
  """All training pixels, uint8, in one flat table on the device (or host)."""

  rgb: tuple[Array, Array, Array]  # Each [pixels] uint8: planes, so that no axis of 3 is padded.
  first: Array  # [n] int32, where each image's pixels begin.


def make_store(images: Sequence[np.ndarray]) -> PixelStore:
  """Flattens [h, w, 3] uint8 images into one table.

  Raises:
    ValueError: more pixels than 32-bit indices reach.
  """
  counts = np.array([im.shape[0] * im.shape[1] for im in images], np.int64)
  if counts.sum() >= 2**31:
    raise ValueError(
      f'{counts.sum():,} training pixels are more than 2^31; set Config.factor to downsample.'
    )
  rgb = np.empty((3, counts.sum()), np.uint8)
  first = np.concatenate([[0], np.cumsum(counts)[:-1]])
  for image, start, count in zip(images, first, counts):
    rgb[:, start : start + count] = image.reshape(-1, 3).T
  return PixelStore(tuple(rgb), first.astype(np.int32))


def make_supervision(
  size: np.ndarray,
  masks: Sequence[np.ndarray | None] | None = None,
  weights: Sequence[float] | None = None,
) -> structs.Supervision | None:
  """What `draw_pixels` and `make_batch` need of masks and weights; None where there are neither.

  Args:
    size: [n, 2] widths and heights of the images.
    masks: [h, w] bool for each image, which of its pixels may be drawn, or None: all.
    weights: [n] of the images' pixels in the data loss.
  """
  weight = None if not weights else np.asarray(weights, np.float32)
  if not masks or all(mask is None for mask in masks):
    return None if weight is None else structs.Supervision(weight)
  starts, lengths = [], []
  for (width, height), mask in zip(size, masks):
    allowed = np.ones(width * height, bool) if mask is None else mask.ravel()
    edges = np.flatnonzero(np.diff(allowed.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    starts.append(edges[:, 0])
    lengths.append(edges[:, 1] - edges[:, 0])
  pixels_before = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
  return structs.Supervision(
    weight,
    np.concatenate(starts).astype(np.int32),
    pixels_before.astype(np.int32),
    np.cumsum([0, *map(len, starts)]).astype(np.int32),
  )


def draw_pixels(
  key: Array,
  size: Array,
  batch_size: int,
  batching: str,
  supervision: structs.Supervision | None = None,
) -> tuple[Array, Array, Array]:
  """Draws pixels uniformly: from all images, or all from one image.

  Args:
    key: PRNG key.
    size: [n, 2] widths and heights of the images.
    batch_size: number of pixels.
    batching: 'all_images' or 'single_image'.
    supervision: of the images; pixels that their masks exclude are never drawn.

  Returns:
    (cam_idx, x, y), each [batch_size] int32.
  """
  image_key, x_key, y_key = jax.random.split(key, 3)
  if supervision is not None and supervision.run_start is not None:
    return _draw_from_runs(image_key, x_key, size, batch_size, batching, supervision)
  # Image by its share of all pixels, then a pixel in it: no index ever passes 2^31.
  share = jnp.cumsum(size[:, 0].astype(jnp.float32) * size[:, 1])
  share /= share[-1]
  draws = batch_size if batching == 'all_images' else 1
  u = jax.random.uniform(image_key, (draws,))
  cam_idx = jnp.minimum(jnp.searchsorted(share, u, side='right'), len(size) - 1)
  cam_idx = jnp.broadcast_to(cam_idx, (batch_size,)).astype(jnp.int32)
  x = jax.random.randint(x_key, (batch_size,), 0, size[cam_idx, 0])
  y = jax.random.randint(y_key, (batch_size,), 0, size[cam_idx, 1])
  return cam_idx, x, y


def _draw_from_runs(
  image_key: Array,
  pixel_key: Array,
  size: Array,
  batch_size: int,
  batching: str,
  supervision: structs.Supervision,
) -> tuple[Array, Array, Array]:
  """`draw_pixels` where only some pixels may be drawn: the k-th of them, for uniform k."""
  before, runs = jnp.asarray(supervision.pixels_before), jnp.asarray(supervision.runs_before)

  def holder(starts, k):  # The row whose stretch, from its start to the next one's, has k.
    return jnp.searchsorted(starts, k, side='right') - 1

  first, last = 0, before[-1]
  if batching == 'single_image':
    image = holder(before[runs], jax.random.randint(image_key, (), 0, before[-1]))
    first, last = before[runs[image]], before[runs[image + 1]]
  k = jax.random.randint(pixel_key, (batch_size,), first, last)
  run = holder(before, k)
  cam_idx = holder(runs, run).astype(jnp.int32)
  pixel = jnp.asarray(supervision.run_start)[run] + k - before[run]
  width = size[cam_idx, 0]
  return cam_idx, pixel % width, pixel // width


def lookup(store: PixelStore, size: Array, cam_idx, x, y):
  """The pixels' colours, [..., 3] uint8; numpy in, numpy out."""
  xp = np if isinstance(store.first, np.ndarray) else jnp
  index = store.first[cam_idx] + y * size[cam_idx, 0] + x
  return xp.stack([plane[index] for plane in store.rgb], -1)


def make_batch(cams: structs.Cameras, cam_idx, x, y, rgb: Array) -> structs.Batch:
  """Casts the pixels' rays and pairs them with their [..., 3] uint8 colours and their weights.

  Weights are relative: the batch is given those whose mean is 1, so that the mean over rays of
  weighted terms is their weighted mean, however rays are then split.
  """
  rays = cameras.pixels_to_rays(cams, cam_idx, x, y)
  weight = None
  if cams.supervision is not None and cams.supervision.weight is not None:
    weight = jnp.asarray(cams.supervision.weight)[cam_idx]
    weight /= jnp.mean(weight)
  return structs.Batch(rays, rgb.astype(jnp.float32) / 255, weight)
