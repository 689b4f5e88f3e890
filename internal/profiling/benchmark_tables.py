"""The benchmark's output: a line per measurement, a markdown table per sweep."""

from __future__ import annotations

from collections.abc import Sequence

from . import costs

_GIB = 2**30

# Heading, key in a row, alignment and width, number format.
_COLUMNS = (
  ('', 'name', '<30', '{}'),
  ('devices', 'devices', '>7', '{}'),
  ('rays', 'rays', '>7', '{:,}'),
  ('compile s', 'compile_seconds', '>9', '{:.1f}'),
  ('ms', 'ms', '>9', '{:.2f}'),
  ('10%', 'ms_10', '>9', '{:.2f}'),
  ('90%', 'ms_90', '>9', '{:.2f}'),
  ('rays/s', 'rays_per_second', '>10', '{:,.0f}'),
  ('TFLOP/s', 'tflops', '>8', '{:.3g}'),
  ('of chip', 'fraction_of_chip', '>7', '{:.0%}'),
  ('temp GiB', 'temp_bytes', '>8', '{:.2f}'),
  ('args GiB', 'argument_bytes', '>8', '{:.2f}'),
  ('peak GiB', 'peak_bytes', '>8', '{:.2f}'),
)


def cell(row: dict, key: str, form: str) -> str:
  """Formats one number of a row: '' if it is missing, 'failed' if the measurement failed."""
  value = row.get(key)
  if value is None:
    return 'failed' if 'error' in row else ''
  return form.format(value / _GIB if key.endswith('_bytes') else value)


def print_row(row: dict | None = None) -> None:
  """Prints a row as a line of the table; None prints the heading."""
  if row is not None and 'error' in row:
    print(f'{row["name"]:30} failed: {row["error"]}')
    return
  kept = '  (from the compilation cache)' if row and row.get('compiled_from_cache') else ''
  cells = (title if row is None else cell(row, key, form) for title, key, _, form in _COLUMNS)
  print(' '.join(format(c, column[2]) for c, column in zip(cells, _COLUMNS)).rstrip() + kept)


def print_kernels(row: dict, found: Sequence[costs.Kernel], top: int) -> None:
  """Prints the `top` slowest kernels of a row."""
  busy = sum(k.ms for k in found)
  print(
    f'\n{row["name"]}: kernels take {busy:.2f} of {row["ms"]:.2f} ms; {len(found)} different ones'
  )
  print(f'{"ms":>9} {"%":>6} {"count":>7}  kernel  (and its main operation)')
  for k in found[:top]:
    print(f'{k.ms:9.3f} {100 * k.ms / row["ms"]:6.1f} {k.count:7.1f}  {k.name[:80]}  {k.source}')
  print()


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Formats a table as markdown."""
  lines = [heads, ['---'] * len(heads), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def cost_table(points: Sequence[dict]) -> str:
  """Formats the points of a sweep as markdown."""
  columns = {
    'ms': ('ms', '{:.2f}'),
    'rays_per_second': ('rays/s', '{:,.0f}'),
    'tflops': ('TFLOP/s', '{:.3g}'),
    'fraction_of_chip': ('of chip', '{:.0%}'),
    'temp_bytes': ('temp GiB', '{:.2f}'),
  }
  every = [(kind, key, *column) for kind in ('train', 'render') for key, column in columns.items()]
  heads = [f'{kind} {head}' for kind, _, head, _ in every]
  rows = [[p['label'], *(cell(p[kind], key, form) for kind, key, _, form in every)] for p in points]
  return markdown(['', *heads], rows)
