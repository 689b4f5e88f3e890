"""Loss terms, computed from a step's renderings, ray histories and batch.

The functions return terms without their multipliers; `total` applies these. Shapes: [...] are rays,
n the intervals along a ray.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import configs, coord, math, plugins, stepfun, structs
from .errors import UserError

Array = jax.Array


def squared_error(rgb: Array, target: Array, weight: Array | None = None) -> Array:
  """Computes the mean squared error over rays and channels.

  Args:
    rgb: [..., 3] rendered colours.
    target: [..., 3] pixel colours.
    weight: [...] factor on each ray's error, or None.
  """
  return _weighted_mean((rgb - target) ** 2, weight)


def charbonnier(rgb: Array, target: Array, padding: float, weight: Array | None = None) -> Array:
  """Computes the mean of sqrt(r^2 + padding^2) over residuals r (section 4; args as above).

  Unlike the squared error it is robust to outliers; unlike |r| it is smooth at zero.
  """
  return _weighted_mean(jnp.sqrt((rgb - target) ** 2 + padding**2), weight)


def _weighted_mean(terms: Array, weight: Array | None) -> Array:
  # The mean counts masked rays (weight 0) too: the gradient of the others stays the same.
  return jnp.mean(terms if weight is None else weight[..., None] * terms)


def interlevel(history: Sequence[structs.RayHistory]) -> Array:
  """Computes the interlevel loss (Eq. 13): proposals must bound the last level's histogram.

  It is the mean over intervals and rays, summed over proposal levels, and trains only the proposal
  MLPs.
  """
  # [..., n + 1], [..., n]; without gradients, so that the last level is not fitted to proposals.
  t = jax.lax.stop_gradient(history[-1].sdist)
  w = jax.lax.stop_gradient(history[-1].weights)
  losses = [jnp.mean(stepfun.lossfun_outer(t, w, h.sdist, h.weights)) for h in history[:-1]]
  return sum(losses, jnp.zeros(()))  # Zero if there is a single level.


def interlevel_blur(history: Sequence[structs.RayHistory], half_widths: Sequence[float]) -> Array:
  """Computes Zip-NeRF's interlevel loss, against a blurred histogram (arXiv:2304.06706).

  It is the sum over intervals, averaged over rays and summed over proposal levels, and trains only
  the proposal MLPs. Unlike Eq. 13 it is smooth as surfaces move along the ray (z-aliasing).

  Args:
    history: all levels, the last one last.
    half_widths: half-width of the blur in s, for each proposal level.

  Raises:
    UserError: the number of half-widths is not the number of proposal levels.
  """
  if len(half_widths) != len(history) - 1:
    raise UserError(
      f'Config.interlevel_blur must have one half-width per proposal level, got '
      f'{tuple(half_widths)} for {len(history) - 1} (Model.num_levels - 1).'
    )
  t = jax.lax.stop_gradient(history[-1].sdist)
  w = jax.lax.stop_gradient(history[-1].weights)
  losses = [
    jnp.mean(jnp.sum(stepfun.lossfun_blur(t, w, h.sdist, h.weights, r), -1))  # [..., n] to []
    for h, r in zip(history, half_widths)
  ]
  return sum(losses, jnp.zeros(()))


def distortion(
  history: Sequence[structs.RayHistory], power: Sequence[float] | None = None
) -> Array:
  """Computes the distortion loss of the last level (Eq. 15), averaged over rays.

  Args:
    history: all levels, the last one last.
    power: (lambda, scale) of the `coord.power_ladder` of metric distances, on which the loss is
      computed as in arXiv:2304.06706; None for normalised distances.
  """
  last = history[-1]
  t = last.sdist if power is None else coord.power_ladder(*power)[0](last.tdist)
  return jnp.mean(stepfun.lossfun_distortion(t, last.weights))


def depth(history: Sequence[structs.RayHistory], distance: Array, certainty: Array) -> Array:
  """Computes the mean distance in s from known points to the last level's weights.

  For a ray that sees a point at s', the integral of w(s) |s - s'|, where light that passes all
  intervals counts as weight at s = 1. It is linear in |s - s'|, so that wrong points pull no
  harder than others, and 0 for a surface at the point.

  Args:
    history: all levels, the last one last.
    distance: [...] metric distance t of each ray's point.
    certainty: [...] factor on each ray's term, 0 for rays without a point.

  Returns:
    The mean over all rays.
  """
  last = history[-1]
  a, b = last.sdist[..., :-1], last.sdist[..., 1:]
  s = math.sorted_interp(distance[..., None], last.tdist, last.sdist)  # [..., 1]
  inside = jnp.clip(s, a, b)
  within = ((inside - a) ** 2 + (b - inside) ** 2) / (2 * jnp.maximum(b - a, math.SMALL))
  gap = within + jnp.abs(s - inside)  # Mean of |u - s| over an interval, [..., n].
  passed = jnp.maximum(0, 1 - jnp.sum(last.weights, -1))
  per_ray = jnp.sum(last.weights * gap, -1) + passed * (1 - s[..., 0])
  return jnp.mean(certainty * per_ray)


def weight_decay(params, mults: dict[str, float]) -> Array:
  """Computes the weighted sum of squared norms of parts of the parameters.

  Args:
    params: nested dict of parameters.
    mults: multiplier for each part, named by its path: 'nerf_mlp', 'prop_mlp/trunk_0'.

  Raises:
    UserError: the parameters have no part of that name.
  """
  total_decay = jnp.zeros(())
  for name, mult in mults.items():
    part = params
    for piece in name.split('/'):  # Walk down the nested dict.
      if not isinstance(part, dict) or piece not in part:
        known = ', '.join(part) if isinstance(part, dict) else 'nothing below'
        raise UserError(
          f'Config.weight_decay_mults names an unknown part {name!r}; known here: {known}.'
        )
      part = part[piece]
    total_decay += mult * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(part))
  return total_decay


def grid_decay(params, growth: float = 1.0) -> Array:
  """Computes the mean square of each hash table, summed over all levels and MLPs.

  With a sum, coarse levels would hardly count, as their tables have few entries; with the mean all
  levels count alike (normalised weight decay, arXiv:2304.06706). Dense layers are not included.

  Args:
    params: nested dict of parameters.
    growth: factor on a level's term for each coarser level below it.
  """
  # Only MLPs with encoding = 'grid' have this entry; it holds table_0 [size, f], the coarsest, ...
  fields = [part['grid'] for part in params.values() if 'grid' in part]
  total_decay = jnp.zeros(())
  for field in fields:
    for name in sorted(field):
      if name.startswith('table_'):
        mean, factor = jnp.mean(field[name] ** 2), growth ** int(name.removeprefix('table_'))
        total_decay += mean if factor == 1 else factor * mean
  return total_decay


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The inputs of every loss: one batch of rays [...] and its renderings."""

  config: configs.Config
  params: Any  # The parameters, as a nested dict.
  renderings: Sequence[structs.Rendering | None]  # For each level; None for levels without colour.
  history: Sequence[structs.RayHistory]  # For each level.
  batch: structs.Batch  # Target colours, and weights of rays.


