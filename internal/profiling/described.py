"""Compiles programs for TPUs that are not attached, and estimates their memory and speed.

XLA's TPU compiler comes with the package libtpu and runs on any CPU. Given a topology such as
'v5e:4x4', it compiles the training step and the renderer. The compiled programs give their memory,
FLOPs, memory traffic and collectives. Nothing is executed: speeds are the upper bounds of a
roofline model.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from .. import configs
from ..devices import memory, sharding
from ..errors import UserError
from ..rendering import renderer
from ..system import installation
from ..training import batches, per_camera, train_step
from . import hlo, programs


class TopologyError(UserError):
  """A topology that the compiler does not support."""


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip's figures from the vendor's data sheet."""

  memory: float  # Bytes of HBM.
  flops: float  # Dense bfloat16 products, 1/s.
  bandwidth: float  # Of the HBM, bytes/s.
  cores: int = 1  # Devices that JAX sees for each chip.


# cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e.
CHIPS = {
  'v4': Chip(32 * 2**30, 275e12, 1228e9, cores=2),
  'v5e': Chip(16 * 2**30, 197e12, 819e9),
  'v5p': Chip(95 * 2**30, 459e12, 2765e9),
  'v6e': Chip(32 * 2**30, 918e12, 1640e9),
}

_SHARE = 0.95  # Usable part of a chip's memory; the runtime reserves the rest.
_LARGEST = 20  # Number of instructions with the largest traffic to report.
_COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')


def describe(topology: str) -> tuple[Chip, Mesh, int]:
  """Returns the chip, a mesh over the devices, and the number of hosts of a topology.

  Args:
    topology: '<chip>:<shape>', such as 'v5e:4x4' or 'v5p:2x2x1'.

  Raises:
    TopologyError: libtpu is not installed, or its compiler does not know the topology.
  """
  kind = topology.split(':')[0]
  if kind not in CHIPS or not re.fullmatch(r'\w+:\d+(x\d+)*', topology):
    raise TopologyError(
      f'--topology {topology!r} must be a chip ({", ".join(CHIPS)}) and a shape, such as v5e:4x4.'
    )
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # Do not look for an attached TPU.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # Several may compile at once.
  try:
    from jax.experimental import topologies

    found = topologies.get_topology_desc(topology, 'tpu').devices
  except (ImportError, RuntimeError, NotImplementedError) as error:
    reason = ' '.join(str(error).split())[:300]
    raise TopologyError(
      f'The TPU compiler cannot describe {topology!r}: {reason}. It comes with libtpu: '
      f'{installation.install_text("tpu-compile")}'
    ) from error
  hosts = len({device.process_index for device in found})
  return CHIPS[kind], sharding.make_mesh(found), hosts


def _capture(settings: configs.Settings, mesh: Mesh, images: int, width: int, height: int):
  """Returns replicated cameras and pixels of a capture of this size, as shapes."""
  cams = per_camera.add_tables(settings, programs.ring(images, width, height))
  return sharding.replicated_shapes((cams, batches.store_shapes(np.asarray(cams.size))), mesh)


def train_arguments(settings: configs.Settings, mesh: Mesh, capture: tuple[int, int, int]):
  """Returns the training step's arguments as shapes: state, cameras, pixels."""
  state = sharding.placed_shapes(train_step.abstract_state(settings), mesh)
  return state, *_capture(settings, mesh, *capture)


def render_arguments(settings: configs.Settings, mesh: Mesh, capture: tuple[int, int, int]):
  """Returns the chunk renderer's arguments as shapes."""
  params = sharding.replicated_shapes(train_step.abstract_state(settings).params, mesh)
  cams, _ = _capture(settings, mesh, *capture)
  return params, cams, np.int32(0), np.int32(0), np.float32(1)


def collectives(text: str) -> dict[str, dict[str, int]]:
  """Counts the collectives of a compiled program, with the bytes of their results, by kind."""
  found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {'count': 0, 'bytes': 0})
  kinds = '|'.join(_COLLECTIVES)
  for line in re.finditer(rf'= (.*?) ({kinds})(?:-start)?\(', text):
    row = found[line[2]]
    row['count'] += 1
    row['bytes'] += sum(hlo.array_bytes(line[1]))
  return dict(found)


