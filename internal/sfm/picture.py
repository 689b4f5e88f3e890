"""Draws the report on a posed capture: views from above and the side, per-photo bars, checks."""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..datasets import images
from ..vis import canvas, pictures
from . import diagnosis, photos

_WIDTH = 1600
_MARGIN = 28
_MAP = (960, 640)  # From above.
_SIDE = (960, 270)
_STRIP, _LOW_STRIP = 120, 60
_THUMB = 84  # Height.
_SHOWN = 8  # Failed photographs, and warnings.
_LINE = 28  # Height of a line of a warning.

_PAPER, _INK, _DIM = (250, 249, 247), (35, 36, 40), (120, 121, 126)
_PANEL, _PALE = (22, 23, 28), (170, 171, 176)  # Views are drawn on a dark panel.
_STATUS = {'good': (46, 150, 92), 'doubtful': (222, 152, 28), 'bad': (208, 62, 52)}
_BAR, _SHARP = (86, 120, 178), (122, 148, 140)


def draw(
  scene_dir: str, found: diagnosis.Findings, checks: Sequence, warnings: Sequence[str] = ()
) -> np.ndarray:
  """Draws the report, uint8 [h, 1600, 3].

  Args:
    scene_dir: folder of the capture; gives the title and the failed photographs.
    found: poses, points and rows to draw.
    checks: checks to list, each with a name, a status and a text.
    warnings: the warnings of loading the capture.
  """
  failed = [row for row in found.rows if row.reason]
  top = 110
  rows = -(-min(len(failed), _SHOWN) // 2)
  below = top + _MAP[1] + _SIDE[1] + 2 * _MARGIN
  warned_at = below + _STRIP + _LOW_STRIP + 116
  lines = _warning_lines(warnings)
  under = warned_at + (len(lines) * _LINE + 62 if lines else 0)
  height = under + (rows * (_THUMB + 14) + 56 if failed else 0)
  sheet = canvas.Canvas(_WIDTH, height, _PAPER, _INK)
  _title(sheet, scene_dir, found)
  middle, half = _window(found.poses)
  for name, size, y, axes in (
    ('from above', _MAP, top, (0, 1)),
    ('from the side', _SIDE, top + _MAP[1] + _MARGIN, (0, 2)),
  ):
    sheet.paste(_MARGIN, y, _view(found, size, axes, middle, half), radius=10)
    sheet.box(_MARGIN + 8, y + 8, _MARGIN + 116, y + 32, _PANEL, 5)
    sheet.text(_MARGIN + 14, y + 10, name, 15, _PALE)
  if len(found.poses):
    _legend(sheet, _MARGIN + _MAP[0] - 14, top + 12)
  _draw_checks(sheet, _MARGIN + _MAP[0] + _MARGIN + 4, top, checks)
  _draw_points(sheet, below, found.rows)
  _draw_sharpness(sheet, below + _STRIP + 46, found.rows)
  if lines:
    _draw_warnings(sheet, _MARGIN, warned_at, lines)
  if failed:
    _draw_failed(sheet, scene_dir, _MARGIN, under, failed)
  return sheet.finished()


def _title(sheet: canvas.Canvas, scene_dir: str, found: diagnosis.Findings) -> None:
  name = os.path.basename(os.path.realpath(scene_dir))
  sheet.text(_MARGIN, 24, name, 34)
  summary = f'{len(found.poses)} of {len(found.rows)} photographs posed'
  if found.error is not None:
    summary += f'   ·   {found.error:.2f} px reprojection error   ·   {len(found.xyz):,} points'
  sheet.text(_MARGIN, 70, summary, 19, _DIM)


def _window(poses: np.ndarray) -> tuple[np.ndarray, float]:
  """Returns the centre [3] of the cameras, and half the height of the view from above."""
  if not len(poses):
    return np.zeros(3), 1.0
  positions = np.concatenate([poses[:, :, 3], np.zeros((1, 3))])
  low, high = positions.min(0), positions.max(0)
  wide = (high - low) / 2
  half = max(wide[1], wide[0] * _MAP[1] / _MAP[0], 1e-6)
  return (low + high) / 2, 1.35 * half


def _view(found: diagnosis.Findings, size, axes, middle, half) -> np.ndarray:
  """Draws points and cameras as seen along one axis, uint8 [h, w, 3] at canvas.FINE."""
  width, height = size
  scale = _MAP[1] / (2 * half)  # Pixels per unit, in both views.

  def project(points):
    across, up = (points[..., a] - middle[a] for a in axes)
    return np.stack([width / 2 + scale * across, height / 2 - scale * up], -1)

  view = canvas.Canvas(width, height)
  view.paste(0, 0, _splat(project(found.xyz), found.rgb, size))
  if len(found.poses):
    _draw_cameras(view, found.poses, project, 0.085 * half * _camera_scale(len(found.poses)))
  return np.asarray(view.image)


def _camera_scale(n: int) -> float:
  """Returns the size of each of `n` drawn cameras, smaller where there are many."""
  return float(np.clip(np.sqrt(100 / max(n, 1)), 0.35, 1.0))


def _splat(places: np.ndarray, rgb: np.ndarray, size) -> np.ndarray:
  """Draws points at `places` [p, 2] as soft dots; overlapping ones show their mean colour."""
  width, height = (side * canvas.FINE for side in size)
  color, weight = np.zeros((height * width, 3)), np.zeros(height * width)
  corner = np.floor(canvas.FINE * places).astype(int) if len(places) else np.zeros((0, 2), int)
  for dx, dy, share in [(x, y, 0.55 if x * y else 0.9) for x in range(-1, 2) for y in range(-1, 2)]:
    x, y = corner[:, 0] + dx, corner[:, 1] + dy
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    at = y[inside] * width + x[inside]
    weight += np.bincount(at, minlength=width * height) * share
    for c in range(3):
      color[:, c] += np.bincount(at, rgb[inside, c] * share, minlength=width * height)
  mean = color / np.maximum(weight, 1e-9)[:, None]
  mean = 255 * (np.clip(mean, 0, 255) / 255) ** 0.65  # Lighter, on the dark panel.
  opacity = (1 - np.exp(-1.8 * weight))[:, None]
  panel = opacity * mean + (1 - opacity) * np.array(_PANEL)
  return pictures.to_uint8(panel.reshape(height, width, 3) / 255)


def _colors(n: int) -> list[tuple[int, ...]]:
  """Returns `n` colours, from the first photograph's to the last one's."""
  return [tuple(c) for c in pictures.apply_colormap(np.linspace(0.42, 1.0, max(n, 2))).tolist()]


def _draw_cameras(view: canvas.Canvas, poses: np.ndarray, project, size: float) -> None:
  """Draws each camera as the pyramid of its view."""
  corners = np.array(
    [[0, 0, 0], [-0.5, -0.38, -1], [0.5, -0.38, -1], [0.5, 0.38, -1], [-0.5, 0.38, -1]]
  )
  for pose, color in zip(poses, _colors(len(poses))):
    view.pyramid(project(size * corners @ pose[:, :3].T + pose[:, 3]), color)


def _legend(sheet: canvas.Canvas, right: float, y: float) -> None:
  sheet.box(right - 272, y - 4, right + 6, y + 20, _PANEL, 5)
  for k, color in enumerate(_colors(100)):
    sheet.box(right - 150 + k, y + 4, right - 149 + k, y + 12, color)
  sheet.text(right - 158, y + 8, 'first photograph', 14, _PALE, 'rm')
  sheet.text(right - 44, y + 8, 'last', 14, _PALE, 'lm')


def _draw_checks(sheet: canvas.Canvas, x: float, y: float, checks: Sequence) -> None:
  """Lists the checks: a mark, the name and the text of each."""
  for check in checks:
    _mark(sheet, x + 13, y + 14, check.status)
    sheet.text(x + 42, y + 3, check.name, 19)
    y += 30
    for line in textwrap.wrap(check.text, 54):
      sheet.text(x + 42, y, line, 17, _DIM)
      y += 23
    y += 18


def _mark(sheet: canvas.Canvas, x: float, y: float, status: str) -> None:
  """Draws a tick, an exclamation mark or a cross in a disc."""
  sheet.box(x - 12, y - 12, x + 12, y + 12, _STATUS[status], 12)
  white = (255, 255, 255)
  if status == 'good':
    sheet.line([(x - 5.5, y + 0.5), (x - 1.5, y + 4.5), (x + 6, y - 4.5)], white, 2.4, 'curve')
  elif status == 'bad':
    sheet.line([(x - 4.5, y - 4.5), (x + 4.5, y + 4.5)], white, 2.4, 'curve')
    sheet.line([(x - 4.5, y + 4.5), (x + 4.5, y - 4.5)], white, 2.4, 'curve')
  else:
    sheet.line([(x, y - 6.5), (x, y + 1.5)], white, 2.6, 'curve')
    sheet.box(x - 1.5, y + 4, x + 1.5, y + 7, white)


def _draw_points(sheet: canvas.Canvas, y: float, rows: Sequence[diagnosis.Row]) -> None:
  failed = sum(row.reason is not None for row in rows)
  note = f'most: {max(row.points for row in rows):,}'
  note += f'   red: {failed} without a pose' if failed else ''
  colors = [_BAR if row.reason is None else _STATUS['bad'] for row in rows]
  points = [None if row.reason else row.points for row in rows]
  _strip(sheet, y, _STRIP, ('points that each photograph sees', note), points, colors)


def _draw_sharpness(sheet: canvas.Canvas, y: float, rows: Sequence[diagnosis.Row]) -> None:
  blurred = [row.sharpness < diagnosis.BLURRED for row in rows]
  note = f'yellow: {sum(blurred)} blurred' if any(blurred) else 'none is blurred'
  colors = [_STATUS['doubtful'] if soft else _SHARP for soft in blurred]
  # Capped, or a single very sharp photograph would flatten all other bars.
  sharpness = [min(row.sharpness, 2.0) for row in rows]
  _strip(
    sheet,
    y,
    _LOW_STRIP,
    ('how sharp each photograph is beside its neighbours', note),
    sharpness,
    colors,
  )
  sheet.text(_MARGIN, y + 34 + _LOW_STRIP, rows[0].name, 14, _DIM)
  sheet.text(_WIDTH - _MARGIN, y + 34 + _LOW_STRIP, rows[-1].name, 14, _DIM, 'ra')


def _strip(sheet: canvas.Canvas, y: float, height: float, words, values, colors) -> None:
  """Draws a title, a note and a bar chart of `values`; None is a bar of full height."""
  x, width = _MARGIN, _WIDTH - 2 * _MARGIN
  sheet.text(x, y, words[0], 17)
  sheet.text(x + width, y + 2, words[1], 15, _DIM, 'ra')
  y += 28
  sheet.box(x, y, x + width, y + height, (238, 237, 233), 6)
  step = width / len(values)
  most = max((value for value in values if value), default=1)
  for k, (value, color) in enumerate(zip(values, colors)):
    left, right = x + k * step, x + (k + 1) * step - (0.25 * step if step > 3 else 0)
    share = 1 if value is None else 0.95 * value / most
    sheet.box(left, y + height * (1 - share), right, y + height, color)


def _warning_lines(warnings: Sequence[str]) -> list[tuple[bool, str]]:
  """Wraps up to _SHOWN warnings; returns whether each line starts a warning, and its text."""
  shown = list(warnings[:_SHOWN])
  if len(warnings) > _SHOWN:
    shown.append(f'{len(warnings) - _SHOWN} more are in preflight.json')
  wrapped = [textwrap.wrap(warning, 165) for warning in shown]
  return [(k == 0, line) for lines in wrapped for k, line in enumerate(lines)]


def _draw_warnings(sheet: canvas.Canvas, x: float, y: float, lines) -> None:
  sheet.text(x, y, 'Warnings of loading the capture', 19)
  for k, (starts, line) in enumerate(lines):
    top = y + 36 + k * _LINE
    if starts:
      _mark(sheet, x + 13, top + 11, 'doubtful')
    sheet.text(x + 42, top, line, 17, _DIM)


def _draw_failed(sheet: canvas.Canvas, scene_dir: str, x: float, y: float, rows) -> None:
  """Draws thumbnails of the photographs without a pose, in two columns, with the likely reasons."""
  more = f': {_SHOWN} of {len(rows)}, all are in preflight.json' if len(rows) > _SHOWN else ''
  sheet.text(x, y, f'Without a pose, and why, likely{more}', 19)
  column = (_WIDTH - 2 * _MARGIN) / 2
  for k, row in enumerate(_choose(rows)):
    left, top = x + k % 2 * column, y + 38 + k // 2 * (_THUMB + 14)
    thumb = _thumbnail(os.path.join(scene_dir, photos.FOLDER, row.name))
    sheet.paste(left, top, thumb)
    beside = left + thumb.shape[1] / canvas.FINE + 16
    sheet.text(beside, top + 4, row.name, 17)
    for j, line in enumerate(textwrap.wrap(row.reason, 62)[:2]):
      sheet.text(beside, top + 30 + 22 * j, line, 16, _DIM)


def _choose(rows: Sequence[diagnosis.Row]) -> list[diagnosis.Row]:
  """Picks up to _SHOWN rows, alternating between kinds of reasons; keeps their order."""
  kinds = {}
  for row in rows:
    kinds.setdefault(row.reason.split(':')[0], []).append(row)
  alternating = [row for some in itertools.zip_longest(*kinds.values()) for row in some if row]
  shown = alternating[:_SHOWN]
  return [row for row in rows if row in shown]


def _thumbnail(path: str) -> np.ndarray:
  """Reads a photograph at thumbnail size, in pixels of the fine canvas."""
  picture = Image.fromarray(images.decode(path))
  picture.thumbnail((_THUMB * canvas.FINE * 2, _THUMB * canvas.FINE), Image.Resampling.BOX)
  return np.asarray(picture)
