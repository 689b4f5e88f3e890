"""Camera poses that come from elsewhere, for `refine`: reads them and finds their photographs.

They are a COLMAP model or a transforms.json, read as for training (`datasets`). Poses are [3, 4],
camera to world, OpenGL axes, in the world of the file, which is kept.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from .. import alignment, colmap
from ..datasets import frames as frames_lib
from ..datasets import images, llff, transforms
from ..system import files, warnings
from . import photo_files, reconstruction
from .photos import FOLDER, Photo, PosesError, list_photos

_TRANSFORMS = 'transforms.json'
_SAME_SHAPE = 0.01  # Relative difference of two aspect ratios that still count as equal.
_TWO = {
  'SIMPLE_PINHOLE': 'PINHOLE',
  'SIMPLE_RADIAL': 'OPENCV',
  'RADIAL': 'OPENCV',
  'SIMPLE_RADIAL_FISHEYE': 'OPENCV_FISHEYE',
  'RADIAL_FISHEYE': 'OPENCV_FISHEYE',
}
_ONE = {'PINHOLE': 'SIMPLE_PINHOLE', 'OPENCV': 'RADIAL', 'OPENCV_FISHEYE': 'RADIAL_FISHEYE'}


@dataclasses.dataclass(frozen=True)
class Given:
  """Poses and cameras of photographs of a capture."""

  path: str  # The folder or file that they were read from.
  poses: Mapping[str, np.ndarray]  # [3, 4] by the photograph's name.
  cameras: Mapping[str, colmap.Camera]  # By `Photo.camera`; their ids are 0.
  camera_of: Mapping[str, str]  # The camera of each posed photograph, by its name.
  lost: tuple[str, ...] = ()  # Names of poses without a photograph.


def read(path: str) -> list[frames_lib.Frame]:
  """Reads the poses of a transforms.json, or of a COLMAP model, or of a folder that has either.

  Raises:
    PosesError: there are none, or fewer than three.
    DataError, ModelError: a file is damaged.
  """
  if files.is_folder(path) and files.is_file(os.path.join(path, _TRANSFORMS)):
    path = os.path.join(path, _TRANSFORMS)
  if files.is_file(path) and path.lower().endswith('.json'):
    frames = transforms.read_frames(os.path.dirname(path), path, transforms.read_table(path))
  elif files.is_folder(path):
    model = colmap.read_model(path if colmap.find_extension(path) else llff.find_model(path))
    with frames_lib.prefix_errors(path):
      frames = llff.read_frames(model)
  else:
    raise PosesError(
      f'{path}: no poses there. --from takes a transforms.json, the folder of a COLMAP model '
      '(cameras and images, .bin or .txt), or a folder that has either.'
    )
  if len(frames) < 3:
    raise PosesError(f'{path}: has {len(frames)} poses; at least 3 are needed. Leave out --from.')
  frames_lib.checked_poses(path, frames)
  return frames


def find_photographs(
  path: str, frames: Sequence[frames_lib.Frame], folder: str, names: Sequence[str]
) -> dict[str, frames_lib.Frame]:
  """Returns the frame of each photograph that has one.

  The photograph's path and the frame's name share the file name (without regard to ending and
  case) and as many folders as possible. Of frames that repeat a picture, the first counts.

  Args:
    path: of the poses; starts the messages of errors.
    frames: the poses.
    folder: the photographs.
    names: of the photographs, relative to the folder.

  Raises:
    PosesError: several photographs fit a frame equally well, or fewer than three frames have one.
  """
  by_base = collections.defaultdict(list)
  for name in names:
    by_base[_parts(name)[0]].append(name)
  home = _parts(os.path.abspath(folder) + '/x')[1:]
  found = {}
  for frame in frames:
    wanted = _parts(frame.name)
    fits = {n: _shared(wanted, _parts(n) + home) for n in by_base.get(wanted[0], ())}
    best = [name for name in fits if fits[name] == max(fits.values())]
    if len(best) > 1:
      raise PosesError(
        f'{path}: {frame.name!r} may be {warnings.some(best)} of {folder}. Give the photographs '
        'the folders that they have in the poses.'
      )
    for name in best:
      found.setdefault(name, frame)
  if len(found) < 3:
    raise PosesError(
      f'{path}: {len(found)} of its {len(frames)} poses have a photograph in {folder}; at least 3 '
      f"are needed. Its names are like {frames[0].name!r}, the photographs' like {names[0]!r}."
    )
  return found


def _parts(name: str) -> list[str]:
  """Returns the file name without its ending, then its folders, innermost first, to compare."""
  plain = re.sub(r'\.[A-Za-z]\w{1,4}$', '', name.replace('\\', '/'))  # An ending may be missing.
  plain = unicodedata.normalize('NFC', plain).casefold()
  return [part for part in reversed(plain.split('/')) if part not in ('', '.', '..')]


def _shared(a: Sequence[str], b: Sequence[str]) -> int:
  """Returns how many parts two lists share at their beginning."""
  return next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def posed_as_stored(path: str, frames: Sequence[frames_lib.Frame], folder: str) -> set[str]:
  """Returns the photographs whose EXIF orientation their poses ignore, as COLMAP does.

  These are all that have the shape of their cameras as they are stored. The others are turned
  upright, as usual.

  Raises:
    PosesError: a photograph has another shape than its camera, turned or not.
  """
  found = find_photographs(path, frames, folder, list_photos(folder, quiet=True))
  result = set()
  for name, frame in found.items():
    if photo_files.content(os.path.join(folder, name)):
      continue  # HEIC and AVIF are upright.
    header = images.read_header(os.path.join(folder, name))
    shape = np.log(header.width / header.height), np.log(frame.size[0] / frame.size[1])
    if abs(shape[0] - shape[1]) < _SAME_SHAPE:
      result.add(name)
    elif header.orientation < 5 or abs(shape[0] + shape[1]) >= _SAME_SHAPE:
      raise PosesError(
        f'{os.path.join(folder, name)}: is {header.width}x{header.height} pixels, but its given '
        f'camera has {frame.size[0]}x{frame.size[1]}, another shape. Use the photographs that were '
        'posed.'
      )
  return result


def assign(
  path: str,
  frames: Sequence[frames_lib.Frame],
  photos: Sequence[Photo],
  scene_dir: str,
  camera_model: str | None,
) -> tuple[list[Photo], Given]:
  """Gives the photographs of the capture their poses and cameras.

  Photographs with equal given intrinsics share a camera; with a `camera_model`, all of one size
  do, and it begins at the median. Photographs without a pose share that of others by the same
  camera, if their EXIF data say so.

  Returns:
    The photographs, with `camera` naming the given camera, and what was given.
  """
  found = find_photographs(path, frames, '', [photo.source for photo in photos])
  groups, of_photo = collections.defaultdict(list), {}
  for photo in photos:
    if photo.source in found:
      header = images.read_header(os.path.join(scene_dir, FOLDER, photo.name))
      camera = _camera(found[photo.source], (header.width, header.height), camera_model)
      key = camera if camera_model is None else (camera.model, camera.width, camera.height)
      groups[key].append(camera)
      of_photo[photo.name] = key
  label = {key: f'given {k}' for k, key in enumerate(groups, 1)}
  by_exif = collections.defaultdict(collections.Counter)
  for photo in photos:
    if photo.name in of_photo:
      by_exif[photo.camera][label[of_photo[photo.name]]] += 1
  result = []
  for photo in photos:
    known = by_exif.get(photo.camera)
    own = of_photo.get(photo.name)
    name = label[own] if own else known.most_common(1)[0][0] if known else photo.camera
    result.append(dataclasses.replace(photo, camera=name))
  poses = {p.name: found[p.source].pose for p in photos if p.source in found}
  used = {frame.name for frame in found.values()}
  lost = tuple(dict.fromkeys(frame.name for frame in frames if frame.name not in used))
  cameras = {label[key]: _median(groups[key]) for key in groups}
  camera_of = {name: label[key] for name, key in of_photo.items()}
  return result, Given(path, poses, cameras, camera_of, lost)


def _camera(
  frame: frames_lib.Frame, size: tuple[int, int], camera_model: str | None
) -> colmap.Camera:
  """Returns the camera of a frame for a photograph of (width, height) `size`."""
  model = camera_model or frame.model
  lens = frame.intrinsics
  if camera_model is None:  # Pixels that are given as square stay square.
    model = (_TWO if abs(lens.fx / lens.fy - 1) > 1e-6 else _ONE).get(model, model)
    if any(lens.distortion[2:]):
      model = frame.model
  across, down = size[0] / frame.size[0], size[1] / frame.size[1]
  values = dict(zip(('k1', 'k2', 'k3', 'k4', 'p1', 'p2'), lens.distortion))
  values |= {'fx': lens.fx * across, 'fy': lens.fy * down}
  values |= {'cx': lens.cx * across, 'cy': lens.cy * down}
  values['f'] = (values['fx'] + values['fy']) / 2
  layout = colmap.LAYOUTS[model][1].split()
  left_out = [k for k in ('k1', 'k2', 'k3', 'k4', 'p1', 'p2') if values[k] and k not in layout]
  if left_out:
    warnings.warn(
      f'{model} has no {", ".join(left_out)}; the given distortion begins without, and bundle '
      'adjustment makes up for it.'
    )
  return colmap.Camera(0, model, *size, tuple(float(values[key]) for key in layout))


def _median(cameras: Sequence[colmap.Camera]) -> colmap.Camera:
  params = np.median([camera.params for camera in cameras], axis=0)
  return dataclasses.replace(cameras[0], params=tuple(params.tolist()))


def write_cameras(scene_dir: str, photos: Sequence[Photo], given: Given, trusted: bool) -> None:
  """Puts the given cameras into the capture's database, which has features already.

  Matches are verified with the focal lengths of cameras that are `trusted`. The report takes these
  for EXIF's, so afterwards they must not be.
  """
  pycolmap = reconstruction.colmap()
  with reconstruction.database(scene_dir) as db:
    ids = {image.name: image.camera_id for image in db.read_all_images()}
    for name, camera_id in {photo.camera: ids[photo.name] for photo in photos}.items():
      if camera := given.cameras.get(name):
        params = dataclasses.asdict(camera) | {'camera_id': camera_id}
        del params['id']
        db.update_camera(pycolmap.Camera(**params, has_prior_focal_length=trusted))


def near_pairs(names: Sequence[str], given: Given, count: int = 20) -> set[tuple[int, int]]:
  """Pairs each posed photograph with the `count` nearest that look in a similar direction.

  Nearness is the distance of the positions divided by their radius, plus that of the viewing
  directions; more than 90 degrees apart, photographs see no common side of things.

  Returns:
    Pairs (i, j), i < j, of indices into `names`.
  """
  rows = [k for k, name in enumerate(names) if name in given.poses]
  poses = np.stack([given.poses[names[k]] for k in rows])  # [n, 3, 4]
  distance, apart = alignment.distances(poses, poses)  # [n, n]
  cost = np.where(apart < np.sqrt(2), distance + apart, np.inf)
  np.fill_diagonal(cost, np.inf)
  nearest = np.argsort(cost, axis=1, kind='stable')[:, :count]  # [n, count]
  pairs = {(i, j) for i in range(len(rows)) for j in nearest[i].tolist() if cost[i, j] < np.inf}
  return {tuple(sorted((rows[i], rows[j]))) for i, j in pairs}


def camera_from_opengl(pose: np.ndarray):
  """Returns a pose [3, 4] as pycolmap's Rigid3d, world to camera with OpenCV axes."""
  pycolmap = reconstruction.colmap()
  rotation = (pose[:, :3] * [1, -1, -1]).T
  u, _, vt = np.linalg.svd(rotation)  # Files round; quaternions need exact rotations.
  rotation = u @ vt
  return pycolmap.Rigid3d(pycolmap.Rotation3d(rotation), -rotation @ pose[:, 3])


def opengl_from_camera(rigid) -> np.ndarray:
  """Inverts `camera_from_opengl`."""
  rotation = rigid.rotation.matrix().T  # [3, 3]
  position = -rotation @ rigid.translation
  return np.concatenate([rotation * [1, -1, -1], position[:, None]], 1)
