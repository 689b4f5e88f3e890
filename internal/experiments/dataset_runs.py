"""All scenes of a published dataset: what is to be run, what is finished, how far the rest is."""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Sequence

from .. import configs
from ..evaluation import benchmarks, lpips, metrics, results
from ..system import installation, progress
from ..training import runlog
from . import jobs

_TELL_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Plan:
  """One scene's run."""

  scene: str
  folder: str
  told: tuple[str, ...]  # Flags for train.py.
  settings: configs.Settings

  @property
  def results(self) -> str:
    return os.path.join(self.folder, 'eval', 'results.json')


def make_plans(
  benchmark: benchmarks.Benchmark,
  root: str,
  out: str,
  scenes: Sequence[str] | None = None,
  gin_configs: Sequence[str] = (),
  gin_bindings: Sequence[str] = (),
) -> list[Plan]:
  """The runs of a dataset's scenes.

  Args:
    benchmark: the dataset.
    root: has a folder for each scene.
    out: gets a folder for each scene.
    scenes: only these.
    gin_configs: instead of the dataset's own.
    gin_bindings: on top.

  Raises:
    BenchmarkError: a scene that the dataset does not have.
    ConfigError: settings that cannot be used.
  """
  root, out = os.path.abspath(root), os.path.abspath(out)
  gin = [os.path.abspath(path) for path in gin_configs] or [
    os.path.join(installation.DATA, benchmark.config)
  ]
  plans = []
  for scene in scenes or benchmark.scenes:
    if scene not in benchmark.scenes:
      raise benchmarks.BenchmarkError(
        f'{benchmark.name} has no scene {scene!r}: there are {", ".join(benchmark.scenes)}.'
      )
    folder = os.path.join(out, scene)
    here = benchmarks.scene_bindings(benchmark, root, scene)
    bindings = [*here, f'Config.checkpoint_dir = {folder!r}', *gin_bindings]
    told = ('--gin_configs', *gin, '--gin_bindings', *bindings)
    plans.append(Plan(scene, folder, told, configs.load_config(gin, bindings)))
  return plans


def check_folder(benchmark: benchmarks.Benchmark, plans: Sequence[Plan]) -> None:
  """Holds all scenes to what is published of them.

  Raises:
    BenchmarkError: some are not so, which all are told.
  """
  wrong = 0
  for plan in plans:
    try:
      benchmarks.check_scene(benchmark, plan.scene, plan.settings.config)
      print(f'{plan.scene}: as published, at Config.factor = {plan.settings.config.factor}')
    except (ValueError, OSError) as e:
      wrong += 1
      print(f'{plan.scene}: {e}')
  if wrong:
    raise benchmarks.BenchmarkError(
      f'{wrong} of {len(plans)} scenes are not as published (see above). scripts/download.py '
      f'{benchmark.name} DIR fetches them; --unchecked takes them as they are.'
    )


def is_finished(plan: Plan) -> bool:
  """Whether the run's results are of its last step, its settings, and all that can be measured.

  Raises:
    BenchmarkError: the folder is of a run with other settings.
  """
  wanted = metrics.config_hash(plan.settings)
  config = os.path.join(plan.folder, 'config.gin')
  if os.path.exists(config):
    there = configs.load_config([config])
    same_size = there.config.factor == plan.settings.config.factor
    if not same_size or metrics.config_hash(there) != wanted:
      raise benchmarks.BenchmarkError(
        f'{plan.folder} is of a run with other settings ({config}): choose another --out.'
      )
  try:
    found = results.read(plan.results)
  except results.ResultsError:
    return False
  try:
    lpips.weights_path()
    more = found['lpips']['absent'] is not None
  except lpips.LpipsUnavailableError:
    more = False
  same = found['config_hash'] == wanted and found['step'] == plan.settings.config.last_step
  # How images were split is in the hash.
  split = found['protocol']['test_split']
  protocols = found['protocol'], metrics.protocol(plan.settings.config, split)
  for protocol in protocols:
    protocol.pop('description')  # Which may be put in other words.
  return same and protocols[0] == protocols[1] and not more


