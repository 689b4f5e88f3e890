"""Weights that leave out what moves between photographs, such as people who walk through.

RobustNeRF (arXiv:2302.00833, section 3): of each patch of pixels, those count whose residual is
small, or most of whose neighbours' are. Details that are not learned yet have large residuals too,
but on few pixels next to each other.

  inlier  the residual is at most a threshold, a quantile of all residuals.
  smooth  at least half of the inliers among a pixel and its neighbours, 3 x 3 in the patch.
  vote    in the middle of a patch, half its side wide: all if 60% of the patch is smooth.

A pixel has weight 1 if it is smooth or voted for, otherwise 0. The weights have no gradient.

The threshold is a parameter: its gradient is that of the quantile's loss, the share of residuals
below it minus the quantile. So it follows the residuals over about fifty steps, is the same for
all devices and micro-batches without communication of its own, and is saved with the others.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from .. import math, structs

Array = jax.Array

PART = 'robust'  # Name in TrainState.params.
WIDTH = 1  # The threshold's log, less its start.

_START = 0.3  # Threshold at the first step, when all residuals are large.
_RATE = 0.05  # In log units per step, times at most 1.
_NEIGHBOURS, _VOTES = 0.5, 0.6  # Least shares of inliers, and of smooth pixels.


def make_optimizer() -> optax.GradientTransformation:
  """Returns the optimizer of the threshold: gradient descent, as the gradient is a share."""
  return optax.identity()


def learning_rate(step: Array) -> float:
  """Returns the same rate for all steps."""
  del step
  return _RATE


def weigh(
  params: Array, quantile: float, size: int, rgb: Array, batch: structs.Batch
) -> tuple[structs.Batch, Array]:
  """Returns the batch with the weights of its pixels, and a term that trains the threshold.

  Args:
    params: [1, 1] the threshold's parameter.
    quantile: share of the residuals that are inliers.
    size: width and height of a patch in pixels, even and at least 4.
    rgb: [rays, 3] rendered colours; patches one after the other, their pixels row by row.
    batch: the rays and their photographs' colours. Weights that it has are multiplied.

  Returns:
    The batch, and the term: always 0, with the quantile's gradient for the threshold.
  """
  square = jnp.sum(jax.lax.stop_gradient(rgb - batch.rgb) ** 2, -1)  # [rays]
  excess = 0.5 * jnp.log(jnp.maximum(square, math.TINY)) - params[0, 0] - jnp.log(_START)
  loss = jnp.mean(jnp.maximum(quantile * excess, (quantile - 1) * excess))
  weight = counts(excess <= 0, size).astype(rgb.dtype)
  if batch.weight is not None:
    weight *= batch.weight
  return batch.replace(weight=weight), loss - jax.lax.stop_gradient(loss)


def counts(inlier: Array, size: int) -> Array:
  """Returns which pixels count, bool [rays], given the inliers [rays] of whole patches."""
  inside = inlier.reshape(-1, size, size)  # [patches, size, size]
  share = _box(inside) / _box(jnp.ones((1, size, size), bool))
  smooth = share >= _NEIGHBOURS
  vote = jnp.mean(smooth, (1, 2), keepdims=True) >= _VOTES  # [patches, 1, 1]
  k = jnp.arange(size)
  middle = (k >= size // 4) & (k < size - size // 4)
  voted = vote & (middle[:, None] & middle[None, :])[None]
  return (smooth | voted).reshape(inlier.shape)


def _box(pixels: Array) -> Array:
  """Returns the sum of bool [m, h, w] over each pixel and its neighbours, float32."""
  padded = jnp.pad(pixels.astype(jnp.float32), ((0, 0), (1, 1), (1, 1)))
  rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
  return rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
