"""Holds the frames of a capture against its files, each other, and what cameras are like.

`frames` are `frames.Frame`s. What cannot be right is an error, what is unlikely a warning.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np

from .. import cameras, paths, structs
from ..system import warnings
from . import images, lookup, pyramid

# Likely values are taken silently, others with a warning; those beyond the limits are refused.
_VIEWS = {structs.PERSPECTIVE: (20, 130), structs.FISHEYE: (20, 230)}  # Likely, in degrees.
_WIDEST = 150  # Degrees of a perspective view.
_MARGIN = 0.05  # Of the size: the principal point is not closer to the border.
_ASPECT = 1.22  # Of pixels: anamorphic lenses and video come close; wrong exports start at 5/4.
_STRETCH = 1.5  # Of pixels, at most.
# Pixels that no ray meets, as a share: any is a doubt; more than this no lens that COLMAP fits has.
# The corners of a round fisheye's picture are black, so they may be anything.
_NO_RAY = {structs.PERSPECTIVE: 0.2, structs.FISHEYE: 0.6}
_MISS = 0.5  # Pixels between a pixel and where its ray is seen.
# Times by which distortion changes the distance from the axis. A lens of 120 degrees that is fitted
# with the other kind of model has 1.7; of 140 degrees 2.2.
_BENT, _BENT_MOST = 2.0, 4.0
_GRID = 32  # Pixels a side of a picture on which distortion is checked.
_LOST = 100  # Times the distance from the middle that four of five cameras keep.
# Cameras look all round if the mean of their unit axes is shorter than _ONE_WAY, and at a point if
# the angle between it and the axis has a tangent below _MEETS.
_RING, _ONE_WAY, _MEETS = 5, 0.8, 0.3
_FEW_INWARDS, _MOST_INWARDS = 0.5, 0.9
_FEW = 3  # Training images; fewer show no depth.
_STRONG = 4  # A factor above it is unusual.
_SMALL = 100  # Pixels of the shorter side.


def find_pictures(data_dir: str, frames: Sequence, factor: int) -> tuple[list, list[int]]:
  """Returns the frames with the pictures that `lookup` finds, and the rows of missing ones."""
  found, missing = list(frames), []
  for folder in sorted({frame.folder for frame in frames}):
    rows = [i for i, frame in enumerate(frames) if frame.folder == folder]
    pictures = lookup.find(data_dir, [frames[i].file for i in rows], folder, factor)
    for i, picture in zip(rows, pictures):
      if picture is None:
        missing.append(i)
      elif picture != frames[i].picture:
        found[i] = dataclasses.replace(frames[i], **place(picture, folder))
  return found, sorted(missing)


def place(picture: str, folder: str = '') -> dict[str, str]:
  """Splits a picture into a frame's `folder` and `file`; the given folder if it begins with it."""
  if folder and picture.startswith(f'{folder}/'):
    return {'folder': folder, 'file': picture.removeprefix(f'{folder}/')}
  top, _, rest = picture.partition('/')
  return {'folder': top if rest else '', 'file': rest or top}


def check_missing(
  data_dir: str,
  frames: Sequence,
  missing: Sequence[int],
  fraction: float,
  read_only: bool,
  test: Sequence[int] = (),
) -> None:
  """Warns of missing pictures, and if all rows of `test` are among them.

  Raises:
    DataNotFoundError: less than `fraction` (Config.min_images_fraction) of the frames have one;
      with `read_only`, none has.
  """
  if not missing:
    return
  n, k, names = len(frames), len(missing), [frames[i].name for i in missing]
  named = [os.path.join(data_dir, frames[i].picture) for i in missing[:3]]
  instead = next((f' {path}:{why}' for path in named if (why := images.in_place_of(path))), '')
  folder = os.path.join(data_dir, frames[missing[0]].folder)
  if k == n and not os.path.isdir(folder):
    raise images.DataNotFoundError(f'No such folder: {folder!r}. Put the pictures there.')
  if k < n and n - k >= fraction * n:
    warnings.warn(
      f'{data_dir}: {k} of {n} posed pictures are missing ({warnings.some(names)}); '
      f'the other {n - k} are used. Put them back if they should be.'
      + (' All test images are missing.' if test and set(test) <= set(missing) else '')
      + instead
    )
    return
  message = (
    f'{os.path.join(data_dir, frames[missing[0]].picture)}: no such image, but the capture has a '
    f'pose for it ({k} of {n} are missing: {warnings.some(names)}). Put them back'
  )
  if k < n:
    message += f', or lower Config.min_images_fraction = {fraction:g} to use the other {n - k}'
  if k == n or not read_only:
    raise images.DataNotFoundError(f'{message}.{instead}')
  warnings.warn(f'{message}. Training refuses this capture.{instead}')


