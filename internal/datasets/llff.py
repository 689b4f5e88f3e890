"""COLMAP-posed folders: images/, images_<factor>/ and sparse/0/, the layout of the 360 dataset.

With Config.forward_facing, LLFF's captures: normalised device coordinates, with near and far from
poses_bounds.npy, or from the sparse points if it is missing. Without a sparse model the poses come
from poses_bounds.npy too.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import numpy as np

from .. import colmap, configs, paths
from ..system import files, installation, warnings
from . import frames as frames_lib
from . import images, poses_bounds, scenes

MODEL_FOLDERS = ('sparse/0', 'sparse', 'colmap/sparse/0')

# Moves the near bound to 1 / 0.75, a third beyond the near plane of NDC at 1.
_NEAR_MARGIN = 0.75


def load(config: configs.Config, read_only: bool = False) -> scenes.Scene:
  """Reads a COLMAP-posed folder.

  Uses the registered images, sorted by name (load_alphabetical) or by COLMAP's ids; every
  llffhold-th is held out. The world is normalised by PCA (`paths`), or recentred for forward-facing
  captures.

  Raises:
    DataNotFoundError, colmap.ModelNotFoundError: the folder, the model or a picture is missing.
    DataError, colmap.ModelError: a file is damaged or contradicts another.
  """
  data_dir = frames_lib.capture_dir(config.data_dir)
  frames, model = _read_capture(data_dir, config.load_alphabetical)
  if not frames:
    raise images.DataError(
      f'{data_dir}: the sparse model has no registered images. Run COLMAP again, with more overlap '
      'between the pictures.'
    )
  make_world = frames_lib.world_pca
  if config.forward_facing:
    bounds = read_bounds(data_dir, model)
    make_world = functools.partial(forward_facing_world, bounds=bounds)
  return frames_lib.assemble(
    'llff',
    data_dir,
    frames,
    make_world,
    frames_lib.split_every(len(frames), config.llffhold),
    factor=config.factor,
    unregistered=frames_lib.unposed(data_dir, frames),
    read_only=read_only,
    config=config,
  )


def _read_capture(
  data_dir: str, by_name: bool
) -> tuple[list[frames_lib.Frame], colmap.Model | None]:
  """Returns the frames and the sparse model, or the frames of poses_bounds.npy and None."""
  try:
    folder = find_model(data_dir)
  except colmap.ModelNotFoundError:
    if files.is_file(os.path.join(data_dir, poses_bounds.FILE)):
      return poses_bounds.read_frames(data_dir), None
    raise
  model = colmap.read_model(folder)
  _warn_of_other_models(data_dir, folder)
  colmap.warn_of_contradictions(folder, model)
  with frames_lib.prefix_errors(folder):
    return read_frames(model, by_name), model


def find_model(data_dir: str) -> str:
  """Returns the folder of the sparse model with the most images, the first of several equal ones.

  Raises:
    colmap.ModelNotFoundError: there is none.
  """
  found = list_models(data_dir)
  if found:
    # A damaged model that comes first is refused when it is read.
    counts = [np.inf if n is None and k == 0 else n or 0 for k, n in enumerate(found.values())]
    return os.path.join(data_dir, list(found)[int(np.argmax(counts))])
  for file, loader in (('transforms_train.json', 'blender'), ('transforms.json', 'transforms')):
    if files.is_file(os.path.join(data_dir, file)):
      raise colmap.ModelNotFoundError(
        f"No sparse model in {data_dir!r}, but {file}: use Config.dataset_loader = '{loader}'."
      )
  raise colmap.ModelNotFoundError(
    f'No sparse model (cameras and images, .bin or .txt) in {data_dir!r}: looked in '
    f'{", ".join(MODEL_FOLDERS)}. Make one with '
    f'`{installation.command_text("poses", "PHOTOS", data_dir)}`.'
  )


def list_models(data_dir: str) -> dict[str, int | None]:
  """Returns the number of images of each sparse model, None for a damaged one.

  Images whose picture exists count; if none of any model does, all.
  """
  folders = []
  for root in ('sparse', 'colmap/sparse'):
    path = os.path.join(data_dir, root)
    inner = sorted(os.listdir(path)) if files.is_folder(path) else []
    folders += [f'{root}/0', root, *(f'{root}/{name}' for name in inner)]
  folders = [f for f in dict.fromkeys(folders) if colmap.find_extension(os.path.join(data_dir, f))]
  names = {f: colmap.image_names(os.path.join(data_dir, f)) for f in folders}
  existing = set(images.list_images(os.path.join(data_dir, 'images'))) if len(names) > 1 else set()
  if not any(existing & set(found or ()) for found in names.values()):
    return {f: None if found is None else len(found) for f, found in names.items()}
  return {f: None if found is None else len(existing & set(found)) for f, found in names.items()}


def _warn_of_other_models(data_dir: str, folder: str) -> None:
  found = list_models(data_dir)
  texts = {f: f'{f} ({"damaged" if n is None else f"{n} pictures"})' for f, n in found.items()}
  used = texts.pop(os.path.relpath(folder, data_dir).replace(os.sep, '/'))
  if texts:
    warnings.warn(
      f'{data_dir}: has {len(found)} sparse models; {used} is used, not '
      f'{", ".join(texts.values())}. Merge them (`colmap model_merger`) or remove the others.'
    )


def read_frames(model: colmap.Model, by_name: bool = True) -> list[frames_lib.Frame]:
  """Returns the registered images, sorted by name or by id."""
  intrinsics = {id_: colmap.intrinsics(camera) for id_, camera in _used_cameras(model).items()}
  result = []
  for image in sorted(model.images.values(), key=lambda i: i.name if by_name else i.id):
    camera = model.cameras[image.camera_id]
    result.append(
      frames_lib.Frame(
        name=image.name,
        folder='images',
        file=image.name,
        intrinsics=intrinsics[camera.id],
        size=(camera.width, camera.height),
        pose=colmap.camera_to_world(image),
        model=camera.model,
      )
    )
  return result


def _used_cameras(model: colmap.Model) -> dict[int, colmap.Camera]:
  return {image.camera_id: model.cameras[image.camera_id] for image in model.images.values()}


def forward_facing_world(
  data_dir: str, frames: Sequence[frames_lib.Frame], bounds: tuple[float, float]
) -> frames_lib.World:
  """Recentres on the average pose and scales the scene to lie beyond the near plane of NDC."""
  scale = 1 / (_NEAR_MARGIN * bounds[0])
  poses = frames_lib.checked_poses(data_dir, frames)
  with frames_lib.prefix_errors(data_dir):
    poses, transform = paths.recenter_poses(poses)
  poses[:, :, 3] *= scale
  transform = np.diag([scale, scale, scale, 1]) @ transform
  return frames_lib.World(poses, transform, (bounds[0] * scale, bounds[1] * scale), ndc=True)


def read_bounds(data_dir: str, model: colmap.Model) -> tuple[float, float]:
  """Returns the near and far bounds, in the model's units.

  Raises:
    DataError: poses_bounds.npy is damaged, or it is missing and no point is in view.
  """
  path = os.path.join(data_dir, poses_bounds.FILE)
  if files.is_file(path):
    return poses_bounds.read_bounds(path)
  with frames_lib.prefix_errors(data_dir):
    return bounds_from_points(model)


def bounds_from_points(model: colmap.Model) -> tuple[float, float]:
  """Returns near and far of the points in view, without 0.1% outliers at either end.

  Raises:
    DataError: no point is in view of a camera.
  """
  near, far = [], []
  points = model.points.xyz[(np.abs(model.points.xyz) < frames_lib.LARGEST).all(-1)]
  for image in model.images.values():
    camera = model.cameras[image.camera_id]
    k = colmap.intrinsics(camera)
    pose = colmap.camera_to_world(image)
    x, y, z = ((points - pose[:, 3]) @ pose[:, :3] * [1, -1, -1]).T  # OpenCV axes
    ahead = z > 1 / frames_lib.LARGEST
    depth = z[ahead]
    u, v = k.fx * x[ahead] / depth + k.cx, k.fy * y[ahead] / depth + k.cy
    visible = depth[(u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)]
    if visible.size:
      low, high = np.percentile(visible, [0.1, 99.9])
      near.append(low)
      far.append(high)
  if not near:
    raise images.DataError(
      'A forward-facing capture needs bounds, but the sparse model has no points in view: keep '
      'points3D beside cameras and images, or add poses_bounds.npy.'
    )
  return float(min(near)), float(max(far))
