"""The training step: devices, determinism, schedule, learning, and lowering for every platform."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from internal import batches, cameras, configs, evaluation, models, sharding, structs, train_step

TINY = (
  'Config.batch_size = 64',
  'Config.max_steps = 100',
  'Config.near = 0.2',
  'Config.far = 1e6',
  'Config.render_chunk_size = 64',
  'Model.raydist_fn = @jnp.reciprocal',
  'Model.opaque_background = True',
  'Model.num_prop_samples = 8',
  'Model.num_nerf_samples = 4',
  'PropMLP.warp_fn = @coord.contract',
  'PropMLP.net_depth = 2',
  'PropMLP.net_width = 16',
  'PropMLP.disable_rgb = True',
  'NerfMLP.warp_fn = @coord.contract',
  'NerfMLP.net_depth = 2',
  'NerfMLP.net_width = 16',
)


def _settings(*bindings):
  return configs.load_config([], [*TINY, *bindings])


def _capture(n=3, width=12, height=8, seed=0):
  """Cameras around the origin and random pictures of their own size each."""
  rng = np.random.default_rng(seed)
  poses = np.concatenate([np.eye(3)[None].repeat(n, 0), rng.normal(size=(n, 3, 1)) / 3], -1)
  sizes = np.array([[width + i, height] for i in range(n)])
  inverse = cameras.pixtocam_from_intrinsics(10.0, 10.0, width / 2, height / 2)
  cams = cameras.make_cameras(inverse, poses, sizes)
  images = [rng.integers(0, 256, (h, w, 3), np.uint8) for w, h in sizes]
  return cams, images


def _mesh(n):
  return sharding.make_mesh(jax.devices()[:n])


def _run(settings, mesh, steps, on_device=True):
  cams, images = _capture()
  store = batches.make_store(images)
  step_fn = train_step.make_train_step(settings, mesh)
  state = sharding.replicate(train_step.create_state(settings), mesh)
  draw = train_step.make_draw(settings.config, mesh)
  table = sharding.replicate(cams, mesh)
  pixels = sharding.replicate(store, mesh) if on_device else None
  history = []
  for k in range(steps):
    source = pixels or train_step.host_pixels(draw, k, store, cams.size, mesh)
    state, stats = step_fn(state, table, source)
    history.append(jax.device_get(stats))
  return jax.device_get(state), history


def _lower(settings, mesh):
  cams, images = _capture()
  state = sharding.replicate(train_step.create_state(settings), mesh)
  step_fn = train_step.make_train_step(settings, mesh)
  store = sharding.replicate(batches.make_store(images), mesh)
  return step_fn.lower(state, sharding.replicate(cams, mesh), store)


def test_eight_devices_compute_what_one_does():
  settings = _settings()
  one, stats_one = _run(settings, _mesh(1), 3)
  eight, stats_eight = _run(settings, _mesh(8), 3)
  for a, b in zip(stats_one, stats_eight):
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=2e-4, err_msg=name)
  # Adam's first steps have the gradient's sign: an entry near zero may go either way, the rest not.
  moved = jax.tree.map(lambda a, b: np.abs(a - b), one.params, eight.params)
  worst = np.concatenate([d.ravel() for d in jax.tree.leaves(moved)])
  assert np.quantile(worst, 0.99) < 1e-5


def test_a_step_has_one_all_reduce():
  text = _lower(_settings(), _mesh(8)).compile().as_text()
  assert len(re.findall(r'= .* all-reduce(?:-start)?\(', text)) == 1
  assert not re.findall(r'= .* (?:all-gather|all-to-all|collective-permute)(?:-start)?\(', text)


def test_pixels_on_the_host_give_the_same_batches():
  settings = _settings()
  device, stats_device = _run(settings, _mesh(2), 2)
  host, stats_host = _run(settings, _mesh(2), 2, on_device=False)
  assert [s['loss'] for s in stats_device] == [s['loss'] for s in stats_host]
  jax.tree.map(np.testing.assert_array_equal, device.params, host.params)


def test_same_seed_same_run_other_seed_other_run():
  a, _ = _run(_settings(), _mesh(1), 2)
  b, _ = _run(_settings(), _mesh(1), 2)
  c, _ = _run(_settings('Config.seed = 7'), _mesh(1), 2)
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
  first = lambda s: s.params['nerf_mlp']['trunk_0']['kernel']  # noqa: E731
  assert np.abs(first(a) - first(c)).max() > 1e-3


def test_training_lowers_the_loss():
  settings = _settings('Config.lr_init = 0.01', 'Config.lr_delay_steps = 0')
  _, stats = _run(settings, _mesh(1), 60)
  assert np.mean([s['loss'] for s in stats[-5:]]) < 0.9 * np.mean([s['loss'] for s in stats[:5]])


def test_stats_add_up():
  _, (stats,) = _run(_settings(), _mesh(1), 1)
  terms = [v for k, v in stats.items() if k.startswith('loss_')]
  assert len(terms) == 3
  np.testing.assert_allclose(stats['loss'], sum(terms), rtol=1e-5)
  assert all(np.isfinite(v) for v in stats.values())


def test_a_batch_that_the_devices_do_not_divide_is_refused():
  settings = _settings('Config.batch_size = 60')
  with pytest.raises(ValueError, match='multiple of the device count, got 60 on 8; nearest: 64'):
    train_step.make_train_step(settings, _mesh(8))


def test_learning_rate_follows_the_schedule():
  config = _settings('Config.max_steps = 250000').config
  rate = train_step.learning_rate(config)
  np.testing.assert_allclose(rate(0), 2e-3 * 0.01, rtol=1e-5)
  np.testing.assert_allclose(
    rate(256), 2e-3 * 0.01 ** (256 / 250000) * (0.01 + 0.99 * np.sin(np.pi / 4)), rtol=1e-5
  )
  np.testing.assert_allclose(rate(125000), 2e-4, rtol=1e-4)
  np.testing.assert_allclose(rate(250000), 2e-5, rtol=1e-4)


def test_each_part_is_clipped_by_its_own_norm():
  clip = train_step.clip_by_part_norm(1.0)
  grads = {'a': {'x': jnp.array([3.0, 4.0])}, 'b': {'x': jnp.array([0.3, 0.4])}, 'c': jnp.zeros(2)}
  clipped, _ = clip.update(grads, clip.init(grads))
  np.testing.assert_allclose(clipped['a']['x'], [0.6, 0.8], rtol=1e-6)
  np.testing.assert_allclose(clipped['b']['x'], [0.3, 0.4], rtol=1e-6)
  np.testing.assert_array_equal(clipped['c'], 0)


def test_gradient_entries_are_clipped_where_asked():
  config = _settings('Config.grad_max_val = 1e-6', 'Config.grad_max_norm = 0.0').config
  optimizer = train_step.make_optimizer(config)
  grads = {'a': jnp.array([1.0, -2.0])}
  _, state = optimizer.update(grads, optimizer.init(grads), grads)
  adam = next(
    s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, 'mu')) if hasattr(s, 'mu')
  )
  np.testing.assert_allclose(adam.mu['a'], [1e-7, -1e-7], rtol=1e-4)


def test_annealing_and_schedule_see_the_fraction_done():
  assert train_step.train_fraction(jnp.array(0), 100) == 0
  assert train_step.train_fraction(jnp.array(99), 100) == 1
  assert train_step.train_fraction(jnp.array(0), 1) == 0


PLATFORMS = ('tpu', 'cuda', 'cpu')


def _abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.asarray(x).dtype), tree)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_training_and_rendering_lower_for_tpu_cuda_and_cpu(dtype):
  """At the paper's own size: nothing in the programs is of one platform only."""
  settings = configs.load_config(['configs/360.gin'], [f"Model.mlp_dtype = '{dtype}'"])
  mesh = Mesh(np.array(jax.devices()), (sharding.AXIS,))
  cams, images = _capture()
  state = jax.eval_shape(lambda: train_step.create_state(settings))
  args = (state, _abstract(cams), _abstract(batches.make_store(images)))
  step_fn = train_step.make_train_step(settings, mesh)
  exported = jax.export.export(step_fn, platforms=PLATFORMS)(*args)
  assert exported.platforms == PLATFORMS
  assert exported.nr_devices == 8
  render_fn = evaluation.make_chunk_renderer(settings, mesh)
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  frac = jax.ShapeDtypeStruct((), jnp.float32)
  exported = jax.export.export(render_fn, platforms=PLATFORMS)(
    state.params, args[1], scalar, scalar, frac
  )
  assert exported.platforms == PLATFORMS


