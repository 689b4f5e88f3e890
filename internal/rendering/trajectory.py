"""The cameras that a video is taken with: a path through a capture, and a lens for each frame."""

from __future__ import annotations

import difflib
import os

import numpy as np

from .. import cameras, configs, paths, structs
from ..datasets import scenes
from ..errors import UserError
from . import orbits, path_files

_FULL_CIRCLE = np.pi  # Angle that a fisheye shows across the shorter side, unless told.


class TrajectoryError(UserError):
  """A camera path that cannot be followed; the message says what to change."""


def make_cameras(config: configs.Config, scene: scenes.Scene) -> structs.Cameras:
  """The cameras of all frames, as Config.render_* says.

  Poses: render_path_file, else a spline through render_spline_keyframes, else render_path_type
  (a spiral for forward-facing captures, otherwise an ellipse). Panoramas along a path that is made
  here are levelled by the cameras' mean up.

  Lens: the first training camera's, free of distortion, with its horizontal field of view where
  render_resolution changes the size, unless render_focal is given; render_camtype may ask for
  another kind, of which a fisheye shows half of all directions in a circle as wide as the shorter
  side. nerfstudio's camera paths have size, lens and fields of view of their own, on top of which
  those settings count.

  Raises:
    TrajectoryError, PathFileError: a setting that the capture or the file does not allow.
  """
  train = scene.cameras.take(np.array(scene.train))
  told = path_files.read(config.render_path_file) if config.render_path_file else None
  lens, size = _lens_and_size(config, train, told)
  if train.pixtocam_ndc is not None and lens != structs.PERSPECTIVE:
    raise TrajectoryError(
      'Config.render_camtype must be perspective for a forward-facing capture, got '
      f'{structs.LENS_NAMES[lens]!r}.'
    )
  poses, zoom = _poses(config, scene, np.asarray(train.camtoworld, np.float64), told)
  if told is None and lens == structs.PANORAMA:
    poses = orbits.level(poses, orbits.mean_up(np.asarray(train.camtoworld, np.float64)))
  return cameras.make_cameras(
    pixtocam=_pixtocam(config, train, told, lens, size, zoom),
    camtoworld=poses,
    size=size,
    lens=lens,
    pixtocam_ndc=train.pixtocam_ndc,
  )


def frames_per_second(config: configs.Config) -> float:
  """Of the video: as the camera path's file says, else render_video_fps."""
  told = path_files.read(config.render_path_file).fps if config.render_path_file else None
  return told or config.render_video_fps


def shrink(cams: structs.Cameras, max_side: int) -> structs.Cameras:
  """The same views [n] in fewer pixels, at most max_side each way."""
  size = np.asarray(cams.size)
  scale = np.minimum(max_side / size.max(-1, keepdims=True), 1)
  small = np.maximum(np.round(size * scale), 1).astype(np.int32)
  ratio = np.concatenate([size / small, np.ones((len(size), 1))], -1)  # [n, 3]
  return cams.replace(
    pixtocam=(np.asarray(cams.pixtocam) * ratio[:, None]).astype(np.float32), size=small
  )


def _lens_and_size(
  config: configs.Config, train: structs.Cameras, told: path_files.PathFile | None
) -> tuple[int, np.ndarray]:
  """Code of the lens, and [width, height]."""
  lens, size = int(train.lens[0]), np.array(train.size[0])
  if told and told.lens is not None:
    lens = told.lens
  if config.render_camtype is not None:
    lens = structs.LENS_NAMES.index(config.render_camtype)
  if lens == structs.PANORAMA:
    size[0] = 2 * size[1]
  if told and told.size is not None:
    size = np.array(told.size)
  if config.render_resolution is not None:
    sides = tuple(config.render_resolution)
    if len(sides) != 2 or min(sides) < 1:
      raise TrajectoryError(f'Config.render_resolution must be (width, height), got {sides}.')
    size = np.array(sides)
  return lens, size


def _pixtocam(
  config: configs.Config,
  train: structs.Cameras,
  told: path_files.PathFile | None,
  lens: int,
  size: np.ndarray,
  zoom: np.ndarray,
) -> np.ndarray:
  """Inverse intrinsics [n, 3, 3] of the frames; focal lengths are multiplied by zoom [n]."""
  width, height = size
  cx, cy = size / 2
  if lens == structs.PANORAMA:
    fx, fy, cx, cy = width / (2 * np.pi), height / np.pi, 0, 0
    zoom = np.ones_like(zoom)
  elif config.render_focal is not None and not config.render_focal > 0:
    raise TrajectoryError(f'Config.render_focal must be positive, got {config.render_focal}.')
  elif told and told.fov is not None and config.render_focal is None:
    fx = fy = height / 2 / np.tan(told.fov / 2)
  else:
    fx, fy, cx, cy = _own_lens(config, train, lens, size)
  return cameras.pixtocam_from_intrinsics(fx * zoom, fy * zoom, cx, cy)


