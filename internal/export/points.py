"""Exports a trained scene as coloured points, and as depth maps with poses.

Both come from rendered views: pinhole cameras at training poses, without distortion, into which
points project by one division. "World" is the normalised world; `Scene.world_transform` leads from
the capture's own frame to it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import numpy as np

from .. import cameras, paths, structs
from ..datasets import scenes
from ..errors import UserError
from ..rendering import surface_points
from ..system import files, progress
from ..vis import pictures

_WIDTH = 400  # Of views in pixels.
_DEPTH_SCALE = 1000.0  # Depth files are in thousandths of the capture's unit.


class ExportError(UserError):
  """A scene or an option that cannot be exported."""


@dataclasses.dataclass(frozen=True)
class Views:
  """Rendered views [v], all of the same size."""

  cams: structs.Cameras
  images: list[dict]  # Renderings, as `renderer.make_image_renderer` returns them.

  def depth(self, k: int) -> np.ndarray:
    """Returns depths [h, w] along the optical axis in world units, infinite without a surface."""
    image = self.images[k]
    return np.where(image['acc'] >= 0.5, image['distance_median'], np.inf)


def default_width(scene: scenes.Scene) -> int:
  """Returns the width of views in pixels: 400, or less for smaller training photographs.

  More pixels than the photographs have would take time and show nothing more.
  """
  return min(_WIDTH, int(np.asarray(scene.cameras.size)[list(scene.train), 0].max()))


def pinhole_views(scene: scenes.Scene, count: int, width: int) -> structs.Cameras:
  """Returns at most `count` evenly spaced training poses as pinhole cameras of `width` pixels.

  All have the field of view of the first training camera, or 90 degrees if that is a fisheye.

  Raises:
    ExportError: the rays are in NDC, or `count` or `width` is too small.
  """
  if scene.cameras.pixtocam_ndc is not None:
    raise ExportError(
      'A forward-facing run cannot be exported: its rays are in NDC, which has no metric '
      'distances. Train without Config.forward_facing.'
    )
  if count < 1 or width < 2:
    raise ExportError(
      f'An export needs at least one view of at least 2 pixels, got {count} of {width} pixels.'
    )
  train = scene.cameras.take(np.array(scene.train))
  own_size = np.asarray(train.size[0], np.float64)
  focal = 1 / np.asarray(train.pixtocam, np.float64)[0, 0, 0] / own_size[0]  # In image widths.
  if train.lens[0] != structs.PERSPECTIVE:
    focal = 0.5
  size = np.array([width, max(1, round(width * own_size[1] / own_size[0]))])
  rows = np.unique(np.linspace(0, len(scene.train) - 1, count).round().astype(int))
  inverse = cameras.pixtocam_from_intrinsics(focal * width, focal * width, *(size / 2))
  return cameras.make_cameras(inverse, np.asarray(train.camtoworld)[rows], size)


def render_views(render_image: Callable, params, cams: structs.Cameras, fraction: float) -> Views:
  """Renders all of `cams`, `fraction` of training being done."""
  rows = progress.track(range(len(cams.size)), 'views')
  return Views(cams, [render_image(params, cams, k, fraction) for k in rows])


@dataclasses.dataclass(frozen=True)
class Support:
  """How many views agree with points [m]. Views in which a point is hidden or outside abstain."""

  seen: np.ndarray  # [m] int, number of views that see a surface at the point.
  through: np.ndarray  # [m] int, number of views that see through the point.
  colors: np.ndarray  # [m, 3] uint8, mean colour in the `seen` views, weighted by 1 / depth^2.


def seen_at(
  cams: structs.Cameras, k: int, xyz: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
  """Projects points [m, 3] into the pinhole camera k.

  Returns:
    The rows of the n points in its picture [n], their pixels (rows [n], columns [n]), and their
    depths along the optical axis [n].
  """
  pose = np.asarray(cams.camtoworld, np.float64)[k]
  x, y, back = ((xyz - pose[:, 3]) @ pose[:, :3]).T  # Each is [m].
  focal_x, focal_y = 1 / np.asarray(cams.pixtocam, np.float64)[k, [0, 1], [0, 1]]
  width, height = np.asarray(cams.size)[k]
  with np.errstate(all='ignore'):
    u, v = width / 2 - focal_x * x / back, height / 2 + focal_y * y / back
    inside = (back < 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)  # [m]
  rows = np.flatnonzero(inside)
  return rows, (v[rows].astype(int), u[rows].astype(int)), -back[rows]


def support(xyz: np.ndarray, views: Views, tolerance: float = 0.03, slack=0.0) -> Support:
  """Compares the depths of points with the depth maps of all views.

  Args:
    xyz: [m, 3] world.
    views: v views.
    tolerance: relative difference of depths up to which a point is on a view's surface.
    slack: difference of depths that is always allowed, for all points or [m].
  """
  seen, through = np.zeros((2, len(xyz)), np.int32)
  colors, weights = np.zeros((len(xyz), 3)), np.full((len(xyz), 1), 1e-30)
  slack = np.broadcast_to(slack, len(xyz))
  for k in range(len(views.images)):
    rows, pixel, ahead = seen_at(views.cams, k, xyz)
    depth = views.depth(k)[pixel]  # [inside]
    allowed = np.maximum(tolerance * depth, slack[rows])
    with np.errstate(invalid='ignore'):  # Without a surface, the depth is infinite.
      behind = ahead - depth
      hit = np.abs(behind) <= allowed * np.isfinite(depth)
    through[rows] += (behind < 0) & ~hit
    rows = rows[hit]
    seen[rows] += 1
    weight = ahead[hit, None] ** -2.0  # [hit, 1]
    weights[rows] += weight
    colors[rows] += weight * views.images[k]['rgb'][pixel][hit]
  return Support(seen, through, np.round(255 * np.clip(colors / weights, 0, 1)).astype(np.uint8))


def in_box(xyz: np.ndarray, box: np.ndarray) -> np.ndarray:
  """Returns whether points [m, 3] are in `box` [2, 3], its lower and upper corner: [m] bool."""
  return ((xyz >= box[0]) & (xyz <= box[1])).all(-1)


def point_cloud(views: Views, box: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns coloured points where rendered views agree on a surface.

  A pixel gives a point if its opacity is at least 0.5, and its 5th and 95th percentile of distance
  differ by at most a fifth of the median. A point is kept if at least two views (its own is
  one; one suffices if there is only one) see it, and fewer views see through it.

  Args:
    views: v rendered views.
    box: [2, 3] world; points outside are left out.
    most: maximum number of points, a random sample if there are more.

  Returns:
    Positions [m, 3] in the world, and colours, uint8 [m, 3].

  Raises:
    ExportError: there are no points.
  """
  parts = [
    surface_points.from_image(views.cams, k, image, 0.2) for k, image in enumerate(views.images)
  ]
  xyz, rgb = (np.concatenate(each) for each in zip(*parts))
  kept = np.flatnonzero(in_box(xyz, box))
  votes = support(xyz[kept], views)
  kept = kept[(votes.seen >= min(2, len(views.images))) & (votes.through < votes.seen)]
  if not len(kept):
    raise ExportError(
      f'No view shows a surface within the box {np.round(box, 3).tolist()} (normalised units). '
      'Choose a larger --box, or train longer.'
    )
  if len(kept) > most:
    kept = np.random.default_rng(0).choice(kept, most, replace=False)
  return xyz[kept], rgb[kept]


