"""Finds photographs and video frames that show the same from the same place.

Bursts, copies and pauses of a video cost time in every stage, and pairs without a baseline make
points uncertain. The sharpest of each group is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

STILL_VIDEO = 0.005  # Movements, as shares of the width, below which a camera stands still.
STILL_BURST = 0.01
_BURST_SECONDS = 2.0  # Between one photograph of a burst and the next.
_SIDE, _BLOCK = 64, 8  # Pixels of a thumbnail and of its blocks.


def thumbnail(pixels: np.ndarray) -> np.ndarray:
  """Reduces uint8 [h, w, 3] to a grey picture [64, 64] with mean 0 and variance 1."""
  small = Image.fromarray(pixels).convert('L').resize((_SIDE, _SIDE), Image.Resampling.BOX)
  grey = np.asarray(small, np.float32)
  return (grey - grey.mean()) / max(float(grey.std()), 1e-3)


def movement(a: np.ndarray, b: np.ndarray) -> float:
  """Returns about how far the picture moved between two thumbnails, as a share of its width.

  For small movements, the difference is the gradient times the movement. It is estimated in blocks;
  the result is the 95th percentile of those with some texture, so that an object that turns before
  a fixed camera counts as movement. Large movements are underestimated.
  """
  down, across = np.gradient((a + b) / 2)
  slope, change = ((down**2 + across**2) / 2, (a - b) ** 2)
  slope, change = (_blocks(values) for values in (slope, change))
  textured = slope > 0.1 * slope.mean()
  if not textured.any():
    return 0.0 if change.mean() < 1e-3 else 1.0
  shifts = np.sqrt(change[textured] / slope[textured])  # Pixels of the thumbnail.
  return float(np.percentile(shifts, 95)) / _SIDE


def _blocks(values: np.ndarray) -> np.ndarray:
  """Returns the means [64] of the blocks of [64, 64]."""
  n = _SIDE // _BLOCK
  return values.reshape(n, _BLOCK, n, _BLOCK).mean((1, 3)).ravel()


def find(
  names: Sequence[str],
  seconds: Mapping[str, float | None],
  cameras: Mapping[str, str],
  paths: Mapping[str, str],
  read: Callable[[str], np.ndarray],
  new: Sequence[str],
) -> list[list[str]]:
  """Returns groups of photographs that repeat each other, each with at least two.

  They are files with equal content, or photographs of one camera taken within two seconds of each
  other, between which next to nothing moves.

  Args:
    names: the photographs.
    seconds: when each was taken, None if unknown.
    cameras: of each photograph.
    paths: its file.
    read: returns its thumbnail.
    new: groups without any of these are left out.
  """
  groups = _copies(names, paths)
  copies = {name for group in groups for name in group[1:]}
  timed = [name for name in names if seconds[name] is not None and name not in copies]
  timed.sort(key=lambda name: (cameras[name], seconds[name]))  # Stable.
  runs = []
  for name in timed:
    last = runs[-1][-1] if runs else None
    close = last is not None and cameras[last] == cameras[name]
    if close and seconds[name] - seconds[last] <= _BURST_SECONDS:
      runs[-1].append(name)
    else:
      runs.append([name])
  for run in runs:
    if len(run) > 1 and set(run) & set(new):
      groups += _still(run, read)
  return [group for group in groups if len(group) > 1 and set(group) & set(new)]


def _still(run: Sequence[str], read: Callable[[str], np.ndarray]) -> list[list[str]]:
  """Splits photographs taken at once into groups without movement from the first of each."""
  groups, first = [], None
  for name in run:
    small = read(name)
    if first is not None and movement(first, small) < STILL_BURST:
      groups[-1].append(name)
    else:
      groups.append([name])
      first = small
  return groups


def _copies(names: Sequence[str], paths: Mapping[str, str]) -> list[list[str]]:
  """Returns groups of files with equal content."""
  by_size, by_content = {}, {}
  for name in names:
    with open(paths[name], 'rb') as f:
      by_size.setdefault(f.seek(0, 2), []).append(name)
  for several in by_size.values():
    for name in several if len(several) > 1 else ():
      with open(paths[name], 'rb') as f:
        by_content.setdefault(hashlib.file_digest(f, 'sha256').digest(), []).append(name)
  return [group for group in by_content.values() if len(group) > 1]
