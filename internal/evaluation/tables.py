"""From results.json files to tables: scenes by methods, published rows beside ours.

A table never mixes protocols: whatever two numbers side by side must have in common is compared
first, and a difference is an error that names both files and the field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from . import benchmarks, lpips, results
from .metrics import METRICS

HIGHER_IS_BETTER = {
  **dict.fromkeys(METRICS, True),
  **dict.fromkeys(lpips.METRICS, False),
}
_SHOWN = ('psnr', 'ssim', *lpips.METRICS)  # Unless others are asked for.

# What must agree: everywhere in a table; between methods on a scene; between scenes of a method.
_PROTOCOL = ('quantized', 'crop_borders', 'test_split', 'render_interval', 'lpips')
_EVERYWHERE = ('dataset_loader', *(f'protocol.{name}' for name in _PROTOCOL), 'lpips.weights')
_ON_A_SCENE = ('factor', 'num_images', 'image_sizes', 'masked_images', 'per_image.name')
_OF_A_METHOD = ('config_hash', 'step', 'num_params', 'mlp_dtype')


class TablesError(UserError):
  """Results that cannot stand in one table."""


@dataclasses.dataclass(frozen=True)
class Run:
  """One results.json."""

  path: str
  found: dict[str, Any]

  @property
  def scene(self) -> str:
    return self.found['scene'] or '?'

  def field(self, name: str) -> Any:
    """A field by its dotted name; of each image where that is in a list."""
    value: Any = self.found
    for part in name.split('.'):
      value = [row[part] for row in value] if isinstance(value, list) else value[part]
    return value


@dataclasses.dataclass(frozen=True)
class Row:
  """A method's numbers."""

  method: str
  values: Mapping[str, Mapping[str, float | None]]  # By metric and scene.
  mean: Mapping[str, float]  # As printed; used where scenes are not.
  ours: bool
  source: str


@dataclasses.dataclass(frozen=True)
class Table:
  """All that the three forms of a table show."""

  title: str
  metrics: tuple[str, ...]
  scenes: tuple[str, ...]
  groups: Mapping[str, Sequence[str]]  # Means over some scenes; the last one is over all.
  rows: tuple[Row, ...]
  against: Row | None  # Our numbers are shown with their distance from these.

  def value(self, row: Row, metric: str, column: str) -> float | None:
    """A scene's number or a group's mean; None where there is none, or a scene is missing."""
    by_scene = row.values.get(metric, {})
    if column in self.scenes:
      return by_scene.get(column)
    found = [by_scene.get(scene) for scene in self.groups[column]]
    if found and None not in found:
      return float(np.mean(found))
    return row.mean.get(metric) if column == self.columns[-1] else None

  def difference(self, row: Row, metric: str, column: str) -> float | None:
    """How far one of our numbers is above the one that it is compared with."""
    if not row.ours or self.against is None:
      return None
    both = [self.value(r, metric, column) for r in (row, self.against)]
    return None if None in both else both[0] - both[1]

  @property
  def columns(self) -> tuple[str, ...]:
    return (*self.scenes, *self.groups)


def _same(names: Sequence[str], first: Run, second: Run) -> None:
  for name in names:
    a, b = first.field(name), second.field(name)
    if a != b:
      raise TablesError(
        f'{first.path} and {second.path} differ in {name} ({_short(a)} and {_short(b)}), so their '
        'numbers cannot stand in one table.'
      )


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


def check(methods: Mapping[str, Sequence[Run]]) -> None:
  """Refuses results that were not made alike.

  Raises:
    TablesError: two files that differ in their protocol, in a scene's images, or within a method
      in its config or step; or that are the same scene twice.
  """
  first, of_scene = None, {}
  for runs in methods.values():
    seen = {}
    for run in runs:
      if run.scene in seen:
        raise TablesError(
          f'{seen[run.scene].path} and {run.path} are both of the scene {run.scene} and of one '
          'method; --method NAME FILES... tells methods apart.'
        )
      seen[run.scene] = run
      first = first or run
      _same(_EVERYWHERE, first, run)
      _same(_ON_A_SCENE, of_scene.setdefault(run.scene, run), run)
      _same(_OF_A_METHOD, runs[0], run)