def repeated(data_dir: str, frames: Sequence) -> dict[int, int]:
  """Returns, for each row that repeats a frame, the row of its first occurrence; warns of them.

  Raises:
    DataError: one picture has two poses or intrinsics.
  """
  first, again = {}, {}
  for i, frame in enumerate(frames):
    j = first.setdefault(frame.picture, i)
    if i == j:
      continue
    other = frames[j]
    near = 1e-6 * (1 + np.abs(other.pose).max())
    if not (
      np.allclose(frame.pose, other.pose, rtol=0, atol=near)
      and (frame.intrinsics, frame.size) == (other.intrinsics, other.size)
    ):
      names = f'{other.name!r} and {frame.name!r}'
      raise images.DataError(
        f'{data_dir}: the picture {frame.picture!r} has two different cameras: frames {j + 1} and '
        f'{i + 1} in order, {names}, at {np.round(other.pose[:, 3], 4).tolist()} and '
        f'{np.round(frame.pose[:, 3], 4).tolist()}. Remove the wrong frame.'
      )
    again[i] = j
  if again:
    names = [frames[i].name for i in again]
    warnings.warn(
      f'{data_dir}: {warnings.count(len(again), "frame")} listed twice ({warnings.some(names)}); '
      'each is used once.'
    )
  return again


def check_split(data_dir: str, frames: Sequence, split) -> None:
  """Warns of test pictures that are trained on, and of equal files under several names."""
  if 0 < len(split[0]) < _FEW:
    warnings.warn(
      f'{data_dir}: trains on {warnings.count(len(split[0]), "image")} only, of '
      f'{warnings.count(len(frames), "frame")}; {_FEW} show a little depth, 50 a scene. Add '
      'images, or hold out fewer.'
    )
  same = _equal_files(data_dir, frames)
  train = {same.get(i, i) for i in split[0]}
  both = [frames[i].name for i in split[1] if same.get(i, i) in train]
  if both:
    warnings.warn(
      f'{data_dir}: {len(both)} of {len(split[1])} test images are also trained on '
      f'({warnings.some(both)}): their metrics say nothing about new views. Take them out of one '
      'of the lists to measure that.'
    )
  copies = [(frames[j].name, frames[i].name) for i, j in same.items()]
  if copies:
    pairs = warnings.some([f'{a} = {b}' for a, b in copies])
    warnings.warn(
      f'{data_dir}: {len(copies)} pictures are copies of others, byte for byte ({pairs}). Remove '
      'the copies, or put the right pictures there.'
    )


def _equal_files(data_dir: str, frames: Sequence) -> dict[int, int]:
  """Returns, for each row whose file equals an earlier one's, the first such row.

  Files of equal size are compared by samples of their content.
  """
  by_size, first, same = collections.defaultdict(list), {}, {}
  for i, frame in enumerate(frames):
    path = images.inside(data_dir, frame.picture)
    if os.path.isfile(path):
      by_size[os.path.getsize(path)].append((i, path))
  for rows in by_size.values():
    for i, path in rows if len(rows) > 1 else ():
      j = first.setdefault(pyramid.digest(path), i)
      if i != j:
        same[i] = j
  return same