def _photometric(inputs: Inputs, rendering: structs.Rendering) -> Array:
  config, batch = inputs.config, inputs.batch
  if config.data_loss_type == 'mse':
    return squared_error(rendering.rgb, batch.rgb, batch.weight)
  return charbonnier(rendering.rgb, batch.rgb, config.charb_padding, batch.weight)


@plugins.loss('data')
def _data(inputs: Inputs) -> Array:
  if inputs.renderings[-1] is None:
    raise UserError('Training needs colours; set NerfMLP.disable_rgb = False.')
  return _photometric(inputs, inputs.renderings[-1])


@plugins.loss('data_coarse')
def _data_coarse(inputs: Inputs) -> Array:
  if any(r is None for r in inputs.renderings):
    raise UserError(
      'Config.data_coarse_loss_mult needs colours of the proposal levels; set '
      'PropMLP.disable_rgb = False.'
    )
  # One multiplier for all proposal levels.
  return sum(_photometric(inputs, r) for r in inputs.renderings[:-1])


@plugins.loss('interlevel')
def _interlevel(inputs: Inputs) -> Array:
  every = inputs.config.interlevel_every  # The rays that train them; see `Model.__call__`.
  history = jax.tree.map(lambda x: x[every - 1 :: every], list(inputs.history))
  if inputs.config.interlevel_loss_type == 'blur':
    return interlevel_blur(history, inputs.config.interlevel_blur)
  return interlevel(history)


plugins.loss('distortion')(lambda i: distortion(i.history, i.config.distortion_power))


@plugins.loss('depth')
def _depth(inputs: Inputs) -> Array:
  batch = inputs.batch
  if batch.distance is None:
    raise UserError('Config.depth_loss_mult needs a capture with sparse points; set it to 0.')
  return depth(inputs.history, batch.distance, batch.certainty)


plugins.loss('weight_decay')(lambda i: weight_decay(i.params, i.config.weight_decay_mults))
plugins.loss('grid_decay')(lambda i: grid_decay(i.params, i.config.grid_decay_growth))


def _multipliers(config: configs.Config) -> dict[str, float]:
  """Returns the multiplier of each term to compute.

  Terms with multiplier 0 are left out: they would cost time, and their NaNs times 0 are NaN.
  """
  own = {
    'data_coarse': config.data_coarse_loss_mult,
    'interlevel': config.interlevel_loss_mult,
    'distortion': config.distortion_loss_mult,
    'depth': config.depth_loss_mult,
    'weight_decay': 1.0 if config.weight_decay_mults else 0.0,  # It has its own multipliers.
    'grid_decay': config.grid_decay_mult,
  }
  own = {name: mult for name, mult in own.items() if mult > 0}
  plugged = {name: mult for name, mult in config.loss_mults.items() if mult != 0}
  return {'data': config.data_loss_mult, **own, **plugged}


def total(
  config: configs.Config,
  params,
  renderings: Sequence[structs.Rendering | None],
  history: Sequence[structs.RayHistory],
  batch: structs.Batch,
) -> tuple[Array, dict[str, Array]]:
  """Computes the training loss and its terms, each with its multiplier applied.

  Args:
    config: loss types and multipliers; terms with multiplier 0 are not computed.
    params, renderings, history, batch: see `Inputs`.

  Returns:
    The loss, and a dict from term name to value.

  Raises:
    UserError: the data loss needs a colour that the level does not have.
    PluginError: a plugged-in loss is not a scalar.
  """
  inputs = Inputs(config, params, renderings, history, batch)
  mults = _multipliers(config).items()
  # A plug-in may return a Python number.
  terms = {name: mult * jnp.asarray(plugins.loss[name](inputs)) for name, mult in mults}
  return sum(terms.values()), terms
