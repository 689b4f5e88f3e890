"""Previews a camera path: draws it with the scene from above and from the side."""

from __future__ import annotations

import dataclasses
import itertools
import os

import numpy as np

from .. import configs, paths, structs
from ..datasets import scenes, sparse_points
from ..system import progress
from ..training import checkpoints
from ..vis import canvas, pictures
from . import orbits, surface_points, trained, trajectory

_SIDE, _MARGIN, _FOOT = 800, 20, 150  # Pixels: each panel, the space around it, the text below.
_FRUSTUMS = 9  # Cameras drawn along the path.
_VIEWS, _VIEW_SIDE = 8, 96  # Views rendered for a run without stored points, and their size.
_INK, _GREY, _PALE = (30, 30, 30), (120, 120, 120), (225, 225, 225)


@dataclasses.dataclass(frozen=True)
class _Panel:
  """An orthographic view of the scene."""

  axes: np.ndarray  # [3, 3], rows: right, up and towards the viewer.
  centre: np.ndarray  # [3] World point in the panel's middle.
  scale: float  # Pixels per world unit.

  def __call__(self, points: np.ndarray) -> np.ndarray:
    """Projects world points [..., 3] to the panel's pixels [..., 2]."""
    flat = (points - self.centre) @ self.axes[:2].T
    return flat * [self.scale, -self.scale] + _SIDE / 2


def draw(
  scene: scenes.Scene,
  cams: structs.Cameras,
  fps: float,
  points: tuple[np.ndarray, np.ndarray] | None,
  origin: str,
) -> np.ndarray:
  """Draws the preview, uint8 [h, w, 3].

  Args:
    scene: the capture; lengths are given in its own units.
    cams: the cameras of the path's frames.
    fps: frames per second of the video.
    points: positions [m, 3] in the normalised world and colours [m, 3], if any.
    origin: where the points come from, for the caption.
  """
  train = np.asarray(scene.cameras.camtoworld, np.float64)[list(scene.train)]
  path = np.asarray(cams.camtoworld, np.float64)
  up = orbits.mean_up(train)
  right = _level_axis(up)
  away = np.cross(up, right)
  visible = np.concatenate([train[:, :, 3], path[:, :, 3], paths.focus_point(train)[None]])
  flat = visible @ np.stack([right, away, up]).T
  low, high = flat.min(0), flat.max(0)
  centre = (low + high) / 2 @ np.stack([right, away, up])
  scale = _SIDE / max(1.25 * (high - low).max(), 1e-9)
  sheet = canvas.Canvas(2 * _SIDE + 3 * _MARGIN, _SIDE + _FOOT + 2 * _MARGIN, 'white', _INK, halo=2)
  views = {'from above': np.stack([right, away, up]), 'from the side': np.stack([right, up, -away])}
  for k, (title, axes) in enumerate(views.items()):
    view = _draw_panel(_Panel(axes, centre, scale), title, train, cams, path, points, scene)
    sheet.paste(_MARGIN + k * (_SIDE + _MARGIN), _MARGIN, view)
  _draw_foot(sheet, _describe(scene, cams, path, train, fps, origin))
  return sheet.finished()


def _level_axis(up: np.ndarray) -> np.ndarray:
  """Returns a horizontal axis [3]: the world's x (y, if x points up) made perpendicular to up."""
  axis = np.eye(3)[0 if abs(up[0]) < 0.9 else 1]
  flat = axis - (axis @ up) * up
  return flat / np.linalg.norm(flat)


def _colors(n: int) -> list[tuple[int, ...]]:
  """Returns the colours of `n` frames, from first to last."""
  return [tuple(c) for c in pictures.apply_colormap(np.linspace(0.12, 0.88, n)).tolist()]


