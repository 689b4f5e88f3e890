"""Device memory: what is free, what a program needs, and the first variant of it that fits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from . import processes

_SHARE = 0.9  # Of a device's free memory: what is free need not be in one piece.


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
      if processes.on_all(fits):
        break
    else:
      if error:
        raise error
      if processes.is_main():
        print(f'Too little memory, trying all the same: {self.account()}.', file=sys.stderr)
    self.choice = choice
    return program
