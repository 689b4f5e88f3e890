"""Checkpoints of a run: saved by orbax, sealed by a manifest, and verified when read.

A checkpoint is written as checkpoints/<step>.partial and renamed once it is complete, so a crash
never leaves a half-written one. Its manifest.json holds the SHA-256 of each of its files, its step
and its run's id, so a renamed folder or one of another run is recognised. Those of a run in a
bucket pass through its working copy (`bucket_checkpoints`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from .. import configs, structs
from ..devices import processes, sharding
from ..errors import UserError
from ..system import bucket, files
from . import bucket_checkpoints, run_lock, run_seal, train_step
from .bucket_checkpoints import DAMAGED, MANIFEST, PARTIAL

_STATE = 'default'  # Folder of orbax's files, named as by its CheckpointManager.
_NOTES = 'notes.json'
_TRIES = 50  # To read the newest checkpoint while training replaces it.


def _folder(checkpoint_dir: str) -> str:
  return os.path.abspath(os.path.join(checkpoint_dir, bucket_checkpoints.FOLDER))


class CheckpointError(UserError):
  """A checkpoint or run folder that cannot be used."""


class _CheckpointGoneError(CheckpointError):
  """A checkpoint that training removed while it was being read."""


def all_steps(checkpoint_dir: str) -> list[int]:
  """Returns the steps of complete checkpoints, ascending, without verifying their files."""
  folder = _folder(checkpoint_dir)
  if copy := bucket.of(checkpoint_dir):
    names = bucket_checkpoints.steps(copy)
  else:
    names = os.listdir(folder) if os.path.isdir(folder) else []
  return sorted(int(name) for name in names if _is_step(name))


def _is_step(name: str) -> bool:
  return name.isdecimal() and name == str(int(name))


def latest_step(checkpoint_dir: str) -> int | None:
  """Returns the step of the newest complete checkpoint, unverified, or None."""
  return max(all_steps(checkpoint_dir), default=None)


def _files_in(folder: str) -> list[str]:
  found = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
  return sorted(os.path.relpath(path, folder) for path in found)


def _seal(folder: str, notes: Mapping[str, Any], **identity) -> None:
  """Adds the notes and a manifest of all files and `identity`, and flushes everything to disk."""
  files.write_json(os.path.join(folder, _NOTES), notes)
  sums = {name: run_seal.sha256(os.path.join(folder, name)) for name in _files_in(folder)}
  files.write_json(os.path.join(folder, MANIFEST), {**identity, 'sha256': sums}, 1)
  for root, _, names in os.walk(folder):
    for name in ['', *names]:
      opened = os.open(os.path.join(root, name), os.O_RDONLY)
      try:
        os.fsync(opened)
      finally:
        os.close(opened)


def damage(checkpoint_dir: str, step: int) -> str | None:
  """Verifies a checkpoint against its manifest; returns what is wrong, or None.

  Raises:
    BucketError: it cannot be downloaded.
  """
  folder = folder_of(checkpoint_dir, step)
  _fetch(checkpoint_dir, step)
  try:
    manifest = files.read_json(os.path.join(folder, MANIFEST))
    sums = dict(manifest['sha256'])
    existing = _files_in(folder)  # A manifest cannot make us open files elsewhere.
    for name, expected in sums.items():
      if name not in existing:
        return f'{name} is missing'
      if run_seal.sha256(os.path.join(folder, name)) != expected:
        return f'{name} has changed since it was written'
    # Manifests of earlier versions have no step and no run.
    if manifest.get('step', step) != step:
      return f'it is the checkpoint of step {manifest["step"]}; rename its folder to that'
    if manifest.get('run', run := run_seal.run_id(checkpoint_dir)) != run is not None:
      return 'it is the checkpoint of another run'
  except FileNotFoundError as error:
    return f'{os.path.relpath(error.filename, folder)} is missing'
  except OSError as error:
    return f'{os.path.relpath(error.filename or folder, folder)}: {error.strerror}'
  except (files.FileError, ValueError, TypeError, LookupError):
    return f'{MANIFEST} is not valid'
  return None


def folder_of(checkpoint_dir: str, step: int) -> str:
  """Returns the folder of a step's checkpoint, whether it exists or not."""
  return os.path.join(_folder(checkpoint_dir), str(step))


