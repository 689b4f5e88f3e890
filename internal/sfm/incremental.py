"""Incremental mapping by COLMAP, with a live count of photographs and snapshots to resume from."""

from __future__ import annotations

import os
import shutil
import time

from ..system import files, progress
from . import reconstruction

FOLDER = '.mapping'  # Of snapshots, and of the finished attempts of `mapping`.
SMALLEST_MODEL = 3  # Photographs.
_SNAPSHOT_SECONDS = 60.0


def largest_first(models: list) -> list:
  """Sorts pycolmap's Reconstructions by photographs, then by points."""
  return sorted(models, key=lambda m: (-m.num_reg_images(), -m.num_points3D()))


def run(scene_dir: str, count: int) -> list:
  """Maps incrementally; returns pycolmap's Reconstructions, largest first.

  Resumes from the newest snapshot if it has more than half of the photographs, since its model is
  then certain to be the largest one. Otherwise starts from the beginning.

  Args:
    scene_dir: the capture, with matches.
    count: number of photographs.
  """
  pycolmap = reconstruction.colmap()
  pycolmap.set_random_seed(0)
  options = pycolmap.IncrementalPipelineOptions()
  options.min_model_size = SMALLEST_MODEL
  options.random_seed = 0
  database_path, options.image_path = reconstruction.folders(scene_dir)
  manager = pycolmap.ReconstructionManager()
  snapshots = os.path.join(scene_dir, FOLDER)
  if (newest := _newest_snapshot(snapshots, count)) is not None:
    manager.read(newest)
  with pycolmap.Database.open(database_path) as db:
    pipeline = pycolmap.IncrementalPipeline(options, db, manager)
  monitor = _Monitor(manager, count, scene_dir)
  events = pycolmap.IncrementalPipelineCallback
  for event in (events.INITIAL_IMAGE_PAIR_REG_CALLBACK, events.NEXT_IMAGE_REG_CALLBACK):
    pipeline.add_callback(event.value, monitor)
  try:
    pipeline.run()
  finally:
    monitor.close()
  models = [manager.get(k) for k in range(manager.size())]
  return largest_first(models)


class _Monitor:
  """Callback of the mapper: shows how many photographs are posed, and saves snapshots."""

  def __init__(self, manager, count: int, scene_dir: str):
    self._manager, self._count, self._scene_dir = manager, count, scene_dir
    self._model, self._bar = 0, None
    self._saved = time.monotonic()

  def __call__(self) -> None:
    size = self._manager.size()
    if size == 0:
      return
    model = self._manager.get(size - 1)
    if size != self._model:
      self.close()
      self._model = size
      label = 'posing photographs' + (f', model {size}' if size > 1 else '')
      self._bar = progress.Bar(label, self._count).__enter__()
    self._bar.show(min(model.num_reg_images(), self._count))
    if time.monotonic() - self._saved > _SNAPSHOT_SECONDS:
      _save_snapshot(model, self._scene_dir)
      self._saved = time.monotonic()

  def close(self) -> None:
    if self._bar is not None:
      self._bar.__exit__()


def _save_snapshot(model, scene_dir: str) -> None:
  """Saves a snapshot of a model, then removes the older ones."""
  folder = os.path.join(scene_dir, FOLDER)
  older = _snapshots(folder)
  number = int(older[-1]) + 1 if older else 0
  reconstruction.write_folder(model.write_binary, scene_dir, f'{FOLDER}/{number:06d}')
  for name in older:
    shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def _snapshots(folder: str) -> list[str]:
  return sorted(n for n in os.listdir(folder) if n.isdigit()) if files.is_folder(folder) else []


def _newest_snapshot(folder: str, count: int) -> str | None:
  """Returns the newest snapshot that has more than half of the photographs, or None."""
  for name in reversed(_snapshots(folder)):
    path = os.path.join(folder, name)
    try:
      if reconstruction.colmap().Reconstruction(path).num_reg_images() > count / 2:
        return path
    except Exception:  # COLMAP raises many types. A damaged snapshot is skipped.
      shutil.rmtree(path, ignore_errors=True)
  return None