def _own_lens(config: configs.Config, train: structs.Cameras, lens: int, size: np.ndarray):
  """(fx, fy, cx, cy) of the training camera at another size, or of the lens asked for."""
  if lens == structs.FISHEYE and train.lens[0] != structs.FISHEYE:
    focal = config.render_focal or min(size) / _FULL_CIRCLE
    return focal, focal, size[0] / 2, size[1] / 2
  camtopix = np.linalg.inv(np.asarray(train.pixtocam[0], np.float64))
  scale_x, scale_y = size / train.size[0]
  fx, fy = np.array([camtopix[0, 0], camtopix[1, 1]]) * scale_x
  if config.render_focal is not None:
    fx = fy = config.render_focal
  return fx, fy, camtopix[0, 2] * scale_x, camtopix[1, 2] * scale_y


def _poses(
  config: configs.Config,
  scene: scenes.Scene,
  poses: np.ndarray,
  told: path_files.PathFile | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Poses [m, 3, 4] of the frames, and by what their focal lengths are to be multiplied [m].

  `poses` [n, 3, 4] are the training cameras'.
  """
  count, zoom = config.render_path_frames, None
  kind = config.render_path_type or ('spiral' if config.forward_facing else 'ellipse')
  if told:
    path = told.poses
    if config.render_path_space == 'capture':
      path = paths.transform_poses(scene.world_transform, path)
  elif config.render_spline_keyframes:
    path = paths.generate_spline_path(
      _photos(scene, 'render_spline_keyframes', config.render_spline_keyframes),
      config.render_spline_n_interp,
      config.render_spline_degree,
      config.render_spline_smoothness,
      const_speed=config.render_spline_const_speed,
      closed=config.render_spline_closed,
    )
  elif kind == 'spiral':
    path = _spiral(config, scene, poses)
  elif kind == 'orbit':
    path = orbits.generate_orbit_path(
      poses, count, config.render_orbit_elevation, config.render_orbit_radius
    )
  elif kind == 'dolly':
    name = config.render_dolly_keyframe
    start = _photos(scene, 'render_dolly_keyframe', name) if name else poses
    path, zoom = orbits.generate_dolly_path(poses, start[0], count, config.render_dolly_distance)
  else:
    path = paths.generate_ellipse_path(poses, count, config.z_variation, config.z_phase)
  return path, np.ones(len(path)) if zoom is None or not config.render_dolly_zoom else zoom


def _spiral(config: configs.Config, scene: scenes.Scene, poses: np.ndarray) -> np.ndarray:
  """Before a forward-facing scene, or around what the cameras of another one look at."""
  if not config.forward_facing:
    return orbits.generate_helix_path(poses, config.render_path_frames)
  if scene.bounds is None:
    raise TrajectoryError(
      'Config.forward_facing asks for a spiral, and this run was trained without it: it knows no '
      'near and far bounds. Set Config.forward_facing = False.'
    )
  return paths.generate_spiral_path(poses, scene.bounds, config.render_path_frames)


def _photos(scene: scenes.Scene, knob: str, listed: str) -> np.ndarray:
  """Poses [k, 3, 4] of the photos that `listed` names."""
  rows = _keyframes(knob, listed, scene.names)
  return np.asarray(scene.cameras.camtoworld, np.float64)[rows]


def _keyframes(knob: str, listed: str, names: tuple[str, ...]) -> list[int]:
  """Rows of the images that `listed` names: separated by commas, or in a text file, one a line."""
  if os.path.isfile(listed):
    with open(listed, encoding='utf-8', errors='surrogateescape') as f:
      listed = f.read()
  wanted = [name.strip() for name in listed.replace('\n', ',').split(',') if name.strip()]
  row_of = {os.path.splitext(name)[0]: i for i, name in enumerate(names)}
  row_of |= {name: i for i, name in enumerate(names)}
  for name in wanted:
    if name not in row_of:
      near = difflib.get_close_matches(name, names, 3, 0.3) or names[:3]
      raise TrajectoryError(
        f'Config.{knob}: no image {name!r} in this capture. Nearest: {", ".join(near)}.'
      )
  if not wanted:
    raise TrajectoryError(f'Config.{knob}: names no image. Say e.g. {names[0]!r}.')
  return [row_of[name] for name in wanted]
