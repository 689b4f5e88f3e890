"""Processes of several hosts: joining, leaving, and agreeing on a value."""

from __future__ import annotations

import glob
import os
import re

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..errors import UserError
from ..system import signals

# What Gloo (CPU), NCCL (GPU) and JAX's coordination service say of processes that are gone.
_GONE = re.compile(
  'gloo|nccl|coordination|heartbeat|barrier|socket closed|connection (reset|closed|refused)',
  re.IGNORECASE,
)

# Seconds after which a process that says nothing, whose connections stay open, counts as gone.
HEARTBEAT = 30

_COORDINATOR = 'JAX_COORDINATOR_ADDRESS'
_COUNT = 'JAX_NUM_PROCESSES'
_INDEX = 'JAX_PROCESS_ID'


def _on_tpu_vm() -> bool:
  return bool(glob.glob('/dev/accel*')) or 'TPU_WORKER_HOSTNAMES' in os.environ


def _under_launcher() -> bool:
  """Whether SLURM or Open MPI started several processes of this program."""
  counts = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
  return any(int(os.environ.get(name) or 1) > 1 for name in counts)


def initialize() -> None:
  """Joins the other processes, where there are any; call before anything touches a device.

  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say so by hand; TPU pods, SLURM
  and Open MPI are found by themselves; otherwise this is a single process and nothing happens.

  Raises:
    ValueError: only some of the three variables are set.
  """
  if jax.distributed.is_initialized():
    return
  given = [name for name in (_COORDINATOR, _COUNT, _INDEX) if os.environ.get(name)]
  if len(given) == 3:
    jax.distributed.initialize(
      os.environ[_COORDINATOR],
      int(os.environ[_COUNT]),
      int(os.environ[_INDEX]),
      heartbeat_timeout_seconds=HEARTBEAT,
    )
  elif _COORDINATOR in given:
    raise UserError(f'{_COORDINATOR} is set, so {_COUNT} and {_INDEX} must be set too.')
  elif _on_tpu_vm() or _under_launcher():
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
  else:
    return
  signals.listen_again()  # JAX has taken SIGTERM for a preemption notice that it keeps to itself.


def is_joined() -> bool:
  """Whether this process is one of several that have joined and not left."""
  return jax.distributed.is_initialized()


def leave() -> None:
  """Leaves the other processes, all at the same time, so that none takes it for a failure."""
  if is_joined():
    jax.distributed.shutdown()


def is_of_another_process(error: Exception) -> bool:
  """Whether an error is what is seen here of another process that is gone."""
  return is_joined() and bool(_GONE.search(str(error)))


def is_main() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def from_main(value: int) -> int:
  """The main process's value, on every process: for what each would find at its own time."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def largest(value: int) -> int:
  """The largest of the processes' values, on every process."""
  if jax.process_count() == 1:
    return value
  return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def on_all(fact: bool) -> bool:
  """Whether a fact holds on every process."""
  return not largest(not fact)
