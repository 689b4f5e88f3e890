"""Shared by all formats: turns posed frames into a scene in a normalised world.

A loader reads its format into frames (full-size intrinsics, poses in the capture's own world) and
chooses the world and the split. `assemble` then finds the pictures and checks them.
`n` is the number of frames; poses are [3, 4], OpenGL camera axes to world.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .. import cameras, colmap, configs, paths, structs
from ..system import files
from . import consistency, images, masks, pyramid, scenes

# Larger numbers, in pixels or world units, are errors. Products of smaller ones fit in a float32.
LARGEST = 1e12
# Pixels: the full-size side and the downsampled side are both rounded.
_SIZE_TOLERANCE = 1.5


@dataclasses.dataclass(frozen=True)
class Frame:
  """One posed picture."""

  name: str  # The name in the capture.
  folder: str  # The folder of the full-size picture, relative to data_dir.
  file: str  # The picture, relative to the folder.
  intrinsics: colmap.Intrinsics  # For the full size.
  size: tuple[int, int]  # Width and height of the full size.
  pose: np.ndarray  # [3, 4] float64
  model: str  # The camera model's name, for the report.
  mask: str | None = None  # Relative to data_dir; None to search by name (`masks.find`).
  weight: float = 1.0  # Multiplier of its pixels in the data loss.

  @property
  def picture(self) -> str:
    """The full-size picture, relative to data_dir."""
    return images.join(self.folder, self.file)


@dataclasses.dataclass(frozen=True)
class World:
  """The normalised world."""

  poses: np.ndarray  # [n, 3, 4]
  transform: np.ndarray  # [4, 4], the capture's world to the normalised one.
  bounds: tuple[float, float] | None = None
  ndc: bool = False  # Whether rays are converted to NDC.


def capture_dir(data_dir: str | None) -> str:
  """Returns Config.data_dir.

  Raises:
    DataNotFoundError: it is not set, or is not a folder.
  """
  if not data_dir:
    raise images.DataNotFoundError(
      'Config.data_dir is not set. Set it to the folder of the capture.'
    )
  if not files.is_folder(data_dir):
    raise images.DataNotFoundError(
      f'No such folder: {data_dir!r}. Set Config.data_dir to the folder of the capture.'
    )
  return data_dir


@contextlib.contextmanager
def prefix_errors(path: str) -> Iterator[None]:
  """Re-raises any ValueError as a DataError that starts with `path`."""
  try:
    yield
  except ValueError as e:
    raise images.DataError(f'{path}: {e}') from None


def pinhole_frame(
  data_dir: str,
  folder: str,
  file: str,
  intrinsics: np.ndarray,
  pose: np.ndarray,
  name: str | None = None,
) -> Frame:
  """Returns the frame of an undistorted picture, whose size is that of the file.

  Args:
    data_dir: the capture's folder.
    folder: the picture's folder, relative to data_dir.
    file: the picture, relative to the folder.
    intrinsics: [3, 3] or larger, pinhole intrinsics in pixels.
    pose: [3, 4], OpenGL camera axes to world.
    name: the picture's name in the capture; None for `file`.
  """
  header = images.read_header(images.inside(data_dir, images.join(folder, file)))
  k = intrinsics
  return Frame(
    name=name or file,
    folder=folder,
    file=file,
    intrinsics=colmap.Intrinsics(
      k[0, 0], k[1, 1], k[0, 2], k[1, 2], (0.0,) * 6, structs.PERSPECTIVE
    ),
    size=(header.width, header.height),
    pose=pose,
    model='PINHOLE',
  )


def top_rows(where: str, matrix: np.ndarray) -> np.ndarray:
  """Returns the pose [3, 4] of a matrix [3, 4] or [4, 4].

  Raises:
    DataError: the last of four rows is not 0, 0, 0, 1; `where` starts the message.
  """
  bottom = np.array([0, 0, 0, 1])
  if len(matrix) == 4 and np.abs(matrix[3] - bottom).max() > 1e-5:
    transposed = np.abs(matrix[:, 3] - bottom).max() <= 1e-5
    raise images.DataError(
      f'{where} must be 0, 0, 0, 1, but is {", ".join(f"{x:g}" for x in matrix[3])}. '
      + ('Its last column is that: transpose the matrix.' if transposed else 'Export it again.')
    )
  return matrix[:3]


def checked_poses(data_dir: str, frames: Sequence[Frame]) -> np.ndarray:
  """Returns the poses [n, 3, 4] of the frames.

  Raises:
    DataError: a pose is not a rotation and a translation, or is too far away.
  """
  poses = np.stack([frame.pose for frame in frames])
  for frame, rigid in zip(frames, paths.are_rigid(poses)):
    if not rigid:
      raise images.DataError(
        f'{data_dir}: the pose of {frame.name!r} is not a rotation: it scales, shears or mirrors. '
        'Apply all scales and export the poses again.'
      )
    if not (np.abs(frame.pose[:, 3]) < LARGEST).all():
      raise images.DataError(
        f'{data_dir}: {frame.name!r} has the position {frame.pose[:, 3].tolist()}; coordinates '
        f'must be below {LARGEST:g}. Export the poses again.'
      )
  return poses


def world_as_is(data_dir: str, frames: Sequence[Frame]) -> World:
  """Keeps the capture's own world."""
  return World(checked_poses(data_dir, frames), np.eye(4))


