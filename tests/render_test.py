"""Gaussians of frusta against integrals; compositing against loops and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite import assert_finite

from internal import render

ORIGIN, DIRECTION = np.array([0.5, -1.0, 2.0]), np.array([0.6, -1.1, -1.7])


def _integrate(t0, t1, origin, direction, radius, shape):
  """Computes mean and covariance of a solid by quadrature, exact for polynomial moments.

  Gauss-Legendre along the axis and in the square of the distance from it, 8 angles around.
  """
  node, weight = np.polynomial.legendre.leggauss(6)
  t = (t0 + t1) / 2 + (t1 - t0) / 2 * node
  size = radius * (t if shape == 'cone' else np.ones_like(t))  # Of the disc at t.
  axis = direction / np.linalg.norm(direction)
  u = np.linalg.svd(axis[None])[2][1:]  # Two unit vectors across.
  points, mass = [], []
  for tk, sk, wk in zip(t, size, weight):
    for q, wq in zip((node + 1) / 2, weight):
      for angle in np.arange(8) * np.pi / 4:
        across = np.sqrt(q) * sk * (np.cos(angle) * u[0] + np.sin(angle) * u[1])
        points.append(origin + tk * direction + across)
        mass.append(wk * wq * sk**2)  # The disc's area.
  points, mass = np.array(points), np.array(mass) / np.sum(mass)
  mean = mass @ points
  off = points - mean
  return mean, (mass[:, None] * off).T @ off


cast = jax.jit(render.cast_rays, static_argnums=4)


class TestCastRays:
  @pytest.mark.parametrize('shape', ['cone', 'cylinder'])
  def test_matches_integrals_over_the_solid(self, shape):
    tdist = np.array([0.0, 0.4, 1.5, 1.6, 9.0])
    g = cast(*map(jnp.float32, (tdist, ORIGIN, DIRECTION, [0.3])), shape)
    for i in range(4):
      mean, cov = _integrate(tdist[i], tdist[i + 1], ORIGIN, DIRECTION, 0.3, shape)
      np.testing.assert_allclose(g.mean[i], mean, rtol=1e-5, atol=1e-5)
      np.testing.assert_allclose(g.cov[i], cov, rtol=1e-4, atol=1e-5)

  def test_matches_points_drawn_from_the_cone(self):
    # An independent check: uniform points of a box that lie inside the cone.
    rng = np.random.default_rng(0)
    p = rng.uniform([-0.8, -0.8, 0], [0.8, 0.8, 2], (400_000, 3))
    p = p[(p[:, 2] > 1) & (np.hypot(p[:, 0], p[:, 1]) < 0.4 * p[:, 2])]
    tdist, axis = jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0, 1.0])
    g = cast(tdist, jnp.zeros(3), axis, jnp.array([0.4]), 'cone')
    np.testing.assert_allclose(g.mean[0], p.mean(0), atol=4e-3)
    np.testing.assert_allclose(g.cov[0], np.cov(p.T), atol=2e-3)

  def test_golden_cone_from_its_apex(self):
    # Height 1, radius r: density 3 t^2, E t = 3/4, Var t = 3/5 - 9/16 = 3/80, and across
    # E[(r t)^2 / 4] = 3 r^2 / 20.
    args = jnp.array([0.0, 1.0]), jnp.zeros(3), jnp.array([0.0, 0.0, 1.0]), jnp.array([2.0])
    g = cast(*args, 'cone')
    np.testing.assert_allclose(g.mean[0], [0, 0, 0.75], rtol=1e-6)
    np.testing.assert_allclose(g.cov[0], np.diag([0.6, 0.6, 3 / 80]), rtol=1e-5)

  def test_shapes_and_positive_covariance(self):
    rng = np.random.default_rng(1)
    tdist = np.cumsum(rng.uniform(size=(2, 5, 9)), -1)
    args = tdist, rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5, 3)), np.full((2, 5, 1), 0.1)
    g = cast(*map(jnp.float32, args), 'cone')
    assert g.mean.shape == (2, 5, 8, 3)
    assert g.cov.shape == (2, 5, 8, 3, 3)
    np.testing.assert_allclose(g.cov, np.swapaxes(g.cov, -1, -2), atol=1e-6)
    assert np.all(np.linalg.eigvalsh(np.asarray(g.cov, np.float64)) > -1e-6)

  def test_thin_and_far_frusta_are_accurate(self):
    # Differences of powers, such as t1^3 - t0^3 at t = 1e6, would cancel in float32.
    for t0, t1 in ((1e6 - 8, 1e6), (1e5, 1e6), (1000, 1000.25), (1e-3, 1.001e-3)):
      t0, t1 = np.float32(t0), np.float32(t1)
      args = np.array([t0, t1]), np.zeros(3), np.array([0, 0, 1]), np.array([1e-3])
      g = cast(*map(jnp.float32, args), 'cone')
      mean, cov = _integrate(float(t0), float(t1), np.zeros(3), args[2], 1e-3, 'cone')
      np.testing.assert_allclose(g.mean[0], mean, rtol=1e-6, atol=1e-12)
      np.testing.assert_allclose(np.diag(g.cov[0]), np.diag(cov), rtol=1e-4)

  def test_an_unknown_shape_raises(self):
    with pytest.raises(ValueError, match=r"cone, cylinder, got 'box'"):
      render.cast_rays(jnp.zeros(2), jnp.zeros(3), jnp.ones(3), jnp.ones(1), 'box')

  @pytest.mark.parametrize('shape', ['cone', 'cylinder'])
  def test_finite(self, shape):
    def gaussians(*args):
      return render.cast_rays(*args, shape)

    tdist = [0.0, 0.0, 1e-12, 1.0, 1.0, 1e6, 1e6]
    directions = [[0, 0, -1], [0, 0, 0], [1e-3, 0, 0]]
    radii = [[0.0], [1e-3], [1.0]]
    assert_finite(gaussians, [tdist] * 3, np.zeros((3, 3)), directions, radii)


def _composite(density, tdist, direction, opaque):
  """Composites one ray by a loop, in float64."""
  lengths = np.diff(tdist) * np.linalg.norm(direction)
  if opaque:
    lengths[-1] = np.inf
  light, out = 1.0, []
  for sigma, length in zip(density, lengths):
    passed = 0.0 if np.isinf(length) else np.exp(-sigma * length)
    out.append(light * (1 - passed))
    light *= passed
  return np.array(out)


AWKWARD_DENSITY = [[0.0] * 4, [1e10] * 4, [1e30] * 4, [0, 1e30, 0, 0], [1e-30] * 4, [0, 0, 0, 1e10]]
AWKWARD_TDIST = [[0.2, 0.2, 1.0, 1e6, 1e6], [0, 0, 0, 0, 0], [0.0, 1.0, 2.0, 3.0, 1e6]]


def test_the_gradient_scale_is_the_square_of_the_distance_up_to_1():
  tdist = jnp.float32([[0, 0.2, 0.4, 1.6, 1e6], [0, 0, 1, 2, 3]])
  directions = jnp.float32([[0, 3, 4], [0, 0, 0]])
  scale = render.gradient_scale(tdist, directions, 2.0)
  # Distances 0.5, 1.5, 5 and 2.5e6; and nothing along a ray without a direction.
  np.testing.assert_allclose(scale, [[0.25**2, 0.75**2, 1, 1], [0] * 4], rtol=1e-6)
  assert_finite(lambda *a: render.gradient_scale(*a, 2.0), tdist[:1], directions[:1])


class TestAlphaWeights:
  def test_a_zero_direction_has_zero_weights_and_gradient(self):
    def total(directions):
      return jnp.sum(
        render.compute_alpha_weights(jnp.ones((1, 4)), jnp.arange(5.0)[None], directions)
      )

    value, gradient = jax.value_and_grad(total)(jnp.zeros((1, 3)))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)

  @pytest.mark.parametrize('opaque', [False, True])
  def test_matches_a_loop(self, opaque):
    rng = np.random.default_rng(2)
    density = rng.exponential(size=(10, 8)) * 2
    tdist = np.cumsum(rng.uniform(size=(10, 9)), -1)
    directions = rng.normal(size=(10, 3))
    w = render.compute_alpha_weights(*map(jnp.float32, (density, tdist, directions)), opaque)
    expected = [_composite(*row, opaque) for row in zip(density, tdist, directions)]
    np.testing.assert_allclose(w, expected, atol=1e-6)

  def test_golden(self):
    # A homogeneous medium, optical depth 0.5 an interval: e^(-i/2) - e^(-(i+1)/2). The direction's
    # norm 2 makes lengths of 0.5 out of t's 0.25.
    w = render.compute_alpha_weights(
      jnp.ones(4), jnp.linspace(0, 1, 5), jnp.array([0.0, 0.0, -2.0]), False
    )
    edges = np.exp(-0.5 * np.arange(5))
    np.testing.assert_allclose(w, edges[:-1] - edges[1:], rtol=1e-5)

  def test_thin_media_are_accurate(self):
    w = render.compute_alpha_weights(
      jnp.full(2, 1e-9), jnp.arange(3.0), jnp.array([0.0, 0.0, 1.0]), False
    )
    np.testing.assert_allclose(w, 1e-9, rtol=1e-5)  # 1 - exp(-1e-9) is 0 in float32.

  def test_sum_of_weights(self):
    density = np.repeat(AWKWARD_DENSITY, 3, 0)
    tdist = np.tile(AWKWARD_TDIST, (6, 1))
    args = jnp.float32(density), jnp.float32(tdist), jnp.zeros((18, 3)).at[:, 2].set(-1)
    for opaque in (False, True):
      w = np.asarray(render.compute_alpha_weights(*args, opaque))
      assert np.all(w >= 0)
      assert np.all(w.sum(-1) <= 1 + 1e-6)
      if opaque:
        np.testing.assert_allclose(w.sum(-1), 1, rtol=1e-6)

  @pytest.mark.parametrize('opaque', [False, True])
  def test_finite(self, opaque):
    def weights(density, tdist):
      directions = jnp.broadcast_to(jnp.array([0.0, 0.0, -1.0]), (18, 3))
      return render.compute_alpha_weights(density, tdist, directions, opaque)

    assert_finite(weights, np.repeat(AWKWARD_DENSITY, 3, 0), np.tile(AWKWARD_TDIST, (6, 1)))


draw = jax.jit(render.volumetric_rendering)


class TestVolumetricRendering:
  def test_matches_sums_in_float64(self):
    rng = np.random.default_rng(3)
    n, far = 7, 30.0
    tdist = np.cumsum(rng.uniform(size=(20, n + 1)), -1)
    weights = rng.uniform(size=(20, n))
    weights *= (rng.uniform(size=20) / weights.sum(-1))[:, None]  # Opacities from 0 to 1.
    rgb, background = rng.uniform(size=(20, n, 3)), rng.uniform(size=(20, 1))
    out = draw(*map(jnp.float32, (rgb, weights, tdist, background, far)))
    for i in range(20):
      acc = weights[i].sum()
      colour = weights[i] @ rgb[i] + (1 - acc) * background[i]
      middle = (tdist[i, 1:] + tdist[i, :-1]) / 2
      np.testing.assert_allclose(out.rgb[i], colour, atol=1e-5)
      np.testing.assert_allclose(out.acc[i], acc, rtol=1e-5)
      mean = np.exp(weights[i] @ np.log(middle) / acc)
      np.testing.assert_allclose(out.distance_mean[i], mean, rtol=1e-4)
      cdf = np.concatenate([[0], np.cumsum(weights[i]), [1]])  # The last bin: what is missing.
      expected = np.interp([0.05, 0.5, 0.95], cdf, [*tdist[i], far])
      np.testing.assert_allclose(out.distance_percentiles[i], expected, rtol=1e-3)

  def test_an_empty_ray_shows_the_background_at_the_far_plane(self):
    out = draw(jnp.ones((4, 3)), jnp.zeros(4), jnp.linspace(2.0, 6.0, 5), jnp.full(1, 0.3), 6.0)
    np.testing.assert_allclose(out.rgb, 0.3, rtol=1e-6)
    np.testing.assert_array_equal([out.acc, out.distance_mean], [0, 6])
    np.testing.assert_array_equal(out.distance_percentiles, [6, 6, 6])

  def test_opaque_bin(self):
    # All weight in [4, 5]: its colour, mean 4.5, percentiles 4.05, 4.5, 4.95.
    rgb = jnp.eye(3)[jnp.array([0, 1, 2])]
    tdist = jnp.array([3.0, 4.0, 5.0, 6.0])
    out = draw(rgb, jnp.array([0.0, 1.0, 0.0]), tdist, jnp.ones(1), 6.0)
    np.testing.assert_allclose(out.rgb, [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(out.distance_mean, 4.5, rtol=1e-5)
    np.testing.assert_allclose(out.distance_percentiles, [4.05, 4.5, 4.95], rtol=1e-5)
    assert out.distance_median == out.distance_percentiles[1]

  def test_percentiles_with_missing_weight(self):
    # Half of the weight in [1, 2], half missing, far 10: 5 % at 1.1, the median at 2, and 95 % nine
    # tenths of the way from 2 to 10.
    out = draw(jnp.ones((1, 3)), jnp.array([0.5]), jnp.array([1.0, 2.0]), jnp.ones(1), 10.0)
    np.testing.assert_allclose(out.distance_percentiles, [1.1, 2, 9.2], rtol=1e-5)
    np.testing.assert_allclose(out.distance_mean, 1.5, rtol=1e-5)  # Of what is there.

  def test_finite(self):
    def outputs(density, tdist, rgb):
      directions = jnp.broadcast_to(jnp.array([0.0, 0.0, -1.0]), (18, 3))
      weights = render.compute_alpha_weights(density, tdist, directions)
      return render.volumetric_rendering(rgb, weights, tdist, jnp.ones((18, 1)), 1e6)

    density, tdist = np.repeat(AWKWARD_DENSITY, 3, 0), np.tile(AWKWARD_TDIST, (6, 1))
    assert_finite(outputs, density, tdist, np.full((18, 4, 3), 0.5))


class TestMultisample:
  cast = staticmethod(jax.jit(render.multisample, static_argnums=5))
  cone = tuple(map(jnp.float32, ([0.3, 0.5, 1.7, 1.8, 6.0], ORIGIN, DIRECTION, [0.1])))

  def _all_turns(self, shape):
    """Returns the points of k randomly rotated patterns, [4, 6 k, 3]."""
    keys = jax.random.split(jax.random.key(0), 400)
    tdist, *ray = self.cone
    many = [jnp.broadcast_to(x, (400, *x.shape)) for x in (tdist, *ray)]
    mean = np.asarray(self.cast(keys, *many, shape).mean, np.float64)
    return np.moveaxis(mean, 0, 1).reshape(4, -1, 3)

  @pytest.mark.parametrize('shape', ['cone', 'cylinder'])
  @pytest.mark.parametrize('key', [None, jax.random.key(3)], ids=['still', 'random'])
  def test_mean_and_variance_match_the_frustum(self, shape, key):
    whole = render.cast_rays(*self.cone, shape)
    points = np.asarray(self.cast(key, *self.cone, shape).mean, np.float64)
    assert points.shape == (4, 6, 3)
    np.testing.assert_allclose(points.mean(1), whole.mean, atol=1e-5)
    axis = DIRECTION / np.linalg.norm(DIRECTION)
    off = points - points.mean(1, keepdims=True)
    along = np.mean((off @ axis) ** 2, -1)
    np.testing.assert_allclose(along, np.einsum('i,nij,j->n', axis, whole.cov, axis), rtol=1e-4)
    total = np.mean(np.sum(off**2, -1), -1)
    np.testing.assert_allclose(total, np.trace(whole.cov, axis1=1, axis2=2), rtol=1e-4)

  @pytest.mark.parametrize('shape', ['cone', 'cylinder'])
  def test_covariance_over_all_rotations_matches_the_frustum(self, shape):
    whole = render.cast_rays(*self.cone, shape)
    for points, cov in zip(self._all_turns(shape), np.asarray(whole.cov)):
      got = np.cov(points.T, bias=True)
      np.testing.assert_allclose(got, cov, atol=0.03 * np.trace(cov) + 1e-6)

  def test_golden_distances(self):
    # From the paper's closed form, by hand for t0 = 1, t1 = 3: the hexagon's t_j.
    t0, t1 = 1.0, 3.0
    mid, half = 2.0, 1.0
    j = np.arange(6)
    root = np.sqrt((half**2 - mid**2) ** 2 + 4 * mid**4)
    inner = t1**2 + 2 * mid**2 + 3 / np.sqrt(7) * (2 * j / 5 - 1) * root
    expected = t0 + half * inner / (half**2 + 3 * mid**2)
    args = jnp.array([t0, t1]), jnp.zeros(3), jnp.array([0, 0, 1.0]), jnp.array([0.2])
    g = self.cast(None, *args, 'cone')
    np.testing.assert_allclose(g.mean[0, :, 2], expected, rtol=1e-5)
    across = np.linalg.norm(g.mean[0, :, :2], axis=-1)
    np.testing.assert_allclose(across, 0.2 * expected / 2**0.5, rtol=1e-5)
    angles = np.degrees(np.arctan2(*np.asarray(g.mean[0, :, 1::-1]).T))
    steps = np.round(angles - angles[0]) % 360
    np.testing.assert_allclose(steps, [0, 120, 240, 180, 300, 60], atol=1)
    sd = 0.5 * 0.2 * expected / 2**0.5
    np.testing.assert_allclose(g.cov[0], sd[:, None, None] ** 2 * np.eye(3), rtol=1e-5, atol=1e-9)

  def test_patterns_differ_between_neighbours_and_keys(self):
    args = jnp.linspace(1000, 1000.4, 5), jnp.zeros(3), jnp.array([0, 0, 1.0]), jnp.array([1e-3])

    def angles(key):
      g = self.cast(key, *args, 'cylinder')
      return np.degrees(np.arctan2(g.mean[..., 1], g.mean[..., 0]))

    still = angles(None)
    turned = (still[1] - still[0, 0]) % 360
    np.testing.assert_allclose(turned, [30, 270, 150, 210, 90, 330], atol=0.1)
    np.testing.assert_allclose(still[2], still[0], atol=0.1)
    first, other = angles(jax.random.key(0)), angles(jax.random.key(1))
    np.testing.assert_array_equal(first, angles(jax.random.key(0)))
    assert np.abs(first - other).max() > 1
    assert np.std(first[:, 0]) > 1
    steps = {round((a[1] - a[0]) % 360) for key in range(8) for a in angles(jax.random.key(key))}
    assert steps == {120, 240}  # Both orientations.

  def test_each_ray_uses_its_own_key(self):
    many = [jnp.broadcast_to(x, (3, *x.shape)) for x in self.cone]
    keys = jax.random.split(jax.random.key(0), 3)
    whole = self.cast(keys, *many, 'cone').mean
    alone = self.cast(keys[1:2], *(x[:1] for x in many), 'cone').mean
    np.testing.assert_allclose(alone[0], whole[1], rtol=1e-5)

  def test_an_unknown_shape_raises(self):
    with pytest.raises(ValueError, match=r"cone, cylinder, got 'box'"):
      render.multisample(None, jnp.zeros(2), jnp.zeros(3), jnp.ones(3), jnp.ones(1), 'box')

  @pytest.mark.parametrize('shape', ['cone', 'cylinder'])
  def test_finite(self, shape):
    def gaussians(*args):
      return render.multisample(None, *args, shape)

    tdist = [0.0, 0.0, 1e-12, 1.0, 1.0, 1e6, 1e6]
    directions = [[0, 0, -1], [0, 0, 0], [1e-3, 0, 0]]
    radii = [[0.0], [1e-3], [1.0]]
    assert_finite(gaussians, [tdist] * 3, np.zeros((3, 3)), directions, radii)
