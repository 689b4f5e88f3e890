"""Results of scripts/scaling.py: speed-ups, tables and a chart."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

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


def markdown(results: Mapping) -> str:
  """Formats all results as markdown."""
  parts = []
  for gin, found in results['configs'].items():
    parts.append(f'## {os.path.basename(gin)}\n')
    if 'rates' in found:
      heads = ['', 'rays', 'devices', 'ms', 'rays/s', 'speed-up, same batch', 'grown batch']
      heads += ['of linear', 'ms in collectives', 'ms in other kernels: fastest device', 'slowest']
      heads += ['temporary GiB', 'micro-batches', 'compile s']
      forms = {
        'batch': '{:,}', 'devices': '{}', 'ms': '{:.2f}', 'rays_per_second': '{:,.0f}',
        'speedup': '{:.2f}', 'growing_speedup': '{:.2f}', 'of_linear': '{:.3f}',
        'collective_ms': '{:.2f}', 'own_ms_fastest': '{:.2f}', 'own_ms_slowest': '{:.2f}',
        'temp_bytes': '{:.2f}', 'micro_batches': '{}', 'compile_seconds': '{:.0f}',
      }  # fmt: skip
      cell = benchmark_tables.cell
      in_order = sorted(
        found['rates'], key=lambda r: (KINDS.index(r['kind']), r['batch'], r['devices'])
      )
      rows = [[r['kind'], *(cell(r, k, form) for k, form in forms.items())] for r in in_order]
      parts.append(benchmark_tables.markdown(heads, rows) + '\n')
    if 'products' in found:
      alone, each = ([f'{v:.3g}' for v in values] for values in found['products'].values())
      parts.append(
        f'Large matrix products: {alone[0]} TFLOP/s on one device alone, {", ".join(each)} on all '
        'devices at once.\n'
      )
    if apart := loss_difference(found.get('rates', ())):
      steps, mean, most = apart
      parts.append(
        f'Losses of the first {steps} steps on all devices and on one differ by {mean:.1e} on '
        f'average and {most:.1e} at most (relative).\n'
      )
    for count, took in found.get('start', {}).items():
      parts.append(
        f'First step on {count} devices: after {took["first"]:.1f} s, or '
        f'{took["second"]:.1f} s with a compilation cache.\n'
      )
    if 'dataset' in found:
      scenes, many, one = (found['dataset'][k] for k in ('scenes', 'seconds', 'one_seconds'))
      parts.append(
        f'{scenes} scenes on as many devices: {many:.0f} s; one scene on one device: {one:.0f} s '
        f'({one / many:.2f} of linear).\n'
      )
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
