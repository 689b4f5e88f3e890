"""Line charts as SVG, drawn by matplotlib.

matplotlib is imported where a chart is drawn, since its import takes a second.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Sequence

_SIZE = 560, 260  # In SVG units; matplotlib has 72 per inch.
_LEGEND_LINE = 18  # Height of a legend entry.
_MAX_POINTS = 240  # Points drawn per line; longer lines are averaged.
_COLORS = ('#00798c', '#d1495b', '#edae49', '#66a182', '#8d6a9f', '#7f8c8d', '#b5651d')
_TEXT, _GRID = '#444444', '#dddddd'


@dataclasses.dataclass(frozen=True)
class Series:
  """A named line, or separate dots."""

  name: str
  points: Sequence[tuple[float, float]]  # (x, y) in order of x.
  dots: bool = False


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Averages neighbouring points, so that at most `_MAX_POINTS` are left."""
  size = math.ceil(len(points) / _MAX_POINTS)
  parts = [points[k : k + size] for k in range(0, len(points), max(size, 1))]
  return [tuple(sum(values) / len(part) for values in zip(*part)) for part in parts]


def line_chart(series: Sequence[Series], unit: str, log: bool = False) -> str:
  """Returns an SVG to embed in an HTML page, or '' if there are no points to draw.

  Colours are the page's CSS variables: --c0, --c1, ... for the series, --soft for text and --rule
  for the grid. The legend is left to the page.

  Args:
    series: non-finite points are left out, and with `log` also points that are not positive.
    unit: unit of the y axis, written in the chart's corner.
    log: whether the y axis is logarithmic.
  """
  lines = [[(x, y) for x, y in s.points if _is_drawable(y, log)] for s in series]
  if not any(lines):
    return ''
  figure, axes = _figure(_SIZE[1])
  _plot(axes, series, lines)
  _format_axes(axes, min(0, min(points[0][0] for points in lines if points)), log)
  axes.annotate(unit, (0, 1), (6, -6), 'axes fraction', 'offset points', va='top', color=_TEXT)
  # ids must be unique in the page, which may embed several charts.
  svg = _svg(figure, f'{unit}-{"log" if log else "linear"}-')
  for color, name in [*((c, f'c{k}') for k, c in enumerate(_COLORS)), (_TEXT, 'soft'),
                      (_GRID, 'rule')]:  # fmt: skip
    svg = svg.replace(color, f'var(--{name})')
  return svg


def standalone(series: Sequence[Series], title: str, x_ticks: Sequence[tuple[float, str]]) -> str:
  """Returns an SVG file with title and legend, on white.

  Args:
    series: as in `line_chart`.
    title: written above the chart.
    x_ticks: positions and labels of the ticks of the x axis.
  """
  figure, axes = _figure(_SIZE[1] + 28 + _LEGEND_LINE * len(series))
  figure.set_facecolor('white')
  _plot(axes, series, [[(x, y) for x, y in s.points if _is_drawable(y, False)] for s in series])
  _format_axes(axes, 0, False)
  axes.set_xticks(*zip(*x_ticks))
  axes.set_title(title, loc='left', fontsize=12, color=_TEXT, parse_math=False)
  legend = figure.legend(loc='outside lower left', frameon=False, labelcolor=_TEXT)
  for text in legend.get_texts():
    text.set_parse_math(False)
  return _svg(figure, '')


def _is_drawable(y: float | None, log: bool) -> bool:
  return y is not None and math.isfinite(y) and (y > 0 or not log)


def _figure(height: int):
  """Returns an empty figure with a transparent background, and its axes."""
  from matplotlib.figure import Figure

  figure = Figure((_SIZE[0] / 72, height / 72), layout='constrained', facecolor='none')
  axes = figure.add_subplot(facecolor='none')
  axes.spines[:].set_visible(False)
  axes.grid(color=_GRID, linewidth=1)
  axes.tick_params(which='both', length=0, labelsize=11, labelcolor=_TEXT)
  return figure, axes


def _plot(axes, series: Sequence[Series], lines: Sequence[Sequence[tuple[float, float]]]) -> None:
  """Plots the `lines` [(x, y), ...] of the series; a single point becomes a dot."""
  for k, (s, points) in enumerate(zip(series, lines)):
    dots = s.dots or len(points) == 1
    style = {'linestyle': 'none', 'marker': 'o', 'markersize': 7} if dots else {'linewidth': 2}
    xs, ys = zip(*(points if dots else thin(points))) if points else ((), ())
    (line,) = axes.plot(xs, ys, color=_COLORS[k % len(_COLORS)], label=s.name, **style)
    line.set_gid(f'{"dots" if dots else "line"}-{k}')


def _format_axes(axes, left: float, log: bool) -> None:
  """Starts the x axis near `left` and gives both axes short, round tick labels."""
  from matplotlib import ticker

  axes.update_datalim([(left, axes.dataLim.y0)], updatey=False)
  axes.margins(x=0.02)
  axes.autoscale_view()
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  if log:
    axes.set_yscale('log')
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1,) if high > 30 * low else (1, 2, 5)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
  else:
    axes.ticklabel_format(axis='y', useOffset=False)


def _svg(figure, prefix: str) -> str:
  """Returns the figure as an <svg> element whose ids start with `prefix`."""
  import matplotlib

  out = io.StringIO()
  metadata = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
  # Text stays text, and equal charts give equal files.
  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'chart'}):
    figure.savefig(out, format='svg', metadata=metadata)
  svg = out.getvalue()
  svg = svg[svg.index('<svg') :]
  # In a page, this rule would apply to everything.
  svg = re.sub(r'<defs>\s*<style type="text/css">.*?</style>\s*</defs>', '', svg, flags=re.DOTALL)
  return re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{prefix}', svg)
