"""Refines given camera poses by bundle adjustment against the matches of the photographs.

Points are triangulated with the given poses and all is adjusted, at first with generous limits that
let poses off by some degrees find their matches, at last with COLMAP's own. Photographs without a
pose are then registered to the points. The result is moved back to the given world by the
similarity that brings the cameras closest. `n` is a number of photographs; poses are
[n, 3, 4], camera to world, OpenGL axes; errors are in pixels of the full-size photographs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping

import numpy as np

from .. import alignment
from ..system import files, progress
from . import agreement as agreement_lib
from . import mapping, principal_point, reconstruction
from . import moved as moved_lib
from .agreement import FEW, Matches
from .diagnosis import MODELS
from .given import Given, camera_from_opengl, opengl_from_camera
from .photos import FOLDER, PosesError

_LIMITS = (0.04, 0.015, 0.0)  # Largest errors of the rounds, times the photographs' longer side.
_LEAST = 4.0  # Pixels: the limit of the last round, COLMAP's.
_SUPPORT = 0.05  # A photograph needs this share of its best pair's matches as points.
_OWN_LENS = 5  # Cameras of fewer photographs keep the given intrinsics.


def refine(scene_dir: str, given: Given, fix_intrinsics: bool):
  """Refines the given poses of a capture that has matches.

  Args:
    scene_dir: the capture.
    given: the poses, and cameras, which the database has.
    fix_intrinsics: whether to keep their intrinsics.

  Returns:
    pycolmap's Reconstruction in the given world, and the report: a dict for JSON.

  Raises:
    PosesError: the matches contradict the poses, or there are too few.
  """
  pycolmap = reconstruction.colmap()
  pycolmap.set_random_seed(0)
  options = pycolmap.DatabaseCacheOptions()
  options.load_all_images = True
  options.min_num_matches = FEW
  with reconstruction.database(scene_dir) as db:
    cache = pycolmap.DatabaseCache.create(db, options)
    matches = Matches.sample(db, cache)
  model = pycolmap.Reconstruction()
  model.load(cache)
  before = {name: camera_from_opengl(pose) for name, pose in given.poses.items()}
  names = {image.name: image.camera_id for image in model.images.values()}
  camera_ids = {camera: names[name] for name, camera in given.camera_of.items()}
  agreement = agreement_lib.check(given, matches, before, cache.cameras)
  _place(model, before)
  adjuster = _Adjuster(model, cache, _constant(model, camera_ids, fix_intrinsics))
  adjuster.run()
  model, centres = principal_point.refine(model, adjuster.constant)
  verified = adjuster.observed(model)
  if len(verified & set(before)) < 3:
    raise PosesError(
      f'{given.path}: its poses of {len(verified & set(before))} photographs could be verified by '
      'matches; at least 3 are needed. Pose the photographs without --from.'
    )
  report = _finish(model, given, before, verified, camera_ids, adjuster.constant)
  after = {image.name: image.cam_from_world() for image in _registered(model)}
  report |= {
    'principal_points': centres,
    'agreement_before': agreement,
    'agreement_after': matches.agreement(after, model.cameras),
  }
  model.extract_colors_for_all_images(os.path.join(scene_dir, FOLDER))
  return model, report


def _place(model, poses: Mapping) -> None:
  """Registers the images of a reconstruction that have poses."""
  for image in list(model.images.values()):
    if image.name in poses:
      frame = model.frame(image.frame_id)
      frame.set_cam_from_world(image.camera_id, poses[image.name])
      model.register_frame(image.frame_id)


def _registered(model) -> list:
  return [model.image(image_id) for image_id in model.reg_image_ids()]


def _constant(model, camera_ids: Mapping[str, int], fix_intrinsics: bool) -> set[int]:
  """Returns the given cameras whose intrinsics are kept."""
  if fix_intrinsics:
    return set(camera_ids.values())
  count = {k: 0 for k in camera_ids.values()}
  for image in model.images.values():
    if image.camera_id in count:
      count[image.camera_id] += 1
  return {k for k, photographs in count.items() if photographs < _OWN_LENS}


class _Adjuster:
  """Rounds of triangulation and bundle adjustment of a reconstruction with poses."""

  def __init__(self, model, cache, constant: set[int]):
    self.model, self.constant = model, constant
    self._matches = cache.correspondence_graph
    self._mapper = reconstruction.colmap().IncrementalMapper(cache)
    self._mapper.begin_reconstruction(model)
    sides = [max(camera.width, camera.height) for camera in model.cameras.values()]
    self._side = float(np.median(sides))
    self._focal = float(np.median([c.mean_focal_length() for c in model.cameras.values()]))

  def run(self) -> None:
    """Adjusts in rounds of decreasing limits, then registers what has no verified pose."""
    for limit in progress.track(_LIMITS, 'adjusting poses, in rounds'):
      self._round(max(limit * self._side, _LEAST))
    while self._register():
      self._round(_LEAST)

  def _options(self, limit: float):
    """Returns the pipeline's options with `limit` pixels as the largest error."""
    options = reconstruction.colmap().IncrementalPipelineOptions()
    options.random_seed = 0
    options.constant_cameras = self.constant
    angle = float(np.degrees(np.arctan(limit / self._focal)))
    triangulation = options.triangulation
    for name in ('create_max_angle_error', 'continue_max_angle_error', 're_max_angle_error'):
      setattr(triangulation, name, max(getattr(triangulation, name), angle))
    triangulation.merge_max_reproj_error = triangulation.complete_max_reproj_error = limit
    triangulation.ignore_two_view_tracks = False
    options.mapper.filter_max_reproj_error = limit
    options.mapper.constant_cameras = self.constant
    return options

  def _round(self, limit: float) -> None:
    options, pycolmap = self._options(limit), reconstruction.colmap()
    mapper, triangulation = options.get_mapper(), options.get_triangulation()
    for image in _registered(self.model):
      self._mapper.triangulate_image(triangulation, image.image_id)
    self._mapper.retriangulate(triangulation)
    self._mapper.complete_and_merge_tracks(triangulation)
    self._mapper.filter_points(mapper)
    self._set_aside()
    adjustment = options.get_global_bundle_adjustment()
    if limit > _LEAST:  # Wrong matches pass such a limit: they must not pull.
      adjustment.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
      adjustment.ceres.loss_function_scale = limit / 10
    if self.model.num_reg_images() >= 2 and self.model.num_points3D():
      self._mapper.iterative_global_refinement(
        3, 5e-4, mapper, adjustment, triangulation, normalize_reconstruction=False
      )
    self._set_aside()

  def observed(self, model) -> set[str]:
    """Returns the names of the registered images that observe enough points.

    A wrong pose has some points too: matches that agree with it by chance, a hundredth of all.
    """
    images = _registered(model)

    def needed(image) -> float:
      others = (k.image_id for k in images if k.image_id != image.image_id)
      most = max(
        (self._matches.num_matches_between_images(image.image_id, k) for k in others), default=0
      )
      return max(FEW, _SUPPORT * most)

    return {image.name for image in images if image.num_points3D >= needed(image)}

  def _set_aside(self) -> None:
    """Removes the photographs whose poses too few points support."""
    observed = self.observed(self.model)
    for image in _registered(self.model):
      if image.name not in observed:
        self._mapper.observation_manager.deregister_frame(image.frame_id)

  def _register(self) -> int:
    """Registers photographs to the points; returns how many."""
    options = self._options(_LEAST)
    mapper, triangulation = options.get_mapper(), options.get_triangulation()
    count = 0
    for image_id in self._mapper.find_next_images(mapper, False):
      if self._mapper.register_next_image(mapper, image_id):
        self._mapper.triangulate_image(triangulation, image_id)
        count += 1
    return count


