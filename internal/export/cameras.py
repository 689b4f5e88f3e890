"""Writes a run's cameras as a COLMAP model: the refined ones, where training has refined them."""

from __future__ import annotations

import numpy as np

from .. import colmap, paths, structs
from ..datasets import scenes
from .points import ExportError


def model(scene: scenes.Scene, factor: int) -> colmap.Model:
  """Returns the cameras of all images in the capture's own frame, without points.

  Args:
    scene: the scene, with refined cameras if there are any.
    factor: the downsampling factor of its pictures; intrinsics are those of the full size.

  Raises:
    ExportError: COLMAP has no model for a camera.
  """
  cams, factor = scene.cameras, max(1, factor)
  poses = paths.transform_poses(
    np.linalg.inv(scene.world_transform), np.asarray(cams.camtoworld, np.float64)
  )
  ids, cameras, images = {}, {}, {}
  for row, name in enumerate(scene.names):
    kind, params = _parameters(scene, row, factor)
    size = tuple(factor * side for side in np.asarray(cams.size)[row].tolist())
    camera_id = ids.setdefault((kind, size, params), len(ids) + 1)
    cameras[camera_id] = colmap.Camera(camera_id, kind, *size, params)
    images[row + 1] = colmap.posed_image(row + 1, poses[row], camera_id, name)
  return colmap.Model(cameras, images, colmap.make_points())


def _parameters(scene: scenes.Scene, row: int, factor: int) -> tuple[str, tuple[float, ...]]:
  """Returns the COLMAP model of a camera and its parameters."""
  cams = scene.cameras
  matrix = factor * np.linalg.inv(np.asarray(cams.pixtocam[row], np.float64))
  k1, k2, k3, k4, p1, p2 = np.asarray(cams.distortion[row], np.float64).tolist()
  pinhole = (*matrix[[0, 1], [0, 1]].tolist(), *matrix[:2, 2].tolist())
  if cams.lens[row] == structs.FISHEYE:
    return 'OPENCV_FISHEYE', (*pinhole, k1, k2, k3, k4)
  if cams.lens[row] != structs.PERSPECTIVE or k3 or k4:
    raise ExportError(
      f'--what cameras: the lens of {scene.names[row]!r} has no COLMAP model here. Leave cameras '
      'out of --what.'
    )
  if k1 or k2 or p1 or p2:
    return 'OPENCV', (*pinhole, k1, k2, p1, p2)
  return 'PINHOLE', pinhole
