"""Device memory: measures it, and compiles the first variant of a function that fits."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Iterable, Sequence

import jax
from jax.sharding import Mesh

from . import processes

_SHARE = 0.9  # Usable part of the free memory, which may be fragmented.


def free_memory(mesh: Mesh) -> int | None:
  """Returns the free bytes of this process's fullest device; None if unknown (CPU)."""
  stats = [device.memory_stats() or {} for device in mesh.local_devices]
  if not all('bytes_limit' in s and 'bytes_in_use' in s for s in stats):
    return None
  return min(s['bytes_limit'] - s['bytes_in_use'] for s in stats)


def sharded_bytes(tree) -> int:
  """Returns the bytes that arrays, or shapes with shardings, take on each device.

  Values of the host, which have no sharding, do not count.
  """
  leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, 'sharding')]
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def peak_bytes(devices: Iterable[jax.Device]) -> int:
  """Returns the highest peak memory of the devices in this process, in bytes.

  CPUs do not report theirs; it is then the peak of the whole process.
  """
  peaks = [(device.memory_stats() or {}).get('peak_bytes_in_use') for device in devices]
  known = [peak for peak in peaks if peak is not None]
  if known:
    return max(known)
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def needed_bytes(compiled: jax.stages.Compiled) -> int | None:
  """Returns the bytes that a program needs per device besides its arguments; None if unknown."""
  sizes = compiled.memory_analysis()
  if sizes is None:
    return None
  results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes  # Donated buffers are reused.
  return sizes.temp_size_in_bytes + results + sizes.generated_code_size_in_bytes


def compiler_options() -> dict[str, bool]:
  """Returns XLA's options: on GPUs, cuBLASLt instead of Triton for matrix products.

  cuBLASLt fuses biases and ReLUs; Triton's kernels need further passes over memory.
  """
  return {'xla_gpu_enable_triton_gemm': False} if jax.default_backend() == 'gpu' else {}


def _compile(
  function: Callable, args, on_lowered: Callable[[], None] | None
) -> tuple[jax.stages.Compiled | None, Exception | None]:
  """Returns (program, None), or (None, error) if XLA runs out of memory."""
  lowered = function.lower(*args)
  if on_lowered:
    on_lowered()
  try:
    return lowered.compile(compiler_options()), None
  except jax.errors.JaxRuntimeError as error:
    if not is_exhausted(error):
      raise
    return None, error


def is_exhausted(error: Exception) -> bool:
  """Returns whether a program did not compile because it needs too much memory."""
  return 'RESOURCE_EXHAUSTED' in str(error) or 'Ran out of memory' in str(error)


class FirstFit:
  """A function compiled as the first of several variants that fits in device memory.

  The first call chooses the variant; `free` tells how much memory the arguments and all other data
  leave. A variant fits if it needs, besides its arguments, at most 90% of that on the fullest
  device. All processes choose the same variant. If memory is unknown (CPU), the first variant is
  chosen.

  Attributes:
    choice: the chosen variant; None before the first call.
    needed: bytes per device that it needs; None if unknown.
    free: bytes per device that were free; None if unknown.
    rejected: choices that did not fit, with the bytes that they need (None if XLA gave up). If no
      choice fits, `choice` is among them.
  """

  def __init__(
    self, variant: Callable[[int], Callable], choices: Sequence[int], free: Callable[[], int | None]
  ):
    """Creates the function; nothing is compiled yet.

    Args:
      variant: returns the jit-compiled function of a choice.
      choices: choices in order of decreasing memory.
      free: returns the number of free bytes besides the arguments, or None.
    """
    self.variant, self.choices, self._free = variant, tuple(choices), free
    self.choice = self.needed = self.free = None
    self.rejected: dict[int, int | None] = {}
    self._programs = {}

  def __call__(self, *args):
    return self.fit(*args)(*args)

  def lower(self, *args) -> jax.stages.Lowered:
    """Lowers the chosen variant; before the first call, the first one."""
    return self.variant(self.choice or self.choices[0]).lower(*args)

  def fit(self, *args, on_lowered: Callable[[], None] | None = None) -> jax.stages.Compiled:
    """Returns the program for arguments of these shapes, compiling it if necessary.

    Args:
      *args: arrays, or jax.ShapeDtypeStruct with their shardings.
      on_lowered: called once the first variant is traced, which needs Python, before XLA compiles
        it, which does not.
    """
    leaves, structure = jax.tree.flatten(args)
    kind = (structure, *map(jax.typeof, leaves))
    if kind not in self._programs:
      first = self.choice is None  # Later shapes keep the first choice.
      self._programs[kind] = (
        self._choose(args, on_lowered) if first else self.lower(*args).compile(compiler_options())
      )
    return self._programs[kind]

  def account(self) -> str:
    """Returns a description of memory use, such as '12.3 GB of 98.7 GB free memory'."""
    if self.needed is None:
      return 'memory unknown'
    of = '' if self.free is None else f' of {self.free / 1e9:.3g} GB free'
    return f'{self.needed / 1e9:.3g} GB{of} memory'

  def _choose(self, args, on_lowered: Callable[[], None] | None) -> jax.stages.Compiled:
    jax.block_until_ready(args)  # Running programs still hold memory.
    self.free = self._free()
    for choice in self.choices:
      program, error = _compile(self.variant(choice), args, on_lowered)
      on_lowered = None
      self.needed = None if error else needed_bytes(program)
      known = self.needed is not None and self.free is not None
      fits = not error and not (known and self.needed > _SHARE * self.free)
      if processes.on_all(fits):
        break
      self.rejected[choice] = self.needed
    else:
      if error:
        raise error
      if processes.is_main():
        print(f'Warning: may run out of memory: {self.account()}.', file=sys.stderr)
    self.choice = choice
    return program
