"""A camera path in its scene, from above and from the side: a picture before hours of rendering."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .. import configs, paths, structs
from ..datasets import scenes, sparse_points
from ..devices import sharding
from ..system import progress
from ..training import checkpoints, train_step
from ..vis import pictures
from . import orbits, renderer, surface_points, trajectory

_SIDE, _MARGIN, _FOOT = 800, 20, 150  # Pixels: a panel, around it, the lines below.
_FINE = 2  # Drawn larger by this and shrunk, for smooth lines.
_FRUSTUMS = 9
_VIEWS, _VIEW_SIDE = 8, 96  # Rendered for their points where none are stored: how many, pixels.
_INK, _GREY, _PALE = (30, 30, 30), (120, 120, 120), (225, 225, 225)


@dataclasses.dataclass(frozen=True)
class _Panel:
  """An orthographic view, in pixels of the fine picture."""

  corner: tuple[int, int]  # Of the panel, in the picture.
  axes: np.ndarray  # [3, 3], rows: right, up and towards the viewer.
  centre: np.ndarray  # [3] world, the panel's middle.
  scale: float  # Pixels per world unit.

  def __call__(self, points: np.ndarray) -> np.ndarray:
    """World points [..., 3] to the panel's own pixels [..., 2]."""
    flat = (points - self.centre) @ self.axes[:2].T
    return flat * [self.scale, -self.scale] + _SIDE * _FINE / 2


