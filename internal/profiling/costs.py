"""What a program costs: its products counted, its calls timed, its kernels read from a trace."""

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
from ..training import train_step

_UNDER_WAY = 8  # Timed calls at a time.


def _needing(name: str, shape: tuple[int, int], mlp: configs.MLP, settings) -> int:
  """How many of a dense layer's inputs a gradient flows to: neither sines nor directions."""
  if name.startswith('trunk_') or name in ('density', 'bottleneck'):
    if mlp.encoding == 'grid':
      return shape[0]
    return 0 if name == 'trunk_0' else mlp.net_width
  if name == 'view_0':
    learned = settings.model.num_glo_features
    if not settings.model.use_viewdirs:
      return mlp.net_width + learned
    return mlp.bottleneck_width + learned
  return shape[0]


def _sample_flops(params: Mapping, mlp: configs.MLP, settings, colour: bool) -> tuple[int, int]:
  """One sample's products through one MLP: forward, and forward and backward."""
  forward = both = 0
  for name, layer in params.items():
    if name == 'grid':
      continue  # Lookups are no products.
    if not colour and not name.startswith(('trunk_', 'density')):
      continue
    inputs, outputs = layer['kernel'].shape
    forward += 2 * inputs * outputs
    needing = _needing(name, (inputs, outputs), mlp, settings)
    both += 2 * outputs * (2 * inputs + needing)  # The layer, its kernel's and input's gradient.
  return forward, both


def ray_flops(settings: configs.Settings) -> dict[str, int]:
  """Floating-point operations of one ray's matrix products: {'train', 'render'}.

  The count is of the mathematics: what a compiler computes twice to save memory does not count,
  nor do colours of proposal levels that no loss looks at.
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
    train += cfg.num_prop_samples * _sample_flops(*prop, settings, coarse_colour)[1]
    render += cfg.num_prop_samples * _sample_flops(*prop, settings, False)[0]
  return {'train': train, 'render': render}


def in_turn(call: Callable, count: int) -> Iterator:
  """What so many calls return, once it is there; `call` returns arrays to wait for.

  Few calls are under way at a time: of a hundred, virtual devices of a CPU would run different ones
  and wait for ever.
  """
  under_way = collections.deque()
  for _ in range(count):
    under_way.append(call())
    if len(under_way) > _UNDER_WAY:
      yield jax.block_until_ready(under_way.popleft())
  yield from map(jax.block_until_ready, under_way)


def time_groups(call: Callable, seconds: float) -> dict:
  """Milliseconds of `call` as in `in_turn`: the median over groups of calls.

  A group takes a third of a second or so, for the wait at its end not to count.
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
  return {
    'ms': middle,
    'ms_10': low,
    'ms_90': high,
    'groups': len(times),
    'calls_per_group': size,
  }


@contextlib.contextmanager
def _cache_hits() -> Iterator[list]:
  """Counts, in the yielded list, the programs that the compilation cache answers meanwhile."""
  hits, active = [], [True]

  def listen(event, **_):
    if active and event == '/jax/compilation_cache/cache_hits':
      hits.append(event)

  jax.monitoring.register_event_listener(listen)  # There is no public way to take it back.
  try:
    yield hits
  finally:
    active.clear()


def compile_first(function: Callable, *args) -> tuple[dict, str]:
  """Compiles a jit-compiled function (or memory.FirstFit) ahead of its first call.

  Returns:
    Seconds with tracing, whether the cache had it, and bytes of memory on each device; the
    compiled HLO. The first call then finds it compiled.
  """
  began = time.perf_counter()
  with _cache_hits() as hits:
    fits = hasattr(function, 'fit')
    compiled = function.fit(*args) if fits else function.lower(*args).compile()
  facts = {'compile_seconds': time.perf_counter() - began, 'compiled_from_cache': bool(hits)}
  memory = compiled.memory_analysis()
  if memory is not None:
    facts['temp_bytes'] = memory.temp_size_in_bytes
    facts['argument_bytes'] = memory.argument_size_in_bytes
  return facts, compiled.as_text() or ''


def peak_bytes(devices) -> int | None:
  """The most memory that any of the devices has held since the process began, where it says."""
  peaks = [(d.memory_stats() or {}).get('peak_bytes_in_use') for d in devices]
  return max((p for p in peaks if p is not None), default=None)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """All runs of the kernels of one name, in an average step."""

  name: str
  ms: float
  count: float
  source: str  # The operation of the program that it is a part of, '' if that is not known.


@contextlib.contextmanager
def trace(folder: str) -> Iterator[None]:
  """Records what the devices do; the interpreter's own calls would only fill the trace."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with jax.profiler.trace(folder, profiler_options=options):
    yield


def _kernel_events(planes: Sequence) -> Iterator[tuple[str, object, dict]]:
  """Each run of a kernel: which device's, the event, its facts."""
  devices = [p for p in planes if re.match(r'/device:(GPU|TPU):\d+', p.name)]
  hosts = [p for p in planes if p.name.startswith('/host:CPU')]
  for plane in devices or hosts:  # A CPU's kernels are among much else on the host's threads.
    for line in plane.lines:
      if devices and not ('Stream' in line.name or line.name == 'XLA Ops'):
        continue
      for event in line.events:
        stats = _stats(event)
        if devices:
          yield plane.name, event, stats
        elif 'hlo_op' in stats:
          yield f'CPU {stats.get("device_ordinal", 0)}', event, stats


# Events that enclose others' time: loops, branches, calls.
_ENCLOSING = re.compile(r'(while|conditional|call)(\.\d+)?$')


def _stats(event) -> dict:
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)  # Of the binding itself, in Python 3.13.
    return dict(event.stats)


def op_names(hlo: str) -> dict[str, str]:
  """From an instruction of compiled HLO text to the name of the operation that asked for it.

  Kernels, the names of which have _ for what else there is in an instruction's, are found too.
  """
  found = re.finditer(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', hlo, re.MULTILINE)
  names = {match[1]: match[2] for match in found}
  return {re.sub(r'\W', '_', name): source for name, source in names.items()} | names


def _newest_events(folder: str) -> Iterator[tuple[str, object, dict]]:
  """`_kernel_events` of the newest trace in a folder, without those that enclose others."""
  paths = glob.glob(os.path.join(folder, '**', '*.xplane.pb'), recursive=True)
  if paths:
    data = jax.profiler.ProfileData.from_file(max(paths, key=os.path.getmtime))
    for device, event, stats in _kernel_events(list(data.planes)):
      if not _ENCLOSING.match(event.name):
        yield device, event, stats


def kernels(folder: str, steps: int, names: Mapping[str, str] | None = None) -> list[Kernel]:
  """The newest trace's kernels, slowest first, per step and device.

  Args:
    folder: what `trace` was given.
    steps: how many steps ran meanwhile.
    names: `op_names` of the program, to tell the kernels' sources.
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
  """Milliseconds a step in each device's kernels, by device and name; arguments as of `kernels`."""
  found = collections.defaultdict(collections.Counter)
  for device, event, _ in _newest_events(folder):
    found[device][event.name] += event.duration_ns / steps / 1e6
  return {device: dict(names) for device, names in sorted(found.items())}