def test_appearance_vectors_train_for_the_images_seen():
  settings = _settings('Model.num_glo_features = 4', 'Model.num_glo_embeddings = 5')
  before = train_step.create_state(settings).params['glo']['embedding']
  after, _ = _run(settings, _mesh(1), 1)
  moved = np.abs(after.params['glo']['embedding'] - before).max(-1)
  assert (moved[:3] > 0).all()  # The three images.
  assert (moved[3:] == 0).all()


def test_draws_are_uniform_over_pixels_of_images_of_any_size():
  size = np.array([[10, 10], [30, 10], [5, 4]])
  cam, x, y = batches.draw_pixels(jax.random.key(0), jnp.asarray(size), 42_000, 'all_images')
  counts = np.bincount(cam, minlength=3)
  np.testing.assert_allclose(counts / 42_000, np.array([100, 300, 20]) / 420, atol=0.01)
  assert all((x[cam == i].max(), y[cam == i].max()) == tuple(size[i] - 1) for i in range(3))
  assert x.min() == 0
  assert y.min() == 0


def test_single_image_batches_come_from_one_image():
  size = jnp.array([[10, 10]] * 6)
  seen = set()
  for k in range(8):
    cam, _, _ = batches.draw_pixels(jax.random.key(k), size, 100, 'single_image')
    assert len(np.unique(cam)) == 1
    seen.add(int(cam[0]))
  assert len(seen) > 2


