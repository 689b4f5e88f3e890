"""A run's folder: config.gin, scene.json, sparse points, and the checkpoints beside them.

config.gin holds all settings of the run, scene.json its cameras and world transform. With
checkpoints/<step>/, eval and render need nothing else but the photographs. run.json seals them
(`run_seal`), and train.lock is there while training writes (`run_lock`).
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Collection, Sequence

import numpy as np
from jax.sharding import Mesh

from .. import configs, structs
from ..datasets import images, scenes, sparse_points
from ..devices import sharding
from ..errors import UserError
from ..system import bucket
from . import checkpoints, method, run_seal, train_step
from .checkpoints import CheckpointError
from .run_seal import CONFIG, POINTS, SCENE

# Fields of Config that decide what scene.json holds: fixed once the run has been trained.
_SCENE_FIELDS = ('dataset_loader', 'factor', 'llffhold', 'load_alphabetical', 'dtu_light_cond')
_MAX_POSE_CHANGE = 1e-3  # In the normalised world; rounding stays below.

# What programs read of a run, besides the seal and checkpoints.
_READ = (CONFIG, SCENE, POINTS, 'metrics.jsonl', 'metrics.jsonl.damaged')


def with_local_folder(settings: configs.Settings) -> configs.Settings:
  """Returns settings whose run is in a local folder: the working copy of a gs:// address.

  The text of the settings, which becomes config.gin, keeps the address.
  """
  return settings.change('config', checkpoint_dir=bucket.local(settings.config.checkpoint_dir))


def refresh(checkpoint_dir: str) -> None:
  """Downloads the run's files into its working copy; does nothing to other folders."""
  if copy := bucket.of(checkpoint_dir):
    copy.fetch(_READ)
    copy.fetch([run_seal.FILE])  # Last, since training writes it first.


def write_run(
  checkpoint_dir: str, settings: configs.Settings, scene: scenes.Scene, start: int = 0
) -> None:
  """Writes and seals config.gin, scene.json and the sparse points (main process only).

  Warns if a run that resumes at step `start` goes on with other settings, and records it.
  """

  def write_files(folder: str) -> None:
    scenes.save_scene(os.path.join(folder, SCENE), scene)
    sparse_points.save(folder, settings.config, scene)

  run = run_seal.run_id(checkpoint_dir) or checkpoints.saved_run_id(checkpoint_dir)
  changes = changed_settings(checkpoint_dir, settings) if start else {}
  warnings = []
  if changes:
    text = ', '.join(f'{name} {change}' for name, change in changes.items())
    warnings = [f'Settings changed at step {start:,}: {text}.']
    print(bucket.shown(f'Warning: {checkpoint_dir}: {warnings[0]}'), file=sys.stderr)
  run_seal.write(checkpoint_dir, run or uuid.uuid4().hex, settings.text, write_files, warnings)
  bucket.push(checkpoint_dir)


# What a killed training may leave in its folder, besides incomplete checkpoints.
_LEFTOVERS = (
  run_seal.STAGING, '.clock*', 'train.lock.*', 'run.*.part.json', 'metrics.*.part.jsonl',
  'config.*.part.gin', 'scene.*.part.json', 'points.*.part.npy', 'train_renders/*.part.png',
)  # fmt: skip


def tidy(checkpoint_dir: str, start: int) -> None:
  """Prepares a locked folder for resuming from step `start` (main process only).

  Removes what a kill has left half-written, and renames damaged checkpoints.
  """
  for pattern in _LEFTOVERS:
    for path in glob.glob(os.path.join(glob.escape(checkpoint_dir), pattern)):
      shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
  checkpoints.tidy(checkpoint_dir, start)


def open_run(
  checkpoint_dir: str, gin_bindings: Sequence[str] = ()
) -> tuple[configs.Settings, scenes.Scene]:
  """Loads a run's settings, overridden by `gin_bindings`, and its scene.

  Raises:
    CheckpointError: the folder has no run, or a binding changes which images the run uses.
    BucketError: the run is in a bucket, and not in a working copy of it (`bucket.local`).
    RunFileError: config.gin or scene.json is damaged.
    ConfigError: a binding is invalid.
  """
  if bucket.is_address(checkpoint_dir):
    raise bucket.BucketError(
      f'This program needs a local copy of {checkpoint_dir}: `mkdir RUN && gcloud storage rsync '
      f'--recursive {checkpoint_dir} RUN`, then name the folder RUN instead.'
    )
  refresh(checkpoint_dir)
  paths = [os.path.join(checkpoint_dir, name) for name in (CONFIG, SCENE)]
  for path in paths:
    if not os.path.isfile(path):
      raise CheckpointError(
        f'No training run in {checkpoint_dir!r}: {path} is missing. Train first, or give '
        'the folder that train.py wrote as Config.checkpoint_dir.'
      )
  run_seal.check(checkpoint_dir)
  where = copy.address if (copy := bucket.of(checkpoint_dir)) else checkpoint_dir
  here = f'Config.checkpoint_dir = {where!r}'  # The folder may have been moved.
  settings = with_local_folder(configs.load_config([paths[0]], [*gin_bindings, here]))
  trained = configs.load_config([paths[0]]).config
  for name in _SCENE_FIELDS:
    new, old = (getattr(config, name) for config in (settings.config, trained))
    if new != old:
      raise CheckpointError(
        f'Config.{name} is {new!r}, but {checkpoint_dir} was trained with {old!r}, which fixes its '
        'images and their split. Remove that binding, or train another run.'
      )
  return settings, scenes.load_scene(paths[1])


