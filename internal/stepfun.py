"""Histograms along a ray.

`t` [..., n + 1] are ascending endpoints of bins, `w` [..., n] the weights of the bins; a second
histogram, the envelope, is `t_env` [..., m + 1], `w_env` [..., m]. A bin of no width has density
zero.
"""

import jax
import jax.numpy as jnp

from . import math

Array = jax.Array


def weight_to_density(t: Array, w: Array) -> Array:
  """Weight over width, [..., n]; zero where a bin has no width."""
  width = jnp.diff(t)
  return jnp.where(width > 0, w / jnp.maximum(width, math.SMALL), 0)


def max_dilate_weights(
  t: Array,
  w: Array,
  dilation: float,
  domain: tuple[float, float] = (-jnp.inf, jnp.inf),
  renormalize: bool = False,
) -> tuple[Array, Array]:
  """Widens a histogram: its density becomes the maximum over +- `dilation` (section 3.1's text).

  Args:
    t: [..., n + 1] endpoints.
    w: [..., n] weights.
    dilation: half-width of the maximum filter, in the units of t.
    domain: endpoints are clipped to it.
    renormalize: scale the result to sum to one.

  Returns:
    Endpoints [..., 3 n + 1] of 3 n bins, and their weights [..., 3 n].
  """
  density = weight_to_density(t, w)
  start, stop = t[..., :-1] - dilation, t[..., 1:] + dilation
  edges = jnp.sort(jnp.concatenate([start, t, stop], -1), -1)  # [..., 3 n + 1]
  edges = jnp.clip(edges, *domain)
  cover = math.by_platform(_highest_by_mask, _highest_by_search)
  dilated = cover(density, start, stop, edges[..., :-1])
  weights = dilated * jnp.diff(edges)
  if renormalize:
    weights /= jnp.maximum(jnp.sum(weights, -1, keepdims=True), math.SMALL)
  return edges, weights


def _highest_by_mask(value: Array, start: Array, stop: Array, x: Array) -> Array:
  """The highest value among the intervals [start, stop) that hold x; zero where none does.

  Args:
    value: [..., n], not negative.
    start, stop: [..., n], each ascending.
    x: [..., m].
  """
  holds = (start[..., None, :] <= x[..., :, None]) & (stop[..., None, :] > x[..., :, None])
  return jnp.max(jnp.where(holds, value[..., None, :], 0), -1)


def _highest_by_search(value: Array, start: Array, stop: Array, x: Array) -> Array:
  """The same by lookups: such intervals stand in a row, whose maximum two overlapping spans give.

  The spans' lengths are powers of two; their maxima are tabled for each length and first one.
  """
  n = value.shape[-1]
  first, after = math.num_below(stop, x), math.num_below(start, x)
  table, length = [value], 1
  while 2 * length <= n:
    shifted = jnp.concatenate([table[-1][..., length:], table[-1][..., -length:]], -1)
    table.append(jnp.maximum(table[-1], shifted))  # What the last ones hold is never asked for.
    length *= 2
  table = jnp.concatenate(table, -1)
  held = after - first
  level = 31 - jax.lax.clz(jnp.maximum(held, 1))
  last = jnp.maximum(after - (1 << level), 0)
  one, other = (math.pick(table, level * n + jnp.minimum(i, n - 1)) for i in (first, last))
  return jnp.where(held > 0, jnp.maximum(one, other), 0)


def blur_weights(w: Array) -> Array:
  """Widens weights [..., n] by a bin (arXiv:2103.13415, its filter before resampling).

  Each is the mean of the greater of it and its left neighbour and of it and its right one.
  """
  padded = jnp.concatenate([w[..., :1], w, w[..., -1:]], -1)
  greater = jnp.maximum(padded[..., :-1], padded[..., 1:])
  return (greater[..., :-1] + greater[..., 1:]) / 2


def integrate_weights(w: Array) -> Array:
  """The CDF [..., n + 1] at the endpoints of weights that sum to one: from 0 to exactly 1."""
  cdf = jnp.minimum(1, jnp.cumsum(w[..., :-1], -1))
  ends = (*w.shape[:-1], 1)
  return jnp.concatenate([jnp.zeros(ends, w.dtype), cdf, jnp.ones(ends, w.dtype)], -1)


def anneal_logits(t: Array, w: Array, exponent: float | Array, padding: float = 0.0) -> Array:
  """Logits of w^exponent (Eq. 18's annealing), -inf for bins without width.

  Weights are held at float32's smallest: a ray without any weight is sampled uniformly over its
  bins rather than not at all.
  """
  logits = exponent * math.safe_log(w + padding)
  return jnp.where(jnp.diff(t) > 0, logits, -jnp.inf)


