"""The runs of a published dataset's scenes: their settings, the data check, a SLURM job array."""

from __future__ import annotations

import os
import re
import shlex
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
) -> list[runs.Run]:
  """Makes the runs of a dataset's scenes.

  Args:
    benchmark: the dataset.
    root: has a folder for each scene.
    out: gets a folder for each scene.
    scenes: the scenes to run; None runs all.
    gin_configs: replace the dataset's own gin files.
    gin_bindings: override the settings of the gin files and of the dataset.

  Raises:
    BenchmarkError: the dataset has no such scene.
    ConfigError: the settings are invalid.
  """
  root, out = os.path.abspath(root), os.path.abspath(out)
  paths = [os.path.abspath(path) for path in gin_configs] or [
    os.path.join(installation.DATA, benchmark.config)
  ]
  made = []
  for scene in scenes or benchmark.scenes:
    if scene not in benchmark.scenes:
      raise benchmarks.BenchmarkError(
        f'--scenes: {benchmark.name} has no scene {scene!r}; choose from '
        f'{", ".join(benchmark.scenes)}.'
      )
    folder = os.path.join(out, scene)
    bindings = benchmarks.scene_bindings(benchmark, root, scene)
    bindings = [*bindings, f'Config.checkpoint_dir = {folder!r}', *gin_bindings]
    made.append(runs.make_run(scene, folder, paths, bindings))
  return made


def check_folder(benchmark: benchmarks.Benchmark, scene_runs: Sequence[runs.Run]) -> None:
  """Compares all scenes with the published dataset and prints the result for each.

  Raises:
    BenchmarkError: some scenes differ.
  """
  wrong = 0
  for run in scene_runs:
    try:
      benchmarks.check_scene(benchmark, run.name, run.settings.config)
      print(f'{run.name}: as published, at Config.factor = {run.settings.config.factor}')
    except (ValueError, OSError) as e:
      wrong += 1
      print(f'{run.name}: {e}')
  if wrong:
    raise benchmarks.BenchmarkError(
      f'{wrong} of {len(scene_runs)} scenes differ from the published ones (see above). '
      f'scripts/download.py {benchmark.name} DIR downloads them; --unchecked skips this check.'
    )


def slurm_script(scene_runs: Sequence[runs.Run], options: str, command: Sequence[str]) -> str:
  """Returns the script of a SLURM job array with one task per scene.

  Args:
    scene_runs: the runs, all in one folder.
    options: further options for sbatch, quoted as in a shell.
    command: a task's command, to which `--scenes SCENE` is appended.

  Raises:
    RunError: an option's quotes do not match, or an option or the folder has a control character.
  """
  out = os.path.dirname(scene_runs[0].folder).replace('%', '%%')  # SLURM expands %A.
  directives = [
    ['--job-name=mipnerf360'],
    [f'--array=0-{len(scene_runs) - 1}'],
    ['--ntasks=1'],
    ['--gpus=1'],
    [f'--output={out}/slurm_%A_%a.txt'],
    ['--open-mode=append'],
    ['--signal=B:TERM@300'],  # Leaves time to save a checkpoint before the limit.
    *_split_options(options),
  ]
  lines = [
    '#!/bin/bash',
    *map(_directive, directives),
    f'scenes=({shlex.join(run.name for run in scene_runs)})',
    f'cd {shlex.quote(os.getcwd())} || exit 1',
    '# exec: SLURM sends the signal to this shell, so the program replaces it.',
    f'exec {shlex.join(command)} --scenes "${{scenes[$SLURM_ARRAY_TASK_ID]}}"',
  ]
  return '\n'.join(lines) + '\n'


def _split_options(options: str) -> list[list[str]]:
  """Splits --slurm at its options, each a list of the option and, if separate, its value."""
  try:
    words = shlex.split(options)
  except ValueError as error:
    raise runs.RunError(f'--slurm: {error} in {options!r}.') from None
  split = []
  for word in words:
    if split and not word.startswith('-'):
      split[-1].append(word)
    else:
      split.append([word])
  return split


def _directive(words: Sequence[str]) -> str:
  """Returns an #SBATCH line, quoted; sbatch unquotes it as a shell does, but reads single lines."""
  for word in words:
    if re.search(r'[\x00-\x1f\x7f]', word):
      raise runs.RunError(
        f'A SLURM script cannot have the option {word!r}: it contains a line break or another '
        'control character. Change --slurm, or choose another --out.'
      )
  return ' '.join(['#SBATCH', *map(_quote_option, words)])


def _quote_option(word: str) -> str:
  """Quotes a word as a shell would; of --name=value only the value."""
  name, equals, value = word.partition('=')
  if equals and name == shlex.quote(name):
    return f'{name}={shlex.quote(value)}'
  return shlex.quote(word)