def changed_settings(checkpoint_dir: str, settings: configs.Settings) -> dict[str, str]:
  """Returns the settings of the method that the run was not trained with; see `method.changes`."""
  path = os.path.join(checkpoint_dir, CONFIG)
  if not os.path.isfile(path):
    return {}
  try:
    return method.changes(configs.load_config([path]), settings)
  except (UserError, OSError) as e:  # It is about to be written anew.
    text = f'Warning: the settings are not compared with those of the run: {e}'
    print(bucket.shown(text), file=sys.stderr)
    return {}


def check_finished(settings: configs.Settings, scene: scenes.Scene) -> None:
  """Checks that a finished run is of this scene and these settings, whatever their max_steps.

  Raises:
    CheckpointError: it is not.
  """
  folder = settings.config.checkpoint_dir
  refresh(folder)
  check_same_scene(folder, scene)
  changes = changed_settings(folder, settings)
  changes.pop('Config.max_steps', None)
  if changes:
    name, change = next(iter(changes.items()))
    more = f' ({len(changes)} settings differ)' if len(changes) > 1 else ''
    raise CheckpointError(
      f'{folder} has a finished run with other settings: {name} {change}{more}. Set another '
      'Config.checkpoint_dir, or remove that folder.'
    )


def check_same_scene(checkpoint_dir: str, scene: scenes.Scene) -> None:
  """Checks that a run resumes with the training images and poses that it started with.

  Otherwise test images could be among those already trained on, or cameras could have moved.

  Raises:
    CheckpointError: they differ; the message names the first image that does.
  """
  try:
    if SCENE in run_seal.changed_files(checkpoint_dir):  # Its poses are no evidence.
      raise images.DataError(f'{os.path.join(checkpoint_dir, SCENE)} has changed or is missing.')
    before = scenes.load_scene(os.path.join(checkpoint_dir, SCENE))
  except (images.DataError, images.DataNotFoundError) as e:
    text = f'Warning: the images and poses of the run are not compared: {e}'
    print(bucket.shown(text), file=sys.stderr)
    return  # `write_run` is about to write it anew.
  way_out = (
    f'Set Config.data_dir, factor and llffhold as in {checkpoint_dir}/{CONFIG}, or set another '
    'Config.checkpoint_dir to train from scratch.'
  )
  old, new = ({s.names[row]: row for row in s.train} for s in (before, scene))
  others = sorted(old.keys() ^ new.keys())
  if others:
    change = 'was one of them and is not now' if others[0] in old else 'is new'
    raise CheckpointError(
      f'{checkpoint_dir} was trained on other images: {others[0]!r} {change} '
      f'({len(others)} images differ). {way_out}'
    )

  def differing(field: str, tolerance: float) -> list[str]:
    values = [getattr(s.cameras, field) for s in (before, scene)]
    apart = {name: np.abs(values[0][old[name]] - values[1][new[name]]).max() for name in old}
    return [name for name, distance in apart.items() if distance > tolerance]

  if names := differing('size', 0):
    sizes = (s.cameras.size[rows[names[0]]] for s, rows in ((before, old), (scene, new)))
    was, now = (f'{width}x{height}' for width, height in sizes)
    raise CheckpointError(
      f'{checkpoint_dir} was trained on images of another size: {names[0]!r} was {was}, and is '
      f'{now} now ({len(names)} images differ). {way_out}'
    )
  if names := differing('camtoworld', _MAX_POSE_CHANGE):
    raise CheckpointError(
      f'{checkpoint_dir} was trained with other poses: the camera of {names[0]!r} has moved '
      f'({len(names)} cameras differ). {way_out}'
    )


def start_run(
  settings: configs.Settings,
  mesh: Mesh,
  step: int,
  create: Callable | None = None,
  shapes: structs.TrainState | None = None,
) -> tuple[structs.TrainState, list, int]:
  """Restores the checkpoint of `step`, or creates the initial state at step 0.

  Args:
    settings: the run's settings.
    mesh: the devices.
    step: the checkpoint's step, or 0.
    create: `train_step.creation(settings)`, if it has been traced already.
    shapes: its `sharding.placed_shapes`, likewise.

  Returns:
    (state, stats of the steps since the last log line, number of micro-batches).
  """
  folder = settings.config.checkpoint_dir
  if step == 0:
    create = create or train_step.creation(settings)
    return sharding.place(create(), mesh), [], 1
  state = checkpoints.restore(folder, settings, mesh, step, shapes)
  notes = checkpoints.notes(folder, step)
  window = [{name: np.float32(value) for name, value in row.items()} for row in notes['window']]
  return state, window, notes['micro_batches'] if notes['devices'] == mesh.size else 1


def save_run(
  config: configs.Config,
  state: structs.TrainState,
  window: list,
  step_fn,
  mesh: Mesh,
  spared: Collection[int] = (),
) -> None:
  """Saves a checkpoint with what a resumed run needs to reproduce an uninterrupted one.

  That is `window`, the stats of the steps since the last log line, and the number of micro-batches.
  The checkpoints of the steps `spared` stay, whatever Config.checkpoint_keep is.
  """
  rows = [{name: float(value) for name, value in row.items()} for row in window]
  notes = {'window': rows, 'micro_batches': step_fn.micro_batches, 'devices': mesh.size}
  checkpoints.save(config.checkpoint_dir, state, config.checkpoint_keep, notes, spared)
