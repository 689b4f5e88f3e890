"""Builds tables of methods by scenes from results.json files and published numbers.

A table never mixes protocols: `check` compares every field that affects the numbers, and its errors
name both files and the field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import configs
from ..datasets import pyramid
from ..errors import UserError
from . import benchmarks, lpips, results
from .table_data import HIGHER_IS_BETTER, Row, Table, mean

_SHOWN = ('psnr', 'ssim', *lpips.METRICS)  # By default.

# Fields that must agree in the whole table, per scene, and per method.
_PROTOCOL = ('quantized', 'crop_borders', 'test_split', 'render_interval', 'lpips')
_EVERYWHERE = (
  'scales.reduction',
  'dataset_loader',
  *(f'protocol.{name}' for name in _PROTOCOL),
  'lpips.weights',
  'refined_cameras',
)
_ON_A_SCENE = ('factor', 'num_images', 'image_sizes', 'masked_images', 'per_image.name')
_OF_A_METHOD = ('method_hash', 'step', 'num_params', 'mlp_dtype')
_OF_A_SEED = ('config_hash',)  # Within a method.


WAYS = {  # Of reducing pictures.
  pyramid.BY_DATASET: "the dataset's own",
  pyramid.BY_AREA_FILTER: 'made here by an area filter',
  pyramid.NOT_REDUCED: 'none, full size',
}


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
    refined = results.REFINED in self.found['protocol']['departures']
    value: Any = {**self._older(), **self.found, 'refined_cameras': refined}
    for part in name.split('.'):
      value = [row[part] for row in value] if isinstance(value, list) else value[part]
    return value

  def _older(self) -> dict[str, Any]:
    """Returns the fields that older files lack."""
    # With the default seed, the hash has always been that of the method.
    hashed = self.found['config_hash']
    return {'method_hash': hashed, 'seed': configs.Config.seed, 'reduction': None, 'scales': []}


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
      'refined_cameras': False,
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


def _values(runs: Sequence[Run], metric: str) -> dict[str, float | None]:
  """Returns a metric of one seed's runs by scene, or by scale as the mean over scenes."""
  if not runs[0].field('scales'):
    return {run.scene: run.found['mean'][metric] for run in runs}
  by_run = [
    {results.scale_name(scale['reduction']): scale['mean'][metric] for scale in run.found['scales']}
    for run in runs
  ]
  return {column: mean([values[column] for values in by_run]) for column in by_run[0]}


def _our_row(method: str, runs: Sequence[Run]) -> Row:
  by_seed: dict[int, list[Run]] = {}
  for run in runs:
    by_seed.setdefault(run.field('seed'), []).append(run)
  seeds = {
    seed: {metric: _values(found, metric) for metric in HIGHER_IS_BETTER}
    for seed, found in by_seed.items()
  }
  values = {}
  for metric in HIGHER_IS_BETTER:
    of_seeds = [found[metric] for found in seeds.values()]
    columns = dict.fromkeys(column for found in of_seeds for column in found)
    values[metric] = {c: mean([f[c] for f in of_seeds if c in f]) for c in columns}
  source = ', '.join(run.path for run in runs)
  return Row(method, values, {}, True, source, seeds, _reductions(runs))


def _reductions(runs: Sequence[Run]) -> str:
  """Returns how the pictures of the runs were reduced, by scene if there are several ways."""
  scenes: dict[str, list[str]] = {}
  for run in runs:
    scenes.setdefault(run.field('reduction') or 'not recorded', []).append(run.scene)
  if len(scenes) == 1:
    return next(iter(scenes))
  return ', '.join(f'{way} ({" ".join(dict.fromkeys(of))})' for way, of in scenes.items())


def make(
  methods: Mapping[str, Sequence[Run]],
  benchmark: benchmarks.Benchmark | None = None,
  published: Sequence[str] | None = None,
  metrics: Sequence[str] | None = None,
) -> Table:
  """Makes a table.

  Args:
    methods: our methods' runs, by name. Runs of a scene with several seeds become their mean.
    benchmark: the dataset of the runs; None for captures without published numbers.
    published: the published methods to show, starting with the one to compare with; None for all.
    metrics: the metrics to show; None for PSNR, SSIM and LPIPS if measured.

  Raises:
    TablesError: results are not comparable, or a method, metric or scene is unknown.
  """
  runs = [run for found in methods.values() for run in found]
  check(methods)
  rows = [_our_row(method, found) for method, found in methods.items()]
  scenes, groups, title = list(dict.fromkeys(r.scene for r in runs)), {}, 'Results'
  theirs = _choose(benchmark, published, runs)
  if runs[0].field('scales'):
    _check_scales(methods)
    title, scenes = f'Multi-scale, {", ".join(scenes)}', list(rows[0].values['psnr'])
  elif benchmark is not None:
    scenes, groups, title = list(benchmark.scenes), dict(benchmark.groups), benchmark.title
  groups = {**groups, 'mean': scenes}
  others = [Row(p.method, p.values, p.mean, False, p.source, {}) for p in theirs]
  against = others[0] if others else None
  metrics = _choose_metrics(metrics, rows)
  table = Table(title, metrics, tuple(scenes), groups, (*others, *rows), against)
  return dataclasses.replace(table, notes=tuple(_notes(table, runs)))


