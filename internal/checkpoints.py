"""What a run leaves on disk and how it comes back: config, scene and orbax checkpoints.

A run's folder holds config.gin (all that the run was told), scene.json (cameras and world
transform) and checkpoints/<step>/; eval and render need nothing else but the photographs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp

from internal import configs, files, sharding, structs, train_step
from internal.datasets import scene as scene_lib

_CONFIG = 'config.gin'
_SCENE = 'scene.json'


def _folder(checkpoint_dir: str) -> str:
  return os.path.abspath(os.path.join(checkpoint_dir, 'checkpoints'))


class CheckpointError(ValueError):
  """A run's folder that cannot be used; the message says what to do."""


def write_run(checkpoint_dir: str, settings: configs.Settings, scene: scene_lib.Scene) -> None:
  """Writes config.gin and scene.json, each whole or not at all (main process only)."""
  with files.whole(os.path.join(checkpoint_dir, _CONFIG)) as path, open(path, 'w') as f:
    f.write(settings.text)
  scene_lib.save_scene(os.path.join(checkpoint_dir, _SCENE), scene)


def open_run(
  checkpoint_dir: str, gin_bindings: Sequence[str] = ()
) -> tuple[configs.Settings, scene_lib.Scene]:
  """Reads what a run was told and what it saw; bindings change the config on top.

  Raises:
    CheckpointError: no such run.
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
  return settings, scene_lib.load_scene(paths[1])


def all_steps(checkpoint_dir: str) -> list[int]:
  """Steps that have a finished checkpoint, ascending."""
  folder = _folder(checkpoint_dir)
  if not os.path.isdir(folder):
    return []
  return sorted(ocp.utils.checkpoint_steps(folder))


def latest_step(checkpoint_dir: str) -> int | None:
  """The newest finished checkpoint's step, or None."""
  return max(all_steps(checkpoint_dir), default=None)


def make_manager(checkpoint_dir: str, keep: int = 2) -> ocp.CheckpointManager:
  """Saves in the background, keeps the newest `keep`, never shows a half-written one."""
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
  return ocp.CheckpointManager(
    _folder(checkpoint_dir), item_handlers=ocp.StandardCheckpointHandler(), options=options
  )


def save(manager: ocp.CheckpointManager, state: structs.TrainState) -> None:
  """Starts saving the state under its step; `manager.wait_until_finished()` waits for it."""
  step = int(sharding.to_host(state.step))
  if step not in manager.all_steps():
    manager.save(step, args=ocp.args.StandardSave(state))


def _abstract_state(settings: configs.Settings, mesh) -> structs.TrainState:
  state = jax.eval_shape(lambda: train_step.create_state(settings))
  where = sharding.replicated(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)


def _named_shapes(tree) -> dict[str, tuple[int, ...]]:
  """Shapes by path, whether keys were attributes, names or indices when saved."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  name = lambda entry: str(getattr(entry, 'name', getattr(entry, 'key', getattr(entry, 'idx', ''))))  # noqa: E731
  return {'/'.join(map(name, path)): tuple(leaf.shape) for path, leaf in leaves}


def _check_same_architecture(manager, step: int, wanted: structs.TrainState) -> None:
  """Names the first parameter in which a checkpoint and the model differ."""
  metadata = manager.item_metadata(step)
  saved = metadata['params'] if isinstance(metadata, dict) else metadata.tree['params']
  saved, wanted = _named_shapes(saved), _named_shapes(wanted.params)
  for name in [*wanted, *saved]:
    if saved.get(name) != wanted.get(name):
      raise CheckpointError(
        f'The checkpoint {manager.directory}/{step} is of another architecture: {name} is '
        f'{saved.get(name, "absent")} there and {wanted.get(name, "absent")} in this config. '
        "Use the run's own config.gin, or another Config.checkpoint_dir."
      )


def restore(
  manager: ocp.CheckpointManager, settings: configs.Settings, mesh, step: int
) -> structs.TrainState:
  """Reads a checkpoint onto the mesh's devices, whatever devices it was saved from.

  Raises:
    CheckpointError: another architecture, of which the first parameter that differs is named; or
      damaged files.
  """
  wanted = _abstract_state(settings, mesh)
  try:
    _check_same_architecture(manager, step, wanted)
    return manager.restore(step, args=ocp.args.StandardRestore(wanted))
  except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as e:  # Orbax raises nearly anything.
    reason = ' '.join(str(e).split())[:300] or type(e).__name__
    raise CheckpointError(
      f'The checkpoint {manager.directory}/{step} cannot be read ({reason}). Copy it again, or '
      'remove its folder to go on from the one before.'
    ) from e


def restore_params(
  checkpoint_dir: str, settings: configs.Settings, step: int | None = None, mesh=None
) -> tuple[dict, int]:
  """The parameters of a run's newest checkpoint (or of `step`), and their step.

  Raises:
    CheckpointError: no checkpoint yet, no such step, or another architecture.
  """
  steps = all_steps(checkpoint_dir)
  step = max(steps, default=None) if step is None else step
  if step is None or step not in steps:
    raise CheckpointError(
      f'No checkpoint{"" if step is None else f" of step {step}"} in '
      f'{_folder(checkpoint_dir)} (there: {steps or "none"}). Train first, or wait for '
      'Config.checkpoint_every steps.'
    )
  with make_manager(checkpoint_dir) as manager:
    state = restore(manager, settings, mesh or sharding.make_mesh(), step)
  return state.params, step
