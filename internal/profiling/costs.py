"""Costs of a program: counted matrix products, timed calls, kernels from a trace."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import glob
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from .. import configs
from ..devices.memory import FirstFit
from ..training import train_step

_IN_FLIGHT = 8  # Maximum number of unfinished calls.


def _needing(name: str, shape: tuple[int, int], mlp: configs.MLP, settings) -> int:
  """Counts a dense layer's inputs that need gradients: not encodings of positions or directions."""
  if name.startswith('trunk_') or name in ('density', 'bottleneck'):
    if mlp.encoding != 'ipe':
      return shape[0]
    return 0 if name == 'trunk_0' else mlp.net_width
  if name == 'view_0':
    learned = settings.model.num_glo_features
    if not settings.model.use_viewdirs:
      return mlp.net_width + learned
    return mlp.bottleneck_width + learned
  return shape[0]


def _sample_flops(params: Mapping, mlp: configs.MLP, settings, colour: bool) -> tuple[int, int]:
  """Counts FLOPs per sample of one MLP: forward, and forward plus backward."""
  forward = both = 0
  for name, layer in params.items():
    if name in ('grid', 'encoding'):
      continue  # Lookups, or a plug-in's own operations.
    if not colour and not name.startswith(('trunk_', 'density')):
      continue
    inputs, outputs = layer['kernel'].shape
    forward += 2 * inputs * outputs
    needing = _needing(name, (inputs, outputs), mlp, settings)
    both += 2 * outputs * (2 * inputs + needing)  # Forward, kernel gradient, input gradient.
  return forward, both


def ray_flops(settings: configs.Settings) -> dict[str, float]:
  """Counts the FLOPs of a ray's matrix products, in the mean: {'train', 'render'}.

  Counts what the model requires. Recomputation to save memory does not count, nor do colours of
  proposal levels that no loss uses.
  """
  cfg = settings.model
  params = train_step.abstract_state(settings).params
  nerf = params['nerf_mlp'], settings.nerf_mlp
  coarse_colour = settings.config.data_coarse_loss_mult > 0
  last = _sample_flops(*nerf, settings, True)
  train, render = (cfg.num_nerf_samples * last[i] for i in (1, 0))
  for level in range(cfg.num_levels - 1):
    name = f'prop_mlp_{level}' if cfg.separate_prop_mlps else 'prop_mlp'
    prop = nerf if cfg.single_mlp else (params[name], settings.prop_mlp)
    forward, both = _sample_flops(*prop, settings, coarse_colour)
    # Only every n-th ray has a backward pass.
    train += cfg.num_prop_samples * (forward + (both - forward) / settings.config.interlevel_every)
    render += cfg.num_prop_samples * _sample_flops(*prop, settings, False)[0]
  return {'train': train, 'render': render}


def in_turn(call: Callable, count: int) -> Iterator:
  """Yields the results of `count` calls in order, once their arrays are ready.

  Limits the number of calls in flight: with a hundred, a CPU's virtual devices would run different
  calls at the same time and deadlock in their collectives.
  """
  in_flight = collections.deque()
  for _ in range(count):
    in_flight.append(call())
    if len(in_flight) > _IN_FLIGHT:
      yield jax.block_until_ready(in_flight.popleft())
  yield from map(jax.block_until_ready, in_flight)


def time_groups(call: Callable, seconds: float) -> dict:
  """Measures the milliseconds of `call`: median and percentiles over groups of calls.

  A group takes about 0.3 seconds, so that the wait at its end is negligible.

  Args:
    call: returns arrays to wait for.
    seconds: how long to measure; at least three groups.
  """
  jax.block_until_ready(call())
  began = time.perf_counter()
  jax.block_until_ready(call())
  size = int(np.clip(round(0.3 / (time.perf_counter() - began)), 1, 100))
  times, end = [], time.perf_counter() + seconds
  while time.perf_counter() < end or len(times) < 3:
    began = time.perf_counter()
    collections.deque(in_turn(call, size), maxlen=0)
    times.append((time.perf_counter() - began) / size * 1e3)
  low, middle, high = (float(v) for v in np.percentile(times, [10, 50, 90]))
  return {'ms': middle, 'ms_10': low, 'ms_90': high, 'groups': len(times), 'calls_per_group': size}


@contextlib.contextmanager
def _cache_hits() -> Iterator[list]:
  """Yields a list that grows by one for each program found in the compilation cache."""
  hits, active = [], [True]

  def listen(event, **_):
    if active and event == '/jax/compilation_cache/cache_hits':
      hits.append(event)

  jax.monitoring.register_event_listener(listen)  # JAX has no public way to unregister it.
  try:
    yield hits
  finally:
    active.clear()