def sample(
  key: Array | None, t: Array, w_logits: Array, num_samples: int, single_jitter: bool = False
) -> Array:
  """Draws stratified points from a histogram by inverting its piecewise-linear CDF.

  Args:
    key: PRNG key, or [...] keys, one for each histogram; None for the middle of each stratum.
    t: [..., n + 1] endpoints.
    w_logits: [..., n] logits of the bins' weights.
    num_samples: number of points.
    single_jitter: one offset for all strata of a ray rather than one each.

  Returns:
    [..., num_samples] ascending points.
  """
  batch = t.shape[:-1]
  if key is None:
    jitter = jnp.full((*batch, 1), 0.5, t.dtype)
  else:
    shape = (*batch, 1 if single_jitter else num_samples)
    jitter = math.draw(jax.random.uniform, key, shape, t.dtype)
  strata = jnp.arange(num_samples, dtype=t.dtype).reshape((1,) * len(batch) + (-1,))
  u = jnp.minimum((strata + jitter) / num_samples, 1 - math.EPS)
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
  """Draws intervals from a histogram: the midpoints between stratified points are endpoints.

  The two outermost endpoints are the reflections of their neighbours about the outermost points,
  clipped to the domain.

  Args:
    key: PRNG key, or [...] keys, one for each histogram; None for deterministic samples.
    t: [..., n + 1] endpoints.
    w_logits: [..., n] logits of the bins' weights.
    num_samples: number of intervals, at least 2.
    single_jitter: one offset for all samples of a ray.
    domain: bounds of the new endpoints.

  Returns:
    [..., num_samples + 1] ascending endpoints.

  Raises:
    ValueError: fewer than 2 samples.
  """
  if num_samples < 2:
    raise ValueError(f'num_samples must be at least 2, got {num_samples}.')
  centers = sample(key, t, w_logits, num_samples, single_jitter)
  middle = (centers[..., 1:] + centers[..., :-1]) / 2
  first = 2 * centers[..., :1] - middle[..., :1]
  last = 2 * centers[..., -1:] - middle[..., -1:]
  return jnp.clip(jnp.concatenate([first, middle, last], -1), *domain)


def outer_bound(t: Array, t_env: Array, w_env: Array) -> Array:
  """The sum of envelope weights whose bins touch each bin of t: `bound` of Eq. 13.

  Bins are closed: one that meets another in a single point touches it.

  Args:
    t: [..., n + 1] endpoints of the bins to bound.
    t_env: [..., m + 1] endpoints of the envelope.
    w_env: [..., m] weights of the envelope.

  Returns:
    [..., n]
  """
  touches = (t_env[..., None, :-1] <= t[..., 1:, None]) & (
    t_env[..., None, 1:] >= t[..., :-1, None]
  )
  return jnp.sum(jnp.where(touches, w_env[..., None, :], 0), -1)


def lossfun_outer(t: Array, w: Array, t_env: Array, w_env: Array) -> Array:
  """How far each weight exceeds the envelope's bound (Eq. 13), [..., n].

  Args:
    t: [..., n + 1], w: [..., n], the histogram that should lie under the envelope.
    t_env: [..., m + 1], w_env: [..., m], the envelope.
  """
  excess = jnp.maximum(0, w - outer_bound(t, t_env, w_env))
  return excess**2 / (w + math.EPS)


def blur_resample(t: Array, w: Array, half_width: float, t_new: Array) -> Array:
  """Weights of a blurred histogram in other bins (arXiv:2304.06706, on z-aliasing).

  The density is convolved with a box, which makes it piecewise linear, and integrated exactly over
  each new bin; what is blurred beyond the new bins is lost.

  Args:
    t: [..., n + 1], w: [..., n], the histogram.
    half_width: of the box, in units of t; more than zero.
    t_new: [..., m + 1] endpoints of the new bins.

  Returns:
    [..., m]
  """
  # A bin convolved with the box is a trapezoid: flat over +- (wide - narrow), then down to zero at
  # +- (wide + narrow). Its mass beyond |x| has a closed form without differences of large numbers.
  half = jnp.diff(t)[..., :, None] / 2  # [..., n, 1]
  wide, narrow = jnp.maximum(half, half_width), jnp.minimum(half, half_width)
  x = t_new[..., None, :] - ((t[..., 1:] + t[..., :-1]) / 2)[..., :, None]  # [..., n, m + 1]
  on_slope = jnp.clip(wide + narrow - jnp.abs(x), 0, 2 * narrow)
  on_top = jnp.maximum(wide - narrow - jnp.abs(x), 0)
  beyond = (on_slope * (on_slope / jnp.maximum(4 * narrow, math.SMALL)) + on_top) / (2 * wide)
  cdf = jnp.where(x > 0, 1 - beyond, beyond)
  return jnp.sum(w[..., :, None] * jnp.diff(cdf), -2)


def lossfun_blur(t: Array, w: Array, t_env: Array, w_env: Array, half_width: float) -> Array:
  """How far a blurred histogram exceeds the envelope, by its bin (arXiv:2304.06706, on z-aliasing).

  Unlike `lossfun_outer` it changes smoothly as bins move along the ray.

  Args:
    t: [..., n + 1], w: [..., n], the histogram that should lie under the envelope.
    t_env: [..., m + 1], w_env: [..., m], the envelope.
    half_width: of the blur, in units of t.

  Returns:
    [..., m]
  """
  excess = jnp.maximum(0, blur_resample(t, w, half_width, t_env) - w_env)
  return excess**2 / (w_env + 1e-5)  # Bins of no weight would otherwise outweigh all others.


def lossfun_distortion(t: Array, w: Array) -> Array:
  """The expected distance between two points drawn from the histogram (Eq. 15), [...].

  Exact: the double integral of |u - v| over pairs of bins, and over each bin with itself.
  """
  middle = (t[..., 1:] + t[..., :-1]) / 2
  apart = jnp.abs(middle[..., :, None] - middle[..., None, :])
  between = jnp.sum(w * jnp.sum(w[..., None, :] * apart, -1), -1)
  within = jnp.sum(w**2 * jnp.diff(t), -1) / 3
  return between + within


def weighted_percentile(t: Array, w: Array, ps) -> Array:
  """Percentiles of histograms whose weights sum to one.

  Args:
    t: [..., n + 1], w: [..., n].
    ps: k percentiles, in percent.

  Returns:
    [..., k]
  """
  x = jnp.asarray(ps, t.dtype) / 100
  x = jnp.broadcast_to(x.reshape((1,) * (t.ndim - 1) + (-1,)), (*t.shape[:-1], x.size))
  return math.sorted_interp(x, integrate_weights(w), t)
