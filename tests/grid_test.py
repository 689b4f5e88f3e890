"""Hash grids: exactness and continuity of lookups, gradients, downweighting and hashing."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite import assert_finite

from internal import coord, structs
from internal.fields import encodings, grid

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
LEVELS = [(4, 128), (7, 512), (6, 64), (512, 1024)]  # (resolution, size): two dense, two hashed.
IDS = ['dense', 'dense_exact', 'hashed', 'hashed_fine']

lookup = jax.jit(grid.lookup, static_argnums=(2, 3))


def _table(resolution, size, features=3):
  rows = min((resolution + 1) ** 3, size)
  return np.float32(RNG.normal(size=(rows, features)))


def _row(vertex, resolution, rows):
  """Returns the table row of a vertex, computed with Python integers."""
  x, y, z = map(int, vertex)
  if (resolution + 1) ** 3 <= rows:
    return x + (resolution + 1) * (y + (resolution + 1) * z)
  return (x ^ (y * 2654435761 % 2**32) ^ (z * 805459861 % 2**32)) % rows


def _twin(table, x, resolution):
  """Interpolates one point by a loop over the corners of its cell."""
  position = np.float64(x) * resolution
  cell = np.minimum(np.floor(position), resolution - 1)
  out = np.zeros(table.shape[1])
  for corner in itertools.product((0, 1), repeat=3):
    weight = np.prod([p - c if up else 1 - (p - c) for p, c, up in zip(position, cell, corner)])
    out += weight * table[_row(cell + corner, resolution, len(table))]
  return out


def _points(n=40):
  """Returns points of the cube, some of them on its vertices, edges and faces."""
  x = RNG.uniform(size=(n, 3))
  x[:8] = list(itertools.product((0, 1), repeat=3))
  x[8:12, 0] = [0, 1, 0.5, 0.25]
  return np.float32(x)


class TestLevels:
  def test_resolutions_are_a_geometric_series(self):
    assert grid.resolutions(10, 16, 8192) == tuple(2**i for i in range(4, 14))
    assert grid.resolutions(3, 10, 1000) == (10, 100, 1000)
    assert grid.resolutions(1, 16, 512) == (16,)

  def test_sizes(self):
    assert grid.table_size(15, 12) == 4096  # Every vertex has its row, to the last.
    assert grid.table_size(14, 12) == 15**3
    assert grid.table_size(16, 12) == 4096


class TestLookup:
  @pytest.mark.parametrize(('resolution', 'size'), LEVELS, ids=IDS)
  def test_matches_a_loop(self, resolution, size):
    table, x = _table(resolution, size), _points()
    expected = [_twin(table, p, resolution) for p in x]
    np.testing.assert_allclose(lookup(table, x, resolution), expected, atol=2e-4)

  def test_is_exact_on_linear_functions(self):
    n, slope = 5, np.array([[1.0, -2.0], [3.0, 0.5], [-1.0, 4.0]])
    vertices = np.array(list(itertools.product(range(n + 1), repeat=3)))
    table = np.zeros(((n + 1) ** 3, 2), np.float32)
    for vertex in vertices:
      table[_row(vertex, n, len(table))] = vertex / n @ slope + 0.7
    x = _points(200)
    np.testing.assert_allclose(lookup(table, x, n), x @ slope + 0.7, atol=1e-5)

  @pytest.mark.parametrize(('resolution', 'size'), LEVELS[:3], ids=IDS[:3])
  def test_is_continuous_across_cells(self, resolution, size):
    table, x = _table(resolution, size), _points()
    step = 1e-5
    for axis in range(3):  # From just before to just after a face, edge or vertex of a cell.
      face = RNG.integers(1, resolution, len(x)) / resolution
      before, after = x.copy(), x.copy()
      before[:, axis], after[:, axis] = face - step, face + step
      change = np.abs(lookup(table, before, resolution) - lookup(table, after, resolution))
      # At most the steepest slope between neighbouring vertices.
      assert np.max(change) < 2 * step * resolution * 2 * np.abs(table).max() + 1e-5

  @pytest.mark.parametrize(('resolution', 'size'), LEVELS, ids=IDS)
  def test_weights_of_a_point_sum_to_one(self, resolution, size):
    rows = grid.table_size(resolution, size.bit_length() - 1)
    np.testing.assert_allclose(lookup(np.ones((rows, 1)), _points(), resolution), 1, rtol=1e-5)

  def test_any_leading_axes(self):
    table, x = _table(6, 64), _points(24)
    flat = lookup(table, x, 6)
    nested = lookup(table, x.reshape(2, 3, 4, 3), 6)
    np.testing.assert_array_equal(nested.reshape(24, 3), flat)


def test_levels_are_computed_apart_and_their_gradients_are_not():
  x = _points()
  f = lambda x: jnp.sum(grid.apart(x) ** 2)  # noqa: E731
  np.testing.assert_array_equal(jax.grad(f)(x), 2 * x)
  assert jax.jit(f).lower(x).as_text().count('optimization_barrier') == 1
  assert jax.jit(jax.grad(f)).lower(x).as_text().count('optimization_barrier') == 1


class TestGradient:
  @pytest.mark.parametrize('deterministic', [False, True])
  @pytest.mark.parametrize(('resolution', 'size'), LEVELS, ids=IDS)
  def test_of_the_table_is_the_transposed_lookup(self, resolution, size, deterministic):
    table, x = _table(resolution, size), _points()
    g = np.float32(RNG.normal(size=(len(x), 3)))
    _, vjp = jax.vjp(lambda t: lookup(t, x, resolution, deterministic), table)
    expected = np.zeros_like(table, np.float64)
    for i in range(len(x)):
      position = np.float64(x[i]) * resolution
      cell = np.minimum(np.floor(position), resolution - 1)
      for corner in itertools.product((0, 1), repeat=3):
        weight = np.prod([p - c if up else 1 - (p - c) for p, c, up in zip(position, cell, corner)])
        expected[_row(cell + corner, resolution, len(table))] += weight * g[i]
    np.testing.assert_allclose(vjp(g)[0], expected, atol=5e-4)

  @pytest.mark.parametrize(('resolution', 'size'), LEVELS[:3], ids=IDS[:3])
  def test_matches_finite_differences(self, resolution, size):
    table = _table(resolution, size)
    cell = RNG.integers(0, resolution, (20, 3))
    x = np.float32((cell + RNG.uniform(0.2, 0.8, (20, 3))) / resolution)  # Away from the kinks.
    weights = np.float32(RNG.normal(size=(20, 3)))

    def total(table, x):
      return jnp.sum(weights * lookup(table, x, resolution))

    slopes = jax.grad(total, (0, 1))(table, x)
    to = np.float32(RNG.normal(size=table.shape))
    difference = total(table + to, x) - total(table, x)  # Linear in the table.
    np.testing.assert_allclose(np.sum(slopes[0] * to), difference, rtol=1e-3, atol=1e-3)
    for axis in range(3):  # And within a cell in each coordinate.
      to = np.zeros((20, 3), np.float32)
      to[:, axis] = 0.1 / resolution * RNG.uniform(-1, 1, 20)
      difference = total(table, x + to) - total(table, x - to)
      np.testing.assert_allclose(np.sum(slopes[1] * to), difference / 2, rtol=1e-2, atol=1e-3)

  def test_of_positions_is_traced_only_if_used(self):
    table, x = jnp.ones((125, 2)), _points()
    total = lambda table, x: jnp.sum(grid.lookup(table, x, 4))  # noqa: E731
    gathers = [
      str(jax.make_jaxpr(f)(table, x)).count(' gather[')
      for f in (total, jax.grad(total), jax.grad(total, (0, 1)))
    ]
    assert gathers[0] == gathers[1] == 8
    assert gathers[2] > 8

  def test_sums_over_points_that_share_a_row(self):
    # A table of one row: every corner of every point adds to it.
    x = _points()
    for deterministic in (False, True):
      total = lambda t, d=deterministic: jnp.sum(lookup(t, x, 8, d))  # noqa: E731
      np.testing.assert_allclose(jax.grad(total)(jnp.zeros((1, 2))), len(x), rtol=1e-5)


@pytest.mark.parametrize('copies', [1, 2, 8])
def test_scatter_add_matches_numpy(copies):
  rows = np.uint32(RNG.integers(0, 50, (300, 8)))
  updates = np.float32(RNG.normal(size=(300, 8, 2)))
  start = np.float32(RNG.normal(size=(64, 2)))
  expected = start.astype(np.float64)
  np.add.at(expected, rows, updates)
  out = grid.scatter_add(jnp.asarray(start), rows, updates, copies)
  np.testing.assert_allclose(out, expected, atol=1e-4)


def test_only_small_tables_are_copied():
  assert grid._copies(17**3) == 32
  assert grid._copies(33**3) == 4
  assert grid._copies(2**18) == grid._copies(2**21) == 1


class TestSortedAdd:
  def test_matches_numpy_and_repeats(self):
    rows = np.uint32(RNG.integers(0, 50, 3000) ** 2 // 50)  # Some rows often, some never.
    updates = np.float32(RNG.normal(size=(3000, 2)))
    start = np.float32(RNG.normal(size=(64, 2)))
    expected = start.astype(np.float64)
    np.add.at(expected, rows, updates)
    add = jax.jit(grid.sorted_add)
    first = add(start, rows, updates)
    np.testing.assert_allclose(first, expected, atol=1e-4)
    np.testing.assert_array_equal(first[50:], start[50:])
    np.testing.assert_array_equal(add(start, rows, updates), first)

  def test_the_last_row_is_written(self):
    out = grid.sorted_add(jnp.zeros((4, 1)), jnp.uint32([3, 3, 0]), jnp.ones((3, 1)))
    np.testing.assert_array_equal(out[:, 0], [1, 0, 0, 2])


class TestHash:
  @pytest.mark.parametrize(('resolution', 'log2_size'), [(32, 12), (64, 14), (256, 14)])
  def test_collisions_are_no_more_frequent_than_by_chance(self, resolution, log2_size):
    """Counts vertices around a sphere (as a surface uses) that share a row with another."""
    u = RNG.normal(size=(10_000, 3))
    x = 0.5 + 0.4 * u / np.linalg.norm(u, axis=-1, keepdims=True)
    vertices = np.unique(np.floor(x * resolution), axis=0)
    rows = {}
    for vertex in vertices:
      rows.setdefault(_row(vertex, resolution, 2**log2_size), []).append(vertex)
    n, size = len(vertices), 2**log2_size
    occupied = size * (1 - (1 - 1 / size) ** n)  # Of balls thrown at random.
    assert len(rows) > 0.95 * occupied
    # And the module's rows are these: a table of row numbers gives them back.
    numbers = np.arange(size, dtype=np.float32)[:, None]
    at_vertices = lookup(numbers, np.float32(vertices / resolution), resolution)[:, 0]
    expected = [_row(v, resolution, size) for v in vertices]
    np.testing.assert_array_equal(at_vertices, expected)


def _random_cov(n, spread):
  """Returns float64 covariances with axes of very different lengths."""
  q = np.linalg.qr(RNG.normal(size=(n, 3, 3)))[0]
  sd = np.exp(RNG.uniform(-spread, 0, (n, 3)))
  return (q * sd[:, None] ** 2) @ np.swapaxes(q, -1, -2), sd


class TestScale:
  scale = staticmethod(jax.jit(grid.isotropic_scale))

  def test_is_the_sixth_root_of_the_determinant(self):
    cov, sd = _random_cov(50, 5.0)
    np.testing.assert_allclose(self.scale(np.float32(cov)), np.prod(sd, -1) ** (1 / 3), rtol=2e-2)
    np.testing.assert_allclose(self.scale(np.float32(4e-8 * np.eye(3))), 2e-4, rtol=1e-5)

  @pytest.mark.parametrize('radius', [0.1, 1.5, 10.0, 100.0])
  def test_of_a_contracted_point_is_scaled_by_the_jacobian(self, radius):
    u = RNG.normal(size=(20, 3))
    mean = jnp.float32(radius * u / np.linalg.norm(u, axis=-1, keepdims=True))
    s = 1e-3 * radius
    cov = jnp.broadcast_to(jnp.float32(s**2 * np.eye(3)), (20, 3, 3))
    _, warped = coord.linearize(coord.contract, mean, cov)
    r = max(radius, 1)
    det = 1 if radius < 1 else (2 * r - 1) ** 2 / r**6  # (1 / r^2) (2 / r - 1 / r^2)^2
    np.testing.assert_allclose(self.scale(warped), s * det ** (1 / 3), rtol=1e-2)

  def test_stays_positive_and_finite(self):
    flat = np.diag([1.0, 1.0, 0.0])
    minus = np.diag([1.0, -1e-7, 1e-3])
    line = np.ones((3, 3))
    awkward = np.stack([np.zeros((3, 3)), flat, minus, line, 1e-30 * np.eye(3), 1e12 * np.eye(3)])
    assert np.all(self.scale(np.float32(awkward)) > 0)
    assert_finite(grid.isotropic_scale, awkward)

  def test_is_bounded_far_away(self):
    # At 1e6, float32 has lost the third axis; what is left is less than the largest.
    u = RNG.normal(size=(100, 3))
    mean = jnp.float32(1e6 * u / np.linalg.norm(u, axis=-1, keepdims=True))
    cov = jnp.broadcast_to(jnp.float32(1e6 * np.eye(3)), (100, 3, 3))
    scale = self.scale(coord.linearize(coord.contract, mean, cov)[1])
    assert np.all((scale > 1e-6) & (scale < 2e-3))


class TestFading:
  def test_matches_the_formula_and_the_mass_of_a_cell(self):
    s = np.float64([0.01, 0.03, 0.1, 1.0])
    expected = [math.erf(1 / math.sqrt(8 * v**2 * 16**2)) for v in s]
    np.testing.assert_allclose(grid.fading(jnp.float32(s), 16), expected, rtol=1e-5)
    z = RNG.normal(size=200_000)
    within = [np.mean(np.abs(z * v) < 0.5 / 16) for v in s]
    np.testing.assert_allclose(expected, within, atol=5e-3)

  def test_goes_from_one_to_zero_as_the_scale_grows(self):
    fade = grid.fading(jnp.float32(np.logspace(-15, 6, 60)), 256)
    assert fade[0] == 1
    assert np.all(np.diff(fade) <= 0)
    assert fade[-1] < 1e-6

  def test_finer_levels_fade_first(self):
    fade = [float(grid.fading(jnp.float32(0.01), n)) for n in (16, 64, 256, 1024)]
    assert fade == sorted(fade, reverse=True)
    assert fade[-1] < 0.05 < 0.9 < fade[0]

  def test_finite(self):
    assert_finite(lambda s: grid.fading(s, 4096), [1e-15, 1e-8, 1.0, 1e10])


class TestCube:
  def test_contracted_space_fills_it(self):
    mean = jnp.float32([[0, 0, 0], [2, -2, 0.5], [1, 1, 1], [-5, 0, 7]])
    x, scale = grid.in_cube(mean, jnp.broadcast_to(0.16**2 * jnp.eye(3), (4, 3, 3)))
    expected = [[0.5, 0.5, 0.5], [1, 0, 0.625], [0.75, 0.75, 0.75], [0, 0.5, 1]]
    np.testing.assert_allclose(x, expected, rtol=1e-6)
    np.testing.assert_allclose(scale, 0.04, rtol=1e-5)


def _grid(**changes):
  settings = {'levels': 3, 'min_resolution': 4, 'max_resolution': 64, 'log2_size': 8, 'features': 2}
  return encodings.HashGrid(**{**settings, **changes})


def _gaussians(shape, s=0.01):
  mean = jnp.float32(RNG.uniform(-1.5, 1.5, (*shape, 3)))
  return structs.Gaussians(mean, jnp.broadcast_to(s**2 * jnp.eye(3), (*shape, 3, 3)))


@functools.cache
def _params(**changes):
  shapes = jax.eval_shape(_grid(**changes).init, KEY, _gaussians((2,)))
  return jax.tree.map(lambda leaf: jnp.float32(RNG.normal(size=leaf.shape)), shapes)


class TestHashGrid:
  def test_tables(self):
    encoding = _grid()
    out, variables = encoding.init_with_output(KEY, _gaussians((5, 7)))
    assert out.shape == (5, 7, encoding.num_features) == (5, 7, 6)
    tables = variables['params']
    assert {k: v.shape for k, v in tables.items()} == {
      'table_0': (125, 2),
      'table_1': (256, 2),
      'table_2': (256, 2),
    }
    for table in tables.values():
      assert table.dtype == jnp.float32
      assert 0.9e-4 < np.abs(table).max() <= 1e-4
      assert abs(np.mean(table)) < 1e-5
    rows = jnp.arange(6.0)
    assert encoding.arrange(rows) is rows

  def test_concatenates_the_faded_lookups(self):
    params, gaussians = _params(), _gaussians((9,))
    out = _grid().apply(params, gaussians)
    for i, n in enumerate((4, 16, 64)):
      table = np.asarray(params['params'][f'table_{i}'])
      x = np.asarray(gaussians.mean) / 4 + 0.5
      fade = np.asarray(grid.fading(jnp.float32(0.01 / 4), n))
      expected = np.stack([_twin(table, p, n) for p in x]) * fade
      np.testing.assert_allclose(out[:, 2 * i : 2 * i + 2], expected, atol=1e-4)

  def test_multisamples_are_faded_separately_and_averaged(self):
    params = _params()
    near, wide = _gaussians((4, 1), 0.01), _gaussians((4, 1), 10.0)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), near, wide)
    out = jax.jit(_grid(multisampled=True).apply)(params, both)
    one, other = (jax.jit(_grid().apply)(params, g)[:, 0] for g in (near, wide))
    np.testing.assert_allclose(out, (one + other) / 2, atol=1e-5)
    assert np.abs(other).max() < 0.3 * np.abs(one).max()

  def test_start_and_gain_of_the_tables(self):
    gaussians = _gaussians((9,))
    plain, start = _grid().init_with_output(KEY, gaussians)
    more, other = _grid(init_bound=1e-5, gain=10.0).init_with_output(KEY, gaussians)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, 0.1 * a, atol=1e-10), start, other)
    np.testing.assert_allclose(more, plain, atol=1e-9)  # A tenth, times ten.
    params = _params()
    wanted = 10 * _grid().apply(params, gaussians)
    np.testing.assert_allclose(_grid(gain=10.0).apply(params, gaussians), wanted, rtol=1e-5)

  @pytest.mark.parametrize('multisampled', [False, True])
  def test_fading_features_follow_each_levels_features(self, multisampled):
    params = _params(fading_features=True)
    scales = params['params']['fading_scale']
    assert scales.shape == (3,)
    encoding = _grid(fading_features=True, multisampled=multisampled)
    near, wide = _gaussians((4, 1), 0.01), _gaussians((4, 1), 0.2)
    gaussians = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), near, wide)
    out = np.asarray(encoding.apply(params, gaussians))
    assert out.shape[-1] == encoding.num_features == 9
    out = out.reshape(*out.shape[:-1], 3, 3)  # [..., level, feature]
    tables = {'params': {k: v for k, v in params['params'].items() if k != 'fading_scale'}}
    plain = np.asarray(_grid(multisampled=multisampled).apply(tables, gaussians))
    np.testing.assert_allclose(out[..., :2].reshape(plain.shape), plain, atol=1e-6)
    for i, n in enumerate((4, 16, 64)):
      weight = np.array([math.erf(1 / (8**0.5 * n * s / 4)) for s in (0.01, 0.2)])
      weight = weight.mean() if multisampled else weight[None]
      np.testing.assert_allclose(out[..., i, 2] - (2 * weight - 1) * scales[i], 0, atol=1e-5)

  def test_fading_features_start_as_large_as_the_tables(self):
    variables = _grid(fading_features=True, init_bound=1e-5, gain=10.0).init(KEY, _gaussians((2,)))
    np.testing.assert_allclose(variables['params']['fading_scale'], 1e-4, rtol=1e-6)

  def test_levels_come_in_one_after_the_other(self):
    grid_ = _grid(coarse_to_fine=0.4, fading_features=True)
    wanted = {0.0: [1, 0, 0], 0.1: [1, 0.5, 0], 0.2: [1, 1, 0], 0.3: [1, 1, 0.5], 0.4: [1] * 3}
    for frac, levels in {**wanted, 1.0: [1] * 3}.items():
      np.testing.assert_allclose(grid_.detail(frac), np.repeat(levels, 3), atol=1e-6)
    assert grid_.detail(0.1).shape == (grid_.num_features,)
    assert _grid().detail(0.1) is None

  def test_large_gaussians_have_no_features(self):
    out = _grid().apply(_params(), _gaussians((9,), 1e5))
    assert np.abs(out).max() < 1e-3

  def test_the_deterministic_gradient_is_the_same(self):
    params, gaussians = _params(), _gaussians((50,))
    weights = jnp.float32(RNG.normal(size=(50, 6)))

    def slope(deterministic):
      encoding = _grid(deterministic=deterministic)
      return jax.jit(jax.grad(lambda p: jnp.sum(weights * encoding.apply(p, gaussians))))(params)

    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), slope(False), slope(True)
    )

  def test_finite(self):
    params = _params()
    mean = [[0.0, 0, 0], [2, 2, 2], [-3, 0, 1e6], [1, 0, 0]]
    cov = np.stack([np.zeros((3, 3)), 1e10 * np.eye(3), np.ones((3, 3)), np.diag([1, 0, 0])])
    assert_finite(lambda m, c: _grid().apply(params, structs.Gaussians(m, c)), mean, cov)


class TestMultisampledIpe:
  def test_features_are_averaged(self):
    gaussians = _gaussians((4, 6), 0.1)
    settings = 0, 3, 'octahedron', 1
    each = encodings.IntegratedPositionalEncoding(*settings)(gaussians)
    out = encodings.IntegratedPositionalEncoding(*settings, multisampled=True)(gaussians)
    np.testing.assert_allclose(out, np.mean(each, -2), atol=1e-6)
