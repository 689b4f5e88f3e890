"""Estimates the camera poses of photographs or of a video with COLMAP.

`make` writes to the capture's folder:

  images/, images_2/, ...   upright photographs, and downsampled copies
  masks/                    if masks were given
  sparse/0/                 the largest model; 1, 2, ... are models that could not be joined to it
  database.db               features and matches
  poses.json                the options and the list of photographs, to resume from
  preflight.png, .json      the report
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import reprlib
import shutil
from collections.abc import Iterator, Sequence

from .. import colmap
from ..datasets import images, masks, pyramid
from ..system import files, warnings
from . import (
  diagnosis,
  mapping,
  photo_files,
  preflight,
  principal_point,
  reconstruction,
  refine,
  video_frames,
)
from . import given as given_lib
from . import photos as photos_lib
from .photos import FOLDER, Photo, PosesError

STATE = 'poses.json'
FACTORS = (2, 4, 8)
# Disk space, measured on 17 captures: 6 to 292 photographs of 0.05 to 0.5 megapixels, JPEG and PNG.
# Database and model took 0.6 to 1.4 times as much in most; COLMAP's limit of 8,192 features (152
# bytes each, and matches) bounds it.
_BYTES_PER_PHOTO, _BYTES_PER_PIXEL, _MOST_BYTES = 300_000, 1.7, 1_300_000
_REDUCED_BYTES_PER_PIXEL = 0.5  # PNG at 1/2, 1/4 and 1/8, by pixels of the photograph: 0.5 to 0.8.
_FULL = 1_000_000  # Free bytes: fewer than one write of COLMAP's to its database.
MATCHING = ('auto', 'exhaustive', 'sequential', 'alike')


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `make`."""

  frames: int | None = None  # Frames to extract from a video; None: chosen from its length.
  masks: str | None = None  # Folder of the photographs' masks.
  matching: str = 'auto'  # One of MATCHING.
  mapper: str = 'auto'  # One of mapping.MAPPERS.
  camera_model: str | None = None  # COLMAP's name; None: see `reconstruction.extract_features`.
  given: str | None = None  # Poses to refine: what `given.read` takes.
  fix_intrinsics: bool = False  # Whether to keep the given intrinsics.


def make(source: str, scene_dir: str, options: Options = Options()) -> dict:
  """Turns photographs or a video into a posed capture; resumes an interrupted run.

  Args:
    source: a folder of photographs, or a video file.
    scene_dir: the capture's folder; created if it does not exist.
    options: frames, masks, matching, mapper, camera model and given poses.

  Returns:
    The report, as written to preflight.json.

  Raises:
    PosesError: the source, an option or the folder cannot be used, or no photograph was posed.
    DataError, DataNotFoundError: a photograph or a mask cannot be read.
  """
  reconstruction.colmap()  # Fails before anything is written if COLMAP is not installed.
  _check(source, options)
  _check_folders(source, scene_dir)
  frames = given_lib.read(options.given) if options.given else []
  with _locked(scene_dir):
    if not files.is_file(os.path.join(scene_dir, reconstruction.DATABASE)):
      mapping.forget(scene_dir)  # A new database may number the photographs anew.
    reconstruction.check_database(scene_dir)
    with warnings.collect(echo=True) as noted:
      photos = _collect(source, scene_dir, options, frames)
    _check_space(scene_dir, [photo.name for photo in photos])
    with _full_disk_named(scene_dir):
      if frames:
        photos = _refine(scene_dir, photos, frames, options)
      else:
        pairs = _match(scene_dir, photos, options, files.is_file(source))
        _reconstruct(scene_dir, [photo.name for photo in photos], pairs, options.mapper)
    for factor in FACTORS:
      pyramid.locate(scene_dir, FOLDER, [photo.name for photo in photos], factor)
    return _report(scene_dir, photos, noted)


def _check_space(scene_dir: str, names: Sequence[str]) -> None:
  """Raises a PosesError if the disk has too little space for what is still to be made.

  COLMAP's threads end the whole process if the disk is full.
  """
  if files.exists(os.path.join(scene_dir, diagnosis.MODELS)):
    return  # All is there but what a few more photographs add.
  headers = [images.read_header(os.path.join(scene_dir, FOLDER, name)) for name in names]
  pixels = [header.width * header.height for header in headers]
  needed = sum(_BYTES_PER_PHOTO + min(_BYTES_PER_PIXEL * n, _MOST_BYTES) for n in pixels)
  needed += sum(_REDUCED_BYTES_PER_PIXEL * n for n in pixels)
  database = os.path.join(scene_dir, reconstruction.DATABASE)
  needed -= os.path.getsize(database) if files.is_file(database) else 0
  free = shutil.disk_usage(scene_dir).free
  if free < needed:
    raise PosesError(
      f'{scene_dir}: posing {len(names)} photographs takes about {needed / 1e6:,.1f} MB more on '
      f'this disk, but {free / 1e6:,.1f} MB are free. Free some space, or choose a folder on '
      'another disk.'
    )


