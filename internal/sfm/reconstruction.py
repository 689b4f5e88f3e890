"""The stages that COLMAP does, each going on from where it was stopped: features, matches, models.

All that the first two stages find is in the capture's database.db, block by block, and what is in
there is not done again. While photographs are placed, the model so far is saved every minute or so.
"""

from __future__ import annotations

import collections
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence

import numpy as np

from ..datasets import masks
from ..system import progress, signals
from . import pairs
from . import photos as photos_lib

DATABASE = 'database.db'
_SNAPSHOTS = '.mapping'
_SNAPSHOT_SECONDS = 60.0
_FEATURES_AT_ONCE = 8  # Photographs: a stop loses at most this many.
_FEW = 20  # Photographs that are too few to fit OPENCV's eight numbers to.
_SMALLEST_MODEL = 3


def colmap():
  """pycolmap, told to be quiet.

  Raises:
    PosesError: it is not installed.
  """
  first = 'pycolmap' not in sys.modules
  try:
    import pycolmap
  except ImportError as e:
    raise photos_lib.PosesError(
      f'To pose photographs takes COLMAP: pip install -r requirements-poses.txt ({e}).'
    ) from None
  if first:
    signals.listen_again()  # It answers SIGTERM with a stack trace.
  pycolmap.logging.minloglevel = pycolmap.logging.FATAL.value
  return pycolmap


def database(scene_dir: str):
  """The capture's database, made where there is none; a context manager."""
  return colmap().Database.open(os.path.join(scene_dir, DATABASE))


def image_ids(scene_dir: str) -> dict[str, int]:
  """The database's number of each photograph."""
  with database(scene_dir) as db:
    return {image.name: image.image_id for image in db.read_all_images()}


def extract(scene_dir: str, photos: Sequence[photos_lib.Photo], camera_model: str | None) -> None:
  """Finds the features of the photographs that have none yet.

  Args:
    scene_dir: the capture; photographs in images/, masks in masks/.
    photos: pictures of one `camera` share its intrinsics.
    camera_model: COLMAP's name; None: OPENCV, or SIMPLE_RADIAL for a camera of few photographs.
  """
  pycolmap = colmap()
  folders = _folders(scene_dir)
  groups = collections.defaultdict(list)
  for photo in photos:
    groups[photo.camera].append(photo.name)
  database(scene_dir).close()
  work = []
  for names in groups.values():
    options = pycolmap.ImageReaderOptions()
    options.camera_model = camera_model or ('SIMPLE_RADIAL' if len(names) < _FEW else 'OPENCV')
    _import(scene_dir, names, options)
    masks_dir = os.path.join(scene_dir, masks.FOLDER)
    if os.path.isdir(masks_dir):
      options.mask_path = masks_dir
    todo = _without_features(scene_dir, names)
    work += [
      (todo[k : k + _FEATURES_AT_ONCE], options) for k in range(0, len(todo), _FEATURES_AT_ONCE)
    ]
  if not work:
    return
  for names, options in progress.track(work, f'finding features, {_FEATURES_AT_ONCE} at once'):
    pycolmap.extract_features(*folders, names, pycolmap.CameraMode.SINGLE, options)


def _folders(scene_dir: str) -> tuple[str, str]:
  return os.path.join(scene_dir, DATABASE), os.path.join(scene_dir, photos_lib.FOLDER)


def _import(scene_dir: str, names: list[str], options) -> None:
  """Adds photographs of one camera that the database does not have."""
  pycolmap = colmap()
  known = image_ids(scene_dir)
  missing = [name for name in names if name not in known]
  if not missing:
    return
  of_camera = next((known[name] for name in names if name in known), None)
  if of_camera is not None:
    with database(scene_dir) as db:
      options.existing_camera_id = db.read_image(of_camera).camera_id
  pycolmap.import_images(*_folders(scene_dir), pycolmap.CameraMode.SINGLE, missing, options)
  options.existing_camera_id = -1


def _without_features(scene_dir: str, names: list[str]) -> list[str]:
  ids = image_ids(scene_dir)
  with database(scene_dir) as db:
    return [n for n in names if not (db.exists_keypoints(ids[n]) and db.exists_descriptors(ids[n]))]


def choose_pairs(scene_dir: str, names: Sequence[str], matching: str, ordered: bool) -> set:
  """Which of the photographs, by their places in `names`, are to be matched.

  Args:
    scene_dir: the capture, with features.
    names: the photographs in their order.
    matching: 'exhaustive', 'sequential', 'alike' or 'auto', which chooses among them.
    ordered: whether the order is known to mean something (a video); else it is found out.
  """
  n = len(names)
  if matching == 'exhaustive' or (matching == 'auto' and n <= pairs.EXHAUSTIVE):
    return pairs.exhaustive(n)
  ids = image_ids(scene_dir)
  with database(scene_dir) as db:
    similarity = pairs.similarities(lambda i: _largest(db, ids[names[i]]), n)
  if matching == 'sequential' or (matching == 'auto' and (ordered or pairs.is_ordered(similarity))):
    return pairs.sequential(n) | pairs.alike(similarity, pairs.ALIKE)
  return pairs.alike(similarity, pairs.ALIKE_ALONE)


