"""Jobs of several commands each, one at a time on each device."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..system import signals

_POLL = 0.2  # Seconds.


@dataclasses.dataclass(frozen=True)
class Job:
  """Commands to run one after the other, while each succeeds."""

  name: str
  commands: tuple[tuple[str, ...], ...]
  folder: str  # Gets log.txt; no two jobs work in one at a time, of whatever program.


@dataclasses.dataclass
class Running:
  """A job at work."""

  job: Job
  stage: int  # Of its commands.
  process: subprocess.Popen
  lock: int  # A file's descriptor.


def visible_gpus() -> list[str]:
  """The NVIDIA GPUs that a program started here would see, as CUDA_VISIBLE_DEVICES names them.

  JAX is not asked: it would take their memory.
  """
  told = os.environ.get('CUDA_VISIBLE_DEVICES')
  if told is not None:
    return [name.strip() for name in told.split(',') if name.strip()]
  try:
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return []
  lines = [line for line in listed.stdout.splitlines() if line.startswith('GPU ')]
  return [str(i) for i in range(len(lines))]


def _lock(folder: str) -> int | None:
  """Takes a folder's lock; None if it is taken.

  The commands inherit it, so that it is held as long as one of them lives, whatever becomes of the
  program that started it.
  """
  os.makedirs(folder, exist_ok=True)
  lock = os.open(os.path.join(folder, '.lock'), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(lock)
    return None
  return lock


def _start(job: Job, stage: int, lock: int, env: Mapping[str, str]) -> Running:
  with open(os.path.join(job.folder, 'log.txt'), 'ab') as log:
    process = subprocess.Popen(
      job.commands[stage],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      env={**os.environ, **env},
      pass_fds=(lock,),
      start_new_session=True,  # A terminal's Ctrl-C is ours to pass on.
    )
  return Running(job, stage, process, lock)


def last_line(folder: str) -> str:
  """The last line that a job's commands said."""
  with contextlib.suppress(OSError), open(os.path.join(folder, 'log.txt'), 'rb') as f:
    f.seek(max(0, os.path.getsize(f.name) - 4096))
    lines = f.read().decode(errors='replace').split('\n')
    return next((line.strip() for line in reversed(lines) if line.strip()), '')
  return ''


def run(
  jobs: Sequence[Job],
  slots: Sequence[Mapping[str, str]],
  watch: Callable[[Sequence[Running]], None] = lambda running: None,
) -> dict[str, str]:
  """Runs all jobs, as many at once as there are slots; one that fails does not stop the others.

  Args:
    jobs: in the order to start them.
    slots: variables of the environment for each, e.g. {'CUDA_VISIBLE_DEVICES': '3'}.
    watch: called several times a second with what is at work.

  Returns:
    Why jobs failed, by name.

  Raises:
    signals.Stopped: SIGTERM or SIGINT came; what was at work was told to end too, and has.
  """
  waiting, failed = list(jobs), {}
  at_work: dict[int, Running] = {}
  with signals.postponed() as request, _ended(at_work):
    while (waiting or at_work) and not request.signum:
      for slot, env in enumerate(slots):
        if slot in at_work:
          _go_on(slot, env, at_work, failed)
        if waiting and slot not in at_work:
          _begin(waiting.pop(0), slot, env, at_work, failed)
      watch(list(at_work.values()))
      time.sleep(_POLL)
  if request.signum:
    raise signals.Stopped(request.signum)
  return failed


def _begin(job, slot, env, at_work, failed) -> None:
  lock = _lock(job.folder)
  if lock is None:
    failed[job.name] = f'another program is at work in {job.folder}'
  else:
    at_work[slot] = _start(job, 0, lock, env)


def _go_on(slot, env, at_work, failed) -> None:
  """Starts a job's next command if one is done, and lets go of a job that is done or failed."""
  running = at_work[slot]
  code = running.process.poll()
  if code is None:
    return
  job, following = running.job, running.stage + 1
  if code == 0 and following < len(job.commands):
    at_work[slot] = _start(job, following, running.lock, env)
    return
  if code:
    failed[job.name] = f'exit code {code}: {last_line(job.folder)}'
  os.close(running.lock)
  del at_work[slot]


@contextlib.contextmanager
def _ended(at_work: Mapping[int, Running]) -> Iterator[None]:
  """Afterwards, whatever happened, nothing is at work."""
  try:
    yield
  finally:
    for running in at_work.values():
      running.process.terminate()  # train.py finishes its step and saves it.
    for running in at_work.values():
      running.process.wait()
      os.close(running.lock)
