"""From photographs or a video to a posed capture, by COLMAP.

What `make` leaves in the capture's folder:

  images/, images_2/, ...   upright photographs, and smaller ones
  masks/                    where given
  sparse/0/                 the largest model; 1, 2, ... those that could not be joined to it
  database.db               features and matches
  poses.json                what was asked for, and the photographs, by which a second run goes on
  preflight.png, .json      the report
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence

from .. import colmap
from ..datasets import masks, pyramid
from ..system import files
from . import diagnosis, preflight, reconstruction, video_frames
from . import photos as photos_lib
from .photos import FOLDER, Photo, PosesError

STATE = 'poses.json'
_MATCHED = 'models.json'  # Inside sparse/: what its models were made from.
FACTORS = (2, 4, 8)
MATCHING = ('auto', 'exhaustive', 'sequential', 'alike')

__all__ = ['FACTORS', 'MATCHING', 'STATE', 'Options', 'Photo', 'PosesError', 'make']


@dataclasses.dataclass(frozen=True)
class Options:
  """How a capture is made."""

  frames: int | None = None  # Of a video; None: by its length.
  masks: str | None = None  # The folder of the photographs' masks.
  matching: str = 'auto'
  camera_model: str | None = None


def make(source: str, scene_dir: str, options: Options = Options()) -> dict:
  """Makes a posed capture of photographs or of a video; goes on where a run before stopped.

  Args:
    source: a folder of photographs, or a video.
    scene_dir: the capture's folder; is made.
    options: how.

  Returns:
    The report, as preflight.json has it.

  Raises:
    PosesError: the photographs or the folder cannot be used, or none could be placed.
    DataError, DataNotFoundError: a photograph cannot.
  """
  reconstruction.colmap()  # Before anything is written.
  _check(source, options)
  _check_places(source, scene_dir)
  with _alone(scene_dir):
    photos = _collect(source, scene_dir, options)
    names = [photo.name for photo in photos]
    reconstruction.extract(scene_dir, photos, options.camera_model)
    wanted = reconstruction.choose_pairs(scene_dir, names, options.matching, os.path.isfile(source))
    reconstruction.match(scene_dir, names, wanted)
    _reconstruct(scene_dir, names, len(wanted))
    for factor in FACTORS:
      if not os.path.isdir(os.path.join(scene_dir, pyramid.folder_name(FOLDER, factor))):
        pyramid.make(scene_dir, FOLDER, factor)
    return _report(scene_dir, photos)


@contextlib.contextmanager
def _alone(scene_dir: str) -> Iterator[None]:
  """Within, no other run works on the capture, and nothing is left of one that was killed."""
  staging = os.path.join(scene_dir, photos_lib.STAGING)
  os.makedirs(staging, exist_ok=True)
  with open(os.path.join(staging, 'lock'), 'w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Until it is closed, or this process ends.
    except BlockingIOError:
      raise PosesError(f'{scene_dir}: another run is making it. Wait for its end.') from None
    for name in set(os.listdir(staging)) - {'lock'}:
      path = os.path.join(staging, name)
      shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    try:
      yield
    finally:
      shutil.rmtree(staging)


def _report(scene_dir: str, photos: Sequence[Photo]) -> dict:
  """Writes the report; an error if there is nothing else."""
  told = preflight.write(scene_dir, photos)
  if not told['posed']:
    raise PosesError(
      f'None of the {len(photos)} photographs could be placed: '
      f'{os.path.join(scene_dir, preflight.FILE)}.png says why, likely. More overlap between them '
      'helps most.'
    )
  return told


def _check(source: str, options: Options) -> None:
  if not os.path.exists(source):
    raise PosesError(f'{source}: no such video or folder of photographs.')
  if os.path.isfile(source) and options.masks:
    raise PosesError('Masks are for photographs, not for a video: leave --masks out.')
  if os.path.isdir(source) and options.frames is not None:
    raise PosesError(f'{source}: is a folder, and --frames is for a video: leave it out.')
  if options.frames is not None and options.frames < 3:
    raise PosesError(f'--frames {options.frames}: to pose pictures takes 3, better 100.')
  if options.masks and not os.path.isdir(options.masks):
    raise PosesError(f'{options.masks}: no such folder of masks.')
  if options.camera_model not in (None, *colmap.LAYOUTS):
    raise PosesError(
      f'--camera_model {options.camera_model}: training knows {", ".join(colmap.LAYOUTS)}.'
    )


def _check_places(source: str, scene_dir: str) -> None:
  """Nobody's files are in the way."""
  inner, outer = os.path.realpath(scene_dir), os.path.realpath(source)
  if os.path.isdir(source) and os.path.commonpath([inner, outer]) == outer:
    raise PosesError(
      f'{scene_dir}: lies in the folder of the photographs, {source}, and would be taken for some. '
      'Name a folder beside it.'
    )
  if os.path.exists(os.path.join(scene_dir, STATE)):
    return
  for name in (diagnosis.MODELS, reconstruction.DATABASE, FOLDER):
    path = os.path.join(scene_dir, name)
    if os.path.exists(path) and os.path.realpath(path) != outer:
      raise PosesError(
        f'{path}: is there already and was not made by this command. Name another folder for the '
        'capture, or move it away.'
      )