def _choose_metrics(names: Sequence[str] | None, rows: Sequence[Row]) -> tuple[str, ...]:
  for name in names or ():
    if name not in HIGHER_IS_BETTER:
      raise TablesError(f'Unknown metric {name!r}; choose from {", ".join(HIGHER_IS_BETTER)}.')
  if names:
    return tuple(dict.fromkeys(names))
  return tuple(m for m in _SHOWN if any(v is not None for r in rows for v in r.values[m].values()))


def _check_scales(methods: Mapping[str, Sequence[Run]]) -> None:
  """Checks that multi-scale means are over the same scenes."""
  first = None
  for runs in methods.values():
    for seed in {run.field('seed') for run in runs}:
      found = [run for run in runs if run.field('seed') == seed]
      first = first or found
      if {run.scene for run in found} != {run.scene for run in first}:
        both = ' and '.join(', '.join(sorted(run.scene for run in x)) for x in (first, found))
        raise TablesError(
          f'{found[0].path}: multi-scale means need the same scenes of every method and seed, got '
          f'{both}.'
        )


def _notes(table: Table, runs: Sequence[Run]) -> list[str]:
  """Returns what a reader must know of the numbers."""
  notes, own = [], table.own
  absent = {s for row in own for s in table.scenes if row.values['psnr'].get(s) is None}
  if missing := [scene for scene in table.scenes if scene in absent]:
    notes.append(f'Means need all scenes; not all methods have {", ".join(missing)}.')
  counts = {row.method: len(row.seeds) for row in own}
  if max(counts.values()) > 1:
    same = len(set(counts.values())) == 1
    seeds = max(counts.values()) if same else ', '.join(f'{n} ({m})' for m, n in counts.items())
    notes.append(f'Mean ± standard deviation over {seeds} seeds.')
  return [*notes, _tell_reductions(table, runs)]


def _tell_reductions(table: Table, runs: Sequence[Run]) -> str:
  ways = {row.method: row.reduction for row in table.own}
  if table.against and any(run.found['factor'] > 1 for run in runs):
    ways['published'] = pyramid.BY_DATASET
  found = set(ways.values())
  if len(found) == 1 and '(' not in (way := next(iter(found))):
    return f'Reduced pictures: {WAYS.get(way, way)}.'
  listed = '; '.join(f'{method}: {way}' for method, way in ways.items())
  return (
    f'Not all pictures are known to have been reduced in the same way ({listed}). That alone has '
    'changed PSNR by 0.3 to 0.45 dB: such differences need not be of the methods.'
  )


def _choose(
  benchmark: benchmarks.Benchmark | None, names: Sequence[str] | None, runs: Sequence[Run]
) -> list[benchmarks.Published]:
  """Returns the published methods to show, after checking that the runs can stand beside them."""
  if runs[0].field('scales'):
    if names:
      raise TablesError(
        '--published: no published numbers are of this multi-scale evaluation. Leave it out.'
      )
    return []
  if benchmark is None:
    if names:
      known = '; '.join(f'{b.name}: {", ".join(b.scenes)}' for b in benchmarks.load_all().values())
      raise TablesError(
        f'--published: there are no published numbers of {", ".join({r.scene: 0 for r in runs})} '
        f'with the loader {runs[0].field("dataset_loader")!r}. Known scenes, by the names of their '
        f'folders: {known}.'
      )
    return []
  for run in runs:
    if run.scene not in benchmark.scenes:
      raise TablesError(
        f'{run.path}: {run.scene!r} is not a scene of {benchmark.name!r}; its '
        f'scenes are {", ".join(benchmark.scenes)}.'
      )
  known = {p.method: p for p in benchmark.published}
  for name in names or ():
    if name not in known:
      raise TablesError(
        f'Unknown published method {name!r} on {benchmark.name}; choose from {", ".join(known)}.'
      )
  theirs = list(known.values()) if names is None else [known[name] for name in names]
  if theirs:
    check_published(runs, benchmark)
  return theirs


def read(paths: Sequence[str]) -> list[Run]:
  """Reads results.json files.

  Raises:
    ResultsError: a file is missing or invalid, or has another schema version.
  """
  return [Run(path, results.read(path)) for path in paths]
