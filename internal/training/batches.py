"""Training pixels and random batches of them.

Batch k is a pure function of (seed, k), wherever the pixels are stored: its key is folded with the
step.
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
  """All training pixels in one flat uint8 table, on the device or host."""

  # Colour planes, each [pixels] uint8, since devices would pad an axis of 3; or MappedPixels.
  rgb: tuple[Array, Array, Array] | Any
  first: Array  # [n] int32, each image's first pixel; int64 for 2^31 pixels and more (host only).


def first_pixels(size: np.ndarray) -> np.ndarray:
  """Returns the index of each image's first pixel, for sizes [n, 2]: int32, or int64 if needed."""
  ends = np.cumsum(np.asarray(size, np.int64).prod(-1))
  return np.append(0, ends[:-1]).astype(np.int32 if ends[-1] < 2**31 else np.int64)


def make_store(images: Sequence[np.ndarray]) -> PixelStore:
  """Flattens [h, w, 3] uint8 images into one table."""
  rgb = np.concatenate([image.reshape(-1, 3).T for image in images], -1)
  return PixelStore(tuple(rgb), first_pixels(np.array([image.shape[:2] for image in images])))


def store_shapes(size: np.ndarray) -> PixelStore:
  """Returns the shapes of the store of images of sizes [n, 2]."""
  count = int(np.asarray(size, np.int64).prod(-1).sum())
  return PixelStore((jax.ShapeDtypeStruct((count,), np.uint8),) * 3, first_pixels(size))


