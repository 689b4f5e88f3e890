"""Formats tables as Markdown, LaTeX or CSV; colours show how much ours are better or worse."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable

from ..system import files
from . import tables

_NAMES = {
  'psnr': 'PSNR',
  'ssim': 'SSIM',
  'cc_psnr': 'PSNR, colours corrected',
  'cc_ssim': 'SSIM, colours corrected',
  'lpips_paper': 'LPIPS (VGG, colours in [0, 1])',
  'lpips_vgg': 'LPIPS (VGG, colours in [-1, 1])',
}
_FULL_COLOUR = {'psnr': 1.0, 'ssim': 0.05}  # Difference with the strongest colour.


def _digits(metric: str) -> int:
  return 2 if 'psnr' in metric else 3


def _full_colour(metric: str) -> float:
  return _FULL_COLOUR['psnr' if 'psnr' in metric else 'ssim']


def _number(value: float | None, metric: str) -> str:
  return '–' if value is None else f'{value:.{_digits(metric)}f}'


def _gain(table: tables.Table, row: tables.Row, metric: str, column: str) -> float | None:
  """Returns how much better ours is; 0 if the rounded numbers are equal."""
  difference = table.difference(row, metric, column)
  if difference is None:
    return None
  difference = round(difference, _digits(metric))
  return difference if tables.HIGHER_IS_BETTER[metric] else -difference


def _heading(table: tables.Table, metric: str) -> str:
  better = 'higher' if tables.HIGHER_IS_BETTER[metric] else 'lower'
  compared = f'; ours beside {table.against.method}' if table.against else ''
  return f'{table.title}: {_NAMES[metric]} ({better} is better{compared})'


def _missing(table: tables.Table) -> str:
  """Explains missing means; '' if there are none."""
  scenes = {
    scene
    for row in table.rows
    if row.ours
    for scene in table.scenes
    if row.values['psnr'].get(scene) is None
  }
  missing = [scene for scene in table.scenes if scene in scenes]
  return f'Means need all scenes; not all methods have {", ".join(missing)}.' if missing else ''


def _markdown_cell(table, row, metric, column) -> str:
  text = _number(table.value(row, metric, column), metric)
  gain = _gain(table, row, metric, column)
  if gain is None:
    return text
  mark = '🟢' if gain > 0 else '🔴' if gain < 0 else '⚪'
  # Signs are those of the numbers: a better LPIPS is green and negative.
  change = gain if tables.HIGHER_IS_BETTER[metric] else -gain
  return f'{text} {mark} {change + 0.0:+.{_digits(metric)}f}'


def markdown(table: tables.Table) -> str:
  """Formats one Markdown table per metric; our cells have the difference to the compared row."""
  parts = []
  for metric in table.metrics:
    lines = [['method', *table.columns], ['---'] + ['---:'] * len(table.columns)]
    for row in table.rows:
      if all(table.value(row, metric, column) is None for column in table.columns):
        continue
      name = row.method.replace('|', r'\|')
      name = f'**{name}**' if row.ours else name
      lines.append([name, *(_markdown_cell(table, row, metric, c) for c in table.columns)])
    body = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    parts.append(f'### {_heading(table, metric)}\n\n{body}')
  if note := _missing(table):
    parts.append(note)
  sources = [f'- {row.method}: {row.source}' for row in table.rows if not row.ours]
  if sources:
    parts.append('Published numbers:\n\n' + '\n'.join(sources))
  return '\n\n'.join(parts) + '\n'


_LATEX = {
  '\\': r'\textbackslash{}', '&': r'\&', '%': r'\%', '$': r'\$', '#': r'\#', '_': r'\_',
  '{': r'\{', '}': r'\}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}',
}  # fmt: skip


def _latex_text(text: str) -> str:
  return ''.join(_LATEX.get(c, c) for c in text)


def _latex_cell(table, row, metric, column) -> str:
  value = table.value(row, metric, column)
  text = '--' if value is None else _number(value, metric)
  gain = _gain(table, row, metric, column)
  if not gain:
    return text
  strength = 10 + round(40 * min(1.0, abs(gain) / _full_colour(metric)))
  return rf'\cellcolor{{{"green" if gain > 0 else "red"}!{strength}}}{text}'


def latex(table: tables.Table) -> str:
  """Formats one `table*` per metric; cells better than the compared row are green, others red."""
  parts = [r'% Needs \usepackage{booktabs} and \usepackage[table]{xcolor}.']
  for metric in table.metrics:
    columns = 'l' + 'c' * len(table.scenes) + '|' + 'c' * len(table.groups)
    lines = [
      r'\begin{table*}', r'\centering', rf'\caption{{{_latex_text(_heading(table, metric))}.}}',
      rf'\begin{{tabular}}{{{columns}}}', r'\toprule',
      ' & '.join(['', *map(_latex_text, table.columns)]) + r' \\', r'\midrule',
    ]  # fmt: skip
    for row in table.rows:
      if all(table.value(row, metric, column) is None for column in table.columns):
        continue
      cells = [
        _latex_text(row.method),
        *(_latex_cell(table, row, metric, c) for c in table.columns),
      ]
      lines.append(' & '.join(cells) + r' \\')
    lines += [r'\bottomrule', r'\end{tabular}', r'\end{table*}']
    parts.append('\n'.join(lines))
  return '\n\n'.join(parts) + '\n'


def as_csv(table: tables.Table) -> str:
  """Formats one CSV line per number: metric, method, ours, column, value, difference, source."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(['metric', 'method', 'ours', 'column', 'value', 'difference', 'source'])
  for metric in table.metrics:
    for row in table.rows:
      for column in table.columns:
        value = table.value(row, metric, column)
        if value is not None:
          difference = table.difference(row, metric, column)
          shown = '' if difference is None else difference
          writer.writerow([metric, row.method, int(row.ours), column, value, shown, row.source])
  return out.getvalue()


FORMS: dict[str, Callable[[tables.Table], str]] = {'.md': markdown, '.tex': latex, '.csv': as_csv}


def write(path: str, table: tables.Table) -> None:
  """Writes a table in the format of the path's extension, a key of FORMS."""
  files.write_text(path, FORMS[os.path.splitext(path)[1]](table))
