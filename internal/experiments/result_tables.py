"""The results table as Markdown, and the places in the documentation that hold it.

A place is between `<!-- NAME: ... -->` and `<!-- end of NAME -->`, and has nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation import benchmarks
from ..system import files, installation, progress
from . import reproduce

PAGES = ('README.md', os.path.join('docs', 'results.md'))
_ABSENT = '–'
_NOT_MEASURED = 'not measured'
_HASH = 12  # Digits of a hash that the table shows.


def _number(value: float | None, form: str) -> str:
  return _ABSENT if value is None else format(value, form)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [heads, ['---'] * len(heads), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _machine(device: Mapping[str, Any] | None) -> str:
  if not device:
    return _ABSENT
  kind = 'CPU' if device['kind'] == 'cpu' else device['kind']
  return kind if device['count'] == 1 else f'{device["count"]} x {kind}'


def _quality(record: Mapping[str, Any]) -> list[str]:
  forms = {'psnr': '.2f'}
  return [_number(record.get(m), forms.get(m, '.3f')) for m in reproduce.METRICS]


def _costs(record: Mapping[str, Any]) -> list[str]:
  """Returns training time, pictures a second, memory and machine."""
  seconds, of_one = record.get('train_seconds'), record.get('seconds_per_image')
  memory = record.get('train_peak_bytes')
  return [
    _ABSENT if seconds is None else progress.duration(seconds),
    _ABSENT if not of_one else f'{1 / of_one:.2g}',
    _ABSENT if memory is None else f'{memory / 1e9:.1f} GB',
    _machine(record.get('device')),
  ]


def _published(row: reproduce.Row, sources: list[str]) -> str:
  """Returns the published numbers of the row's scene, with numbers of `sources`, which grows."""
  parts = []
  for method in row.published:
    known = {p.method: p.values for p in benchmarks.load(row.dataset).published}[method]
    values = [known.get(metric, {}).get(row.of) for metric in ('psnr', 'ssim')]
    shown = [_number(v, form) for v, form in zip(values, ('.2f', '.3f')) if v is not None]
    if method not in sources:
      sources.append(method)
    parts.append(f'{" / ".join(shown)} [{sources.index(method) + 1}]')
  return '<br>'.join(parts) or _ABSENT


def _name(row: reproduce.Row) -> str:
  return f'`{row.name}`'


def _cells(row: reproduce.Row, record: Mapping[str, Any] | None) -> list[str]:
  """Returns the quality and the costs of a row."""
  if record is None:
    return [_NOT_MEASURED] + [_ABSENT] * (len(reproduce.METRICS) + 3)
  return _quality(record) + _costs(record)


_HEADS = (
  'PSNR', 'SSIM', 'LPIPS, [0, 1]', 'LPIPS, [-1, 1]', 'training', 'pictures/s', 'memory', 'machine'
)  # fmt: skip


def _all_rows(table: reproduce.Table) -> str:
  sources: list[str] = []
  rows, middle = [], len(reproduce.METRICS)
  for row in table.rows.values():
    cells = _cells(row, table.measured.get(row.name))
    cells.insert(middle, _published(row, sources))
    rows.append([_name(row), row.scene, f'`{os.path.basename(row.config)}`', *cells])
  heads = [*_HEADS[:middle], 'published PSNR / SSIM', *_HEADS[middle:]]
  parts = [_table(['row', 'scene', 'config', *heads], rows)]
  if sources:
    listed = '; '.join(f'[{k}] {method}' for k, method in enumerate(sources, 1))
    parts.append(f'Published: {listed}.')
  remarks: dict[str, list[str]] = {}
  for row in table.rows.values():
    if row.remark:
      remarks.setdefault(row.remark, []).append(_name(row))
  if remarks:
    parts.append('\n'.join(f'- {", ".join(names)}: {text}.' for text, names in remarks.items()))
  return '\n\n'.join(parts)


def _commands(table: reproduce.Table) -> str:
  rows = [
    [_name(row), f'`{row.command}`', row.time, row.capture.text if row.capture else _ABSENT]
    for row in table.rows.values()
  ]
  return _table(
    ['row', 'command', 'time to expect', 'the capture, if it is none of a dataset'], rows
  )