def account(compiled: jax.stages.Compiled, chip: Chip, rays: int, seconds: float) -> dict:
  """Computes a program's memory and minimum time per device (a roofline model).

  Args:
    compiled: the program, compiled for the chip.
    chip: the chip; a device is a chip or one of its cores.
    rays: rays per call of the program, over all devices.
    seconds: compile time.
  """
  sizes, cost = compiled.memory_analysis(), compiled.cost_analysis()
  needed = sizes.argument_size_in_bytes + memory.needed_bytes(compiled)
  text = compiled.as_text()
  costs = hlo.Program(text).costs()
  # XLA's count has elementwise operations too, but a loop's body only once.
  flops = max(cost.get('flops', 0.0), sum(c.flops for c in costs))
  traffic = sum(c.bytes for c in costs)
  products_ms = flops / (chip.flops / chip.cores) * 1e3
  memory_ms = traffic / (chip.bandwidth / chip.cores) * 1e3
  bound = max(products_ms, memory_ms)
  return {
    'needed_bytes': int(needed),
    'temp_bytes': int(sizes.temp_size_in_bytes),
    'memory_bytes': int(chip.memory / chip.cores),
    'fits': needed <= _SHARE * chip.memory / chip.cores,
    'flops': flops,
    'traffic_bytes': traffic,
    'largest': [dataclasses.asdict(c) for c in costs[:_LARGEST]],
    'bytes_accessed': cost.get('bytes accessed', 0.0),
    'estimated_cycles': sum(c.cycles for c in costs),
    'products_ms': products_ms,
    'memory_ms': memory_ms,
    'bound_by': 'products' if products_ms >= memory_ms else 'memory',
    'rays_per_second_at_most': rays / bound * 1e3 if bound else None,
    'collectives': collectives(text),
    'compile_seconds': seconds,
  }


def free_memory(chip: Chip, args) -> int:
  """Returns the bytes that a program's arguments leave free on each device of a machine."""
  return int(_SHARE * chip.memory / chip.cores) - memory.sharded_bytes(args)


def measure(program: memory.FirstFit, args, chip: Chip, rays: Callable) -> dict:
  """Compiles the first variant of a program that fits, as on attached devices, and accounts for it.

  Args:
    program: the training step or renderer, with the chip's free memory.
    args: the program's arguments as shapes.
    chip: the chip to compile for.
    rays: returns the rays per call of a choice.
  """
  began = time.monotonic()
  try:
    compiled = program.fit(*args)
  except jax.errors.JaxRuntimeError as error:
    if not memory.is_exhausted(error):
      raise
    choice = program.choices[-1]
    row = {'fits': False, 'error': ' '.join(str(error).split())[:300]}
  else:
    choice = program.choice
    row = account(compiled, chip, rays(choice), time.monotonic() - began)
    row['fits'] = choice not in program.rejected
  tried = [{'choice': c, 'needed_bytes': n} for c, n in program.rejected.items() if c != choice]
  return {'choice': choice, **row, 'tried': tried}


def train_row(settings: configs.Settings, chip: Chip, mesh: Mesh, capture) -> dict:
  """Measures the training step with the fewest micro-batches that fit."""
  args = train_arguments(settings, mesh, capture)
  step = train_step.make_train_step(settings, mesh, lambda _: free_memory(chip, args))
  return measure(step, args, chip, lambda _: settings.config.batch_size)


def render_row(settings: configs.Settings, chip: Chip, mesh: Mesh, capture) -> dict:
  """Measures the renderer with the largest chunk that fits."""
  args = render_arguments(settings, mesh, capture)
  render = renderer.make_chunk_renderer(settings, mesh, lambda _: free_memory(chip, args))
  return measure(render, args, chip, lambda chunk: chunk)


ROWS = {'train': train_row, 'render': render_row}