def _fetch(checkpoint_dir: str, step: int) -> None:
  """Downloads a checkpoint of a run in a bucket."""
  if copy := bucket.of(checkpoint_dir):
    bucket_checkpoints.fetch(copy, step)


def _is_gone(checkpoint_dir: str, step: int) -> bool:
  """Returns whether a checkpoint that was listed has been removed, by training that keeps few."""
  if bucket.of(checkpoint_dir):
    return step not in all_steps(checkpoint_dir)
  return not os.path.lexists(folder_of(checkpoint_dir, step))


def newest(checkpoint_dir: str, at_most: int | None = None) -> int | None:
  """Returns the step of the newest undamaged checkpoint, or None, the same on all processes.

  Reports newer, damaged ones on stderr. Looks again if training removes one while it is verified.

  Args:
    checkpoint_dir: the run's folder.
    at_most: ignores checkpoints of later steps.
  """
  found = _newest(checkpoint_dir, at_most) if processes.is_main() else -1
  found = processes.from_main(found)
  return None if found < 0 else found


def _newest(checkpoint_dir: str, at_most: int | None) -> int:
  damaged = set()
  while True:
    steps = [step for step in all_steps(checkpoint_dir) if at_most is None or step <= at_most]
    steps = [step for step in steps if step not in damaged]
    if not steps:
      return -1
    step = steps.pop()
    reason = damage(checkpoint_dir, step)
    if reason is None:
      return step
    if not _is_gone(checkpoint_dir, step):
      damaged.add(step)
      then = f'trying step {steps[-1]}' if steps else 'there is no other'
      path = folder_of(checkpoint_dir, step)
      _report(f'Checkpoint {path} is damaged: {reason}; {then}.')


def start_step(checkpoint_dir: str, at_most: int | None = None) -> int:
  """Returns the step to resume from: `newest`, or 0 for a new run.

  Raises:
    CheckpointError: all checkpoints are damaged.
  """
  step = newest(checkpoint_dir, at_most)
  if step is None and at_most is None and processes.from_main(latest_step(checkpoint_dir) or 0):
    raise CheckpointError(
      f'All checkpoints in {_folder(checkpoint_dir)} are damaged (see above). Repair one or copy '
      'an intact one there, or move the folder away to train from scratch.'
    )
  return step or 0


def tidy(checkpoint_dir: str, start: int) -> None:
  """Prepares the folder for resuming from step `start` (main process only).

  Renames later checkpoints, which are damaged, and removes incomplete ones.

  Raises:
    CheckpointError: a damaged checkpoint cannot be renamed.
  """
  folder = _folder(checkpoint_dir)
  if copy := bucket.of(checkpoint_dir):
    bucket_checkpoints.tidy(copy, start)
  for name in os.listdir(folder) if os.path.isdir(folder) else []:
    path = os.path.join(folder, name)
    if name.endswith(PARTIAL):
      shutil.rmtree(path, ignore_errors=True)
    elif name.isdecimal() and int(name) > start:
      shutil.rmtree(path + DAMAGED, ignore_errors=True)
      try:
        os.rename(path, path + DAMAGED)
      except OSError as e:
        raise CheckpointError(
          f'Checkpoint {path} is damaged and cannot be renamed ({e.strerror}); move it away.'
        ) from None


def surplus(checkpoint_dir: str, keep: int) -> list[int]:
  """Returns all steps if an earlier start kept more checkpoints than `keep`, else none.

  One more may also be left by a kill between saving a checkpoint and removing an old one.
  """
  steps = all_steps(checkpoint_dir)
  return steps if keep and len(steps) > keep + 1 else []


