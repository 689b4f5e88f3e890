"""Normals of a trained field, for pictures: against the gradient of its density.

Computed only where asked for (Config.vis_normals), never in training. `n` is the number of the last
level's intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .. import configs, models, structs

Array = jax.Array


def make_normals(settings: configs.Settings) -> Callable:
  """`normals(params, rays, history) -> [..., 3]`, what a pixel shows of the surfaces' directions.

  `history` is the last level's. Each interval has the unit vector in which its density falls
  fastest, in world axes, for its Gaussian moved as it is; the result is their mean by compositing
  weight, shorter than 1 where they disagree or little is seen. Computed in float32: bfloat16
  leaves little of differences at the encoding's highest frequencies.
  """
  exact = dataclasses.replace(settings.model, mlp_dtype='float32', use_gpu_kernels=False)
  model = models.build(dataclasses.replace(settings, model=exact))

  def normals(params, rays: structs.Rays, history: structs.RayHistory) -> Array:
    def total_density(shift):
      density = model.apply({'params': params}, rays, history.tdist, shift, method='last_density')
      return jnp.sum(density)  # Each interval's depends on its own shift alone.

    weights = history.weights[..., None]  # [..., n, 1]
    gradient = jax.grad(total_density)(jnp.zeros((*history.weights.shape, 3), weights.dtype))
    # Scaled first: squares of a gradient far away would underflow.
    largest = jnp.max(jnp.abs(gradient), -1, keepdims=True)
    scaled = gradient / jnp.where(largest > 0, largest, 1)
    length = jnp.linalg.norm(scaled, axis=-1, keepdims=True)
    return jnp.sum(weights * -scaled / jnp.where(length > 0, length, 1), -2)

  return normals
