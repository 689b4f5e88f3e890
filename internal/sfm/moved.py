"""How far `refine` moved given poses: judges and lists the differences."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..system import files, warnings

FILE = 'sparse/refinement.json'
_MOST_MOVED = 8
_FAR_DEGREES, _FAR_SHARE = 3.0, 0.1  # Median movements of poses that were far off.


def summary(values: np.ndarray) -> dict[str, float]:
  """Returns the median, the 90th percentile and the maximum of values [n]."""
  return {
    'median': float(np.median(values)),
    '90%': float(np.percentile(values, 90)),
    'max': float(values.max()),
  }


def most_moved(report: Mapping) -> Sequence[dict]:
  """Returns the photographs that moved most, at least twice as far as the median one."""
  rotation = report['rotation_degrees']['median']
  position = report['position_share']['median']
  far = [
    row
    for row in report['per_photograph']
    if row['rotation_degrees'] > 2 * rotation or row['position_share'] > 2 * position
  ]
  return far[:_MOST_MOVED]


def checks(report: Mapping) -> Iterator[tuple[str, str, str]]:
  """Yields (name, status, text) of the report's checks on a refinement."""
  turned, moved = report['rotation_degrees'], report['position_share']
  unverified = 1 - report['verified'] / report['given']
  status = 'good' if unverified <= 0.05 else 'doubtful' if unverified <= 0.25 else 'bad'
  text = f'{report["verified"]} of {report["given"]} verified by matches'
  text += f'; {len(report["registered"])} more posed' if report['registered'] else ''
  text += (
    f'; moved {turned["median"]:.2f} degrees and {moved["median"]:.2%} of the radius in the '
    f'median, {turned["max"]:.2f} and {moved["max"]:.2%} at most'
  )
  if turned['median'] > _FAR_DEGREES or moved['median'] > _FAR_SHARE:
    status = 'doubtful' if status == 'good' else status
    text += ': they were far off, compare with a run without --from'
  yield 'given poses', status, text
  changes = [
    'focal length kept'
    if camera['kept']
    else f'focal length {camera["focal_before"]:.0f} to {camera["focal_after"]:.0f} px'
    for camera in sorted(report['cameras'], key=lambda camera: -camera['photographs'])
  ]
  changes = list(dict.fromkeys(changes))
  others = f' and {len(changes) - 2} more' if len(changes) > 2 else ''
  text = f'{report["error_before"]:.2f} px with the given poses, {report["error_after"]:.2f} px now'
  yield 'refinement', 'good', f'{text}; {", ".join(changes[:2])}{others}'


def lines(report: Mapping) -> Iterator[str]:
  """Yields lines for a terminal: movements, and photographs that a person should look at."""
  yield f'Given poses of {report["from"]}, and how far the cameras moved (median, 90%, max):'
  for key, unit, factor in (
    ('rotation_degrees', 'degrees', 1),
    ('position_share', 'percent of the radius', 100),
  ):
    yield '  ' + ', '.join(f'{factor * v:.2f}' for v in report[key].values()) + f' {unit}'
  for row in most_moved(report):
    yield (
      f'   moved  {row["name"]}: {row["rotation_degrees"]:.2f} degrees, '
      f'{row["position_share"]:.1%} of the radius'
    )
  for what, key in (
    ('not verified by matches, given pose kept', 'unverified'),
    ('posed that had no given pose', 'registered'),
    ('given poses without a photograph, left out', 'without_photograph'),
  ):
    if report[key]:
      yield f'  {len(report[key])} {what}: {warnings.some(report[key], 8)}'


def read_report(scene_dir: str) -> dict | None:
  """Returns the report of an earlier `refine.write`, None if the capture's poses are its own."""
  path = os.path.join(scene_dir, FILE)
  return files.read_json(path) if files.is_file(path) else None
