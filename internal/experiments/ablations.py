"""Experiments on one scene: the paper's ablations and baselines, rows of one's own, and sweeps."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from .. import configs
from ..system import files, installation
from . import runs, sweeps

_PUBLISHED = os.path.join(installation.DATA, 'configs', 'ablations', 'published.json')
_BASE = os.path.join(installation.DATA, 'configs', '360.gin')
FULL = 'full'
# Settings of the pictures and of the evaluation: numbers can be compared only where they agree.
_SHARED = (
  'factor', 'dataset_loader', 'llffhold', 'load_alphabetical', 'dtu_light_cond',
  'eval_quantize_metrics', 'eval_crop_borders', 'eval_render_interval', 'eval_dataset_limit',
  'eval_refine_cameras',
)  # fmt: skip
# The paper's most important design choices: each is expected to be worse than the full model.
BIG_EFFECTS = ('a_no_interlevel', 'f_small_mlp', 'g_no_ipe', 'h_no_contraction')


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table: its settings, and its published numbers if it is one of the paper's."""

  name: str  # Of its folder.
  label: str
  config: str | None = None  # Relative to the repository; None for a row of one's own.
  bindings: tuple[str, ...] = ()
  table: int | None = None  # Of the paper.
  psnr: float | None = None
  ssim: float | None = None
  lpips: float | None = None
  million_params: float | None = None


def published() -> tuple[dict[str, Row], float]:
  """Returns the paper's rows by name, and the full model's mean PSNR in the paper's Table 1."""
  table = files.read_json(_PUBLISHED)
  return {row['name']: Row(**row) for row in table['rows']}, table['full_mean_psnr']


def choose(
  names: Sequence[str] | None = None, rows_file: str | None = None, sweep: Sequence[str] = ()
) -> list[Row]:
  """Returns the rows of an experiment; the first of one's own, or `full`, is the reference.

  Args:
    names: the paper's rows, which come first; None for all, or for none if there are others.
    rows_file: a file of rows, see `sweeps`.
    sweep: bindings with several values each.

  Raises:
    RunError: an unknown name, or an invalid file or sweep.
  """
  rows, _ = published()
  unknown = [name for name in names or () if name not in rows]
  if unknown:
    raise runs.RunError(f'--rows: no row {unknown[0]!r}; choose from {", ".join(rows)}.')
  bindings = sweeps.read_rows(rows_file) if rows_file else {}
  own = sweeps.expand_all({**bindings, **({'': sweep} if sweep else {})})
  if sweep and '' in own:
    raise runs.RunError(
      f'--sweep {" ".join(map(repr, sweep))}: has a single value. Give several, separated by '
      'commas, or use --gin_bindings.'
    )
  everything = names is None and not own
  theirs = [row for row in rows.values() if everything or row.name in (names or ())]
  labels = list(own)
  folders = sweeps.folder_names([*(row.name for row in theirs), *labels])[len(theirs) :]
  return theirs + [
    Row(name, label, bindings=tuple(own[label])) for name, label in zip(folders, labels)
  ]


def make_runs(
  row: Row,
  data_dir: str,
  out: str,
  gin_configs: Sequence[str],
  gin_bindings: Sequence[str],
  seeds: int = 1,
) -> list[runs.Run]:
  """Makes the runs of a row on a scene, in `out`/ROW and, for further seeds, beside it.

  `gin_configs` and `gin_bindings` are the same for all rows. The paper's rows have a config of
  their own, which precedes them; other rows have 360.gin instead of no `gin_configs`, and their
  bindings follow.

  Raises:
    ConfigError: the settings are invalid.
    RunError: there are no seeds, or a binding sets a folder.
  """
  runs.refuse_taken(gin_bindings, sweeps.TAKEN)
  if row.config is None:
    gin = list(gin_configs) or [_BASE]
  else:
    gin = [os.path.join(installation.DATA, row.config), *gin_configs]
  bindings = [*gin_bindings, *row.bindings, f'Config.data_dir = {os.path.abspath(data_dir)!r}']
  fixed = ('factor', 'data_dir')
  return runs.make_runs(row.name, os.path.abspath(out), gin, bindings, seeds, fixed=fixed)


def check(all_runs: Sequence[runs.Run]) -> None:
  """Checks that the runs can stand in one table, and that no two are the same experiment.

  Raises:
    RunError: two runs differ in their pictures or in how they are evaluated, or have the same
      folder, or the same settings as far as these have an effect.
  """
  first, folders, known = all_runs[0], {}, {}
  for run in all_runs:
    if other := folders.get(run.folder):
      raise runs.RunError(
        f'The rows {other!r} and {run.of!r} need different names: both have a run in {run.folder}.'
      )
    for name in _SHARED:
      both = [getattr(r.settings.config, name) for r in (first, run)]
      if both[0] != both[1]:
        raise runs.RunError(
          f'{first.name} and {run.name} differ in Config.{name} ({both[0]!r} and {both[1]!r}), so '
          'their numbers cannot be compared in one table. Use a command for each, with an --out of '
          'its own.'
        )
    settings = run.settings.change('config', checkpoint_dir=None)
    values = repr(configs.without_idle(settings))
    if other := known.get(values):
      raise runs.RunError(
        f'{other} and {run.name} have the same settings. Leave one out, or change it: what '
        "--gin_configs and --gin_bindings set wins over the paper's rows."
      )
    folders[run.folder], known[values] = run.of, run.name
