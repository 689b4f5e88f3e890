"""Estimates the poses of a capture from its matches: global, incremental or hierarchical mapping.

Global mapping (GLOMAP: Pan et al., ECCV 2024) solves for all cameras at once. Incremental mapping
adds one photograph after another, and where it goes wrong, it goes on from there. `auto` maps
globally, tests the model against the matches (`evidence`), tries other ways where it is doubtful,
and keeps the best. Finished attempts and snapshots are saved, so that a stopped run resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from ..system import files, installation, progress
from . import evidence, incremental, photos, reconstruction

MAPPERS = ('auto', 'global', 'incremental', 'hierarchical')
STAMP = 'models.json'  # Beside the models: what they were made from, and how.

_MANY = 1000  # Photographs from which `auto` tries hierarchical instead of incremental mapping.
_ENOUGH = 0.95  # Share of posed photographs from which a clean model needs no other attempt.
_FEW = 0.75  # Share of posed photographs up to which a model is as bad as a torn one.
_LOOK_ALIKE = 0.5  # Coverage below which a pair may be of two places that look alike.
_NEAR = 1 / 8  # Share of the order within which pairs are near: 45 degrees of a ring.
_DRIFT = 0.03  # Error of a pair (`evidence.pair_error`) above what a chain drifts: two degrees.
# Of each photograph, that global mapping places cameras by; points come from all.
_TRACKS = {'quick': 400, 'precise': 1000}
_STAGES = 5  # Rotations, tracks, positions, bundle adjustment and triangulation.


@dataclasses.dataclass(frozen=True)
class Attempt:
  """The outcome of one way of mapping."""

  name: str
  models: list  # pycolmap's Reconstructions, largest first.
  evidence: evidence.Evidence | None  # About the largest model.
  dropped: int = 0  # Pairs that were left out.

  @property
  def posed(self) -> int:
    return self.models[0].num_reg_images() if self.models else 0

  def score(self, count: int) -> tuple[bool, float, float, int]:
    """Ranks attempts: what is certainly wrong, or poses too few photographs, comes last.

    Then posed photographs less ten times the contradicted share of strong pairs. Of equal attempts,
    the one from more pairs is better, since they close loops.
    """
    if self.evidence is None:
      return False, -1.0, 0.0, 0
    wrong = len(self.evidence.contradicted) / max(self.evidence.tested, 1)
    ranked = round(self.posed / max(count, 1) - 10 * wrong, 3)
    return self.is_usable(count), ranked, -self.evidence.share, -self.dropped

  def is_usable(self, count: int) -> bool:
    """Returns whether most of `count` photographs are posed, and at most look-alikes contradict."""
    found = self.evidence
    if found is None or found.beside or self.posed <= _FEW * count:
      return False
    return found.verdict != evidence.BAD and found.folded <= evidence.FOLDED

  def as_json(self) -> dict[str, Any]:
    found = self.evidence
    return {
      'mapper': self.name,
      'posed': self.posed,
      'dropped_pairs': self.dropped,
      'tested_pairs': found.tested if found else 0,
      'contradicted_pairs': len(found.contradicted) if found else 0,
      'contradicted_matches': round(found.share, 4) if found else None,
    }


class _Mapping:
  """The attempts to map one capture.

  Args:
    scene_dir: the capture, with matches.
    names: the photographs, in order.
    made_from: identifies photographs and pairs; attempts with another one are made anew.
  """

  def __init__(self, scene_dir: str, names: Sequence[str], made_from: dict):
    self.scene_dir, self.names, self._made_from = scene_dir, list(names), made_from
    self.attempts: list[Attempt] = []
    self.matches = evidence.Matches(scene_dir, names)

  def attempt(self, name: str, make: Callable[[], list], dropped: int = 0) -> None:
    """Adds an attempt: the models of a stopped run, or those that `make` returns."""
    folder = os.path.join(self.scene_dir, incremental.FOLDER, name.replace(' ', '_'))
    models = read_models(folder, self._made_from)
    if models is None:
      models = make()
      write_models(self.scene_dir, os.path.relpath(folder, self.scene_dir), models, self._made_from)
    found = self.matches.test(models[0]) if models else None
    self.attempts.append(Attempt(name, models, found, dropped))

  def run(self, mapper: str) -> None:
    """Maps in one way."""
    if mapper == 'incremental':
      self.attempt(mapper, lambda: incremental.run(self.scene_dir, len(self.names)))
    else:
      self.attempt(mapper, lambda: _in_child(self.scene_dir, mapper))

  def best(self) -> Attempt:
    return max(self.attempts, key=lambda attempt: attempt.score(len(self.names)))

  def is_settled(self) -> bool:
    """Returns whether an attempt posed nearly all photographs and contradicts no strong pair."""
    best = self.best()
    enough = best.posed >= _ENOUGH * len(self.names)
    return enough and best.evidence is not None and best.evidence.is_clean

  def without(self, name: str, dropped: Sequence[evidence.Pair]) -> None:
    """Adds an attempt at global mapping without some pairs, if there are any."""
    if dropped:
      make = functools.partial(_in_child, self.scene_dir, 'global', dropped)
      self.attempt(name, make, len(dropped))

  def without_look_alikes(self) -> None:
    """Leaves out the pairs whose matches cover little of the pictures' overlap."""
    found = [p for p in self.matches.pairs if self.matches.coverage(p) < _LOOK_ALIKE]
    self.without('global without look-alikes', found)

  def along_the_order(self) -> None:
    """Maps from pairs near in the order, then from all pairs that roughly agree with that.

    The nearest pairs are no look-alikes, but may not join all photographs; then more are used.
    Without the others, loops do not close, so the first result drifts.
    """
    if not self.matches.is_ordered:
      return
    count, nearest = len(self.names), self.matches.neighbours
    for reach in sorted({nearest, max(nearest, int(count * _NEAR))}):
      far = [pair for pair in self.matches.pairs if self.matches.apart(pair) > reach]
      self.without(f'global within {reach} in order', far)
      if far and self.attempts[-1].posed > _FEW * count:
        against = self.matches.contradicting(self.attempts[-1].models[0], _DRIFT)
        self.without(f'global within {reach} in order and what agrees', against)
      if self.best().is_usable(count):
        return

  def with_more_pairs(self) -> None:
    """Matches every pair of the photographs in question, and maps globally again."""
    found = self.best().evidence
    suspects = {self.names.index(name) for name in found.photographs()} if found else set()
    n = len(self.names)
    wanted = {(min(i, j), max(i, j)) for i in suspects for j in range(n) if i != j}
    before = len(self.matches.pairs)
    reconstruction.match_pairs(self.scene_dir, self.names, wanted)
    self.matches = evidence.Matches(self.scene_dir, self.names)
    if len(self.matches.pairs) > before:
      self.attempt('global with more pairs', lambda: _in_child(self.scene_dir, 'global'))


