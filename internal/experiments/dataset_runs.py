"""The runs of a published dataset's scenes: their settings, and the data check."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..evaluation import benchmarks
from ..system import installation
from . import runs


def make_runs(
  benchmark: benchmarks.Benchmark,
  root: str,
  out: str,
  scenes: Sequence[str] | None = None,
  gin_configs: Sequence[str] = (),
  gin_bindings: Sequence[str] = (),
  seeds: int = 1,
) -> list[runs.Run]:
  """Makes the runs of a dataset's scenes, the first seed of all scenes before the others.

  Args:
    benchmark: the dataset.
    root: has a folder for each scene.
    out: gets a folder for each scene.
    scenes: the scenes to run; None runs all.
    gin_configs: replace the dataset's own gin files.
    gin_bindings: override the settings of the gin files and of the dataset.
    seeds: number of runs of each scene, see `runs.make_runs`.

  Raises:
    BenchmarkError: the dataset has no such scene.
    RunError: there are no seeds, or a binding sets a folder.
    ConfigError: the settings are invalid.
  """
  root, out = os.path.abspath(root), os.path.abspath(out)
  runs.refuse_taken(gin_bindings, {'Config.data_dir': '--root', 'Config.checkpoint_dir': '--out'})
  paths = list(gin_configs) or [os.path.join(installation.DATA, benchmark.config)]
  made = []
  for scene in dict.fromkeys(scenes or benchmark.scenes):
    if scene not in benchmark.scenes:
      raise benchmarks.BenchmarkError(
        f'--scenes: {benchmark.name} has no scene {scene!r}; choose from '
        f'{", ".join(benchmark.scenes)}.'
      )
    bindings = [*benchmarks.scene_bindings(benchmark, root, scene), *gin_bindings]
    made.append(runs.make_runs(scene, out, paths, bindings, seeds))
  return runs.by_seed(made)


def check_folder(benchmark: benchmarks.Benchmark, scene_runs: Sequence[runs.Run]) -> None:
  """Compares all scenes with the published dataset and prints the result for each.

  Raises:
    BenchmarkError: some scenes differ.
  """
  wrong, once = 0, {run.of: run for run in reversed(scene_runs)}
  for scene, run in reversed(once.items()):
    try:
      benchmarks.check_scene(benchmark, scene, run.settings.config)
      print(f'{scene}: as published, at Config.factor = {run.settings.config.factor}')
    except (ValueError, OSError) as e:
      wrong += 1
      print(f'{scene}: {e}')
  if wrong:
    raise benchmarks.BenchmarkError(
      f'{wrong} of {len(once)} scenes differ from the published ones (see above). '
      f'scripts/download.py {benchmark.name} DIR downloads them; --unchecked skips this check.'
    )
