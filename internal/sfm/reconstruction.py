"""Features and matches, by COLMAP.

They go to the capture's database.db as they are found; those it already has are not computed again.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import shutil
import sqlite3
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from concurrent import futures

import numpy as np

from ..datasets import masks
from ..system import files, installation, progress, signals
from ..training import pixel_store
from . import pairs
from . import photos as photos_lib

DATABASE = 'database.db'
_FEATURES_AT_ONCE = 16  # An interruption loses the features of at most 16 photographs.
_BYTES_PER_PIXEL = 230  # That SIFT needs in each thread: 1.6 GiB for 12 megapixels or more.
_FEW = 20  # With fewer photographs, OPENCV's eight intrinsics are poorly determined.
_PIXELS_PER_FEATURE, _FEWEST = 100, 4096
_PAIRS_AT_ONCE, _POLL_SECONDS = 100, 0.5  # COLMAP can be interrupted after so many pairs.
# Share of right matches from which verification tries often enough to find them. COLMAP's is 0.25;
# of 100 pairs that are verified with that, 99 have more than 0.5.
_FEWEST_INLIERS = 0.5
VERIFIED = 15  # Inliers from which two photographs count as matched.


def colmap():
  """Imports pycolmap and silences its log.

  Raises:
    PosesError: pycolmap is not installed.
  """
  first = 'pycolmap' not in sys.modules
  try:
    import pycolmap
  except ImportError as e:
    raise photos_lib.PosesError(
      f'COLMAP is not installed: {installation.install_text("poses")} ({e}).'
    ) from None
  if first:
    signals.listen_again()  # Its import installs a SIGTERM handler that prints a stack trace.
  pycolmap.logging.minloglevel = pycolmap.logging.FATAL.value
  return pycolmap


def database(scene_dir: str):
  """Opens the capture's database, which is created if missing; a context manager."""
  return colmap().Database.open(os.path.join(scene_dir, DATABASE))


def check_database(scene_dir: str) -> None:
  """Raises a PosesError if the capture's database is damaged; COLMAP would crash."""
  path = os.path.join(scene_dir, DATABASE)
  if not files.is_file(path):
    return
  try:
    with contextlib.closing(sqlite3.connect(path)) as db:
      (answer,) = db.execute('PRAGMA quick_check(1)').fetchone()
  except sqlite3.DatabaseError as e:
    answer = str(e)
  if answer != 'ok':
    reason = ' '.join(answer.split())[:200]
    raise photos_lib.PosesError(
      f'{path}: is damaged ({reason}). Remove it; its features and matches are computed again.'
    )


def image_ids(scene_dir: str) -> dict[str, int]:
  """Returns the database's id of each photograph, by name."""
  with database(scene_dir) as db:
    return {image.name: image.image_id for image in db.read_all_images()}


def extract_features(
  scene_dir: str, photos: Sequence[photos_lib.Photo], camera_model: str | None
) -> None:
  """Extracts the SIFT features of the photographs that have none yet.

  Args:
    scene_dir: the capture, with photographs in images/ and masks in masks/.
    photos: the photographs; those with the same `camera` share intrinsics.
    camera_model: COLMAP's name; None: OPENCV, or SIMPLE_RADIAL for cameras with fewer than 20
      photographs.
  """
  pycolmap = colmap()
  database_path, images = folders(scene_dir)
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
    if files.is_folder(masks_dir):
      options.mask_path = masks_dir
    todo = _without_features(scene_dir, names)
    work += [
      (todo[k : k + _FEATURES_AT_ONCE], options) for k in range(0, len(todo), _FEATURES_AT_ONCE)
    ]
  if not work:
    return
  limits = _feature_options(scene_dir)
  for names, options in progress.track(work, f'finding features, {_FEATURES_AT_ONCE} at once'):
    pycolmap.extract_features(
      database_path, images, names, pycolmap.CameraMode.SINGLE, options, limits
    )


def _feature_options(scene_dir: str):
  """Returns options whose threads fit in half of the free memory, and whose features in a picture.

  The smallest features of a small picture match no better than chance, and matching takes time by
  the square of their number: a picture gets one for 100 pixels, from 4,096 to COLMAP's 8,192.
  """
  options = colmap().FeatureExtractionOptions()
  with database(scene_dir) as db:
    sizes = [(camera.width, camera.height) for camera in db.read_all_cameras()]
  largest = options.eff_max_image_size()  # Larger photographs are reduced to this side.
  pixels = max(w * h * min(1, largest / max(w, h)) ** 2 for w, h in sizes)
  most = options.sift.max_num_features
  options.sift.max_num_features = int(np.clip(pixels / _PIXELS_PER_FEATURE, _FEWEST, most))
  free = pixel_store.available_memory()
  if free is not None:
    room = free / 2 / (_BYTES_PER_PIXEL * pixels)
    options.num_threads = int(np.clip(room, 1, os.cpu_count() or 1))
  return options


def folders(scene_dir: str) -> tuple[str, str]:
  """Returns the paths of the capture's database and photographs."""
  return os.path.join(scene_dir, DATABASE), os.path.join(scene_dir, photos_lib.FOLDER)


