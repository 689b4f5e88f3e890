"""The one place that knows of devices and processes.

One global program runs over all devices of all hosts: rays are sharded over a 1-D mesh,
parameters are replicated, and the compiler inserts the one all-reduce that the gradient needs.
"""

import glob
import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = 'rays'

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
      os.environ[_COORDINATOR], int(os.environ[_COUNT]), int(os.environ[_INDEX])
    )
  elif _COORDINATOR in given:
    raise ValueError(f'{_COORDINATOR} is set, so {_COUNT} and {_INDEX} must be set too.')
  elif _on_tpu_vm() or _under_launcher():
    jax.distributed.initialize()


def is_main() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def make_mesh(devices=None) -> Mesh:
  """A 1-D mesh over all devices of all hosts (or over those given)."""
  return Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))


def check_divisible(name: str, count: int, mesh: Mesh) -> None:
  """Raises ValueError unless the mesh's devices divide `count` rays."""
  if count % mesh.size:
    nearest = max(mesh.size, round(count / mesh.size) * mesh.size)
    raise ValueError(
      f'{name} must be a multiple of the device count, got {count} on {mesh.size}; '
      f'nearest: {nearest}.'
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole."""
  return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
  """The leading axis is split over the devices."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


def replicate(tree, mesh: Mesh):
  """Puts the same host values (or key arrays) on every device of every process."""
  where = replicated(mesh)
  if jax.process_count() == 1:
    return jax.device_put(tree, where)
  put = lambda x: jax.make_array_from_callback(np.shape(x), where, lambda idx: np.asarray(x)[idx])  # noqa: E731
  return jax.tree.map(put, tree)


def shard_rays(tree, mesh: Mesh):
  """Marks arrays inside a jit-compiled function as split over the devices by their first axis."""
  return jax.lax.with_sharding_constraint(tree, sharded(mesh))


def to_host(array: jax.Array) -> np.ndarray:
  """A replicated array's value, as numpy."""
  return np.asarray(array.addressable_data(0))


def from_main(value: int) -> int:
  """The main process's value, on every process: for what each would find at its own time."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
