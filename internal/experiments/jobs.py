"""Runs jobs, each a sequence of commands, one job at a time per device."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..system import bucket, signals

_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
  """Commands that run in order until one fails."""

  name: str
  commands: tuple[tuple[str, ...], ...]
  folder: str  # Working folder, locked: one job at a time, across programs. log.txt has the output.


@dataclasses.dataclass
class Running:
  """A job in progress."""

  job: Job
  stage: int  # Index of the running command.
  process: subprocess.Popen
  lock: int  # File descriptor.


def visible_gpus() -> list[str]:
  """Returns the visible NVIDIA GPUs, as CUDA_VISIBLE_DEVICES would name them.

  Does not ask JAX, which would allocate the GPUs' memory.
  """
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  if visible is not None:
    return [name.strip() for name in visible.split(',') if name.strip()]
  try:
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return []
  lines = [line for line in listed.stdout.splitlines() if line.startswith('GPU ')]
  return [str(i) for i in range(len(lines))]


def _lock(folder: str) -> int | None:
  """Locks a folder; returns None if it is already locked.

  The commands inherit the file descriptor, so the lock lasts until the last of them exits, even if
  the program that started them is killed.
  """
  if bucket.is_address(folder):
    raise bucket.BucketError(
      f'{folder} must be a folder of this machine; train.py, eval.py and render.py use buckets.'
    )
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
      start_new_session=True,  # Ctrl-C reaches only this process, which then stops the jobs.
    )
  return Running(job, stage, process, lock)


def last_line(folder: str) -> str:
  """Returns the last non-empty line of a job's log, '' if there is none."""
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
  """Runs all jobs, one per slot at a time. A failed job does not stop the others.

  Args:
    jobs: in the order to start them.
    slots: for each slot, its environment variables, e.g. {'CUDA_VISIBLE_DEVICES': '3'}.
    watch: called with the running jobs several times a second.

  Returns:
    The reason for each failure, by job name.

  Raises:
    signals.Stopped: SIGTERM or SIGINT arrived. Running jobs were sent SIGTERM and have exited.
  """
  waiting, failed = list(jobs), {}
  running: dict[int, Running] = {}
  with signals.postponed() as request, _terminating(running):
    while (waiting or running) and not request.signum:
      for slot, env in enumerate(slots):
        if slot in running:
          _advance(slot, env, running, failed)
        if waiting and slot not in running:
          _begin(waiting.pop(0), slot, env, running, failed)
      watch(list(running.values()))
      time.sleep(_POLL_SECONDS)
  if request.signum:
    raise signals.Stopped(request.signum)
  return failed


def _begin(job, slot, env, running, failed) -> None:
  lock = _lock(job.folder)
  if lock is None:
    failed[job.name] = f'{job.folder} is in use by another program'
  else:
    running[slot] = _start(job, 0, lock, env)


def _advance(slot, env, running, failed) -> None:
  """Starts the job's next command if one has exited; frees the slot if the job is over."""
  current = running[slot]
  code = current.process.poll()
  if code is None:
    return
  job, following = current.job, current.stage + 1
  if code == 0 and following < len(job.commands):
    running[slot] = _start(job, following, current.lock, env)
    return
  if code:
    failed[job.name] = f'exit code {code}: {last_line(job.folder)}'
  os.close(current.lock)
  del running[slot]


@contextlib.contextmanager
def _terminating(running: Mapping[int, Running]) -> Iterator[None]:
  """Terminates the running jobs on exit, for whatever reason, and waits for them."""
  try:
    yield
  finally:
    for current in running.values():
      current.process.terminate()  # train.py finishes its step and saves a checkpoint.
    for current in running.values():
      current.process.wait()
      os.close(current.lock)
