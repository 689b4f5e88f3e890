"""Formats tables as Markdown or CSV, and writes them in any form.

In Markdown, colours show whether ours are better or worse than the row they are compared with.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable

from ..system import files
from .latex_tables import latex
from .table_data import HIGHER_IS_BETTER, NAMES, Row, Table, digits, number


def _gain(table: Table, row: Row, metric: str, column: str) -> float | None:
  """Returns how much better ours is; 0 if the rounded numbers are equal."""
  difference = table.difference(row, metric, column)
  if difference is None:
    return None
  difference = round(difference, digits(metric))
  return difference if HIGHER_IS_BETTER[metric] else -difference


def _heading(table: Table, metric: str) -> str:
  better = 'higher' if HIGHER_IS_BETTER[metric] else 'lower'
  compared = f'; ours beside {table.against.method}' if table.against else ''
  return f'{table.title}: {NAMES[metric]} ({better} is better{compared})'


def _markdown_cell(table, row, metric, column) -> str:
  text = number(table, row, metric, column)
  gain = _gain(table, row, metric, column)
  if gain is None:
    return text
  mark = '🟢' if gain > 0 else '🔴' if gain < 0 else '⚪'
  # Signs are those of the numbers: a better LPIPS is green and negative.
  change = gain if HIGHER_IS_BETTER[metric] else -gain
  return f'{text} {mark} {change + 0.0:+.{digits(metric)}f}'


def markdown(table: Table) -> str:
  """Formats one Markdown table per metric; our cells have the difference to the compared row."""
  parts = []
  for metric in table.metrics:
    heads = map(_escape, table.columns)
    lines = [['method', *heads], ['---'] + ['---:'] * len(table.columns)]
    for row in table.rows:
      if all(table.value(row, metric, column) is None for column in table.columns):
        continue
      name = _escape(row.method)
      name = f'**{name}**' if row.ours else name
      lines.append([name, *(_markdown_cell(table, row, metric, c) for c in table.columns)])
    body = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    parts.append(f'### {_heading(table, metric)}\n\n{body}')
  if len(table.own) > 1:
    parts.append(_markdown_differences(table))
  parts += table.notes
  sources = [f'- {row.method}: {row.source}' for row in table.rows if not row.ours]
  if sources:
    parts.append('Published numbers:\n\n' + '\n'.join(sources))
  return '\n\n'.join(parts) + '\n'


def _markdown_differences(table: Table) -> str:
  """Formats the differences of our methods from our first, all metrics side by side."""
  keys = [(column, metric) for column in table.blocks for metric in table.metrics]
  heads = [f'{_escape(column)} {NAMES[metric]}' for column, metric in keys]
  lines = [['method', *heads], ['---'] + ['---:'] * len(keys)]
  for row in table.own[1:]:
    found = [(table.own_difference(row, metric, column), metric) for column, metric in keys]
    cells = ['–' if d is None else f'{d:+.{digits(metric)}f}' for d, metric in found]
    lines.append([_escape(row.method), *cells])
  body = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
  return f'### Differences from {_escape(table.own[0].method)}\n\n{body}'


def _escape(text: str) -> str:
  return text.replace('|', r'\|')


_CSV = (
  'metric', 'method', 'ours', 'column', 'value', 'difference', 'source', 'std', 'seeds',
  'own_difference', 'reduction',
)  # fmt: skip


def as_csv(table: Table) -> str:
  """Formats one CSV line per number; numbers are not rounded, and empty where there are none.

  The columns are those of _CSV: `difference` is from the compared row, `own_difference` from our
  first method, `std` over `seeds` runs.
  """
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(_CSV)
  for metric in table.metrics:
    for row in table.rows:
      for column in table.columns:
        value = table.value(row, metric, column)
        if value is not None:
          at = (row, metric, column)
          difference, std = table.difference(*at), table.spread(*at)
          seeds = len(row.seeds) or None
          more = difference, row.source, std, seeds, table.own_difference(*at), row.reduction
          writer.writerow([metric, row.method, int(row.ours), column, value, *more])
  return out.getvalue()


FORMS: dict[str, Callable[[Table], str]] = {'.md': markdown, '.tex': latex, '.csv': as_csv}


def write(path: str, table: Table) -> None:
  """Writes a table in the format of the path's extension, a key of FORMS."""
  files.write_text(path, FORMS[os.path.splitext(path)[1]](table))
