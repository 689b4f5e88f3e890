"""The paper's ablations and baselines: their runs, and a table beside the published numbers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation import results
from ..system import files, installation
from ..training import runlog
from . import runs

_PUBLISHED = os.path.join(installation.DATA, 'configs', 'ablations', 'published.json')
_FULL = 'full'
# The paper's most important design choices: each is expected to be worse than the full model.
BIG_EFFECTS = ('a_no_interlevel', 'f_small_mlp', 'g_no_ipe', 'h_no_contraction')

_HEADS = (
  '', 'parameters (published)', 'published PSNR', 'to full', 'SSIM', 'LPIPS', 'PSNR here',
  'to full', 'SSIM', 'LPIPS', 'rays/s',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table: a config and its published numbers."""

  name: str
  config: str  # Relative to the repository.
  label: str
  table: int  # Of the paper.
  psnr: float
  ssim: float | None
  lpips: float | None
  million_params: float | None


def published() -> tuple[dict[str, Row], float]:
  """Returns the rows by name, and the full model's mean PSNR in the paper's Table 1."""
  table = files.read_json(_PUBLISHED)
  return {row['name']: Row(**row) for row in table['rows']}, table['full_mean_psnr']


def choose(names: Sequence[str] | None) -> list[Row]:
  """Returns the named rows in the paper's order, or all rows for None.

  Raises:
    RunError: an unknown name.
  """
  rows, _ = published()
  unknown = [name for name in names or () if name not in rows]
  if unknown:
    raise runs.RunError(f'--rows: no row {unknown[0]!r}; choose from {", ".join(rows)}.')
  return [row for row in rows.values() if names is None or row.name in names]


def make_run(
  row: Row, data_dir: str, out: str, gin_configs: Sequence[str], gin_bindings: Sequence[str]
) -> runs.Run:
  """Makes the run of a row on a scene, in `out`/ROW; gin files and bindings are the same for all.

  Raises:
    ConfigError: the settings are invalid.
  """
  folder = os.path.abspath(os.path.join(out, row.name))
  paths = {'data_dir': os.path.abspath(data_dir), 'checkpoint_dir': folder}
  bindings = [*gin_bindings, *(f'Config.{name} = {path!r}' for name, path in paths.items())]
  gin = [os.path.join(installation.DATA, row.config), *gin_configs]
  return runs.make_run(row.name, folder, gin, bindings, fixed=('factor', 'data_dir'))


def rays_per_second(folder: str) -> float | None:
  """Returns the median training speed that metrics.jsonl has, None without any."""
  rows = runlog.read_metrics(os.path.join(folder, 'metrics.jsonl'))
  speeds = sorted(row['rays_per_sec'] for row in rows if row.get('rays_per_sec'))
  return speeds[len(speeds) // 2] if speeds else None


def make_table(
  rows: Sequence[Row], finished: Mapping[str, Mapping], speeds: Mapping[str, float | None]
) -> dict[str, Any]:
  """Returns the content of ablations.json.

  Args:
    rows: the rows of the table.
    finished: the results.json of finished rows, by name.
    speeds: training speeds in rays per second, by name.
  """
  known, full_mean = published()
  full_psnr = {1: full_mean, 2: known[_FULL].psnr}  # By table of the paper.
  our_full = finished[_FULL]['mean']['psnr'] if _FULL in finished else None
  lines = []
  for row in rows:
    found = finished.get(row.name)
    psnr = found and found['mean']['psnr']
    keys = ('table', 'psnr', 'ssim', 'lpips', 'million_params')
    lines.append(
      {
        'name': row.name,
        'label': row.label,
        'published': {
          **{key: getattr(row, key) for key in keys},
          'psnr_change': row.psnr - full_psnr[row.table],
        },
        'num_params': found and found['num_params'],
        'mean': found and found['mean'],
        'psnr_change': None if psnr is None or our_full is None else psnr - our_full,
        'rays_per_second': speeds.get(row.name),
      }
    )
  changes = {line['name']: line['psnr_change'] for line in lines}
  any_result = next(iter(finished.values()), {})
  return {
    'scene': any_result.get('scene'),
    'steps': any_result.get('step'),
    'protocol': any_result.get('protocol'),
    'worse_than_full': {n: changes[n] < 0 for n in BIG_EFFECTS if changes.get(n) is not None},
    'rows': lines,
  }


def _number(value: float | None, form: str = '.2f') -> str:
  return '-' if value is None else format(value, form)


def _cells(line: Mapping[str, Any]) -> tuple[str, ...]:
  theirs, mean = line['published'], line['mean'] or {}
  params, millions = _number(line['num_params'], ','), theirs['million_params']
  return (
    line['label'],
    params if millions is None else f'{params} ({millions:.1f} M)',
    _number(theirs['psnr']) + ('*' if theirs['table'] == 1 else ''),
    _number(theirs['psnr_change'], '+.2f'),
    _number(theirs['ssim'], '.3f'),
    _number(theirs['lpips'], '.3f'),
    _number(mean.get('psnr')),
    _number(line['psnr_change'], '+.2f'),
    _number(mean.get('ssim'), '.3f'),
    _number(mean.get('lpips_paper'), '.3f'),
    _number(line['rays_per_second'], ',.0f'),
  )


def to_markdown(table: Mapping[str, Any]) -> str:
  """Formats `make_table` as markdown. Changes are to the full model of the same column."""
  lines = [_HEADS, ('---',) * len(_HEADS), *map(_cells, table['rows'])]
  text = [
    f'Scene {table["scene"]}, {table["steps"] or 0:,} steps. Published: Table 2 on bicycle, Table '
    '1 (marked *) as the mean over nine scenes. "to full": PSNR minus that of the full model.',
    '',
    *(f'| {" | ".join(line)} |' for line in lines),
  ]
  if effects := table['worse_than_full']:
    told = ', '.join(f'{name} {"yes" if worse else "NO"}' for name, worse in effects.items())
    text += ['', f'Worse than the full model, as published: {told}.']
  return '\n'.join(text) + '\n'


def write_table(out: str, rows: Sequence[Row], all_runs: Sequence[runs.Run]) -> str:
  """Writes `out`/ablations.json and .md from the finished runs; returns the markdown."""
  finished = {run.name: results.read(run.results) for run in all_runs if runs.is_finished(run)}
  speeds = {run.name: rays_per_second(run.folder) for run in all_runs if run.name in finished}
  table = make_table(rows, finished, speeds)
  results.write_json(os.path.join(out, 'ablations.json'), table)
  text = to_markdown(table)
  files.write_text(os.path.join(out, 'ablations.md'), text)
  return text
