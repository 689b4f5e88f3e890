"""Exposure, white balance and vignette of the training photographs, learned with the scene.

The scene is rendered as the mean photograph would show it. In linear light, photograph i of camera
c shows the rendered colour x [3] as

  y = v_c(r) B_c diag(exp g_i) inv(B) x,    v_c(r) = exp(a_c r^2 + b_c r^4).

g_i [3] is the photograph's gain per channel. B_c [3, 3] turns the channels in which camera c
balances white into those of sRGB, and B is the mean of B_c over photographs. r is the distance from
the image's centre in half diagonals. The means over photographs of g, a and b are subtracted. So a
photograph with the mean parameters shows x itself, and no tint can move from the scene into them:
new views need no parameters. What all photographs share, such as the vignette of an only camera,
stays in the scene.

`n` is the number of training photographs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .. import configs, image, math, structs

Array = jax.Array

PART = 'exposure'  # Name in TrainState.params.
GAIN_WIDTH = 3
COLOUR_WIDTH = 3 + 9 + 2  # g; B - I; a and b. Those of a camera are its first photograph's.

_SATURATED = 1 - 0.5 / 255  # A photograph's channel that is this bright may have been brighter.
_MIN_DETERMINANT = 0.1  # Of B, which starts as the identity.


def learning_rate(config: configs.Config) -> Callable[[Array], Array]:
  """Returns the schedule: log-linear decay from the first step to the last."""
  return lambda step: math.log_lerp(
    step / config.max_steps, config.exposure_lr_init, config.exposure_lr_final
  )


def add_tables(
  config: configs.Config, cams: structs.Cameras, log_exposures: Sequence[float] | None = None
) -> structs.Cameras:
  """Returns the cameras with what `develop` needs to know of each photograph.

  Photographs with the same intrinsics and size share a camera.

  Args:
    config: nothing changes if its `exposure` is 'none'.
    cams: the n training cameras (numpy leaves).
    log_exposures: [n] logs of the photographs' exposures, with which gains start; None for zeros.
  """
  if config.exposure == 'none':
    return cams
  n = len(cams.size)
  start = np.zeros(n) if log_exposures is None else np.asarray(log_exposures)
  rows = [a.reshape(n, -1) for a in (cams.pixtocam, cams.distortion, cams.lens, cams.size)]
  _, first, group = np.unique(
    np.concatenate(rows, -1), axis=0, return_index=True, return_inverse=True
  )
  supervision = (cams.supervision or structs.Supervision()).replace(
    log_gain=np.float32(start - start.mean()),
    camera=first[group.ravel()].astype(np.int32) if config.exposure == 'gain_colour' else None,
  )
  return cams.replace(supervision=supervision)


def develop(
  cams: structs.Cameras,
  params: Array,
  renderings: Sequence[structs.Rendering | None],
  batch: structs.Batch,
) -> list[structs.Rendering | None]:
  """Returns the renderings with the colours that the batch's photographs show.

  Gains act in linear light, as exposure does. Where a photograph is saturated, brighter colours
  become 1, because it cannot tell them apart.

  Args:
    cams: the n training cameras, with the tables of `add_tables`.
    params: [at least n, GAIN_WIDTH or COLOUR_WIDTH] parameters.
    renderings: those of the levels, with rgb [..., 3] in sRGB; None where a level has no colour.
    batch: the rays [...] and their photographs' colours.
  """
  correct = _make_correction(cams, params, batch)

  def shown(rgb):
    rgb = image.linear_to_srgb(correct(image.srgb_to_linear(rgb)))
    return jnp.where(batch.rgb >= _SATURATED, jnp.minimum(rgb, 1), rgb)

  return [r if r is None else r.replace(rgb=shown(r.rgb)) for r in renderings]


def _make_correction(cams: structs.Cameras, params: Array, batch: structs.Batch) -> Callable:
  """Returns the function from x [..., 3] to y [..., 3], for the rays of a batch."""
  table, rows = cams.supervision, batch.rays.cam_idx
  n = len(table.log_gain)
  log_gain = params[:n, :3] + jnp.asarray(table.log_gain)[:, None]
  gain = jnp.exp(_pick(log_gain - jnp.mean(log_gain, 0, keepdims=True), rows))  # [..., 3]
  if params.shape[-1] == GAIN_WIDTH:
    return lambda x: gain * x
  camera, of_camera = jnp.asarray(table.camera), params[:n, 3:]
  mean = jnp.mean(_pick(of_camera, camera), 0, keepdims=True)  # [1, 11]
  # Factors on the columns of all B_c cancel; without a diagonal in their mean they are fixed.
  common = jnp.append(mean[:, :9] * jnp.eye(3).reshape(1, 9), mean[:, 9:], -1)
  own = _pick(of_camera - common, camera[rows])  # [..., 11]
  inverse = _inverse((mean - common)[0, :9].reshape(3, 3) + jnp.eye(3))
  matrix = own[..., :9].reshape(*rows.shape, 3, 3)
  size = jnp.asarray(cams.size)[rows].astype(jnp.float32)  # [..., 2]
  offset = 2 * jnp.stack(batch.pixel, -1) + 1 - size
  r2 = jnp.sum(offset**2, -1, keepdims=True) / jnp.sum(size**2, -1, keepdims=True)  # [..., 1]
  vignette = jnp.exp(own[..., 9:10] * r2 + own[..., 10:] * r2**2)

  def correct(x):
    balanced = gain * _product(inverse.reshape((1,) * rows.ndim + (3, 3)), x)
    return vignette * (balanced + _product(matrix, balanced))

  return correct


def _pick(table: Array, rows: Array) -> Array:
  """Returns rows [...] of a table [n, k] as [..., k].

  A product with zeros and ones is exact, and unlike an index's its gradient is summed in a fixed
  order on GPUs.
  """
  chosen = jax.nn.one_hot(rows, len(table))
  return jnp.matmul(chosen, table, precision=jax.lax.Precision.HIGHEST)


def _product(matrix: Array, x: Array) -> Array:
  """Multiplies matrices [..., 3, 3] by vectors [..., 3] in full float32."""
  return jnp.sum(matrix * x[..., None, :], -1)


def _inverse(m: Array) -> Array:
  """Inverts a matrix [3, 3] by its cofactors."""
  columns = jnp.stack([jnp.cross(m[i - 2], m[i - 1]) for i in range(3)], -1)
  return columns / jnp.maximum(jnp.vdot(m[0], columns[:, 0]), _MIN_DETERMINANT)