def _finish(model, given: Given, before, verified: set[str], camera_ids, constant) -> dict:
  """Moves the reconstruction to the given world, restores unverified poses and reports."""
  pycolmap = reconstruction.colmap()
  poses = {image.name: opengl_from_camera(image.cam_from_world()) for image in _registered(model)}
  names = sorted(verified & set(before))
  first, last = (np.stack([table[name] for name in names]) for table in (given.poses, poses))
  scale, rotation, shift = alignment.align(last, first)
  model.transform(pycolmap.Sim3d(scale, pycolmap.Rotation3d(rotation), shift))
  turned, moved = alignment.differences(
    *alignment.transform(last, scale, rotation, shift), first
  )  # [n]
  turned = np.degrees(turned)
  errors = _errors_before(model, given, before, set(names), camera_ids)
  _place(model, {name: before[name] for name in set(before) - verified})
  order = np.argsort(-np.maximum(moved / 0.02, turned))  # 2% of the radius weigh like a degree.
  rows = [
    {'name': names[k], 'rotation_degrees': float(turned[k]), 'position_share': float(moved[k])}
    for k in order
  ]
  return {
    'from': given.path,
    'given': len(before),
    'verified': len(names),
    'unverified': sorted(set(before) - verified),
    'registered': sorted(verified - set(before)),
    'without_photograph': list(given.lost),
    'rotation_degrees': moved_lib.summary(turned),
    'position_share': moved_lib.summary(moved),
    'scale': scale,
    'cameras': _describe_cameras(model, given, camera_ids, constant),
    'error_before': errors,
    'error_after': _error(model, set(names)),
    'per_photograph': rows,
  }