def _draw_panel(panel, title, train, cams, path, points, scene) -> np.ndarray:
  """Draws one view, uint8 [h, w, 3] at canvas.FINE."""
  view = canvas.Canvas(_SIDE, _SIDE, 'white', _INK, halo=2)
  if points is not None:
    view.paste(0, 0, _splat(panel, *points))
  reach = _SIDE / panel.scale  # World units across the panel.
  for pose, row in zip(train, scene.train):
    corners = _frustum(scene.cameras, row, pose, 0.03 * reach)
    _draw_frustum(view, panel(corners), _GREY, 1)
  line, colors = panel(path[:, :, 3]), _colors(len(path))
  for a, b, color in zip(line, line[1:], colors):
    view.line([a, b], color, 4)
  for k in np.unique(np.linspace(0, len(path) - 1, _FRUSTUMS).round().astype(int)):
    _draw_frustum(view, panel(_frustum(cams, k, path[k], 0.08 * reach)), colors[k], 2)
  for k, name, anchor, aside in ((0, 'start', 'ls', 11.2), (len(path) - 1, 'end', 'rs', -11.2)):
    x, y = line[k]
    view.disc(x, y, 7, colors[k], 'white', 2)
    view.text(x + aside, y - 5.6, name, 18, anchor=anchor)
  _draw_legend(view, panel, title, scene)
  view.box(0, 0, _SIDE - 0.5, _SIDE - 0.5, None, outline=_PALE)
  return np.asarray(view.image)


def _splat(panel: _Panel, xyz: np.ndarray, rgb: np.ndarray) -> np.ndarray:
  """Draws points as pale dots on white, the nearest on top: uint8 [h, w, 3] at canvas.FINE."""
  side, dot = _SIDE * canvas.FINE, range(-canvas.FINE, canvas.FINE + 1)
  image = np.full((side, side, 3), 255, np.uint8)
  order = np.argsort(xyz @ panel.axes[2])
  places = np.round(canvas.FINE * panel(xyz[order])).astype(np.int64)
  shade = (0.7 * rgb[order] + 0.3 * 255).astype(np.uint8)
  for dx, dy in itertools.product(dot, dot):
    x, y = (places + np.array([dx, dy])).T
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    image[y[inside], x[inside]] = shade[inside]
  return image


def _frustum(cams: structs.Cameras, row: int, pose: np.ndarray, depth: float) -> np.ndarray:
  """Returns a camera's centre and the four corners of its image plane, world points [5, 3].

  For lenses other than perspective: its centre and a point ahead [2, 3].
  """
  eye = pose[:, 3]
  if np.asarray(cams.lens)[row] != structs.PERSPECTIVE:
    return np.stack([eye, eye - depth * pose[:, 2]])
  width, height = np.asarray(cams.size)[row]
  corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], np.float64)
  plane = corners @ np.asarray(cams.pixtocam, np.float64)[row].T * [1, -1, -1]
  plane *= depth / np.linalg.norm(plane, axis=-1).max()
  return np.concatenate([eye[None], eye + plane @ pose[:, :3].T])


def _draw_frustum(view: canvas.Canvas, corners: np.ndarray, color, width: int) -> None:
  """Draws projected corners of `_frustum`; the image's upper edge is bold."""
  eye, first, *rest = corners
  if rest:
    view.pyramid(corners, color, width)
    view.line([first, rest[0]], color, 2 * width)
  else:
    view.line([eye, first], color, width)
    view.disc(*eye, 0.5 * np.hypot(*(first - eye)) + 1, None, color, width)


def _draw_legend(view: canvas.Canvas, panel: _Panel, title: str, scene: scenes.Scene) -> None:
  """Draws title, scale bar and the direction of up."""
  left, bottom, right = 18, _SIDE - 36, _SIDE - 54
  view.text(left, left, title, 24)
  unit = _units(scene)
  length = _round_down(0.2 * _SIDE / panel.scale / unit)
  view.line([(left, bottom), (left + length * unit * panel.scale, bottom)], _INK, 3)
  view.text(left, bottom - 28, f"{length:g} of the capture's units", 16)
  if title == 'from above':
    view.disc(right, bottom, 9, 'white', _INK, 2)
    view.disc(right, bottom, 3, _INK)
  else:
    tip = bottom - 60
    view.line([(right, bottom), (right, tip)], _INK, 3)
    view.polygon([(right, tip - 8), (right - 8, tip + 8), (right + 8, tip + 8)], _INK)
  view.text(right - 45, bottom - 10, 'up', 18)


def _units(scene: scenes.Scene) -> float:
  """Returns the length of one of the capture's units in the normalised world."""
  return float(np.cbrt(np.linalg.det(scene.world_transform[:3, :3])))


def _round_down(x: float) -> float:
  """Returns the largest of 1, 2 and 5 times a power of ten that is at most x."""
  power = 10.0 ** np.floor(np.log10(x))
  return float(power * max(m for m in (1, 2, 5) if m * power <= x * (1 + 1e-9)))


