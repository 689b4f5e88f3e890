"""Makes the cameras of a video: a path through a capture, and the lens of each frame."""

from __future__ import annotations

import difflib
import os

import numpy as np

from .. import cameras, configs, paths, plugins, structs
from ..datasets import scenes
from ..errors import UserError
from ..system import files, warnings
from . import orbits, path_files

_FULL_CIRCLE = np.pi  # Default field of view of a fisheye across the shorter side, radians.
# A path from a file is warned of if it stays this many times the cameras' extent away from them, or
# if no view has within this angle of its axis anything that the cameras look at.
_FAR, _VIEW_ANGLE = 3.0, np.radians(60)
_CHECKED = 64  # Frames and cameras that represent the path and the capture in the latter check.


class TrajectoryError(UserError):
  """Settings of a camera path that are invalid for the capture."""


def make_path(config: configs.Config, scene: scenes.Scene) -> tuple[structs.Cameras, float]:
  """Makes the cameras of all frames, by Config.render_*, and the frames per second.

  Poses come from render_path_file if set, else from a spline through render_spline_keyframes, else
  from render_path_type (by default a spiral for forward-facing captures and an ellipse for others).
  Panoramas along a generated path are levelled by the training cameras' mean up.

  The lens is the first training camera's without distortion. If render_resolution changes the size,
  the horizontal field of view stays, unless render_focal is set. render_camtype selects another
  kind of lens; a fisheye then shows 180 degrees across the shorter side. nerfstudio's camera paths
  bring size, lens, fields of view and frame rate; all settings but render_video_fps override them.

  Warns (`warnings.warn`) of a path from a file that comes nowhere near the training cameras.

  Raises:
    TrajectoryError, PathFileError: a setting is invalid for the capture, or the file for its path.
  """
  file = config.render_path_file
  path_file = path_files.read(file, scene.applied) if file else None
  fps = (path_file and path_file.fps) or config.render_video_fps
  cams = _make_cameras(config, scene, path_file)
  if file:
    _warn_if_elsewhere(file, cams, _train_poses(scene))
  return cams, fps


def _make_cameras(
  config: configs.Config, scene: scenes.Scene, path_file: path_files.PathFile | None
) -> structs.Cameras:
  train = scene.cameras.take(np.array(scene.train))
  lens, size = _lens_and_size(config, train, path_file)
  if train.pixtocam_ndc is not None and lens != structs.PERSPECTIVE:
    raise TrajectoryError(
      'Config.render_camtype must be perspective for a forward-facing capture, got '
      f'{structs.LENS_NAMES[lens]!r}.'
    )
  poses, zoom = _poses(config, scene, path_file)
  if path_file is None and lens == structs.PANORAMA:
    poses = orbits.level(poses, orbits.mean_up(_train_poses(scene)))
  return cameras.make_cameras(
    pixtocam=_pixtocam(config, train, path_file, lens, size, zoom),
    camtoworld=poses,
    size=size,
    lens=lens,
    pixtocam_ndc=train.pixtocam_ndc,
  )


def _warn_if_elsewhere(file: str, cams: structs.Cameras, train: np.ndarray) -> None:
  """Warns if the path `cams` is far from the poses [n, 3, 4] `train` or never sees what they do."""
  from scipy import spatial  # Imported here because the import takes a second.

  path, positions = np.asarray(cams.camtoworld, np.float64), train[:, :, 3]
  extent = np.linalg.norm(positions - positions.mean(0), axis=-1).max()
  if not extent > 0:
    return
  nearest = spatial.cKDTree(positions).query(path[:, :, 3])[0].min() / extent
  wrong = None
  if nearest > _FAR:
    wrong = f"stays {nearest:.3g} times the training cameras' extent away from all of them"
  elif cams.lens[0] != structs.PANORAMA and not _overlaps(path, train, extent):
    wrong = 'looks at nothing that the training cameras look at'
  if wrong:
    warnings.warn(
      f'{file}: this camera path {wrong}, so its video will be empty or blurred. Its poses must be '
      "in the capture's world, camera to world with OpenGL axes; for a path of nerfstudio, put its "
      'dataparser_transforms.json beside it. If they are in the normalised world, set '
      "Config.render_path_space = 'normalized'."
    )