def _remove_all_but(checkpoint_dir: str, keep: int, spared: Collection[int]) -> None:
  for step in all_steps(checkpoint_dir)[:-keep] if keep else ():
    if step in spared:
      continue
    path = folder_of(checkpoint_dir, step)
    try:
      if copy := bucket.of(checkpoint_dir):
        bucket_checkpoints.remove(copy, step)
      else:
        os.rename(path, path + PARTIAL)
        shutil.rmtree(path + PARTIAL)
    except (OSError, bucket.BucketError) as e:
      reason = e.strerror if isinstance(e, OSError) else e
      _report(f'Old checkpoint {path} cannot be removed: {reason}.')


def _report(text: str) -> None:
  print(bucket.shown(text), file=sys.stderr)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Stops orbax from logging errors that it also raises."""
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
  spared: Collection[int] = (),
) -> None:
  """Saves the state as the checkpoint of its step; all processes call this.

  All processes gather sharded arrays. Then the main process writes, and the others do not wait.

  Args:
    checkpoint_dir: the run's folder.
    state: the state to save.
    keep: number of newest checkpoints to keep; 0 keeps all.
    notes: JSON-serializable values to store beside the state.
    spared: steps whose checkpoints stay in any case.

  Raises:
    CheckpointError: writing failed; earlier checkpoints are unchanged.
    RunLockError: the folder was locked by `run_lock.locked` and no longer is.
  """
  state = jax.tree.map(sharding.to_host, state)
  if not processes.is_main():
    return
  step = int(state.step)
  folder, final = _folder(checkpoint_dir), folder_of(checkpoint_dir, step)
  identity = {'step': step, 'run': run_seal.run_id(checkpoint_dir)}
  identity = {key: value for key, value in identity.items() if value is not None}
  run_lock.check()
  last = latest_step(checkpoint_dir)
  try:
    with _quiet(), _orbax() as writer:
      writer.save(os.path.join(final + PARTIAL, _STATE), args=ocp.args.StandardSave(state))
    _seal(final + PARTIAL, notes or {}, **identity)
    run_lock.check()  # Writing can take minutes.
    os.rename(final + PARTIAL, final)
    if copy := bucket.of(checkpoint_dir):
      bucket_checkpoints.upload(copy, step, _files_in(final), run_lock.confirm)
      shutil.rmtree(folder)  # The bucket has it; those kept there may not fit on this disk.
  except run_lock.RunLockError:
    shutil.rmtree(final + PARTIAL, ignore_errors=True)
    raise
  except Exception as error:  # TensorStore raises many types for a full disk.
    shutil.rmtree(final + PARTIAL, ignore_errors=True)
    place = f' in {tempfile.gettempdir()} (or set TMPDIR)' if bucket.of(checkpoint_dir) else ''
    raise CheckpointError(
      f'Step {step:,} could not be saved in {folder}: {" ".join(str(error).split())[:1000]}. '
      + (f'The checkpoint of step {last:,} is kept' if last else 'There is no earlier checkpoint')
      + (
        f'. Free some disk space{place} and'
        if files.is_disk_full(error)
        else '. Remove the cause and'
      )
      + ' run the same command again to resume.'
    ) from error
  _remove_all_but(checkpoint_dir, keep, spared)


def saved_run_id(checkpoint_dir: str) -> str | None:
  """Returns the run's id as the newest checkpoint has it; None if no checkpoint has one."""
  for step in reversed(all_steps(checkpoint_dir)):
    try:
      run = files.read_json(os.path.join(folder_of(checkpoint_dir, step), MANIFEST))['run']
      if isinstance(run, str):
        return run
    except (OSError, files.FileError, LookupError):
      continue
  return None


def notes(checkpoint_dir: str, step: int) -> dict[str, Any]:
  """Loads the notes that were saved with a checkpoint."""
  return files.read_json(os.path.join(folder_of(checkpoint_dir, step), _NOTES))


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


