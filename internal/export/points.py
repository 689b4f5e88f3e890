"""What a trained scene is to other programs: coloured points, and depth maps with their poses.

Views are pinhole cameras at training poses, without distortion, so that points go into them by one
division. World means the normalised one; the capture's own differs by `Scene.world_transform`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable

import numpy as np

from .. import cameras, paths, structs
from ..datasets import scenes
from ..errors import UserError
from ..rendering import surface_points
from ..system import files, progress
from ..vis import pictures

_THOUSANDTHS = 1000.0


class ExportError(UserError):
  """What keeps a scene from being exported; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Views:
  """Rendered views [v], all of one size."""

  cams: structs.Cameras
  images: list[dict]  # What `evaluation.make_image_renderer` gives.

  def depth(self, k: int, min_opacity: float = 0.5) -> np.ndarray:
    """Depths [h, w] along the optical axis, world units; infinite where no surface is seen."""
    image = self.images[k]
    return np.where(image['acc'] >= min_opacity, image['distance_median'], np.inf)


def pinhole_views(scene: scenes.Scene, count: int, width: int) -> structs.Cameras:
  """At most `count` training poses, spread evenly, with the first one's field of view.

  A fisheye's becomes 90 degrees.

  Raises:
    ExportError: a forward-facing capture, whose rays are in NDC; or no view is asked for.
  """
  if scene.cameras.pixtocam_ndc is not None:
    raise ExportError(
      'A forward-facing run has its rays in NDC, where distances are none: train it without '
      'Config.forward_facing to export it.'
    )
  if count < 1 or width < 2:
    raise ExportError(f'Views must be at least one, and 2 pixels wide, got {count} of {width}.')
  train = scene.cameras.take(np.array(scene.train))
  own = np.asarray(train.size[0], np.float64)
  focal = 1 / np.asarray(train.pixtocam, np.float64)[0, 0, 0] / own[0]
  if train.lens[0] != structs.PERSPECTIVE:
    focal = 0.5
  size = np.array([width, max(1, round(width * own[1] / own[0]))])
  rows = np.unique(np.linspace(0, len(scene.train) - 1, count).round().astype(int))
  inverse = cameras.pixtocam_from_intrinsics(focal * width, focal * width, *(size / 2))
  return cameras.make_cameras(inverse, np.asarray(train.camtoworld)[rows], size)


def render_views(render_image: Callable, params, cams: structs.Cameras, fraction: float) -> Views:
  """Renders all of `cams`."""
  rows = progress.track(range(len(cams.size)), 'views')
  return Views(cams, [render_image(params, cams, k, fraction) for k in rows])


@dataclasses.dataclass(frozen=True)
class Support:
  """What views tell of points [m]; views that do not show one, or hide it, tell nothing."""

  seen: np.ndarray  # [m] int, the views that see a surface there.
  through: np.ndarray  # [m] int, the views that see through it.
  colors: np.ndarray  # [m, 3] uint8, the former views' mean, the nearest counting most.


