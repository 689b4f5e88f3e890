"""Runs of train.py and eval.py: whether they are finished, starting the rest, their progress."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence

from .. import configs, plugins
from ..errors import UserError
from ..evaluation import lpips, results
from ..system import files, installation, progress, warnings
from ..training import method, runlog
from . import jobs

_LINE_SECONDS = 60.0  # Between progress lines in a log file.
_CHANGES = 4  # At most so many settings are named in an error.


class RunError(UserError):
  """Runs that cannot be started, or have failed."""


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run with its evaluation."""

  name: str  # Of its folder.
  of: str  # The scene or row that it belongs to, which several runs share if there are seeds.
  folder: str
  flags: tuple[str, ...]  # --gin_configs and then --gin_bindings, for train.py.
  settings: configs.Settings
  fixed: tuple[str, ...] = ('factor',)  # Config fields outside of the hash that must match.

  @property
  def results(self) -> str:
    return os.path.join(self.folder, 'eval', 'results.json')


def refuse_taken(bindings: Sequence[str], taken: Mapping[str, str]) -> None:
  """Checks that bindings leave alone what flags set; `taken` is the flag of each such setting.

  Raises:
    RunError: one does not. It would have no effect, or one value for all runs.
  """
  for text in bindings:
    for name, flag in taken.items():
      if re.search(rf'^\s*{re.escape(name)}\b', text, re.MULTILINE):
        raise RunError(f'{text!r}: use {flag} instead; it is the same for all runs.')


def make_runs(
  name: str,
  out: str,
  paths: Sequence[str],
  bindings: Sequence[str],
  seeds: int = 1,
  **fields,
) -> list[Run]:
  """Makes the runs of these gin files and bindings, one for each seed.

  The seeds are Config.seed and the numbers that follow it. The first run is in the folder
  `out`/NAME, as it would be without further seeds; the others are in `out`/NAME_seed_SEED.

  Args:
    name: of the folder, and what the runs belong to.
    out: gets the folders.
    paths: gin files.
    bindings: settings that override them.
    seeds: number of runs.
    **fields: further fields of `Run`.

  Raises:
    RunError: there are no seeds.
    ConfigError: the settings are invalid.
  """
  if seeds < 1:
    raise RunError(f'--seeds: must be 1 or more, got {seeds}.')
  first = configs.load_config(paths, bindings).config.seed
  made = []
  for seed in range(first, first + seeds):
    full_name = name if seed == first else f'{name}_seed_{seed}'
    folder = os.path.join(out, full_name)
    here = [*bindings, f'Config.checkpoint_dir = {folder!r}']
    here += [] if seed == first else [f'Config.seed = {seed}']
    flags = ('--gin_configs', *paths, '--gin_bindings', *here)
    settings = configs.load_config(paths, here)
    made.append(Run(full_name, name, folder, flags, settings, **fields))
  return made


def by_seed(of_each: Sequence[Sequence[Run]]) -> list[Run]:
  """Returns the runs of several scenes or rows, the first seed of all before the others."""
  return [run for same_seed in zip(*of_each, strict=True) for run in same_seed]


def choose(all_runs: Sequence[Run], only: Sequence[str] | None) -> list[Run]:
  """Returns the runs that --only names, or all for None.

  Raises:
    RunError: an unknown name.
  """
  known = {run.name: run for run in all_runs}
  for name in only or ():
    if name not in known:
      raise RunError(f'--only: there is no run {name!r}; choose from {", ".join(known)}.')
  return list(all_runs) if only is None else [known[name] for name in only]


def is_finished(run: Run) -> bool:
  """Whether results.json is of the last step, these settings and every available metric.

  Raises:
    RunError: the folder holds a run with other settings.
  """
  wanted = results.config_hash(run.settings)
  stored = os.path.join(run.folder, 'config.gin')
  if files.exists(stored):
    existing = configs.load_config([stored])
    both = existing.config, run.settings.config
    changes = {
      f'Config.{name}': f'from {old!r} to {new!r}'
      for name in run.fixed
      if (old := getattr(both[0], name)) != (new := getattr(both[1], name))
    }
    if changes := {**changes, **method.changes(existing, run.settings)}:
      told = warnings.first([f'{name} ({change})' for name, change in changes.items()], _CHANGES)
      raise RunError(
        f'{run.folder} holds a run with other settings: {told}. Repeat the command with the '
        'settings of the run, remove the folder, or choose another --out.'
      )
  try:
    found = results.read(run.results)
  except results.ResultsError:
    return False
  try:
    lpips.weights_path()
    lacks_lpips = found['lpips']['absent'] is not None
  except lpips.LpipsUnavailableError:
    lacks_lpips = False
  same = found['config_hash'] == wanted and found['step'] == run.settings.config.last_step
  # The hash covers how images were split.
  split = found['protocol']['test_split']
  protocols = found['protocol'], results.protocol(run.settings.config, split)
  for protocol in protocols:
    protocol.pop('description')  # Its wording may change.
  return same and protocols[0] == protocols[1] and not lacks_lpips


