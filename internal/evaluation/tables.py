"""Builds tables of methods by scenes from results.json files and published numbers.

A table never mixes protocols: `check` compares every field that affects the numbers, and its errors
name both files and the field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import configs
from ..errors import UserError
from . import benchmarks, lpips, results
from .metrics import METRICS

HIGHER_IS_BETTER = {**dict.fromkeys(METRICS, True), **dict.fromkeys(lpips.METRICS, False)}
_SHOWN = ('psnr', 'ssim', *lpips.METRICS)  # By default.

# Fields that must agree in the whole table, per scene, and per method.
_PROTOCOL = ('quantized', 'crop_borders', 'test_split', 'render_interval', 'lpips')
_EVERYWHERE = ('dataset_loader', *(f'protocol.{name}' for name in _PROTOCOL), 'lpips.weights')
_ON_A_SCENE = ('factor', 'num_images', 'image_sizes', 'masked_images', 'per_image.name')
_OF_A_METHOD = ('method_hash', 'step', 'num_params', 'mlp_dtype')
_OF_A_SEED = ('config_hash',)  # Within a method.


class TablesError(UserError):
  """Results that cannot be put in one table."""


@dataclasses.dataclass(frozen=True)
class Run:
  """One results.json."""

  path: str
  found: dict[str, Any]

  @property
  def scene(self) -> str:
    return self.found['scene'] or '?'

  def field(self, name: str) -> Any:
    """Returns a field by its dotted name; a list of values where the name passes through a list."""
    value: Any = {**self._older(), **self.found}
    for part in name.split('.'):
      value = [row[part] for row in value] if isinstance(value, list) else value[part]
    return value


  def _older(self) -> dict[str, Any]:
    """Returns the fields that older files lack."""
    # With the default seed, the hash has always been that of the method.
    hashed = self.found['config_hash']
    return {'method_hash': hashed, 'seed': configs.Config.seed, 'reduction': None}


@dataclasses.dataclass(frozen=True)
class Row:
  """A method's numbers."""

  method: str
  values: Mapping[str, Mapping[str, float | None]]  # By metric and scene.
  mean: Mapping[str, float]  # As printed; used if numbers of scenes are missing.
  ours: bool
  source: str


@dataclasses.dataclass(frozen=True)
class Table:
  """A table's content, for any output format."""

  title: str
  metrics: tuple[str, ...]
  scenes: tuple[str, ...]
  groups: Mapping[str, Sequence[str]]  # Scenes of each mean; the last group has all scenes.
  rows: tuple[Row, ...]
  against: Row | None  # The row that ours are compared with.

  def value(self, row: Row, metric: str, column: str) -> float | None:
    """Returns a scene's number or a group's mean; None if it or a scene of the group is missing."""
    by_scene = row.values.get(metric, {})
    if column in self.scenes:
      return by_scene.get(column)
    found = [by_scene.get(scene) for scene in self.groups[column]]
    if found and None not in found:
      return float(np.mean(found))
    return row.mean.get(metric) if column == self.columns[-1] else None

  def difference(self, row: Row, metric: str, column: str) -> float | None:
    """Returns one of our numbers minus the number it is compared with."""
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
        'numbers cannot be compared in one table.'
      )


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


def check(methods: Mapping[str, Sequence[Run]]) -> None:
  """Checks that results are comparable.

  Raises:
    TablesError: two files differ in protocol, in a scene's images, or in config or step within a
      method; or a method has two files of a scene.
  """
  first, of_scene = None, {}
  for runs in methods.values():
    known, of_seed = {}, {}
    for run in runs:
      seed = run.field('seed')
      if other := known.get((run.scene, seed)):
        raise TablesError(
          f'{other.path} and {run.path} are both of the scene {run.scene} and the '
          f'same method and seed ({seed}); separate methods by --method NAME FILES...'
        )
      known[run.scene, seed] = run
      first = first or run
      _same(_EVERYWHERE, first, run)
      _same(_ON_A_SCENE, of_scene.setdefault(run.scene, run), run)
      _same(_OF_A_METHOD, runs[0], run)
      _same(_OF_A_SEED, of_seed.setdefault(seed, run), run)


