"""Histograms (step functions) along a ray: sampling, dilation, and losses between histograms.

Notation: `t` [..., n + 1] ascending endpoints of n bins and `w` [..., n] their weights, not
negative. A second histogram, the envelope, is `t_env` [..., m + 1] and `w_env` [..., m]. The
density of a bin is its weight over its width; the density of a bin of width 0 is 0. Weights whose
number does not fit the endpoints are a ValueError in every function.
"""

import jax
import jax.numpy as jnp

from . import math

Array = jax.Array


def _check_bins(t: Array, w: Array) -> None:
  """Raises a ValueError unless t has one value more than w."""
  if jnp.shape(t)[-1] != jnp.shape(w)[-1] + 1:
    raise ValueError(
      f'A histogram of n weights has n + 1 endpoints, got {jnp.shape(w)[-1]} weights or logits and '
      f'{jnp.shape(t)[-1]} endpoints.'
    )


def weight_to_density(t: Array, w: Array) -> Array:
  """Returns the density w / diff(t) of each bin, [..., n]; 0 for bins of width 0."""
  _check_bins(t, w)
  width = jnp.diff(t)
  return jnp.where(width > 0, w / jnp.maximum(width, math.SMALL), 0)


def max_dilate_weights(
  t: Array,
  w: Array,
  dilation: float,
  domain: tuple[float, float] = (-jnp.inf, jnp.inf),
  renormalize: bool = False,
) -> tuple[Array, Array]:
  """Dilates a histogram by a max filter on its density (arXiv:2111.12077, section 3.1).

  The density at x becomes the maximum over [x - dilation, x + dilation].

  Args:
    t: [..., n + 1] ascending endpoints.
    w: [..., n] weights.
    dilation: half-width of the filter, in the units of t.
    domain: (low, high) that the new endpoints are clipped to.
    renormalize: whether the new weights are scaled to sum to 1.

  Returns:
    (endpoints [..., 3 n + 1], weights [..., 3 n]) of the dilated histogram.
  """
  density = weight_to_density(t, w)
  start, stop = t[..., :-1] - dilation, t[..., 1:] + dilation
  edges = jnp.sort(jnp.concatenate([start, t, stop], -1), -1)  # [..., 3 n + 1]
  edges = jnp.clip(edges, *domain)
  cover = math.by_platform(_highest_by_mask, _highest_by_search)
  dilated = cover(density, start, stop, edges[..., :-1])  # [..., 3 n], constant on each bin.
  weights = dilated * jnp.diff(edges)
  if renormalize:
    weights /= jnp.maximum(jnp.sum(weights, -1, keepdims=True), math.SMALL)
  return edges, weights


def _highest_by_mask(value: Array, start: Array, stop: Array, x: Array) -> Array:
  """Returns the maximum value among the intervals [start, stop) that contain x; 0 if none does.

  Args:
    value: [..., n] values, not negative.
    start, stop: [..., n] ends of the intervals, each ascending.
    x: [..., m] query points.

  Returns:
    [..., m]
  """
  # [..., m, n]
  holds = (start[..., None, :] <= x[..., :, None]) & (stop[..., None, :] > x[..., :, None])
  return jnp.max(jnp.where(holds, value[..., None, :], 0), -1)


def _highest_by_search(value: Array, start: Array, stop: Array, x: Array) -> Array:
  """Computes `_highest_by_mask` with a sparse table of range maxima instead of all pairs.

  The intervals that contain x are consecutive. The maximum of any range is the larger of two
  tabulated ones: of the power-of-two spans that begin and end with the range.
  """
  n = value.shape[-1]
  first, after = math.num_below(stop, x), math.num_below(start, x)  # Range [first, after).
  table, length = [value], 1
  while 2 * length <= n:
    shifted = jnp.concatenate([table[-1][..., length:], table[-1][..., -length:]], -1)
    table.append(jnp.maximum(table[-1], shifted))  # Spans past the end are wrong and never read.
    length *= 2
  table = jnp.concatenate(table, -1)  # [..., levels * n]
  held = after - first
  level = 31 - jax.lax.clz(jnp.maximum(held, 1))  # floor(log2(held))
  last = jnp.maximum(after - (1 << level), 0)
  one, other = (math.pick(table, level * n + jnp.minimum(i, n - 1)) for i in (first, last))
  return jnp.where(held > 0, jnp.maximum(one, other), 0)


def blur_weights(w: Array) -> Array:
  """Blurs weights with a 2-tap max filter, then a 2-tap mean (mip-NeRF, arXiv:2103.13415).

  Args:
    w: [..., n] weights.

  Returns:
    [..., n]: (max(w[i - 1], w[i]) + max(w[i], w[i + 1])) / 2, with the ends repeated.
  """
  padded = jnp.concatenate([w[..., :1], w, w[..., -1:]], -1)  # [..., n + 2]
  greater = jnp.maximum(padded[..., :-1], padded[..., 1:])  # [..., n + 1]
  return (greater[..., :-1] + greater[..., 1:]) / 2