def reconstruct(
  scene_dir: str, names: Sequence[str], mapper: str, made_from: dict
) -> tuple[list, dict]:
  """Poses the photographs.

  Args:
    scene_dir: the capture, with matches.
    names: the photographs, in order.
    mapper: one of MAPPERS.
    made_from: identifies the photographs and pairs, for resuming.

  Returns:
    pycolmap's Reconstructions, largest first, and a dict for the report with the `mapper` that made
    them and all `attempts`.

  Raises:
    PosesError: COLMAP failed.
  """
  mapping = _Mapping(scene_dir, names, made_from)
  if mapper != 'auto':
    mapping.run(mapper)
  else:
    _map_until_settled(mapping)
  best = mapping.best()
  return best.models, {
    'mapper': best.name,
    'attempts': [attempt.as_json() for attempt in mapping.attempts],
  }


def _map_until_settled(mapping: _Mapping) -> None:
  second = 'incremental' if len(mapping.names) < _MANY else 'hierarchical'
  for mapper in ('global', second):
    _try(functools.partial(mapping.run, mapper))
    if mapping.attempts and mapping.is_settled():
      return
  if not mapping.attempts:
    raise photos.PosesError('COLMAP could not map the photographs; its messages are above.')
  for repair in (mapping.without_look_alikes, mapping.along_the_order, mapping.with_more_pairs):
    if mapping.best().evidence is None or mapping.best().evidence.is_clean:
      return  # More photographs would help, not other matches.
    _try(repair)


def _try(way: Callable[[], None]) -> None:
  """Maps in one way; says if that fails, since another may not."""
  try:
    way()
  except photos.PosesError as error:
    progress.say(str(error))


def read_models(folder: str, made_from: dict) -> list | None:
  """Returns the models in a folder, largest first, or None if they are not of `made_from`."""
  try:
    stamp = files.read_json(os.path.join(folder, STAMP))
    if {key: stamp.get(key) for key in made_from} != made_from:
      return None
    names = sorted(filter(str.isdigit, os.listdir(folder)), key=int)
    return [reconstruction.colmap().Reconstruction(os.path.join(folder, name)) for name in names]
  except (FileNotFoundError, files.FileError, AttributeError, ValueError):
    return None  # There are none, or they are damaged.


def write_models(
  scene_dir: str, name: str, models: Sequence, stamp: dict, stamp_file: str = STAMP
) -> None:
  """Writes models and their stamp to a folder below the capture, replacing an older one."""

  def write(temporary: str) -> None:
    for k, model in enumerate(models):
      os.mkdir(os.path.join(temporary, str(k)))
      model.write_binary(os.path.join(temporary, str(k)))
    files.write_json(os.path.join(temporary, stamp_file), stamp, 1)

  reconstruction.write_folder(write, scene_dir, name)


