"""Normals of a trained field, for pictures: the negative gradient of its density.

Computed only with Config.vis_normals, never in training. `n` is the number of intervals of the last
level.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .. import configs, models, structs

Array = jax.Array


def make_normals(settings: configs.Settings) -> Callable:
  """Makes `normals(params, rays, history, train_frac) -> [..., 3]`, pixels' normals in world axes.

  `history` is that of the last level. The normal of an interval is the unit vector of steepest
  density decrease when its Gaussian is translated. A pixel's normal is the sum of its intervals'
  normals, weighted by the compositing weights; it is shorter than 1 where these normals disagree or
  opacity is below 1. Computed in float32, since bfloat16 cannot resolve differences at the
  encoding's highest frequencies.
  """
  model = models.build(settings.change('model', mlp_dtype='float32', use_gpu_kernels=False))

  def normals(
    params, rays: structs.Rays, history: structs.RayHistory, train_frac: float | Array = 1.0
  ) -> Array:
    def total_density(shift):
      at = rays, history.tdist, shift, train_frac
      density = model.apply({'params': params}, *at, method='last_density')
      # The gradient of the sum holds those of all intervals: each depends on its own shift only.
      return jnp.sum(density)

    weights = history.weights[..., None]  # [..., n, 1]
    gradient = jax.grad(total_density)(jnp.zeros((*history.weights.shape, 3), weights.dtype))
    # Scaled first, since squares of the small gradients far away would underflow.
    largest = jnp.max(jnp.abs(gradient), -1, keepdims=True)
    scaled = gradient / jnp.where(largest > 0, largest, 1)
    length = jnp.linalg.norm(scaled, axis=-1, keepdims=True)
    return jnp.sum(weights * -scaled / jnp.where(length > 0, length, 1), -2)

  return normals
