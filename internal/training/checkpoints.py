"""What a run leaves on disk and how it comes back: config, scene and orbax checkpoints.

A run's folder holds config.gin (all that the run was told), scene.json (cameras and world
transform) and checkpoints/<step>/; eval and render need nothing else but the photographs.

A checkpoint is made under another name and gets its own in one go, with manifest.json inside: the
SHA-256 of each of its files. Reading checks them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from .. import configs, structs
from ..datasets import images, scenes, sparse_points
from ..devices import processes, sharding
from ..errors import UserError
from ..system import files
from . import train_step

_CONFIG = 'config.gin'
_SCENE = 'scene.json'
_STATE = 'default'  # In a checkpoint: orbax's files, under the name that its manager gives them.
_NOTES = 'notes.json'
_MANIFEST = 'manifest.json'
_PARTIAL = '.partial'  # Not finished, or half deleted.
_DAMAGED = '.damaged'
# Fields of Config that say what scene.json holds: after training nothing else can come of them.
_OF_THE_SCENE = ('dataset_loader', 'factor', 'llffhold', 'load_alphabetical', 'dtu_light_cond')
_MOVED = 1e-3  # Of a camera, in the normalised world: more than rounding.


def _folder(checkpoint_dir: str) -> str:
  return os.path.abspath(os.path.join(checkpoint_dir, 'checkpoints'))


class CheckpointError(UserError):
  """A run's folder that cannot be used; the message says what to do."""


def write_run(checkpoint_dir: str, settings: configs.Settings, scene: scenes.Scene) -> None:
  """Writes config.gin, scene.json and the sparse points, each whole or not at all.

  For the main process only.
  """
  with files.whole(os.path.join(checkpoint_dir, _CONFIG)) as path, open(path, 'w') as f:
    f.write(settings.text)
  scenes.save_scene(os.path.join(checkpoint_dir, _SCENE), scene)
  sparse_points.save(checkpoint_dir, settings.config, scene)


def open_run(
  checkpoint_dir: str, gin_bindings: Sequence[str] = ()
) -> tuple[configs.Settings, scenes.Scene]:
  """Reads what a run was told and what it saw; bindings change the config on top.

  Raises:
    CheckpointError: no such run; a binding that would have it see other pictures.
    ConfigError: a binding that cannot be used.
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
  for name in _OF_THE_SCENE:
    told, was = (getattr(config, name) for config in (settings.config, trained))
    if told != was:
      raise CheckpointError(
        f'Config.{name} is {told!r}, but {checkpoint_dir} was trained with {was!r}, and has its '
        'pictures and their split from there. Leave that binding out, or train another run.'
      )
  return settings, scenes.load_scene(paths[1])


def check_same_scene(checkpoint_dir: str, scene: scenes.Scene) -> None:
  """Before training goes on: it must see the pictures, and the world, that it saw.

  Else test images would be among those that were trained on, or cameras have moved.

  Raises:
    CheckpointError: it would not; the first picture that differs is named.
  """
  try:
    before = scenes.load_scene(os.path.join(checkpoint_dir, _SCENE))
  except (images.DataError, images.DataNotFoundError):
    return  # It is about to be written anew.
  way_out = f'Set Config.data_dir and llffhold as in {checkpoint_dir}/{_CONFIG}, or another '
  way_out += 'Config.checkpoint_dir to train anew.'
  poses = [{s.names[row]: s.cameras.camtoworld[row] for row in s.train} for s in (before, scene)]
  others = sorted(poses[0].keys() ^ poses[1].keys())
  if others:
    raise CheckpointError(
      f'{checkpoint_dir} was trained on other pictures: {others[0]!r} was '
      f'{"one of them and is not now" if others[0] in poses[0] else "none of them and is one now"}'
      f' ({len(others)} such). {way_out}'
    )
  moved = [n for n, pose in poses[0].items() if np.abs(pose - poses[1][n]).max() > _MOVED]
  if moved:
    raise CheckpointError(
      f'{checkpoint_dir} was trained with other poses: the camera of {moved[0]!r} has moved '
      f'({len(moved)} such). {way_out}'
    )


def all_steps(checkpoint_dir: str) -> list[int]:
  """Steps that have a finished checkpoint, ascending; whether each is whole is not looked at."""
  folder = _folder(checkpoint_dir)
  if not os.path.isdir(folder):
    return []
  return sorted(int(name) for name in os.listdir(folder) if name.isdecimal())


def latest_step(checkpoint_dir: str) -> int | None:
  """The newest finished checkpoint's step, or None."""
  return max(all_steps(checkpoint_dir), default=None)


