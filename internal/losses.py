"""Loss terms on a step's renderings, ray histories and batch.

The terms are bare; their multipliers stand in `total`, in one place.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from . import configs, stepfun, structs
from .errors import UserError

Array = jax.Array


def squared_error(rgb: Array, target: Array, weight: Array | None = None) -> Array:
  """Mean of squared differences, over rays and channels, each ray's times its weight [...]."""
  return _weighted_mean((rgb - target) ** 2, weight)


def charbonnier(rgb: Array, target: Array, padding: float, weight: Array | None = None) -> Array:
  """Mean of sqrt(r^2 + padding^2): robust to outliers, smooth at zero (section 4)."""
  return _weighted_mean(jnp.sqrt((rgb - target) ** 2 + padding**2), weight)


def _weighted_mean(terms: Array, weight: Array | None) -> Array:
  return jnp.mean(terms if weight is None else weight[..., None] * terms)


def interlevel(history: Sequence[structs.RayHistory]) -> Array:
  """Keeps each proposal histogram above the final one (Eq. 13); trains the proposals only.

  Mean over bins and rays, summed over proposal levels.
  """
  t = jax.lax.stop_gradient(history[-1].sdist)
  w = jax.lax.stop_gradient(history[-1].weights)
  losses = [jnp.mean(stepfun.lossfun_outer(t, w, h.sdist, h.weights)) for h in history[:-1]]
  return sum(losses, jnp.zeros(()))


def interlevel_blur(history: Sequence[structs.RayHistory], half_widths: Sequence[float]) -> Array:
  """Keeps each proposal histogram above the blurred final one; trains the proposals only.

  Sum over bins, mean over rays, summed over proposal levels (arXiv:2304.06706, on z-aliasing).

  Args:
    history: the levels.
    half_widths: of the blur in s, for each proposal level.

  Raises:
    ValueError: not as many half-widths as proposal levels.
  """
  if len(half_widths) != len(history) - 1:
    raise UserError(
      f'Config.interlevel_blur must have a half-width for each proposal level, got '
      f'{tuple(half_widths)} for {len(history) - 1}.'
    )
  t = jax.lax.stop_gradient(history[-1].sdist)
  w = jax.lax.stop_gradient(history[-1].weights)
  losses = [
    jnp.mean(jnp.sum(stepfun.lossfun_blur(t, w, h.sdist, h.weights, r), -1))
    for h, r in zip(history, half_widths)
  ]
  return sum(losses, jnp.zeros(()))


def distortion(history: Sequence[structs.RayHistory]) -> Array:
  """Pulls the final histogram together along s (Eq. 15); mean over rays."""
  return jnp.mean(stepfun.lossfun_distortion(history[-1].sdist, history[-1].weights))


def weight_decay(params, mults: dict[str, float]) -> Array:
  """Sum over the named parts ('nerf_mlp', 'prop_mlp/trunk_0') of multiplier x squared norm.

  Raises:
    ValueError: a name that is no part of the parameters.
  """
  total_decay = jnp.zeros(())
  for name, mult in mults.items():
    part = params
    for piece in name.split('/'):
      if not isinstance(part, dict) or piece not in part:
        known = ', '.join(part) if isinstance(part, dict) else 'nothing below'
        raise UserError(f'Config.weight_decay_mults names {name!r}; known here: {known}.')
      part = part[piece]
    total_decay += mult * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(part))
  return total_decay


def grid_decay(params) -> Array:
  """Mean square of a table's entries, summed over the levels of all fields' grids.

  The mean presses on coarse levels, whose entries are few, as hard as on fine ones, where a sum
  would leave them free (arXiv:2304.06706, normalised weight decay). Dense layers do not count.
  """
  fields = [part['grid'] for part in params.values() if 'grid' in part]
  return sum((jnp.mean(x**2) for x in jax.tree.leaves(fields)), jnp.zeros(()))


def total(
  config: configs.Config,
  params,
  renderings: Sequence[structs.Rendering | None],
  history: Sequence[structs.RayHistory],
  batch: structs.Batch,
) -> tuple[Array, dict[str, Array]]:
  """The training loss and its terms, each times its multiplier.

  Raises:
    ValueError: the last level has no colour, or proposals have none and a coarse data loss is asked
      for.
  """

  def data_loss(r: structs.Rendering) -> Array:
    if config.data_loss_type == 'mse':
      return squared_error(r.rgb, batch.rgb, batch.weight)
    return charbonnier(r.rgb, batch.rgb, config.charb_padding, batch.weight)

  if renderings[-1] is None:
    raise UserError('Training on pictures needs NerfMLP.disable_rgb = False.')
  terms = {'data': config.data_loss_mult * data_loss(renderings[-1])}
  if config.data_coarse_loss_mult > 0:
    if any(r is None for r in renderings):
      raise UserError('Config.data_coarse_loss_mult needs PropMLP.disable_rgb = False.')
    coarse = sum(map(data_loss, renderings[:-1]))
    terms['data_coarse'] = config.data_coarse_loss_mult * coarse
  if config.interlevel_loss_mult > 0:
    if config.interlevel_loss_type == 'blur':
      between = interlevel_blur(history, config.interlevel_blur)
    else:
      between = interlevel(history)
    terms['interlevel'] = config.interlevel_loss_mult * between
  if config.distortion_loss_mult > 0:
    terms['distortion'] = config.distortion_loss_mult * distortion(history)
  if config.weight_decay_mults:
    terms['weight_decay'] = weight_decay(params, config.weight_decay_mults)
  if config.grid_decay_mult > 0:
    terms['grid_decay'] = config.grid_decay_mult * grid_decay(params)
  return sum(terms.values()), terms