def _describe_cameras(model, given: Given, camera_ids, constant: set[int]) -> list[dict]:
  """Returns the focal length of each given camera before and after."""
  result = []
  for name, camera_id in camera_ids.items():
    camera, earlier = model.cameras[camera_id], given.cameras[name]
    pycolmap = reconstruction.colmap()
    initial = pycolmap.Camera(
      model=earlier.model, width=earlier.width, height=earlier.height, params=earlier.params
    )
    result.append(
      {
        'model': earlier.model,
        'photographs': sum(image.camera_id == camera_id for image in _registered(model)),
        'focal_before': initial.mean_focal_length(),
        'focal_after': camera.mean_focal_length(),
        'kept': camera_id in constant,
      }
    )
  return result


def _errors_before(model, given: Given, before, names: set[str], camera_ids) -> float | None:
  """Returns the error of the given poses and cameras for the same observations, points adjusted."""
  pycolmap = reconstruction.colmap()
  copy = pycolmap.Reconstruction(model)
  for image in _registered(copy):
    if image.name not in names:
      copy.deregister_frame(image.frame_id)
  _place(copy, {name: before[name] for name in names})
  for name, camera_id in camera_ids.items():
    copy.cameras[camera_id].params = given.cameras[name].params
  options = pycolmap.BundleAdjustmentOptions()
  options.refine_focal_length = options.refine_extra_params = options.refine_rig_from_world = False
  options.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
  pycolmap.bundle_adjustment(copy, options)
  return _error(copy, names)


def _error(model, names: set[str]) -> float | None:
  """Returns the median photograph's mean reprojection error."""
  xyz = {point_id: point.xyz for point_id, point in model.points3D.items()}
  errors = []
  for image in _registered(model):
    points = image.get_observation_points2D() if image.name in names else []
    if len(points):
      in_camera = image.cam_from_world() * np.array([xyz[p.point3D_id] for p in points])
      seen = in_camera[:, 2] > 0
      projected = image.camera.img_from_cam(in_camera[seen])
      offsets = projected - np.array([p.xy for p in points])[seen]
      behind = image.camera.width  # All points are behind the camera.
      errors.append(np.linalg.norm(offsets, axis=-1).mean() if seen.any() else behind)
  return float(np.median(errors)) if errors else None


def write(scene_dir: str, given: Given, fix_intrinsics: bool, pairs: int) -> None:
  """Calls `refine` and writes sparse/0 and its report, unless they were made from the same."""
  digest = hashlib.sha256(repr((pairs, sorted(given.cameras.items()))).encode())
  for name in sorted(given.poses):
    digest.update(name.encode() + np.ascontiguousarray(given.poses[name]).tobytes())
  with contextlib.suppress(files.FileError):  # A damaged one is made anew.
    if (moved_lib.read_report(scene_dir) or {}).get('made_from') == digest.hexdigest():
      return
  model, report = refine(scene_dir, given, fix_intrinsics)
  report['made_from'] = digest.hexdigest()
  mapping.write_models(scene_dir, MODELS, [model], report, os.path.basename(moved_lib.FILE))