def _files_in(folder: str) -> list[str]:
  found = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
  return sorted(os.path.relpath(path, folder) for path in found)


def _sha256(path: str) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _seal(folder: str, notes: Mapping[str, Any]) -> None:
  """Adds the notes, and the manifest of all that is there; a loss of power takes nothing of it."""
  with open(os.path.join(folder, _NOTES), 'w') as f:
    json.dump(notes, f)
  sums = {name: _sha256(os.path.join(folder, name)) for name in _files_in(folder)}
  with open(os.path.join(folder, _MANIFEST), 'w') as f:
    json.dump({'sha256': sums}, f, indent=1)
  for root, _, names in os.walk(folder):
    for name in ['', *names]:
      opened = os.open(os.path.join(root, name), os.O_RDONLY)
      try:
        os.fsync(opened)
      finally:
        os.close(opened)


def damage(checkpoint_dir: str, step: int) -> str | None:
  """What is wrong with the files of a checkpoint, None if they are as they were written."""
  folder = folder_of(checkpoint_dir, step)
  try:
    with open(os.path.join(folder, _MANIFEST), 'rb') as f:
      sums = dict(json.load(f)['sha256'])
    there = _files_in(folder)  # Nothing else is opened, whatever names the manifest has.
    for name, wanted in sums.items():
      if name not in there:
        return f'{name} is missing'
      if _sha256(os.path.join(folder, name)) != wanted:
        return f'{name} is not as it was written'
  except FileNotFoundError as error:
    return f'{os.path.relpath(error.filename, folder)} is missing'
  except OSError as error:
    return f'{os.path.relpath(error.filename or folder, folder)}: {error.strerror}'
  except (ValueError, TypeError, LookupError, RecursionError):
    return f'{_MANIFEST} is not as it was written'
  return None


def folder_of(checkpoint_dir: str, step: int) -> str:
  """Where the checkpoint of a step is, or would be."""
  return os.path.join(_folder(checkpoint_dir), str(step))


def newest(checkpoint_dir: str, at_most: int | None = None) -> int | None:
  """The step of the newest checkpoint that is whole, or None; tells of newer, damaged ones.

  Of those up to the step `at_most`, where it is given. All processes are told the same.
  """
  found = None
  if processes.is_main():
    steps = [step for step in all_steps(checkpoint_dir) if at_most is None or step <= at_most]
    while steps and found is None:
      step = steps.pop()
      reason = damage(checkpoint_dir, step)
      if reason is None:
        found = step
      else:
        then = f'trying that of step {steps[-1]}' if steps else 'and there is no other'
        path = folder_of(checkpoint_dir, step)
        print(f'The checkpoint {path} is damaged: {reason}; {then}.', file=sys.stderr)
  found = processes.from_main(-1 if found is None else found)
  return None if found < 0 else found


def start_step(checkpoint_dir: str, at_most: int | None = None) -> int:
  """The step that training goes on from: `newest`, or 0 where nothing has been saved.

  Raises:
    CheckpointError: there are checkpoints, but none is whole.
  """
  step = newest(checkpoint_dir, at_most)
  if step is None and at_most is None and processes.from_main(latest_step(checkpoint_dir) or 0):
    raise CheckpointError(
      f'No checkpoint in {_folder(checkpoint_dir)} is whole. Copy one there from elsewhere, or '
      'move that folder away to train from the beginning.'
    )
  return step or 0