def draw(
  scene: scenes.Scene,
  cams: structs.Cameras,
  fps: float,
  points: tuple[np.ndarray, np.ndarray] | None,
  origin: str,
) -> np.ndarray:
  """The picture, uint8 [h, w, 3].

  Args:
    scene: the capture, in whose own units lengths are told.
    cams: the path's frames, n of them.
    fps: frames a second of the video.
    points: positions [m, 3] in the normalised world and colours [m, 3]; None for none.
    origin: what the points are, for the caption.
  """
  train = np.asarray(scene.cameras.camtoworld, np.float64)[list(scene.train)]
  path = np.asarray(cams.camtoworld, np.float64)
  up = orbits.mean_up(train)
  right = _level_axis(up)
  away = np.cross(up, right)
  seen = np.concatenate([train[:, :, 3], path[:, :, 3], paths.focus_point(train)[None]])
  flat = seen @ np.stack([right, away, up]).T
  low, high = flat.min(0), flat.max(0)
  centre = (low + high) / 2 @ np.stack([right, away, up])
  scale = _SIDE * _FINE / max(1.25 * (high - low).max(), 1e-9)
  width = 2 * _SIDE + 3 * _MARGIN
  picture = Image.new('RGB', (width * _FINE, (_SIDE + _FOOT + 2 * _MARGIN) * _FINE), 'white')
  views = {
    'from above': np.stack([right, away, up]),
    'from the side': np.stack([right, up, -away]),
  }
  for k, (title, axes) in enumerate(views.items()):
    corner = ((_MARGIN + k * (_SIDE + _MARGIN)) * _FINE, _MARGIN * _FINE)
    panel = _Panel(corner, axes, centre, scale)
    picture.paste(_draw_panel(panel, title, train, cams, path, points, scene), corner)
  _draw_foot(ImageDraw.Draw(picture), _describe(scene, cams, path, train, fps, origin))
  return np.asarray(picture.resize((width, picture.height // _FINE), Image.Resampling.BOX))


def _level_axis(up: np.ndarray) -> np.ndarray:
  """The world's x (y, if x is up), made level [3]."""
  axis = np.eye(3)[0 if abs(up[0]) < 0.9 else 1]
  flat = axis - (axis @ up) * up
  return flat / np.linalg.norm(flat)


def _colors(n: int) -> np.ndarray:
  """Colours [n, 3] of frames by their time, uint8."""
  return pictures.apply_colormap(np.linspace(0.12, 0.88, n))


def _draw_panel(panel, title, train, cams, path, points, scene) -> Image.Image:
  side = _SIDE * _FINE
  canvas = np.full((side, side, 3), 255, np.uint8)
  if points is not None:
    _splat(canvas, panel, *points)
  picture = Image.fromarray(canvas)
  pen = ImageDraw.Draw(picture)
  reach = side / panel.scale  # World units across the panel.
  for pose, row in zip(train, scene.train):
    corners = _frustum(scene.cameras, row, pose, 0.03 * reach)
    _draw_frustum(pen, panel, corners, _GREY, _FINE)
  line, colors = panel(path[:, :, 3]), _colors(len(path))
  for a, b, color in zip(line, line[1:], colors):
    pen.line([tuple(a), tuple(b)], tuple(color.tolist()), 4 * _FINE)
  for k in np.unique(np.linspace(0, len(path) - 1, _FRUSTUMS).round().astype(int)):
    corners = _frustum(cams, k, path[k], 0.08 * reach)
    _draw_frustum(pen, panel, corners, tuple(colors[k].tolist()), 2 * _FINE)
  for k, name, anchor in ((0, 'start', 'ls'), (len(path) - 1, 'end', 'rs')):
    x, y = line[k]
    r = 7 * _FINE
    pen.ellipse([x - r, y - r, x + r, y + r], tuple(colors[k].tolist()), 'white', 2 * _FINE)
    aside = 1.6 * r if anchor == 'ls' else -1.6 * r
    _write(pen, (x + aside, y - 0.8 * r), name, 18, anchor)
  _draw_legend(pen, panel, title, scene, side)
  pen.rectangle([0, 0, side - 1, side - 1], None, _PALE, _FINE)
  return picture


def _write(pen, where, text: str, size: int, anchor: str = 'la') -> None:
  font = ImageFont.load_default(size * _FINE)
  pen.text(where, text, _INK, font, anchor, stroke_width=2 * _FINE, stroke_fill='white')


def _splat(canvas: np.ndarray, panel: _Panel, xyz: np.ndarray, rgb: np.ndarray) -> None:
  """Points as dots, the nearest to the viewer on top, a little paler than they are."""
  order = np.argsort(xyz @ panel.axes[2])
  where = np.round(panel(xyz[order])).astype(np.int64)
  shade = (0.7 * rgb[order] + 0.3 * 255).astype(np.uint8)
  for dx in range(-_FINE, _FINE + 1):
    for dy in range(-_FINE, _FINE + 1):
      x, y = (where + np.array([dx, dy])).T
      inside = (x >= 0) & (y >= 0) & (x < canvas.shape[1]) & (y < canvas.shape[0])
      canvas[y[inside], x[inside]] = shade[inside]


def _frustum(cams: structs.Cameras, row: int, pose: np.ndarray, depth: float) -> np.ndarray:
  """The eye and the picture's four corners [5, 3], or eye and the point looked at [2, 3].

  The latter for lenses that have no flat picture.
  """
  eye = pose[:, 3]
  if np.asarray(cams.lens)[row] != structs.PERSPECTIVE:
    return np.stack([eye, eye - depth * pose[:, 2]])
  width, height = np.asarray(cams.size)[row]
  corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], np.float64)
  plane = corners @ np.asarray(cams.pixtocam, np.float64)[row].T * [1, -1, -1]
  plane *= depth / np.linalg.norm(plane, axis=-1).max()
  return np.concatenate([eye[None], eye + plane @ pose[:, :3].T])


def _draw_frustum(pen, panel: _Panel, corners: np.ndarray, color, width: int) -> None:
  eye, *rest = (tuple(p) for p in panel(corners))
  for corner in rest:
    pen.line([eye, corner], color, width)
  if len(rest) > 1:
    pen.line([*rest, rest[0]], color, width)
    pen.line([rest[0], rest[1]], color, 2 * width)  # The picture's upper edge.
  else:
    r = 0.5 * np.hypot(*np.subtract(rest[0], eye)) + 2
    pen.ellipse([eye[0] - r, eye[1] - r, eye[0] + r, eye[1] + r], None, color, width)


def _draw_legend(pen, panel: _Panel, title: str, scene: scenes.Scene, side: int) -> None:
  """Title, scale and the direction of up."""
  edge = 18 * _FINE
  _write(pen, (edge, edge), title, 24)
  unit = _units(scene)
  length = _nice(0.2 * side / panel.scale / unit)
  pixels, y = length * unit * panel.scale, side - 2 * edge
  pen.line([edge, y, edge + pixels, y], _INK, 3 * _FINE)
  _write(pen, (edge, y - 28 * _FINE), f"{length:g} of the capture's units", 16)
  x, y = side - 3 * edge, side - 2 * edge
  if title == 'from above':
    r = 9 * _FINE
    pen.ellipse([x - r, y - r, x + r, y + r], 'white', _INK, 2 * _FINE)
    pen.ellipse([x - r / 3, y - r / 3, x + r / 3, y + r / 3], _INK)
  else:
    tip = y - 60 * _FINE
    pen.line([x, y, x, tip], _INK, 3 * _FINE)
    w = 8 * _FINE
    pen.polygon([(x, tip - w), (x - w, tip + w), (x + w, tip + w)], _INK)
  _write(pen, (x - 45 * _FINE, y - 10 * _FINE), 'up', 18)


def _units(scene: scenes.Scene) -> float:
  """Normalised units in one of the capture's."""
  return float(np.cbrt(np.linalg.det(scene.world_transform[:3, :3])))


def _nice(x: float) -> float:
  """The largest of 1, 2 and 5 times a power of ten that is not above x."""
  power = 10.0 ** np.floor(np.log10(x))
  return float(power * max(m for m in (1, 2, 5) if m * power <= x * (1 + 1e-9)))


def _describe(scene, cams, path, train, fps: float, origin: str) -> list[str]:
  """What a person wants to know of a path, in numbers, lengths in the capture's units."""
  n, unit = len(path), _units(scene)
  width, height = np.asarray(cams.size)[0]
  lens = structs.LENS_NAMES[int(np.asarray(cams.lens)[0])]
  reach = np.median(np.linalg.norm(train[:, :, 3] - paths.focus_point(train), axis=-1))
  ways = np.linalg.norm(np.diff(path[:, :, 3], axis=0), axis=-1) / unit
  steps = paths.motion_steps(path, reach)
  typical = np.median(steps) if len(steps) else 0
  uneven = steps.max() / typical if typical > 0 else 1.0
  jump = f'one step is {uneven:.1f} times the usual' if uneven > 1.5 else 'even steps'
  to_photo = np.linalg.norm(path[:, None, :, 3] - train[None, :, :, 3], axis=-1).min(1) / unit
  far = int(to_photo.argmax())
  return [
    f'{n} frames, {n / fps:.1f} s at {fps:g} frames a second    {width} x {height}, '
    f'{lens}{_angles(cams)}',
    f'way {ways.sum():.3g} units, {jump}    farthest from any photo: frame {far}, '
    f'{to_photo[far]:.2g} units',
    f'grey: the {len(train)} training photos    points: {origin}',
  ]


def _angles(cams: structs.Cameras) -> str:
  """', 60 x 40 degrees', the range where it changes; nothing for panoramas."""
  kind = int(np.asarray(cams.lens)[0])
  if kind == structs.PANORAMA:
    return ', all directions'
  size, inverse = np.asarray(cams.size, np.float64), np.asarray(cams.pixtocam, np.float64)
  half = inverse[:, [0, 1], [0, 1]] * size / 2
  degrees = np.degrees(2 * (half if kind == structs.FISHEYE else np.arctan(half)))
  low, high = np.round(degrees.min(0)), np.round(degrees.max(0))
  told = [f'{a:.0f}' if a == b else f'{a:.0f}-{b:.0f}' for a, b in zip(low, high)]
  return f', {told[0]} x {told[1]} degrees'


def _draw_foot(pen, lines: list[str]) -> None:
  """The colours of time, and the lines."""
  left, top = _MARGIN * _FINE, (_SIDE + 2 * _MARGIN) * _FINE
  bar = _colors(400)
  for k, color in enumerate(bar):
    pen.rectangle([left + k * _FINE, top, left + (k + 1) * _FINE, top + 14 * _FINE],
                  tuple(color.tolist()))  # fmt: skip
  _write(pen, (left + 415 * _FINE, top - 4 * _FINE), 'time: from start to end', 18)
  for k, line in enumerate(lines):
    _write(pen, (left, top + (28 + 34 * k) * _FINE), line, 21)


def _points(
  settings: configs.Settings, scene: scenes.Scene, run: str
) -> tuple[tuple[np.ndarray, np.ndarray] | None, str]:
  """Points of the scene for a preview, and what they are; rendered ones where none are stored."""
  points = sparse_points.load(run)
  if points is not None:
    return points, f'{len(points[0]):,} sparse points of the capture'
  if scene.cameras.pixtocam_ndc is not None or checkpoints.newest(run) is None:
    return None, 'none are stored with this run'
  progress.say('No sparse points are stored with this run: rendering a few small views instead.')
  mesh = sharding.make_mesh()
  params, step = checkpoints.restore_params(run, settings, mesh=mesh)
  rows = np.array(scene.train)[np.linspace(0, len(scene.train) - 1, _VIEWS).astype(int)]
  fraction = float(train_step.train_fraction(step, settings.config.max_steps))
  views = trajectory.shrink(scene.cameras.take(np.unique(rows)), _VIEW_SIDE)
  render_image = renderer.make_image_renderer(settings, mesh)
  points = surface_points.from_views(render_image, params, views, range(len(views.size)), fraction)
  return points, f'median distances at step {step:,}'


def write(settings: configs.Settings, scene: scenes.Scene, run: str, folder: str) -> str:
  """Draws the path that the settings ask for into <folder>/preview.png; returns its path.

  Raises:
    TrajectoryError, PathFileError: there is no such path.
  """
  cams = trajectory.make_cameras(settings.config, scene)
  points, origin = _points(settings, scene, run)
  fps = trajectory.frames_per_second(settings.config)
  path = os.path.join(folder, 'preview.png')
  pictures.write_png(path, draw(scene, cams, fps, points, origin))
  return path
