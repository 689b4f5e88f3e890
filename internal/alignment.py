"""Aligns the poses of the same cameras in two worlds, and moves other cameras along.

Poses are [n, 3, 4], camera to world, OpenGL axes. A similarity is a scale, a rotation [3, 3] and a
shift [3]: x -> scale * rotation @ x + shift. The radius of cameras is their median distance from
their mean.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import transform as transforms

Similarity = tuple[float | np.ndarray, np.ndarray, np.ndarray]

_NEIGHBOURS = (32, 16, 8)  # Choices for `follow`, besides all cameras.


def radius(poses: np.ndarray) -> float:
  """Returns the median distance of cameras [n, 3, 4] from their mean."""
  centres = poses[:, :, 3]
  return float(np.median(np.linalg.norm(centres - centres.mean(0), axis=-1)))


def distances(poses: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns how far cameras [m, 3, 4] are from others [n, 3, 4], two arrays [m, n].

  The distances of the positions are in radii of the others. Those of the unit viewing directions
  are chords: 2 between opposite ones.
  """
  position, axis = (
    np.linalg.norm(poses[:, None, :, column] - known[:, :, column], axis=-1) for column in (3, 2)
  )
  return position / max(radius(known), 1e-9), axis


def align(source: np.ndarray, target: np.ndarray) -> Similarity:
  """Fits the similarity that brings the centres and axes of poses to those of others.

  The centres alone would leave the rotation of an arc about its chord to chance. The third of the
  cameras that differ most does not count.

  Args:
    source: [n, 3, 4], n >= 3.
    target: [n, 3, 4].

  Returns:
    Scale, rotation [3, 3] and shift [3] (Umeyama, IEEE TPAMI 13(4), 1991).
  """
  kept = np.arange(len(source))
  for _ in range(3):
    found = _similarity(source[kept], target[kept])
    turned, moved = differences(*transform(source, *found), target)  # [n]
    kept = np.argsort(turned + moved, kind='stable')[: max(3, -(-2 * len(moved) // 3))]
  return float(found[0]), *found[1:]


def transform(poses, scale: float, rotation: np.ndarray, shift: np.ndarray):
  """Applies a similarity to poses [n, 3, 4]; returns rotations [n, 3, 3] and centres [n, 3]."""
  return rotation @ poses[:, :, :3], scale * poses[:, :, 3] @ rotation.T + shift


def differences(rotations: np.ndarray, centres: np.ndarray, target: np.ndarray):
  """Returns how far cameras are from the target [n, 3, 4]: radians, and shares of its radius."""
  chord = np.linalg.norm(rotations - target[:, :, :3], axis=(-2, -1))  # [n]
  moved = np.linalg.norm(centres - target[:, :, 3], axis=-1)  # [n]
  # Accurate for small angles, unlike the arc cosine.
  return 2 * np.arcsin(np.clip(chord / np.sqrt(8), 0, 1)), moved / max(radius(target), 1e-9)


def _similarity(source: np.ndarray, target: np.ndarray) -> Similarity:
  """Fits a similarity to all poses [..., n, 3, 4]: scale [...], rotation and shift."""
  a, b = (poses[..., 3] - poses[..., 3].mean(-2, keepdims=True) for poses in (source, target))
  axes = np.einsum('...nij,...nkj->...ik', target[..., :3], source[..., :3])
  spread = np.sqrt((a**2).mean((-2, -1)) * (b**2).mean((-2, -1)))
  # Axes as long as the cameras are far apart.
  u, _, vt = np.linalg.svd(
    b.swapaxes(-1, -2) @ a + np.maximum(spread, 1e-12)[..., None, None] * axes
  )
  signs = np.ones(u.shape[:-1])
  signs[..., 2] = np.sign(np.linalg.det(u @ vt))  # No reflection.
  rotation = (u * signs[..., None, :]) @ vt
  variance = (a**2).sum((-2, -1))
  along = (np.einsum('...ni,...ji->...nj', a, rotation) * b).sum((-2, -1))
  scale = np.where(variance > 1e-18, along / np.maximum(variance, 1e-18), 1.0)
  centres = [poses[..., 3].mean(-2) for poses in (source, target)]
  shift = centres[1] - scale[..., None] * np.einsum('...ij,...j->...i', rotation, centres[0])
  return scale, rotation, shift


def follow(source: np.ndarray, target: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, int]:
  """Moves other cameras as their neighbours have moved from source to target.

  Where cameras have moved together, as after a drift that has been closed, a camera follows its
  nearest neighbours; where each has moved on its own, it follows all cameras. The number of
  neighbours is the one with which the moved cameras predict each other best. What cameras then
  still have in common in their own axes, moves the others too: where a principal point has moved,
  all cameras turn, and pictures hardly change.

  Args:
    source: [n, 3, 4] cameras before they moved, n >= 3.
    target: [n, 3, 4] the same cameras after.
    others: [m, 3, 4] cameras in the world of `source`.

  Returns:
    The other cameras' poses [m, 3, 4] in the world of `target`, and the number of neighbours that
    they follow; n if they follow the similarity of all (`align`).
  """
  turn, shift = _in_common(*transform(source, *align(source, target)), target)
  bare = _without(target, turn, shift)
  whole = align(source, bare)
  error, count = _mean_difference(transform(source, *whole), bare), len(source)
  nearest = _nearest(source, source)[:, 1:]  # [n, n - 1], without the camera itself.
  for k in (k for k in _NEIGHBOURS if k < len(source)):
    found = _local(source, bare, nearest[:, :k], source)
    if (local := _mean_difference(found, bare)) < error:
      error, count = local, k
  if count == len(source):
    rotations, centres = transform(others, *whole)
  else:
    rotations, centres = _local(source, bare, _nearest(others, source)[:, :count], others)
  return np.concatenate([rotations @ turn, (centres + rotations @ shift)[..., None]], -1), count


def _in_common(rotations: np.ndarray, centres: np.ndarray, target: np.ndarray):
  """Returns the rotation [3, 3] and shift [3], in camera axes, that most cameras have in common.

  They are fitted together with a similarity of the world, which takes its own part of the
  differences: all are small, so this is a linear problem.

  Args:
    rotations: [n, 3, 3], close to those of the target.
    centres: [n, 3]
    target: [n, 3, 4]
  """
  n, size = len(target), max(radius(target), 1e-9)
  inverse = rotations.swapaxes(-1, -2)
  turned = transforms.Rotation.from_matrix(inverse @ target[:, :, :3]).as_rotvec()
  moved = inverse @ (target[:, :, 3] - centres)[..., None] / size
  at = (centres - centres.mean(0)) / size
  # The world turns and grows about the mean of the cameras, and moves; then the cameras' own axes.
  arm = inverse @ np.cross(np.eye(3)[None], at[:, None]).swapaxes(-1, -2)
  eye, zero = np.broadcast_to(np.eye(3), (n, 3, 3)), np.zeros((n, 3, 3))
  about_turns = np.concatenate([inverse, zero[..., :1], zero, eye, zero], -1)  # [n, 3, 13]
  about_moves = np.concatenate([arm, inverse @ at[..., None], inverse, zero, eye], -1)
  rows = np.stack([about_turns, about_moves], 1)  # [n, 2, 3, 13]
  values = np.stack([turned, moved[..., 0]], 1)  # [n, 2, 3]
  kept = np.arange(n)
  for _ in range(3):
    found = np.linalg.lstsq(rows[kept].reshape(-1, 13), values[kept].ravel(), rcond=1e-6)[0]
    error = np.linalg.norm(rows @ found - values, axis=-1).sum(-1)
    kept = np.argsort(error, kind='stable')[: max(5, -(-2 * n // 3))]
  return transforms.Rotation.from_rotvec(found[7:10]).as_matrix(), size * found[10:]


def _without(poses: np.ndarray, turn: np.ndarray, shift: np.ndarray) -> np.ndarray:
  """Undoes a rotation and a shift in camera axes."""
  rotations = poses[:, :, :3] @ turn.T
  return np.concatenate([rotations, poses[:, :, 3:] - rotations @ shift[:, None]], -1)


def _mean_difference(found: tuple[np.ndarray, np.ndarray], target: np.ndarray) -> float:
  turned, moved = differences(*found, target)
  return float(np.mean(turned + moved))


def _nearest(poses: np.ndarray, known: np.ndarray) -> np.ndarray:
  """Returns the rows of the known cameras [n], nearest first, for each of the poses: [m, n]."""
  return np.argsort(sum(distances(poses, known)), axis=1, kind='stable')


def _local(source, target, rows, poses) -> tuple[np.ndarray, np.ndarray]:
  """Moves each pose [m, 3, 4] by the similarity of its own cameras, rows [m, k] of source."""
  scale, rotation, shift = _similarity(source[rows], target[rows])
  centres = np.einsum('mij,mj->mi', rotation, poses[:, :, 3])
  return rotation @ poses[:, :, :3], scale[:, None] * centres + shift