def check_poses(data_dir: str, frames: Sequence) -> None:
  """Warns of a few pictures that have exactly the pose of another; with many, that is meant."""
  first, same = {}, []
  for frame in frames:
    other = first.setdefault(frame.pose.tobytes(), frame)
    if other is not frame:
      same.append(f'{other.name} = {frame.name}')
  if 0 < len(same) < len(frames) / 2:
    warnings.warn(
      f'{data_dir}: {warnings.count(len(same), "picture")} with exactly the pose of another one '
      f'({warnings.some(same)}). Unless they were taken so (a tripod, several exposures), pose '
      'them again.'
    )


def check_stored(
  data_dir: str, files: Sequence[str], headers: Sequence, sizes: np.ndarray, factor: int
) -> None:
  """Warns of doubts about pictures as files: further pictures in them, turns, very small ones.

  Args:
    data_dir: the capture.
    files: n pictures.
    headers: theirs.
    sizes: [n, 2] width and height as used.
    factor: Config.factor.
  """
  animated = [name for name, header in zip(files, headers) if header.animated]
  if animated:
    warnings.warn(
      f'{data_dir}: {warnings.count(len(animated), "animated picture")}, of which the first frame '
      f'is used: {warnings.some(animated)}. Replace them by the pictures that were posed.'
    )
  # The size tells whether a quarter turn was applied before posing, unless width equals height.
  turned = [
    f'{name} ({header.orientation})'
    for name, header in zip(files, headers)
    if header.orientation in (2, 3, 4)
    or (header.orientation != 1 and header.width == header.height)
  ]
  if turned:
    warnings.warn(
      f'{data_dir}: {warnings.count(len(turned), "picture")} with an EXIF orientation, which is '
      f'ignored, as COLMAP does: {warnings.some(turned)}. If the poses are those of upright '
      'pictures, turn the pictures and remove the tag.'
    )
  smallest = int(sizes.min())
  if factor > _STRONG and smallest < _SMALL:
    warnings.warn(
      f'{data_dir}: Config.factor = {factor} makes pictures of {sizes.min(0)[0]}x{sizes.min(0)[1]} '
      f'pixels. Use a smaller factor, so that the shorter side keeps {_SMALL} pixels or more.'
    )


def check_positions(data_dir: str, poses: np.ndarray, names: Sequence[str]) -> None:
  """Looks for cameras that are all in one place but for noise, and warns of some far away.

  Raises:
    DataError: they are, to the precision of their coordinates.
  """
  positions = poses[:, :, 3]
  spread, far = np.ptp(positions, axis=0).max(), np.abs(positions).max()
  _warn_of_lost(data_dir, positions, names)
  if len(poses) < 2 or spread >= 0.01:
    return
  place = np.round(positions.mean(0), 6).tolist()
  if spread <= 1e-5 * far:
    raise images.DataError(
      f'{data_dir}: All {len(poses)} cameras stand at {place}, but for {spread:g}, so the scene '
      'has no scale. If they did not, the positions are lost (are the matrices transposed?); else '
      'use photographs from at least two positions.'
    )
  if spread:
    warnings.warn(
      f'{data_dir}: the {len(poses)} cameras are within {spread:g} units of {place}. Pictures from '
      'one place show no depth; ignore this if a unit is that large, else check the positions.'
    )


def _warn_of_lost(data_dir: str, positions: np.ndarray, names: Sequence[str]) -> None:
  """Warns of cameras that are much farther away than four of five are."""
  distances = np.linalg.norm(positions - np.median(positions, axis=0), axis=-1)
  usual = np.quantile(distances, 0.8, method='lower')
  lost = [name for name, distance in zip(names, distances) if distance > _LOST * usual]
  rounding = 1e-9 * np.median(np.abs(positions).max(-1))
  if len(names) >= 5 and usual > rounding and lost:
    warnings.warn(
      f'{data_dir}: {len(lost)} of {len(names)} cameras are up to {distances.max() / usual:.2g} '
      f'times as far from the middle as the others ({warnings.some(lost)}). The scene is scaled to '
      'hold all cameras, so it becomes tiny: remove these frames, or pose them again.'
    )


