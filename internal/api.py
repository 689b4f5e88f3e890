"""The public API: load a capture, train, render a camera, read metrics. docs/api.md shows its use.

These names can be imported from the package itself: `from mipnerf360 import load_run`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from . import configs, datasets, structs
from .commands import eval as eval_program
from .datasets import scenes
from .devices import sharding
from .errors import UserError
from .rendering import trained
from .system import bucket, files
from .training import loop, run_folder, runlog


def load_settings(
  *gin_configs: str | os.PathLike, bindings: str | Sequence[str] = (), **values: Any
) -> configs.Settings:
  """Reads gin files and settings.

  Args:
    *gin_configs: paths of gin files, or shipped ones: 'fast' or 'configs/360_fast.gin'.
    bindings: gin bindings such as 'NerfMLP.net_width = 512', or only one.
    **values: fields of `Config`, such as data_dir='my_scene'; they win over the bindings. Paths and
      NumPy's scalars are accepted too.

  Raises:
    ConfigError: a file is missing, a name is unknown, or a value is out of range.
  """
  own = [f'Config.{name} = {_as_literal(value)!r}' for name, value in values.items()]
  paths = [
    name if files.is_file(name) else configs.config_path(name)
    for name in map(os.fspath, gin_configs)
  ]
  return configs.load_config(paths, [*_as_list(bindings), *own])


def _as_literal(value: Any) -> Any:
  """Returns a path as text, and NumPy's scalars and arrays as Python's numbers and lists."""
  if isinstance(value, (np.generic, np.ndarray)):
    return value.tolist()
  return os.fspath(value) if isinstance(value, os.PathLike) else value


def _as_list(bindings: str | Sequence[str]) -> list[str]:
  return [bindings] if isinstance(bindings, str) else list(bindings)


def load_capture(settings: configs.Settings) -> scenes.Scene:
  """Reads the capture in `Config.data_dir`: cameras, image names, split, report.

  Raises:
    DataError, ModelError: the capture cannot be used.
  """
  return datasets.load_dataset(settings.config)


class Run:
  """A run that can be rendered: finished, or in training.

  Attributes:
    folder: where its files are.
    settings: its settings.
    scene: its capture, with `names`, `cameras` and the rows `train` and `test`.
    params: the model's parameters, by part.
    step: training steps done.
  """

  def __init__(self, run: trained.TrainedRun):
    self._run = run
    self._seconds = 0.0

  def __getattr__(self, name: str):
    if name.startswith('_'):
      raise AttributeError(name)
    return getattr(self._run, name)

  @functools.cached_property
  def _render_image(self) -> Callable:
    return self._run.make_image_renderer()  # Compiled once, whatever checkpoint or step it renders.

  def render(self, camera: int | str | structs.Cameras) -> dict[str, np.ndarray]:
    """Renders the picture of a camera.

    Args:
      camera: a row of the capture's images, an image's name, or a camera of your own (the first of
        a `structs.Cameras`; see `cameras.make_cameras`), in the run's normalised world.

    Returns:
      rgb [h, w, 3] in [0, 1]; acc, distance_mean and distance_median [h, w];
      distance_percentiles [h, w, 3] at 5, 50 and 95 percent.

    Raises:
      UserError: the capture has no such image, or `camera` is something else.
    """
    jax.block_until_ready(self.params)
    began = time.monotonic()
    cams, row = self._find_camera(camera)
    image = self._render_image(self.params, cams, row, self.train_fraction)
    self._seconds += time.monotonic() - began
    return image

  def evaluate(self, images: int | None = None) -> dict[str, Any]:
    """Scores the test images; writes eval/ as eval.py does and returns results.json's content.

    Args:
      images: at most so many test images, from the first on; None for all that the settings select.

    Raises:
      UserError: `images` is not positive, or there are no test images; nothing is written.
    """
    if images is not None and images < 1:
      raise UserError(f'images must be at least 1, or None for all, got {images!r}.')
    rows = eval_program.select_images(self.settings.config, self.scene)[:images]
    return eval_program.evaluate(self._run, rows, self._render_image)

  def metrics(self) -> list[dict[str, float]]:
    """Returns the rows of metrics.jsonl: step, loss and its terms, psnr, rays_per_sec, ..."""
    return runlog.read_metrics(os.path.join(self.folder, 'metrics.jsonl'))

  def _find_camera(self, camera) -> tuple[structs.Cameras, int]:
    if isinstance(camera, structs.Cameras):
      return camera, 0
    names = self.scene.names
    if isinstance(camera, str):
      if camera not in names:
        raise UserError(f'{camera!r} is not an image of the capture; the first is {names[0]!r}.')
      return self.scene.cameras, names.index(camera)
    try:
      camera = operator.index(camera)
    except TypeError:
      raise UserError(
        'camera must be a row, the name of an image, or structs.Cameras (of '
        f'cameras.make_cameras), got {type(camera).__name__}.'
      ) from None
    if not -len(names) <= camera < len(names):
      raise UserError(f'camera must be a row of the {len(names)} images, got {camera}.')
    return self.scene.cameras, camera % len(names)


def load_run(
  folder: str | os.PathLike, step: int | None = None, bindings: str | Sequence[str] = ()
) -> Run:
  """Opens a trained run by its folder.

  Args:
    folder: `Config.checkpoint_dir` of the training, also a gs:// address.
    step: the checkpoint to restore; None for the newest.
    bindings: gin bindings that override the run's settings, or only one.

  Raises:
    CheckpointError: the folder has no run, or no such checkpoint.
  """
  if step is not None:
    step = operator.index(step)
  return Run(trained.open_trained(bucket.local(os.fspath(folder)), _as_list(bindings), step))


def train(
  settings: configs.Settings,
  capture: scenes.Scene | None = None,
  on_step: Callable[[Run], None] | None = None,
  every: int = 1,
) -> Run:
  """Trains to the last step, resuming from the newest checkpoint of the run's folder.

  Args:
    settings: the run's settings, with `Config.checkpoint_dir`.
    capture: what to train on; None to load it.
    on_step: called with the run as it is, after each step whose number is a multiple of `every`,
      and after the last. It can render (`run.render(0)`); the time that this takes is left out of
      the logged rays per second. `run.params` are valid until it returns.
    every: steps between calls of `on_step`. With 1, a slow or busy host slows down short steps.

  Returns:
    The trained run.

  Raises:
    UserError: `every` is not positive.
    NonFiniteError: losses or gradients stayed non-finite for too many steps.
    CheckpointError: the folder holds a run that cannot be resumed.
  """
  if every < 1:
    raise UserError(f'every must be at least 1, got {every!r}.')
  capture = capture or load_capture(settings)
  settings = run_folder.with_local_folder(settings)
  folder, mesh = settings.config.checkpoint_dir, sharding.make_mesh()
  run = Run(trained.TrainedRun(folder, settings, capture, mesh, {}, 0))

  def report(step: int, params: dict) -> float:
    run._run = dataclasses.replace(run._run, params=params, step=step)
    run._seconds = 0.0
    on_step(run)
    return run._seconds

  loop.train(settings, capture, mesh, on_step=report if on_step else None, on_step_every=every)
  run._run = trained.restore(folder, settings, capture, mesh=mesh)
  return run