def _largest(db, image_id: int) -> np.ndarray:
  """Descriptors of a photograph, [features, 128], the features of the largest scale first."""
  descriptors = db.read_descriptors(image_id).data
  shape = db.read_keypoints(image_id)[:, 2:6]  # An affine shape [2, 2], row by row.
  size = np.abs(shape[:, 0] * shape[:, 3] - shape[:, 1] * shape[:, 2])
  return descriptors[np.argsort(-size, kind='stable')]


def match(scene_dir: str, names: Sequence[str], wanted: set) -> None:
  """Matches and verifies those of the wanted pairs that are not in the database yet."""
  pycolmap = colmap()
  ids = image_ids(scene_dir)
  with database(scene_dir) as db:
    left = [p for p in wanted if not _is_matched(db, ids[names[p[0]]], ids[names[p[1]]])]
  if not left:
    return
  path = _folders(scene_dir)[0]
  for block in progress.track(pairs.blocks(left), f'matching {len(left)} pairs, in blocks'):
    with tempfile.NamedTemporaryFile('w', suffix='.txt', encoding='utf-8') as f:
      f.writelines(f'{names[i]} {names[j]}\n' for i, j in block)
      f.flush()
      options = pycolmap.ImportedPairingOptions()
      options.match_list_path = f.name
      pycolmap.match_image_pairs(path, pairing_options=options)


def _is_matched(db, a: int, b: int) -> bool:
  return db.exists_matches(a, b) and db.exists_two_view_geometry(a, b)


def reconstruct(scene_dir: str, count: int) -> list:
  """Places the photographs: pycolmap's Reconstructions, the largest first.

  A model that was saved by a run before is gone on with if it has more than half of the
  photographs, since then it is the largest whatever comes; else they are placed anew.

  Args:
    scene_dir: the capture, with matches.
    count: photographs.
  """
  pycolmap = colmap()
  pycolmap.set_random_seed(0)
  options = pycolmap.IncrementalPipelineOptions()
  options.min_model_size = _SMALLEST_MODEL
  options.random_seed = 0
  database_path, options.image_path = _folders(scene_dir)
  manager = pycolmap.ReconstructionManager()
  snapshots = os.path.join(scene_dir, _SNAPSHOTS)
  if (newest := _newest_snapshot(snapshots, count)) is not None:
    manager.read(newest)
  with pycolmap.Database.open(database_path) as db:
    pipeline = pycolmap.IncrementalPipeline(options, db, manager)
  watch = _Watch(manager, count, scene_dir)
  events = pycolmap.IncrementalPipelineCallback
  for event in (events.INITIAL_IMAGE_PAIR_REG_CALLBACK, events.NEXT_IMAGE_REG_CALLBACK):
    pipeline.add_callback(event.value, watch)
  try:
    pipeline.run()
  finally:
    watch.close()
  models = [manager.get(k) for k in range(manager.size())]
  return sorted(models, key=lambda m: (-m.num_reg_images(), -m.num_points3D()))


class _Watch:
  """Tells how many photographs are placed, and saves the model now and then."""

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
      label = 'placing photographs' + (f', model {size}' if size > 1 else '')
      self._bar = progress.Bar(label, self._count).__enter__()
    self._bar.show(min(model.num_reg_images(), self._count))
    if time.monotonic() - self._saved > _SNAPSHOT_SECONDS:
      _save_snapshot(model, self._scene_dir)
      self._saved = time.monotonic()

  def close(self) -> None:
    if self._bar is not None:
      self._bar.__exit__()


def _save_snapshot(model, scene_dir: str) -> None:
  """Saves a model, and removes those saved before."""
  folder = os.path.join(scene_dir, _SNAPSHOTS)
  before = _listed(folder)
  number = int(before[-1]) + 1 if before else 0
  write_whole(model.write_binary, scene_dir, f'{_SNAPSHOTS}/{number:06d}')
  for name in before:
    shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def write_whole(write: Callable[[str], None], scene_dir: str, name: str) -> None:
  """Has `write` fill a folder, which gets its name, and replaces what had it, once it is whole."""
  folder = os.path.join(scene_dir, name)
  temporary = os.path.join(scene_dir, photos_lib.STAGING, uuid.uuid4().hex)
  os.makedirs(temporary)
  write(temporary)
  os.makedirs(os.path.dirname(folder), exist_ok=True)
  if os.path.exists(folder):
    old = f'{temporary}.old'
    os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old)
  else:
    os.rename(temporary, folder)


def _listed(folder: str) -> list[str]:
  return sorted(n for n in os.listdir(folder) if n.isdigit()) if os.path.isdir(folder) else []


def _newest_snapshot(folder: str, count: int) -> str | None:
  """The newest saved model, if it has more than half of the photographs."""
  for name in reversed(_listed(folder)):
    path = os.path.join(folder, name)
    if colmap().Reconstruction(path).num_reg_images() > count / 2:
      return path
  return None


def forget_snapshots(scene_dir: str) -> None:
  """Once the models are in their place."""
  shutil.rmtree(os.path.join(scene_dir, _SNAPSHOTS), ignore_errors=True)
