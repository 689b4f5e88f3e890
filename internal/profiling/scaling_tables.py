"""Results of scripts/scaling.py: speed-ups, tables and a chart."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..vis import charts
from . import benchmark_tables

KINDS = ('train', 'render')


def add_speedups(rows: Sequence[dict], base: int) -> None:
  """Adds to each row its speed-up over one device, with the same batch and with `base` rays."""
  alone = {(r['kind'], r['batch']): r.get('rays_per_second') for r in rows if r['devices'] == 1}
  for row in rows:
    for key, batch in (('speedup', row['batch']), ('growing_speedup', base)):
      one = alone.get((row['kind'], batch))
      if key == 'growing_speedup' and row['batch'] != base * row['devices']:
        continue
      if one and 'rays_per_second' in row:
        row[key] = row['rays_per_second'] / one
    if 'growing_speedup' in row:
      row['of_linear'] = row['growing_speedup'] / row['devices']


def loss_difference(rows: Sequence[dict]) -> tuple[int, float, float] | None:
  """Compares losses on one device and on all: steps, mean and maximum relative difference."""
  curves = {row['devices']: np.array(row['losses']) for row in rows if 'losses' in row}
  if len(curves) < 2:
    return None
  one, many = curves[1], curves[max(curves)]
  apart = np.abs(many - one) / np.abs(one)
  return len(one), float(apart.mean()), float(apart.max())


_COLUMNS = {  # Heading and number format, by key of a row.
  'batch': ('rays', '{:,}'),
  'devices': ('devices', '{}'),
  'ms': ('ms', '{:.2f}'),
  'rays_per_second': ('rays/s', '{:,.0f}'),
  'speedup': ('speed-up, same batch', '{:.2f}'),
  'growing_speedup': ('grown batch', '{:.2f}'),
  'of_linear': ('of linear', '{:.3f}'),
  'collective_ms': ('ms in collectives', '{:.2f}'),
  'own_ms_fastest': ('ms in other kernels: fastest device', '{:.2f}'),
  'own_ms_slowest': ('slowest', '{:.2f}'),
  'temp_bytes': ('temporary GiB', '{:.2f}'),
  'micro_batches': ('micro-batches', '{}'),
  'compile_seconds': ('compile s', '{:.0f}'),
}


def _rates_table(rates: Sequence[dict]) -> str:
  in_order = sorted(rates, key=lambda r: (KINDS.index(r['kind']), r['batch'], r['devices']))
  cell = benchmark_tables.cell
  rows = [[r['kind'], *(cell(r, k, form) for k, (_, form) in _COLUMNS.items())] for r in in_order]
  return benchmark_tables.markdown(['', *(head for head, _ in _COLUMNS.values())], rows)


def _sentences(found: Mapping) -> Iterator[str]:
  """Yields a sentence for each other measurement of a config."""
  if 'products' in found:
    alone, each = ([f'{v:.3g}' for v in values] for values in found['products'].values())
    yield (
      f'Large matrix products: {alone[0]} TFLOP/s on one device alone, {", ".join(each)} on all '
      'devices at once.'
    )
  if difference := loss_difference(found.get('rates', ())):
    steps, mean, most = difference
    yield (
      f'Losses of the first {steps} steps on all devices and on one differ by {mean:.1e} on '
      f'average and {most:.1e} at most (relative).'
    )
  for count, took in found.get('start', {}).items():
    yield (
      f'First step on {count} devices: after {took["first"]:.1f} s, or {took["second"]:.1f} s '
      'with a compilation cache.'
    )
  if 'dataset' in found:
    scenes, many, one = (found['dataset'][k] for k in ('scenes', 'seconds', 'one_seconds'))
    yield (
      f'{scenes} scenes on as many devices: {many:.0f} s; one scene on one device: {one:.0f} s '
      f'({one / many:.2f} of linear).'
    )


def markdown(results: Mapping) -> str:
  """Formats all results as markdown."""
  parts = []
  for gin, found in results['configs'].items():
    parts.append(f'## {os.path.basename(gin)}\n')
    parts += [_rates_table(found['rates']) + '\n'] if 'rates' in found else []
    parts += [f'{sentence}\n' for sentence in _sentences(found)]
  return '\n'.join(parts)


def picture(results: Mapping) -> str:
  """Returns an SVG chart of the speed-ups with growing batches, '' if there are none."""
  series = []
  for gin, found in results['configs'].items():
    for kind in KINDS:
      rows = [r for r in found.get('rates', ()) if r['kind'] == kind and 'of_linear' in r]
      points = sorted((np.log2(r['devices']), 100 * r['of_linear']) for r in rows)
      name = f'{os.path.basename(gin)}, {"training" if kind == "train" else "rendering"}'
      series += [charts.Series(name, points)] if points else []
  if not series:
    return ''
  counts = [(float(np.log2(n)), str(n)) for n in results['devices']]
  title = 'speed-up in % of linear over devices, same rays per device'
  return charts.standalone(series, title, counts)
