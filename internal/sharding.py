"""The one place that knows of devices, their memory, and processes.

One global program runs over all devices of all hosts: rays are sharded over a 1-D mesh, and each
device runs the model on its own rays. Parameters and the optimizer's state are replicated, but for
large arrays, of which each device keeps and updates some rows and gathers the others for a step
(arXiv:1910.02054, section 5).
"""

import glob
import os
import re
import sys
from collections.abc import Callable, Sequence

import jax
import jax.flatten_util
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from internal import signals

AXIS = 'rays'
WHOLE, SPLIT = PartitionSpec(), PartitionSpec(AXIS)  # What each device has of an array.

_LARGE = 2**23  # Bytes of an array that goes by itself, as tables of hash grids do.
_SHARE = 0.9  # Of a device's free memory: what is free need not be in one piece.

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
    raise ValueError(f'{_COORDINATOR} is set, so {_COUNT} and {_INDEX} must be set too.')
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
  return NamedSharding(mesh, WHOLE)


def sharded(mesh: Mesh) -> NamedSharding:
  """The leading axis is split over the devices."""
  return NamedSharding(mesh, SPLIT)


def replicate(tree, mesh: Mesh):
  """Puts the same host values (or key arrays) on every device of every process."""
  return _put(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def _put(tree, where):
  """Host values, which all processes have, where a tree of shardings says."""
  if jax.process_count() == 1:
    return jax.device_put(tree, where)
  put = lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda idx: np.asarray(x)[idx])  # noqa: E731
  return jax.tree.map(put, tree, where)


def _is_large(x) -> bool:
  return x.size * x.dtype.itemsize >= _LARGE


def _spec(x, devices: int) -> PartitionSpec:
  """What each of so many devices keeps of an array: some rows of a large one, if they divide it."""
  return SPLIT if devices > 1 and _is_large(x) and x.shape[0] % devices == 0 else WHOLE


def specs(tree, mesh: Mesh):
  """For each array of a training state, or of gradients, what a device has of it."""
  return jax.tree.map(lambda x: _spec(x, mesh.size), tree)


def placement(tree, mesh: Mesh):
  """`specs` as shardings."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh))


def place(tree, mesh: Mesh):
  """Puts a training state, the same on every host, where it lives between steps."""
  return _put(tree, placement(tree, mesh))


def whole(tree, mesh: Mesh):
  """All of each array on every device, of those that were placed; inside of jit and outside.

  Outside, where arrays have to be gathered, all processes call it together.
  """
  where = replicated(mesh)

  def one(x):
    if getattr(x, 'sharding', None) == where:
      return x  # A constraint outside of jit would copy it.
    return jax.lax.with_sharding_constraint(x, where)

  return jax.tree.map(one, tree)


def shard_rays(tree, mesh: Mesh):
  """Marks arrays inside a jit-compiled function as split over the devices by their first axis."""
  return jax.lax.with_sharding_constraint(tree, sharded(mesh))


def per_device(fn: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
  """`fn`, run by each device by itself on the parts (WHOLE or SPLIT) of the arguments that it has.

  Inside, arrays have the device's own sizes and only named collectives communicate: a gradient
  taken there is of the device's own loss, and a kernel that XLA cannot partition need not be.
  """
  # Checked, the gradient of whole parameters would be summed over devices behind our back, leaf
  # by leaf, and kernels would have to declare how their results vary.
  return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def mean_over_devices(tree):
  """Inside `per_device`: of the mean of each float32 array over all devices, what a device keeps.

  One all-reduce has the small arrays joined. Large ones, which joining would copy there and back,
  go by themselves, each device's rows to it alone: XLA starts each as soon as it is there, while
  others are still computed.
  """
  devices = jax.lax.axis_size(AXIS)
  leaves, structure = jax.tree.flatten(tree)
  joined, split = jax.flatten_util.ravel_pytree([x for x in leaves if not _is_large(x)])
  small = iter(split(jax.lax.pmean(joined, AXIS)))

  def mean(x):
    if not _is_large(x):
      return next(small)
    if _spec(x, devices) == WHOLE:
      return jax.lax.pmean(x, AXIS)
    return jax.lax.psum_scatter(x, AXIS, tiled=True) / devices

  return structure.unflatten(map(mean, leaves))


def to_host(array: jax.Array) -> np.ndarray:
  """An array's value, as numpy; of one whose rows are split, all processes ask together."""
  if not array.is_fully_replicated:
    array = whole(array, array.sharding.mesh)
  return np.asarray(array.addressable_data(0))


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


