"""LaTeX tables for papers (booktabs): a summary with all metrics side by side, and the scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .table_data import HIGHER_IS_BETTER, NAMES, Row, Table, digits, number

_SHORT = {
  'psnr': 'PSNR',
  'ssim': 'SSIM',
  'cc_psnr': 'cc-PSNR',
  'cc_ssim': 'cc-SSIM',
  'lpips_paper': r'LPIPS$_{[0,1]}$',
  'lpips_vgg': r'LPIPS$_{[-1,1]}$',
}
_ESCAPES = {
  '\\': r'\textbackslash{}', '&': r'\&', '%': r'\%', '$': r'\$', '#': r'\#', '_': r'\_',
  '{': r'\{', '}': r'\}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}', '±': r'$\pm$',
}  # fmt: skip
_ABSENT = '--'
_MARKS = {1: r'\textbf{%s}', 2: r'\underline{%s}', None: '%s'}


def _escape(text: str) -> str:
  return ''.join(_ESCAPES.get(c, c) for c in text)


def _head(metric: str) -> str:
  arrow = 'uparrow' if HIGHER_IS_BETTER[metric] else 'downarrow'
  return rf'{_SHORT[metric]}$\{arrow}$'


def _cell(table: Table, row: Row, metric: str, column: str) -> str:
  if table.value(row, metric, column) is None:
    return _ABSENT
  mark = _MARKS[table.rank(row, metric, column)]
  value, plus_minus, std = number(table, row, metric, column).partition(' ± ')
  return mark % value + (rf'{{\scriptsize\,$\pm$\,{std}}}' if plus_minus else '')


def _difference(table: Table, row: Row, metric: str) -> str:
  found = table.own_difference(row, metric, table.blocks[-1])
  return _ABSENT if found is None else f'${found:+.{digits(metric)}f}$'


def _tabular(
  caption: str, heads: Sequence[str], columns: str, table: Table, cells: Callable[[Row], list[str]]
) -> str:
  """Returns a `table*`; a rule separates published methods from ours, and empty rows are left out.

  Args:
    caption: plain text.
    heads: lines above the rows.
    columns: the column types.
    table: for its rows.
    cells: returns the cells of a row.
  """
  lines = [
    r'\begin{table*}', r'\centering', rf'\caption{{{_escape(caption)}}}', r'\footnotesize',
    r'\setlength{\tabcolsep}{3pt}', r'\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}'
    r'{!}{%', rf'\begin{{tabular}}{{@{{}}{columns}@{{}}}}', r'\toprule', *heads, r'\midrule',
  ]  # fmt: skip
  bodies = []
  for ours in (False, True):
    rows = [(row.method, cells(row)) for row in table.rows if row.ours == ours]
    body = [
      ' & '.join([_escape(name), *row]) + r' \\' for name, row in rows if set(row) - {_ABSENT}
    ]
    bodies += [body] if body else []
  for k, body in enumerate(bodies):
    lines += [r'\midrule', *body] if k else body
  return '\n'.join([*lines, r'\bottomrule', r'\end{tabular}}', r'\end{table*}'])


def _summary(table: Table) -> str:
  """Returns the table with all metrics of each block side by side."""
  metrics, blocks = table.metrics, table.blocks
  compare = len(table.own) > 1

  def cells(row: Row) -> list[str]:
    found = [_cell(table, row, m, block) for block in blocks for m in metrics]
    return found + ([_difference(table, row, m) for m in metrics] if compare else [])

  names = [_escape(block) for block in blocks]
  if compare:
    names.append(rf'$\Delta$ to {_escape(table.own[0].method)}')
  n = len(metrics)
  groups = ' & '.join(rf'\multicolumn{{{n}}}{{c}}{{{name}}}' for name in names)
  rules = ' '.join(rf'\cmidrule(lr){{{2 + k * n}-{1 + (k + 1) * n}}}' for k in range(len(names)))
  heads = [rf' & {groups} \\', rules, ' & '.join(['', *map(_head, metrics * len(names))]) + r' \\']
  caption = f'{table.title}. Best bold, second best underlined.'
  if compare:
    of = '' if len(blocks) == 1 else f', in the {blocks[-1]}'
    caption += f' Differences are from {table.own[0].method}{of}.'
  caption = ' '.join([caption, *table.notes, *_conventions(table)])
  return _tabular(caption, heads, 'l' + 'c' * n * len(names), table, cells)


def _conventions(table: Table) -> list[str]:
  """Returns what the LPIPS columns mean."""
  shown = [NAMES[metric] for metric in table.metrics if metric.startswith('lpips')]
  return [f'{"; ".join(shown)}.'] if shown else []


def _by_scene(table: Table, metric: str) -> str:
  def cells(row: Row) -> list[str]:
    return [_cell(table, row, metric, c) for c in table.columns]

  heads = [' & '.join(['', *map(_escape, table.columns)]) + r' \\']
  better = 'higher' if HIGHER_IS_BETTER[metric] else 'lower'
  caption = f'{table.title}: {NAMES[metric]}, {better} is better. Best bold, second underlined.'
  columns = 'l' + 'c' * len(table.scenes) + r'@{\hspace{1.5em}}' + 'c' * len(table.groups)
  return _tabular(caption, heads, columns, table, cells)


def latex(table: Table) -> str:
  """Formats a summary, and one table per metric if that does not show each scene."""
  parts = [r'% Needs \usepackage{booktabs} and \usepackage{graphicx}.', _summary(table)]
  if set(table.scenes) - set(table.blocks):
    parts += ['% Each scene, for a supplement.', *(_by_scene(table, m) for m in table.metrics)]
  parts += [f'% {row.method}: {row.source}' for row in table.rows if not row.ours]
  return '\n\n'.join(parts) + '\n'