def tidy(checkpoint_dir: str, start: int) -> None:
  """Before training goes on from `start`: moves later checkpoints, which are damaged, out of the
  way and removes what was never finished (main process only)."""
  folder = _folder(checkpoint_dir)
  for name in os.listdir(folder) if os.path.isdir(folder) else []:
    path = os.path.join(folder, name)
    if name.endswith(_PARTIAL):
      shutil.rmtree(path, ignore_errors=True)
    elif name.isdecimal() and int(name) > start:
      shutil.rmtree(path + _DAMAGED, ignore_errors=True)
      os.rename(path, path + _DAMAGED)


def _remove_all_but(checkpoint_dir: str, keep: int) -> None:
  for step in all_steps(checkpoint_dir)[:-keep] if keep else ():
    path = folder_of(checkpoint_dir, step)
    os.rename(path, path + _PARTIAL)
    shutil.rmtree(path + _PARTIAL)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps orbax from logging the traceback of an error that it raises as well."""
  before = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    yield
  finally:
    logging.disable(before)


def _orbax() -> ocp.Checkpointer:
  """Orbax for this process alone: left to itself it has all processes write, and wait."""
  alone = ocp.options.MultiprocessingOptions(
    primary_host=jax.process_index(), active_processes={jax.process_index()}
  )
  handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
  return ocp.Checkpointer(handler, multiprocessing_options=alone)


def save(
  checkpoint_dir: str,
  state: structs.TrainState,
  keep: int = 2,
  notes: Mapping[str, Any] | None = None,
) -> None:
  """Saves the state under its step, with notes (what JSON can hold), and removes old ones.

  The newest `keep` stay, with 0 all of them. All processes bring together what each has of the
  state; then the main process alone writes, and others do not wait.

  Raises:
    CheckpointError: it could not be written; those before it stay as they are.
  """
  state = jax.tree.map(sharding.to_host, state)
  if not processes.is_main():
    return
  step = int(state.step)
  folder, final = _folder(checkpoint_dir), folder_of(checkpoint_dir, step)
  try:
    with _quiet(), _orbax() as writer:
      writer.save(os.path.join(final + _PARTIAL, _STATE), args=ocp.args.StandardSave(state))
    _seal(final + _PARTIAL, notes or {})
    os.rename(final + _PARTIAL, final)
    _remove_all_but(checkpoint_dir, keep)
  except Exception as error:  # TensorStore has exceptions of many kinds for a full disk.
    shutil.rmtree(final + _PARTIAL, ignore_errors=True)
    last = latest_step(checkpoint_dir)
    raise CheckpointError(
      f'Step {step:,} could not be saved in {folder}: {" ".join(str(error).split())[:1000]}. '
      + (f'The checkpoint of step {last:,} is kept' if last else 'There is no checkpoint before it')
      + '; with room on the disk, the same command goes on.'
    ) from error


def notes(checkpoint_dir: str, step: int) -> dict[str, Any]:
  """What was noted beside a checkpoint that has been restored."""
  with open(os.path.join(folder_of(checkpoint_dir, step), _NOTES)) as f:
    return json.load(f)


def _abstract_state(settings: configs.Settings, mesh) -> structs.TrainState:
  state = train_step.abstract_state(settings)
  at = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
  return jax.tree.map(at, state, sharding.placement(state, mesh))


def _named_shapes(tree) -> dict[str, tuple[int, ...]]:
  """Shapes by path, whether keys were attributes, names or indices when saved."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  name = lambda entry: str(getattr(entry, 'name', getattr(entry, 'key', getattr(entry, 'idx', ''))))  # noqa: E731
  return {'/'.join(map(name, path)): tuple(leaf.shape) for path, leaf in leaves}


