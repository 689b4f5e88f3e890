"""Tests of the projection and drawing of Gaussians, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import splats_naive as naive

from internal import cameras
from internal.splats import gaussians, rasterizer

project = jax.jit(gaussians.project)
render = jax.jit(rasterizer.render, static_argnums=3)
SIZE = (37, 21)  # Tiles at the right and lower edge are cut.
BACKGROUND = np.float32([0.2, 0.5, 0.9])


def make_splats(count, seed=0, spread=1.0, log_scale=-1.6):
  rng = np.random.default_rng(seed)
  values = (
    rng.normal(size=(count, 3)) * [spread, spread, 0.5],
    rng.normal(log_scale, 0.5, (count, 3)),
    rng.normal(size=(count, 4)),
    rng.normal(0, 1.5, count),
    rng.normal(0, 0.3, (count, 16, 3)),
  )
  return gaussians.Splats(*(jnp.asarray(v, jnp.float32) for v in values))


def make_camera(size=SIZE, distance=3.0):
  """A camera at z = distance that looks at the origin, turned a little."""
  matrix = cameras.pixtocam_from_intrinsics(30.0, 33.0, size[0] / 2 + 1, size[1] / 2 - 0.7)
  s, c = np.sin(0.2), np.cos(0.2)
  turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
  pose = np.concatenate([turn, turn @ [[0.0], [0.1], [distance]]], 1)
  return gaussians.pinhole(cameras.make_cameras(matrix[None], pose[None], [size]), 0)


def test_tiles_draw_what_a_loop_over_pixels_and_gaussians_draws():
  camera, splats = make_camera(), make_splats(90)  # Several chunks in a tile.
  projected = project(splats, camera)
  expected = naive.render(projected, SIZE, BACKGROUND)
  picture = render(splats, camera, BACKGROUND, 2000)
  assert picture.overflow == 0
  assert picture.pairs == rasterizer.count_pairs(projected, SIZE)
  assert expected[..., 3].max() > 0.95
  np.testing.assert_allclose(picture.rgb, expected[..., :3], atol=2e-4)
  np.testing.assert_allclose(picture.acc, expected[..., 3], atol=2e-4)


def test_gaussians_behind_opaque_ones_change_nothing_but_are_walked_past():
  splats = make_splats(300, seed=3, spread=0.3)
  splats = splats.replace(opacity_logits=jnp.full(300, 3.0))
  camera = make_camera((16, 16))
  expected = naive.render(project(splats, camera), (16, 16), BACKGROUND)
  picture = render(splats, camera, BACKGROUND, 2000)
  np.testing.assert_allclose(picture.rgb, expected[..., :3], atol=3e-4)


def test_pairs_that_do_not_fit_are_counted_and_are_the_farthest():
  camera, splats = make_camera(), make_splats(90)
  needed = int(render(splats, camera, BACKGROUND, 2000).pairs)
  farthest = np.argsort(np.asarray(project(splats, camera).depth))[-8:]
  without = splats.replace(opacity_logits=splats.opacity_logits.at[farthest].set(-100))
  kept = render(without, camera, BACKGROUND, 2000)
  cut = render(splats, camera, BACKGROUND, int(kept.pairs))
  assert cut.overflow == needed - kept.pairs > 7
  np.testing.assert_allclose(cut.rgb, kept.rgb, atol=1e-6)


def weighted_sum(picture, weight):
  return (picture * weight).sum()


def test_gradients_are_those_of_finite_differences_of_the_loop():
  size = (19, 17)
  camera, splats = make_camera(size), make_splats(40, seed=5)
  weight = np.random.default_rng(1).normal(size=(17, 19, 4))

  def loss(splats):
    picture = render(splats, camera, BACKGROUND, 1000)
    joined = jnp.concatenate([picture.rgb, picture.acc[..., None]], -1)
    return weighted_sum(joined, jnp.asarray(weight, jnp.float32))

  gradient = jax.jit(jax.grad(loss))(splats)
  with jax.enable_x64(True):
    exact_camera = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), camera)

    def exact(splats):
      projected = project(splats, exact_camera)
      return weighted_sum(naive.render(projected, size, BACKGROUND), weight)

    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), splats)
    rng = np.random.default_rng(2)
    for name in ('means', 'log_scales', 'quaternions', 'opacity_logits', 'sh'):
      value = getattr(wide, name)
      # Along random directions, so that every parameter counts; cut-offs move with a long step.
      direction = rng.normal(size=value.shape)
      step = 1e-5
      high, low = (exact(wide.replace(**{name: value + s * step * direction})) for s in (1, -1))
      expected = (high - low) / (2 * step)
      found = (np.asarray(getattr(gradient, name), np.float64) * direction).sum()
      size_of = np.abs(np.asarray(getattr(gradient, name)) * direction).sum()
      assert abs(found - expected) < 0.01 * size_of, (name, found, expected)


def test_projected_covariance_is_that_of_projected_samples():
  splats = make_splats(5, seed=7, log_scale=-4.5, spread=0.5)  # Small: the perspective is linear.
  camera = make_camera()
  projected = project(splats, camera)
  samples = np.random.default_rng(0).multivariate_normal(np.zeros(3), np.eye(3), 200_000)
  root = np.linalg.cholesky(naive.covariances(splats))
  for k in range(5):
    world = np.asarray(splats.means, np.float64)[k] + samples @ root[k].T
    local = (world - camera.position) @ np.asarray(camera.rotation, np.float64).T
    xy = local[:, :2] / local[:, 2:] * camera.focal + camera.centre
    cov = np.cov(xy.T) + gaussians.LOW_PASS * np.eye(2)
    a, b, c = np.asarray(projected.conic)[k]
    np.testing.assert_allclose(np.linalg.inv([[a, b], [b, c]]), cov, rtol=0.02, atol=0.002)
    np.testing.assert_allclose(projected.xy[k], xy.mean(0), atol=0.02)


def test_the_filter_keeps_the_integral_of_a_small_gaussian():
  # Half as large in the picture is a quarter of the light, however small it is.
  splats = make_splats(1).replace(
    means=jnp.zeros((1, 3)), opacity_logits=jnp.array([4.0]), sh=jnp.zeros((1, 16, 3))
  )
  light = []
  for log_scale in (-3.0, -3.0 - np.log(2)):
    small = splats.replace(log_scales=jnp.full((1, 3), log_scale))
    p = project(small, make_camera())
    light.append(p.opacity[0] / jnp.sqrt(p.conic[0, 0] * p.conic[0, 2] - p.conic[0, 1] ** 2))
  np.testing.assert_allclose(light[0] / light[1], 4, rtol=0.01)


@jax.jit
@jax.value_and_grad
def loss_and_gradient(splats, camera):
  picture = rasterizer.render(splats, camera, BACKGROUND, 200)
  return jnp.sum(picture.rgb**2) + jnp.sum(picture.acc)


@pytest.mark.parametrize(
  'change',
  [
    {'quaternions': np.zeros(4)},
    {'log_scales': np.full(3, -100.0)},
    {'log_scales': np.array([-100.0, 0, 0])},
    {'log_scales': np.array([-100.0, -100, 0])},
    {'log_scales': np.full(3, 100.0)},
    {'means': np.array([0.0, 0.1, 3])},  # In the camera.
    {'means': np.array([0.0, 0.1, 5])},  # Behind it.
    {'means': np.array([50.0, 0, 2.9])},  # At the camera's plane, far to the side.
    {'means': np.array([-1.9, 0, 0])},  # On the picture's border.
    {'means': np.array([1e6, 1e6, -1e6])},
    {'opacity_logits': np.array(-100.0)},
    {'opacity_logits': np.array(100.0)},
    {'sh': np.full((16, 3), -10.0)},
  ],
)
def test_degenerate_gaussians_give_finite_pictures_and_gradients(change):
  splats, camera = make_splats(3), make_camera()
  for name, value in change.items():
    splats = splats.replace(**{name: getattr(splats, name).at[1].set(jnp.asarray(value))})

  value, gradient = loss_and_gradient(splats, camera)
  assert np.isfinite(value)
  for leaf in jax.tree.leaves(gradient):
    assert np.isfinite(leaf).all()


def test_rotated_harmonics_are_the_colour_in_the_rotated_frame():
  rng = np.random.default_rng(0)
  rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
  rotation *= np.sign(np.linalg.det(rotation))
  sh = rng.normal(0, 0.1, (4, 16, 3))
  directions = rng.normal(size=(4, 3))
  directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
  before = gaussians.sh_colors(jnp.float32(sh), jnp.float32(directions))
  turned = gaussians.rotate_sh(sh, rotation)
  after = gaussians.sh_colors(jnp.float32(turned), jnp.float32(directions @ rotation.T))
  np.testing.assert_allclose(after, before, atol=1e-5)


def test_harmonics_are_orthonormal():
  rng = np.random.default_rng(0)
  directions = rng.normal(size=(100_000, 3)).astype(np.float32)
  directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
  harmonics = jax.jit(gaussians.sh_basis)
  basis = np.asarray(harmonics(directions), np.float64)
  np.testing.assert_allclose(4 * np.pi * basis.T @ basis / len(basis), np.eye(16), atol=0.04)
  np.testing.assert_allclose(
    harmonics(jnp.eye(3))[:, 1:4] / np.sqrt(3 / (4 * np.pi)),
    [[0, 0, -1], [-1, 0, 0], [0, 1, 0]],
    atol=1e-6,
  )
