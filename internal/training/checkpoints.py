"""Checkpoints of a run: saved by orbax, sealed by a manifest, and verified when read.

A checkpoint is written as checkpoints/<step>.partial and renamed once it is complete, so a crash
never leaves a half-written one. Its manifest.json holds the SHA-256 of each of its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from .. import configs, structs
from ..devices import processes, sharding
from ..errors import UserError
from . import train_step

_STATE = 'default'  # Folder of orbax's files, named as by its CheckpointManager.
_NOTES = 'notes.json'
_MANIFEST = 'manifest.json'
_PARTIAL = '.partial'  # Incomplete, or half deleted.
_DAMAGED = '.damaged'


def _folder(checkpoint_dir: str) -> str:
  return os.path.abspath(os.path.join(checkpoint_dir, 'checkpoints'))


class CheckpointError(UserError):
  """A checkpoint or run folder that cannot be used."""


def all_steps(checkpoint_dir: str) -> list[int]:
  """Returns the steps of complete checkpoints, ascending, without verifying their files."""
  folder = _folder(checkpoint_dir)
  if not os.path.isdir(folder):
    return []
  return sorted(int(name) for name in os.listdir(folder) if name.isdecimal())


def latest_step(checkpoint_dir: str) -> int | None:
  """Returns the step of the newest complete checkpoint, unverified, or None."""
  return max(all_steps(checkpoint_dir), default=None)


def _files_in(folder: str) -> list[str]:
  found = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
  return sorted(os.path.relpath(path, folder) for path in found)


def _sha256(path: str) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _seal(folder: str, notes: Mapping[str, Any]) -> None:
  """Adds the notes and a manifest of all files, and flushes everything to disk."""
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
  """Verifies a checkpoint against its manifest; returns what is wrong, or None."""
  folder = folder_of(checkpoint_dir, step)
  try:
    with open(os.path.join(folder, _MANIFEST), 'rb') as f:
      sums = dict(json.load(f)['sha256'])
    existing = _files_in(folder)  # A manifest cannot make us open files elsewhere.
    for name, expected in sums.items():
      if name not in existing:
        return f'{name} is missing'
      if _sha256(os.path.join(folder, name)) != expected:
        return f'{name} has changed since it was written'
  except FileNotFoundError as error:
    return f'{os.path.relpath(error.filename, folder)} is missing'
  except OSError as error:
    return f'{os.path.relpath(error.filename or folder, folder)}: {error.strerror}'
  except (ValueError, TypeError, LookupError, RecursionError):
    return f'{_MANIFEST} is not valid'
  return None


def folder_of(checkpoint_dir: str, step: int) -> str:
  """Returns the folder of a step's checkpoint, whether it exists or not."""
  return os.path.join(_folder(checkpoint_dir), str(step))


def newest(checkpoint_dir: str, at_most: int | None = None) -> int | None:
  """Returns the step of the newest undamaged checkpoint, or None, the same on all processes.

  Reports newer, damaged ones on stderr.

  Args:
    checkpoint_dir: the run's folder.
    at_most: ignores checkpoints of later steps.
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
        then = f'trying step {steps[-1]}' if steps else 'there is no other'
        path = folder_of(checkpoint_dir, step)
        print(f'Checkpoint {path} is damaged: {reason}; {then}.', file=sys.stderr)
  found = processes.from_main(-1 if found is None else found)
  return None if found < 0 else found


def start_step(checkpoint_dir: str, at_most: int | None = None) -> int:
  """Returns the step to resume from: `newest`, or 0 for a new run.

  Raises:
    CheckpointError: all checkpoints are damaged.
  """
  step = newest(checkpoint_dir, at_most)
  if step is None and at_most is None and processes.from_main(latest_step(checkpoint_dir) or 0):
    raise CheckpointError(
      f'All checkpoints in {_folder(checkpoint_dir)} are damaged. Copy an intact one there, or '
      'move the folder away to train from scratch.'
    )
  return step or 0


def tidy(checkpoint_dir: str, start: int) -> None:
  """Prepares the folder for resuming from step `start` (main process only).

  Renames later checkpoints, which are damaged, and removes incomplete ones.
  """
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
  """Stops orbax from logging tracebacks of errors that it also raises."""
  before = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    yield
  finally:
    logging.disable(before)


def _orbax() -> ocp.Checkpointer:
  """Returns a checkpointer that runs in this process alone, without waiting for others."""
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
  """Saves the state as the checkpoint of its step; all processes call this.

  All processes gather sharded arrays. Then the main process writes, and the others do not wait.

  Args:
    checkpoint_dir: the run's folder.
    state: the state to save.
    keep: number of newest checkpoints to keep; 0 keeps all.
    notes: JSON-serializable values to store beside the state.

  Raises:
    CheckpointError: writing failed; earlier checkpoints are unchanged.
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
  except Exception as error:  # TensorStore raises many types for a full disk.
    shutil.rmtree(final + _PARTIAL, ignore_errors=True)
    last = latest_step(checkpoint_dir)
    raise CheckpointError(
      f'Step {step:,} could not be saved in {folder}: {" ".join(str(error).split())[:1000]}. '
      + (f'The checkpoint of step {last:,} is kept' if last else 'There is no earlier checkpoint')
      + '. Free some disk space and run the same command again to resume.'
    ) from error