def make_job(plan: Plan) -> jobs.Job:
  """Training, which goes on by itself, and evaluation, with the same settings on top."""
  bindings = plan.told[plan.told.index('--gin_bindings') :]
  train = (*installation.command('train'), *plan.told)
  evaluate = (*installation.command('eval'), '--checkpoint_dir', plan.folder, *bindings)
  return jobs.Job(plan.scene, (train, evaluate), plan.folder)


class Watch:
  """Shows how far each running scene is: a table on a terminal, elsewhere now and then a line.

  Lines come when a scene's stage changes and every minute. To be called with what is running.

  Args:
    plans: what is run.
    done: how many scenes were finished before.
    total: how many there are.
  """

  def __init__(self, plans: Sequence[Plan], done: int, total: int):
    self._last_steps = {plan.scene: plan.settings.config.last_step for plan in plans}
    self._done, self._total = done, total
    self._seen, self._told, self._ended = {}, 0.0, set()

  def __enter__(self) -> Watch:
    self._table = progress.Table() if progress.is_live() else None
    if self._table:
      self._table.start()
    return self

  def __exit__(self, *_) -> None:
    if self._table:
      self._table.stop()

  def __call__(self, running: Sequence[jobs.Running]) -> None:
    now = {r.job.name: r.stage for r in running}
    self._ended |= set(self._seen) - set(now)
    changed, self._seen = now != self._seen, now
    if not changed and time.monotonic() - self._told < (1 if self._table else _TELL_SECONDS):
      return
    self._told = time.monotonic()
    count = f'{self._done + len(self._ended)}/{self._total}'
    rows = [(r.job.name, *_progress(r, self._last_steps[r.job.name])) for r in running]
    if self._table:
      self._table.show(rows, f'{count} scenes are finished')
    else:
      parts = [f'{name}: {", ".join(told)}' for name, *told in rows]
      progress.say(f'[{count}] {" | ".join(parts) or "all ended"}')


def _progress(running: jobs.Running, last_step: int) -> tuple[str, ...]:
  """How far a scene is, in a few words each."""
  if running.stage > 0:
    return ('evaluating',)
  rows = runlog.read_metrics(os.path.join(running.job.folder, 'metrics.jsonl'))
  rows = [row for row in rows if 'rays_per_sec' in row]
  if not rows:
    return ('starting',)
  step, seconds = rows[-1]['step'], rows[-1]['train_seconds']
  left = seconds / step * (last_step - step)
  return (
    f'step {step:,} of {last_step:,} ({step / last_step:.0%})',
    f'psnr {rows[-1]["psnr"]:.2f}',
    f'{progress.duration(left)} left',
  )


def slurm_script(plans: Sequence[Plan], options: str, command: Sequence[str]) -> str:
  """A job array's script, of one task a scene.

  Args:
    plans: the scenes' runs, in one folder.
    options: for sbatch, beside its own.
    command: what a task runs, before `--scenes SCENE`.
  """
  out = os.path.dirname(plans[0].folder)
  all_options = [
    '--job-name=mipnerf360',
    f'--array=0-{len(plans) - 1}',
    '--ntasks=1',
    '--gpus=1',
    f'--output={shlex.quote(out)}/slurm_%A_%a.txt',
    '--open-mode=append',
    '--signal=B:TERM@300',  # What is trained is saved before the time is up.
    *shlex.split(options),
  ]
  lines = [
    '#!/bin/bash',
    *(f'#SBATCH {option}' for option in all_options),
    f'scenes=({" ".join(plan.scene for plan in plans)})',
    f'cd {shlex.quote(os.getcwd())} || exit 1',
    '# exec: so that the signal gets through.',
    f'exec {shlex.join(command)} --scenes "${{scenes[$SLURM_ARRAY_TASK_ID]}}"',
  ]
  return '\n'.join(lines) + '\n'
