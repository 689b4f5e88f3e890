"""Closes small holes of a mesh: gaps between what views have seen."""

from __future__ import annotations

import itertools

import numpy as np
from scipy import sparse

LONGEST = 32  # Edges around a hole that is closed. A disc with such a rim has about 160 faces.
_LARGE_PART = 4 * LONGEST**2 // 6  # Of a smaller part, the rim may be the outer one.


def closed(faces: np.ndarray, count: int) -> np.ndarray:
  """Adds faces that close small holes, as fans between the vertices around them.

  A hole is a loop of at most LONGEST edges that have one face each, in a connected part with many
  more faces than the loop could enclose: the rim of a small part is none.

  Args:
    faces: [f, 3] rows of vertices, counter-clockwise from outside.
    count: the number of vertices.

  Returns:
    [f + added, 3] faces, the old ones first. Loops that pass a vertex twice stay open.
  """
  part = parts(faces, count)
  large = np.bincount(part[faces[:, 0]], minlength=count) >= _LARGE_PART  # By part.
  edges = np.concatenate([faces[:, [k, (k + 1) % 3]] for k in range(3)])
  paired = np.isin(edges @ [count, 1], edges[:, ::-1] @ [count, 1])
  rim = edges[~paired]  # Directed as in their faces.
  follow, added = _Follower(faces, rim, count), []
  for first in map(tuple, rim[large[part[rim[:, 0]]]].tolist()):
    loop, edge = [first[0]], follow(first)
    while edge > first and len(loop) < LONGEST:
      loop.append(edge[0])
      edge = follow(edge)
    if edge != first or len(set(loop)) < len(loop):  # Each loop is followed from its least edge.
      continue
    added += [(loop[0], after, before) for before, after in itertools.pairwise(loop[1:])]
  return np.concatenate([faces, np.array(added, faces.dtype).reshape(-1, 3)])


class _Follower:
  """Finds the edge that follows another around a hole."""

  def __init__(self, faces: np.ndarray, rim: np.ndarray, count: int):
    self._next = dict(rim.tolist())
    touched = np.bincount(rim[:, 0], minlength=count) > 1  # Vertices where holes touch.
    self._ends = {v: rim[rim[:, 0] == v, 1].tolist() for v in np.flatnonzero(touched).tolist()}
    near = faces[touched[faces].any(-1)].tolist()
    self._third = {(face[k - 2], face[k - 1]): face[k] for face in near for k in range(3)}

  def __call__(self, edge: tuple[int, int]) -> tuple[int, int]:
    a, b = edge
    if b not in self._ends:
      return b, self._next[b]
    c = self._third[a, b]
    while (c, b) in self._third:  # Turns about b, over faces, to the edge of another hole.
      c = self._third[c, b]
    others = [end for end in self._ends[b] if end != c]
    return (b, others[0]) if len(others) == 1 else (-1, -1)  # Of three holes: stays open.


def parts(faces: np.ndarray, count: int) -> np.ndarray:
  """Returns the number of the connected part of each of `count` vertices."""
  edges = np.concatenate([faces[:, :2], faces[:, 1:]])  # Two of three edges suffice.
  graph = sparse.coo_matrix((np.ones(len(edges), bool), tuple(edges.T)), (count, count))
  return sparse.csgraph.connected_components(graph, directed=False)[1]
