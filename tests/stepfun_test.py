"""Histograms along a ray, against their properties, naive float64 loops and closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite import assert_finite

from internal import stepfun

# Endpoints and weights at which division, logarithm or search could slip.
AWKWARD_T = [
  [0.0, 0.0, 0.5, 0.5, 1.0],
  [0.3, 0.3, 0.3, 0.3, 0.3],
  [0, 1, 2, 1e6, 1e6],
  [0, 1, 2, 3, 4],
]
AWKWARD_W = [
  [0.0, 0.0, 0.0, 0.0],
  [1.0, 0.0, 0.0, 0.0],
  [0.0, 0.0, 0.0, 1.0],
  [0.25, 0.25, 0.25, 0.25],
]
PAIRS = [np.array(v) for v in zip(*[(t, w) for t in AWKWARD_T for w in AWKWARD_W])]


def _histogram(rng, n, batch=()):
  """Ascending endpoints in [0, 1] and weights that sum to one, in float32."""
  t = np.sort(rng.uniform(size=(*batch, n + 1)), -1)
  w = rng.uniform(size=(*batch, n)) ** 3
  return np.float32(t), np.float32(w / w.sum(-1, keepdims=True))


def _density_at(x, t, w):
  """Evaluates the density of one histogram at points x."""
  out = np.zeros_like(x)
  for t0, t1, wi in zip(t[:-1], t[1:], w):
    if t1 > t0:
      out[(x >= t0) & (x < t1)] = wi / (t1 - t0)
  return out


def _invert_cdf(u, t, w):
  """Returns the distances at which the CDF of one histogram reaches u, by a loop over bins."""
  out = []
  for ui in u:
    before = 0.0
    for t0, t1, wi in zip(t[:-1], t[1:], w):
      if before + wi >= ui:
        out.append(t0 + (t1 - t0) * (ui - before) / wi)
        break
      before += wi
    else:
      out.append(t[-1])
  return np.array(out)


class TestDensity:
  def test_weight_over_width(self):
    density = stepfun.weight_to_density(jnp.array([0.0, 0.5, 0.5, 2.5]), jnp.array([1.0, 1.0, 1.0]))
    np.testing.assert_allclose(density, [2, 0, 0.5])

  def test_finite(self):
    assert_finite(stepfun.weight_to_density, *PAIRS)


class TestDilation:
  dilate = staticmethod(jax.jit(stepfun.max_dilate_weights, static_argnums=(2, 3, 4)))

  @pytest.mark.parametrize('dilation', [0.0, 0.01, 0.3])
  def test_matches_a_max_filter(self, dilation):
    rng = np.random.default_rng(0)
    t, w = _histogram(rng, 7)
    edges, weights = self.dilate(t, w, dilation, (0.0, 1.0), False)
    assert edges.shape == (22,)
    assert weights.shape == (21,)
    assert np.all(np.diff(edges) >= 0)
    x = rng.uniform(0, 1, 500)
    x = x[np.min(np.abs(x[:, None] - np.asarray(edges)), -1) > 1e-5]  # Steps are either side's.
    expected = np.zeros_like(x)
    for t0, t1, wi in zip(t[:-1], t[1:], w):
      covered = (x > t0 - dilation) & (x < t1 + dilation)
      expected[covered] = np.maximum(expected[covered], wi / (t1 - t0))
    dilated = _density_at(x, np.asarray(edges, np.float64), np.asarray(weights))
    np.testing.assert_allclose(dilated, expected, rtol=2e-3)
    assert np.all(dilated >= _density_at(x, t, w) * 0.998)  # It contains the original.

  def test_golden(self):
    # Density 1 on [0.2, 0.4], 4 on [0.4, 0.6]; by 0.1: 1 on [0.1, 0.3], 4 on [0.3, 0.7].
    edges, weights = self.dilate(
      jnp.array([0.2, 0.4, 0.6]), jnp.array([0.2, 0.8]), 0.1, (0.0, 1.0), False
    )
    np.testing.assert_allclose(edges, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], atol=1e-6)
    np.testing.assert_allclose(weights, [0.1, 0.1, 0.4, 0.4, 0.4, 0.4], atol=1e-6)

  def test_stays_in_the_domain_and_sums_to_one(self):
    t, w = _histogram(np.random.default_rng(1), 6, (5,))
    edges, weights = self.dilate(t, w, 0.2, (0.1, 0.9), True)
    assert np.all((edges >= np.float32(0.1)) & (edges <= np.float32(0.9)))
    np.testing.assert_allclose(np.sum(weights, -1), 1, rtol=1e-5)
    assert np.all(np.asarray(weights)[np.diff(edges) == 0] == 0)

  def test_zero_weights_stay_zero(self):
    _, weights = self.dilate(jnp.linspace(0, 1, 5), jnp.zeros(4), 0.1, (0.0, 1.0), True)
    np.testing.assert_array_equal(weights, 0)

  def test_finite(self):
    def dilate(t, w):
      return stepfun.max_dilate_weights(t, w, 0.01, (0.0, 1.0), True)

    assert_finite(dilate, *PAIRS)


class TestHighest:
  """The maximum over intervals that contain a point: by gathers, and by masks for TPUs."""

  twins = stepfun._highest_by_mask, stepfun._highest_by_search

  def _intervals(self, n, rows, dilation):
    """Values, starts and stops of intervals; with ties, and one row with equal endpoints."""
    rng = np.random.default_rng(n)
    t = np.sort(rng.choice(np.linspace(0, 1, 1 + n), (rows, n + 1)), -1)
    t[0] = t[0, 0]
    value = rng.permutation(rows * n).reshape(rows, n) / (rows * n)
    value[:, rng.integers(0, n, n // 3)] = 0
    return (np.float32(v) for v in (value, t[:, :-1] - dilation, t[:, 1:] + dilation))

  @pytest.mark.parametrize('n', [1, 2, 3, 7, 8, 9, 33])
  @pytest.mark.parametrize('dilation', [0.0, 0.01, 0.3, 5.0])
  def test_both_are_equal_to_the_bit(self, n, dilation):
    value, start, stop = self._intervals(n, 20, dilation)
    inside = np.random.default_rng(1).uniform(-0.5, 1.5, (20, 30))
    x = np.concatenate([start, stop, inside], -1).astype(np.float32)
    mask, search = (jax.jit(fn)(value, start, stop, x) for fn in self.twins)
    np.testing.assert_array_equal(mask, search)
    for row in range(0, 20, 5):
      for k in range(0, x.shape[1], 3):
        held = value[row][(start[row] <= x[row, k]) & (x[row, k] < stop[row])]
        assert search[row, k] == max(held, default=0)

  def test_gradients_are_equal(self):
    value, start, stop = self._intervals(9, 20, 0.1)
    value += np.float32(1e-4) * np.arange(1, 10, dtype=np.float32)  # All distinct and nonzero.
    x = np.random.default_rng(2).uniform(-0.5, 1.5, (20, 30)).astype(np.float32)
    weights = np.random.default_rng(3).normal(size=(20, 30)).astype(np.float32)
    slopes = [
      jax.jit(jax.grad(lambda v, fn=fn: jnp.sum(weights * fn(v, start, stop, x))))(value)
      for fn in self.twins
    ]
    assert np.sum(slopes[0] != 0) > 50
    np.testing.assert_allclose(*slopes, atol=1e-6)

  @pytest.mark.parametrize(('platform', 'gathers'), [('tpu', False), ('cuda', True), ('cpu', True)])
  def test_only_tpus_avoid_gathers(self, platform, gathers):
    fn = jax.jit(lambda t, w: stepfun.max_dilate_weights(t, w, 0.01, (0.0, 1.0), True))
    shapes = [jax.ShapeDtypeStruct((4, n), jnp.float32) for n in (10, 9)]
    text = fn.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert ('stablehlo.gather' in text) == gathers


class TestAnneal:
  t = jnp.array([0.0, 0.2, 0.2, 0.7, 1.0])
  w = jnp.array([0.1, 0.5, 0.4, 0.0])

  def _probabilities(self, exponent, padding=0.0):
    return jax.nn.softmax(stepfun.anneal_logits(self.t, self.w, exponent, padding))

  def test_exponents(self):
    # The second bin has no width, and so no weight at any exponent.
    np.testing.assert_allclose(self._probabilities(0.0), [1 / 3, 0, 1 / 3, 1 / 3], atol=1e-6)
    np.testing.assert_allclose(self._probabilities(1.0), [0.2, 0, 0.8, 0], atol=1e-6)
    np.testing.assert_allclose(self._probabilities(0.5), [1 / 3, 0, 2 / 3, 0], atol=1e-6)

  def test_padding_gives_every_bin_a_share(self):
    np.testing.assert_allclose(
      self._probabilities(1.0, 0.1), np.array([0.2, 0, 0.5, 0.1]) / 0.8, atol=1e-6
    )

  def test_all_zero_weights_sample_uniformly_over_bins(self):
    p = jax.nn.softmax(stepfun.anneal_logits(jnp.linspace(0, 1, 5), jnp.zeros(4), 1.0))
    np.testing.assert_allclose(p, 0.25)


class TestSample:
  key = jax.random.key(0)

  def test_centres_of_strata_of_a_uniform_histogram(self):
    t = jnp.array([0.0, 0.25, 1.0])
    logits = jnp.log(jnp.array([0.25, 0.75]))
    np.testing.assert_allclose(
      stepfun.sample(None, t, logits, 4), [1 / 8, 3 / 8, 5 / 8, 7 / 8], rtol=1e-6
    )

  def test_matches_walking_along_the_cdf(self):
    t, w = _histogram(np.random.default_rng(2), 9, (4,))
    out = stepfun.sample(None, t, np.log(w), 33)
    u = (np.arange(33) + 0.5) / 33
    expected = [_invert_cdf(u, a, b) for a, b in zip(t.astype(np.float64), w.astype(np.float64))]
    np.testing.assert_allclose(out, expected, atol=1e-5)

  @pytest.mark.parametrize('single_jitter', [True, False])
  def test_one_point_in_each_stratum(self, single_jitter):
    t, logits = jnp.zeros((50, 2)) + jnp.array([[0.0, 1.0]]), jnp.zeros((50, 1))
    out = np.asarray(stepfun.sample(self.key, t, logits, 8, single_jitter))
    np.testing.assert_array_equal(
      np.floor(out * 8 + 1e-4 * (0.5 - out)), np.tile(np.arange(8), (50, 1))
    )
    shift = out * 8 - np.arange(8)
    assert np.std(shift[:, 0]) > 0.2  # Rays differ from each other...
    spread = np.std(shift, -1)  # ... and the strata of a ray only without a single jitter.
    assert np.all(spread < 1e-5) if single_jitter else np.all(spread > 0.05)

  @pytest.mark.parametrize('single_jitter', [True, False])
  def test_a_key_for_each_histogram(self, single_jitter):
    keys = jax.random.split(self.key, 3)
    t, w = _histogram(np.random.default_rng(12), 6, (3,))
    for draw in (stepfun.sample, stepfun.sample_intervals):
      out = draw(keys, t, np.log(w), 8, single_jitter)
      for i in range(3):
        alone = draw(keys[i], t[i], np.log(w[i]), 8, single_jitter)
        np.testing.assert_allclose(out[i], alone, atol=1e-6)

  @pytest.mark.parametrize('single_jitter', [True, False])
  def test_follows_the_histogram(self, single_jitter):
    t, w = _histogram(np.random.default_rng(3), 6)
    rays = 2000
    tt, logits = np.tile(t, (rays, 1)), np.tile(np.log(w), (rays, 1))
    out = stepfun.sample(self.key, tt, logits, 16, single_jitter)
    assert np.all(np.diff(out) >= 0)
    counts, _ = np.histogram(np.asarray(out), t)
    # Stratified samples vary less than independent ones, whose deviation is below sqrt(p q / n);
    # a single jitter ties the samples of a ray together, so n is the number of rays.
    np.testing.assert_allclose(counts / out.size, w, atol=4 * 0.5 / np.sqrt(rays))

  def test_draws_nothing_from_empty_bins(self):
    t = jnp.array([0.0, 0.3, 0.6, 0.6, 1.0])
    logits = jnp.array([0.0, -jnp.inf, -jnp.inf, 0.0])
    out = np.asarray(stepfun.sample(None, t, logits, 64))
    assert np.all((out <= np.float32(0.3)) | (out >= np.float32(0.6)))
    assert np.sum(out < 0.45) == 32

  def test_finite(self):
    def draw(t, w):
      return stepfun.sample(self.key, t, stepfun.anneal_logits(t, w, 0.7), 6, True)

    assert_finite(draw, *PAIRS)

  @pytest.mark.parametrize('platform', ['cpu', 'tpu'])
  def test_nan_logits_do_not_pass_for_samples(self, platform, monkeypatch):
    if platform == 'tpu':
      monkeypatch.setattr(stepfun.math, 'by_platform', lambda dense, indexed: dense)
    t = jnp.linspace(0.0, 1.0, 9)
    logits = jnp.zeros((2, 8)).at[0, 3].set(jnp.nan)
    out = jax.jit(lambda v: stepfun.sample_intervals(None, jnp.stack([t, t]), v, 4))(logits)
    assert np.all(np.isnan(out[0]))
    np.testing.assert_allclose(out[1], [0, 0.25, 0.5, 0.75, 1], atol=1e-6)


class TestSampleIntervals:
  def test_uniform(self):
    t = jnp.array([0.0, 1.0])
    out = stepfun.sample_intervals(None, t, jnp.zeros(1), 4, True, (0.0, 1.0))
    np.testing.assert_allclose(out, [0, 0.25, 0.5, 0.75, 1], atol=1e-6)

  @pytest.mark.parametrize('seed', [None, 0, 1])
  def test_midpoints_of_the_samples_with_outer_ones_reflected(self, seed):
    key = None if seed is None else jax.random.key(seed)
    t, w = _histogram(np.random.default_rng(4), 9, (30,))
    points = np.asarray(stepfun.sample(key, t, np.log(w), 12, True))
    out = np.asarray(stepfun.sample_intervals(key, t, np.log(w), 12, True))
    assert out.shape == (30, 13)
    np.testing.assert_allclose(out[:, 1:-1], (points[:, 1:] + points[:, :-1]) / 2, atol=1e-6)
    np.testing.assert_allclose((out[:, 0] + out[:, 1]) / 2, points[:, 0], atol=1e-6)
    np.testing.assert_allclose((out[:, -1] + out[:, -2]) / 2, points[:, -1], atol=1e-6)
    assert np.all(np.diff(out) >= 0)

  def test_stays_in_the_domain(self):
    t, w = _histogram(np.random.default_rng(5), 3, (40,))
    draw = jax.jit(lambda d: stepfun.sample_intervals(jax.random.key(1), t, np.log(w), 5, True, d))
    low, high = np.float32(0.4), np.float32(0.6)
    out = draw((low, high))
    assert np.all((out >= low) & (out <= high))
    assert np.all(np.diff(out) >= 0)

  def test_a_single_interval_raises(self):
    with pytest.raises(ValueError, match='at least 2, got 1'):
      stepfun.sample_intervals(None, jnp.array([0.0, 1.0]), jnp.zeros(1), 1)


T, W = jnp.linspace(0.0, 1.0, 9)[None], jnp.ones((1, 8)) / 8


@pytest.mark.parametrize('wrong', [1, 3, 7, 9])
@pytest.mark.parametrize(
  'call',
  [
    lambda w: stepfun.weight_to_density(T, w),
    lambda w: stepfun.max_dilate_weights(T, w, 0.1),
    lambda w: stepfun.anneal_logits(T, w, 1.0),
    lambda w: stepfun.sample(None, T, w, 4),
    lambda w: stepfun.sample_intervals(None, T, w, 4),
    lambda w: stepfun.outer_bound(T, T, w),
    lambda w: stepfun.lossfun_outer(T, w, T, W),
    lambda w: stepfun.lossfun_outer(T, W, T, w),
    lambda w: stepfun.blur_resample(T, w, 0.1, T),
    lambda w: stepfun.lossfun_blur(T, w, T, W, 0.1),
    lambda w: stepfun.lossfun_blur(T, W, T, w, 0.1),
    lambda w: stepfun.lossfun_distortion(T, w),
    lambda w: stepfun.weighted_percentile(T, w, (50,)),
  ],
)
def test_weights_that_do_not_fit_the_endpoints_are_refused(call, wrong):
  call(W)
  with pytest.raises(ValueError, match=rf'got {wrong} weights or logits and 9 endpoints'):
    call(jnp.ones((1, wrong)) / wrong)


def _bound_twin(t, t_env, w_env):
  """Computes `outer_bound` of one ray by two loops."""
  out = np.zeros(len(t) - 1)
  for i in range(len(t) - 1):
    for j in range(len(w_env)):
      if t_env[j] <= t[i + 1] and t_env[j + 1] >= t[i]:
        out[i] += w_env[j]
  return out


class TestOuter:
  def _pair(self, batch=()):
    rng = np.random.default_rng(6)
    return (*_histogram(rng, 8, batch), *_histogram(rng, 11, batch))

  def test_matches_two_loops(self):
    t, w, t_env, w_env = self._pair((10,))
    w_env = w_env / 3  # So that some bins stick out.
    bound = np.stack([_bound_twin(*row) for row in zip(t, t_env, w_env)])
    np.testing.assert_allclose(stepfun.outer_bound(t, t_env, w_env), bound, rtol=1e-5, atol=1e-7)
    expected = np.maximum(0, w - bound) ** 2 / (w + np.finfo(np.float32).eps)
    assert np.sum(expected > 1e-3) > 10
    np.testing.assert_allclose(
      stepfun.lossfun_outer(t, w, t_env, w_env), expected, rtol=1e-4, atol=1e-7
    )

  def test_bins_that_share_an_endpoint_overlap(self):
    bound = stepfun.outer_bound(jnp.array([1.0, 2.0]), jnp.arange(4.0), jnp.array([0.1, 0.2, 0.4]))
    np.testing.assert_allclose(bound, [0.7], rtol=1e-6)

  def test_equal_histograms_have_no_loss(self):
    t, w, _, _ = self._pair((5,))
    np.testing.assert_array_equal(stepfun.lossfun_outer(t, w, t, w), 0)

  def test_any_coarser_envelope_has_no_loss(self):
    # An envelope that merges neighbouring bins holds as much weight over each of them.
    t, w, _, _ = self._pair((5,))
    merged = w.reshape(5, 4, 2).sum(-1)
    np.testing.assert_allclose(stepfun.lossfun_outer(t, w, t[:, ::2], merged), 0, atol=1e-12)

  def test_golden(self):
    # All weight 1 where the envelope has 0.6: (1 - 0.6)^2 / 1.
    t, t_env = jnp.array([0.4, 0.6]), jnp.array([0.0, 0.3, 0.5, 0.7, 1.0])
    loss = stepfun.lossfun_outer(t, jnp.ones(1), t_env, jnp.array([0.2, 0.3, 0.3, 0.2]))
    np.testing.assert_allclose(loss, [0.16], rtol=1e-5)

  def test_gradient_raises_the_envelope_only_where_it_is_exceeded(self):
    t, t_env = jnp.array([0.0, 0.4, 1.0]), jnp.array([0.0, 0.5, 0.9, 1.0])
    w, w_env = jnp.array([0.8, 0.2]), jnp.array([0.5, 0.4, 0.1])
    slope = jax.grad(lambda we: jnp.sum(stepfun.lossfun_outer(t, w, t_env, we)))(w_env)
    # The first bin lacks 0.3 and touches the first envelope bin only: -2 (0.3) / 0.8.
    np.testing.assert_allclose(slope, [-0.75, 0, 0], rtol=1e-5)

  def test_finite(self):
    assert_finite(stepfun.lossfun_outer, *PAIRS, *(v[::-1] for v in PAIRS))
    assert_finite(stepfun.lossfun_outer, *PAIRS, *PAIRS)


class TestDistortion:
  def test_matches_the_double_integral(self):
    # Sum of |x - y| p(x) p(y) over pairs of points of a fine grid of the step function.
    t, w = _histogram(np.random.default_rng(7), 6)
    t[0], t[-1] = 0, 1
    n = 4000
    x = (np.arange(n) + 0.5) / n
    p = _density_at(x, t.astype(np.float64), w) / n
    expected = np.sum(np.abs(x[:, None] - x) * p[:, None] * p)
    np.testing.assert_allclose(stepfun.lossfun_distortion(t, w), expected, rtol=3e-3)

  def test_golden(self):
    # Two points uniform in one interval of width d are d / 3 apart on average. Two narrow spikes
    # of 1/2 each, one apart, are apart in half of the draws: 1/2.
    np.testing.assert_allclose(
      stepfun.lossfun_distortion(jnp.array([0.2, 0.8]), jnp.ones(1)), 0.2, rtol=1e-5
    )
    spikes = jnp.array([0.0, 1e-6, 1.0, 1 + 1e-6]), jnp.array([0.5, 0.0, 0.5])
    np.testing.assert_allclose(stepfun.lossfun_distortion(*spikes), 0.5, rtol=1e-5)

  def test_does_not_depend_on_how_bins_are_split(self):
    t, w = _histogram(np.random.default_rng(8), 5)
    fine_t = np.sort(np.concatenate([t, (t[1:] + t[:-1]) / 2]))
    fine_w = np.repeat(w / 2, 2)
    np.testing.assert_allclose(
      stepfun.lossfun_distortion(fine_t, fine_w), stepfun.lossfun_distortion(t, w), rtol=1e-5
    )

  def test_scales_with_distance_and_with_the_square_of_weight(self):
    t, w = _histogram(np.random.default_rng(9), 5)
    base = stepfun.lossfun_distortion(t, w)
    np.testing.assert_allclose(stepfun.lossfun_distortion(3 * t, w), 3 * base, rtol=1e-5)
    np.testing.assert_allclose(stepfun.lossfun_distortion(t + 5, w), base, rtol=1e-4)
    np.testing.assert_allclose(stepfun.lossfun_distortion(t, w / 2), base / 4, rtol=1e-5)

  def test_finite(self):
    assert_finite(stepfun.lossfun_distortion, *PAIRS)


class TestPercentile:
  def test_matches_walking_along_the_cdf(self):
    t, w = _histogram(np.random.default_rng(10), 9, (6,))
    out = stepfun.weighted_percentile(t, w, [5, 25, 50, 95])
    u = np.array([0.05, 0.25, 0.5, 0.95])
    np.testing.assert_allclose(out, [_invert_cdf(u, a, b) for a, b in zip(t, w)], atol=1e-5)

  def test_ends_and_golden(self):
    t, w = jnp.array([2.0, 4.0, 6.0]), jnp.array([0.25, 0.75])
    out = stepfun.weighted_percentile(t, w, (0, 12.5, 25, 50, 100))
    np.testing.assert_allclose(out, [2, 3, 4, 4 + 2 / 3, 6], rtol=1e-6)

  def test_cdf_ends_at_exactly_one(self):
    _, w = _histogram(np.random.default_rng(11), 64, (100,))
    cdf = np.asarray(stepfun.integrate_weights(w * np.float32(1.00001)))
    assert np.all(cdf[:, 0] == 0)
    assert np.all(cdf[:, -1] == 1)
    assert np.all(np.diff(cdf) >= 0)
    np.testing.assert_allclose(cdf[:, 1:], np.cumsum(w, -1), atol=1e-4)

  def test_finite(self):
    assert_finite(lambda t, w: stepfun.weighted_percentile(t, w, (5, 50, 95)), *PAIRS)


def _blurred_mass(t, w, half_width, edges, num=4001):
  """Integrates the blurred density over each bin numerically, in float64."""
  out = []
  for a, b in itertools.pairwise(edges):
    # The density at x is that of the histogram's mass within half_width of x.
    x = a + (b - a) * (np.arange(num) + 0.5) / num
    cdf = np.concatenate([[0], np.cumsum(w)])
    mass = np.interp(x + half_width, t, cdf) - np.interp(x - half_width, t, cdf)
    out.append(np.mean(mass) / (2 * half_width) * (b - a))
  return np.array(out)


class TestBlur:
  blur = staticmethod(jax.jit(stepfun.blur_resample, static_argnums=2))

  @pytest.mark.parametrize('half_width', [0.003, 0.03, 0.5])
  def test_matches_numerical_integration(self, half_width):
    rng = np.random.default_rng(0)
    t, w = _histogram(rng, 9)
    edges = np.sort(np.float32(rng.uniform(-0.2, 1.2, 14)))
    expected = _blurred_mass(np.float64(t), np.float64(w), half_width, np.float64(edges))
    np.testing.assert_allclose(self.blur(t, w, half_width, edges), expected, atol=1e-5)

  def test_keeps_the_mass_and_the_mean(self):
    rng = np.random.default_rng(1)
    t, w = _histogram(rng, 9, (4,))
    edges = np.broadcast_to(np.float32(np.linspace(-0.5, 1.5, 401)), (4, 401))
    out = np.asarray(self.blur(t, w, 0.03, edges), np.float64)
    np.testing.assert_allclose(out.sum(-1), 1, rtol=1e-5)
    mean = np.sum(w * (t[:, 1:] + t[:, :-1]) / 2, -1)
    np.testing.assert_allclose(
      np.sum(out * (edges[:, 1:] + edges[:, :-1]) / 2, -1), mean, rtol=1e-4
    )

  def test_golden_bin_that_becomes_a_triangle(self):
    # A bin as wide as the box: a triangle from -1 to 1 around it, an eighth beyond each half.
    out = self.blur(jnp.array([1.5, 2.5]), jnp.ones(1), 0.5, jnp.array([0.5, 1, 1.5, 2, 2.5, 9]))
    np.testing.assert_allclose(out, [0, 1 / 8, 3 / 8, 3 / 8, 1 / 8], atol=1e-6)

  def test_bins_of_zero_width_become_the_box(self):
    out = self.blur(jnp.array([0.4, 0.4]), jnp.ones(1), 0.1, jnp.array([0.0, 0.35, 0.4, 0.6]))
    np.testing.assert_allclose(out, [0.25, 0.25, 0.5], rtol=1e-5)

  def test_is_exactly_zero_out_of_reach(self):
    # Rounding would be divided by the envelope's weight there.
    rng = np.random.default_rng(2)
    t, w = _histogram(rng, 32)
    t = np.float32(0.5 + 1e-3 * t)
    edges = np.concatenate([np.linspace(0, 0.49, 30), np.linspace(0.52, 1, 30)])
    out = self.blur(t, w, 0.003, np.float32(edges))
    assert np.all(np.delete(np.asarray(out), 29) == 0)
    np.testing.assert_allclose(out[29], 1, rtol=1e-6)

  def test_moves_smoothly(self):
    """A thin bin that crosses an edge is split smoothly by the blur; a histogram would jump."""
    edges = jnp.array([0.0, 0.5, 1.0])
    shares = []
    for x in np.linspace(0.44, 0.56, 61):
      t = jnp.float32([x - 1e-4, x + 1e-4])
      shares.append(float(self.blur(t, jnp.ones(1), 0.03, edges)[1]))
    assert shares[0] == 0
    np.testing.assert_allclose(shares[-1], 1, rtol=1e-6)
    assert np.max(np.diff(shares)) < 0.002 / 0.06 + 1e-3

  def test_loss_matches_a_loop(self):
    rng = np.random.default_rng(3)
    t, w = _histogram(rng, 8)
    t_env, w_env = _histogram(rng, 12)
    blurred = _blurred_mass(np.float64(t), np.float64(w), 0.03, np.float64(t_env))
    expected = [max(0, b - e) ** 2 / (e + 1e-5) for b, e in zip(blurred, w_env)]
    out = stepfun.lossfun_blur(t, w, t_env, w_env, 0.03)
    assert np.max(expected) > 0.01
    np.testing.assert_allclose(out, expected, rtol=1e-2, atol=1e-4)

  def test_a_covering_envelope_has_no_loss(self):
    rng = np.random.default_rng(4)
    t, w = _histogram(rng, 8)
    edges = jnp.linspace(0, 1, 30)
    covering = self.blur(t, w, 0.03, edges) + 1e-6
    np.testing.assert_array_equal(stepfun.lossfun_blur(t, w, edges, covering, 0.03), 0)

  def test_finite(self):
    def loss(t, w, t_env, w_env):
      return stepfun.lossfun_blur(t, w, t_env, w_env, 0.003)

    t, w = PAIRS
    assert_finite(loss, t, w, t[::-1], w[::-1])
