"""Parameters with a row per training image, which are trained beside the MLPs.

Each kind is one more part of the parameters, with its own optimizer and learning rate. Like any
part it is clipped, skipped when non-finite, sharded and saved on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from .. import configs
from . import camera_refinement

Array = jax.Array


class Part(NamedTuple):
  """A part of the parameters with a row per training image."""

  width: int  # Parameters of an image; they start at 0, which changes nothing.
  optimizer: optax.GradientTransformation
  rate: Callable[[Array], Array]  # From the step to the learning rate.


def parts(config: configs.Config) -> dict[str, Part]:
  """Returns the parts that the settings ask for, by their names in `TrainState.params`."""
  found = {}
  if config.refine_cameras:
    found[camera_refinement.PART] = Part(
      camera_refinement.WIDTH,
      camera_refinement.make_optimizer(),
      camera_refinement.learning_rate(config),
    )
  return found
