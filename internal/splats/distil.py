"""Distils a trained field into 3D Gaussians: first Gaussians from its surfaces, then a fit."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from .. import structs
from ..rendering import trained
from ..system import progress
from . import fit, gaussians, rasterizer, rounding, surfaces, views

_FIRST = 0.6  # Part of the Gaussians that the first ones are; the fit adds the others.
_RELOCATIONS = 30  # Over the fit, all before the last fifth of its steps.
_SHORT = 500  # Steps of a fit up to which it gains from Gaussians that cover the pictures at first.
_REST = 10  # Steps between relocations, at least.
_REPORTS = 10  # Progress lines.
_SPARE = 1.6  # Room in the lists of pairs over the most that a picture needed; more is compiled.


@dataclasses.dataclass(frozen=True)
class Options:
  """How to distil."""

  max_splats: int = 1_000_000
  steps: int = 20_000  # One picture each.
  views: int = 400  # Pictures of the field, from which a step draws one.
  photo_share: float = 0.8  # At least this part of the steps takes a training photograph instead.
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Material:
  """What fits start from."""

  first: gaussians.Splats
  field: views.Views  # Pictures of the field.
  rows: list[int]  # Of the photographs in the scene.
  photos: views.Views


def distil(run: trained.TrainedRun, options: Options) -> gaussians.Splats:
  """Makes Gaussians that look like a trained field.

  Returns:
    At most `max_splats` Gaussians in the normalised world.

  Raises:
    ExportError: the run's rays are in NDC.
    UserError: the field shows no surface.
  """
  return fitted(run, prepare(run, options), options)


def prepare(run: trained.TrainedRun, options: Options) -> Material:
  """Renders the field, makes the first Gaussians and reads the photographs; raises as `distil`."""
  cams = teacher_cameras(run, options)
  field, images = views.render_teacher(run, cams)
  count = max(1, round(_FIRST * options.max_splats))
  short = options.steps <= _SHORT
  first = surfaces.initial(cams, images, count, options.max_splats, covering=short)
  del images
  return Material(first, field, *views.photographs(run, run.scene.train))


def teacher_cameras(run: trained.TrainedRun, options: Options) -> structs.Cameras:
  """Returns the cameras from which the field is rendered, as wide as the first photograph."""
  width = int(np.asarray(run.scene.cameras.size)[run.scene.train[0], 0])
  return views.teacher_cameras(run.scene, options.views, width, options.seed)


def rounding_steps(
  run: trained.TrainedRun, splats: gaussians.Splats, options: Options
) -> rounding.Steps:
  """Returns how coarsely Gaussians in the normalised world may be rounded.

  The views that stay as they are: those that they have been fitted to. Raises as `distil`.
  """
  cams, scene = teacher_cameras(run, options), run.scene
  pinholes = [gaussians.pinhole(cams, row) for row in range(len(cams.size))]
  pinholes += [gaussians.pinhole(scene.cameras, row) for row in views.drawable(scene, scene.train)]
  capacity = capacity_for(needed_pairs(splats, pinholes))
  return rounding.steps(splats, pinholes, background_of(run), capacity)


def fitted(run: trained.TrainedRun, material: Material, options: Options) -> gaussians.Splats:
  """Fits the first Gaussians and removes the dead ones."""
  field = material.field
  splats = optimise(material.first, field, material.photos, background_of(run), options)
  return fit.bury(splats, fit.least_scales(splats.means, field.cameras))


def background_of(run: trained.TrainedRun) -> np.ndarray:
  """Returns the colour [3] behind all Gaussians."""
  return np.float32([1.0] * 3 if run.scene.background == 'white' else [0.0] * 3)


def needed_pairs(splats: gaussians.Splats, cameras: list[gaussians.Pinhole]) -> int:
  """Returns the most pairs of Gaussian and tile that one of the cameras' pictures needs."""
  project = jax.jit(gaussians.project)
  return max(int(rasterizer.count_pairs(project(splats, c), c.size)) for c in cameras)


def optimise(
  splats: gaussians.Splats,
  field: views.Views,
  photos: views.Views,
  background: np.ndarray,
  options: Options,
) -> gaussians.Splats:
  """Fits Gaussians to pictures of the field and to photographs; prints progress."""
  state, rng = fit.start(splats), np.random.default_rng(options.seed)
  capacity = capacity_for(needed_pairs(state.splats, field.cameras))
  relocate_every = max(_REST, round(0.8 * options.steps / _RELOCATIONS))
  say_every, began = max(1, options.steps // _REPORTS), time.monotonic()
  # If there are more photographs than pictures of the field, all are drawn equally often.
  count = len(photos.cameras)
  share = max(options.photo_share, count / (count + len(field.cameras))) if count else 0.0
  total = jnp.zeros(())  # Of squared errors since the last report.
  for k in range(options.steps):
    source = photos if rng.uniform() < share else field
    row = rng.integers(len(source.cameras))
    rate = fit.rate(k, options.steps)
    state, error = fit.step(
      state, source.cameras[row], source.colors[row], background, rate, capacity
    )
    total += error
    last = k + 1 == options.steps
    if (k + 1) % relocate_every == 0 and k < 0.8 * options.steps:
      capacity, state = _grown(capacity, state)
      state = fit.relocate(state, jax.random.key(k))
    if (k + 1) % say_every == 0 or last:
      capacity, state = _grown(capacity, state)
      psnr = -10 * np.log10(float(total) / ((k % say_every) + 1))
      total = jnp.zeros(())
      alive = int(jnp.sum(jax.nn.sigmoid(state.splats.opacity_logits) >= fit.DEAD))
      left = (time.monotonic() - began) / (k + 1) * (options.steps - k - 1)
      text = f'step {k + 1:,}/{options.steps:,}  PSNR {psnr:.2f}  {alive:,} Gaussians'
      progress.say(f'{text}  {progress.duration(left)} left')
  return state.splats


def capacity_for(pairs: int) -> int:
  """Returns a capacity with room for more pairs, rounded so that few programs are compiled."""
  return int(np.ceil(max(pairs, 1) * _SPARE / 2**14)) * 2**14


def _grown(capacity: int, state: fit.State) -> tuple[int, fit.State]:
  """Returns a larger capacity if a picture has lost pairs since the last call."""
  lost = int(state.overflow)
  if lost:
    capacity = capacity_for(capacity + lost)
    progress.say(f'{lost:,} pairs of Gaussian and tile did not fit; making room for {capacity:,}.')
  return capacity, state.replace(overflow=jnp.int32(0))