def _describe(scene, cams, path, train, fps: float, origin: str) -> list[str]:
  """Describes the path's length, lens and spacing in lines of text, in the capture's units."""
  n, unit = len(path), _units(scene)
  width, height = np.asarray(cams.size)[0]
  lens = structs.LENS_NAMES[int(np.asarray(cams.lens)[0])]
  reach = np.median(np.linalg.norm(train[:, :, 3] - paths.focus_point(train), axis=-1))
  lengths = np.linalg.norm(np.diff(path[:, :, 3], axis=0), axis=-1) / unit
  steps = paths.motion_steps(path, reach)
  typical = np.median(steps) if len(steps) else 0
  uneven = steps.max() / typical if typical > 0 else 1.0
  jump = f'one step is {uneven:.1f} times the usual' if uneven > 1.5 else 'even steps'
  to_photo = np.linalg.norm(path[:, None, :, 3] - train[None, :, :, 3], axis=-1).min(1) / unit
  far = int(to_photo.argmax())
  return [
    f'{n} frames, {n / fps:.1f} s at {fps:g} frames a second    {width} x {height}, '
    f'{lens}{_angles(cams)}',
    f'length {lengths.sum():.3g} units, {jump}    farthest from any photo: frame {far}, '
    f'{to_photo[far]:.2g} units',
    f'grey: the {len(train)} training photos    points: {origin}',
  ]


def _angles(cams: structs.Cameras) -> str:
  """Returns the fields of view, e.g. ', 60 x 40 degrees', as ranges where they vary."""
  kind = int(np.asarray(cams.lens)[0])
  if kind == structs.PANORAMA:
    return ', all directions'
  size, inverse = np.asarray(cams.size, np.float64), np.asarray(cams.pixtocam, np.float64)
  half = inverse[:, [0, 1], [0, 1]] * size / 2
  degrees = np.degrees(2 * (half if kind == structs.FISHEYE else np.arctan(half)))
  low, high = np.round(degrees.min(0)), np.round(degrees.max(0))
  ranges = [f'{a:.0f}' if a == b else f'{a:.0f}-{b:.0f}' for a, b in zip(low, high)]
  return f', {ranges[0]} x {ranges[1]} degrees'


def _draw_foot(sheet: canvas.Canvas, lines: list[str]) -> None:
  """Draws the colour bar of time, and `lines` below it."""
  left, top = _MARGIN, _SIDE + 2 * _MARGIN
  for k, color in enumerate(_colors(400)):
    sheet.box(left + k, top, left + k + 1, top + 14, color)
  sheet.text(left + 415, top - 4, 'time: from start to end', 18)
  for k, line in enumerate(lines):
    sheet.text(left, top + 28 + 34 * k, line, 21)


def _points(
  settings: configs.Settings, scene: scenes.Scene, run: str
) -> tuple[tuple[np.ndarray, np.ndarray] | None, str]:
  """Returns points of the scene and a caption; renders views where no points are stored."""
  points = sparse_points.load(run)
  if points is not None:
    return points, f'{len(points[0]):,} sparse points of the capture'
  if scene.cameras.pixtocam_ndc is not None or checkpoints.newest(run) is None:
    return None, 'none are stored with this run'
  progress.say('No sparse points are stored with this run: rendering a few small views instead.')
  restored = trained.restore(run, settings, scene)
  rows = np.array(scene.train)[np.linspace(0, len(scene.train) - 1, _VIEWS).astype(int)]
  views = trajectory.shrink(scene.cameras.take(np.unique(rows)), _VIEW_SIDE)
  points = surface_points.from_views(
    restored.render_image, restored.params, views, restored.train_fraction
  )
  return points, f'median distances at step {restored.step:,}'


def write(settings: configs.Settings, scene: scenes.Scene, run: str, folder: str) -> str:
  """Draws the path of Config.render_* to <folder>/preview.png; returns the file's path.

  Raises:
    TrajectoryError, PathFileError: the settings or the path's file are invalid.
  """
  cams, fps = trajectory.make_path(settings.config, scene)
  points, origin = _points(settings, scene, run)
  path = os.path.join(folder, 'preview.png')
  pictures.write_png(path, draw(scene, cams, fps, points, origin))
  return path
