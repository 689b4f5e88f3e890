"""Charts: round ticks, lines that are where the numbers are, nothing that is not finite."""

import math
import re
import xml.etree.ElementTree

import pytest

from internal.vis import charts


@pytest.mark.parametrize(
  ('low', 'high', 'wanted'),
  [
    (0, 5000, [0, 1000, 2000, 3000, 4000, 5000]),
    (18.2, 24.9, [20, 22, 24]),
    (-0.013, 0.012, [-0.01, -0.005, 0, 0.005, 0.01]),
    (7, 7, [7]),
  ],
)
def test_ticks_are_round_and_inside(low, high, wanted):
  assert charts.ticks(low, high) == pytest.approx(wanted)


@pytest.mark.parametrize(
  ('value', 'text'),
  [(0, '0'), (20000, '20k'), (1500, '1500'), (2.5e6, '2.5M'), (0.05, '0.05'), (1e-6, '1e-06')],
)
def test_numbers_are_short(value, text):
  assert charts.number(value) == text


def test_thinning_keeps_means_and_little():
  points = [(float(k), 2.0 * k) for k in range(10001)]
  thinned = charts.thin(points)
  assert 200 < len(thinned) <= 240
  assert all(y == pytest.approx(2 * x) for x, y in thinned)
  assert charts.thin(points[:5]) == points[:5]
  assert charts.thin([]) == []


def spots(svg):
  return [
    [tuple(map(float, spot.split(','))) for spot in path.split()]
    for path in re.findall(r'<polyline points="([^"]*)"', svg)
  ]


def test_a_line_is_straight_where_the_numbers_are():
  (line,) = spots(charts.line_chart([charts.Series('a', [(0, 1), (50, 2), (100, 3)])], 'dB'))
  (x0, y0), (x1, y1), (x2, y2) = line
  assert x0 < x1 < x2
  assert y0 > y1 > y2  # Downwards in SVG.
  assert x1 == pytest.approx((x0 + x2) / 2, abs=0.11)
  assert y1 == pytest.approx((y0 + y2) / 2, abs=0.11)


def test_a_file_of_its_own_has_title_names_and_the_ticks_it_is_told():
  lines = [charts.Series('a & b', [(0, 1), (1, 2)]), charts.Series('c', [(0, 1), (1, 3)])]
  svg = charts.standalone(lines, 'x < y', [(0, 'one'), (1, 'two')])
  assert 'var(' not in svg  # Which only browsers know.
  root = xml.etree.ElementTree.fromstring(svg)
  texts = [t.text for t in root.iter('{http://www.w3.org/2000/svg}text')]
  assert texts[0] == 'x < y'
  assert texts[-2:] == ['a & b', 'c']
  assert [t for t in texts if t in ('one', 'two', '0.5')] == ['one', 'two']


def test_powers_of_ten_are_evenly_spaced_on_a_logarithmic_scale():
  svg = charts.line_chart([charts.Series('a', [(0, 1e-3), (1, 1e-2), (2, 1e-1)])], '', log=True)
  ((_, a), (_, b), (_, c)) = spots(svg)[0]
  assert a - b == pytest.approx(b - c, abs=0.11)
  assert all(f'>{label}<' in svg for label in ('0.001', '0.01', '0.1'))


def test_what_cannot_be_drawn_is_left_out():
  points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, None), (4, 2.0)]
  assert len(spots(charts.line_chart([charts.Series('a', points)], ''))[0]) == 2
  assert charts.line_chart([charts.Series('a', [(0, math.nan)])], '') == ''
  assert charts.line_chart([charts.Series('a', [(0, 0.0)])], '', log=True) == ''


def test_one_number_is_a_dot_and_dots_are_dots():
  assert charts.line_chart([charts.Series('a', [(3, 1.0)])], '').count('<circle') == 1
  many = charts.Series('a', [(k, 1.0) for k in range(5)], dots=True)
  assert charts.line_chart([many], '').count('<circle') == 5