@contextlib.contextmanager
def _full_disk_named(scene_dir: str) -> Iterator[None]:
  """Raises COLMAP's errors as those of a full disk if it is full; their text seldom says so."""
  try:
    yield
  except RuntimeError as error:
    if not files.is_disk_full(error) and shutil.disk_usage(scene_dir).free > _FULL:
      raise
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), scene_dir) from error


def _match(
  scene_dir: str, photos: Sequence[Photo], options: Options, ordered: bool, given=None
) -> int:
  """Finds and matches features; returns the number of pairs. `given`: poses to refine, or None."""
  names = [photo.name for photo in photos]
  reconstruction.extract_features(scene_dir, photos, options.camera_model)
  if given:
    given_lib.write_cameras(scene_dir, photos, given, trusted=True)
  pairs = reconstruction.choose_pairs(scene_dir, names, options.matching, ordered)
  pairs |= given_lib.near_pairs(names, given) if given else set()
  reconstruction.match_pairs(scene_dir, names, pairs)
  if given:
    given_lib.write_cameras(scene_dir, photos, given, trusted=False)
  return len(pairs)


def _refine(
  scene_dir: str, photos: Sequence[Photo], frames: Sequence, options: Options
) -> list[Photo]:
  """Refines given poses; returns the photographs with the given cameras."""
  photos, given = given_lib.assign(options.given, frames, photos, scene_dir, options.camera_model)
  pairs = _match(scene_dir, photos, options, False, given)
  refine.write(scene_dir, given, options.fix_intrinsics, pairs)
  return photos


@contextlib.contextmanager
def _locked(scene_dir: str) -> Iterator[None]:
  """Holds the capture's lock, and removes temporary files that a killed run left behind."""
  staging = os.path.join(scene_dir, photos_lib.STAGING)
  os.makedirs(staging, exist_ok=True)
  with open(os.path.join(staging, 'lock'), 'w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise PosesError(
        f'{scene_dir}: another run is working on this capture. Wait until it finishes.'
      ) from None
    for name in set(os.listdir(staging)) - {'lock'}:
      path = os.path.join(staging, name)
      shutil.rmtree(path) if files.is_folder(path) else os.remove(path)
    try:
      yield
    finally:
      shutil.rmtree(staging)


def _report(scene_dir: str, photos: Sequence[Photo], noted: Sequence[str]) -> dict:
  """Writes the report; raises a PosesError if no photograph was posed."""
  report = preflight.write(scene_dir, photos, noted)
  if not report['posed']:
    raise PosesError(
      f'None of the {len(photos)} photographs could be posed. '
      f'{os.path.join(scene_dir, preflight.FILE)}.png shows the likely reasons. Photographs with '
      'more overlap help most.'
    )
  return report


def _check(source: str, options: Options) -> None:
  if not files.exists(source):
    raise PosesError(f'{source}: no such video or folder of photographs.')
  if files.is_file(source) and source.lower().endswith((*images.EXTENSIONS, *photo_files.ENDINGS)):
    raise PosesError(f'{source}: is one photograph. Name the folder of the photographs.')
  if files.is_file(source) and options.masks:
    raise PosesError(f'{source}: --masks works with photographs, not with a video; leave it out.')
  if files.is_folder(source) and options.frames is not None:
    raise PosesError(f'{source}: --frames works with a video, not with a folder; leave it out.')
  if files.is_file(source) and options.given:
    raise PosesError(f'{source}: --from needs the folder of the posed photographs, not a video.')
  small = [f'{FOLDER}_{k}' for k in FACTORS if files.is_folder(f'{source}/{FOLDER}_{k}')]
  if small and files.is_folder(os.path.join(source, FOLDER)):
    raise PosesError(
      f'{source}: is a whole capture: besides {FOLDER}/ it has smaller copies in {small[0]}/. Name '
      f'the folder of its photographs, {os.path.join(source, FOLDER)}.'
    )
  if options.fix_intrinsics and not options.given:
    raise PosesError('--fix_intrinsics keeps the intrinsics that --from gives; add it.')
  for folder, _, names in os.walk(source):
    for name in names:
      if name != name.encode('utf-8', 'ignore').decode():
        raise PosesError(f'{os.path.join(folder, name)}: COLMAP needs names in UTF-8; rename it.')
  if options.frames is not None and options.frames < 3:
    raise PosesError(f'--frames must be at least 3, better 100, got {options.frames}.')
  if options.masks and not masks.list_masks(options.masks):
    raise PosesError(f'{options.masks}: no such folder of masks, or there are no pictures in it.')
  if options.camera_model not in (None, *colmap.LAYOUTS):
    raise PosesError(
      f'--camera_model must be one of {", ".join(colmap.LAYOUTS)}, got {options.camera_model}.'
    )


