"""Rows of the results table: what each trains on, and whether a run agrees with the stored figures.

configs/results.json holds the rows, the tolerances, the records of measured rows, and the figures
of other programs that stand beside them.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import configs, datasets
from ..datasets import scenes
from ..errors import UserError
from ..evaluation import benchmarks, lpips, results
from ..system import files, installation
from ..training import bucket_checkpoints, checkpoints, run_seal
from . import runs

PATH = os.path.join(installation.DATA, 'configs', 'results.json')
METRICS = ('psnr', 'ssim', *lpips.METRICS)
_SPREAD = 8  # Cameras in a layout.
_LAYOUT_TOLERANCE = 0.02
# Fields of a record that are copied from results.json; 'mean' is copied by metric.
_COPIED = (
  'num_images', 'image_sizes', 'step', 'num_params', 'train_seconds', 'train_peak_bytes',
  'seconds_per_image', 'device', 'software', 'config_hash',
)  # fmt: skip
FIELDS = ('row', *METRICS, *_COPIED, 'commit', 'checkpoint_sha256')


class ReproduceError(UserError):
  """A row that cannot be run, or whose figures are not those stored."""


@dataclasses.dataclass(frozen=True)
class Capture:
  """What identifies a capture: its pictures, and where its cameras are."""

  text: str  # Describes it.
  images: int  # Training and test.
  test: int
  size: str  # WIDTHxHEIGHT at the row's factor.
  layout: tuple[float, ...]  # See `layout`.


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table."""

  name: str
  scene: str  # As the table shows it.
  config: str  # The .gin file, relative to the repository.
  time: str  # What to expect, in words.
  data: str | None = None  # An example of --data; None if the program makes the capture.
  bindings: tuple[str, ...] = ()
  capture: Capture | None = None
  dataset: str | None = None  # Of benchmarks.json, with `of`: its scene.
  of: str | None = None
  published: tuple[str, ...] = ()  # Methods of benchmarks.json to show beside it.
  in_readme: bool = False
  remark: str = ''

  @property
  def command(self) -> str:
    """The command line that runs the row, with the example of its data."""
    return installation.command_text(
      'reproduce', self.name, *(('--data', self.data) if self.data else ())
    )


@dataclasses.dataclass(frozen=True)
class Table:
  """The content of results.json in configs/."""

  rows: dict[str, Row]
  tolerance: dict[str, float]  # By metric, in both directions.
  measured: dict[str, dict[str, Any]]  # Records by row.
  others: list[dict[str, Any]]  # Figures of other programs and of earlier runs.


def load() -> Table:
  """Loads the rows and what is stored of them."""
  content = files.read_json(PATH)
  rows = {}
  for name, fields in content['rows'].items():
    made = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    if found := made.get('capture'):
      made['capture'] = Capture(**{**found, 'layout': tuple(found['layout'])})
    rows[name] = Row(name, **made)
  return Table(rows, content['tolerance'], content['measured'], content['others'])


def choose(table: Table, name: str) -> Row:
  """Returns a row by name.

  Raises:
    ReproduceError: there is none.
  """
  if name not in table.rows:
    raise ReproduceError(f'No row {name!r}; choose from {", ".join(table.rows)}.')
  return table.rows[name]


def make_run(row: Row, data_dir: str, out: str) -> runs.Run:
  """Returns the row's run, in the folder `out`/ROW."""
  bindings = [f'Config.data_dir = {os.path.abspath(data_dir)!r}', *row.bindings]
  if row.dataset:
    bindings += [f'Config.factor = {benchmarks.load(row.dataset).scenes[row.of].factor}']
  config = os.path.join(installation.DATA, row.config)
  fixed = ('factor', 'data_dir')
  (run,) = runs.make_runs(row.name, os.path.abspath(out), [config], bindings, fixed=fixed)
  return run


def layout(scene: scenes.Scene) -> list[float]:
  """Returns the distances from each of eight evenly spaced cameras to the next, in a ring.

  They are divided by their root mean square, so that they do not depend on the world's coordinates.
  """
  rows = np.linspace(0, len(scene.names), _SPREAD, endpoint=False).astype(int)
  positions = np.asarray(scene.cameras.camtoworld, np.float64)[rows, :3, 3]  # [8, 3]
  distances = np.linalg.norm(positions - np.roll(positions, -1, 0), axis=-1)
  return [round(float(d), 3) for d in distances / np.sqrt(np.mean(distances**2))]


