"""The content of a table: methods by scenes, with means, differences, spreads and ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from . import lpips
from .metrics import METRICS

HIGHER_IS_BETTER = {**dict.fromkeys(METRICS, True), **dict.fromkeys(lpips.METRICS, False)}
NAMES = {
  'psnr': 'PSNR',
  'ssim': 'SSIM',
  'cc_psnr': 'PSNR, colours corrected',
  'cc_ssim': 'SSIM, colours corrected',
  'lpips_paper': 'LPIPS (VGG, colours in [0, 1])',
  'lpips_vgg': 'LPIPS (VGG, colours in [-1, 1])',
}
_FEW = 4  # Scenes that a summary shows one by one.


@dataclasses.dataclass(frozen=True)
class Row:
  """A method's numbers."""

  method: str
  values: Mapping[str, Mapping[str, float | None]]  # By metric and scene; of ours over seeds.
  mean: Mapping[str, float]  # As printed; used if numbers of scenes are missing.
  ours: bool
  source: str
  seeds: Mapping[int, Mapping[str, Mapping[str, float | None]]]  # `values` of each; {} if printed.
  reduction: str = ''  # How the pictures were reduced.


@dataclasses.dataclass(frozen=True)
class Table:
  """A table's content, for any output format."""

  title: str
  metrics: tuple[str, ...]
  scenes: tuple[str, ...]  # Or the scales of a multi-scale evaluation.
  groups: Mapping[str, Sequence[str]]  # Scenes of each mean; the last group has all scenes.
  rows: tuple[Row, ...]
  against: Row | None  # The row that ours are compared with.
  notes: tuple[str, ...] = ()  # What a reader must know, as sentences.

  def value(self, row: Row, metric: str, column: str) -> float | None:
    """Returns a scene's number or a group's mean; None if it or a scene of the group is missing."""
    found = self._value(row.values, metric, column)
    if found is None and column == self.columns[-1]:
      return row.mean.get(metric)
    return found

  def _value(self, values: Mapping[str, Mapping], metric: str, column: str) -> float | None:
    by_scene = values.get(metric, {})
    if column in self.scenes:
      return by_scene.get(column)
    return mean([by_scene.get(scene) for scene in self.groups[column]])

  def spread(self, row: Row, metric: str, column: str) -> float | None:
    """Returns the standard deviation over seeds, with n - 1; None for one seed.

    That of a group's mean is over the means that each seed has.
    """
    found = [self._value(values, metric, column) for values in row.seeds.values()]
    if len(found) < 2 or None in found:
      return None
    return float(np.std(found, ddof=1))

  def difference(self, row: Row, metric: str, column: str) -> float | None:
    """Returns one of our numbers minus the number it is compared with."""
    if not row.ours or self.against is None:
      return None
    return self._minus(row, self.against, metric, column)

  def own_difference(self, row: Row, metric: str, column: str) -> float | None:
    """Returns the number of one of our methods minus that of our first; None for the first."""
    if not row.ours or row is self.own[0]:
      return None
    return self._minus(row, self.own[0], metric, column)

  def _minus(self, row: Row, other: Row, metric: str, column: str) -> float | None:
    both = [self.value(r, metric, column) for r in (row, other)]
    return None if None in both else both[0] - both[1]

  def rank(self, row: Row, metric: str, column: str) -> int | None:
    """Returns 1 for the best number of a column, 2 for the second best, or None.

    Numbers that are equal as shown have the same rank. A column with a single number has none.
    """
    shown = [self.value(r, metric, column) for r in self.rows]
    shown = [round(number, digits(metric)) for number in shown if number is not None]
    value = self.value(row, metric, column)
    if value is None or len(shown) < 2:
      return None
    order = sorted(set(shown), reverse=HIGHER_IS_BETTER[metric])
    place = order.index(round(value, digits(metric))) + 1
    return place if place <= 2 else None

  @property
  def columns(self) -> tuple[str, ...]:
    return (*self.scenes, *self.groups)

  @property
  def own(self) -> list[Row]:
    """Our rows."""
    return [row for row in self.rows if row.ours]

  @property
  def blocks(self) -> tuple[str, ...]:
    """The columns of a summary: of few scenes all, of many the means."""
    if len(self.scenes) == 1:
      return self.scenes
    return self.columns if len(self.scenes) <= _FEW else tuple(self.groups)


def digits(metric: str) -> int:
  """Returns the number of decimals that tables show."""
  return 2 if 'psnr' in metric else 3


def mean(values: Sequence[float | None]) -> float | None:
  """Returns the mean; None without values, or if one is missing."""
  return float(np.mean(values)) if values and None not in values else None


def number(table: Table, row: Row, metric: str, column: str) -> str:
  """Formats a number, with its standard deviation over seeds if there is one."""
  value, std = (f(row, metric, column) for f in (table.value, table.spread))
  if value is None:
    return '–'
  form = f'.{digits(metric)}f'
  return f'{value:{form}}' + ('' if std is None else f' ± {std:{form}}')