def restore(
  checkpoint_dir: str,
  settings: configs.Settings,
  mesh,
  step: int,
  wanted: structs.TrainState | None = None,
) -> structs.TrainState:
  """Restores a checkpoint, sharded for `mesh`, whatever devices it was saved from.

  Args:
    checkpoint_dir: the run's folder.
    settings: the run's settings.
    mesh: the devices.
    step: the checkpoint's step.
    wanted: `sharding.placed_shapes` of the state, if they are known already.

  Raises:
    CheckpointError: the checkpoint is damaged, has another architecture, or was removed meanwhile.
  """
  folder, error, state = folder_of(checkpoint_dir, step), None, None
  try:
    if reason := damage(checkpoint_dir, step):
      raise CheckpointError(f'Checkpoint {folder} is damaged: {reason}.')
    wanted = wanted or sharding.placed_shapes(train_step.abstract_state(settings), mesh)
    state = _read(folder, wanted, step)
  except Exception as e:  # The processes agree below.
    error = e
  if processes.on_all(error is None):
    return state
  _raise_if_gone(checkpoint_dir, step)
  raise error or CheckpointError(f'Checkpoint {folder}: another process cannot read it.')


def _restore_copy(checkpoint_dir: str, settings: configs.Settings, mesh, step: int):
  """Restores a checkpoint from a temporary copy, which training cannot remove.

  Copying is faster than restoring a small checkpoint, and only small ones are replaced so fast.
  """
  with tempfile.TemporaryDirectory() as copy:
    error = None
    try:
      _fetch(checkpoint_dir, step)
      shutil.copytree(folder_of(checkpoint_dir, step), folder_of(copy, step))
    except (OSError, bucket.BucketError) as e:
      error = e
    if processes.on_all(error is None):
      return restore(copy, settings, mesh, step)
    _raise_if_gone(checkpoint_dir, step)
    raise error or CheckpointError(f'Checkpoint {step}: another process cannot copy it.')


def _raise_if_gone(checkpoint_dir: str, step: int) -> None:
  """Raises _CheckpointGoneError on all processes if one of them no longer finds the checkpoint."""
  if processes.largest(_is_gone(checkpoint_dir, step)):
    raise _CheckpointGoneError(
      f'Checkpoint {folder_of(checkpoint_dir, step)} was removed while it was being read, by '
      'training that keeps only the newest (Config.checkpoint_keep). Try again.'
    )


def _read(folder: str, wanted: structs.TrainState, step: int) -> structs.TrainState:
  path = os.path.join(folder, _STATE)
  try:
    with _quiet(), _orbax() as reader:
      _check_same_architecture(folder, reader.metadata(path).item_metadata.tree, wanted)
      state = reader.restore(path, args=ocp.args.StandardRestore(wanted))
  except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as e:  # The files are intact; orbax raises many types.
    reason = ' '.join(str(e).split())[:300] or type(e).__name__
    raise CheckpointError(
      f'Checkpoint {folder} cannot be read ({reason}). Remove it to resume from the previous one, '
      'or use the version of the program that wrote it.'
    ) from e
  if int(state.step) != step:  # Manifests of earlier versions have no step.
    raise CheckpointError(
      f'Checkpoint {folder} is that of step {int(state.step)}; give its folder that name.'
    )
  return state


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
  mesh = mesh or sharding.make_mesh()
  for tries_left in reversed(range(_TRIES)):
    chosen = newest(checkpoint_dir) if step is None else step
    if chosen is None or (step is not None and _is_gone(checkpoint_dir, step)):
      steps = all_steps(checkpoint_dir)
      raise CheckpointError(
        f'No {"intact checkpoint" if chosen is None else f"checkpoint of step {chosen}"} in '
        f'{_folder(checkpoint_dir)} (steps there: {steps or "none"}). Train first, or wait for '
        'Config.checkpoint_every steps.'
      )
    try:
      read = restore if tries_left == _TRIES - 1 else _restore_copy
      state = read(checkpoint_dir, settings, mesh, chosen)
      return sharding.whole(state.params, mesh), chosen
    except _CheckpointGoneError:
      if step is not None or not tries_left:
        raise