def doubt_convention(path: str, poses: np.ndarray) -> None:
  """Warns if cameras all round look at one point only in another convention than the program's.

  Only files that do not say which convention they have need this.
  """
  if len(poses) < _RING or not paths.are_rigid(poses).all():
    return
  here = _looking_inwards(poses)
  if here >= _FEW_INWARDS:
    return
  for what, convert in paths.OTHER_CONVENTIONS.items():
    there = _looking_inwards(convert(poses))
    if there > _MOST_INWARDS:
      warnings.warn(
        f'{path}: {here:.0%} of the cameras look at the point where their lines of sight meet, and '
        f'{there:.0%} if {what}. If the pictures were taken all round something, convert the '
        'poses; if they were taken outwards from the middle of a room, ignore this.'
      )
      return


def _looking_inwards(poses: np.ndarray) -> float:
  """Returns the share of cameras that look at their focus, from all round; else 0."""
  axes = poses[:, :, 2]  # Backward.
  to_focus = paths.focus_point(poses) - poses[:, :, 3]
  ahead = -np.sum(to_focus * axes, -1)
  miss = np.linalg.norm(to_focus + ahead[:, None] * axes, axis=-1)
  all_round = np.linalg.norm(axes.mean(0)) < _ONE_WAY
  return float(all_round * np.mean(miss < _MEETS * ahead))


def check_lenses(data_dir: str, frames: Sequence, largest: float, allow_unlikely: bool) -> None:
  """Checks intrinsics; warns of unlikely ones.

  Raises:
    DataError: a focal length is not positive, or a value is not below `largest`; unless
      `allow_unlikely` (Config.allow_unlikely_cameras), values are that no usual camera has.
  """
  doubts = collections.defaultdict(list)
  for frame in frames:
    k = frame.intrinsics
    values = (k.fx, k.fy, k.cx, k.cy, *k.distortion)
    if not (all(abs(v) < largest for v in values) and min(k.fx, k.fy) > 1 / largest):
      raise images.DataError(
        f'{data_dir}: the camera of {frame.name!r} has impossible intrinsics (fx {k.fx:g}, '
        f'fy {k.fy:g}, cx {k.cx:g}, cy {k.cy:g}, distortion {k.distortion}). Pose the pictures '
        'again.'
      )
  rays = _trace(frames)
  for frame in frames:
    for what, hint, absurd in (
      _doubt_view(frame), _doubt_centre(frame), _doubt_pixels(frame), *_doubt_rays(frame, rays)
    ):  # fmt: skip
      if what:
        doubts[hint].append((absurd and not allow_unlikely, frame.name, what))
  worst = {hint: max(cases, key=lambda case: case[0]) for hint, cases in doubts.items()}
  for hint, (refused, name, what) in sorted(worst.items(), key=lambda item: not item[1][0]):
    text = f'{data_dir}: the camera of {name!r} has {what}'
    text += f' ({len(doubts[hint])} of {len(frames)} pictures).'
    if refused:
      raise images.DataError(
        f'{text} {hint} Correct the intrinsics, or set Config.allow_unlikely_cameras = True.'
      )
    warnings.warn(f'{text} {hint} Correct the intrinsics, or ignore this if the lens is special.')


def _trace(frames: Sequence) -> dict[tuple, tuple[float, float]]:
  """Returns what the distortion of each camera does, by (intrinsics, size): two numbers.

  The share of pixels that no ray meets, and by how many times the others are moved at most.
  """
  keys = [(f.intrinsics, f.size) for f in frames if any(f.intrinsics.distortion)]
  keys = list(dict.fromkeys(keys))
  if not keys:
    return {}
  pixtocam = cameras.pixtocam_from_intrinsics(
    *np.array([(k.fx, k.fy, k.cx, k.cy) for k, _ in keys]).T
  )
  table = cameras.make_cameras(
    pixtocam,
    np.tile(np.eye(3, 4), (len(keys), 1, 1)),
    np.array([size for _, size in keys]),
    np.array([k.distortion for k, _ in keys]),
    np.array([k.lens for k, _ in keys]),
  )
  x, y = (np.mgrid[:_GRID, :_GRID].reshape(2, -1) + 0.5) / _GRID
  misses, factors = map(np.asarray, cameras.check_distortion(table, np.float32(x), np.float32(y)))
  met = misses <= _MISS  # False for nan.
  bent = np.where(met, np.maximum(factors, 1 / np.maximum(factors, 1e-6)), 1).max(-1)
  return dict(zip(keys, zip((~met).mean(-1).tolist(), bent.tolist())))