def _import(scene_dir: str, names: list[str], options) -> None:
  """Adds the photographs of one camera that the database does not have yet."""
  pycolmap = colmap()
  known = image_ids(scene_dir)
  missing = [name for name in names if name not in known]
  if not missing:
    return
  of_camera = next((known[name] for name in names if name in known), None)
  if of_camera is not None:
    with database(scene_dir) as db:
      options.existing_camera_id = db.read_image(of_camera).camera_id
  pycolmap.import_images(*folders(scene_dir), pycolmap.CameraMode.SINGLE, missing, options)
  options.existing_camera_id = -1


def _without_features(scene_dir: str, names: list[str]) -> list[str]:
  ids = image_ids(scene_dir)
  with database(scene_dir) as db:
    return [n for n in names if not (db.exists_keypoints(ids[n]) and db.exists_descriptors(ids[n]))]


def choose_pairs(scene_dir: str, names: Sequence[str], matching: str, ordered: bool) -> set:
  """Returns the pairs (i, j), i < j, of photographs to match, as indices into `names`.

  Args:
    scene_dir: the capture, with features.
    names: the photographs, in order.
    matching: 'exhaustive', 'sequential', 'alike', or 'auto', which chooses one of these.
    ordered: True if consecutive photographs are known to be neighbours, as in a video; otherwise
      `pairs.is_ordered` decides.
  """
  n = len(names)
  if matching == 'exhaustive' or (matching == 'auto' and n <= pairs.FEW):
    return pairs.exhaustive(n)
  ids = image_ids(scene_dir)
  with database(scene_dir) as db:
    similarity = pairs.similarities(lambda i: _largest(db, ids[names[i]]), n)
  if matching == 'sequential' or (matching == 'auto' and (ordered or pairs.is_ordered(similarity))):
    return pairs.sequential(n) | pairs.alike(similarity, pairs.ALIKE)
  if matching == 'auto' and n <= pairs.EXHAUSTIVE:
    return pairs.exhaustive(n)
  return pairs.alike(similarity, pairs.ALIKE_ALONE)


def _largest(db, image_id: int) -> np.ndarray:
  """Returns the descriptors of a photograph, [features, 128], sorted by scale, largest first."""
  descriptors = db.read_descriptors(image_id).data
  shape = db.read_keypoints(image_id)[:, 2:6]  # [features, 4], an affine [2, 2] row by row.
  area = np.abs(shape[:, 0] * shape[:, 3] - shape[:, 1] * shape[:, 2])
  return descriptors[np.argsort(-area, kind='stable')]


def match_pairs(scene_dir: str, names: Sequence[str], wanted: set) -> None:
  """Matches and verifies the wanted pairs that are not in the database yet."""
  pycolmap = colmap()
  ids = image_ids(scene_dir)
  with database(scene_dir) as db:
    missing = [(i, j) for i, j in wanted if not _is_matched(db, ids[names[i]], ids[names[j]])]
  if not missing:
    return
  pairing, verification = pycolmap.ImportedPairingOptions(), pycolmap.TwoViewGeometryOptions()
  pairing.block_size = _PAIRS_AT_ONCE
  verification.ransac.min_inlier_ratio = _FEWEST_INLIERS
  with tempfile.NamedTemporaryFile('w', suffix='.txt', encoding='utf-8') as f:
    f.writelines(f'{names[i]} {names[j]}\n' for i, j in pairs.in_blocks(missing))
    f.flush()
    pairing.match_list_path = f.name
    # One call for all, since each sorts the features of its photographs anew.
    match = functools.partial(
      pycolmap.match_image_pairs, pairing_options=pairing, verification_options=verification
    )
    _watch_matching(match, scene_dir, len(missing))


def _watch_matching(match: Callable, scene_dir: str, count: int) -> None:
  """Calls match(path, cancellation_token=...) and shows how many of `count` pairs it has done."""
  token, path = colmap().CancellationToken(), folders(scene_dir)[0]
  # COLMAP counts them: a second SQLite in this process would undo the locks of COLMAP's.
  with (
    database(scene_dir) as db,
    progress.Bar(f'matching {count} pairs', count) as bar,
    futures.ThreadPoolExecutor(1) as worker,
  ):
    before, call = _count_matched(db), worker.submit(match, path, cancellation_token=token)
    try:
      while not futures.wait([call], _POLL_SECONDS).done:
        bar.show(_count_matched(db) - before)
    finally:
      token.cancel()  # If an exception, such as a KeyboardInterrupt, ends the loop.
    call.result()


def _count_matched(db) -> int:
  """Returns the number of pairs that a database has, also while COLMAP adds some."""
  return db.num_matched_image_pairs()


def _is_matched(db, a: int, b: int) -> bool:
  return db.exists_matches(a, b) and db.exists_two_view_geometry(a, b)


def write_folder(write: Callable[[str], None], scene_dir: str, name: str) -> None:
  """Calls `write(temporary folder)`, then renames the folder to `name`, replacing an older one."""
  folder = os.path.join(scene_dir, name)
  temporary = os.path.join(scene_dir, photos_lib.STAGING, uuid.uuid4().hex)
  os.makedirs(temporary)
  write(temporary)
  os.makedirs(os.path.dirname(folder), exist_ok=True)
  if files.exists(folder):
    old = f'{temporary}.old'
    os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old)
  else:
    os.rename(temporary, folder)
