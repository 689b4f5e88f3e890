"""Robust weights of patches: which pixels count, what trains the threshold, the figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from internal import structs
from internal.demo import passers_by
from internal.training import batches, robust

SIZE = 8


def counts(patch):
  return np.asarray(robust.counts(jnp.asarray(patch).ravel(), SIZE)).reshape(-1, SIZE, SIZE)


def naive_counts(patches):
  """The definition, pixel by pixel."""
  result = np.zeros_like(patches)
  for patch, out in zip(patches, result):
    smooth = np.zeros_like(patch)
    for i in range(SIZE):
      for j in range(SIZE):
        around = patch[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        smooth[i, j] = 2 * around.sum() >= around.size
    out[:] = smooth
    if smooth.mean() >= 0.6:
      out[2:6, 2:6] = True
  return result


def test_counts_agree_with_the_definition():
  rng = np.random.default_rng(0)
  patches = rng.random((40, SIZE, SIZE)) < rng.uniform(0, 1, (40, 1, 1))
  patches[:20] = rng.random((20, SIZE, SIZE)) < np.linspace(0, 2, SIZE)  # With a border in them.
  np.testing.assert_array_equal(counts(patches), naive_counts(patches))


def test_details_count_and_figures_do_not():
  line, figure = np.ones((2, SIZE, SIZE), bool)
  line[3] = False
  figure[:, :5] = False
  assert counts(line).all()
  assert counts(figure)[0, :, :4].sum() == 0
  assert counts(figure)[0, :, 5:].all()
  assert not counts(np.zeros((SIZE, SIZE), bool)).any()


def test_patches_do_not_mix():
  clean, hidden = np.ones((SIZE, SIZE), bool), np.zeros((SIZE, SIZE), bool)
  np.testing.assert_array_equal(counts(np.stack([clean, hidden])), [clean, hidden])


def weigh(param, error, quantile=0.5, weight=None):
  """Weights and term for residuals [rays] in the first channel."""
  rgb = jnp.zeros((len(error), 3)).at[:, 0].set(jnp.asarray(error, jnp.float32))
  batch = structs.Batch(None, jnp.zeros_like(rgb), weight)
  batch, term = robust.weigh(jnp.full((1, 1), param), quantile, SIZE, rgb, batch)
  return batch.weight, term


def test_the_terms_gradient_is_the_share_of_inliers_less_the_quantile():
  error = np.linspace(0.001, 1, 640)
  for quantile in (0.5, 0.8):
    slope = jax.grad(lambda p, q=quantile: weigh(p, error, q)[1])(0.0)
    np.testing.assert_allclose(slope, (error <= 0.3).mean() - quantile, atol=1e-5)
    assert weigh(0.0, error, quantile)[1] == 0


def test_the_threshold_follows_the_quantile():
  error = np.exp(np.random.default_rng(0).normal(-4, 0.7, 64 * 20))
  step = jax.jit(jax.grad(lambda p: weigh(p, error, 0.8)[1]))
  param, optimizer = jnp.zeros(()), robust.make_optimizer()
  for k in range(600):
    update, _ = optimizer.update(step(param), optimizer.init(param))
    param -= robust.learning_rate(k) * update
  np.testing.assert_allclose(0.3 * np.exp(param), np.quantile(error, 0.8), rtol=0.05)


def test_weights_have_no_gradient_and_are_multiplied():
  error = np.repeat([0.1, 0.9], SIZE**2)
  slope = jax.grad(lambda e: weigh(0.0, e)[0].sum() + weigh(0.0, e)[1])(jnp.float32(error))
  assert (slope == 0).all()
  image_weight = jnp.full(len(error), 0.7)
  weights = weigh(0.0, error, weight=image_weight)[0]
  np.testing.assert_allclose(weights, 0.7 * (error < 0.3), rtol=1e-6)
  assert (weigh(0.0, np.zeros(64))[0] == 1).all()  # log 0 is guarded.


SIZES = jnp.array([[9, 7], [12, 6]])


def draw(key, count, batching='all_images', supervision=None, size=4):
  return batches.draw_pixels(jax.random.key(key), SIZES, count, batching, supervision, size)


@pytest.mark.parametrize('batching', ['all_images', 'single_image'])
def test_patches_are_whole_and_inside_their_images(batching):
  cam, x, y = (np.asarray(a).reshape(-1, 4, 4) for a in draw(0, 160, batching))
  assert len(cam) == 10
  assert (cam == cam[:, :1, :1]).all()
  np.testing.assert_array_equal(x - x[:, :1, :1], np.broadcast_to(np.arange(4), x.shape))
  np.testing.assert_array_equal(y - y[:, :1, :1], np.broadcast_to(np.arange(4)[:, None], y.shape))
  assert (x >= 0).all()
  assert (y >= 0).all()
  width, height = np.moveaxis(np.asarray(SIZES)[cam], -1, 0)
  assert (x < width).all()
  assert (y < height).all()


def test_patches_reach_all_pixels():
  sizes = np.array([[20, 16], [24, 12]])
  ids = batches.draw_pixels(
    jax.random.key(1), jnp.asarray(sizes), 16 * 20_000, 'all_images', None, 4
  )
  cam, x, y = (np.asarray(a) for a in ids)
  seen = np.zeros((2, 16, 24))
  np.add.at(seen, (cam, y, x), 1)
  for i, (width, height) in enumerate(sizes):
    share = seen[i, :height, :width] / len(cam) * sizes.prod(-1).sum()
    np.testing.assert_allclose(share[5:-5, 5:-5].mean(), 1, atol=0.1)
    assert share.min() > 0.2  # A quarter in the last corner, half at its sides.
    assert share.max() < 2.6  # Up to 1.5 times as often next to a side.


def test_masked_pixels_of_a_patch_have_no_weight():
  cams, _ = tiny.capture(n=2)
  cams = cams.replace(size=np.asarray(SIZES))
  rng = np.random.default_rng(0)
  masks = [rng.random((h, w)) < 0.5 for w, h in SIZES.tolist()]
  cams = cams.replace(supervision=batches.make_supervision(cams.size, masks, [1.0, 3.0]))
  ids = draw(2, 16 * 50, supervision=cams.supervision)
  cam, x, y = (np.asarray(a) for a in ids)
  batch = batches.make_batch(cams, *ids, jnp.zeros((len(cam), 3), jnp.uint8), patches=True)
  wanted = np.array([masks[c][j, i] * (1 + 2 * c) for c, i, j in zip(cam, x, y)])
  assert (wanted > 0).any()
  assert (wanted == 0).any()
  np.testing.assert_allclose(batch.weight, wanted / wanted.mean(), rtol=1e-5)


def test_figures_are_pasted_into_training_photographs_only():
  rng = np.random.default_rng(0)
  rows = passers_by.choose(80, 0.3, rng)
  assert len(set(rows.tolist())) == 21  # 30% of 70.
  assert (rows % 8).all()
  image = np.full((60, 80, 3), 128, np.uint8)
  shares = [(passers_by.paste(image, rng) != image).any(-1).mean() for _ in range(10)]
  assert min(shares) > 0.01
  assert 0.05 < np.mean(shares) < 0.3
  assert (image == 128).all()
