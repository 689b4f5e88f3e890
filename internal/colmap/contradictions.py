"""Warns of files in a model's folder that contradict the ones that are read."""

from __future__ import annotations

import os

import numpy as np

from ..system import warnings
from . import binary, text
from . import model as model_lib
from .model import Image, Model, ModelError

_TOLERANCE = 1e-4  # Of rotations, and of positions relative to the cameras' extent.
_SECONDS = 2.0  # A copy's files may differ by so much in age.
_CAMERA = 0  # COLMAP's type of sensor.


def warn_of(folder: str, model: Model) -> None:
  """Warns if text files, or rigs.bin and frames.bin, differ from the binary model of a folder."""
  path = lambda name: os.path.join(folder, name)  # noqa: E731
  if not os.path.isfile(path('images.bin')) or not os.path.isfile(path('cameras.bin')):
    return
  if os.path.isfile(path('images.txt')) and os.path.isfile(path('cameras.txt')):
    _check_text(folder, model)
  if os.path.isfile(path('rigs.bin')) and os.path.isfile(path('frames.bin')):
    try:
      others = read_rig_poses(path('rigs.bin'), path('frames.bin'))
    except ModelError as e:
      warnings.warn(f'{e} It is not used.')
      return
    named = {i.id: i.name for i in model.images.values()}
    others = {named.get(id_, f'image {id_}'): pose for id_, pose in others.items()}
    difference = _difference(model, others)
    if difference:
      warnings.warn(
        f'{path("frames.bin")}: {difference} than in images.bin, which is used. Write the model '
        'again with one program, for example with `colmap model_converter`.'
      )


def _check_text(folder: str, model: Model) -> None:
  """Warns if the text files are newer than the binary ones, or differ."""
  age = [max(os.path.getmtime(os.path.join(folder, f'{kind}{ext}')) for kind in
             ('cameras', 'images')) for ext in ('.bin', '.txt')]  # fmt: skip
  try:
    images = text.read_images(os.path.join(folder, 'images.txt'))
    cameras = text.read_cameras(os.path.join(folder, 'cameras.txt'))
  except ModelError as e:
    warnings.warn(f'{e} The binary model beside it is used.')
    return
  difference = _difference(model, {i.name: model_lib.camera_to_world(i) for i in images.values()})
  if not difference and not _same_cameras(model, images, cameras):
    difference = 'the cameras have other intrinsics'
  newer = age[1] > age[0] + _SECONDS
  if newer or difference:
    reason = ' and '.join(['newer'] * newer + ['different'] * bool(difference))
    warnings.warn(
      f'{folder}: images.txt and cameras.txt are {reason}'
      + (f' ({difference} than in images.bin)' if difference else '')
      + '; the binary files are used. Remove those that are out of date.'
    )


def _same_cameras(model: Model, images: dict[int, Image], cameras) -> bool:
  mine = {i.name: model.cameras[i.camera_id] for i in model.images.values()}
  for image in images.values():
    a, b = mine[image.name], cameras.get(image.camera_id)
    if b is None or (a.model, a.width, a.height) != (b.model, b.width, b.height):
      return False
    if not np.allclose(a.params, b.params, rtol=_TOLERANCE):
      return False
  return True


def _difference(model: Model, others: dict[str, np.ndarray]) -> str:
  """Says how poses by name differ from those of a model; '' if they do not."""
  mine = {i.name: model_lib.camera_to_world(i) for i in model.images.values()}
  unshared = sorted(mine.keys() ^ others.keys())
  if unshared:
    return f'{len(others)} images, not {len(mine)} (e.g. {unshared[0]!r})'
  positions = np.array([pose[:, 3] for pose in mine.values()]).reshape(-1, 3)
  extent = np.ptp(positions, axis=0).max() if len(positions) else 0.0
  tolerance = np.array([_TOLERANCE] * 3 + [_TOLERANCE * max(extent, 1e-9)])
  moved = [n for n in sorted(mine) if (np.abs(mine[n] - others[n]) > tolerance).any()]
  return (
    f'{len(moved)} of {len(mine)} images (e.g. {moved[0]!r}) have another pose' if moved else ''
  )


def read_rig_poses(rigs_file: str, frames_file: str) -> dict[int, np.ndarray]:
  """Returns the pose [3, 4] (OpenGL axes, camera to world) of each image id in frames.bin.

  A frame has the pose of its rig, and each sensor its pose in the rig.

  Raises:
    ModelError: a file is truncated or damaged.
  """
  rigs = _read_rigs(rigs_file)
  data = binary._Bytes(frames_file)
  found = {}
  for _ in range(data.count(68, 'frames')):
    _, rig_id, *pose, count = data.unpack('II7dI', 'a frame')
    for _ in range(count):
      kind, sensor, image_id = data.unpack('iIQ', 'an image of a frame')
      if kind == _CAMERA:
        local = rigs.get((rig_id, sensor), (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
        found[image_id] = _compose(frames_file, pose, local)
  data.finish()
  return found


def _read_rigs(path: str) -> dict[tuple[int, int], tuple[float, ...]]:
  """Returns the pose, w, x, y, z and translation, of each camera in its rig."""
  data = binary._Bytes(path)
  found = {}
  for _ in range(data.count(8, 'rigs')):
    rig_id, count = data.unpack('II', 'a rig')
    for k in range(count):
      kind, sensor = data.unpack('iI', 'a sensor')
      if k and data.unpack('B', 'a sensor')[0]:
        pose = data.unpack('7d', 'the pose of a sensor')
        if kind == _CAMERA:
          found[rig_id, sensor] = pose
  data.finish()
  return found


def _compose(path: str, rig: tuple[float, ...], local: tuple[float, ...]) -> np.ndarray:
  """Returns the pose of a camera from rig-from-world and camera-from-rig."""
  poses = []
  for pose in (rig, local):
    if not np.isfinite(pose).all() or not any(pose[:4]):
      raise ModelError(f'{path}: has an invalid pose, {tuple(pose)}.')
    poses.append(model_lib.camera_to_world(Image(0, tuple(pose[:4]), tuple(pose[4:]), 0, '')))
  flip = np.diag([1.0, -1, -1])
  rotation = poses[1][:, :3] @ flip  # Rig from camera, OpenCV axes in the rig.
  outer = poses[0][:, :3] @ flip  # World from rig.
  position = outer @ poses[1][:, 3] + poses[0][:, 3]
  return np.concatenate([outer @ rotation @ flip, position[:, None]], 1)
