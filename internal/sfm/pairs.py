"""Chooses the pairs of photographs to match.

`n` photographs have n (n - 1) / 2 pairs, and matching one takes about a twentieth of a second. Up
to `FEW` photographs, or `EXHAUSTIVE` in no order, all pairs are matched. Larger captures match
neighbours in time and photographs that look alike, or only the latter if the photographs are in no
order. Similarity is the dot product of VLAD descriptors (Jegou et al., CVPR 2010). Their vocabulary
comes from the features of the capture itself, so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import scipy.cluster.vq

FEW = 60  # Photographs up to which all pairs are matched.
EXHAUSTIVE = 200  # The same for photographs in no order.
NEIGHBOURS = (1, 2, 3, 4, 6, 8, 12, 16, 32)  # Offsets of the neighbours to match.
ALIKE = 16  # Similar photographs besides the neighbours, in an ordered capture: they close loops.
ALIKE_ALONE = 50  # Similar photographs in an unordered capture.
WORDS = 64  # Size of the vocabulary.
_SAMPLES, _SPREAD = 60_000, 6_000  # Features that the vocabulary is fitted to, and begins with.
_PER_PHOTO = 2048  # Features used of a photograph, largest first.
BLOCK = 12  # A block has the pairs of 12 photographs with 12 others.

Pair = tuple[int, int]


def exhaustive(n: int) -> set[Pair]:
  """Returns all pairs (i, j), i < j < n."""
  return {(i, j) for i in range(n) for j in range(i + 1, n)}


def sequential(n: int) -> set[Pair]:
  """Pairs each photograph with the next four and some later ones, for slowly moving videos."""
  return {(i, i + step) for step in NEIGHBOURS for i in range(n - step)}


def alike(similarity: np.ndarray, count: int) -> set[Pair]:
  """Pairs each photograph with the `count` most similar ones; similarity is [n, n]."""
  similarity = similarity.copy()
  np.fill_diagonal(similarity, -np.inf)
  nearest = np.argsort(-similarity, axis=1, kind='stable')[:, :count]  # [n, count]
  n = len(similarity)
  return {(min(i, j), max(i, j)) for i in range(n) for j in nearest[i].tolist() if i != j}


def is_ordered(similarity: np.ndarray, most: float | None = None) -> bool:
  """Returns whether consecutive photographs look alike, as when someone walks while shooting.

  True if the next photograph is among the `most` most similar ones, for at least half of the
  photographs. The default is a tenth.
  """
  n = len(similarity)
  following = np.diagonal(similarity, 1)  # [n - 1]
  better = (similarity[:-1] > following[:, None]).sum(1) - 1  # [n - 1], without itself.
  return bool(np.median(better) < (max(1, 0.1 * n) if most is None else most))


def similarities(read: Callable[[int], np.ndarray], n: int) -> np.ndarray:
  """Returns the similarity of all photographs, [n, n], 1 on the diagonal.

  Args:
    read: returns the descriptors of photograph i, [features, 128], the most distinctive first.
    n: number of photographs.
  """
  rng = np.random.default_rng(0)
  sample = [_sample(read(i), _SAMPLES // n + 1, rng) for i in range(n)]
  sample = np.concatenate(sample).astype(np.float32)
  if len(sample) < WORDS:
    return np.eye(n)
  few = sample[:: len(sample) // _SPREAD + 1]  # Spreading words takes longer than moving them.
  words, _ = scipy.cluster.vq.kmeans2(few, WORDS, iter=1, minit='++', seed=rng)
  words, _ = scipy.cluster.vq.kmeans2(sample, words, iter=20, minit='matrix')
  vectors = np.stack([_vlad(read(i)[:_PER_PHOTO].astype(np.float32), words) for i in range(n)])
  return vectors @ vectors.T


def _sample(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
  rows = rows[:_PER_PHOTO]
  return rows[rng.permutation(len(rows))[:count]]


def _vlad(descriptors: np.ndarray, words: np.ndarray) -> np.ndarray:
  """Sums the residuals [f, 128] to the nearest word, for each word; returns a flat unit vector."""
  total = np.zeros_like(words)
  if len(descriptors):
    # |d - w|^2 without |d|^2, which is the same for all words.
    nearest = np.argmin((words**2).sum(1) - 2 * descriptors @ words.T, axis=1)  # [f]
    np.add.at(total, nearest, descriptors - words[nearest])
    total /= np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-9)
    total = np.sign(total) * np.sqrt(np.abs(total))  # So that a repeated pattern does not dominate.
  return total.ravel() / max(np.linalg.norm(total), 1e-9)


def in_blocks(pairs: Iterable[Pair]) -> list[Pair]:
  """Sorts pairs so that those of few photographs, whose features COLMAP then keeps, are near."""
  return sorted(pairs, key=lambda pair: (pair[0] // BLOCK, pair[1] // BLOCK, pair))