def make_supervision(
  size: np.ndarray,
  masks: Sequence[np.ndarray | None] | None = None,
  weights: Sequence[float] | None = None,
) -> structs.Supervision | None:
  """Builds the tables of masks and weights for `draw_pixels` and `make_batch`; None without both.

  Args:
    size: [n, 2] widths and heights of the images.
    masks: [h, w] bool per image, True for pixels that may be drawn; None allows all.
    weights: [n] weight of each image in the data loss.
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
  patch_size: int = 1,
) -> tuple[Array, Array, Array]:
  """Draws pixels uniformly: from all images, or all from one image.

  In patches, the pixels drawn are the middles of patches, which are moved into the image.

  Args:
    key: PRNG key.
    size: [n, 2] widths and heights of the images.
    batch_size: number of pixels.
    batching: 'all_images' or 'single_image'.
    supervision: masks and weights of the images; masked pixels are never drawn, but may be in a
      patch. The first `track_rays` pixels are among those of its tracks.
    patch_size: width and height of a patch; its pixels are consecutive, row by row. Patches see no
      tracks.

  Returns:
    (cam_idx, x, y), each [batch_size] int32.
  """
  pixels = _draw_anywhere(key, size, batch_size // patch_size**2, batching, supervision)
  if patch_size > 1:
    return _patches_around(*pixels, size, patch_size)
  if supervision is None or supervision.tracks is None:
    return pixels
  rows, tracks = _draw_tracks(key, supervision), supervision.tracks
  tracked = (jnp.asarray(v)[rows] for v in (tracks.cam_idx, tracks.x, tracks.y))
  return tuple(jnp.concatenate([new, v[len(rows) :]]) for new, v in zip(tracked, pixels))


def _draw_tracks(key: Array, supervision: structs.Supervision) -> Array:
  """Draws rows [track_rays] of the tracks uniformly."""
  shape, key = (supervision.track_rays,), jax.random.fold_in(key, 1)
  return jax.random.randint(key, shape, 0, len(supervision.tracks.x))


def known_distances(
  key: Array, batch_size: int, supervision: structs.Supervision | None
) -> tuple[Array | None, Array | None]:
  """Returns the known distances of the pixels that `draw_pixels` draws with the same key.

  Returns:
    Distances and their certainties, [batch_size] each, both 0 where there is none; or None twice.
  """
  if supervision is None or supervision.tracks is None:
    return None, None
  rows, tracks = _draw_tracks(key, supervision), supervision.tracks
  known = (jnp.asarray(v)[rows] for v in (tracks.distance, tracks.certainty))
  return tuple(jnp.pad(v, (0, batch_size - len(rows))) for v in known)


def _patches_around(cam_idx: Array, x: Array, y: Array, size: Array, patch_size: int):
  """Returns all pixels (cam_idx, x, y) of the patches around pixels [m], each [m * patch^2]."""
  x, y = (
    jnp.clip(middle - patch_size // 2, 0, size[cam_idx, axis] - patch_size)
    for axis, middle in enumerate((x, y))
  )  # [m]
  down, right = jnp.divmod(jnp.arange(patch_size**2, dtype=jnp.int32), patch_size)
  x, y = x[:, None] + right[None], y[:, None] + down[None]  # [m, patch^2]
  return tuple(a.ravel() for a in (jnp.broadcast_to(cam_idx[:, None], x.shape), x, y))


def _draw_anywhere(key, size, count, batching, supervision) -> tuple[Array, Array, Array]:
  """Draws `count` pixels, without regard to patches and tracks; see `draw_pixels`."""
  image_key, x_key, y_key = jax.random.split(key, 3)
  masked = supervision is not None and supervision.run_start is not None
  # First an image, by its share of all pixels, then a pixel in it: indices stay below 2^31.
  counts = size[:, 0].astype(jnp.float32) * size[:, 1]
  if masked:
    counts = jnp.asarray(supervision.pixels, jnp.float32)
  share = jnp.cumsum(counts)
  share /= share[-1]
  draws = count if batching == 'all_images' else 1
  u = jax.random.uniform(image_key, (draws,))
  cam_idx = jnp.minimum(jnp.searchsorted(share, u, side='right'), len(size) - 1)
  cam_idx = jnp.broadcast_to(cam_idx, (count,)).astype(jnp.int32)
  if masked:
    pixel, width = _draw_in_runs(x_key, cam_idx, supervision), size[cam_idx, 0]
    return cam_idx, pixel % width, pixel // width
  x = jax.random.randint(x_key, (count,), 0, size[cam_idx, 0])
  y = jax.random.randint(y_key, (count,), 0, size[cam_idx, 1])
  return cam_idx, x, y


def _draw_in_runs(key: Array, cam_idx: Array, supervision: structs.Supervision) -> Array:
  """Draws an allowed pixel of each image uniformly; returns its row-major index."""
  before = jnp.asarray(supervision.pixels_before)
  k = jax.random.randint(key, cam_idx.shape, 0, jnp.asarray(supervision.pixels)[cam_idx])
  run = _last_run(before, k, cam_idx, supervision)
  return jnp.asarray(supervision.run_start)[run] + k - before[run]


def _last_run(values: Array, limit: Array, cam_idx: Array, supervision: structs.Supervision):
  """Returns the last run of each image whose value is at most the limit, or the image's first.

  `values` [r] increase over the runs of an image; `limit` and `cam_idx` are [...].
  """
  first = jnp.asarray(supervision.first_run)

  def halve(_, bounds):
    low, high = bounds  # The run is one of low to high - 1.
    middle = (low + high) // 2
    further = values[middle] <= limit
    return jnp.where(further, middle, low), jnp.where(further, high, middle)

  bounds = first[cam_idx], first[cam_idx + 1]
  return jax.lax.fori_loop(0, len(values).bit_length(), halve, bounds)[0]


def _is_allowed(cam_idx: Array, pixel: Array, supervision: structs.Supervision) -> Array:
  """Returns whether pixels [...], as row-major indices, may be drawn."""
  start, before = jnp.asarray(supervision.run_start), jnp.asarray(supervision.pixels_before)
  run = _last_run(start, pixel, cam_idx, supervision)
  is_last = run + 1 == jnp.asarray(supervision.first_run)[cam_idx + 1]
  after = before[jnp.minimum(run + 1, len(before) - 1)]
  after = jnp.where(is_last, jnp.asarray(supervision.pixels)[cam_idx], after)
  return (pixel >= start[run]) & (pixel < start[run] + after - before[run])


def lookup(store: PixelStore, size: Array, cam_idx, x, y):
  """Returns the pixels' colours, [..., 3] uint8; numpy in, numpy out."""
  xp = np if isinstance(store.first, np.ndarray) else jnp
  index = store.first[cam_idx] + y * size[cam_idx, 0] + x
  if not isinstance(store.rgb, tuple):
    return store.rgb[index]
  return xp.stack([plane[index] for plane in store.rgb], -1)


def make_batch(
  cams: structs.Cameras, cam_idx, x, y, rgb: Array, distance=None, certainty=None, patches=False
) -> structs.Batch:
  """Casts the pixels' rays and pairs them with what is known of them.

  That is their [..., 3] uint8 colours, their weights, and what `known_distances` returns. If the
  cameras are refined or their colours learned, the batch keeps the pixels.

  Weights are normalized to mean 1 over the batch, so that means over rays are weighted means,
  independent of sharding. In patches, masked pixels have weight 0.
  """
  rays = cameras.pixels_to_rays(cams, cam_idx, x, y)
  given = cams.supervision or structs.Supervision()
  weight = None
  if given.weight is not None:
    weight = jnp.asarray(given.weight)[cam_idx]
  if patches and given.run_start is not None:
    allowed = _is_allowed(cam_idx, y * jnp.asarray(cams.size)[cam_idx, 0] + x, given)
    weight = allowed * (jnp.ones(x.shape) if weight is None else weight)
  if weight is not None:
    weight /= jnp.mean(weight)
  kept = given.preconditioner is not None or given.camera is not None
  colors, pixel = rgb.astype(jnp.float32) / 255, (x, y) if kept else None
  return structs.Batch(rays, colors, weight, distance, certainty, pixel)
