"""Loss terms: values against naive loops, which parameters get gradients, and `total`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite import assert_finite

from internal import configs, losses, stepfun, structs

RNG = np.random.default_rng(0)
CONFIG = configs.Config()


def _level(n, rays=5, scale=1.0, rgb=True):
  t = np.sort(RNG.uniform(size=(rays, n + 1)), -1)
  w = RNG.uniform(size=(rays, n))
  w *= scale / w.sum(-1, keepdims=True)
  t, w = jnp.float32(t), jnp.float32(w)
  return structs.RayHistory(t, 1 + t, w, jnp.ones((rays, n, 3)) if rgb else None)


def _rendering(rgb):
  ray = jnp.zeros(rgb.shape[:-1])
  return structs.Rendering(rgb, ray, ray, jnp.zeros((*ray.shape, 3)))


def _batch(target):
  return structs.Batch(rays=None, rgb=target)


HISTORY = [_level(9, scale=0.4), _level(7, scale=0.6), _level(4)]
TARGET = jnp.float32(RNG.uniform(size=(5, 3)))
RENDERINGS = [None, None, _rendering(jnp.float32(RNG.uniform(size=(5, 3))))]


class TestData:
  def test_golden(self):
    # Residuals 0, 3e-3 and -4e-3 in one channel each; padding 4e-3: 4, 5 and 4 sqrt 2, x 1e-3.
    rgb, target = jnp.array([[0.5, 0.503, 0.496]]), jnp.full((1, 3), 0.5)
    expected = (4 + 5 + 4 * 2**0.5) / 3 * 1e-3
    np.testing.assert_allclose(losses.charbonnier(rgb, target, 4e-3), expected, rtol=1e-4)
    np.testing.assert_allclose(losses.squared_error(rgb, target), 25e-6 / 3, rtol=1e-4)

  def test_charbonnier_is_smooth_at_zero_and_linear_far_out(self):
    target = jnp.zeros((1, 3))
    slope = jax.grad(lambda rgb: losses.charbonnier(rgb, target, 1e-3))
    np.testing.assert_array_equal(slope(target), 0)
    np.testing.assert_allclose(slope(jnp.full((1, 3), 100.0)), 1 / 3, rtol=1e-5)
    assert_finite(lambda r, t: losses.charbonnier(r, t, 1e-3), [[0.0, 1.0, 1e6]], [[0.0, 1.0, 0.0]])


class TestInterlevel:
  def test_matches_loops(self):
    expected = 0.0
    t, w = HISTORY[-1].sdist, HISTORY[-1].weights
    for level in HISTORY[:-1]:
      bins = []
      for ray in range(5):
        for i in range(4):
          t_env, w_env = level.sdist[ray], level.weights[ray]
          touching = [
            j for j in range(w_env.size) if t_env[j] <= t[ray, i + 1] and t_env[j + 1] >= t[ray, i]
          ]
          short = max(0, w[ray, i] - sum(w_env[j] for j in touching))
          bins.append(short**2 / w[ray, i])
      expected += np.mean(bins)
    assert expected > 1e-3
    np.testing.assert_allclose(losses.interlevel(HISTORY), expected, rtol=1e-4)

  def test_is_zero_for_equal_histograms(self):
    assert losses.interlevel([HISTORY[-1]] * 3) == 0
    assert losses.interlevel(HISTORY[-1:]) == 0  # A single level has nothing to compare.

  def test_trains_only_the_proposals(self):
    def loss(weights):
      return losses.interlevel([h.replace(weights=w) for h, w in zip(HISTORY, weights)])

    slopes = jax.grad(loss)([h.weights for h in HISTORY])
    assert all(np.any(s < 0) and np.all(s <= 0) for s in slopes[:-1])  # Proposal weights only grow.
    np.testing.assert_array_equal(slopes[-1], 0)


class TestInterlevelBlur:
  def test_is_the_sum_over_bins_of_each_level_with_its_blur(self):
    t, w = HISTORY[-1].sdist, HISTORY[-1].weights
    expected = 0.0
    for level, half_width in zip(HISTORY, (0.03, 0.003)):
      for ray in range(5):
        per_bin = stepfun.lossfun_blur(
          t[ray], w[ray], level.sdist[ray], level.weights[ray], half_width
        )
        expected += np.sum(per_bin) / 5
    assert expected > 0.1
    np.testing.assert_allclose(losses.interlevel_blur(HISTORY, (0.03, 0.003)), expected, rtol=1e-4)

  def test_trains_only_the_proposals(self):
    def loss(weights):
      levels = [h.replace(weights=w) for h, w in zip(HISTORY, weights)]
      return losses.interlevel_blur(levels, (0.03, 0.003))

    slopes = jax.grad(loss)([h.weights for h in HISTORY])
    assert all(np.any(s < 0) and np.all(s <= 0) for s in slopes[:-1])  # Proposal weights only grow.
    np.testing.assert_array_equal(slopes[-1], 0)

  def test_needs_a_half_width_per_proposal_level(self):
    with pytest.raises(ValueError, match=r'interlevel_blur .* got \(0\.03,\) for 2'):
      losses.interlevel_blur(HISTORY, (0.03,))


class TestDistortion:
  def test_is_of_the_final_level_averaged_over_rays(self):
    # One bin of width d and weight 1 costs d / 3: mean of 0.1 and 0.3, over 3.
    level = structs.RayHistory(
      jnp.array([[0.4, 0.5], [0.1, 0.4]]), jnp.zeros((2, 2)), jnp.ones((2, 1)), None
    )
    np.testing.assert_allclose(losses.distortion([HISTORY[0], level]), 0.2 / 3, rtol=1e-5)

  def test_on_the_power_ladder_of_metric_distance(self):
    # log(1 + scale t) of an interval from t = 0.1 to 0.4 with scale 10: from log 2 to log 5.
    level = structs.RayHistory(
      jnp.array([[0.9, 1.0]]), jnp.array([[0.1, 0.4]]), jnp.ones((1, 1)), None
    )
    np.testing.assert_allclose(losses.distortion([level], (0, 10.0)), np.log(2.5) / 3, rtol=1e-5)
    config = dataclasses.replace(CONFIG, distortion_power=(0.0, 10.0))
    _, terms = losses.total(config, None, RENDERINGS, [HISTORY[0], level], _batch(TARGET))
    np.testing.assert_allclose(terms['distortion'], 0.01 * np.log(2.5) / 3, rtol=1e-5)

  def test_finite_from_the_camera_to_the_far_plane(self):
    t = [[0.0, 0.0, 1e-6, 0.2, 1e6]]

    def loss(t, w):
      return losses.distortion([structs.RayHistory(t, t, w, None)], (-0.25, 1e4))

    assert_finite(loss, t, [[0.0, 0.2, 0.3, 0.5]])

  def test_gradient_lowers_all_weights(self):
    level = HISTORY[-1]
    slope = jax.grad(lambda w: losses.distortion([level.replace(weights=w)]))(level.weights)
    assert np.all(slope > 0)


class TestDepth:
  def test_is_the_mean_distance_in_s(self):
    # Weights 0.2 and 0.5 on s from 0 to 0.4 and to 0.5, t = 10 s, and 0.3 of the light passes.
    level = structs.RayHistory(
      jnp.array([[0, 0.4, 0.5]]), jnp.array([[0, 4.0, 5]]), jnp.array([[0.2, 0.5]]), None
    )
    u = np.linspace(0, 1, 100_001)[:-1] + 5e-6
    density = np.where(u < 0.4, 0.2 / 0.4, np.where(u < 0.5, 0.5 / 0.1, 0))
    for t in (0.0, 1.0, 4.2, 5.0):
      expected = np.mean(density * abs(u - t / 10)) + 0.3 * (1 - t / 10)
      value = losses.depth([HISTORY[0], level], jnp.array([t]), jnp.array([0.5]))
      np.testing.assert_allclose(value, 0.5 * expected, rtol=1e-4)

  def test_is_zero_for_a_surface_at_the_point_and_for_rays_without_one(self):
    t = jnp.array([[0.0, 0.3, 0.3, 1.0]])
    level = structs.RayHistory(t, t, jnp.array([[0.0, 1.0, 0.0]]), None)
    assert losses.depth([level], jnp.array([0.3]), jnp.ones(1)) == 0
    assert losses.depth([level], jnp.array([0.9]), jnp.zeros(1)) == 0

  def test_gradient_favours_the_interval_of_the_point(self):
    level = _level(6, rays=1)
    point = (level.tdist[:, 2] + level.tdist[:, 3]) / 2
    slope = jax.grad(lambda w: losses.depth([level.replace(weights=w)], point, jnp.ones(1)))
    assert np.argmin(slope(level.weights)) == 2

  def test_finite(self):
    t = [[0.0, 0.0, 0.5, 0.5, 1.0]]

    def loss(t, w, distance):
      return losses.depth([structs.RayHistory(t, 1e6 * t, w, None)], distance, jnp.ones(1))

    for distance in (0.0, 5e5, 1e6, 1e8):
      assert_finite(loss, t, [[0.0, 0.2, 0.3, 0.5]], [distance])

  def test_needs_known_distances(self):
    config = dataclasses.replace(CONFIG, depth_loss_mult=0.1)
    with pytest.raises(ValueError, match='a capture with sparse points'):
      losses.total(config, None, RENDERINGS, HISTORY, _batch(TARGET))
    batch = structs.Batch(None, TARGET, None, jnp.full((5,), 1.5), jnp.ones(5))
    _, terms = losses.total(config, None, RENDERINGS, HISTORY, batch)
    expected = 0.1 * losses.depth(HISTORY, batch.distance, batch.certainty)
    np.testing.assert_allclose(terms['depth'], expected, rtol=1e-6)


PARAMS = {
  'nerf_mlp': {'trunk_0': {'kernel': jnp.full((2, 2), 2.0), 'bias': jnp.ones(2)}},
  'prop_mlp': {'density': {'kernel': jnp.full((1, 3), 3.0)}},
}


class TestWeightDecay:
  def test_sums_squares_of_the_named_parts(self):
    mults = {'nerf_mlp/trunk_0': 0.5, 'prop_mlp': 0.1}
    expected = 0.5 * (4 * 4 + 2) + 0.1 * 27
    np.testing.assert_allclose(losses.weight_decay(PARAMS, mults), expected, rtol=1e-6)

  def test_refuses_an_unknown_part(self):
    with pytest.raises(ValueError, match=r"'nerf_mlp/trunk_9'; known here: trunk_0"):
      losses.weight_decay(PARAMS, {'nerf_mlp/trunk_9': 1.0})
    with pytest.raises(ValueError, match='nothing below'):
      losses.weight_decay(PARAMS, {'nerf_mlp/trunk_0/bias/x': 1.0})


GRID_PARAMS = {
  'nerf_mlp': {
    'grid': {'table_0': jnp.full((2, 2), 3.0), 'table_1': jnp.full((100, 2), 1.0)},
    'trunk_0': {'kernel': jnp.full((2, 2), 5.0)},
  },
  'prop_mlp_0': {'grid': {'table_0': jnp.array([[1.0], [0.0]])}},
  'glo': {'embedding': jnp.ones((2, 2))},
}


class TestGridDecay:
  def test_is_the_sum_of_the_tables_means(self):
    np.testing.assert_allclose(losses.grid_decay(GRID_PARAMS), 9 + 1 + 0.5, rtol=1e-6)
    assert losses.grid_decay(PARAMS) == 0

  def test_grows_with_the_level(self):
    np.testing.assert_allclose(losses.grid_decay(GRID_PARAMS, 3.0), 9 + 3 * 1 + 0.5, rtol=1e-6)
    config = dataclasses.replace(CONFIG, grid_decay_mult=0.1, grid_decay_growth=3.0)
    _, terms = losses.total(config, GRID_PARAMS, RENDERINGS, HISTORY, _batch(TARGET))
    np.testing.assert_allclose(terms['grid_decay'], 1.25, rtol=1e-6)

  def test_leaves_the_scales_of_fading_features_alone(self):
    field = {**GRID_PARAMS['nerf_mlp']['grid'], 'fading_scale': jnp.full((2,), 100.0)}
    np.testing.assert_allclose(losses.grid_decay({'a': {'grid': field}}), 9 + 1, rtol=1e-6)

  def test_touches_tables_alone(self):
    slopes = jax.grad(losses.grid_decay)(GRID_PARAMS)
    np.testing.assert_array_equal(slopes['nerf_mlp']['trunk_0']['kernel'], 0)
    np.testing.assert_array_equal(slopes['glo']['embedding'], 0)
    np.testing.assert_allclose(slopes['nerf_mlp']['grid']['table_1'], 2 / 200, rtol=1e-6)


class TestTotal:
  def _total(self, renderings=RENDERINGS, params=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return losses.total(config, params, renderings, HISTORY, _batch(TARGET))

  def test_default_terms_and_multipliers(self):
    loss, terms = self._total()
    rgb = RENDERINGS[-1].rgb
    expected = {
      'data': losses.charbonnier(rgb, TARGET, 1e-3),
      'interlevel': losses.interlevel(HISTORY),
      'distortion': 0.01 * losses.distortion(HISTORY),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_allclose(terms[name], value, rtol=1e-6)
    np.testing.assert_allclose(loss, sum(expected.values()), rtol=1e-6)

  def test_each_multiplier_scales_its_term(self):
    _, base = self._total()
    for name, mult in (('data', 1.0), ('interlevel', 1.0), ('distortion', 0.01)):
      _, terms = self._total(**{f'{name}_loss_mult': 3 * mult})
      for other in base:
        factor = 3 if other == name else 1
        np.testing.assert_allclose(terms[other], factor * base[other], rtol=1e-6)

  def test_mse_without_distortion(self):
    _, terms = self._total(data_loss_type='mse', distortion_loss_mult=0.0)
    assert terms.keys() == {'data', 'interlevel'}
    np.testing.assert_allclose(
      terms['data'], np.mean((RENDERINGS[-1].rgb - TARGET) ** 2), rtol=1e-6
    )

  def test_coarse_data_loss_sums_over_proposal_levels(self):
    three = [_rendering(TARGET + d) for d in (0.1, 0.2, 0.3)]
    _, terms = self._total(three, data_loss_type='mse', data_coarse_loss_mult=2.0)
    np.testing.assert_allclose(terms['data'], 0.09, rtol=1e-4)
    np.testing.assert_allclose(terms['data_coarse'], 2 * (0.01 + 0.04), rtol=1e-4)
    with pytest.raises(ValueError, match=r'PropMLP\.disable_rgb = False'):
      self._total(data_coarse_loss_mult=0.1)
    with pytest.raises(ValueError, match=r'NerfMLP\.disable_rgb = False'):
      self._total([*three[:2], None])

  def test_weight_decay_is_added_if_configured(self):
    loss, terms = self._total(params=PARAMS, weight_decay_mults={'prop_mlp': 0.1})
    np.testing.assert_allclose(terms['weight_decay'], 2.7, rtol=1e-6)
    np.testing.assert_allclose(loss, self._total()[0] + 2.7, rtol=1e-6)

  def test_blur_replaces_the_bound(self):
    _, terms = self._total(interlevel_loss_type='blur', interlevel_loss_mult=0.01)
    expected = 0.01 * losses.interlevel_blur(HISTORY, CONFIG.interlevel_blur)
    np.testing.assert_allclose(terms['interlevel'], expected, rtol=1e-6)

  def test_grid_decay_is_added_if_configured(self):
    loss, terms = self._total(params=GRID_PARAMS, grid_decay_mult=0.1)
    np.testing.assert_allclose(terms['grid_decay'], 1.05, rtol=1e-6)
    np.testing.assert_allclose(loss, self._total()[0] + 1.05, rtol=1e-6)
