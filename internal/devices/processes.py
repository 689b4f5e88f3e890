"""Multi-process runs: joining, leaving, broadcasts and reductions."""

from __future__ import annotations

import os
import re

import jax
import numpy as np
from jax._src import cloud_tpu_init
from jax.experimental import multihost_utils

from ..errors import UserError
from ..system import signals

# Errors of Gloo (CPU), NCCL (GPU) and JAX's coordination service after a process has died.
_GONE = re.compile(
  'gloo|nccl|coordination|heartbeat|barrier|socket closed|connection (reset|closed|refused)',
  re.IGNORECASE,
)

# Seconds without a heartbeat after which a process with open connections counts as dead.
HEARTBEAT = 30

_COORDINATOR = 'JAX_COORDINATOR_ADDRESS'
_COUNT = 'JAX_NUM_PROCESSES'
_INDEX = 'JAX_PROCESS_ID'


def _on_tpu_vm() -> bool:
  """Returns what JAX has found on import: TPU chips on the PCI bus, and libtpu.

  The names in /dev do not tell: newer chips have /dev/vfio/*, and other accelerators /dev/accel*.
  """
  return cloud_tpu_init.running_in_cloud_tpu_vm


def _under_launcher() -> bool:
  """Returns whether SLURM or Open MPI started several processes of this program."""
  counts = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
  return any(int(os.environ.get(name) or 1) > 1 for name in counts)


def initialize() -> None:
  """Joins the other processes of a multi-process run; call before using any device.

  The processes are given by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
  detected on TPU pods and under SLURM and Open MPI. A single process does nothing.

  Raises:
    UserError: only some of the three variables are set, or JAX finds TPUs but not their workers.
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
    try:
      jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    except ValueError as e:  # Such as a VM whose metadata lists no workers.
      raise UserError(
        f'The processes of this run were not found: {e} Set {_COORDINATOR} (such as '
        f'localhost:8476), {_COUNT} (1 for a single machine) and {_INDEX} (0 for the first).'
      ) from e
  else:
    return
  signals.listen_again()  # JAX handles SIGTERM as a preemption notice.


def is_joined() -> bool:
  """Returns whether this process has joined others and not left them."""
  return jax.distributed.is_initialized()


def leave() -> None:
  """Leaves the other processes once all have called this, so that none reports a failure."""
  if is_joined():
    jax.distributed.shutdown()


def is_of_another_process(error: Exception) -> bool:
  """Returns whether an error is the consequence of another process that has died."""
  return is_joined() and bool(_GONE.search(str(error)))


def is_main() -> bool:
  """Returns whether this is the main process, which prints and writes files."""
  return jax.process_index() == 0


def from_main(value: int) -> int:
  """Broadcasts the main process's value to all processes."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def largest(value: int) -> int:
  """Returns the maximum of a value over all processes."""
  if jax.process_count() == 1:
    return value
  return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def on_all(fact: bool) -> bool:
  """Returns whether `fact` is true on all processes."""
  return not largest(not fact)