def _check_same_architecture(folder: str, saved, wanted: structs.TrainState) -> None:
  """Names the first parameter in which a checkpoint and the model differ."""
  saved, wanted = _named_shapes(saved['params']), _named_shapes(wanted.params)
  for name in [*wanted, *saved]:
    if saved.get(name) != wanted.get(name):
      raise CheckpointError(
        f'The checkpoint {folder} is of another architecture: {name} is '
        f'{saved.get(name, "absent")} there and {wanted.get(name, "absent")} in this config. '
        "Use the run's own config.gin, or another Config.checkpoint_dir."
      )


def restore(checkpoint_dir: str, settings: configs.Settings, mesh, step: int) -> structs.TrainState:
  """Reads a checkpoint to where it lives on the mesh's devices, whatever it was saved from.

  Raises:
    CheckpointError: damaged, or of another architecture; the first parameter that differs is named.
  """
  folder, wanted = folder_of(checkpoint_dir, step), _abstract_state(settings, mesh)
  reason = damage(checkpoint_dir, step)
  if not processes.on_all(reason is None):
    reason = reason or 'another process cannot read it'
    raise CheckpointError(f'The checkpoint {folder} is damaged: {reason}.')
  path = os.path.join(folder, _STATE)
  try:
    with _orbax() as reader:
      _check_same_architecture(folder, reader.metadata(path).item_metadata.tree, wanted)
      return reader.restore(path, args=ocp.args.StandardRestore(wanted))
  except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as e:  # Of files that are as they were written; orbax raises nearly anything.
    reason = ' '.join(str(e).split())[:300] or type(e).__name__
    raise CheckpointError(
      f'The checkpoint {folder} cannot be read ({reason}). Remove it to go on from the one before, '
      'or use the version of the program that wrote it.'
    ) from e


def restore_params(
  checkpoint_dir: str, settings: configs.Settings, step: int | None = None, mesh=None
) -> tuple[dict, int]:
  """All parameters of a run's newest whole checkpoint (or of `step`) on each device; their step.

  Raises:
    CheckpointError: no checkpoint yet, no such step, damaged, or another architecture.
  """
  steps = all_steps(checkpoint_dir)
  step = newest(checkpoint_dir) if step is None else step
  if step is None or step not in steps:
    raise CheckpointError(
      f'No {"whole checkpoint" if step is None else f"checkpoint of step {step}"} in '
      f'{_folder(checkpoint_dir)} (there: {steps or "none"}). Train first, or wait for '
      'Config.checkpoint_every steps.'
    )
  mesh = mesh or sharding.make_mesh()
  return sharding.whole(restore(checkpoint_dir, settings, mesh, step).params, mesh), step


def start_run(settings: configs.Settings, mesh: Mesh, step: int):
  """The state of the checkpoint at `step`, or a fresh one at 0; and what `save_run` noted with it.

  Returns:
    (state, the stats of the print window's steps so far, the number of micro-batches).
  """
  folder = settings.config.checkpoint_dir
  if step == 0:
    return sharding.place(train_step.create_state(settings), mesh), [], 1
  state = restore(folder, settings, mesh, step)
  noted = notes(folder, step)
  window = [{name: np.float32(value) for name, value in row.items()} for row in noted['window']]
  return state, window, noted['micro_batches'] if noted['devices'] == mesh.size else 1


def save_run(
  config: configs.Config, state: structs.TrainState, window: list, step_fn, mesh: Mesh
) -> None:
  """A checkpoint, and with it what must not depend on interruptions.

  That is: the stats of a print window whose mean is not logged yet, and in how many micro-batches
  these devices take their rays.
  """
  rows = [{name: float(value) for name, value in row.items()} for row in jax.device_get(window)]
  noted = {'window': rows, 'micro_batches': step_fn.micro_batches, 'devices': mesh.size}
  save(config.checkpoint_dir, state, config.checkpoint_keep, noted)