def check_published(runs: Iterable[Run], benchmark: benchmarks.Benchmark) -> None:
  """Checks that results are comparable with published numbers.

  Raises:
    TablesError: a results.json does not follow the published protocol.
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
          f'({_short(run.field(name))} and {value!r}); use --published none to '
          'leave the published numbers out.'
        )
    for size in run.field('image_sizes'):
      if any(abs(int(a) - b) > 1 for a, b in zip(size.split('x'), facts.used_size)):
        raise TablesError(
          f'{run.path} and the published numbers (benchmarks.json) differ in image_sizes ({size} '
          f'and {facts.used_size[0]:.0f}x{facts.used_size[1]:.0f}); use --published none to leave '
          'the published numbers out.'
        )


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Groups runs by method_hash into methods: 'ours', or 'ours HASH' if there are several."""
  by_hash: dict[str, list[Run]] = {}
  for run in runs:
    by_hash.setdefault(run.field('method_hash'), []).append(run)
  one = len(by_hash) == 1
  return {'ours' if one else f'ours {key[:8]}': found for key, found in by_hash.items()}


def find_benchmark(runs: Sequence[Run]) -> benchmarks.Benchmark | None:
  """Returns the published dataset that contains all scenes, if any.

  Raises:
    TablesError: several datasets do.
  """
  scenes, loaders = ({run.field(n) for run in runs} for n in ('scene', 'dataset_loader'))
  fit = [
    b for b in benchmarks.load_all().values() if scenes <= set(b.scenes) and loaders == {b.loader}
  ]
  if len(fit) > 1:
    names = ' and '.join(b.name for b in fit)
    raise TablesError(
      f'{", ".join(sorted(scenes))}: {names} have these scenes; choose by --dataset NAME.'
    )
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
  """Makes a table.

  Args:
    methods: our methods' runs, by name.
    benchmark: the dataset of the runs; None for captures without published numbers.
    published: the published methods to show, starting with the one to compare with; None for all.
    metrics: the metrics to show; None for PSNR, SSIM and LPIPS if measured.

  Raises:
    TablesError: results are not comparable, or a method, metric or scene is unknown.
  """
  runs = [run for found in methods.values() for run in found]
  check(methods)
  rows = [_our_row(method, found) for method, found in methods.items()]
  theirs, groups, scenes, title = [], {}, list(dict.fromkeys(r.scene for r in runs)), 'Results'
  if benchmark is not None:
    unknown = [run for run in runs if run.scene not in benchmark.scenes]
    if unknown:
      raise TablesError(
        f'{unknown[0].path}: {unknown[0].scene!r} is not a scene of {benchmark.name!r}; its '
        f'scenes are {", ".join(benchmark.scenes)}.'
      )
    theirs = _choose(benchmark, published)
    if theirs:
      check_published(runs, benchmark)
    scenes, groups, title = list(benchmark.scenes), dict(benchmark.groups), benchmark.title
  groups = {**groups, 'mean': scenes}
  unknown = [name for name in metrics or () if name not in HIGHER_IS_BETTER]
  if unknown:
    raise TablesError(f'Unknown metric {unknown[0]!r}; choose from {", ".join(HIGHER_IS_BETTER)}.')
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
        f'Unknown published method {name!r} on {benchmark.name}; choose from {", ".join(known)}.'
      )
  return list(known.values()) if names is None else [known[name] for name in names]


def read(paths: Sequence[str]) -> list[Run]:
  """Reads results.json files.

  Raises:
    ResultsError: a file is missing or invalid, or has another schema version.
  """
  return [Run(path, results.read(path)) for path in paths]
