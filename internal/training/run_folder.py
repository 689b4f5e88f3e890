"""A run's folder: config.gin, scene.json, sparse points, and the checkpoints beside them.

config.gin holds all settings of the run, scene.json its cameras and world transform. With
checkpoints/<step>/, eval and render need nothing else but the photographs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from .. import configs, structs
from ..datasets import images, scenes, sparse_points
from ..devices import sharding
from ..system import files
from . import checkpoints, train_step
from .checkpoints import CheckpointError

_CONFIG = 'config.gin'
_SCENE = 'scene.json'
# Fields of Config that decide what scene.json holds: fixed once the run has been trained.
_SCENE_FIELDS = ('dataset_loader', 'factor', 'llffhold', 'load_alphabetical', 'dtu_light_cond')
_MAX_POSE_CHANGE = 1e-3  # In the normalised world; rounding stays below.


def write_run(checkpoint_dir: str, settings: configs.Settings, scene: scenes.Scene) -> None:
  """Writes config.gin, scene.json and the sparse points, each atomically (main process only)."""
  files.write_text(os.path.join(checkpoint_dir, _CONFIG), settings.text)
  scenes.save_scene(os.path.join(checkpoint_dir, _SCENE), scene)
  sparse_points.save(checkpoint_dir, settings.config, scene)


def open_run(
  checkpoint_dir: str, gin_bindings: Sequence[str] = ()
) -> tuple[configs.Settings, scenes.Scene]:
  """Loads a run's settings, overridden by `gin_bindings`, and its scene.

  Raises:
    CheckpointError: the folder has no run, or a binding changes which images the run uses.
    ConfigError: a binding is invalid.
  """
  paths = [os.path.join(checkpoint_dir, name) for name in (_CONFIG, _SCENE)]
  for path in paths:
    if not os.path.isfile(path):
      raise CheckpointError(
        f'No training run in {checkpoint_dir!r}: {path} is missing. Train first, or set '
        'Config.checkpoint_dir to the folder that train.py wrote.'
      )
  here = f'Config.checkpoint_dir = {checkpoint_dir!r}'  # The folder may have been moved.
  settings = configs.load_config([paths[0]], [*gin_bindings, here])
  trained = configs.load_config([paths[0]]).config
  for name in _SCENE_FIELDS:
    new, old = (getattr(config, name) for config in (settings.config, trained))
    if new != old:
      raise CheckpointError(
        f'Config.{name} is {new!r}, but {checkpoint_dir} was trained with {old!r}, which fixes its '
        'images and their split. Remove that binding, or train another run.'
      )
  return settings, scenes.load_scene(paths[1])


def check_same_scene(checkpoint_dir: str, scene: scenes.Scene) -> None:
  """Checks that a run resumes with the training images and poses that it started with.

  Otherwise test images could be among those already trained on, or cameras could have moved.

  Raises:
    CheckpointError: they differ; the message names the first image that does.
  """
  try:
    before = scenes.load_scene(os.path.join(checkpoint_dir, _SCENE))
  except (images.DataError, images.DataNotFoundError):
    return  # `write_run` is about to write it anew.
  way_out = (
    f'Set Config.data_dir and llffhold as in {checkpoint_dir}/{_CONFIG}, or set another '
    'Config.checkpoint_dir to train from scratch.'
  )
  poses = [{s.names[row]: s.cameras.camtoworld[row] for row in s.train} for s in (before, scene)]
  others = sorted(poses[0].keys() ^ poses[1].keys())
  if others:
    change = 'was one of them and is not now' if others[0] in poses[0] else 'is new'
    raise CheckpointError(
      f'{checkpoint_dir} was trained on other images: {others[0]!r} {change} '
      f'({len(others)} images differ). {way_out}'
    )
  moved = [n for n, pose in poses[0].items() if np.abs(pose - poses[1][n]).max() > _MAX_POSE_CHANGE]
  if moved:
    raise CheckpointError(
      f'{checkpoint_dir} was trained with other poses: the camera of {moved[0]!r} has moved '
      f'({len(moved)} cameras differ). {way_out}'
    )


def start_run(
  settings: configs.Settings, mesh: Mesh, step: int
) -> tuple[structs.TrainState, list, int]:
  """Restores the checkpoint of `step`, or creates the initial state at step 0.

  Returns:
    (state, stats of the steps since the last log line, number of micro-batches).
  """
  folder = settings.config.checkpoint_dir
  if step == 0:
    return sharding.place(train_step.create_state(settings), mesh), [], 1
  state = checkpoints.restore(folder, settings, mesh, step)
  notes = checkpoints.notes(folder, step)
  window = [{name: np.float32(value) for name, value in row.items()} for row in notes['window']]
  return state, window, notes['micro_batches'] if notes['devices'] == mesh.size else 1


def save_run(
  config: configs.Config, state: structs.TrainState, window: list, step_fn, mesh: Mesh
) -> None:
  """Saves a checkpoint with what a resumed run needs to reproduce an uninterrupted one.

  That is `window`, the stats of the steps since the last log line, and the number of micro-batches.
  """
  rows = [{name: float(value) for name, value in row.items()} for row in jax.device_get(window)]
  notes = {'window': rows, 'micro_batches': step_fn.micro_batches, 'devices': mesh.size}
  checkpoints.save(config.checkpoint_dir, state, config.checkpoint_keep, notes)
