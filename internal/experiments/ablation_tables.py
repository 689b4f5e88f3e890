"""Tables of an experiment's rows: means over seeds, changes from a reference row, failures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..datasets import pyramid
from ..evaluation import results, table_forms, tables
from ..system import files
from ..training import runlog
from . import ablations, jobs, runs

_METRICS = {'psnr': '.2f', 'ssim': '.3f', 'lpips_paper': '.3f'}
_PUBLISHED_HEADS = (
  '', 'parameters (published)', 'published PSNR', 'to full', 'SSIM', 'LPIPS', 'PSNR here',
  'to full', 'SSIM', 'LPIPS', 'rays/s',
)  # fmt: skip
_OWN_HEADS = ('', 'parameters', 'PSNR', 'change', 'SSIM', 'change', 'LPIPS', 'change', 'rays/s')
_LONGEST = 120  # Characters of a reason for a failure.


def _over_seeds(found: Sequence[Mapping]) -> tuple[dict | None, dict | None]:
  """Returns means and standard deviations of each metric; None without results, or with one."""
  if not found:
    return None, None
  values = {name: [result['mean'][name] for result in found] for name in found[0]['mean']}
  known = {name: v for name, v in values.items() if None not in v}
  means = {name: float(np.mean(known[name])) if name in known else None for name in values}
  if len(found) == 1:
    return means, None
  stds = {n: float(np.std(known[n], ddof=1)) if n in known else None for n in values}
  return means, stds


def _status(row_runs: Sequence[runs.Run], finished: Mapping, failed: Mapping[str, str]) -> str:
  """Returns 'finished', or how many runs are missing and why."""
  missing = [run for run in row_runs if run.name not in finished]
  if not missing:
    return 'finished'
  reasons = [failed[run.name] for run in missing if run.name in failed]
  # A failure in an earlier command.
  reasons += [line for run in missing if (line := jobs.last_line(run.folder)).startswith('Error')]
  why = f'failed: {reasons[0][:_LONGEST]}' if reasons else 'not finished'
  return why if len(row_runs) == 1 else f'{len(missing)} of {len(row_runs)} runs {why}'


def _published(row: ablations.Row) -> dict[str, Any] | None:
  if row.table is None:
    return None
  known, full_mean = ablations.published()
  full_psnr = {1: full_mean, 2: known[ablations.FULL].psnr}[row.table]
  keys = ('table', 'psnr', 'ssim', 'lpips', 'million_params')
  return {**{key: getattr(row, key) for key in keys}, 'psnr_change': row.psnr - full_psnr}


def _compare(line: dict[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any]:
  """Returns the changes from the reference, and whether they exceed the spread over seeds."""
  if not (reference and reference['mean'] and line['mean']):
    return {'psnr_change': None, 'change': None, 'exceeds_spread': None}
  names = [n for n in line['mean'] if None not in (line['mean'][n], reference['mean'][n])]
  change = {name: line['mean'][name] - reference['mean'][name] for name in names}
  exceeds = None
  if line is not reference and line['std'] and reference['std']:
    spread = {name: line['std'][name] + reference['std'][name] for name in names}
    exceeds = {name: abs(change[name]) > spread[name] for name in names}
  return {'psnr_change': change.get('psnr'), 'change': change, 'exceeds_spread': exceeds}


def make_table(
  rows: Sequence[ablations.Row],
  all_runs: Sequence[runs.Run],
  finished: Mapping[str, Mapping],
  failed: Mapping[str, str],
) -> dict[str, Any]:
  """Returns the content of ablations.json.

  Args:
    rows: the rows of the table.
    all_runs: their runs; `Run.of` is the name of the row.
    finished: the results.json of finished runs, by run.
    failed: why runs failed, by run.
  """
  lines = []
  for row in rows:
    row_runs = [run for run in all_runs if run.of == row.name]
    done = [run for run in row_runs if run.name in finished]
    found = [finished[run.name] for run in done]
    mean, std = _over_seeds(found)
    log = runlog.read_metrics(os.path.join(done[0].folder, 'metrics.jsonl')) if done else ()
    lines.append(
      {
        'name': row.name,
        'label': row.label,
        'published': _published(row),
        'num_params': found[0]['num_params'] if found else None,
        'seeds': [run.settings.config.seed for run in done],
        'mean': mean,
        'std': std,
        'rays_per_second': runlog.median_speed(log),
        'status': _status(row_runs, finished, failed),
      }
    )
  own = [row.name for row in rows if row.table is None]
  reference = own[0] if own and own[0] == rows[0].name else ablations.FULL
  at = next((line for line in lines if line['name'] == reference), None)
  lines = [{**line, **_compare(line, at)} for line in lines]
  changes = {line['name']: line['psnr_change'] for line in lines}
  any_result = next(iter(finished.values()), {})
  return {
    'scene': any_result.get('scene'),
    'steps': any_result.get('step'),
    'protocol': any_result.get('protocol'),
    'reduction': any_result.get('reduction'),
    'reference': reference,
    'worse_than_full': {
      n: changes[n] < 0 for n in ablations.BIG_EFFECTS if changes.get(n) is not None
    },
    'rows': lines,
  }


def _number(value: float | None, form: str = '.2f', std: float | None = None) -> str:
  if value is None:
    return '-'
  return format(value, form) if std is None else f'{value:{form}} ± {std:{form}}'


def _change(line: Mapping[str, Any], metric: str) -> str:
  """Returns a change; bold if it exceeds the spread."""
  text = _number((line['change'] or {}).get(metric), f'+{_METRICS[metric]}')
  return f'**{text}**' if (line['exceeds_spread'] or {}).get(metric) else text


def _measured(line: Mapping[str, Any], metric: str) -> str:
  mean, std = line['mean'] or {}, line['std'] or {}
  return _number(mean.get(metric), _METRICS[metric], std.get(metric))


def _cells(line: Mapping[str, Any], own: bool) -> tuple[str, ...]:
  label = line['label'].replace('|', r'\|')
  params, speed = _number(line['num_params'], ','), _number(line['rays_per_second'], ',.0f')
  if own:
    numbers = [cell(line, metric) for metric in _METRICS for cell in (_measured, _change)]
    return (label, params, *numbers, speed)
  theirs = line['published'] or dict.fromkeys(('table', 'psnr', 'psnr_change', 'ssim', 'lpips'))
  millions = theirs.get('million_params')
  return (
    label,
    params if millions is None else f'{params} ({millions:.1f} M)',
    _number(theirs['psnr']) + ('*' if theirs['table'] == 1 else ''),
    _number(theirs['psnr_change'], '+.2f'),
    _number(theirs['ssim'], '.3f'),
    _number(theirs['lpips'], '.3f'),
    _measured(line, 'psnr'),
    _change(line, 'psnr'),
    _measured(line, 'ssim'),
    _measured(line, 'lpips_paper'),
    speed,
  )


def _caption(table: Mapping[str, Any], own: bool, marked: bool) -> str:
  """Explains the columns: whose numbers they are, and on which scene."""
  reference = next((x['label'] for x in table['rows'] if x['name'] == table['reference']), 'none')
  text = f'Scene {table["scene"]}, {table["steps"] or 0:,} steps. '
  if (way := table['reduction']) not in (None, pyramid.NOT_REDUCED):
    text += f'Reduced pictures: {tables.WAYS.get(way, way)}. '
  if own:
    text += f'Changes are from "{reference}".'
  else:
    text += (
      'The published numbers are of other scenes or steps: Table 2 of the paper on bicycle, Table '
      '1 (marked *) as the mean over nine scenes, all after 250,000 steps. Compare changes, not '
      'values. "to full": PSNR minus that of the full model.'
    )
  if any(line['std'] for line in table['rows']):
    text += ' Mean ± standard deviation over seeds.'
  if marked:
    text += (
      ' Bold: the change exceeds the spread, which is the sum of the standard deviations of the '
      'two rows.'
    )
  return text


def to_markdown(table: Mapping[str, Any]) -> str:
  """Formats `make_table` as markdown: a table, and what is missing in it."""
  lines, own = table['rows'], not any(line['published'] for line in table['rows'])
  heads = _OWN_HEADS if own else _PUBLISHED_HEADS
  marked = any(any((line['exceeds_spread'] or {}).values()) for line in lines)
  unfinished = [line for line in lines if line['status'] != 'finished']
  cells = [heads, ('---',) * len(heads), *(_cells(line, own) for line in lines)]
  if unfinished:  # A column of its own, so that nobody overlooks it.
    states = ['status', '---', *(line['status'].replace('|', r'\|') for line in lines)]
    cells = [(*row, state) for row, state in zip(cells, states)]
  text = [_caption(table, own, marked), '', *(f'| {" | ".join(row)} |' for row in cells)]
  if effects := table['worse_than_full']:
    verdicts = ', '.join(f'{name} {"yes" if worse else "NO"}' for name, worse in effects.items())
    text += ['', f'Worse than the full model, as published: {verdicts}.']
  return '\n'.join(text) + '\n'


def write_table(
  out: str,
  rows: Sequence[ablations.Row],
  all_runs: Sequence[runs.Run],
  failed: Mapping[str, str] | None = None,
) -> str:
  """Writes ablations.json, .md, .tex and .csv to `out`; returns the markdown.

  LaTeX and CSV have the finished runs only, and no published numbers.
  """
  finished = {run.name: results.read(run.results) for run in all_runs if runs.is_finished(run)}
  table = make_table(rows, all_runs, finished, failed or {})
  results.write_json(os.path.join(out, 'ablations.json'), table)
  text = to_markdown(table)
  files.write_text(os.path.join(out, 'ablations.md'), text)
  methods: dict[str, list[tables.Run]] = {}
  for row in rows:
    found = [run for run in all_runs if run.of == row.name and run.name in finished]
    if found:
      methods[row.label] = [tables.Run(run.results, finished[run.name]) for run in found]
  if methods:
    compared = tables.make(methods)
    for ending in ('.tex', '.csv'):
      table_forms.write(os.path.join(out, f'ablations{ending}'), compared)
  return text