def _collect(source: str, scene_dir: str, options: Options) -> list[Photo]:
  """The photographs, in place; those of a run before are not made again."""
  path = os.path.join(scene_dir, STATE)
  asked = {'source': os.path.realpath(source), **dataclasses.asdict(options)}
  del asked['matching']  # A second run may match more.
  known: list[Photo] = []
  if os.path.isfile(path):
    before, known = _read_state(path)
    for key, value in asked.items():
      if before.get(key) != value:
        raise PosesError(
          f'{scene_dir}: was begun with {key} {before.get(key)!r}, not {value!r}. Say the same '
          'again, or name another folder for the capture.'
        )
    if os.path.isfile(source) and known:
      return known
  else:
    _write_state(path, asked, [])
  if os.path.isfile(source):
    photos = video_frames.take_frames(source, scene_dir, options.frames)
  else:
    there = os.path.join(scene_dir, masks.FOLDER)
    masks_dir = options.masks or (there if os.path.isdir(there) else None)
    photos = photos_lib.take_photos(source, scene_dir, masks_dir, known)
  if len(photos) < 3:
    raise PosesError(f'{source}: has {len(photos)} photographs. To pose them takes 3, better 50.')
  in_place = os.path.realpath(source) == os.path.realpath(os.path.join(scene_dir, FOLDER))
  if known and len(photos) != len(known) and not in_place:
    for factor in FACTORS:  # They lack what was added.
      shutil.rmtree(os.path.join(scene_dir, pyramid.folder_name(FOLDER, factor)), True)
  _write_state(path, asked, photos)
  return photos


def _read_state(path: str) -> tuple[dict, list[Photo]]:
  try:
    with open(path, encoding='utf-8') as f:
      state = json.load(f)
    return state['asked'], [Photo(**photo) for photo in state['photos']]
  except (ValueError, KeyError, TypeError) as e:
    raise PosesError(f'{path}: is damaged ({e}). Remove it and the folder it is in.') from None


def _write_state(path: str, asked: dict, photos: Sequence[Photo]) -> None:
  state = {'asked': asked, 'photos': [dataclasses.asdict(photo) for photo in photos]}
  with files.whole(path) as temporary, open(temporary, 'w', encoding='utf-8') as f:
    json.dump(state, f, indent=1)


def _reconstruct(scene_dir: str, names: list[str], pairs: int) -> None:
  """Writes sparse/0, 1, ... unless they were made from just these photographs and pairs."""
  folder = os.path.join(scene_dir, diagnosis.MODELS)
  made_from = {'photographs': sorted(names), 'pairs': pairs}
  stamp = os.path.join(folder, _MATCHED)
  if os.path.isfile(stamp):
    with open(stamp, encoding='utf-8') as f:
      if json.load(f) == made_from:
        return
  models = reconstruction.reconstruct(scene_dir, len(names))

  def write(temporary: str) -> None:
    for k, model in enumerate(models):
      os.mkdir(os.path.join(temporary, str(k)))
      model.write_binary(os.path.join(temporary, str(k)))
    with open(os.path.join(temporary, _MATCHED), 'w', encoding='utf-8') as f:
      json.dump(made_from, f)

  reconstruction.write_whole(write, scene_dir, diagnosis.MODELS)
  reconstruction.forget_snapshots(scene_dir)