def test_lookup_finds_each_pixel():
  cams, images = _capture()
  store = batches.make_store(images)
  for i, im in enumerate(images):
    y, x = np.mgrid[: im.shape[0], : im.shape[1]]
    found = batches.lookup(store, cams.size, np.full_like(x, i), x, y)
    np.testing.assert_array_equal(found, im)
    on_device = jax.device_put(store)
    found = batches.lookup(on_device, jnp.asarray(cams.size), np.full_like(x, i), x, y)
    np.testing.assert_array_equal(found, im)


def test_a_whole_image_is_rendered_in_chunks_of_any_fit():
  """Chunks that do not fit the image, on one device and on eight, give the same picture."""
  settings = _settings()
  cams, _ = _capture()
  params = train_step.create_state(settings).params
  pictures = []
  for chunk, devices in ((64, 1), (24, 8), (1024, 2)):
    told = _settings(f'Config.render_chunk_size = {chunk}')
    mesh = _mesh(devices)
    render_image = evaluation.make_image_renderer(told, mesh)
    calls = []
    out = render_image(
      sharding.replicate(params, mesh), cams, 1, progress=lambda *a, calls=calls: calls.append(a)
    )
    assert out['rgb'].shape == (8, 13, 3)
    assert out['distance_median'].shape == out['acc'].shape == (8, 13)
    assert calls[-1] == (104, 104)
    assert len(calls) == -(-104 // chunk)
    pictures.append(out['rgb'])
  np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-5)
  np.testing.assert_allclose(pictures[0], pictures[2], atol=1e-5)
  model = models.build(settings)
  rays = cameras.pixels_to_rays(cams, jnp.array([1]), jnp.array([5]), jnp.array([2]))
  renderings, _ = model.apply({'params': params}, None, rays, 1.0, False)
  np.testing.assert_allclose(pictures[0][2, 5], renderings[-1].rgb[0], atol=1e-5)
  assert isinstance(rays, structs.Rays)
