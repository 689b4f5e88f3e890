"""Parameters that are trained beside the MLPs, most of them with a row per training image.

Each kind is one more part of the parameters, with its own optimizer and learning rate. Like any
part it is clipped, skipped when non-finite, sharded and saved on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import optax

from .. import configs, structs
from . import camera_refinement, exposure, robust

Array = jax.Array


class Part(NamedTuple):
  """A part of the parameters."""

  width: int  # Parameters of a row; they start at 0.
  optimizer: optax.GradientTransformation
  rate: Callable[[Array], Array]  # From the step to the learning rate.
  rows: int | None = None  # None: one per training image.


def make_adam() -> optax.GradientTransformation:
  """Returns Adam for cameras and exposures; its steps do not depend on the parameters' scale."""
  return optax.scale_by_adam(0.9, 0.99, 1e-15)


def parts(config: configs.Config) -> dict[str, Part]:
  """Returns the parts that the settings ask for, by their names in `TrainState.params`."""
  found = {}
  if config.refine_cameras:
    found[camera_refinement.PART] = Part(
      camera_refinement.WIDTH,
      make_adam(),
      camera_refinement.learning_rate(config),
    )
  if config.exposure != 'none':
    found[exposure.PART] = Part(
      exposure.GAIN_WIDTH if config.exposure == 'gain' else exposure.COLOUR_WIDTH,
      make_adam(),
      exposure.learning_rate(config),
    )
  if config.robust_quantile > 0:
    found[robust.PART] = Part(robust.WIDTH, robust.make_optimizer(), robust.learning_rate, rows=1)
  return found


def add_tables(
  settings: configs.Settings, cams: structs.Cameras, log_exposures: Sequence[float] | None = None
) -> structs.Cameras:
  """Returns the n training cameras with what the parts need to know of each.

  Args:
    settings: the run's settings.
    cams: the cameras (numpy leaves).
    log_exposures: [n] logs of the photographs' exposures, None if they are unknown.
  """
  cams = camera_refinement.add_tables(settings, cams)
  return exposure.add_tables(settings.config, cams, log_exposures)
