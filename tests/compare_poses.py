"""Compares the camera poses of two COLMAP models of the same photographs.

    python tests/compare_poses.py A/sparse/0 B/sparse/0 [--json out.json]

The models may be .bin or .txt. A is aligned to B by the similarity that brings their cameras
closest, without the third that differs most (`internal.alignment`). Position errors are in percent
of the radius, which is the median distance of B's cameras from their mean.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from internal import alignment, cli, colmap
from internal.errors import UserError
from internal.evaluation import results


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Errors of the `n` photographs that both models have."""

  names: tuple[str, ...]
  only_first: tuple[str, ...]
  only_second: tuple[str, ...]
  rotation: np.ndarray  # [n] degrees
  position: np.ndarray  # [n] as a fraction of the radius
  radius: float  # Median distance of the second model's cameras from their mean.
  alignment: alignment.Similarity  # From the first model's world to the second's.


def compare(first: colmap.Model, second: colmap.Model) -> Comparison:
  """Aligns the first model's cameras to the second's and computes their errors."""
  poses = [{i.name: colmap.camera_to_world(i) for i in m.images.values()} for m in (first, second)]
  names = sorted(poses[0].keys() & poses[1].keys())
  if len(names) < 3:
    raise UserError(
      f'The models share {len(names)} photographs by name; a comparison needs at least 3. Are they '
      'models of the same photographs?'
    )
  a, b = (np.stack([p[name] for name in names]) for p in poses)  # [n, 3, 4]
  found = alignment.align(a, b)
  rotation, position = alignment.differences(*alignment.transform(a, *found), b)
  return Comparison(
    names=tuple(names),
    only_first=tuple(sorted(poses[0].keys() - poses[1].keys())),
    only_second=tuple(sorted(poses[1].keys() - poses[0].keys())),
    rotation=np.degrees(rotation),
    position=position,
    radius=alignment.radius(b),
    alignment=found,
  )


def table(comparison: Comparison, worst: int = 5) -> str:
  """Formats a comparison as Markdown."""
  rotation, position = comparison.rotation, 100 * comparison.position
  outliers = [
    f'{comparison.names[k]} ({position[k]:.2f}%, {rotation[k]:.2f} degrees)'
    for k in np.argsort(-position)[:worst]
  ]
  lines = [
    f'{len(comparison.names)} photographs in both, {len(comparison.only_first)} only in the first, '
    f'{len(comparison.only_second)} only in the second.',
    '',
    '| | median | 90% | max |',
    '|---|---|---|---|',
    _row('rotation, degrees', rotation),
    _row('position, % of the radius', position),
    '',
    f'The worst by position: {", ".join(outliers)}.',
  ]
  return '\n'.join(lines)


def _row(name: str, values: np.ndarray) -> str:
  numbers = np.median(values), np.percentile(values, 90), values.max()
  return f'| {name} | ' + ' | '.join(f'{number:.3f}' for number in numbers) + ' |'


def as_json(comparison: Comparison) -> dict:
  """Returns the alignment, and the errors of each photograph, worst position first."""
  rows = zip(comparison.names, comparison.rotation.tolist(), comparison.position.tolist())
  scale, turn, shift = comparison.alignment
  return {
    'radius': comparison.radius,
    'scale': scale,
    'rotation': turn.tolist(),
    'shift': shift.tolist(),
    'only_first': list(comparison.only_first),
    'only_second': list(comparison.only_second),
    'photographs': [
      {'name': name, 'rotation_degrees': rotation, 'position_share_of_radius': position}
      for name, rotation, position in sorted(rows, key=lambda row: -row[2])
    ],
  }


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__)
  parser.add_argument('first', metavar='A', help='folder of the model to align')
  parser.add_argument('second', metavar='B', help='folder of the reference model')
  parser.add_argument('--json', metavar='FILE', help='also write the errors of each photograph')
  args = parser.parse_args(argv)
  comparison = compare(colmap.read_model(args.first), colmap.read_model(args.second))
  print(table(comparison))
  if args.json:
    results.write_json(args.json, as_json(comparison))


if __name__ == '__main__':
  cli.run(main)
