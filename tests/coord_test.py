"""Space warps and encodings, against their properties and float64 implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite import assert_finite

from internal import coord, geopoly, plugins
from internal.errors import UserError

BASIS = geopoly.generate_basis('icosahedron', 2)


def _directions(n, seed=0):
  x = np.random.default_rng(seed).normal(size=(n, 3))
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _covariances(n, seed=0):
  a = np.random.default_rng(seed).normal(size=(n, 3, 3))
  return a @ np.swapaxes(a, -1, -2)


def _contract64(x):
  r = np.linalg.norm(x, axis=-1, keepdims=True)
  return np.where(r <= 1, x, (2 - 1 / np.maximum(r, 1)) * x / np.maximum(r, 1))


def _contract_jacobian64(x):
  """Jacobian outside the unit ball: 1 / r^2 along x, (2 - 1 / r) / r orthogonal to it."""
  r = np.linalg.norm(x, axis=-1)[..., None, None]
  along = x[..., :, None] * x[..., None, :] / r**2
  return along / r**2 + (np.eye(3) - along) * (2 - 1 / r) / r


class TestContract:
  def test_identity_inside_the_ball(self):
    x = (_directions(100) * np.linspace(0, 0.999, 100)[:, None]).astype(np.float32)
    np.testing.assert_array_equal(coord.contract(x), x)

  def test_bounded_by_two_and_monotone(self):
    r = np.logspace(-3, 6, 400)
    z = coord.contract(jnp.float32(_directions(1) * r[:, None]))
    norm = np.linalg.norm(np.asarray(z, np.float64), axis=-1)
    assert np.all(norm < 2)
    assert np.all(np.diff(norm) > -1e-6)
    assert norm[-1] > 2 - 2e-6

  def test_matches_the_equation_to_float32(self):
    x = (_directions(200) * np.logspace(-2, 6, 200)[:, None]).astype(np.float32)
    expected = _contract64(x.astype(np.float64))
    np.testing.assert_allclose(coord.contract(x), expected, atol=4e-7)

  def test_continuous_at_the_sphere(self):
    d = _directions(50)
    gap = coord.contract(jnp.float32(d * 1.00001)) - coord.contract(jnp.float32(d * 0.99999))
    np.testing.assert_allclose(np.linalg.norm(gap, axis=-1), 2e-5, rtol=0.05)

  def test_round_trip(self):
    x = _directions(60) * np.linspace(0, 50, 60)[:, None]
    back = coord.inv_contract(coord.contract(jnp.float32(x)))
    # At radius r the inverse magnifies rounding by dr / dz = r^2.
    allowed = 1e-6 * (1 + np.sum(x**2, -1, keepdims=True))
    assert np.all(np.abs(back - x) < allowed)

  def test_keeps_direction(self):
    x = _directions(50) * np.logspace(-1, 6, 50)[:, None]
    z = np.asarray(coord.contract(jnp.float32(x)))
    cosine = np.sum(z * x, -1) / np.linalg.norm(z, axis=-1) / np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(cosine, 1, atol=1e-6)

  def test_finite(self):
    points = [[0, 0, 0], [1e-20] * 3, [1, 0, 0], [0.6, 0, 0.8], [1e6, -1e6, 1]]
    points += [[1e9, 0, 0], [3e18, -4e18, 5e18]]
    assert_finite(coord.contract, points)
    assert_finite(coord.inv_contract, [[0, 0, 0], [1e-20] * 3, [0, -1, 0], [0, 1.9, 0]])

  def test_far_points_and_their_jacobian(self):
    far = np.float32(_directions(5) * 1e19)
    np.testing.assert_allclose(coord.contract(far), 2 * _directions(5), atol=4e-7)
    far = np.float32(_directions(5) * 1e9)
    jacobian = jax.vmap(jax.jacfwd(coord.contract))(far)
    expected = _contract_jacobian64(far.astype(np.float64))
    np.testing.assert_allclose(jacobian * 1e9, expected * 1e9, atol=1e-6)

  def test_jacobian_on_the_sphere_is_the_identity(self):
    for x in ([1.0, 0, 0], [0, 0, 0], [0.6, 0, 0.8]):
      np.testing.assert_allclose(jax.jacfwd(coord.contract)(jnp.float32(x)), np.eye(3), atol=1e-6)


class TestLinearize:
  def test_matches_the_explicit_jacobian(self):
    x = _directions(20) * np.logspace(-1, 1, 20)[:, None]
    cov = _covariances(20)
    mean, out = jax.jit(lambda m, c: coord.linearize(coord.contract, m, c))(
      jnp.float32(x), jnp.float32(cov)
    )
    jacobian = np.asarray(jax.vmap(jax.jacfwd(coord.contract))(jnp.float32(x)), np.float64)
    np.testing.assert_allclose(mean, _contract64(x), atol=1e-6)
    expected = jacobian @ cov @ np.swapaxes(jacobian, -1, -2)
    np.testing.assert_allclose(out, expected, atol=1e-5)

  def test_exact_for_linear_maps(self):
    matrix = np.random.default_rng(3).normal(size=(3, 3)).astype(np.float32)
    x, cov = jnp.float32(_directions(4)), jnp.float32(_covariances(4))
    mean, out = coord.linearize(lambda p: p @ matrix.T, x, cov)
    np.testing.assert_allclose(mean, x @ matrix.T, rtol=1e-5)
    np.testing.assert_allclose(out, matrix @ cov @ matrix.T, rtol=1e-4, atol=1e-4)

  def test_keeps_batch_axes_and_symmetry(self):
    x, cov = _directions(12).reshape(2, 6, 3) * 3, _covariances(12).reshape(2, 6, 3, 3)
    mean, out = coord.linearize(coord.contract, jnp.float32(x), jnp.float32(cov))
    assert mean.shape == (2, 6, 3)
    np.testing.assert_allclose(out, np.swapaxes(out, -1, -2), atol=1e-6)

  def test_far_away_against_float64(self):
    # A frustum at t = 1e6, 1e5 long and 1e3 wide. The contraction scales it by 2 / r across, to a
    # variance of 4e-6, and by 1 / r^2 along, to 1e-14. Rounding the covariance to float32 (1e10
    # beside 1e6) costs 1e-3 relative; the tolerance is 2e-2.
    d = _directions(8)
    x = (d * 1e6).astype(np.float32).astype(np.float64)
    along = d[..., :, None] * d[..., None, :]
    cov = 1e10 * along + 1e6 * (np.eye(3) - along)
    _, out = coord.linearize(coord.contract, jnp.float32(x), jnp.float32(cov))
    jacobian = _contract_jacobian64(x)
    expected = jacobian @ cov @ np.swapaxes(jacobian, -1, -2)
    assert np.max(np.abs(expected)) > 1e-6
    np.testing.assert_allclose(out, expected, atol=8e-8)

  def test_finite(self):
    points = np.repeat([[0, 0, 0], [0, 1, 0], [1e6, 0, 0]], 3, 0)
    covs = np.tile([0, 1, 1e10], 3)[:, None, None] * np.eye(3)
    assert_finite(lambda m, c: coord.linearize(coord.contract, m, c), points, covs)


WARPS = ['reciprocal', 'log', 'identity', 'piecewise', 'power', None]


class TestRayWarps:
  @pytest.mark.parametrize('name', WARPS)
  @pytest.mark.parametrize(('near', 'far'), [(0.2, 1e6), (2.0, 6.0)])
  def test_maps_the_ends_and_ascends(self, name, near, far):
    t_to_s, s_to_t = coord.ray_warps(name, near, far)
    t = np.asarray(s_to_t(jnp.linspace(0, 1, 101)))
    np.testing.assert_allclose(t[[0, -1]], [near, far], rtol=1e-5)
    np.testing.assert_allclose(t_to_s(jnp.float32([near, far])), [0, 1], atol=1e-6)
    assert np.all(np.isfinite(t))
    assert np.all(np.diff(t) > 0)
    assert np.all((t >= np.float32(near)) & (t <= far))

  @pytest.mark.parametrize('name', WARPS)
  def test_round_trip(self, name):
    t_to_s, s_to_t = coord.ray_warps(name, 0.5, 100.0)
    s = jnp.linspace(0, 1, 33)
    np.testing.assert_allclose(t_to_s(s_to_t(s)), s, atol=2e-5)

  def test_golden(self):
    # The midpoint of 2 and 6 in disparity is the harmonic mean, 3; in log, sqrt(12).
    for name, expected in (('reciprocal', 3), ('log', 12**0.5), ('identity', 4)):
      _, s_to_t = coord.ray_warps(name, 2.0, 6.0)
      np.testing.assert_allclose(s_to_t(jnp.float32(0.5)), expected, rtol=1e-6)
    # piecewise, 0 to infinity: linear up to t = 1 at s = 1/2, then 1 / (2 (1 - s)).
    _, s_to_t = coord.ray_warps('piecewise', 0.0, 1e6)
    np.testing.assert_allclose(s_to_t(jnp.float32([0.25, 0.5, 0.75])), [0.5, 1, 2], rtol=1e-5)

  def test_reciprocal_is_accurate_up_to_the_far_plane(self):
    s = np.linspace(0, 1, 1001).astype(np.float32)
    _, s_to_t = coord.ray_warps('reciprocal', 0.2, 1e6)
    s64 = s.astype(np.float64)
    np.testing.assert_allclose(s_to_t(s), 1 / (s64 / 1e6 + (1 - s64) / 0.2), rtol=1e-6)

  @pytest.mark.parametrize('name', WARPS)
  def test_finite(self, name):
    t_to_s, s_to_t = coord.ray_warps(name, 0.2, 1e6)
    assert_finite(s_to_t, [0.0, 1e-7, 0.5, 1 - 1e-7, 1.0])
    assert_finite(t_to_s, [0.2, 1.0, 1e6])

  def test_invalid_arguments_raise(self):
    with pytest.raises(ValueError, match='one of identity, reciprocal, log'):
      coord.ray_warps('cubic', 1.0, 2.0)
    with pytest.raises(ValueError, match='near 3'):
      coord.ray_warps(None, 3.0, 2.0)
    with pytest.raises(ValueError, match='near > 0'):
      coord.ray_warps('reciprocal', 0.0, 1.0)


def _ladder64(x, lam):
  """The power ladder's definition in float64, for lambda away from its limits."""
  size = abs(np.float64(lam) - 1)
  return size / lam * ((np.float64(x) / size + 1) ** lam - 1)


