"""The cameras that a video is taken with: a path through a capture, and one lens all along it."""

from __future__ import annotations

import difflib
import os

import numpy as np

from internal import cameras, configs, files, paths, structs
from internal.datasets import scene as scene_lib


class TrajectoryError(ValueError):
  """A camera path that cannot be followed; the message says what to change."""


def make_cameras(config: configs.Config, scene: scene_lib.Scene) -> structs.Cameras:
  """The cameras of all frames, as Config.render_* says.

  Poses: render_path_file, else a spline through render_spline_keyframes, else a spiral for
  forward-facing captures, else an ellipse. Lens: the first training camera's, free of distortion,
  with its horizontal field of view where render_resolution changes the size, unless render_focal
  is given; render_camtype may ask for another kind.

  Raises:
    TrajectoryError: a setting that the capture or the file does not allow.
  """
  train = scene.cameras.take(np.array(scene.train))
  lens, size = _lens_and_size(config, train)
  if train.pixtocam_ndc is not None and lens != structs.PERSPECTIVE:
    raise TrajectoryError(
      'Config.render_camtype must be perspective for a forward-facing capture, got '
      f'{structs.LENS_NAMES[lens]!r}.'
    )
  return cameras.make_cameras(
    pixtocam=_pixtocam(config, train, lens, size),
    camtoworld=_poses(config, scene, np.asarray(train.camtoworld, np.float64)),
    size=size,
    lens=lens,
    pixtocam_ndc=train.pixtocam_ndc,
  )


def shrink(cams: structs.Cameras, max_side: int) -> structs.Cameras:
  """The same views [n] in fewer pixels, at most max_side each way."""
  size = np.asarray(cams.size)
  scale = np.minimum(max_side / size.max(-1, keepdims=True), 1)
  small = np.maximum(np.round(size * scale), 1).astype(np.int32)
  ratio = np.concatenate([size / small, np.ones((len(size), 1))], -1)  # [n, 3]
  return cams.replace(
    pixtocam=(np.asarray(cams.pixtocam) * ratio[:, None]).astype(np.float32), size=small
  )


def _lens_and_size(config: configs.Config, train: structs.Cameras) -> tuple[int, np.ndarray]:
  """Code of the lens, and [width, height]."""
  lens = int(train.lens[0])
  if config.render_camtype is not None:
    lens = structs.LENS_NAMES.index(config.render_camtype)
  size = np.array(train.size[0])
  if lens == structs.PANORAMA:
    size[0] = 2 * size[1]
  if config.render_resolution is not None:
    sides = tuple(config.render_resolution)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
      raise TrajectoryError(f'Config.render_resolution must be (width, height), got {sides}.')
    size = np.array(sides)
  return lens, size


def _pixtocam(
  config: configs.Config, train: structs.Cameras, lens: int, size: np.ndarray
) -> np.ndarray:
  """Inverse intrinsics [3, 3] of the frames."""
  width, height = size
  if lens == structs.PANORAMA:
    return cameras.pixtocam_from_intrinsics(width / (2 * np.pi), height / np.pi, 0, 0)
  camtopix = np.linalg.inv(np.asarray(train.pixtocam[0], np.float64))
  scale_x, scale_y = size / train.size[0]
  fx, fy = np.array([camtopix[0, 0], camtopix[1, 1]]) * scale_x
  if config.render_focal is not None:
    if not config.render_focal > 0:
      raise TrajectoryError(f'Config.render_focal must be positive, got {config.render_focal}.')
    fx = fy = config.render_focal
  return cameras.pixtocam_from_intrinsics(
    fx, fy, camtopix[0, 2] * scale_x, camtopix[1, 2] * scale_y
  )


def _poses(config: configs.Config, scene: scene_lib.Scene, poses: np.ndarray) -> np.ndarray:
  """Poses [m, 3, 4] of the frames; `poses` [n, 3, 4] are the training cameras'."""
  if config.render_path_file:
    return _read_poses(config.render_path_file)
  if config.render_spline_keyframes:
    rows = _keyframes(config.render_spline_keyframes, scene.names)
    return paths.generate_spline_path(
      np.asarray(scene.cameras.camtoworld, np.float64)[rows],
      config.render_spline_n_interp,
      config.render_spline_degree,
      config.render_spline_smoothness,
    )
  if config.forward_facing:
    if scene.bounds is None:
      raise TrajectoryError(
        'Config.forward_facing asks for a spiral, and this run was trained without it: it knows no '
        'near and far bounds. Set Config.forward_facing = False.'
      )
    return paths.generate_spiral_path(poses, scene.bounds, config.render_path_frames)
  return paths.generate_ellipse_path(
    poses, config.render_path_frames, config.z_variation, config.z_phase
  )


def _read_poses(path: str) -> np.ndarray:
  """Poses [n, 3, 4] from a .npy file of [n, 3, 4] or [n, 4, 4]."""
  if not os.path.isfile(path):
    raise TrajectoryError(f'Config.render_path_file: no such file: {path!r}.')
  try:
    poses = files.read_array(path)
    usable = poses.ndim == 3 and poses.shape[1:] in ((3, 4), (4, 4)) and len(poses) > 0
    usable = usable and bool(np.isfinite(poses).all())
  except ValueError:
    usable = False
  if not usable:
    raise TrajectoryError(
      f'{path}: must be a .npy file of finite camera-to-world matrices [n, 3, 4] or [n, 4, 4].'
    )
  return poses[:, :3]


def _keyframes(listed: str, names: tuple[str, ...]) -> list[int]:
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
        f'Config.render_spline_keyframes: no image {name!r} in this capture. '
        f'Nearest: {", ".join(near)}.'
      )
  return [row_of[name] for name in wanted]
