"""Tests of how coarsely Gaussians may be rounded."""

import jax.numpy as jnp
import numpy as np
import splats_rasterizer_test as drawn

from internal.splats import gaussians, naive, rounding

CAPACITY = 2000


def estimate(splats, cameras):
  return rounding.steps(splats, cameras, drawn.BACKGROUND, CAPACITY)


def test_steps_are_those_of_the_weights_in_a_picture(monkeypatch):
  """Of a Gaussian's colour, the sum of squared derivatives is that of squared weights."""
  monkeypatch.setattr(rounding, '_ERROR', 1e-9)  # So that no limit is met.
  camera, splats = drawn.make_camera(), drawn.make_splats(3, seed=5, spread=0.4)
  bright = splats.replace(sh=splats.sh.at[:, 0].set(3.0))  # Nothing is cut off at black.
  weights = []
  for k in range(3):
    projected = gaussians.project(bright, camera)
    only = projected.replace(rgb=jnp.zeros((3, 3)).at[k, 0].set(1.0))
    weights.append(naive.render(only, drawn.SIZE, np.zeros(3))[..., 0])
  total = gaussians.SH_0**2 * np.sum(np.square(weights), (1, 2))
  numbers = 3 * np.prod(drawn.SIZE)
  expected = np.sqrt(12 * 1e-9 * numbers / (59 * 3) / total)
  found = estimate(bright, [camera] * 400)
  assert expected.max() < rounding._COLOR
  np.testing.assert_allclose(found.color, expected, rtol=0.1)
  np.testing.assert_array_equal(found.color, found.harmonics)
  toward = np.asarray(splats.means) - camera.position
  toward /= np.linalg.norm(toward, axis=-1, keepdims=True)
  basis = np.asarray(gaussians.sh_basis(toward))
  np.testing.assert_allclose(found.seen, basis[:, 1:] / basis[:, :1], atol=1e-4)


def test_rounding_costs_what_it_may(monkeypatch):
  monkeypatch.setattr(rounding, '_ERROR', 1e-6)
  camera, splats = drawn.make_camera(), drawn.make_splats(60)
  found, rng = estimate(splats, [camera] * 50), np.random.default_rng(0)
  errors = []
  before = drawn.render(splats, camera, drawn.BACKGROUND, CAPACITY).rgb
  for _ in range(20):

    def moved(x, step):
      step = step.reshape(-1, *[1] * (x.ndim - 1))
      return x + np.float32(step * rng.uniform(-0.5, 0.5, x.shape))

    other = splats.replace(
      means=moved(splats.means, found.means),
      log_scales=moved(splats.log_scales, found.log_scales),
      sh=jnp.concatenate(
        [moved(splats.sh[:, :1], found.color), moved(splats.sh[:, 1:], found.harmonics)], 1
      ),
    )
    after = drawn.render(other, camera, drawn.BACKGROUND, CAPACITY).rgb
    errors.append(np.mean((after - before) ** 2))
  # 54 of 59 parameters were moved; the basis is larger or smaller along one view.
  assert 0.4e-6 < np.mean(errors) < 2e-6


def test_what_no_view_shows_is_rounded_within_limits():
  splats = drawn.make_splats(10)
  behind = splats.replace(means=splats.means.at[:, 2].add(50.0))
  found = estimate(behind, [drawn.make_camera()])
  size = np.exp(np.mean(np.asarray(splats.log_scales), -1))
  np.testing.assert_allclose(found.means, 0.25 * size, rtol=1e-5)
  for name, limit in (('log_scales', 0.25), ('color', 0.1), ('harmonics', 1.0)):
    np.testing.assert_allclose(getattr(found, name), limit, rtol=1e-6)
  assert not found.seen.any()
  moved = found.moved(np.diag([3.0, 3, 3, 1]))
  np.testing.assert_allclose(moved.means, 3 * found.means)
  np.testing.assert_array_equal(moved.color, found.color)
