"""How far `refine` moved given poses: aligns them, and judges and lists the differences.

Poses are [n, 3, 4], camera to world, OpenGL axes. The radius of cameras is their median distance
from their mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..system import files, warnings

FILE = 'sparse/refinement.json'
_MOST_MOVED = 8
_FAR_DEGREES, _FAR_SHARE = 3.0, 0.1  # Median movements of poses that were far off.


def radius(poses: np.ndarray) -> float:
  """Returns the median distance of cameras [n, 3, 4] from their mean."""
  centres = poses[:, :, 3]
  return float(np.median(np.linalg.norm(centres - centres.mean(0), axis=-1)))


def align(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
  """Fits the similarity that brings the centres and axes of poses to those of others.

  The centres alone would leave the rotation of an arc about its chord to chance. The third of the
  cameras that differ most does not count.

  Args:
    source: [n, 3, 4], n >= 3.
    target: [n, 3, 4].

  Returns:
    Scale, rotation [3, 3] and shift [3]: x -> scale * rotation @ x + shift (Umeyama, IEEE TPAMI
    13(4), 1991).
  """
  kept = np.arange(len(source))
  for _ in range(3):
    found = _similarity(source[kept], target[kept])
    turned, moved = differences(*transform(source, *found), target)  # [n]
    kept = np.argsort(turned + moved, kind='stable')[: max(3, -(-2 * len(moved) // 3))]
  return found


def transform(poses, scale: float, rotation: np.ndarray, shift: np.ndarray):
  """Applies a similarity to poses [n, 3, 4]; returns rotations [n, 3, 3] and centres [n, 3]."""
  return rotation @ poses[:, :, :3], scale * poses[:, :, 3] @ rotation.T + shift


def differences(rotations: np.ndarray, centres: np.ndarray, target: np.ndarray):
  """Returns how far cameras are from the target [n, 3, 4]: radians, and shares of its radius."""
  chord = np.linalg.norm(rotations - target[:, :, :3], axis=(-2, -1))  # [n]
  moved = np.linalg.norm(centres - target[:, :, 3], axis=-1)  # [n]
  # Accurate for small angles, unlike the arc cosine.
  return 2 * np.arcsin(np.clip(chord / np.sqrt(8), 0, 1)), moved / max(radius(target), 1e-9)


def _similarity(source, target) -> tuple[float, np.ndarray, np.ndarray]:
  a, b = (poses[:, :, 3] - poses[:, :, 3].mean(0) for poses in (source, target))  # [n, 3]
  axes = np.einsum('nij,nkj->ik', target[:, :, :3], source[:, :, :3])
  spread = np.sqrt((a**2).mean() * (b**2).mean())  # Axes as long as the cameras are far apart.
  u, _, vt = np.linalg.svd(b.T @ a + max(spread, 1e-12) * axes)
  rotation = (u * [1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt  # No reflection.
  variance = (a**2).sum()
  scale = float((a @ rotation.T * b).sum() / variance) if variance > 1e-18 else 1.0
  return scale, rotation, target[:, :, 3].mean(0) - scale * rotation @ source[:, :, 3].mean(0)


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
