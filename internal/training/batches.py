"""Training pixels and the draw of a batch from them.

Batch k is a pure function of (seed, k): pixels are drawn by a key folded with the step, whether
they live on the device or on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from .. import cameras, structs

Array = jax.Array


@flax.struct.dataclass
class PixelStore:
  """All training pixels, uint8, in one flat table on the device (or host)."""

  # Each [pixels] uint8: planes, so that no axis of 3 is padded; or pixels.MappedPixels.
  rgb: tuple[Array, Array, Array] | Any
  first: Array  # [n] int32, where each image's pixels begin; int64 on a host with more of them.


def first_pixels(size: np.ndarray) -> np.ndarray:
  """Where the pixels of images of `size` [n, 2] begin: int32, or int64 where that is too small."""
  ends = np.cumsum(np.asarray(size, np.int64).prod(-1))
  return np.append(0, ends[:-1]).astype(np.int32 if ends[-1] < 2**31 else np.int64)


def make_store(images: Sequence[np.ndarray]) -> PixelStore:
  """Flattens [h, w, 3] uint8 images into one table."""
  rgb = np.concatenate([image.reshape(-1, 3).T for image in images], -1)
  return PixelStore(tuple(rgb), first_pixels(np.array([image.shape[:2] for image in images])))


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
  starts, befores, pixels = [], [], []
  for (width, height), mask in zip(size, masks):
    allowed = np.ones(width * height, bool) if mask is None else mask.ravel()
    edges = np.flatnonzero(np.diff(allowed.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    ends = np.cumsum(edges[:, 1] - edges[:, 0])
    starts.append(edges[:, 0])
    befores.append(np.append(0, ends[:-1]))
    pixels.append(ends[-1])
  runs = np.append(0, np.cumsum([len(of_image) for of_image in starts]))
  tables = np.concatenate(starts), np.concatenate(befores), np.array(pixels), runs
  return structs.Supervision(weight, *(table.astype(np.int32) for table in tables))


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
  masked = supervision is not None and supervision.run_start is not None
  # Image by its share of all pixels, then a pixel in it: no index ever passes 2^31.
  counts = size[:, 0].astype(jnp.float32) * size[:, 1]
  if masked:
    counts = jnp.asarray(supervision.pixels, jnp.float32)
  share = jnp.cumsum(counts)
  share /= share[-1]
  draws = batch_size if batching == 'all_images' else 1
  u = jax.random.uniform(image_key, (draws,))
  cam_idx = jnp.minimum(jnp.searchsorted(share, u, side='right'), len(size) - 1)
  cam_idx = jnp.broadcast_to(cam_idx, (batch_size,)).astype(jnp.int32)
  if masked:
    pixel, width = _draw_in_runs(x_key, cam_idx, supervision), size[cam_idx, 0]
    return cam_idx, pixel % width, pixel // width
  x = jax.random.randint(x_key, (batch_size,), 0, size[cam_idx, 0])
  y = jax.random.randint(y_key, (batch_size,), 0, size[cam_idx, 1])
  return cam_idx, x, y


def _draw_in_runs(key: Array, cam_idx: Array, supervision: structs.Supervision) -> Array:
  """A pixel of each image, counted row by row: the k-th that may be drawn, for uniform k."""
  before = jnp.asarray(supervision.pixels_before)
  first = jnp.asarray(supervision.first_run)
  k = jax.random.randint(key, cam_idx.shape, 0, jnp.asarray(supervision.pixels)[cam_idx])

  def halve(_, bounds):
    low, high = bounds  # before[low] <= k, and k is less than that of the run `high`.
    middle = (low + high) // 2
    further = before[middle] <= k
    return jnp.where(further, middle, low), jnp.where(further, high, middle)

  bounds = first[cam_idx], first[cam_idx + 1]
  run, _ = jax.lax.fori_loop(0, len(before).bit_length(), halve, bounds)
  return jnp.asarray(supervision.run_start)[run] + k - before[run]


def lookup(store: PixelStore, size: Array, cam_idx, x, y):
  """The pixels' colours, [..., 3] uint8; numpy in, numpy out."""
  xp = np if isinstance(store.first, np.ndarray) else jnp
  index = store.first[cam_idx] + y * size[cam_idx, 0] + x
  if not isinstance(store.rgb, tuple):
    return store.rgb[index]
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
