"""Exposure: what photographs show, what stays the scene's, what EXIF data says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import trajectory_test
from PIL import Image

from internal import cameras, image, structs
from internal.datasets import exposures
from internal.devices import sharding
from internal.training import batches, exposure, train_step

GAIN, COLOUR = (
  tiny.settings(f"Config.exposure = '{kind}'").config for kind in ('gain', 'gain_colour')
)


def width(config):
  return exposure.GAIN_WIDTH if config.exposure == 'gain' else exposure.COLOUR_WIDTH


def table(config, focal=(10.0, 10.0, 20.0, 10.0), start=None):
  """Cameras of pictures of 12x8 pixels; those with the same focal length share a camera."""
  focal = np.array(focal)
  cams = cameras.make_cameras(
    cameras.pixtocam_from_intrinsics(focal, focal, 6.0, 4.0),
    np.eye(3, 4)[None].repeat(len(focal), 0),
    (12, 8),
  )
  return exposure.add_tables(config, cams, start)


def rows(config, scale=0.3, n=6, seed=0):
  return jnp.float32(np.random.default_rng(seed).normal(size=(n, width(config))) * scale)


def shown(config, params, rgb, cam_idx, pixel=(5, 4), target=0.5, cams=None):
  """Colours [r, 3] as the photographs of `cam_idx` [r] show them."""
  rgb, cam_idx = jnp.asarray(rgb, jnp.float32), jnp.asarray(cam_idx)
  x, y = (jnp.full_like(cam_idx, p) for p in pixel)
  rays = structs.Rays(rgb, rgb, rgb, rgb[:, :1], cam_idx)
  batch = structs.Batch(rays, jnp.full_like(rgb, target), pixel=(x, y))
  rendering = structs.Rendering(rgb, rgb[:, 0], rgb[:, 0], rgb)
  nothing, last = exposure.develop(
    table(config) if cams is None else cams, params, [None, rendering], batch
  )
  assert nothing is None
  return last.rgb


RGB = np.random.default_rng(1).uniform(0.02, 0.9, (4, 3))
EACH = np.arange(4)


@pytest.mark.parametrize('config', [GAIN, COLOUR])
class TestWhatPhotographsShow:
  def test_parameters_of_zero_change_nothing(self, config):
    np.testing.assert_allclose(shown(config, 0 * rows(config), RGB, EACH), RGB, atol=1e-6)

  def test_what_all_photographs_share_stays_in_the_scene(self, config):
    params = jnp.broadcast_to(rows(config)[:1], (6, width(config)))
    got = shown(config, params, RGB, EACH, pixel=(0, 0))
    np.testing.assert_allclose(got, RGB, atol=1e-5)

  def test_a_common_gain_or_vignette_changes_nothing(self, config):
    params, more = rows(config), rows(config, n=1, seed=2)
    more = more.at[:, 3:12].set(0)  # A common matrix does count, where gains differ.
    a, b = (shown(config, p, RGB, EACH, pixel=(0, 0)) for p in (params, params + more))
    np.testing.assert_allclose(a, b, atol=1e-5)

  def test_mean_gain_is_one(self, config):
    params = rows(config).at[:, 3:].set(0)
    dark = np.full((4, 3), 0.01)  # Where sRGB is linear.
    logs = np.log(shown(config, params, dark, EACH) / dark)
    np.testing.assert_allclose(logs.mean(0), 0, atol=1e-5)
    assert np.abs(logs).max() > 0.1

  def test_rows_beyond_the_photographs_do_not_matter(self, config):
    params = rows(config)
    np.testing.assert_array_equal(
      shown(config, params, RGB, EACH), shown(config, params.at[4:].add(1), RGB, EACH)
    )

  def test_any_colour_has_a_finite_gradient(self, config):
    rgb = np.repeat([[-0.001], [0.0], [1.0], [1.001]], 3, 1)
    for scale in (0.0, 3.0):
      params = rows(config).at[:, :3].multiply(scale)
      loss = lambda p, c: jnp.sum(shown(config, p, c, EACH))  # noqa: E731
      grads = jax.grad(loss, (0, 1))(params, jnp.float32(rgb))
      assert all(np.isfinite(g).all() for g in grads)
      assert (np.abs(grads[1]).max(-1) > 1e-3).all()

  def test_saturated_photographs_ask_for_no_more(self, config):
    params = rows(config) * 0
    params = params.at[0, :3].set(2.0)
    bright = np.full((1, 3), 0.9)
    loss = lambda c, target: jnp.sum(shown(config, params, c, [0], target=target))  # noqa: E731
    assert loss(bright, 1.0) == 3 < loss(bright, 0.99)
    assert (jax.grad(loss)(jnp.float32(bright), 1.0) == 0).all()
    assert shown(config, params, bright * 0.1, [0], target=1.0).max() < 1


def test_gains_are_those_of_linear_light():
  params = jnp.zeros((6, 3)).at[:4].set(np.log([[2.0], [0.5], [4.0], [0.25]]))
  linear = np.asarray(image.srgb_to_linear(jnp.float32(RGB))) * [[2.0], [0.5], [4.0], [0.25]]
  wanted = image.linear_to_srgb(jnp.float32(linear))
  np.testing.assert_allclose(shown(GAIN, params, RGB, EACH), wanted, rtol=1e-5)


def test_matrices_and_vignettes_agree_with_a_naive_twin():
  params, pixel = rows(COLOUR), (11, 1)
  own = np.float64(params)[[0, 0, 2, 0]]  # The first, second and fourth share a camera.
  g = np.float64(params)[:4, :3]
  g -= g.mean(0)
  matrices = own[:, 3:12].reshape(4, 3, 3)
  matrices = matrices - np.diag(np.diag(matrices.mean(0))) + np.eye(3)
  polynomial = own[:, 12:] - own[:, 12:].mean(0)
  r2 = ((11.5 - 6) ** 2 + (1.5 - 4) ** 2) / (6**2 + 4**2)
  wanted = []
  for i, x in enumerate(np.asarray(image.srgb_to_linear(jnp.float32(RGB)), np.float64)):
    y = matrices[i] @ np.diag(np.exp(g[i])) @ np.linalg.inv(matrices.mean(0)) @ x
    wanted.append(y * np.exp(polynomial[i, 0] * r2 + polynomial[i, 1] * r2**2))
  wanted = image.linear_to_srgb(jnp.float32(wanted))
  got = shown(COLOUR, params, RGB, EACH, pixel=pixel)
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_photographs_with_the_same_intrinsics_share_a_camera():
  supervision = table(COLOUR, start=[1.0, 2, 3, 6]).supervision
  assert supervision.camera.tolist() == [0, 0, 2, 0]
  assert supervision.log_gain.tolist() == [-2, -1, 0, 3]
  assert table(GAIN).supervision.camera is None
  assert table(tiny.settings().config).supervision is None


def test_exif_exposures_are_the_start():
  start = np.array([0.3, -0.1, 0.2, 0.0])
  cams, learned = table(GAIN, start=start), rows(GAIN)
  params = learned.at[:4].add(start[:, None])
  np.testing.assert_allclose(
    shown(GAIN, learned, RGB, EACH, cams=cams), shown(GAIN, params, RGB, EACH), rtol=1e-5
  )


def photograph(path, seconds=0.01, aperture=1.8, speed=100):
  exif = Image.Exif()
  values = {0x829A: seconds, 0x829D: aperture, 0x8827: speed}
  exif.get_ifd(0x8769).update({tag: v for tag, v in values.items() if v is not None})
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', (12, 8)).save(path, exif=exif)


def test_exposures_are_read_from_full_size_photographs_if_all_have_them(tmp_path):
  scene = trajectory_test.make_scene()
  names = [scene.names[i] for i in scene.train]
  for k, name in enumerate(names):
    photograph(tmp_path / 'images' / name, seconds=0.01 * 2**k, speed=200)
  found = exposures.log_exposures(str(tmp_path), scene)
  wanted = np.log(0.01 * 200 / 1.8**2) + np.log(2) * np.arange(len(names))
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  for lacking in ({'seconds': None}, {'aperture': None}, {'speed': None}, {'seconds': 0}):
    photograph(tmp_path / 'images' / names[0], **lacking)
    assert exposures.log_exposures(str(tmp_path), scene) is None
  (tmp_path / 'images' / names[0]).unlink()
  assert exposures.log_exposures(str(tmp_path), scene) is None


def test_training_finds_the_gains_of_a_plain_scene():
  """Three pictures of one colour each, exposed and balanced differently."""
  settings = tiny.settings(
    "Config.exposure = 'gain'",
    'Config.exposure_lr_init = 0.02',
    'Config.exposure_lr_final = 0.002',
    'Config.lr_init = 0.01',
    'Config.lr_delay_steps = 0',
    'Model.num_glo_embeddings = 4',
  )
  cams, images = tiny.capture()
  logs = np.array([[0.4, 0.2, 0.0], [-0.3, 0.1, 0.2], [-0.1, -0.3, -0.2]])
  colours = image.linear_to_srgb(jnp.float32(np.array([0.2, 0.25, 0.3]) * np.exp(logs)))
  images = [
    np.uint8(np.round(255 * np.broadcast_to(c, im.shape))) for c, im in zip(colours, images)
  ]
  mesh = tiny.mesh(1)
  step_fn = train_step.make_train_step(settings, mesh)
  state = sharding.place(train_step.create_state(settings), mesh)
  cams = sharding.replicate(exposure.add_tables(settings.config, cams), mesh)
  store = sharding.replicate(batches.make_store(images), mesh)
  for _ in range(100):
    state, _ = step_fn(state, cams, store)
  found = np.asarray(state.params[exposure.PART]['rows'])
  assert (found[3:] == 0).all()
  found = found[:3] - found[:3].mean(0)
  np.testing.assert_allclose(found, logs - logs.mean(0), atol=0.03)