def free_memory(mesh: Mesh) -> int | None:
  """Bytes that this process's fullest device still has; None where devices do not say (CPU)."""
  stats = [device.memory_stats() or {} for device in mesh.local_devices]
  if not all('bytes_limit' in s and 'bytes_in_use' in s for s in stats):
    return None
  return min(s['bytes_limit'] - s['bytes_in_use'] for s in stats)


def _needed_memory(compiled: jax.stages.Compiled) -> int | None:
  """Bytes that a program takes on each device beside its arguments; None where it does not say."""
  sizes = compiled.memory_analysis()
  if sizes is None:
    return None
  results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes  # Donated ones take no more.
  return sizes.temp_size_in_bytes + results + sizes.generated_code_size_in_bytes


def compiler_options() -> dict[str, bool]:
  """What XLA is told on GPUs: to call cuBLASLt, which ends products with biases and ReLUs.

  Its choice would be Triton's kernels here and there, with passes over memory after them.
  """
  return {'xla_gpu_enable_triton_gemm': False} if jax.default_backend() == 'gpu' else {}


def _compile(function: Callable, args) -> tuple[jax.stages.Compiled | None, Exception | None]:
  """The compiled program, or the error which says that it needs more memory than there is."""
  try:
    return function.lower(*args).compile(compiler_options()), None
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return None, error


class FirstFit:
  """A function compiled in the first of several variants that fits in the devices' memory.

  The choice falls on the first call, when everything that lives beside the program is already on
  the devices. A variant fits if what it takes beside its arguments is at most 90% of the memory
  that is free on the fullest device; all processes take the same variant. Where devices say
  nothing of their memory (CPU) the first is taken.

  Attributes:
    choice: the variant in use; None before the first call.
    needed, free: bytes that it takes on a device, and that were free; None where not known.
  """

  def __init__(
    self, variant: Callable[[int], Callable], choices: Sequence[int], free: Callable[[], int | None]
  ):
    """Prepares the choice.

    Args:
      variant: gives the jit-compiled function of a choice.
      choices: from the one that takes most memory to the one that takes least.
      free: tells how many bytes are free, or None.
    """
    self.variant, self.choices, self._free = variant, tuple(choices), free
    self.choice = self.needed = self.free = None
    self._programs = {}

  def __call__(self, *args):
    return self.fit(*args)(*args)

  def lower(self, *args) -> jax.stages.Lowered:
    """Lowers the variant in use, before the first call that of the first choice."""
    return self.variant(self.choice or self.choices[0]).lower(*args)

  def fit(self, *args) -> jax.stages.Compiled:
    """The program that a call with such arguments runs, compiled if there has been none."""
    leaves, structure = jax.tree.flatten(args)
    kind = (structure, *map(jax.typeof, leaves))
    if kind not in self._programs:
      first = self.choice is None  # Other shapes later on do not change the choice.
      self._programs[kind] = (
        self._choose(args) if first else self.lower(*args).compile(compiler_options())
      )
    return self._programs[kind]

  def account(self) -> str:
    """What is known of memory, such as '12.3 of 98.7 GB free memory'."""
    if self.needed is None:
      return 'memory unknown'
    of = '' if self.free is None else f' of {self.free / 1e9:.3g} GB free'
    return f'{self.needed / 1e9:.3g} GB{of} memory'

  def _choose(self, args) -> jax.stages.Compiled:
    jax.block_until_ready(args)  # Memory of programs still running is not free yet, but will be.
    self.free = self._free()
    for choice in self.choices:
      program, error = _compile(self.variant(choice), args)
      self.needed = None if error else _needed_memory(program)
      known = self.needed is not None and self.free is not None
      fits = not error and not (known and self.needed > _SHARE * self.free)
      if on_all(fits):
        break
    else:
      if error:
        raise error
      if is_main():
        print(f'Too little memory, trying all the same: {self.account()}.', file=sys.stderr)
    self.choice = choice
    return program