LADDER = [-np.inf, -3.0, -1.5, -0.25, 0.0, 0.5, 1.0, 2.0, np.inf]


class TestPowerLadder:
  @pytest.mark.parametrize('lam', LADDER)
  def test_starts_at_0_with_slope_1_and_ascends(self, lam):
    g, _ = coord.power_ladder(lam, 2.0)
    value, slope = jax.value_and_grad(g)(jnp.float32(0))
    assert (value, slope) == (0, 2)
    y = np.asarray(g(jnp.linspace(0, 3, 50)))
    assert np.all(np.diff(y) > 0)
    bends = np.diff(y, 2)  # Down below lambda = 1, up above.
    assert np.all(np.sign(np.where(abs(bends) < 2e-6, 0, bends)) == np.sign(lam - 1))

  @pytest.mark.parametrize('lam', [-1.5, -0.25, 0.5, 2.0])
  def test_matches_the_definition_of_scaled_distances(self, lam):
    t = np.float32([0, 1e-3, 0.2, 1, 30, 1e3])
    g, _ = coord.power_ladder(lam, 100.0)
    np.testing.assert_allclose(g(t), _ladder64(100.0 * t, lam), rtol=2e-5)

  @pytest.mark.parametrize(
    ('limit', 'near'),
    [(0, 1e-6), (0, -1e-6), (1, 1 + 1e-6), (1, 1 - 1e-6), (np.inf, 1e7), (-np.inf, -1e7)],
  )
  def test_limits(self, limit, near):
    x = np.float32([0, 0.01, 0.5, 1, 4])
    g, _ = coord.power_ladder(limit)
    np.testing.assert_allclose(g(x), _ladder64(x, near), rtol=1e-4)

  @pytest.mark.parametrize('lam', LADDER)
  def test_inverse(self, lam):
    g, inverse = coord.power_ladder(lam, 1.5)
    x = np.float32([0, 0.01, 0.5, 1, 3])
    np.testing.assert_allclose(inverse(g(x)), x, rtol=2e-4, atol=1e-6)

  def test_the_default_is_the_curve_of_published_runs_bit_for_bit(self):
    g, inverse = plugins.ray_distance['power']()
    t = jnp.float32(np.logspace(-3, 6, 200))
    y = 2.5 / -1.5 * ((t / 2.5 + 1) ** -1.5 - 1)
    np.testing.assert_array_equal(g(t), y)
    back = 2.5 * (jnp.maximum(y * -1.5 / 2.5 + 1, 1e-20) ** (1 / -1.5) - 1)
    np.testing.assert_array_equal(inverse(y), back)

  def test_rays_may_start_at_the_camera(self):
    options = {'lam': -1.5, 'scale': 2.0}
    t_to_s, s_to_t = coord.ray_warps('power', 0.0, 1e6, options)
    t = np.asarray(s_to_t(jnp.linspace(0, 1, 101)))
    assert t[0] == 0
    np.testing.assert_allclose(t[-1], 1e6)
    assert np.all(np.diff(t) > 0)
    # Half of s is where 1 - (2 t / 2.5 + 1)^-1.5 is 1/2.
    np.testing.assert_allclose(t[50], 1.25 * (2 ** (2 / 3) - 1), rtol=1e-4)
    assert_finite(s_to_t, [0.0, 1e-7, 0.5, 1 - 1e-7, 1.0])
    assert_finite(t_to_s, [0.0, 1e-7, 1.0, 1e6])

  @pytest.mark.parametrize('lam', LADDER)
  def test_finite(self, lam):
    g, _ = coord.power_ladder(lam, 1e4 if lam <= 0 else 1.0)
    assert_finite(g, [0.0, 1e-6, 1.0, 40.0] + [1e6] * (lam < 1))
    _, s_to_t = coord.ray_warps('power', 0.0, 1e6, {'lam': min(lam, 2.0)})
    assert_finite(s_to_t, [0.0, 1e-7, 0.5, 1 - 1e-7, 1.0])

  @pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
      ('power', {'scale': 0.0}, 'scale > 0'),
      ('power', {'lam': np.nan}, 'a number lam'),
      ('power', {'lamda': 1.0}, r"Model\.raydist_options .* 'power', got {'lamda'"),
      ('log', {'lam': 1.0}, r"Model\.raydist_options .* 'log', got {'lam'"),
    ],
  )
  def test_bad_options_are_named(self, name, options, message):
    with pytest.raises(UserError, match=message):
      coord.ray_warps(name, 0.2, 1e6, options)


