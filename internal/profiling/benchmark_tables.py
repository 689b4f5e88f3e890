"""How the benchmark prints what it measured: lines as they come, markdown at the end of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from . import costs

_GIB = 2**30

# Heading, key of a row, alignment and width, format.
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


def say(text: str = '') -> None:
  print(text)


def cell(row: dict, key: str, form: str) -> str:
  """One number of a row as text; nothing, or 'failed', where the row does not have it."""
  value = row.get(key)
  if value is None:
    return 'failed' if 'error' in row else ''
  return form.format(value / _GIB if key.endswith('_bytes') else value)


def say_row(row: dict | None = None) -> None:
  """Prints a measurement as a line of the table; None prints the heading."""
  if row is not None and 'error' in row:
    say(f'{row["name"]:30} failed: {row["error"]}')
    return
  kept = '  (compiled before, and kept)' if row and row.get('compiled_from_cache') else ''
  cells = (title if row is None else cell(row, key, form) for title, key, _, form in _COLUMNS)
  say(' '.join(format(c, column[2]) for c, column in zip(cells, _COLUMNS)).rstrip() + kept)


def say_kernels(row: dict, found: Sequence[costs.Kernel], top: int) -> None:
  """Prints the kernels that take the most of a row's time."""
  busy = sum(k.ms for k in found)
  say(f'\n{row["name"]}: kernels take {busy:.2f} of {row["ms"]:.2f} ms; {len(found)} names')
  say(f'{"ms":>9} {"%":>6} {"count":>7}  kernel  (and the operation that it is most of)')
  for k in found[:top]:
    say(f'{k.ms:9.3f} {100 * k.ms / row["ms"]:6.1f} {k.count:7.1f}  {k.name[:80]}  {k.source}')
  say()


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [heads, ['---'] * len(heads), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def image_table(points: Sequence[dict]) -> str:
  forms = {'rays': '{:,}', 'measured_seconds': '{:.3f}', 'computed_seconds': '{:.3f}'}
  rows = [[p['name'], *(cell(p, key, form) for key, form in forms.items())] for p in points]
  return markdown(['', 'rays', 'seconds, measured', 'seconds, from the rate'], rows)


def cost_table(points: Sequence[dict]) -> str:
  forms = {
    'ms': '{:.2f}',
    'rays_per_second': '{:,.0f}',
    'tflops': '{:.3g}',
    'fraction_of_chip': '{:.0%}',
    'temp_bytes': '{:.2f}',
  }
  heads = [
    f'{which} {head}'
    for which in ('train', 'render')
    for head in ('ms', 'rays/s', 'TFLOP/s', 'of chip', 'temp GiB')
  ]
  rows = [
    [p['label'], *(cell(p[which], k, f) for which in ('train', 'render') for k, f in forms.items())]
    for p in points
  ]
  return markdown(['', *heads], rows)