def forget(scene_dir: str) -> None:
  """Removes snapshots and attempts, once the finished models are written."""
  shutil.rmtree(os.path.join(scene_dir, incremental.FOLDER), ignore_errors=True)


def _in_child(scene_dir: str, mapper: str, dropped: Sequence[evidence.Pair] = ()) -> list:
  """Runs a mapper in a process of its own, so that it can be stopped and a crash is an error.

  It works on a copy of the database, in which focal lengths are calibrated and the `dropped` pairs
  are missing. If there are some, it maps more precisely, since chains of few pairs bend.
  """
  work = os.path.join(scene_dir, photos.STAGING, uuid.uuid4().hex)
  os.makedirs(work)
  copy = os.path.join(work, reconstruction.DATABASE)
  original = os.path.join(scene_dir, reconstruction.DATABASE)
  closing = contextlib.closing
  with closing(sqlite3.connect(original)) as source, closing(sqlite3.connect(copy)) as target:
    source.backup(target)
  if dropped:
    ids = reconstruction.image_ids(scene_dir)
    with reconstruction.colmap().Database.open(copy) as db:
      for pair in dropped:
        db.delete_two_view_geometry(ids[pair.a], ids[pair.b])
  try:
    images = os.path.join(scene_dir, photos.FOLDER)
    _watch(_start_child(mapper, copy, images, work, 'precise' if dropped else 'quick'), mapper)
    models = [
      reconstruction.colmap().Reconstruction(os.path.join(work, name))
      for name in filter(str.isdigit, os.listdir(work))
    ]
  finally:
    shutil.rmtree(work, ignore_errors=True)
  return incremental.largest_first(models)


def _start_child(*args: str) -> subprocess.Popen:
  code = f'from {installation.NAME}.sfm import mapping; mapping.run_child()'
  root = os.path.dirname(installation.PACKAGE)
  path = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH'))))
  return subprocess.Popen(
    [sys.executable, '-c', code, *args],
    env={**os.environ, 'PYTHONPATH': path},
    stdin=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    errors='replace',
  )


def _watch(child: subprocess.Popen, mapper: str) -> None:
  """Shows a child's stages until it ends; raises a PosesError if it fails."""
  stages, problem, began = 0, '', time.monotonic()
  try:
    with progress.Bar(f'posing photographs, {mapper}', _STAGES) as bar:
      for line in child.stderr:
        if stage := re.search(r'=== Running (.*?) ===', line):
          stages += 1
          taken = progress.duration(time.monotonic() - began)
          bar.show(min(stages, _STAGES) - 0.5, f'{stage[1]}, {taken} so far')
        elif line[:1] in 'EF' or 'Error' in line:
          problem = line.strip()
      code = child.wait()
  finally:
    child.kill()
    child.wait()
  if code:
    reason = problem[:300] or f'exit code {code}'
    raise photos.PosesError(f"COLMAP's {mapper} mapping failed ({reason}). Try another --mapper.")


def run_child() -> None:
  """The process of `_in_child`: maps the database in sys.argv into the folder in sys.argv."""
  mapper, database, images, output, precision = sys.argv[1:]
  threading.Thread(target=_end_with_parent, daemon=True).start()
  pycolmap = reconstruction.colmap()
  pycolmap.logging.logtostderr = True
  pycolmap.logging.minloglevel = pycolmap.logging.INFO.value
  pycolmap.set_random_seed(0)
  if mapper == 'hierarchical':
    options = pycolmap.HierarchicalPipelineOptions()
    options.incremental_options.min_model_size = incremental.SMALLEST_MODEL
    options.incremental_options.random_seed = 0
    pycolmap.hierarchical_mapping(database, images, output, options)
    return
  with pycolmap.Database.open(database) as db:
    known = all(camera.has_prior_focal_length for camera in db.read_all_cameras())
  if not known:
    calibration = pycolmap.ViewGraphCalibrationOptions()
    # Else they come from fundamental matrices, which is good enough where many pairs agree.
    calibration.reestimate_relative_pose = precision == 'precise'
    pycolmap.calibrate_view_graph(database, calibration)
  options = pycolmap.GlobalPipelineOptions()
  options.min_model_size = incremental.SMALLEST_MODEL
  options.random_seed = options.mapper.random_seed = 0
  options.mapper.track_required_tracks_per_view = _TRACKS[precision]
  pycolmap.global_mapping(database, images, output, options)


def _end_with_parent() -> None:
  sys.stdin.read()  # Returns when the parent has ended.
  os._exit(1)
