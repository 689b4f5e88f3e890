"""Line charts as SVG, for pages that bring no scripts along."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 22, 10, 30  # Margins.
_POINTS = 240  # Of a line, at most; more are averaged.


@dataclasses.dataclass(frozen=True)
class Series:
  """A line, or dots alone: (x, y) in rising x."""

  name: str
  points: Sequence[tuple[float, float]]
  dots: bool = False


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """At most _POINTS means of neighbours."""
  size = math.ceil(len(points) / _POINTS)
  parts = [points[k : k + size] for k in range(0, len(points), max(size, 1))]
  return [tuple(sum(values) / len(part) for values in zip(*part)) for part in parts]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Round numbers in [low, high], about so many: multiples of 1, 2 or 5 times a power of ten."""
  if not high > low:
    return [low]
  rough = (high - low) / count
  power = 10 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [k * step for k in range(first, last + 1)]


def number(value: float) -> str:
  """As short as a tick can be: '20k', '0.05', '1e-6'."""
  if abs(value) >= 1e6:
    return f'{value / 1e6:g}M'
  if abs(value) >= 1e4:
    return f'{value / 1e3:g}k'
  return f'{value:.4g}'


def line_chart(
  series: Sequence[Series],
  unit: str,
  log: bool = False,
  x_ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
  """An SVG of the series over x, such as steps; '' where there is nothing to draw.

  Colours are the page's CSS variables --c0, --c1, ...; names are not written, since a legend in
  HTML wraps better.

  Args:
    series: points that are not finite, and with `log` those that are not above 0, are left out.
    unit: of the ordinate.
    log: whether the ordinate is logarithmic.
    x_ticks: where the abscissa has which labels, instead of round numbers.
  """
  lines = []
  for s in series:
    points = [(x, math.log10(y) if log else y) for x, y in s.points if _can_be_drawn(y, log)]
    lines.append(points if s.dots else thin(points))
  drawn = [point for points in lines for point in points]
  if not drawn:
    return ''
  xs, ys = zip(*drawn)
  left, right = min(0, min(xs)), max(xs)
  pad = (max(ys) - min(ys)) * 0.05 or 0.5
  low, high = min(ys) - pad, max(ys) + pad
  to_x = lambda x: _LEFT + (x - left) / ((right - left) or 1) * (_WIDTH - _LEFT - _RIGHT)  # noqa: E731
  to_y = lambda y: _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)  # noqa: E731
  parts = []
  for y in range(math.ceil(low), math.floor(high) + 1) if log else ticks(low, high):
    parts.append(_grid(_LEFT, to_y(y), _WIDTH - _RIGHT, to_y(y)))
    label = number(10**y) if log else number(y)
    parts.append(_label(_LEFT - 6, to_y(y) + 4, label, 'end'))
  for x, label in x_ticks or [(x, number(x)) for x in ticks(left, right, 6)]:
    parts.append(_grid(to_x(x), _TOP, to_x(x), _HEIGHT - _BOTTOM))
    parts.append(_label(to_x(x), _HEIGHT - 10, label, 'middle'))
  parts.append(_label(_LEFT + 6, _TOP + 12, unit, 'start'))
  for k, (s, points) in enumerate(zip(series, lines)):
    spots = [(f'{to_x(x):.1f}', f'{to_y(y):.1f}') for x, y in points]
    if s.dots or len(spots) == 1:
      circle = '<circle cx="{}" cy="{}" r="4" fill="var(--c{})"/>'
      parts += [circle.format(x, y, k) for x, y in spots]
    elif spots:
      path = ' '.join(f'{x},{y}' for x, y in spots)
      parts.append(f'<polyline points="{path}" fill="none" stroke="var(--c{k})"/>')
  return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


_COLOURS = ('#7f8c8d', '#00798c', '#d1495b', '#edae49', '#66a182', '#8d6a9f')


def standalone(
  series: Sequence[Series], title: str, x_ticks: Sequence[tuple[float, str]] | None = None
) -> str:
  """The chart as a file of its own, below a title and above a legend, on white."""
  head, line = 28, 18
  height = head + _HEIGHT + line * len(series) + 8
  style = (
    '<style>svg{font:12px sans-serif}text{fill:#444}.grid{stroke:#ddd}polyline{stroke-width:2}'
    '</style>'
  )
  legend = ''.join(
    f'<circle cx="{_LEFT + 5}" cy="{_HEIGHT + 6 + line * k}" r="5" fill="var(--c{k})"/>'
    + _label(_LEFT + 16, _HEIGHT + 10 + line * k, html.escape(s.name), 'start')
    for k, s in enumerate(series)
  )
  inner = line_chart(series, '', x_ticks=x_ticks).partition('>')[2].removesuffix('</svg>')
  drawn = f'<g transform="translate(0,{head})">{inner}{legend}</g>'
  for k, colour in enumerate(_COLOURS):  # Not every viewer of pictures knows variables.
    drawn = drawn.replace(f'var(--c{k})', colour)
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}">{style}'
    f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>'
    + _label(_LEFT, head - 8, html.escape(title), 'start')
    + f'{drawn}</svg>\n'
  )


def _can_be_drawn(y: float | None, log: bool) -> bool:
  return y is not None and math.isfinite(y) and (y > 0 or not log)


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
  return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _label(x: float, y: float, text: str, anchor: str) -> str:
  return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