def _overlaps(path: np.ndarray, train: np.ndarray, extent: float) -> bool:
  """Whether a pose of `path` has a point on the optical axis of a pose of `train` in view."""
  path, train = (poses[:: -(-len(poses) // _CHECKED)] for poses in (path, train))
  distances = extent * np.array([0.5, 1, 2])[:, None, None]
  points = (train[:, :, 3] - distances * train[:, :, 2]).reshape(-1, 3)
  rays = points - path[:, None, :, 3]  # [m, 3n, 3]
  depth = -(rays * path[:, None, :, 2]).sum(-1)
  return bool((depth > np.cos(_VIEW_ANGLE) * np.linalg.norm(rays, axis=-1)).any())


def shrink(cams: structs.Cameras, max_side: int) -> structs.Cameras:
  """Returns the same views [n] with fewer pixels, at most max_side per side."""
  size = np.asarray(cams.size)
  scale = np.minimum(max_side / size.max(-1, keepdims=True), 1)
  small = np.maximum(np.round(size * scale), 1).astype(np.int32)
  ratio = np.concatenate([size / small, np.ones((len(size), 1))], -1)  # [n, 3]
  return cams.replace(
    pixtocam=(np.asarray(cams.pixtocam) * ratio[:, None]).astype(np.float32), size=small
  )


def _lens_and_size(
  config: configs.Config, train: structs.Cameras, path_file: path_files.PathFile | None
) -> tuple[int, np.ndarray]:
  """Returns the lens code and the size [width, height]."""
  lens, size = int(train.lens[0]), np.array(train.size[0])
  if path_file and path_file.lens is not None:
    lens = path_file.lens
  if config.render_camtype is not None:
    lens = structs.LENS_NAMES.index(config.render_camtype)
  if lens == structs.PANORAMA:
    size[0] = 2 * size[1]
  if path_file and path_file.size is not None:
    size = np.array(path_file.size)
  if config.render_resolution is not None:
    size = np.array(config.render_resolution)
  return lens, size


def _pixtocam(
  config: configs.Config,
  train: structs.Cameras,
  path_file: path_files.PathFile | None,
  lens: int,
  size: np.ndarray,
  zoom: np.ndarray,
) -> np.ndarray:
  """Returns inverse intrinsics [n, 3, 3]; `zoom` [n] multiplies the focal lengths."""
  width, height = size
  cx, cy = size / 2
  if lens == structs.PANORAMA:
    fx, fy, cx, cy = width / (2 * np.pi), height / np.pi, 0, 0
    zoom = np.ones_like(zoom)
  elif path_file and path_file.fov is not None and config.render_focal is None:
    fx = fy = height / 2 / np.tan(path_file.fov / 2)
  else:
    fx, fy, cx, cy = _own_lens(config, train, lens, size)
  return cameras.pixtocam_from_intrinsics(fx * zoom, fy * zoom, cx, cy)


def _own_lens(config: configs.Config, train: structs.Cameras, lens: int, size: np.ndarray):
  """Returns (fx, fy, cx, cy) of the training camera, scaled to `size`, or of a full fisheye."""
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
  config: configs.Config, scene: scenes.Scene, path_file: path_files.PathFile | None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the frames' poses [m, 3, 4] and the factors [m] of their focal lengths."""
  zoom = None
  if path_file:
    path = path_file.poses
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
  else:
    kind = config.render_path_type or ('spiral' if config.forward_facing else 'ellipse')
    made = plugins.camera_path[kind](config, scene)
    path, zoom = made if isinstance(made, tuple) else (made, None)
    path = paths.checked(path)
  return path, np.ones(len(path)) if zoom is None else zoom


def _train_poses(scene: scenes.Scene) -> np.ndarray:
  """Returns the poses [n, 3, 4] of the training cameras, float64."""
  return np.asarray(scene.cameras.camtoworld, np.float64)[list(scene.train)]


@plugins.camera_path('ellipse')
def _ellipse(config: configs.Config, scene: scenes.Scene) -> np.ndarray:
  poses, count = _train_poses(scene), config.render_path_frames
  return paths.generate_ellipse_path(poses, count, config.z_variation, config.z_phase)


@plugins.camera_path('orbit')
def _orbit(config: configs.Config, scene: scenes.Scene) -> np.ndarray:
  elevation, radius = config.render_orbit_elevation, config.render_orbit_radius
  poses, count = _train_poses(scene), config.render_path_frames
  return orbits.generate_orbit_path(poses, count, elevation, radius)


@plugins.camera_path('dolly')
def _dolly(config: configs.Config, scene: scenes.Scene) -> tuple[np.ndarray, np.ndarray | None]:
  poses, name = _train_poses(scene), config.render_dolly_keyframe
  start = _photos(scene, 'render_dolly_keyframe', name)[0] if name else poses[0]
  count, distance = config.render_path_frames, config.render_dolly_distance
  path, zoom = orbits.generate_dolly_path(poses, start, count, distance)
  return path, zoom if config.render_dolly_zoom else None


@plugins.camera_path('spiral')
def _spiral(config: configs.Config, scene: scenes.Scene) -> np.ndarray:
  """Makes a spiral in front of a forward-facing scene, or a helix around the focus of others."""
  poses = _train_poses(scene)
  if not config.forward_facing:
    return orbits.generate_helix_path(poses, config.render_path_frames)
  if scene.bounds is None:
    raise TrajectoryError(
      'Config.forward_facing = True needs near and far bounds, which this run lacks as it was '
      'trained without it; set Config.forward_facing = False.'
    )
  return paths.generate_spiral_path(poses, scene.bounds, config.render_path_frames)


def _photos(scene: scenes.Scene, knob: str, listed: str) -> np.ndarray:
  """Returns the poses [k, 3, 4] of the photos named in `listed`."""
  rows = _keyframes(knob, listed, scene.names)
  return np.asarray(scene.cameras.camtoworld, np.float64)[rows]


def _keyframes(knob: str, listed: str, names: tuple[str, ...]) -> list[int]:
  """Returns the rows of images named in `listed`: comma-separated, or a text file's lines."""
  if files.is_file(listed):
    listed = files.read_text(listed)
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
    raise TrajectoryError(f'Config.{knob}: must name images, e.g. {names[0]!r}.')
  return [row_of[name] for name in wanted]
