"""transforms.json of instant-ngp and nerfstudio, for photographs.

Poses are camera to world with OpenGL axes; for the cameras see `transforms_cameras`. The world is
normalised by PCA, as for a COLMAP-posed folder. Alpha is composited on white. What a file has and
this program does not use is named in a warning.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import configs
from ..system import files, warnings
from . import consistency, images, lookup, scenes, transforms_cameras
from . import frames as frames_lib

_SPLITS = ('train_filenames', 'val_filenames', 'test_filenames')
_USED = {
  *transforms_cameras.KEYS, *_SPLITS, 'frames', 'file_path', 'transform_matrix', 'mask_path',
  'applied_transform', 'applied_scale', 'ply_file_path',
}  # fmt: skip
# Keys that describe the files and change nothing in any program.
_METADATA = {
  'author', 'blur_score', 'cam_id', 'camera', 'camera_id', 'camera_label', 'capture_time',
  'colmap_im_id',
  'comment', 'comments', 'created', 'created_at', 'creator', 'dataset', 'date', 'datetime',
  'description', 'device', 'device_name', 'fps', 'frame', 'frame_id', 'frame_idx',
  'frame_number', 'frame_rate', 'generator', 'id', 'idx', 'image_id', 'image_idx', 'image_index',
  'img_id', 'index', 'info', 'label', 'license', 'motion_blur_score', 'name', 'num_frames',
  'rotation', 'scene', 'scene_id', 'scene_name', 'sharpness', 'software', 'source', 'time_stamp',
  'timestamp', 'title', 'url', 'uuid', 'version',
}  # fmt: skip


def load(config: configs.Config, read_only: bool = False) -> scenes.Scene:
  """Loads `transforms.json`.

  Images are sorted by file name. The split is that of train_filenames and test_filenames (or
  val_filenames); without them every llffhold-th image is held out. `images_<factor>/` is used, and
  made, as for a COLMAP-posed folder.

  Raises:
    DataNotFoundError: the folder, the file or a picture is missing.
    DataError: a file is damaged or contradicts another.
  """
  data_dir = frames_lib.capture_dir(config.data_dir)
  path = os.path.join(data_dir, 'transforms.json')
  table = read_table(path)
  frames = sorted(read_frames(data_dir, path, table), key=lambda frame: frame.name)
  _warn_of_other_files(data_dir)
  if any(key in table for key in _SPLITS):
    split = _listed_split(path, table, frames)
  else:
    split = _split_every(frames, config.llffhold)
  scene = frames_lib.assemble(
    'transforms',
    data_dir,
    frames,
    frames_lib.world_pca,
    split,
    factor=config.factor,
    background='white',
    unregistered=frames_lib.unposed(data_dir, frames),
    read_only=read_only,
    config=config,
  )
  try:
    points_file(data_dir, table)
  except (images.DataError, OSError) as e:
    warnings.warn(f'{path}: {e} Previews and the viewer show no sparse points.')
  return dataclasses.replace(scene, applied=_read_applied(path, table))


def read_table(path: str) -> dict[str, Any]:
  """Reads the JSON object of a transforms file.

  Raises:
    DataNotFoundError, DataError: the file is missing, or has no frames.
  """
  hint = "For a folder with a COLMAP model in sparse/0 use Config.dataset_loader = 'llff'."
  table = read_json(path, hint)
  frames = table.get('frames') if isinstance(table, dict) else None
  if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
    raise images.DataError(f"{path}: has no list of 'frames'. Export it again.")
  if not frames:
    raise images.DataError(f"{path}: its list of 'frames' is empty. Pose the pictures again.")
  return table


def read_json(path: str, hint: str) -> Any:
  """Reads a JSON file; `hint` ends the message if it does not exist.

  Raises:
    DataNotFoundError, DataError: the file is missing, or is not valid JSON.
  """
  if not files.is_file(path):
    raise images.DataNotFoundError(f'No such file: {path!r}. {hint}')
  return files.read_json(path, object, images.DataError, 'Export it again.')


def read_frames(data_dir: str, path: str, table: dict[str, Any]) -> list[frames_lib.Frame]:
  """Returns the frames of a transforms file, in its order.

  Raises:
    DataError, DataNotFoundError: a value or a picture is missing or invalid.
  """
  result, notes = [], {}
  pictures = _find_pictures(data_dir, path, table)
  existing = {file: None for file in pictures if files.is_file(os.path.join(data_dir, file))}
  for number, (own, file) in enumerate(zip(table['frames'], pictures), 1):
    where = f'{path}: frame {number} ({normal_name(own["file_path"])})'
    sized = file if file in existing else next(iter(existing), file)
    result.append(_read_frame(data_dir, where, own, table, file, sized))
  usual = collections.Counter(frame.size for frame in result).most_common(1)[0][0]
  for own, frame in zip(table['frames'], result):
    found = transforms_cameras.contradictions(own, table, frame.size, frame.model, usual)
    for what, example in found:
      notes.setdefault(what, []).append(f'{frame.name}: {example}')
  _warn_of_unused_keys(path, table)
  for what, found in notes.items():
    warnings.warn(f'{path}: {what} ({len(found)} of {len(result)} frames, e.g. {found[0]}).')
  consistency.doubt_convention(path, np.array([frame.pose for frame in result]))
  return result


def _find_pictures(data_dir: str, path: str, table: Mapping[str, Any]) -> list[str]:
  """Returns the pictures of the frames, relative to data_dir; some may be missing."""
  names = [own.get('file_path') for own in table['frames']]
  for number, name in enumerate(names, 1):
    if not isinstance(name, str):
      what = "has no 'file_path'"
      if name is not None:
        what = f'has the file_path {reprlib.repr(name)}, which must be text'
      raise images.DataError(f'{path}: frame {number} {what}. Export it again.')
  pictures = lookup.find(data_dir, names)
  for number, picture in enumerate(pictures, 1):
    if picture is not None:
      with frames_lib.prefix_errors(f'{path}: frame {number}'):
        images.inside(data_dir, picture)
  return [picture or lookup.inner_name(name) for name, picture in zip(names, pictures)]


def _read_frame(
  data_dir: str,
  where: str,
  own: Mapping[str, Any],
  table: Mapping[str, Any],
  file: str,
  sized: str,
) -> frames_lib.Frame:
  """Returns the frame of the keys `own`.

  Args:
    data_dir: the capture.
    where: starts the messages of errors.
    own: keys of the frame.
    table: keys of the file.
    file: the picture, relative to data_dir.
    sized: a picture whose size counts if neither the frame nor the file has one: that of the frame,
      or of another frame if it is missing.
  """
  values = transforms_cameras.choose(own, table)
  size = transforms_cameras.read_size(where, values, os.path.join(data_dir, sized))
  model = transforms_cameras.read_model(where, values)
  folder, _, rest = file.partition('/')
  return frames_lib.Frame(
    name=normal_name(own['file_path']),
    folder=folder if rest else '',
    file=rest or folder,
    intrinsics=transforms_cameras.read_intrinsics(where, values, size, model, [*own, *table]),
    size=size,
    pose=_read_pose(where, own),
    model=model,
    mask=_read_mask(where, own.get('mask_path') or table.get('mask_path'), data_dir, file == sized),
  )


def _warn_of_unused_keys(path: str, table: Mapping[str, Any]) -> None:
  """Warns of keys with a value that are neither used nor metadata."""

  def unused(source: Mapping[str, Any]) -> list[str]:
    ignored = _USED | _METADATA
    return [key for key in source if key not in ignored and key[:1] != '_' and _is_on(source[key])]

  counts = collections.Counter(key for own in table['frames'] for key in unused(own))
  keys = [reprlib.repr(key) for key in unused(table)]
  keys += [f'{reprlib.repr(key)} of {count} frames' for key, count in counts.items()]
  if keys:
    more = f' and {len(keys) - 20} more' if len(keys) > 20 else ''
    warnings.warn(
      f'{path}: these keys are not used: {", ".join(keys[:20])}{more}. If one matters (a crop, '
      'depth, a rolling shutter), apply it to the pictures, or mask what it excludes.'
    )


def _warn_of_other_files(data_dir: str) -> None:
  """Warns of a transforms_train.json and its like, which instant-ngp reads as well."""
  others = [n for n in sorted(os.listdir(data_dir)) if re.fullmatch(r'transforms_.+\.json', n)]
  if others:
    warnings.warn(
      f'{data_dir}: only transforms.json is read, not {warnings.some(others)}. If these have other '
      "frames, add them to transforms.json (Config.dataset_loader = 'blender' reads "
      'transforms_train.json and transforms_test.json).'
    )


def _is_on(value: Any) -> bool:
  """Whether a value is anything but null, false, zero, empty, or a list of these."""
  return any(value) if isinstance(value, list) else bool(value)


def _read_mask(where: str, mask: Any, data_dir: str, needed: bool) -> str | None:
  """Returns a mask_path relative to data_dir.

  It may be missing unless `needed`, since the masks of missing pictures are missing too.
  """
  if mask is None:
    return None
  if not isinstance(mask, str):
    raise images.DataError(f'{where}: mask_path must be a name. Export it again.')
  name = normal_name(mask)
  with frames_lib.prefix_errors(where):
    path = images.inside(data_dir, name)
  if needed and not files.exists(path):
    raise images.DataNotFoundError(
      f'{where}: {path}: no such image. Add the mask, or correct mask_path.'
    )
  return name


def points_file(data_dir: str, table: Mapping[str, Any]) -> str | None:
  """Returns the path of `ply_file_path`, points in the world of the frames; None if there is none.

  Raises:
    DataError: it is not the name of a file inside data_dir.
  """
  name = table.get('ply_file_path')
  if not name:
    return None
  path = images.inside(data_dir, normal_name(name)) if isinstance(name, str) else ''
  if not files.is_file(path):
    raise images.DataError(f'ply_file_path {reprlib.repr(name)} is not a file in {data_dir!r}.')
  return path


def _read_applied(path: str, table: Mapping[str, Any]) -> scenes.Applied | None:
  """Returns applied_transform and applied_scale; None if there is neither."""
  if table.get('applied_transform') is None and table.get('applied_scale') is None:
    return None
  try:
    given = table.get('applied_scale')
    transform, scale = np.eye(4), 1.0 if given is None else float(given)
    if table.get('applied_transform') is not None:
      transform[:3] = np.array(table['applied_transform'], np.float64)[:3]
    return scenes.Applied(transform, scale)
  except (ValueError, TypeError, IndexError, OverflowError):
    warnings.warn(
      f'{path}: applied_transform must be a 3x4 rotation and translation, and applied_scale '
      'positive; both are ignored. Correct them, or camera paths of nerfstudio may be misplaced.'
    )
    return None


def normal_name(file_path: str) -> str:
  """Normalises a path: './images\\a.png', as some tools write it, becomes images/a.png."""
  name = re.sub('/+', '/', file_path.replace('\\', '/'))
  while name.startswith('./'):
    name = name[2:].lstrip('/')
  return name


def _read_pose(where: str, own: Mapping[str, Any]) -> np.ndarray:
  """Returns the pose, [3, 4]."""
  try:
    matrix = np.array(own['transform_matrix'], np.float64)
  except (KeyError, ValueError, TypeError, OverflowError):
    matrix = np.empty(0)
  if matrix.shape not in ((4, 4), (3, 4)) or not np.isfinite(matrix).all():
    raise images.DataError(
      f"{where}: 'transform_matrix' must be 4x4 or 3x4 finite numbers, camera to world. Export it "
      'again.'
    )
  return frames_lib.top_rows(f"{where}: the last row of 'transform_matrix'", matrix)


def _split_every(
  frames: Sequence[frames_lib.Frame], hold: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns (train, test) rows: every hold-th picture is held out, wherever it is listed."""
  held_out = set(list(dict.fromkeys(frame.picture for frame in frames))[::hold])
  test = tuple(i for i, frame in enumerate(frames) if frame.picture in held_out)
  return tuple(i for i, frame in enumerate(frames) if frame.picture not in held_out), test


