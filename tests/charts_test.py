"""Charts: lines and dots lie where the numbers are, and non-finite points are left out."""

import math
import xml.etree.ElementTree

import numpy as np
import pytest

from internal.vis import charts


def test_thinning_averages_long_lines():
  points = [(float(k), 2.0 * k) for k in range(10001)]
  thinned = charts.thin(points)
  assert 200 < len(thinned) <= 240
  assert all(y == pytest.approx(2 * x) for x, y in thinned)
  assert charts.thin(points[:5]) == points[:5]
  assert charts.thin([]) == []


SVG = '{http://www.w3.org/2000/svg}'


def plotted(svg, kind):
  """Coordinates [n, 2] of each series drawn as `kind` ('line' or 'dots')."""
  found = []
  for group in xml.etree.ElementTree.fromstring(svg).iter(f'{SVG}g'):
    if f'{kind}-' in group.get('id', ''):
      if kind == 'dots':
        spots = [(use.get('x'), use.get('y')) for use in group.iter(f'{SVG}use')]
      else:
        words = group.find(f'{SVG}path').get('d').replace('M', ' ').replace('L', ' ').split()
        spots = list(zip(words[::2], words[1::2]))
      found.append(np.array(spots, float).reshape(-1, 2))
  return found


def texts(svg):
  return [t.text for t in xml.etree.ElementTree.fromstring(svg).iter(f'{SVG}text')]


def test_a_line_is_straight_where_the_numbers_are():
  (line,) = plotted(
    charts.line_chart([charts.Series('a', [(0, 1), (50, 2), (100, 3)])], 'dB'), 'line'
  )
  (x0, y0), (x1, y1), (x2, y2) = line
  assert x0 < x1 < x2
  assert y0 > y1 > y2  # Downwards in SVG.
  assert x1 == pytest.approx((x0 + x2) / 2, abs=0.11)
  assert y1 == pytest.approx((y0 + y2) / 2, abs=0.11)


def test_a_standalone_chart_has_title_legend_and_the_given_ticks():
  lines = [charts.Series('a & $b$', [(0, 1), (1, 2)]), charts.Series('c', [(0, 1), (1, 3)])]
  svg = charts.standalone(lines, 'x < y', [(0, 'one'), (1, 'two')])
  assert 'var(' not in svg  # Only browsers know CSS variables.
  found = texts(svg)
  assert 'x < y' in found
  assert found[-2:] == ['a & $b$', 'c']
  assert [t for t in found if t in ('one', 'two', '0.5')] == ['one', 'two']


def test_an_embedded_chart_takes_its_colours_from_the_page():
  lines = [charts.Series('a', [(0, 1), (20000, 2)]), charts.Series('b', [(0, 1), (20000, 3)])]
  svg = charts.line_chart(lines, 'dB')
  assert '#' not in svg.replace('url(#', '').replace('href="#', '')  # No fixed colour is left.
  assert all(f'var(--{name})' in svg for name in ('c0', 'c1', 'soft', 'rule'))
  assert {'dB', '20k'} <= set(texts(svg))
  assert svg == charts.line_chart(lines, 'dB')
  assert '<style' not in svg


def test_powers_of_ten_are_evenly_spaced_on_a_logarithmic_scale():
  svg = charts.line_chart([charts.Series('a', [(0, 1e-3), (1, 1e-2), (2, 1e-1)])], '', log=True)
  ((_, a), (_, b), (_, c)) = plotted(svg, 'line')[0]
  assert a - b == pytest.approx(b - c, abs=0.11)
  assert {'0.001', '0.01', '0.1'} <= set(texts(svg))


def test_what_cannot_be_drawn_is_left_out():
  points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, None), (4, 2.0)]
  assert len(plotted(charts.line_chart([charts.Series('a', points)], ''), 'line')[0]) == 2
  assert charts.line_chart([charts.Series('a', [(0, math.nan)])], '') == ''
  assert charts.line_chart([charts.Series('a', [(0, 0.0)])], '', log=True) == ''


def test_one_number_is_a_dot_and_dots_are_dots():
  one = charts.line_chart([charts.Series('a', [(3, 1.0)])], '')
  assert len(plotted(one, 'dots')[0]) == 1
  many = charts.Series('a', [(k, 1.0) for k in range(5)], dots=True)
  assert len(plotted(charts.line_chart([many], ''), 'dots')[0]) == 5