def integrate_weights(w: Array) -> Array:
  """Integrates weights to the CDF at the endpoints of the bins.

  Args:
    w: [..., n] weights that sum to 1.

  Returns:
    [..., n + 1] ascending, from exactly 0 to exactly 1.
  """
  # The last value is set, not summed: rounding must not leave the CDF short of 1.
  cdf = jnp.minimum(1, jnp.cumsum(w[..., :-1], -1))  # [..., n - 1]
  ends = (*w.shape[:-1], 1)
  return jnp.concatenate([jnp.zeros(ends, w.dtype), cdf, jnp.ones(ends, w.dtype)], -1)


def anneal_logits(t: Array, w: Array, exponent: float | Array, padding: float = 0.0) -> Array:
  """Computes the logits of annealed weights, w^exponent (Eq. 18 of arXiv:2111.12077).

  Args:
    t: [..., n + 1] endpoints.
    w: [..., n] weights.
    exponent: 0 flattens the histogram, 1 keeps it.
    padding: added to each weight first.

  Returns:
    [..., n] logits; the lowest finite number for bins of width 0.
  """
  _check_bins(t, w)
  # `safe_log` is finite at 0, so a ray whose weights are all 0 is sampled uniformly over its bins.
  logits = exponent * math.safe_log(w + padding)
  # Not -inf: if all bins have width 0, the softmax would be NaN.
  return jnp.where(jnp.diff(t) > 0, logits, jnp.finfo(logits.dtype).min)


def sample(
  key: Array | None, t: Array, w_logits: Array, num_samples: int, single_jitter: bool = False
) -> Array:
  """Draws stratified samples from a histogram by inverting its piecewise-linear CDF.

  Args:
    key: PRNG key, or [...] keys, one for each histogram; None takes the middle of each stratum.
    t: [..., n + 1] endpoints.
    w_logits: [..., n] logits of the weights; their softmax is the histogram.
    num_samples: number of points.
    single_jitter: whether all strata of a ray share one offset.

  Returns:
    [..., num_samples] ascending points; NaN where logits of several bins are NaN.
  """
  _check_bins(t, w_logits)
  batch = t.shape[:-1]
  if key is None:
    jitter = jnp.full((*batch, 1), 0.5, t.dtype)
  else:
    shape = (*batch, 1 if single_jitter else num_samples)
    jitter = math.draw(jax.random.uniform, key, shape, t.dtype)
  strata = jnp.arange(num_samples, dtype=t.dtype).reshape((1,) * len(batch) + (-1,))
  u = jnp.minimum((strata + jitter) / num_samples, 1 - math.EPS)  # [..., num_samples]
  cdf = integrate_weights(jax.nn.softmax(w_logits, -1))
  return math.sorted_interp(u, cdf, t)


def sample_intervals(
  key: Array | None,
  t: Array,
  w_logits: Array,
  num_samples: int,
  single_jitter: bool = False,
  domain: tuple[float, float] = (-jnp.inf, jnp.inf),
) -> Array:
  """Draws intervals whose endpoints are the midpoints between stratified samples of a histogram.

  The first and last endpoint are the neighbouring ones reflected about the outermost samples.

  Args:
    key: PRNG key, or [...] keys, one for each histogram; None is deterministic (stratum centres).
    t: [..., n + 1] endpoints.
    w_logits: [..., n] logits of the weights; their softmax is the histogram.
    num_samples: number of intervals, at least 2.
    single_jitter: whether all strata of a ray share one offset.
    domain: (low, high) that the endpoints are clipped to.

  Returns:
    [..., num_samples + 1] ascending endpoints; NaN where logits of several bins are NaN.

  Raises:
    ValueError: num_samples is below 2, or there are not n logits.
  """
  if num_samples < 2:
    raise ValueError(f'num_samples must be at least 2, got {num_samples}.')
  centers = sample(key, t, w_logits, num_samples, single_jitter)
  middle = (centers[..., 1:] + centers[..., :-1]) / 2  # [..., num_samples - 1]
  first = 2 * centers[..., :1] - middle[..., :1]
  last = 2 * centers[..., -1:] - middle[..., -1:]
  return jnp.clip(jnp.concatenate([first, middle, last], -1), *domain)


def outer_bound(t: Array, t_env: Array, w_env: Array) -> Array:
  """Sums the envelope's weights over all bins that overlap each bin of t.

  This is `bound` in Eq. 13 of arXiv:2111.12077. Bins are closed: bins that share only an endpoint
  overlap.

  Args:
    t: [..., n + 1] endpoints of the bins to bound.
    t_env: [..., m + 1] endpoints of the envelope.
    w_env: [..., m] weights of the envelope.

  Returns:
    [..., n] upper bounds on the weights of the bins.
  """
  _check_bins(t_env, w_env)
  # [..., n, m]
  touches = (t_env[..., None, :-1] <= t[..., 1:, None]) & (
    t_env[..., None, 1:] >= t[..., :-1, None]
  )
  return jnp.sum(jnp.where(touches, w_env[..., None, :], 0), -1)


