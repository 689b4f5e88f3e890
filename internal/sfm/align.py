"""How two posings of one capture differ, once one is laid on the other by a similarity."""

from __future__ import annotations

import dataclasses

import numpy as np

from .. import colmap
from ..errors import UserError


@dataclasses.dataclass(frozen=True)
class Similarity:
  """x -> scale * rotation @ x + shift."""

  scale: float
  rotation: np.ndarray  # [3, 3]
  shift: np.ndarray  # [3]

  def __call__(self, points: np.ndarray) -> np.ndarray:
    """Points [..., 3]."""
    return self.scale * points @ self.rotation.T + self.shift


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Of the photographs that both models have; `n` of them, by name."""

  names: tuple[str, ...]
  only_first: tuple[str, ...]
  only_second: tuple[str, ...]
  rotation: np.ndarray  # [n] degrees
  position: np.ndarray  # [n] as a share of the radius
  radius: float  # Of the second model's cameras about their mean: the median distance.
  alignment: Similarity  # From the first model's world to the second's.


def fit(source: np.ndarray, target: np.ndarray) -> Similarity:
  """The similarity that takes points to others with the least sum of squared distances.

  (Umeyama, IEEE TPAMI 13(4), 1991.)

  Args:
    source: [n, 3], not all at one place.
    target: [n, 3].

  Raises:
    ValueError: the points are fewer than three or all at one place.
  """
  if len(source) < 3:
    raise UserError(f'An alignment takes three points or more, got {len(source)}.')
  source_mean, target_mean = source.mean(0), target.mean(0)
  a, b = source - source_mean, target - target_mean
  variance = (a**2).sum() / len(a)
  if variance <= 1e-18 * max(1.0, (source_mean**2).sum()):
    raise UserError('An alignment takes points that are not all at one place.')
  u, singular, vt = np.linalg.svd(b.T @ a / len(a))
  signs = np.array([1, 1, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
  rotation = (u * signs) @ vt
  scale = float((singular * signs).sum() / variance)
  return Similarity(scale, rotation, target_mean - scale * rotation @ source_mean)


def compare(first: colmap.Model, second: colmap.Model) -> Comparison:
  """Lays the first model's cameras on the second's.

  Raises:
    ValueError: they share fewer than three photographs, or all cameras are at one place.
  """
  poses = [{i.name: colmap.camera_to_world(i) for i in m.images.values()} for m in (first, second)]
  names = sorted(poses[0].keys() & poses[1].keys())
  if len(names) < 3:
    raise UserError(
      f'The models share {len(names)} photographs by name, and to compare them takes 3. Are they '
      'of the same pictures?'
    )
  a, b = (np.stack([p[name] for name in names]) for p in poses)
  alignment = fit(a[:, :, 3], b[:, :, 3])
  turned = alignment.rotation @ a[:, :, :3]
  centre = b[:, :, 3].mean(0)
  radius = float(np.median(np.linalg.norm(b[:, :, 3] - centre, axis=-1)))
  away = np.linalg.norm(alignment(a[:, :, 3]) - b[:, :, 3], axis=-1)
  return Comparison(
    names=tuple(names),
    only_first=tuple(sorted(poses[0].keys() - poses[1].keys())),
    only_second=tuple(sorted(poses[1].keys() - poses[0].keys())),
    rotation=np.degrees(_angles(turned, b[:, :, :3])),
    position=away / radius,
    radius=radius,
    alignment=alignment,
  )


def _angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Radians between rotations [n, 3, 3]; exact for small ones, where the arc cosine is not."""
  chord = np.linalg.norm(a - b, axis=(-2, -1))
  return 2 * np.arcsin(np.clip(chord / np.sqrt(8), 0, 1))


def table(comparison: Comparison, worst: int = 5) -> str:
  """The comparison as text in Markdown."""
  rotation, position = comparison.rotation, 100 * comparison.position
  told = [
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
    f'The worst by position: {", ".join(told)}.',
  ]
  return '\n'.join(lines)


def _row(name: str, values: np.ndarray) -> str:
  numbers = np.median(values), np.percentile(values, 90), values.max()
  return f'| {name} | ' + ' | '.join(f'{number:.3f}' for number in numbers) + ' |'


def as_json(comparison: Comparison) -> dict:
  """The errors of each photograph, worst position first, and what was aligned how."""
  rows = zip(comparison.names, comparison.rotation.tolist(), comparison.position.tolist())
  return {
    'radius': comparison.radius,
    'scale': comparison.alignment.scale,
    'rotation': comparison.alignment.rotation.tolist(),
    'shift': comparison.alignment.shift.tolist(),
    'only_first': list(comparison.only_first),
    'only_second': list(comparison.only_second),
    'photographs': [
      {'name': name, 'rotation_degrees': turn, 'position_share_of_radius': away}
      for name, turn, away in sorted(rows, key=lambda row: -row[2])
    ],
  }
