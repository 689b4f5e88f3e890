"""Pixels: drawn evenly, found exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from internal import cameras
from internal.training import batches


def test_draws_are_uniform_over_pixels_of_images_of_any_size():
  size = np.array([[10, 10], [30, 10], [5, 4]])
  cam, x, y = batches.draw_pixels(jax.random.key(0), jnp.asarray(size), 42_000, 'all_images')
  counts = np.bincount(cam, minlength=3)
  np.testing.assert_allclose(counts / 42_000, np.array([100, 300, 20]) / 420, atol=0.01)
  assert all((x[cam == i].max(), y[cam == i].max()) == tuple(size[i] - 1) for i in range(3))
  assert x.min() == 0
  assert y.min() == 0


def test_single_image_batches_come_from_one_image():
  size = jnp.array([[10, 10]] * 6)
  seen = set()
  for k in range(8):
    cam, _, _ = batches.draw_pixels(jax.random.key(k), size, 100, 'single_image')
    assert len(np.unique(cam)) == 1
    seen.add(int(cam[0]))
  assert len(seen) > 2


def test_lookup_finds_each_pixel():
  cams, images = tiny.capture()
  store = batches.make_store(images)
  for i, im in enumerate(images):
    y, x = np.mgrid[: im.shape[0], : im.shape[1]]
    found = batches.lookup(store, cams.size, np.full_like(x, i), x, y)
    np.testing.assert_array_equal(found, im)
    on_device = jax.device_put(store)
    found = batches.lookup(on_device, jnp.asarray(cams.size), np.full_like(x, i), x, y)
    np.testing.assert_array_equal(found, im)


def test_a_batch_pairs_each_ray_with_its_colour():
  cams, images = tiny.capture()
  store = batches.make_store(images)
  ids = batches.draw_pixels(jax.random.key(1), jnp.asarray(cams.size), 50, 'all_images')
  rgb = batches.lookup(jax.device_put(store), jnp.asarray(cams.size), *ids)
  batch = batches.make_batch(cams, *ids, rgb)
  cam, x, y = (np.asarray(a) for a in ids)
  expected = np.stack([images[c][j, i] for c, i, j in zip(cam, x, y)]) / 255
  np.testing.assert_allclose(batch.rgb, expected, atol=1e-6)
  assert batch.rgb.dtype == jnp.float32
  rays = cameras.pixels_to_rays(cams, *ids)
  np.testing.assert_array_equal(batch.rays.directions, rays.directions)
