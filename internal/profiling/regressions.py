"""Whether a benchmark is slower than an earlier one, as ratios to matrix products.

The speed of a chip varies from day to day and between machines of one kind. So rays/s are divided
by the TFLOP/s that the same run reached in large matrix products.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import UserError
from ..system import files

MOST_LOST = 0.1  # Of a rate.
_PARTS = ('train', 'real', 'render')
_SAME = (
  'platform', 'device_kind', 'devices_used', 'mlp_dtype', 'batch_size', 'render_chunk_size',
  'flops_per_ray_train', 'flops_per_ray_render',
)  # fmt: skip


class AgainstError(UserError):
  """Results that cannot be compared."""


def _rate(results: Mapping, part: str) -> float | None:
  """Returns a part's rays/s for each TFLOP/s of products; None if it was not measured."""
  row = results.get(part)
  if row is None:
    return None
  # A part that failed, such as one that ran out of memory, has no speed.
  return row.get('rays_per_second', 0.0) / results['matmul'][results['mlp_dtype']]['tflops']


def read(path: str, described: Mapping) -> dict:
  """Reads the --json file of an earlier run.

  Args:
    path: the file.
    described: `programs.describe` of this run.

  Raises:
    AgainstError: the file is unreadable, or was measured on other devices or with other settings.
  """
  way_out = 'Write one with --json, with parts matmul and train or render.'
  before = files.read_json(path, dict, AgainstError, way_out)
  for name in _SAME:
    if before.get(name) != described[name]:
      raise AgainstError(
        f'--against {path}: {name} was {before.get(name)!r} and is {described[name]!r}, so the '
        'rates cannot be compared. Use the same settings and the same kind of device.'
      )
  try:
    rates = [_rate(before, part) for part in _PARTS]
  except (LookupError, TypeError, AttributeError, ZeroDivisionError):
    rates = []
  if not any(rates):
    raise AgainstError(f'--against {path}: it has no rates to compare with. {way_out}')
  return before


def compare(now: Mapping, before: Mapping) -> dict[str, float]:
  """Returns this run's rate over the earlier one's for each part that both measured."""
  rates = {part: (_rate(now, part), _rate(before, part)) for part in _PARTS}
  return {part: a / b for part, (a, b) in rates.items() if a is not None and b}


def lines(ratios: Mapping[str, float]) -> list[str]:
  """Returns a line for each part."""
  return [
    f'{part}: {ratio:.3f} x the earlier rate, both relative to matrix products'
    + (f'; more than {MOST_LOST:.0%} is lost' if is_lost(ratio) else '')
    for part, ratio in ratios.items()
  ]


def is_lost(ratio: float) -> bool:
  """Returns whether a ratio of rates is a regression."""
  return ratio < 1 - MOST_LOST
