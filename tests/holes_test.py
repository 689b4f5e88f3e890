"""Tests that small holes of meshes are closed, and nothing else."""

import numpy as np

from internal.export import holes


def grid(n):
  """A square of 2 n^2 triangles; vertices [(n + 1)^2]."""
  corner = (np.arange(n)[:, None] * (n + 1) + np.arange(n)).ravel()
  a, b, c, d = corner, corner + 1, corner + n + 1, corner + n + 2
  return np.concatenate([np.stack([a, b, d], -1), np.stack([a, d, c], -1)])


def rim(faces):
  """The directed edges that have no partner in the other direction."""
  edges = [tuple(face[[k, (k + 1) % 3]]) for face in faces for k in range(3)]
  assert len(set(edges)) == len(edges)  # All faces are oriented alike.
  return {(a, b) for a, b in edges if (b, a) not in set(edges)}


def without(faces, vertices):
  return faces[~np.isin(faces, vertices).any(-1)]


def test_a_small_hole_is_closed_and_the_outer_rim_is_not():
  n = 24
  whole = grid(n)
  at = lambda y, x: y * (n + 1) + x  # noqa: E731
  # One vertex, and a block of four by four: loops of 6 and of 18 edges.
  open_ = without(whole, [at(5, 5), *(at(y, x) for y in range(12, 16) for x in range(12, 16))])
  assert len(rim(open_)) == len(rim(whole)) + 6 + 18
  closed = holes.closed(open_, (n + 1) ** 2)
  assert rim(closed) == rim(whole)
  np.testing.assert_array_equal(closed[: len(open_)], open_)
  assert len(closed) == len(open_) + 4 + 16  # A loop of k edges has k - 2 triangles.


def test_holes_that_touch_are_closed_one_by_one():
  n = 30
  whole = grid(n)
  gone = np.isin(np.arange(len(whole)), [10 * n + 10, 11 * n + 11])  # They share a vertex.
  assert len(rim(whole[~gone])) == len(rim(whole)) + 6
  closed = holes.closed(whole[~gone], (n + 1) ** 2)
  assert rim(closed) == rim(whole)
  assert len(closed) == len(whole)


def test_large_holes_and_the_rims_of_small_parts_stay_open():
  n = 30
  whole = grid(n)
  block = [y * (n + 1) + x for y in range(5, 15) for x in range(5, 15)]  # 42 edges around it.
  for faces in (without(whole, block), grid(8)):  # The small part has 32 edges around it.
    np.testing.assert_array_equal(holes.closed(faces, (n + 1) ** 2), faces)
