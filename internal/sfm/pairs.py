"""Which photographs to match with which.

`n` photographs have n (n - 1) / 2 pairs, each of which costs a twentieth of a second or so. Up to
`EXHAUSTIVE` photographs all are matched. Of more, those that are near in time, and those that look
alike: what a photograph looks like is told by a vector of locally aggregated descriptors (Jegou et
al., CVPR 2010) over the features that are there already, with a vocabulary made of this capture, so
that nothing is downloaded. Where the order of the photographs means nothing, alike ones are all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy.cluster.vq

EXHAUSTIVE = 200  # Photographs.
NEIGHBOURS = (*range(1, 11), 16, 32, 64, 128)  # Which ones after a photograph it is matched with.
ALIKE = 20  # Of an ordered capture, besides the neighbours: these close its loops.
ALIKE_ALONE = 50  # Of a capture without order.
WORDS = 64
_SAMPLES = 60_000
_PER_PHOTO = 2048  # Features of a photograph, the largest ones first.
BLOCK = 12  # A block of pairs is of 12 photographs with 12 others.

Pair = tuple[int, int]


def exhaustive(n: int) -> set[Pair]:
  """All pairs (i, j), i < j < n."""
  return {(i, j) for i in range(n) for j in range(i + 1, n)}


def sequential(n: int) -> set[Pair]:
  """Neighbours, near ones all and far ones sparsely, as those of a slow film tell little."""
  return {(i, i + step) for step in NEIGHBOURS for i in range(n - step)}


def alike(similarity: np.ndarray, count: int) -> set[Pair]:
  """Each photograph with the `count` that are most similar to it; similarity [n, n]."""
  similarity = similarity.copy()
  np.fill_diagonal(similarity, -np.inf)
  nearest = np.argsort(-similarity, axis=1, kind='stable')[:, :count]
  n = len(similarity)
  return {(min(i, j), max(i, j)) for i in range(n) for j in nearest[i].tolist() if i != j}


def is_ordered(similarity: np.ndarray) -> bool:
  """Whether photographs that follow each other look alike, as they do where somebody walked.

  True if the next one is, for most, among the tenth that is most similar.
  """
  n = len(similarity)
  following = np.diagonal(similarity, 1)  # [n - 1]
  better = (similarity[:-1] > following[:, None]).sum(1) - 1  # Itself is one of those.
  return bool(np.median(better) < max(1, 0.1 * n))


def similarities(read: Callable[[int], np.ndarray], n: int) -> np.ndarray:
  """How alike photographs look, [n, n], 1 for one and itself.

  Args:
    read: gives the descriptors of a photograph, [features, 128], the most telling ones first.
    n: photographs.
  """
  rng = np.random.default_rng(0)
  sample = [_some(read(i), _SAMPLES // n + 1, rng) for i in range(n)]
  sample = np.concatenate(sample).astype(np.float32)
  if len(sample) < WORDS:
    return np.eye(n)
  words, _ = scipy.cluster.vq.kmeans2(sample, WORDS, iter=20, minit='++', seed=rng)
  vectors = np.stack([_aggregate(read(i)[:_PER_PHOTO].astype(np.float32), words) for i in range(n)])
  return vectors @ vectors.T


def _some(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
  rows = rows[:_PER_PHOTO]
  return rows[rng.permutation(len(rows))[:count]]


def _aggregate(descriptors: np.ndarray, words: np.ndarray) -> np.ndarray:
  """The sum of the differences from the nearest word, for each word: a unit vector, flattened."""
  total = np.zeros_like(words)
  if len(descriptors):
    # |d - w|^2 without its first term, which does not change which word is the nearest.
    nearest = np.argmin((words**2).sum(1) - 2 * descriptors @ words.T, axis=1)
    np.add.at(total, nearest, descriptors - words[nearest])
    total /= np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-9)
    total = np.sign(total) * np.sqrt(np.abs(total))  # Else bursts of one pattern rule.
  return total.ravel() / max(np.linalg.norm(total), 1e-9)


def blocks(pairs: Sequence[Pair]) -> list[list[Pair]]:
  """The pairs in blocks that concern few photographs each, whose features are then read once."""
  result = {}
  for i, j in sorted(pairs):
    result.setdefault((i // BLOCK, j // BLOCK), []).append((i, j))
  return list(result.values())
