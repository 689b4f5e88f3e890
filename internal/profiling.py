"""What a program costs: its matrix products counted, its kernels timed from a profiler's trace.

The count is of the mathematics, 2 x in x out for each row through a dense layer; what a compiler
computes twice to save memory does not count.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import glob
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping

import jax

from internal import configs, train_step


def _needing(name: str, shape: tuple[int, int], mlp: configs.MLP, settings) -> int:
  """How many of a dense layer's inputs a gradient flows to: neither encodings nor directions."""
  if name == 'trunk_0':
    return 0
  if name.startswith('trunk_') or name in ('density', 'bottleneck'):
    return mlp.net_width
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
    if not colour and not name.startswith(('trunk_', 'density')):
      continue
    inputs, outputs = layer['kernel'].shape
    forward += 2 * inputs * outputs
    needing = _needing(name, (inputs, outputs), mlp, settings)
    both += 2 * outputs * (2 * inputs + needing)  # The layer, its kernel's and input's gradient.
  return forward, both


def ray_flops(settings: configs.Settings) -> dict[str, int]:
  """Floating-point operations of one ray's matrix products: {'train', 'render'}.

  Colours of proposal levels count only where a loss looks at them.
  """
  cfg = settings.model
  params = jax.eval_shape(lambda: train_step.create_state(settings).params)
  nerf = params['nerf_mlp'], settings.nerf_mlp
  prop = nerf if cfg.single_mlp else (params['prop_mlp'], settings.prop_mlp)
  coarse_colour = settings.config.data_coarse_loss_mult > 0
  last = _sample_flops(*nerf, settings, True)
  coarse = _sample_flops(*prop, settings, False), _sample_flops(*prop, settings, coarse_colour)
  proposals = (cfg.num_levels - 1) * cfg.num_prop_samples
  return {
    'train': cfg.num_nerf_samples * last[1] + proposals * coarse[1][1],
    'render': cfg.num_nerf_samples * last[0] + proposals * coarse[0][0],
  }


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


def _kernel_lines(planes: list) -> tuple[list, Callable]:
  """The lines that hold kernels, one list per device, and what tells a kernel's event there."""
  devices = [p for p in planes if re.match(r'/device:(GPU|TPU):\d+', p.name)]
  if devices:
    wanted = lambda line: 'Stream' in line.name or line.name == 'XLA Ops'  # noqa: E731
    return [[x for x in p.lines if wanted(x)] for p in devices], lambda stats: True
  hosts = [p for p in planes if p.name.startswith('/host:CPU')]
  return [[x for p in hosts for x in p.lines]], lambda stats: 'hlo_op' in stats


# Events that enclose others' time: loops, branches, calls.
_ENCLOSING = re.compile(r'(while|conditional|call)(\.\d+)?$')


def _stats(event) -> dict:
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)  # Of the binding itself, in Python 3.13.
    return dict(event.stats)


def op_names(hlo: str) -> dict[str, str]:
  """From an instruction of compiled HLO text to the name of the operation that asked for it."""
  found = re.finditer(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', hlo, re.MULTILINE)
  return {match[1]: match[2] for match in found}


def kernels(folder: str, steps: int, names: Mapping[str, str] | None = None) -> list[Kernel]:
  """The newest trace's kernels, slowest first, per step and device.

  Args:
    folder: what `trace` was given.
    steps: how many steps ran meanwhile.
    names: `op_names` of the program, to tell the kernels' sources.
  """
  paths = glob.glob(os.path.join(folder, '**', '*.xplane.pb'), recursive=True)
  if not paths:
    return []
  data = jax.profiler.ProfileData.from_file(max(paths, key=os.path.getmtime))
  devices, is_kernel = _kernel_lines(list(data.planes))
  ns, count = collections.Counter(), collections.Counter()
  sources = collections.defaultdict(collections.Counter)
  for event in (e for lines in devices for line in lines for e in line.events):
    stats = _stats(event)
    if not is_kernel(stats) or _ENCLOSING.match(event.name):
      continue
    ns[event.name] += event.duration_ns
    count[event.name] += 1
    source = (names or {}).get(str(stats.get('hlo_op', '')), '')
    sources[event.name][source] += event.duration_ns
  per = steps * max(len(devices), 1)
  return [
    Kernel(name, total / per / 1e6, count[name] / per, sources[name].most_common(1)[0][0])
    for name, total in ns.most_common()
  ]
