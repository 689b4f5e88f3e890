"""Finds where the lens's axis meets the picture, once the poses are good.

Mappers keep the principal point at the picture's centre. If it is elsewhere, as in stabilised video
and in crops, then rotations, positions and tangential distortion make up for most of it, but not
for all. A last bundle adjustment therefore sets the principal point free.
"""

from __future__ import annotations

import collections
from collections.abc import Collection
from typing import Any

import numpy as np

from ..system import progress
from . import reconstruction

_SURE = 0.005  # Largest standard deviation, as a part of the picture's longer side.
_FARTHEST = 0.2  # From the centre, as a part of the longer side; farther out it is a wrong result.
_TOLERANCE = 1e-6  # Relative change of the cost that ends the adjustment; of turns, 1e-3 degrees.
_SAMPLE = 50  # Photographs of a camera from which the standard deviation is computed.


def refine(model, kept: Collection[int] = ()) -> tuple[Any, list[dict]]:
  """Adjusts poses, points and intrinsics with free principal points.

  A camera keeps its intrinsics if its photographs do not determine the principal point: if the
  standard deviation, for errors of one pixel, exceeds 0.5% of the picture's longer side.

  Args:
    model: pycolmap's Reconstruction, which is not changed.
    kept: ids of cameras that keep their intrinsics.

  Returns:
    The adjusted Reconstruction, and of each camera whose principal point was found a dict for JSON:
    its id, `off_centre` (x, y) in pixels, and its `deviation` in pixels, the larger of x and y.
  """
  if not set(model.cameras) - set(kept):
    return model, []
  found = {k: v for k, v in _deviations(model).items() if k not in kept}
  while sure := {k for k, v in found.items() if v <= _SURE * _side(model.cameras[k])}:
    adjusted = reconstruction.colmap().Reconstruction(model)
    with progress.Bar('adjusting principal points', 1):
      summary = _adjuster(adjusted, adjusted.reg_image_ids(), set(model.cameras) - sure).solve()
    if not summary.is_solution_usable():
      break
    offsets = {k: off_centre(adjusted.cameras[k]) for k in sorted(sure)}
    wrong = {k for k, v in offsets.items() if abs(v).max() > _FARTHEST * _side(model.cameras[k])}
    if not wrong:
      adjusted.update_point_3d_errors()
      return adjusted, [
        {'camera': k, 'off_centre': v.round(2).tolist(), 'deviation': round(found[k], 3)}
        for k, v in offsets.items()
      ]
    found = {k: v for k, v in found.items() if k not in wrong}
  return model, []


def _deviations(model) -> dict[int, float]:
  """Returns the standard deviations of cameras' principal points, in pixels, where known."""
  pycolmap = reconstruction.colmap()
  of_camera = collections.defaultdict(list)
  for image_id in sorted(model.reg_image_ids()):
    of_camera[model.image(image_id).camera_id].append(image_id)
  sample = {k for ids in of_camera.values() for k in ids[:: -(-len(ids) // _SAMPLE)]}
  copy = pycolmap.Reconstruction(model)
  for image_id in set(copy.reg_image_ids()) - sample:  # Points that they see would be fixed.
    copy.deregister_frame(copy.image(image_id).frame_id)
  copy.tear_down()  # Removes those.
  wanted = pycolmap.BACovarianceOptions()
  wanted.params = pycolmap.BACovarianceOptionsParams.ALL
  covariance = pycolmap.estimate_ba_covariance(wanted, copy, _adjuster(copy, sample, ()))
  found = {}
  for camera_id in of_camera:
    camera = copy.cameras[camera_id]
    matrix = covariance and covariance.get_other_params_cov(camera.params)
    if matrix is not None and len(matrix) == len(camera.params):
      rows = list(camera.principal_point_idxs())
      found[camera_id] = float(np.sqrt(np.diag(matrix)[rows].max()))
  return found


def _adjuster(model, image_ids: Collection[int], kept: Collection[int]):
  """Returns a bundle adjuster of these images; the cameras `kept` keep their intrinsics."""
  pycolmap = reconstruction.colmap()
  config = pycolmap.BundleAdjustmentConfig()
  for image_id in image_ids:
    config.add_image(image_id)
  for camera_id in kept:
    config.set_constant_cam_intrinsics(camera_id)
  config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
  options = pycolmap.BundleAdjustmentOptions()
  options.refine_principal_point, options.print_summary = True, False
  options.ceres.solver_options.function_tolerance = _TOLERANCE
  return pycolmap.create_default_ceres_bundle_adjuster(options, config, model)


def _side(camera) -> int:
  return max(camera.width, camera.height)


def off_centre(camera) -> np.ndarray:
  """Returns where a camera's principal point is, (x, y) in pixels from the picture's centre."""
  point = np.array([camera.principal_point_x, camera.principal_point_y])
  return point - np.array([camera.width, camera.height]) / 2