class TestProjection:
  def test_matches_full_products(self):
    mean, cov = _directions(10) * 2, _covariances(10)
    lifted, var = coord.lift_and_diagonalize(jnp.float32(mean), jnp.float32(cov), BASIS)
    assert lifted.shape == var.shape == (10, 21)
    np.testing.assert_allclose(lifted, mean @ BASIS, atol=1e-6)
    expected = np.einsum('bi,nij,jb->nb', BASIS.T, cov, BASIS)
    np.testing.assert_allclose(var, expected, rtol=1e-5, atol=1e-5)

  def test_octahedron_keeps_coordinates(self):
    mean, cov = jnp.float32(_directions(3)), jnp.float32(_covariances(3))
    lifted, var = coord.lift_and_diagonalize(mean, cov, np.eye(3))
    np.testing.assert_allclose(lifted, mean)
    np.testing.assert_allclose(var, np.diagonal(cov, axis1=-2, axis2=-1))

  def test_variance_is_never_negative(self):
    # A flat Gaussian has variance 0 along its normal, which rounding can make negative.
    d = _directions(50)
    flat = (np.eye(3) - d[:, :, None] * d[:, None, :]).astype(np.float32)
    _, var = coord.lift_and_diagonalize(jnp.float32(d[:1]), jnp.float32(flat[:1]), d[:1].T)
    assert np.all(var >= 0)
    _, var = coord.lift_and_diagonalize(jnp.zeros((1, 3)), -jnp.eye(3)[None] * 1e-9, BASIS)
    assert np.all(var == 0)