def check_published(runs: Iterable[Run], benchmark: benchmarks.Benchmark) -> None:
  """Refuses results that published numbers cannot stand beside.

  Raises:
    TablesError: a results.json that departs from how the published numbers were made.
  """
  split = results.every(benchmark.hold) if benchmark.hold else results.OWN_SPLIT
  for run in runs:
    facts = benchmark.scenes[run.scene]
    wanted = {
      'dataset_loader': benchmark.loader,
      'protocol.quantized': True,
      'protocol.crop_borders': 0,
      'protocol.test_split': split,
      'protocol.render_interval': 1,
      'factor': facts.factor,
      'num_images': facts.test,
      'masked_images': 0,
    }
    for name, value in wanted.items():
      if run.field(name) != value:
        raise TablesError(
          f'{run.path} and the published numbers (benchmarks.json) differ in {name} '
          f'({_short(run.field(name))} and {value!r}); --published none leaves those out.'
        )
    for size in run.field('image_sizes'):
      if any(abs(int(a) - b) > 1 for a, b in zip(size.split('x'), facts.used_size)):
        raise TablesError(
          f'{run.path} and the published numbers (benchmarks.json) differ in image_sizes ({size} '
          f'and {facts.used_size[0]:.0f}x{facts.used_size[1]:.0f}); --published none leaves those '
          'out.'
        )


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Runs by method, which runs of one config_hash share: 'ours', or 'ours' and the hash."""
  by_hash: dict[str, list[Run]] = {}
  for run in runs:
    by_hash.setdefault(run.found['config_hash'], []).append(run)
  one = len(by_hash) == 1
  return {'ours' if one else f'ours {key[:8]}': found for key, found in by_hash.items()}


def find_benchmark(runs: Sequence[Run]) -> benchmarks.Benchmark | None:
  """The published dataset that has all the scenes, if there is one.

  Raises:
    TablesError: several have them.
  """
  scenes, loaders = ({run.field(n) for run in runs} for n in ('scene', 'dataset_loader'))
  fit = [
    b for b in benchmarks.load_all().values() if scenes <= set(b.scenes) and loaders == {b.loader}
  ]
  if len(fit) > 1:
    names = ' and '.join(b.name for b in fit)
    raise TablesError(f'{", ".join(sorted(scenes))}: {names} have such scenes; say --dataset NAME.')
  return fit[0] if fit else None


def _our_row(method: str, runs: Sequence[Run]) -> Row:
  values = {
    metric: {run.scene: run.found['mean'][metric] for run in runs} for metric in HIGHER_IS_BETTER
  }
  return Row(method, values, {}, True, ', '.join(run.path for run in runs))


def make(
  methods: Mapping[str, Sequence[Run]],
  benchmark: benchmarks.Benchmark | None = None,
  published: Sequence[str] | None = None,
  metrics: Sequence[str] | None = None,
) -> Table:
  """Puts a table together.

  Args:
    methods: the runs of each of our methods.
    benchmark: the dataset that they are of; None for captures without published numbers.
    published: the published methods to show, the one to compare with first; None for all.
    metrics: to show; None for PSNR, SSIM and those of LPIPS that were measured.

  Raises:
    TablesError: results that were not made alike, or an unknown method, metric or scene.
  """
  runs = [run for found in methods.values() for run in found]
  check(methods)
  rows = [_our_row(method, found) for method, found in methods.items()]
  theirs, groups, scenes, title = [], {}, list(dict.fromkeys(r.scene for r in runs)), 'Results'
  if benchmark is not None:
    strange = [run for run in runs if run.scene not in benchmark.scenes]
    if strange:
      raise TablesError(
        f'{strange[0].path}: {strange[0].scene!r} is no scene of {benchmark.name!r}: there are '
        f'{", ".join(benchmark.scenes)}.'
      )
    theirs = _choose(benchmark, published)
    if theirs:
      check_published(runs, benchmark)
    scenes, groups, title = list(benchmark.scenes), dict(benchmark.groups), benchmark.title
  groups = {**groups, 'mean': scenes}
  unknown = [name for name in metrics or () if name not in HIGHER_IS_BETTER]
  if unknown:
    raise TablesError(f'Unknown metric {unknown[0]!r}: there are {", ".join(HIGHER_IS_BETTER)}.')
  if not metrics:
    metrics = [m for m in _SHOWN if any(v is not None for r in rows for v in r.values[m].values())]
  others = [Row(p.method, p.values, p.mean, False, p.source) for p in theirs]
  against = others[0] if others else None
  return Table(title, tuple(metrics), tuple(scenes), groups, (*others, *rows), against)


def _choose(benchmark, names: Sequence[str] | None) -> list[benchmarks.Published]:
  known = {p.method: p for p in benchmark.published}
  for name in names or ():
    if name not in known:
      raise TablesError(
        f'No published method {name!r} on {benchmark.name}: there are {", ".join(known)}.'
      )
  return list(known.values()) if names is None else [known[name] for name in names]


def read(paths: Sequence[str]) -> list[Run]:
  """Reads results.json files.

  Raises:
    ResultsError: one is missing or damaged, or of another schema version.
  """
  return [Run(path, results.read(path)) for path in paths]