def _doubt_rays(frame, rays) -> list[tuple[str, str, bool]]:
  """Returns what is unlikely about the distortion, as `_doubt_view` does; several may be."""
  lost, bent = rays.get((frame.intrinsics, frame.size), (0, 1))
  values = ', '.join(f'{v:g}' for v in frame.intrinsics.distortion)
  found = []
  if lost > 0:
    hint = 'Rays of these pixels are wrong: mask them, crop the pictures, or pose them again.'
    text = f'distortion ({values}) by which no ray meets {lost:.1%} of its pixels'
    found.append((text, hint, lost > _NO_RAY[frame.intrinsics.lens]))
  if bent > _BENT:
    hint = 'Are the coefficients those of another camera model, or in other units?'
    text = f'distortion ({values}) that changes distances from the axis {bent:.2g}-fold'
    found.append((text, hint, bent > _BENT_MOST))
  return found


def _doubt_view(frame) -> tuple[str, str, bool]:
  """Returns what is unlikely about the field of view, or '', and what may have been meant.

  The last value is whether it is beyond what lenses and moderate crops give.
  """
  k, (w, h) = frame.intrinsics, frame.size
  if k.lens == structs.PERSPECTIVE:
    view = max(2 * math.atan(w / k.fx / 2), 2 * math.atan(h / k.fy / 2))
  else:
    view = max(w / k.fx, h / k.fy)
  low, high = _VIEWS[k.lens]
  if low <= math.degrees(view) <= high:
    return '', '', False
  absurd = k.lens == structs.PERSPECTIVE and math.degrees(view) > _WIDEST
  text = f'a field of view of {math.degrees(view):.3g} degrees (focal length {k.fx:g}, {w}x{h})'
  if math.degrees(view) < low:
    hint = 'Is the focal length that of larger pictures, or the angle in other units?'
    return text, hint, absurd
  hint = 'Is the focal length in millimetres, as a fraction, or that of smaller pictures?'
  return text, hint, absurd


def _doubt_centre(frame) -> tuple[str, str, bool]:
  """Returns what is unlikely about the principal point, as `_doubt_view` does."""
  k, (w, h) = frame.intrinsics, frame.size
  x, y = k.cx / w, k.cy / h
  if min(x, y) >= 0.25 and max(x, y) <= 0.75:
    return '', '', False
  absurd = max(abs(x - 0.5), abs(y - 0.5)) > 0.5 - _MARGIN
  text = f'its principal point at ({k.cx:g}, {k.cy:g}), outside the middle half of {w}x{h} pixels'
  hint = 'Is it that of pictures of another size, or before a crop?'
  if min(k.cx, k.cy) >= 0.25 and max(k.cx, k.cy) <= 0.75:
    hint = 'It seems to be in fractions of the size: multiply by width and height.'
  elif max(abs(x), abs(y)) < 0.25:
    hint = 'It may be an offset from the middle: add half the size.'
  elif min(x, y) > 0.75 and abs(x / y - 1) < 0.3:
    hint = f'It may be that of pictures {2 * x:.2g} times as large: divide by that.'
  return text, hint, absurd


def _doubt_pixels(frame) -> tuple[str, str, bool]:
  """Returns what is unlikely about the shape of pixels, as `_doubt_view` does."""
  k, (w, h) = frame.intrinsics, frame.size
  ratio = k.fx / k.fy
  if 1 / _ASPECT <= ratio <= _ASPECT:
    return '', '', False
  absurd = not 1 / _STRETCH <= ratio <= _STRETCH
  text = f'pixels far from square (fx {k.fx:g}, fy {k.fy:g})'
  if any(abs(ratio * r - 1) < 0.02 for r in (w / h, h / w)):
    hint = 'fy seems to be scaled by the shape of the picture: it should be close to fx.'
    return text, hint, absurd
  return text, 'Do fx and fy belong to pictures of this size, that were not stretched?', absurd