def notes(checkpoint_dir: str, step: int) -> dict[str, Any]:
  """Loads the notes that were saved with a checkpoint."""
  with open(os.path.join(folder_of(checkpoint_dir, step), _NOTES)) as f:
    return json.load(f)


def _abstract_state(settings: configs.Settings, mesh) -> structs.TrainState:
  state = train_step.abstract_state(settings)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    sharding.placement(state, mesh),
  )


def _named_shapes(tree) -> dict[str, tuple[int, ...]]:
  """Returns shapes by path; attributes, names and indices give the same path."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  name = lambda entry: str(getattr(entry, 'name', getattr(entry, 'key', getattr(entry, 'idx', ''))))  # noqa: E731
  return {'/'.join(map(name, path)): tuple(leaf.shape) for path, leaf in leaves}


def _check_same_architecture(folder: str, saved, wanted: structs.TrainState) -> None:
  """Raises CheckpointError for the first parameter whose shape differs from the model's."""
  saved, wanted = _named_shapes(saved['params']), _named_shapes(wanted.params)
  for name in [*wanted, *saved]:
    if saved.get(name) != wanted.get(name):
      raise CheckpointError(
        f'Checkpoint {folder} has another architecture: {name} is '
        f'{saved.get(name, "absent")} there and {wanted.get(name, "absent")} in this config. '
        "Use the run's own config.gin, or another Config.checkpoint_dir."
      )


def restore(checkpoint_dir: str, settings: configs.Settings, mesh, step: int) -> structs.TrainState:
  """Restores a checkpoint, sharded for `mesh`, whatever devices it was saved from.

  Raises:
    CheckpointError: the checkpoint is damaged or has another architecture.
  """
  folder, wanted = folder_of(checkpoint_dir, step), _abstract_state(settings, mesh)
  reason = damage(checkpoint_dir, step)
  if not processes.on_all(reason is None):
    reason = reason or 'another process cannot read it'
    raise CheckpointError(f'Checkpoint {folder} is damaged: {reason}.')
  path = os.path.join(folder, _STATE)
  try:
    with _orbax() as reader:
      _check_same_architecture(folder, reader.metadata(path).item_metadata.tree, wanted)
      return reader.restore(path, args=ocp.args.StandardRestore(wanted))
  except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as e:  # The files are intact; orbax raises many types.
    reason = ' '.join(str(e).split())[:300] or type(e).__name__
    raise CheckpointError(
      f'Checkpoint {folder} cannot be read ({reason}). Remove it to resume from the previous one, '
      'or use the version of the program that wrote it.'
    ) from e


def restore_params(
  checkpoint_dir: str, settings: configs.Settings, step: int | None = None, mesh=None
) -> tuple[dict, int]:
  """Restores the parameters of a run's newest undamaged checkpoint, replicated, for inference.

  Args:
    checkpoint_dir: the run's folder.
    settings: the run's settings.
    step: restores this step's checkpoint instead of the newest.
    mesh: devices to replicate on; all devices by default.

  Returns:
    (parameters, step).

  Raises:
    CheckpointError: there is no such checkpoint, it is damaged, or has another architecture.
  """
  steps = all_steps(checkpoint_dir)
  step = newest(checkpoint_dir) if step is None else step
  if step is None or step not in steps:
    raise CheckpointError(
      f'No {"intact checkpoint" if step is None else f"checkpoint of step {step}"} in '
      f'{_folder(checkpoint_dir)} (steps there: {steps or "none"}). Train first, or wait for '
      'Config.checkpoint_every steps.'
    )
  mesh = mesh or sharding.make_mesh()
  return sharding.whole(restore(checkpoint_dir, settings, mesh, step).params, mesh), step