def offset(scene: scenes.Scene) -> np.ndarray:
  """Returns [3] whole numbers near the capture's centre if it is far from the origin, or zeros.

  Coordinates in float32, as .glb files have, are relative to it: in the millions of metres of a
  geographic frame, steps of float32 are up to half a metre.
  """
  inverse = np.linalg.inv(scene.world_transform)
  centre, unit = inverse[:3, 3], np.cbrt(np.linalg.det(inverse[:3, :3]))
  return np.round(centre) if np.abs(centre).max() > 16 * unit else np.zeros(3)


def to_capture(scene: scenes.Scene, xyz: np.ndarray) -> np.ndarray:
  """Transforms world points [m, 3] to the capture's own frame and units."""
  return paths.transform_points(np.linalg.inv(scene.world_transform), xyz)


def write_depth_folder(folder: str, scene: scenes.Scene, views: Views) -> None:
  """Writes views as a nerfstudio capture: transforms.json, images/*.png and depths/*.npy.

  Poses are in the capture's own frame. Depths, float32 [h, w], are along the optical axis in
  thousandths of the capture's unit (nerfstudio's depth_unit_scale_factor is 0.001), and 0 where
  there is no surface.
  """
  poses = np.asarray(views.cams.camtoworld, np.float64)
  poses = paths.pad_poses(paths.transform_poses(np.linalg.inv(scene.world_transform), poses))
  unit = np.cbrt(np.linalg.det(scene.world_transform[:3, :3]))
  frames = []
  for k, image in enumerate(views.images):
    depth = views.depth(k) / unit * _DEPTH_SCALE
    depth = np.where(np.isfinite(depth), depth, 0).astype(np.float32)
    image_file, depth_file = f'images/{k:05d}.png', f'depths/{k:05d}.npy'
    pictures.write_png(os.path.join(folder, image_file), image['rgb'])
    with files.whole(os.path.join(folder, depth_file)) as path:
      np.save(path, depth)
    frames.append(
      {
        'file_path': image_file,
        'depth_file_path': depth_file,
        'transform_matrix': poses[k].tolist(),
      }
    )
  width, height = np.asarray(views.cams.size)[0].tolist()
  fx, fy = (1 / np.asarray(views.cams.pixtocam, np.float64)[0, [0, 1], [0, 1]]).tolist()
  table = {
    'camera_model': 'OPENCV', 'w': width, 'h': height, 'fl_x': fx, 'fl_y': fy, 'cx': width / 2,
    'cy': height / 2, 'depth_unit_scale_factor': 1 / _DEPTH_SCALE, 'frames': frames,
  }  # fmt: skip
  files.write_json(os.path.join(folder, 'transforms.json'), table, 1)