def make_job(run: Run) -> jobs.Job:
  """Returns the job that trains, resuming if it can, and evaluates with the same bindings."""
  bindings = run.flags[run.flags.index('--gin_bindings') :]
  more = plugins.flags()
  train = (*installation.command('train'), *run.flags, *more)
  evaluate = (*installation.command('eval'), '--checkpoint_dir', run.folder, *bindings, *more)
  return jobs.Job(run.name, (train, evaluate), run.folder)


def run_all(
  unfinished: Sequence[Run],
  total: int,
  gpus: str | None = None,
  on_end: Callable[[], None] = lambda: None,
) -> dict[str, str]:
  """Trains and evaluates runs, one per GPU at a time, or one at a time without GPUs.

  Args:
    unfinished: the runs to start, or to resume.
    total: number of runs including the finished ones.
    gpus: comma-separated GPUs; None uses all visible ones. One that is named twice has two runs at
      a time.
    on_end: called after a run has ended.

  Returns:
    The reason for each failure, by run name.

  Raises:
    RunError: `gpus` has an empty name.
  """
  names = jobs.visible_gpus() if gpus is None else [name.strip() for name in gpus.split(',')]
  if '' in names:  # Without a name, a run would use the CPU.
    raise RunError(f'--gpus {gpus!r}: separate the GPUs by commas, such as 0,2.')
  # Without this, the first run on a GPU takes most of its memory.
  shared = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} if len(set(names)) < len(names) else {}
  slots = [{'CUDA_VISIBLE_DEVICES': name, **shared} for name in names] or [{}]
  done = total - len(unfinished)
  devices = f'GPUs {", ".join(names)}' if names else 'the CPU'
  progress.say(f'{done} of {total} runs are finished; running the others on {devices}.')
  with Monitor(unfinished, done, total, on_end) as monitor:
    failed = jobs.run([make_job(run) for run in unfinished], slots, monitor)
  for name, reason in failed.items():
    print(f'{name} failed: {reason}')
  return failed


def raise_failed(failed: dict[str, str], total: int) -> None:
  """Raises RunError if any run failed."""
  if failed:
    raise RunError(
      f'{len(failed)} of {total} runs failed: {", ".join(failed)} (see log.txt in the folder of '
      'each). Run the same command again to resume.'
    )


class Monitor:
  """Shows the progress of running jobs: a live table on a terminal, else lines.

  Lines are printed when a run's stage changes, and once a minute. Call it with the running jobs.

  Args:
    runs: the runs that have been started or will be.
    done: number of runs that were finished before.
    total: number of all runs.
    on_end: called after a run has ended.
  """

  def __init__(self, runs: Sequence[Run], done: int, total: int, on_end=lambda: None):
    self._last_steps = {run.name: run.settings.config.last_step for run in runs}
    self._done, self._total, self._on_end = done, total, on_end
    self._stages, self._shown_at, self._ended = {}, 0.0, set()

  def __enter__(self) -> Monitor:
    self._table = progress.Table() if progress.is_live() else None
    if self._table:
      self._table.start()
    return self

  def __exit__(self, *_) -> None:
    if self._table:
      self._table.stop()

  def __call__(self, running: Sequence[jobs.Running]) -> None:
    stages = {r.job.name: r.stage for r in running}
    if ended := set(self._stages) - set(stages):
      self._ended |= ended
      self._on_end()
    changed, self._stages = stages != self._stages, stages
    interval = 1 if self._table else _LINE_SECONDS
    if not changed and time.monotonic() - self._shown_at < interval:
      return
    self._shown_at = time.monotonic()
    count = f'{self._done + len(self._ended)}/{self._total}'
    rows = [(r.job.name, *_progress(r, self._last_steps[r.job.name])) for r in running]
    if self._table:
      self._table.show(rows, f'{count} runs have ended')
    else:
      parts = [f'{name}: {", ".join(cells)}' for name, *cells in rows]
      progress.say(f'[{count}] {" | ".join(parts) or "all runs have ended"}')


def _progress(running: jobs.Running, last_step: int) -> tuple[str, ...]:
  """Returns a run's progress as table cells."""
  if running.stage > 0:
    return ('evaluating',)
  rows = runlog.read_metrics(os.path.join(running.job.folder, 'metrics.jsonl'))
  rows = [row for row in rows if row.get('rays_per_sec') and row['step'] > 0]
  if not rows:
    return ('starting',)
  step, seconds = rows[-1]['step'], rows[-1].get('train_seconds') or 0
  left = seconds / step * (last_step - step)
  return (
    f'step {step:,} of {last_step:,} ({step / last_step:.0%})',
    f'psnr {rows[-1].get("psnr") or float("nan"):.2f}',
    f'{progress.duration(left)} left',
  )