def check_capture(row: Row, config: configs.Config) -> None:
  """Checks that a capture is the one that the row's figures are of.

  Raises:
    ReproduceError: it is another one.
    BenchmarkError: it is not the published one.
    DataError: it cannot be loaded.
  """
  if row.dataset:
    benchmarks.check_scene(benchmarks.load(row.dataset), row.of, config)
  if row.capture is None:
    return
  scene = datasets.load_dataset(config, read_only=True)
  wanted, sizes = row.capture, ', '.join(scene.report['image_sizes'])
  counts = {
    'images': (len(scene.names), wanted.images),
    'test images': (len(scene.test), wanted.test),
    'size': (sizes, wanted.size),
  }
  for what, (found, right) in counts.items():
    if found != right:
      raise ReproduceError(
        f'--data {config.data_dir}: {what} {found}, but the figures of {row.name} are of {right}. '
        f'Give the capture with {wanted.text}.'
      )
  apart = np.max(np.abs(np.subtract(layout(scene), wanted.layout)))
  if apart > _LAYOUT_TOLERANCE:
    raise ReproduceError(
      f'--data {config.data_dir}: its cameras stand elsewhere (distances between them differ by up '
      f'to {apart:.0%}) than those that the figures of {row.name} are of. Give the capture with '
      f'{wanted.text}; other poses change the result by decibels.'
    )


def _commit() -> str | None:
  """Returns the commit of the checkout, with '+' if files have changed; None without git."""
  if not installation.is_checkout():
    return None
  git = ['git', '-C', installation.DATA]
  try:
    head, changes = (
      subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
      for words in (('rev-parse', 'HEAD'), ('status', '--porcelain', '--untracked-files=no'))
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return head + ('+' if changes else '')


def make_record(row: Row, run: runs.Run, commit: str | None = None) -> dict[str, Any]:
  """Returns what is stored of a finished run.

  `checkpoint_sha256` is that of the checkpoint's manifest.json, which holds those of its files.

  Args:
    row: the row.
    run: its finished run.
    commit: of the program; None asks git.
  """
  found = results.read(run.results)
  folder = checkpoints.folder_of(run.folder, found['step'])
  manifest = os.path.join(folder, bucket_checkpoints.MANIFEST)
  return {
    'row': row.name,
    **{name: found['mean'][name] for name in METRICS},
    **{name: found.get(name) for name in _COPIED},
    'commit': commit or _commit(),
    'checkpoint_sha256': run_seal.sha256(manifest) if files.is_file(manifest) else None,
  }


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A metric of a run beside the stored one."""

  metric: str
  here: float | None
  stored: float | None
  tolerance: float

  @property
  def agrees(self) -> bool | None:
    """Whether they agree; None if one is not measured."""
    if self.here is None or self.stored is None:
      return None
    return abs(self.here - self.stored) <= self.tolerance


def compare(
  record: Mapping[str, Any], stored: Mapping[str, Any], tolerance: Mapping[str, float]
) -> list[Comparison]:
  """Compares each metric of a record with that of the stored one."""
  return [Comparison(m, record[m], stored[m], tolerance[m]) for m in METRICS]


def differences(record: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
  """Returns what else differs, as 'what: here (stored: there)': settings, machine and versions."""

  def facts(of: Mapping[str, Any]) -> dict[str, Any]:
    device = of['device'] or {'count': '?', 'kind': 'a device that was not recorded'}
    return {
      'steps': of['step'],
      'parameters': of['num_params'],
      'settings': of['config_hash'],
      'device': f'{device["count"]} x {device["kind"]}',
      **(of['software'] or {}),
      'commit': of['commit'],
    }

  here, there = facts(record), facts(stored)
  names = [name for name in here if here[name] != there.get(name)]
  return [f'{n}: {here[n]} (stored: {there.get(n) or "not recorded"})' for n in names]


def store(paths: Sequence[str]) -> None:
  """Puts records (record.json of runs) into the table's file.

  Raises:
    ReproduceError: a file is not a record of a row.
  """
  content = files.read_json(PATH)
  for name in paths:
    record = files.read_json(name, error=ReproduceError)
    if set(record) != set(FIELDS) or record['row'] not in content['rows']:
      raise ReproduceError(
        f'{name}: is not the record of a row; it is RUN/record.json of `reproduce.py ROW`.'
      )
    content['measured'][record['row']] = record
  # In the order of the table.
  measured = content['measured']
  content['measured'] = {row: measured[row] for row in content['rows'] if row in measured}
  results.write_json(PATH, content)