def world_pca(data_dir: str, frames: Sequence[Frame]) -> World:
  """Normalises the world by PCA: the camera positions are centred, rotated and fill [-1, 1]^3."""
  poses = checked_poses(data_dir, frames)
  with prefix_errors(data_dir):
    return World(*paths.transform_poses_pca(poses))


def split_every(n: int, hold: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns (train, test) rows: every hold-th image is held out, starting with the first."""
  test = tuple(range(0, n, hold))
  return tuple(i for i in range(n) if i % hold), test


def train_then_test(read: Callable[[str], Sequence[Frame]]):
  """Returns the frames of both parts and their (train, test) rows.

  For formats that store the parts separately; `read` takes 'train' or 'test'.
  """
  frames, split = [], []
  for part in ('train', 'test'):
    found = read(part)
    split.append(tuple(range(len(frames), len(frames) + len(found))))
    frames += found
  return frames, tuple(split)


def unposed(data_dir: str, frames: Sequence[Frame]) -> list[str]:
  """Lists pictures without a pose in the folders of the frames, sorted."""
  posed = {(frame.folder, frame.file) for frame in frames}
  return [
    f'{folder}/{name}'
    for folder in sorted({frame.folder for frame in frames} - {''})
    for name in masks.photographs(
      images.list_images(os.path.join(data_dir, folder)), (f for d, f in posed if d == folder)
    )
    if (folder, name) not in posed
  ]


def assemble(
  loader: str,
  data_dir: str,
  frames: Sequence[Frame],
  make_world: Callable[[str, Sequence[Frame]], World],
  split: tuple[tuple[int, ...], tuple[int, ...]],
  factor: int = 0,
  background: str = 'none',
  unregistered: Sequence[str] = (),
  read_only: bool = False,
  config: configs.Config | None = None,
) -> scenes.Scene:
  """Finds the pictures, checks them against their cameras and returns the scene.

  Args:
    loader: the format's name in `LOADERS`.
    data_dir: the capture's folder.
    frames: n posed pictures, in the scene's order.
    make_world: makes the normalised world of the frames that have pictures, such as `world_pca`.
    split: (train, test) rows.
    factor: downsampling factor; 0 or 1 for the full size.
    background: what alpha is composited on, see `images.decode`.
    unregistered: pictures without a pose, for the report.
    read_only: write nothing, and warn of missing pictures instead of raising.
    config: which missing pictures and unlikely cameras to accept; None for the defaults.

  Raises:
    DataNotFoundError: too many pictures are missing.
    DataError: a picture cannot be read or its size does not match its camera; frames contradict
      each other; there is no training image.
  """
  config = config or configs.Config()
  found, missing = consistency.find_pictures(data_dir, frames, factor)
  for frame in found:
    images.inside(data_dir, frame.picture)
  consistency.check_missing(
    data_dir, found, missing, config.min_images_fraction, read_only, split[1]
  )
  missing_names = [found[i].name for i in missing]
  if unregistered and found != frames:
    unregistered = unposed(data_dir, found)
  frames, split = _drop_repeated(data_dir, *_drop(missing, found, split))
  _check_frames(data_dir, frames, split, config.allow_unlikely_cameras)
  world = make_world(data_dir, frames)
  if not split[0]:
    raise images.DataError(
      f'{data_dir}: no training images: {len(split[1])} of {len(frames)} images are held out. '
      'Add images or raise Config.llffhold.'
    )
  located = _locate(data_dir, frames, factor, background, read_only)
  sizes = np.array(
    [
      _used_size(os.path.join(data_dir, file), header, frame, max(1, factor))
      for frame, file, header in zip(frames, located.files, located.headers)
    ]
  )  # [n, 2]
  consistency.check_stored(data_dir, located.files, located.headers, sizes, factor)
  table = _camera_table(frames, world, sizes, max(1, factor))
  found_masks = _find_masks(data_dir, frames, sizes, unregistered, factor)
  report = _report(
    loader, frames, missing_names, unregistered, located, sizes, split, world, found_masks
  )
  return scenes.Scene(
    loader=loader,
    files=located.files,
    names=tuple(frame.name for frame in frames),
    cameras=table,
    train=split[0],
    test=split[1],
    world_transform=world.transform,
    background=background,
    bounds=world.bounds,
    report=report,
    masks=found_masks if any(found_masks) else (),
    sources=tuple(frame.picture for frame in frames) if located.to_be_made else (),
    weights=tuple(f.weight for f in frames) if any(f.weight != 1 for f in frames) else (),
  )


def _drop_repeated(data_dir: str, frames: Sequence[Frame], split):
  """Drops frames that repeat another; their place in the split falls to the first of them."""
  again = consistency.repeated(data_dir, frames)
  split = tuple(tuple(sorted({again.get(i, i) for i in part})) for part in split)
  return _drop(list(again), frames, split)


def _check_frames(data_dir: str, frames: Sequence[Frame], split, allow_unlikely: bool) -> None:
  """Holds frames against each other and against what cameras are like."""
  consistency.check_lenses(data_dir, frames, LARGEST, allow_unlikely)
  names = [frame.name for frame in frames]
  consistency.check_positions(data_dir, checked_poses(data_dir, frames), names)
  consistency.check_poses(data_dir, frames)
  consistency.check_split(data_dir, frames, split)


def _report(
  loader, frames, missing, unregistered, located, sizes, split, world, found_masks
) -> dict[str, Any]:
  """Collects everything that a preflight prints about a capture.

  Counts, notes and warnings that are new belong here. `missing` has the names of missing pictures.
  """
  report = {
    'loader': loader,
    'images_found': len(frames) + len(unregistered),
    'images_registered': len(frames) + len(missing),
    'images_missing': missing,
    'images_unregistered': list(unregistered),
    'images_turned_by_exif': sum(
      (h.width, h.height) != tuple(size) for h, size in zip(located.headers, sizes.tolist())
    ),
    'images_not_turned_by_exif': sum(
      h.orientation != 1 and (h.width, h.height) == tuple(size)
      for h, size in zip(located.headers, sizes.tolist())
    ),
    'image_folders': sorted({os.path.dirname(file) for file in located.files}),
    'reduction': located.reduction,
    'folder_to_be_made': located.to_be_made,
    'image_sizes': _count(f'{w}x{h}' for w, h in sizes.tolist()),
    'camera_models': _count(frame.model for frame in frames),
    'train_images': len(split[0]),
    'test_images': len(split[1]),
    'training_pixel_bytes': int(3 * sizes[list(split[0])].prod(-1).sum()),
    **_describe(world),
  }
  if any(found_masks):
    report['masks'] = sum(mask is not None for mask in found_masks)
  return report


def _drop(rows: Sequence[int], frames: Sequence[Frame], split):
  """Returns frames and split without the given rows."""
  kept = [i for i in range(len(frames)) if i not in set(rows)]
  row = {old: new for new, old in enumerate(kept)}
  split = tuple(tuple(row[i] for i in part if i in row) for part in split)
  return [frames[i] for i in kept], split


def _locate(data_dir, frames, factor, background, read_only) -> pyramid.Pictures:
  """Calls `pyramid.locate` for each folder; the result is in the order of the frames."""
  files, headers, to_be_made, reductions = {}, {}, [], set()
  for folder in sorted({frame.folder for frame in frames}):
    rows = [i for i, frame in enumerate(frames) if frame.folder == folder]
    names = [frames[i].file for i in rows]
    found = pyramid.locate(data_dir, folder, names, factor, background, read_only)
    files.update(zip(rows, found.files))
    headers.update(zip(rows, found.headers))
    to_be_made += [found.to_be_made] if found.to_be_made else []
    reductions.add(found.reduction)
  order = range(len(frames))
  return pyramid.Pictures(
    tuple(files[i] for i in order),
    tuple(headers[i] for i in order),
    ' and '.join(sorted(reductions)),
    ', '.join(to_be_made) or None,
  )


def _find_masks(data_dir, frames, sizes, unregistered, factor) -> tuple[str | None, ...]:
  """Returns the mask of each picture after checking its size, or None."""
  pictures, named = [f.picture for f in frames], [f.mask for f in frames]
  found = masks.find(data_dir, pictures, named, unregistered, factor)
  for mask, frame, used in zip(found, frames, sizes.tolist()):
    if mask is not None:
      masks.check(data_dir, mask, frame.size, tuple(used))
  return tuple(found)


def _used_size(path: str, header: images.Header, frame: Frame, factor: int) -> tuple[int, int]:
  """Returns the (width, height) of a picture; raises unless it is its camera's over `factor`."""
  expected = (frame.size[0] / factor, frame.size[1] / factor)
  tolerance = _SIZE_TOLERANCE if factor > 1 else 0.0
  size = header.fit(expected, tolerance)
  if size is not None:
    return size
  turned = dataclasses.replace(header, orientation=6).fit(expected, tolerance)
  hint = (
    'It is rotated by 90 degrees without an EXIF tag: rotate it back'
    if turned
    else 'Use the pictures that were posed; put smaller ones in images_<factor>/ and set '
    'Config.factor'
  )
  raise images.DataError(
    f'{path}: is {header.width}x{header.height} pixels, but its camera has '
    f'{frame.size[0]}x{frame.size[1]}{f" / {factor}" if factor > 1 else ""}. {hint}.'
  )


def _camera_table(frames, world: World, sizes: np.ndarray, factor: int) -> structs.Cameras:
  """Returns the cameras of the downsampled pictures: intrinsics divided by `factor`."""
  lenses = [frame.intrinsics for frame in frames]
  focal_and_center = np.array([(k.fx, k.fy, k.cx, k.cy) for k in lenses]) / factor
  pixtocam = cameras.pixtocam_from_intrinsics(*focal_and_center.T)
  return cameras.make_cameras(
    pixtocam,
    world.poses,
    sizes,
    distortion=np.array([k.distortion for k in lenses]),
    lens=np.array([k.lens for k in lenses]),
    pixtocam_ndc=pixtocam[0] if world.ndc else None,
  )


def _describe(world: World) -> dict[str, Any]:
  """Returns the world's scale, bounds and the extent of the cameras along x, y and z."""
  spread = np.ptp(world.poses[:, :, 3], axis=0)
  return {
    'world_scale': float(np.cbrt(np.linalg.det(world.transform[:3, :3]))),
    'camera_spread': [round(float(side), 6) for side in spread],
    'bounds': world.bounds and list(world.bounds),
  }


def _count(values) -> dict[str, int]:
  return dict(sorted(collections.Counter(values).items()))