def _check_folders(source: str, scene_dir: str) -> None:
  """Raises a PosesError if the capture would mix with files that are not its own."""
  inner, outer = os.path.realpath(scene_dir), os.path.realpath(source)
  if files.is_file(scene_dir):
    raise PosesError(f'{scene_dir}: is a file. Name a folder for the capture, which may be new.')
  if files.is_folder(source) and os.path.commonpath([inner, outer]) == outer:
    raise PosesError(
      f'{scene_dir}: must not be inside the folder of photographs, {source}, since its pictures '
      'would count as photographs. Choose a folder outside it.'
    )
  if files.exists(os.path.join(scene_dir, STATE)):
    return
  for name in (diagnosis.MODELS, reconstruction.DATABASE, FOLDER):
    path = os.path.join(scene_dir, name)
    if files.exists(path) and os.path.realpath(path) != outer:
      raise PosesError(
        f'{path}: already exists and was not made by this command. Choose another folder for the '
        'capture, or move this one away.'
      )


def _collect(source: str, scene_dir: str, options: Options, frames: Sequence = ()) -> list[Photo]:
  """Brings the photographs into the capture, except those that an earlier run finished."""
  path = os.path.join(scene_dir, STATE)
  request = {'source': os.path.realpath(source), **dataclasses.asdict(options)}
  del request['matching'], request['mapper']  # A later run may map anew from more pairs.
  if not options.given:  # As in captures of earlier versions.
    del request['given'], request['fix_intrinsics']
  else:
    request['given'] = os.path.realpath(options.given)
  known = _resume(path, request)
  if files.is_file(source):
    if known:
      return known
    photos = video_frames.extract_frames(source, scene_dir, options.frames)
  else:
    own_masks = [os.path.join(scene_dir, name) for name in masks.find_folders(scene_dir)]
    masks_dir = options.masks or (own_masks[0] if own_masks else None)
    stored = given_lib.posed_as_stored(options.given, frames, source) if frames else None
    photos = photos_lib.import_photos(source, scene_dir, masks_dir, known, stored)
  used = [photo for photo in photos if not photo.same_as]
  if len(used) < 3:
    several = 's' if len(used) > 1 else ''
    raise PosesError(
      f'{source}: has {len(used)} photograph{several}; at least 3 are needed, better 50.'
    )
  _write_state(path, request, photos)
  return used


def _resume(path: str, request: dict) -> list[Photo]:
  """Returns the photographs of an earlier run with the same request; records a new request."""
  if not files.is_file(path):
    _write_state(path, request, [])
    return []
  advice = 'Remove its folder and start again.'
  state = files.read_json(path, dict, PosesError, advice)
  try:
    earlier, photos = dict(state['asked']), [Photo(**photo) for photo in state['photos']]
    _check_photos(photos)
  except (ValueError, KeyError, TypeError) as e:
    raise PosesError(f'{path}: is damaged ({e}). {advice}') from None
  for key, value in request.items():
    if earlier.get(key) != value:
      raise PosesError(
        f'{os.path.dirname(path)}: was started with {key} '
        f'{reprlib.repr(earlier.get(key))}, not {value!r}. Use the same value, or choose another '
        'folder for the capture.'
      )
  return photos


def _write_state(path: str, request: dict, photos: Sequence[Photo]) -> None:
  state = {'asked': request, 'photos': [dataclasses.asdict(photo) for photo in photos]}
  files.write_json(path, state, 1)


def _check_photos(photos: Sequence[Photo]) -> None:
  """Raises a ValueError if a value of a photograph has the wrong type."""
  for photo in photos:
    for field in dataclasses.fields(photo):
      kind = {'str': str, 'float': (int, float), 'int': int}[field.type]
      if not isinstance(getattr(photo, field.name), kind):
        raise ValueError(f'{field.name} must be a {field.type}')


def _reconstruct(scene_dir: str, names: list[str], pairs: int, mapper: str) -> None:
  """Writes sparse/0, 1, ... unless they were made from the same photographs and pairs."""
  folder = os.path.join(scene_dir, diagnosis.MODELS)
  made_from = {'photographs': sorted(names), 'pairs': pairs}
  same = {**made_from, **({} if mapper == 'auto' else {'mapper': mapper})}
  if mapping.read_models(folder, same) is not None:
    return
  models, account = mapping.reconstruct(scene_dir, names, mapper, made_from)
  if models:
    models[0], account['principal_points'] = principal_point.refine(models[0])
  mapping.write_models(scene_dir, diagnosis.MODELS, models, {**made_from, **account})
  mapping.forget(scene_dir)
