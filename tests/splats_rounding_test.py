"""Tests of how coarsely Gaussians may be rounded."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import splats_naive as naive
import splats_rasterizer_test as drawn

from internal.splats import gaussians, rounding

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


@pytest.mark.parametrize(
  ('name', 'numbers'), [('means', 3), ('log_scales', 3), ('color', 3), ('harmonics', 45)]
)
def test_rounding_costs_what_it_may(monkeypatch, name, numbers):
  monkeypatch.setattr(rounding, '_ERROR', 1e-7)  # So small that pictures change linearly,
  monkeypatch.setattr(gaussians, 'MIN_ALPHA', 1e-6)  # but for what is left out.
  camera, splats = drawn.make_camera((38, 22)), drawn.make_splats(60)  # A size to compile anew.
  splats = splats.replace(sh=splats.sh.at[:, 0].add(4.0))  # No colour is cut off at black.
  steps, rng = estimate(splats, [camera] * 100), np.random.default_rng(0)
  step = np.float32(getattr(steps, name))
  rows = slice(0, 1) if name == 'color' else slice(1, None)
  before, errors = drawn.render(splats, camera, drawn.BACKGROUND, CAPACITY).rgb, []
  for _ in range(40):
    if name in ('color', 'harmonics'):
      noise = step[:, None, None] * rng.uniform(-0.5, 0.5, splats.sh[:, rows].shape)
      other = splats.replace(sh=splats.sh.at[:, rows].add(noise))
    else:
      noise = step[:, None] * rng.uniform(-0.5, 0.5, (60, 3))
      other = splats.replace(**{name: getattr(splats, name) + np.float32(noise)})
    after = drawn.render(other, camera, drawn.BACKGROUND, CAPACITY).rgb
    errors.append(np.mean((after - before) ** 2))
  np.testing.assert_allclose(np.mean(errors), 1e-7 * numbers / 59, rtol=0.2)


def test_the_fewer_views_show_something_the_finer_it_is_rounded(monkeypatch):
  monkeypatch.setattr(rounding, '_ERROR', 1e-9)
  camera, splats = drawn.make_camera(), drawn.make_splats(60)
  away = dataclasses.replace(camera, position=camera.position - np.float32([0, 0, 99]))
  many, one = (estimate(splats, [camera] * count + [away] * (100 - count)) for count in (100, 1))
  # One hundredth of the sum allows ten times the step; a third of its square is kept.
  shown = many.log_scales > 0
  ratio = np.median(one.log_scales[shown] / many.log_scales[shown])
  assert ratio == pytest.approx(10 / np.sqrt(3), rel=0.5)


def test_what_no_view_shows_is_not_rounded_and_what_one_shows_within_limits(monkeypatch):
  monkeypatch.setattr(rounding, '_ERROR', 1e9)
  splats = drawn.make_splats(10)
  splats = splats.replace(means=splats.means.at[:5, 2].add(50.0), opacity_logits=jnp.ones(10))
  found = estimate(splats, [drawn.make_camera()])
  for name in ('means', 'log_scales', 'color', 'harmonics', 'seen'):
    assert not getattr(found, name)[:5].any()
  size = np.exp(np.mean(np.asarray(splats.log_scales), -1))
  np.testing.assert_allclose(found.means[5:], 0.25 * size[5:], rtol=1e-5)
  for name, limit in (('log_scales', 0.25), ('color', 0.1), ('harmonics', 1.0)):
    np.testing.assert_allclose(getattr(found, name)[5:], limit, rtol=1e-6)
  moved = found.moved(np.diag([3.0, 3, 3, 1]))
  np.testing.assert_allclose(moved.means, 3 * found.means)
  np.testing.assert_array_equal(moved.color, found.color)