def compile_first(function: FirstFit, *args) -> tuple[dict, str]:
  """Compiles a function ahead of its first call.

  Returns:
    Facts: compile seconds including tracing, whether it came from the compilation cache, bytes of
    memory per device. And the compiled HLO text.
  """
  began = time.perf_counter()
  with _cache_hits() as hits:
    compiled = function.fit(*args)
  facts = {'compile_seconds': time.perf_counter() - began, 'compiled_from_cache': bool(hits)}
  memory = compiled.memory_analysis()
  if memory is not None:
    facts['temp_bytes'] = memory.temp_size_in_bytes
    facts['argument_bytes'] = memory.argument_size_in_bytes
  return facts, compiled.as_text() or ''


@dataclasses.dataclass(frozen=True)
class Kernel:
  """The time and number of executions of a kernel per step."""

  name: str
  ms: float
  count: float
  source: str  # Name of the operation it computes, '' if unknown.


@contextlib.contextmanager
def trace(folder: str) -> Iterator[None]:
  """Records a trace of the devices, without Python calls."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with jax.profiler.trace(folder, profiler_options=options):
    yield


def _kernel_events(planes: Sequence) -> Iterator[tuple[str, object, dict]]:
  """Yields the device, event and stats of each kernel execution."""
  devices = [p for p in planes if re.match(r'/device:(GPU|TPU):\d+', p.name)]
  hosts = [p for p in planes if p.name.startswith('/host:CPU')]
  for plane in devices or hosts:  # CPU kernels run on the host's threads, among other events.
    for line in plane.lines:
      if devices and not ('Stream' in line.name or line.name == 'XLA Ops'):
        continue
      for event in line.events:
        stats = _stats(event)
        if devices:
          yield plane.name, event, stats
        elif 'hlo_op' in stats:
          yield f'CPU {stats.get("device_ordinal", 0)}', event, stats


# Events whose time includes that of others: loops, branches, calls.
_ENCLOSING = re.compile(r'(while|conditional|call)(\.\d+)?$')


def _stats(event) -> dict:
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)  # From the binding itself, on Python 3.13.
    return dict(event.stats)


def op_names(hlo: str) -> dict[str, str]:
  """Maps each instruction in compiled HLO text to the name of the operation that it computes.

  Also has the names of kernels, in which `_` replaces other characters of the instruction's name.
  """
  found = re.finditer(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', hlo, re.MULTILINE)
  names = {match[1]: match[2] for match in found}
  return {re.sub(r'\W', '_', name): source for name, source in names.items()} | names


def _newest_events(folder: str) -> Iterator[tuple[str, object, dict]]:
  """Yields `_kernel_events` of the newest trace in a folder, without enclosing events."""
  paths = glob.glob(os.path.join(folder, '**', '*.xplane.pb'), recursive=True)
  if paths:
    data = jax.profiler.ProfileData.from_file(max(paths, key=os.path.getmtime))
    for device, event, stats in _kernel_events(list(data.planes)):
      if not _ENCLOSING.match(event.name):
        yield device, event, stats


def kernels(folder: str, steps: int, names: Mapping[str, str] | None = None) -> list[Kernel]:
  """Returns the newest trace's kernels, slowest first, per step and device.

  Args:
    folder: the folder given to `trace`.
    steps: number of steps in the trace.
    names: `op_names` of the program, for the kernels' sources.
  """
  ns, count, devices = collections.Counter(), collections.Counter(), set()
  sources = collections.defaultdict(collections.Counter)
  for device, event, stats in _newest_events(folder):
    devices.add(device)
    ns[event.name] += event.duration_ns
    count[event.name] += 1
    source = (names or {}).get(str(stats.get('hlo_op', event.name)), '')
    sources[event.name][source] += event.duration_ns
  per = steps * max(len(devices), 1)
  return [
    Kernel(name, total / per / 1e6, count[name] / per, sources[name].most_common(1)[0][0])
    for name, total in ns.most_common()
  ]


def kernel_ms(folder: str, steps: int) -> dict[str, dict[str, float]]:
  """Returns milliseconds per step by device and kernel name. Arguments as for `kernels`."""
  found = collections.defaultdict(collections.Counter)
  for device, event, _ in _newest_events(folder):
    found[device][event.name] += event.duration_ns / steps / 1e6
  return {device: dict(names) for device, names in sorted(found.items())}
