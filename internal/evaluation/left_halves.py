"""Refines test cameras on the left halves of their pictures, so that the right halves count.

A trained field says nothing of the errors of the test cameras' own poses, which were estimated from
photographs too. Fitting a camera to the half of its picture that is not measured removes most of
them. This is a departure from the usual protocol, which results.json names.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .. import losses, math, models, structs
from ..datasets import scenes
from ..devices import sharding
from ..rendering import trained
from ..training import camera_refinement, per_camera

_STEPS, _RAYS = 200, 2048  # Of each picture.
_RATES = 3e-4, 1e-5  # First and last learning rate, in focal lengths per step: under a pixel.


def measured(picture: np.ndarray) -> slice:
  """Returns the columns of a picture [h, w, ...] that count in metrics: the right half."""
  return slice(picture.shape[1] // 2, None)


def make_refiner(run: trained.TrainedRun) -> Callable[[int], structs.Cameras]:
  """Returns `refine(row)` -> the camera of a test image, refined, as a table of one row.

  Raises:
    UserError: the scene's cameras cannot be refined.
  """
  camera_refinement.check(run.scene)
  config, model = run.settings.config, models.build(run.settings)
  optimizer = per_camera.make_adam()

  def fit(params, cams, x, y, rgb, frac):
    """Returns z [1, k] after steps on pixels x and y [steps, rays] of colours rgb [..., 3]."""

    def loss_fn(z, x, y, rgb):
      rays, prior = camera_refinement.cast(config, cams, z, jnp.zeros_like(x), x, y)
      renderings, _ = model.apply({'params': params}, None, rays, frac, False)
      return losses.squared_error(renderings[-1].rgb, rgb.astype(jnp.float32) / 255) + prior

    def step(state, batch):
      z, adam, done = state
      update, adam = optimizer.update(jax.grad(loss_fn)(z, *batch), adam, z)
      return (z - math.log_lerp(done, *_RATES) * update, adam, done + 1 / _STEPS), None

    z = jnp.zeros((1, camera_refinement.WIDTH))
    (z, _, _), _ = jax.lax.scan(step, (z, optimizer.init(z), jnp.float32(0)), (x, y, rgb))
    return z

  # All devices do the same: few rays, for a fraction of the time that the picture takes.
  whole = sharding.WHOLE
  fit = jax.jit(
    sharding.per_device(fit, run.mesh, (whole,) * 6, whole),
    out_shardings=sharding.replicated(run.mesh),
  )

  def refine(row: int) -> structs.Cameras:
    cams = run.scene.cameras.take(np.array([row]))
    preconditioner = camera_refinement.preconditioners(cams, run.settings)
    table = cams.replace(supervision=structs.Supervision(preconditioner=preconditioner))
    batch = _draw(run, row)
    if batch is None:
      return cams
    args = sharding.replicate((table, *batch, np.float32(run.train_fraction)), run.mesh)
    z = sharding.to_host(fit(sharding.whole(run.params, run.mesh), *args))
    change = camera_refinement.changes(preconditioner, z)
    return jax.tree.map(np.asarray, camera_refinement.apply(cams, change))

  return refine


def _draw(run: trained.TrainedRun, row: int) -> tuple[np.ndarray, ...] | None:
  """Draws pixels of a left half: x, y [steps, rays] and colours; None if it is masked entirely."""
  truth = scenes.read_image(run.settings.config.data_dir, run.scene, row)
  mask = scenes.read_mask(run.settings.config.data_dir, run.scene, row)
  allowed = np.ones(truth.shape[:2], bool) if mask is None else mask.copy()
  allowed[:, measured(truth)] = False
  y, x = np.nonzero(allowed)
  if not len(x):
    return None
  drawn = np.random.default_rng(row).integers(len(x), size=(_STEPS, _RAYS))
  x, y = np.int32(x[drawn]), np.int32(y[drawn])
  return x, y, truth[y, x]
