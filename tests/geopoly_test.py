"""The basis: unit directions, without duplicates or antipodes, evenly spread over a hemisphere."""

import numpy as np
import pytest

from internal import geopoly

# A solid with triangular faces whose edges are split in k has V = 2 + F k^2 / 2 vertices (Euler:
# F k^2 triangles, 3/2 as many edges). Solids that are their own mirror image through the centre
# keep V / 2: icosahedron (F = 20) 5 k^2 + 1, octahedron (F = 8) 2 k^2 + 1. Of the tetrahedron's
# four vertices none are opposite, of its six edges' midpoints all: 4, then 4 + 3.
COUNTS = [
  ('icosahedron', 1, 6),
  ('icosahedron', 2, 21),
  ('icosahedron', 3, 46),
  ('octahedron', 1, 3),
  ('octahedron', 2, 9),
  ('octahedron', 3, 19),
  ('tetrahedron', 1, 4),
  ('tetrahedron', 2, 7),
]


@pytest.mark.parametrize(('shape', 'subdivisions', 'count'), COUNTS)
def test_directions_are_unit_and_distinct(shape, subdivisions, count):
  basis = geopoly.generate_basis(shape, subdivisions)
  assert basis.shape == (3, count)
  np.testing.assert_allclose(np.linalg.norm(basis, axis=0), 1, atol=1e-10)
  cosines = np.abs(basis.T @ basis) - np.eye(count)
  assert np.max(cosines) < 0.99  # Neither repeated nor antipodal.


@pytest.mark.parametrize(('shape', 'subdivisions', 'count'), COUNTS)
def test_basis_is_a_tight_frame(shape, subdivisions, count):
  # The lines are mapped onto themselves by the solid's rotations, whose only invariant quadratic
  # form is the sphere: P P^T is a multiple of I, and its trace is the number of unit columns.
  basis = geopoly.generate_basis(shape, subdivisions)
  np.testing.assert_allclose(basis @ basis.T, count / 3 * np.eye(3), atol=1e-9)


def test_octahedron_is_the_axes():
  np.testing.assert_array_equal(geopoly.generate_basis('octahedron', 1), np.eye(3))


def test_nearest_directions_of_the_default_basis():
  # A vertex of the icosahedron and the midpoint of an edge at it are half an edge apart, and the
  # edge's angle is arctan 2: 31.717 degrees. Every direction has such a neighbour.
  basis = geopoly.generate_basis('icosahedron', 2)
  cosines = np.abs(basis.T @ basis) - np.eye(21)
  nearest = np.arccos(np.max(cosines, 0))
  np.testing.assert_allclose(nearest, np.arctan(2) / 2, atol=1e-9)


def test_basis_is_deterministic():
  a, b = (geopoly.generate_basis('icosahedron', 2) for _ in range(2))
  np.testing.assert_array_equal(a, b)


def test_invalid_arguments_raise():
  with pytest.raises(ValueError, match='icosahedron, octahedron or tetrahedron'):
    geopoly.generate_basis('cube', 1)
  with pytest.raises(ValueError, match='at least 1, got 0'):
    geopoly.generate_basis('icosahedron', 0)
