"""Renders the frames of a video into a folder that belongs to that video alone.

render.json in the folder describes the video, so that an interrupted one is resumed and frames of
two videos are never mixed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from .. import configs, structs
from ..errors import UserError
from ..system import files
from ..vis import pictures, video
from . import trajectory

KINDS = ('color', 'depth', 'normals')
_SURVEY_FRAMES, _SURVEY_SIDE = 8, 96  # Small frames that set the range of the depth colours.
_WAY_OUT = 'Remove the folder to render again, or choose another one (Config.render_dir).'
_UNSPOKEN = {'weights': 'other weights', 'path': 'another camera path'}  # Their values are hashes.
_OF_WEIGHTS = ('step', 'weights')  # What `describe` says of the model rather than of the path.

RenderFrame = Callable[[structs.Cameras, int], dict]  # (cameras, row) -> the rendered frame.


class RenderError(UserError):
  """A render folder whose frames do not belong to this video."""


def digest(tree) -> str:
  """Returns a short hash of all arrays in a pytree."""
  sha = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    sha.update(np.ascontiguousarray(leaf).tobytes())
  return sha.hexdigest()[:16]


def describe(cams: structs.Cameras, params, step: int) -> dict:
  """Describes a video; only frames with equal descriptions belong together."""
  return {'step': step, 'weights': digest(params), **describe_path(cams)}


def describe_path(cams: structs.Cameras) -> dict:
  """Describes the cameras of a video."""
  return {
    'frames': len(cams.size),
    'size': np.asarray(cams.size)[0].tolist(),
    'lens': structs.LENS_NAMES[cams.lenses[0]],
    'path': digest(cams),
  }


def read_description(folder: str, wanted: dict) -> tuple[dict | None, list[str]]:
  """Reads the description of the folder's frames.

  Returns:
    The description, None if there are no frames yet; and the `wanted` entries that it contradicts.

  Raises:
    RenderError: there are frames, but of unknown origin.
  """
  path = os.path.join(folder, 'render.json')
  try:
    found = files.read_json(path)
    changed = [key for key in wanted if found[key] != wanted[key]]
    near, far = map(float, found['depth_range'])
    if not 0 <= near <= far < float('inf'):
      raise ValueError
  except FileNotFoundError:
    if any(os.path.exists(os.path.join(folder, kind)) for kind in KINDS):
      raise RenderError(f'{folder} has frames but no render.json. {_WAY_OUT}') from None
    return None, []
  except (ValueError, TypeError, KeyError, OverflowError):
    raise RenderError(f'{path} cannot be read. {_WAY_OUT}') from None
  return found, changed


def check_folder(folder: str, wanted: dict) -> dict | None:
  """Returns the description of the frames in a folder that the user chose; None without frames.

  Raises:
    RenderError: the frames are of another video, or of unknown origin.
  """
  found, changed = read_description(folder, wanted)
  if changed:
    changes = ', '.join(_UNSPOKEN.get(k) or f'{k} {found[k]} (now {wanted[k]})' for k in changed)
    raise RenderError(f'{folder} has frames of another video: {changes}. {_WAY_OUT}')
  return found


def find_folder(root: str, name: str, wanted: dict) -> tuple[str, dict | None]:
  """Finds the folder of a video: `root` if it is free or has this video, else one beside it.

  That is `<root>_<name>` for another camera path, `<root>_step<step>` for another checkpoint, with
  a number behind it if that has yet another video.

  Returns:
    The folder, and the description of its frames; None without frames.

  Raises:
    RenderError: a folder has frames of unknown origin.
  """
  found, changed = read_description(root, wanted)
  if set(changed) <= set(_OF_WEIGHTS):
    name = f'step{wanted.get("step", 0)}'
  folder, number = root, 1
  while changed:
    folder = f'{root}_{name}' + (f'_{number}' if number > 1 else '')
    found, changed = read_description(folder, wanted)
    number += 1
  return folder, found


def path_name(config: configs.Config) -> str:
  """Returns a name for the camera path that the settings choose, for files and folders."""
  if config.render_path_file:
    path = os.path.abspath(config.render_path_file)
    parts = path.split(os.sep)[-2:] if os.path.isdir(path) else [os.path.splitext(path)[0]]
    name = re.sub(r'[^\w-]+', '_', '_'.join(map(os.path.basename, parts)))
    return name.strip('_')[:80] or 'path'
  if config.render_spline_keyframes:
    return 'keyframes'
  return config.render_path_type or ('spiral' if config.forward_facing else 'ellipse')


def survey_depth(render: RenderFrame, cams: structs.Cameras) -> tuple[float, float]:
  """Estimates the near and far distance of the whole video from a few small frames."""
  small = trajectory.shrink(cams, _SURVEY_SIDE)
  rows = np.unique(np.linspace(0, len(cams.size) - 1, _SURVEY_FRAMES).round().astype(int))
  frames = [render(small, int(row)) for row in rows]
  distance, acc = (
    np.concatenate([frame[k].ravel() for frame in frames]) for k in ('distance_median', 'acc')
  )
  near, far = pictures.depth_range(distance, acc)
  return float(near), float(far)


def picture(kind: str, frame: dict, depth_range: tuple[float, float]) -> np.ndarray:
  """Returns the picture of one of KINDS of a rendered frame."""
  if kind == 'depth':
    return pictures.depth_picture(frame['distance_median'], frame['acc'], depth_range)
  if kind == 'normals':
    return pictures.normal_picture(frame['normals'], frame['acc'])
  return frame['rgb']


def frame_path(folder: str, kind: str, k: int) -> str:
  return os.path.join(folder, kind, f'{k:05d}.png')


def missing_frames(folder: str, kinds: Sequence[str], count: int) -> list[int]:
  """Returns the frames of which some kind of picture is not in the folder."""
  return [
    k
    for k in range(count)
    if not all(os.path.exists(frame_path(folder, kind, k)) for kind in kinds)
  ]


def render_missing(
  render: RenderFrame,
  cams: structs.Cameras,
  folder: str,
  kinds: Sequence[str],
  description: dict,
  writes: bool = True,
) -> Iterator[int]:
  """Renders the frames that are missing in the folder; yields the number of each.

  Args:
    render: renders a frame.
    cams: the cameras of all frames.
    folder: where the frames and render.json are.
    kinds: which of KINDS to write.
    description: that of the video; without `depth_range`, this is estimated first, and render.json
      is written.
    writes: whether to write files; of several processes that render together, one does.
  """
  if 'depth_range' not in description:
    description = {**description, 'depth_range': survey_depth(render, cams)}
    if writes:
      text = json.dumps(description, indent=2, allow_nan=False)
      files.write_text(os.path.join(folder, 'render.json'), f'{text}\n')
  for k in missing_frames(folder, kinds, len(cams.size)):
    frame = render(cams, k)
    for kind in kinds if writes else ():
      shown = picture(kind, frame, tuple(description['depth_range']))
      pictures.write_png(frame_path(folder, kind, k), shown)
    yield k


def encode(
  folder: str, kinds: Sequence[str], count: int, fps: float, config: configs.Config
) -> dict[str, str]:
  """Encodes the `count` frames of each kind; returns the videos' paths by kind.

  Raises:
    VideoError: the video encoder is missing or fails.
  """
  written = {}
  for kind in kinds:
    frames = [frame_path(folder, kind, k) for k in range(count)]
    written[kind] = os.path.join(folder, f'{kind}.mp4')
    video.write_video(frames, written[kind], fps, config.render_video_crf)
  return written