def _listed_split(
  path: str, table: dict[str, Any], frames: Sequence[frames_lib.Frame]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns (train, test) rows from the file's lists; unlisted images are in neither."""
  row = {frame.name: i for i, frame in enumerate(frames)}
  rows = {}
  for key in _SPLITS:
    names = table.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
      raise images.DataError(f'{path}: {key} must be a list of names. Export it again.')
    names = [normal_name(name) for name in names]
    unknown = [name for name in names if name not in row]
    if unknown:
      raise images.DataError(
        f'{path}: {key} has {reprlib.repr(unknown[0])}, which is not a frame. Remove it, or the '
        f'three lists {", ".join(_SPLITS)}.'
      )
    rows[key] = sorted({row[name] for name in names})
  test = rows['test_filenames'] or rows['val_filenames']
  listed = set().union(*rows.values())
  unused = [frame.name for i, frame in enumerate(frames) if i not in listed]
  if rows['train_filenames'] and unused:
    warnings.warn(
      f'{path}: {len(unused)} of {len(frames)} frames are in none of the lists '
      f'{", ".join(key for key in _SPLITS if key in table)}, so they are not used: '
      f'{warnings.some(unused)}. Add them to train_filenames to use them.'
    )
  train = rows['train_filenames'] or [i for i in range(len(frames)) if i not in set(test)]
  return tuple(train), tuple(test)
