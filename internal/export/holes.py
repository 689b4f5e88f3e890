"""Closes small holes of a mesh: gaps between what views have seen."""

from __future__ import annotations

import itertools

import numpy as np
from scipy import sparse

LONGEST = 32  # Edges around a hole that is closed. A disc with such a rim has about 160 faces.
_LARGE_PART = 4 * LONGEST**2 // 6  # Faces of a part that is no such disc itself, but has a hole.


def closed(faces: np.ndarray, count: int) -> np.ndarray:
  """Adds faces that close small holes, as fans between the vertices around them.

  A hole is a loop of at most LONGEST edges that have one face each, in a connected part with many
  more faces than the loop could enclose: the rim of a small part is none.

  Args:
    faces: [f, 3] rows of vertices, counter-clockwise from outside.
    count: the number of vertices.

  Returns:
    [f + added, 3] faces, the old ones first. Loops that touch themselves or others stay open.
  """
  part = parts(faces, count)
  large = np.bincount(part[faces[:, 0]], minlength=count) >= _LARGE_PART  # By part.
  edges = np.concatenate([faces[:, [k, (k + 1) % 3]] for k in range(3)])
  paired = np.isin(edges @ [count, 1], edges[:, ::-1] @ [count, 1])
  rim = edges[~paired]  # Directed as in their faces.
  follower = dict(rim.tolist())
  clear = np.bincount(rim[:, 0], minlength=count) == 1
  added = []
  for start in np.flatnonzero(clear & large[part]).tolist():
    loop, vertex = [start], follower[start]
    while clear[vertex] and vertex > start and len(loop) < LONGEST:
      loop.append(vertex)
      vertex = follower[vertex]
    if vertex != start:  # Each loop is followed from its least vertex.
      continue
    added += [(start, after, before) for before, after in itertools.pairwise(loop[1:])]
  return np.concatenate([faces, np.array(added, faces.dtype).reshape(-1, 3)])


def parts(faces: np.ndarray, count: int) -> np.ndarray:
  """Returns the number of the connected part of each of `count` vertices."""
  edges = np.concatenate([faces[:, :2], faces[:, 1:]])  # Two of three edges suffice.
  graph = sparse.coo_matrix((np.ones(len(edges), bool), tuple(edges.T)), (count, count))
  return sparse.csgraph.connected_components(graph, directed=False)[1]