def support(xyz: np.ndarray, views: Views, tolerance: float = 0.03) -> Support:
  """Holds points against the depth of all views.

  Args:
    xyz: [m, 3] world.
    views: v of them.
    tolerance: relative difference of depths up to which a view sees its surface at the point.
  """
  seen, through = np.zeros((2, len(xyz)), np.int32)
  colors, weights = np.zeros((len(xyz), 3)), np.full((len(xyz), 1), 1e-30)
  for k, pose in enumerate(np.asarray(views.cams.camtoworld, np.float64)):
    x, y, back = ((xyz - pose[:, 3]) @ pose[:, :3]).T
    focal_x, focal_y = 1 / np.asarray(views.cams.pixtocam, np.float64)[k, [0, 1], [0, 1]]
    width, height = np.asarray(views.cams.size)[k]
    with np.errstate(all='ignore'):
      u, v = width / 2 - focal_x * x / back, height / 2 + focal_y * y / back
      inside = (back < 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    rows = np.flatnonzero(inside)
    pixel = v[rows].astype(int), u[rows].astype(int)
    difference = -back[rows] / views.depth(k)[pixel] - 1
    through[rows] += difference < -tolerance
    hit = np.abs(difference) <= tolerance
    rows = rows[hit]
    seen[rows] += 1
    weight = back[rows, None] ** -2.0
    weights[rows] += weight
    colors[rows] += weight * views.images[k]['rgb'][pixel][hit]
  return Support(seen, through, np.round(255 * np.clip(colors / weights, 0, 1)).astype(np.uint8))


def in_box(xyz: np.ndarray, box: np.ndarray) -> np.ndarray:
  """[m] whether points [m, 3] are within `box` [2, 3], lower and upper corner."""
  return ((xyz >= box[0]) & (xyz <= box[1])).all(-1)


def point_cloud(
  views: Views, box: np.ndarray, most: int, max_spread: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
  """Coloured points where rendered views agree on a surface.

  A pixel gives a point if its distances from 5 to 95 percent of weight are within `max_spread` of
  their median and half of it is opaque; the point stays if at least two views (its own is one; one
  is enough where there is one) see it and fewer see through it.

  Args:
    views: v rendered views.
    box: [2, 3] world; points outside are left out.
    most: number of points, drawn evenly from all if there are more.
    max_spread: relative, as above.

  Returns:
    Positions [m, 3] in the world and colours, uint8 [m, 3].

  Raises:
    ExportError: no point is left.
  """
  parts = [
    surface_points.from_image(views.cams, k, image, 0.5, max_spread)
    for k, image in enumerate(views.images)
  ]
  xyz, rgb = (np.concatenate(each) for each in zip(*parts))
  kept = np.flatnonzero(in_box(xyz, box))
  told = support(xyz[kept], views)
  kept = kept[(told.seen >= min(2, len(views.images))) & (told.through < told.seen)]
  if not len(kept):
    raise ExportError(
      f'No view shows a surface within the box {np.round(box, 3).tolist()} (normalised units): '
      'choose a larger --box, or train longer.'
    )
  if len(kept) > most:
    kept = np.random.default_rng(0).choice(kept, most, replace=False)
  return xyz[kept], rgb[kept]


def to_capture(scene: scenes.Scene, xyz: np.ndarray) -> np.ndarray:
  """World points [m, 3] in the capture's own frame and units."""
  return paths.transform_points(np.linalg.inv(scene.world_transform), xyz)


def write_depth_folder(folder: str, scene: scenes.Scene, views: Views) -> None:
  """Views as nerfstudio reads captures: transforms.json, images/*.png and depths/*.npy.

  Poses are in the capture's own frame. Depths, float32 [h, w], are along the optical axis in
  thousandths of the capture's unit, as nerfstudio's depth_unit_scale_factor of 0.001 expects; 0
  where no surface is seen.
  """
  poses = np.asarray(views.cams.camtoworld, np.float64)
  poses = paths.pad_poses(paths.transform_poses(np.linalg.inv(scene.world_transform), poses))
  unit = np.cbrt(np.linalg.det(scene.world_transform[:3, :3]))
  frames = []
  for k, image in enumerate(views.images):
    depth = views.depth(k) / unit * _THOUSANDTHS
    depth = np.where(np.isfinite(depth), depth, 0).astype(np.float32)
    picture, map_ = f'images/{k:05d}.png', f'depths/{k:05d}.npy'
    pictures.write_png(os.path.join(folder, picture), image['rgb'])
    with files.whole(os.path.join(folder, map_)) as path:
      np.save(path, depth)
    frames.append(
      {'file_path': picture, 'depth_file_path': map_, 'transform_matrix': poses[k].tolist()}
    )
  width, height = np.asarray(views.cams.size)[0].tolist()
  fx, fy = (1 / np.asarray(views.cams.pixtocam, np.float64)[0, [0, 1], [0, 1]]).tolist()
  table = {
    'camera_model': 'OPENCV', 'w': width, 'h': height, 'fl_x': fx, 'fl_y': fy, 'cx': width / 2,
    'cy': height / 2, 'depth_unit_scale_factor': 1 / _THOUSANDTHS, 'frames': frames,
  }  # fmt: skip
  with files.whole(os.path.join(folder, 'transforms.json')) as path, open(path, 'w') as f:
    json.dump(table, f, indent=1)
