"""Opens trained runs: settings, scene and restored parameters, ready to render."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from .. import configs
from ..datasets import scenes
from ..devices import sharding
from ..training import camera_refinement, checkpoints, run_folder, train_step
from . import renderer


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """A trained run at one of its checkpoints."""

  folder: str
  settings: configs.Settings
  scene: scenes.Scene  # With the refined cameras, if there are any.
  mesh: Mesh
  params: dict  # The model's parameters, on the mesh.
  step: int  # The checkpoint's training step.

  @property
  def train_fraction(self) -> float:
    """Training progress at the checkpoint, in [0, 1]."""
    return float(train_step.train_fraction(self.step, self.settings.config.max_steps))

  @functools.cached_property
  def render_image(self) -> Callable:
    """The result of `make_image_renderer()`, so that it is compiled once."""
    return self.make_image_renderer()

  def make_image_renderer(self, with_normals: bool = False) -> Callable:
    """Returns `render_image(params, cams, i, train_fraction)`; see `renderer`."""
    return renderer.make_image_renderer(self.settings, self.mesh, with_normals=with_normals)


def open_trained(run: str, bindings: Sequence[str] = (), step: int | None = None) -> TrainedRun:
  """Loads a trained run from its folder.

  Args:
    run: the folder, `Config.checkpoint_dir` of the training.
    bindings: gin bindings that override the run's settings.
    step: the checkpoint to restore; None for the newest.

  Raises:
    CheckpointError: the folder has no run, or no checkpoint of this step.
  """
  return restore(run, *run_folder.open_run(run, bindings), step)


def restore(
  run: str,
  settings: configs.Settings,
  scene: scenes.Scene,
  step: int | None = None,
  mesh: Mesh | None = None,
) -> TrainedRun:
  """Restores a checkpoint of a run whose `settings` and `scene` are already loaded.

  For programs that check their arguments against the scene before the slow part. Other arguments
  than `mesh`, the devices to restore to (None: all), and errors are those of `open_trained`.
  """
  mesh = mesh or sharding.make_mesh()
  params, step = checkpoints.restore_params(run, settings, step, mesh)
  scene = camera_refinement.refined_scene(settings, scene, params)
  return TrainedRun(run, settings, scene, mesh, params, step)