def _origins(table: reproduce.Table) -> str:
  """Returns where each measured row comes from: steps, commit, checkpoint, versions."""
  rows = []
  for name, record in table.measured.items():
    software = record['software'] or {}
    versions = ', '.join(f'{k} {software[k]}' for k in ('python', 'jax', 'flax') if k in software)
    commit, checkpoint = record['commit'], record['checkpoint_sha256']
    rows.append(
      [
        f'`{name}`',
        f'{record["step"]:,}',
        _number(record['num_params'], ','),
        f'`{commit[:_HASH]}{"+" if commit.endswith("+") else ""}`' if commit else 'not recorded',
        f'`{checkpoint[:_HASH]}`' if checkpoint else 'not recorded',
        versions or 'not recorded',
      ]
    )
  heads = ['row', 'steps', 'parameters', 'commit', 'checkpoint, SHA-256', 'versions']
  return _table(heads, rows)


def _beside_others(table: reproduce.Table) -> str:
  """Returns a table for each scene of other programs, with our measured rows of that scene."""
  parts = []
  for scene in dict.fromkeys(other['scene'] for other in table.others):
    rows = [
      [other['method'], *_quality(other)[:3], other['training'], other['machine'], other['remark']]
      for other in table.others
      if other['scene'] == scene
    ]
    for row in table.rows.values():
      record = table.measured.get(row.name)
      if row.scene == scene and record:
        quality, costs = _quality(record)[:3], _costs(record)
        rows.append([f'**ours, {_name(row)}**', *quality, costs[0], costs[3], row.remark])
    rows = [[cell or _ABSENT for cell in row] for row in rows]
    heads = ['method', *_HEADS[:3], 'training', 'machine', 'remarks']
    parts.append(f'**{scene}**\n\n{_table(heads, rows)}')
  return '\n\n'.join(parts)


def _summary(table: reproduce.Table) -> str:
  """Returns the README's table, of the rows that have been measured."""
  rows = []
  for row in table.rows.values():
    if row.in_readme and row.name in table.measured:
      cells = _cells(row, table.measured[row.name])
      rows.append([_name(row), row.scene, cells[0], cells[1], cells[2], cells[4], *cells[6:8]])
  heads = [_HEADS[k] for k in (0, 1, 2, 4, 6, 7)]
  return _table(['row', 'scene', *heads], rows)


def _tolerances(table: reproduce.Table) -> str:
  shown = {'psnr': 'PSNR', 'ssim': 'SSIM', 'lpips_paper': 'LPIPS', 'lpips_vgg': 'LPIPS'}
  parts = dict.fromkeys(f'{shown[m]} within {v:g}' for m, v in table.tolerance.items())
  return f'A run agrees with the stored figures if they differ by at most: {"; ".join(parts)}.'


PARTS = {
  'summary': _summary,
  'rows': _all_rows,
  'commands': _commands,
  'tolerances': _tolerances,
  'origins': _origins,
  'others': _beside_others,
}


def fill(text: str, table: reproduce.Table) -> str:
  """Returns a page with the current tables in its places.

  Raises:
    ReproduceError: a place has an unknown name.
  """

  def place(match: re.Match) -> str:
    if match[2] not in PARTS:
      raise reproduce.ReproduceError(
        f'No table is named {match[2]!r}; choose from {", ".join(PARTS)}.'
      )
    return f'{match[1]}\n{PARTS[match[2]](table)}\n{match[3]}'

  return re.sub(r'(<!-- (\w+): [^>]*-->)\n.*?(<!-- end of \2 -->)', place, text, flags=re.DOTALL)


def write(table: reproduce.Table) -> list[str]:
  """Writes the tables into the documentation of a checkout; returns the pages that have changed."""
  changed = []
  for page in PAGES:
    path = os.path.join(installation.DATA, page)
    before = files.read_text(path)
    after = fill(before, table)
    if after != before:
      files.write_text(path, after)
      changed.append(page)
  return changed