class TestEncodings:
  def test_empty_batches(self):
    none = jnp.zeros((0, 2, 21))
    assert coord.integrated_pos_enc(none, none, 0, 12).shape == (0, 2, 504)
    assert coord.pos_enc(none[..., :3], 0, 4).shape == (0, 2, 27)

  def test_matches_the_integral(self):
    # E[sin(2^l x)] for x ~ N(m, v), by the trapezoid rule over +- 10 standard deviations.
    mean, var = np.array([0.3, -1.7, 1.9]), np.array([0.2, 0.01, 1e-4])
    std = np.sqrt(var)
    z = np.linspace(-10, 10, 20001)
    pdf = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    x = mean[:, None] + std[:, None] * z
    expected = [
      np.trapezoid(fn(2.0**l * x) * pdf, z, axis=-1)
      for fn in (np.sin, np.cos)
      for l in range(-1, 5)
    ]
    out = coord.integrated_pos_enc(jnp.float32(mean), jnp.float32(var), -1, 5)
    np.testing.assert_allclose(out, np.concatenate(expected), atol=2e-6)

  def test_bounded_and_damped(self):
    mean = jnp.float32(np.random.default_rng(0).uniform(-2, 2, (5, 21)))
    sharp = coord.integrated_pos_enc(mean, jnp.zeros((5, 21)), 0, 12)
    blurred = coord.integrated_pos_enc(mean, jnp.full((5, 21), 1e-4), 0, 12)
    assert sharp.shape == (5, 504)
    assert np.max(np.abs(sharp)) <= 1
    assert np.all(np.abs(blurred) <= np.abs(sharp) + 1e-7)
    # sin^2 + cos^2 = exp(-v 4^l), octave by octave.
    power = np.sum(np.asarray(blurred).reshape(5, 2, 12, 21) ** 2, 1)
    expected = np.exp(-1e-4 * 4.0 ** np.arange(12))[None, :, None]
    np.testing.assert_allclose(power, np.broadcast_to(expected, power.shape), atol=1e-5)

  def test_top_frequency_at_the_far_plane_against_float64(self):
    # Rounding of contracted coordinates (below 2) in float32 turns 2^11 x by some 1e-3 radians;
    # a ten-bit mantissa (TF32) would turn it by more than 1.
    x = (_directions(200) * 1e6).astype(np.float32)
    lifted, var = coord.lift_and_diagonalize(coord.contract(x), jnp.zeros((200, 3, 3)), BASIS)
    out = coord.integrated_pos_enc(lifted, var, 11, 12)
    angle = 2.0**11 * (_contract64(x.astype(np.float64)) @ BASIS)
    np.testing.assert_allclose(out, np.concatenate([np.sin(angle), np.cos(angle)], -1), atol=3e-3)

  def test_large_angles_keep_their_fraction_of_a_turn(self):
    # For float32 coordinates up to 2 at frequency 2^11, and far beyond contracted space.
    x = np.random.default_rng(2).uniform(-2, 2, (500, 1)).astype(np.float32)
    for mean in (x, 50 * x, 1e4 * x):
      angle = 2.0 ** np.arange(12) * mean.astype(np.float64)
      out = coord.integrated_pos_enc(mean, jnp.zeros_like(mean), 0, 12)
      expected = np.concatenate([np.sin(angle), np.cos(angle)], -1)
      np.testing.assert_allclose(out, expected, atol=5e-7 + 1e-10 * np.max(np.abs(angle)))

  def test_gradients(self):
    x, v = np.float32([-1.7, 0.0, 0.3, 1.9]), np.float32([0.0, 1e-4, 1e-2, 1e-3])
    scale = 2.0 ** np.arange(8)
    slopes = jax.vmap(jax.jacfwd(lambda m, v: coord.integrated_pos_enc(m, v, 0, 8), (0, 1)))
    by_mean, by_var = slopes(x[:, None], v[:, None])
    angle = scale * x.astype(np.float64)[:, None]
    damping = np.exp(-0.5 * v.astype(np.float64)[:, None] * scale**2)
    sin, cos = damping * np.sin(angle), damping * np.cos(angle)
    expected = np.concatenate([scale * cos, -scale * sin], -1)
    np.testing.assert_allclose(by_mean[..., 0], expected, atol=1e-4)
    expected = np.concatenate([sin, cos], -1) * -0.5 * np.tile(scale, 2) ** 2
    np.testing.assert_allclose(by_var[..., 0], expected, rtol=1e-5, atol=0.02)

  def test_plain_encoding(self):
    x = _directions(4)
    out = coord.pos_enc(jnp.float32(x), 0, 4)
    assert out.shape == (4, 27)
    np.testing.assert_allclose(out[:, :3], x, atol=1e-7)
    for l in range(4):
      np.testing.assert_allclose(out[:, 3 + 3 * l : 6 + 3 * l], np.sin(2**l * x), atol=1e-6)
      np.testing.assert_allclose(out[:, 15 + 3 * l : 18 + 3 * l], np.cos(2**l * x), atol=1e-6)
    assert coord.pos_enc(jnp.float32(x), 0, 4, append_identity=False).shape == (4, 24)

  def test_finite(self):
    mean, var = np.meshgrid([0.0, -2.0, 1e6], [0.0, 1e-12, 1.0, 1e30])
    assert_finite(lambda m, v: coord.integrated_pos_enc(m, v, 0, 16), mean, var)