def lossfun_outer(t: Array, w: Array, t_env: Array, w_env: Array) -> Array:
  """Computes the proposal loss of each bin (Eq. 13 of arXiv:2111.12077).

  max(0, w - bound)^2 / w. It is 0 for an envelope that could be a coarser version of (t, w).

  Args:
    t, w: [..., n + 1] endpoints and [..., n] weights of the histogram to be bounded.
    t_env, w_env: [..., m + 1] endpoints and [..., m] weights of the envelope.

  Returns:
    [..., n] loss of each bin. Eq. 13 is their sum.
  """
  _check_bins(t, w)
  excess = jnp.maximum(0, w - outer_bound(t, t_env, w_env))
  return excess**2 / (w + math.EPS)


def blur_resample(t: Array, w: Array, half_width: float, t_new: Array) -> Array:
  """Blurs a histogram with a box filter and resamples it to other bins (arXiv:2304.06706).

  The blurred density is piecewise linear and is integrated exactly over each new bin. Mass outside
  the new bins is dropped. Zip-NeRF uses this against z-aliasing.

  Args:
    t: [..., n + 1] endpoints.
    w: [..., n] weights.
    half_width: half-width of the box in units of t, positive.
    t_new: [..., m + 1] ascending endpoints of the new bins.

  Returns:
    [..., m] weights of the new bins.
  """
  _check_bins(t, w)
  # A bin convolved with the box is a trapezoid: constant within wide - narrow of its centre, 0
  # beyond wide + narrow. This form of its mass beyond |x| subtracts no large numbers.
  half = jnp.diff(t)[..., :, None] / 2  # [..., n, 1]
  wide, narrow = jnp.maximum(half, half_width), jnp.minimum(half, half_width)
  x = t_new[..., None, :] - ((t[..., 1:] + t[..., :-1]) / 2)[..., :, None]  # [..., n, m + 1]
  on_slope = jnp.clip(wide + narrow - jnp.abs(x), 0, 2 * narrow)
  on_top = jnp.maximum(wide - narrow - jnp.abs(x), 0)
  beyond = (on_slope * (on_slope / jnp.maximum(4 * narrow, math.SMALL)) + on_top) / (2 * wide)
  cdf = jnp.where(x > 0, 1 - beyond, beyond)  # [..., n, m + 1]
  return jnp.sum(w[..., :, None] * jnp.diff(cdf), -2)  # [..., m]


def lossfun_blur(t: Array, w: Array, t_env: Array, w_env: Array, half_width: float) -> Array:
  """Computes the anti-aliased proposal loss of each envelope bin (arXiv:2304.06706).

  max(0, blurred - w_env)^2 / w_env, with `blurred` from `blur_resample`. Unlike `lossfun_outer` it
  is smooth as bins move along the ray.

  Args:
    t, w: [..., n + 1] endpoints and [..., n] weights of the histogram to be bounded.
    t_env, w_env: [..., m + 1] endpoints and [..., m] weights of the envelope.
    half_width: half-width of the blur in units of t, positive.

  Returns:
    [..., m] loss of each envelope bin.
  """
  _check_bins(t_env, w_env)
  excess = jnp.maximum(0, blur_resample(t, w, half_width, t_env) - w_env)
  return excess**2 / (w_env + 1e-5)  # Without 1e-5, empty bins would dominate the loss.


def lossfun_distortion(t: Array, w: Array) -> Array:
  """Computes the distortion loss: the weighted distance between all pairs of points on a ray.

  The exact integral of w(u) w(v) |u - v| over u and v (Eq. 14 and 15 of arXiv:2111.12077).

  Args:
    t: [..., n + 1] endpoints, usually in normalised distance.
    w: [..., n] weights.

  Returns:
    [...] loss of each ray.
  """
  _check_bins(t, w)
  middle = (t[..., 1:] + t[..., :-1]) / 2
  distance = jnp.abs(middle[..., :, None] - middle[..., None, :])  # [..., n, n]
  between = jnp.sum(w * jnp.sum(w[..., None, :] * distance, -1), -1)
  within = jnp.sum(w**2 * jnp.diff(t), -1) / 3  # Mean distance in a bin: a third of its width.
  return between + within


def weighted_percentile(t: Array, w: Array, ps) -> Array:
  """Computes percentiles of histograms.

  Args:
    t: [..., n + 1] endpoints.
    w: [..., n] weights that sum to 1.
    ps: [k] percentiles in [0, 100].

  Returns:
    [..., k] distances at which the CDF reaches each percentile; NaN where weights are NaN.
  """
  _check_bins(t, w)
  x = jnp.asarray(ps, t.dtype) / 100
  x = jnp.broadcast_to(x.reshape((1,) * (t.ndim - 1) + (-1,)), (*t.shape[:-1], x.size))
  return math.sorted_interp(x, integrate_weights(w), t)
