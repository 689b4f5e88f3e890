"""The training step: devices, micro-batches, determinism, schedule, learning, every platform."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh

from internal import configs
from internal.devices import sharding
from internal.rendering import renderer
from internal.training import batches, exposure, train_step


def _run(settings, mesh, steps, on_device=True, created=None):
  cams, images = tiny.capture()
  store = batches.make_store(images)
  step_fn = train_step.make_train_step(settings, mesh)
  state = sharding.place(train_step.create_state(created or settings), mesh)
  draw = train_step.make_draw(settings.config, mesh)
  table = sharding.replicate(exposure.add_tables(settings.config, cams), mesh)
  pixels = sharding.replicate(store, mesh) if on_device else None
  history = []
  for k in range(steps):
    source = pixels or train_step.host_pixels(draw, k, store, cams.size, mesh)
    state, stats = step_fn(state, table, source)
    history.append(jax.device_get(stats))
  return jax.device_get(state), history


def _lower(settings, mesh):
  cams, images = tiny.capture()
  state = sharding.place(train_step.create_state(settings), mesh)
  step_fn = train_step.make_train_step(settings, mesh)
  store = sharding.replicate(batches.make_store(images), mesh)
  return step_fn.lower(state, sharding.replicate(cams, mesh), store)


def test_seeds_share_a_program():
  programs, losses_of = set(), set()
  for seed in (1, 2, 4_000_000_000):
    settings = tiny.settings(f'Config.seed = {seed}')
    programs.add(_lower(settings, tiny.mesh(1)).as_text())
    losses = {
      on_device: float(_run(settings, tiny.mesh(1), 1, on_device, tiny.settings())[1][0]['loss'])
      for on_device in (True, False)
    }  # Of one state, whatever the seed.
    assert losses[True] == losses[False]
    losses_of.add(losses[True])
    key, _ = train_step.step_keys(settings.config, 5, train_step.seed_of(settings.config))
    wanted = jax.random.split(jax.random.fold_in(jax.random.key(seed), 5))[0]
    np.testing.assert_array_equal(*map(jax.random.key_data, (key, wanted)))
  assert len(programs) == 1
  assert len(losses_of) == 3


@pytest.mark.hammer
def test_eight_devices_compute_what_one_does():
  settings = tiny.settings()
  one, stats_one = _run(settings, tiny.mesh(1), 3)
  eight, stats_eight = _run(settings, tiny.mesh(8), 3)
  for a, b in zip(stats_one, stats_eight):
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=2e-4, err_msg=name)
  # Adam's first steps have the gradient's sign: an entry near zero may go either way, the rest not.
  moved = jax.tree.map(lambda a, b: np.abs(a - b), one.params, eight.params)
  worst = np.concatenate([d.ravel() for d in jax.tree.leaves(moved)])
  assert np.quantile(worst, 0.99) < 1e-5


def test_each_ray_of_each_step_has_its_own_key():
  config = tiny.settings().config
  keys = [jax.random.key_data(train_step.step_keys(config, k, config.seed)[1]) for k in range(3)]
  assert len(np.unique(np.concatenate(keys), axis=0)) == 3 * 64


@functools.cache
def _first_gradient(*bindings, devices=1):
  """A first step's stats, and Adam's mean of gradients: a tenth of the clipped gradient."""
  state, (stats,) = _run(tiny.settings(*bindings), tiny.mesh(devices), 1)
  adams = {name: _adam(part) for name, part in state.opt_state.items()}
  # A part without Adam was changed by a multiple of its gradient.
  return stats, {n: state.params[n] if adam is None else adam.mu for n, adam in adams.items()}


def _adam(opt_state):
  is_adam = lambda s: hasattr(s, 'mu')  # noqa: E731
  return next(filter(is_adam, jax.tree.leaves(opt_state, is_leaf=is_adam)), None)


MANY_DRAWS = (
  'Model.single_jitter = False',
  'NerfMLP.density_noise = 1.0',
  "Config.weight_decay_mults = {'nerf_mlp': 0.1}",
)


OF_PHOTOGRAPHS = (
  "Config.exposure = 'gain_colour'",
  'Config.patch_size = 4',
  'Config.robust_quantile = 0.8',
  'Config.batch_size = 256',
)


@pytest.mark.parametrize(
  ('bindings', 'micro_batches', 'devices'),
  [
    pytest.param(MANY_DRAWS, 4, 1, marks=pytest.mark.hammer),
    pytest.param(MANY_DRAWS, 1, 8, marks=pytest.mark.hammer),
    (MANY_DRAWS, 2, 8),
    pytest.param(("Config.batching = 'single_image'",), 2, 8, marks=pytest.mark.hammer),
    (OF_PHOTOGRAPHS, 2, 8),
    (('Config.interlevel_every = 4',), 2, 8),
  ],
)
def test_any_split_into_devices_and_micro_batches_has_the_same_gradient(
  bindings, micro_batches, devices
):
  stats, whole = _first_gradient(*bindings, 'Config.micro_batches = 1')
  told = f'Config.micro_batches = {micro_batches}'
  stats_split, split = _first_gradient(*bindings, told, devices=devices)
  for name in stats:
    np.testing.assert_allclose(stats[name], stats_split[name], rtol=1e-4, err_msg=name)
  for part in whole:
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole[part]))
    jax.tree.map(
      lambda a, b, largest=largest: np.testing.assert_allclose(a, b, atol=1e-3 * largest),
      whole[part],
      split[part],
    )


@pytest.mark.parametrize('micro_batches', [1, 2])
def test_a_step_has_one_all_reduce(micro_batches):
  settings = tiny.settings(f'Config.micro_batches = {micro_batches}')
  text = _lower(settings, tiny.mesh(8)).compile().as_text()
  assert len(re.findall(r'= .* all-reduce(?:-start)?\(', text)) == 1
  others = 'all-gather|all-to-all|collective-permute|reduce-scatter'
  assert not re.findall(rf'= .* (?:{others})(?:-start)?\(', text)


@pytest.mark.hammer
def test_micro_batches_are_as_few_as_fit():
  settings, mesh = tiny.settings('Config.batch_size = 256'), tiny.mesh(1)

  def first_step(free):
    cams, images = tiny.capture()
    state = sharding.place(train_step.create_state(settings), mesh)
    store = sharding.replicate(batches.make_store(images), mesh)
    step_fn = train_step.make_train_step(settings, mesh, lambda mesh: free)
    step_fn(state, sharding.replicate(cams, mesh), store)
    return step_fn

  whole = first_step(None)
  assert whole.micro_batches == 1
  halves = first_step(whole.needed / 0.95)
  assert halves.micro_batches == 2
  assert halves.needed < 0.75 * whole.needed


def test_micro_batches_divide_the_rays_of_a_device():
  def choices(devices, *bindings):
    return train_step.make_train_step(tiny.settings(*bindings), tiny.mesh(devices)).choices

  assert choices(1, 'Config.batch_size = 24') == (1, 2, 4, 8)
  assert choices(8, 'Config.batch_size = 24') == (1,)
  assert choices(8, 'Config.batch_size = 24', 'Config.micro_batches = 3') == (3,)
  with pytest.raises(
    configs.ConfigError, match=r'micro_batches must divide .* got 5 for 8 .*64 on 8'
  ):
    choices(8, 'Config.micro_batches = 5')
  assert choices(1, 'Config.batch_size = 24', 'Config.interlevel_every = 4') == (1, 2)
  every = 'Config.interlevel_every = 4'
  for rays, more in ((6, ()), (3, ('Config.micro_batches = 2',))):
    with pytest.raises(configs.ConfigError, match=rf'interlevel_every must divide the {rays} rays'):
      choices(4, 'Config.batch_size = 24', every, *more)
  with pytest.raises(configs.ConfigError, match=r'micro_batches must divide .* got 3 for 64'):
    choices(1, 'Config.micro_batches = 3', every)


@pytest.mark.hammer
def test_pixels_on_the_host_give_the_same_batches():
  settings = tiny.settings()
  device, stats_device = _run(settings, tiny.mesh(2), 2)
  host, stats_host = _run(settings, tiny.mesh(2), 2, on_device=False)
  assert [s['loss'] for s in stats_device] == [s['loss'] for s in stats_host]
  jax.tree.map(np.testing.assert_array_equal, device.params, host.params)


@pytest.mark.hammer
def test_same_seed_same_run_other_seed_other_run():
  a, _ = _run(tiny.settings(), tiny.mesh(1), 2)
  b, _ = _run(tiny.settings(), tiny.mesh(1), 2)
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
  kernels, keys = [], []
  for settings in (tiny.settings(), tiny.settings('Config.seed = 7')):
    kernels.append(train_step.create_state(settings).params['nerf_mlp']['trunk_0']['kernel'])
    both = train_step.step_keys(settings.config, 0, settings.config.seed)
    keys.append(jax.tree.map(jax.random.key_data, both))
  assert np.abs(kernels[0] - kernels[1]).max() > 1e-3
  assert all(map(np.any, jax.tree.map(np.not_equal, *keys)))  # Of the pixels and of the rays.


def test_training_lowers_the_loss():
  settings = tiny.settings('Config.lr_init = 0.01', 'Config.lr_delay_steps = 0')
  _, stats = _run(settings, tiny.mesh(1), 60)
  assert np.mean([s['loss'] for s in stats[-5:]]) < 0.9 * np.mean([s['loss'] for s in stats[:5]])


def test_stats_add_up():
  _, (stats,) = _run(tiny.settings(), tiny.mesh(1), 1)
  terms = [v for k, v in stats.items() if k.startswith('loss_')]
  assert len(terms) == 3
  np.testing.assert_allclose(stats['loss'], sum(terms), rtol=1e-5)
  assert all(np.isfinite(v) for v in stats.values())
  assert len(jax.tree.leaves(stats)) == 1, 'each array takes a host as long to fetch'
  with pytest.raises(KeyError, match='loss_of_nothing'):
    stats['loss_of_nothing']


def test_a_batch_size_not_divisible_by_the_devices_is_refused():
  settings = tiny.settings('Config.batch_size = 60')
  with pytest.raises(ValueError, match=r'divisible by the number of devices \(8\), got 60; use 64'):
    train_step.make_train_step(settings, tiny.mesh(8))
  settings = tiny.settings('Config.batch_size = 96', 'Config.patch_size = 4')
  with pytest.raises(ValueError, match=r'\(8\) times the 16 pixels of a patch, got 96; use 128'):
    train_step.make_train_step(settings, tiny.mesh(8))


def test_learning_rate_follows_the_schedule():
  config = tiny.settings('Config.max_steps = 250000').config
  rate = train_step.learning_rate(config)
  np.testing.assert_allclose(rate(0), 2e-3 * 0.01, rtol=1e-5)
  np.testing.assert_allclose(
    rate(256), 2e-3 * 0.01 ** (256 / 250000) * (0.01 + 0.99 * np.sin(np.pi / 4)), rtol=1e-5
  )
  np.testing.assert_allclose(rate(125000), 2e-4, rtol=1e-4)
  np.testing.assert_allclose(rate(250000), 2e-5, rtol=1e-4)


def test_learning_rate_cools_down_to_zero():
  rates = []
  for fraction in ('0.0', '0.2'):
    config = tiny.settings('Config.max_steps = 1000', f'Config.lr_cooldown = {fraction}').config
    rates.append([float(train_step.learning_rate(config)(k)) for k in (700, 800, 850, 990, 1000)])
  factors = np.divide(rates[1], rates[0])
  np.testing.assert_allclose(factors, [1, 1, 0.75, 0.05, 0], atol=1e-6)


def test_gradients_are_clipped_by_their_norm():
  clip = train_step.clip_by_norm(1.0)
  for grads, wanted in (((3.0, 4.0), (0.6, 0.8)), ((0.3, 0.4), (0.3, 0.4)), ((0, 0), (0, 0))):
    tree = {'x': jnp.array(grads[:1]), 'y': jnp.array(grads[1:])}
    clipped, _ = clip.update(tree, clip.init(tree))
    np.testing.assert_allclose([clipped['x'][0], clipped['y'][0]], wanted, rtol=1e-6)


def test_gradient_entries_are_clipped_where_asked():
  config = tiny.settings('Config.grad_max_val = 1e-6', 'Config.grad_max_norm = 0.0').config
  optimizer = train_step.make_optimizer(config)
  grads = {'a': jnp.array([1.0, -2.0])}
  _, state = optimizer.update(grads, optimizer.init(grads), grads)
  np.testing.assert_allclose(_adam(state).mu['a'], [1e-7, -1e-7], rtol=1e-4)


def test_annealing_and_schedule_see_the_fraction_done():
  assert train_step.train_fraction(jnp.array(0), 100) == 0
  assert train_step.train_fraction(jnp.array(99), 100) == 1
  assert train_step.train_fraction(jnp.array(0), 1) == 0


GRID = (
  "PropMLP.encoding = 'grid'",
  "NerfMLP.encoding = 'grid'",
  'PropMLP.net_depth = 1',
  'NerfMLP.net_depth = 1',
  'PropMLP.grid_levels = 2',
  'PropMLP.grid_max_resolution = 32',
  'PropMLP.grid_log2_size = 8',
  'NerfMLP.grid_levels = 2',
  'NerfMLP.grid_max_resolution = 64',
  'NerfMLP.grid_log2_size = 10',
  'Model.separate_prop_mlps = True',
  'Model.deterministic_grid = True',
  'Config.grid_decay_mult = 0.1',
  'Config.adam_eps = 1e-15',
  'Config.grad_max_norm = 0.0',
)


@pytest.mark.hammer
def test_grids_split_over_devices_and_micro_batches():
  stats, whole = _first_gradient(*GRID, 'Config.micro_batches = 1')
  stats_split, split = _first_gradient(*GRID, 'Config.micro_batches = 2', devices=2)
  for name in stats:
    np.testing.assert_allclose(stats[name], stats_split[name], rtol=1e-3, err_msg=name)
  for part in whole:
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole[part]))
    for a, b in zip(jax.tree.leaves(whole[part]), jax.tree.leaves(split[part])):
      np.testing.assert_allclose(a, b, atol=1e-3 * largest)


def test_sharded_tables_are_updated_as_replicated_ones(monkeypatch):
  settings = tiny.settings(*GRID, 'Config.grad_max_norm = 0.01')
  one, stats_one = _run(settings, tiny.mesh(1), 3)
  monkeypatch.setattr(sharding, '_LARGE', 1024)
  mesh = tiny.mesh(8)
  eight, stats_eight = _run(settings, mesh, 3)
  for a, b in zip(stats_one, stats_eight):
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=2e-4, err_msg=name)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).ravel(), one.params, eight.params)
  assert np.quantile(np.concatenate(jax.tree.leaves(moved)), 0.99) < 1e-5
  placed = sharding.specs(eight, mesh)
  table = placed.params['nerf_mlp']['grid']['table_1']
  assert table == _adam(placed.opt_state['nerf_mlp']).nu['grid']['table_1'] == sharding.SPLIT
  text = _lower(settings, mesh).compile().as_text()
  for collective in ('all-gather', 'reduce-scatter'):
    count = len(re.findall(rf'= .* {collective}(?:-start)?\(', text))
    assert count == jax.tree.leaves(placed.params).count(sharding.SPLIT)


def test_grids_learn_and_repeat_to_the_bit():
  settings = tiny.settings(*GRID, 'Config.lr_init = 0.01', 'Config.lr_delay_steps = 0')
  a, stats = _run(settings, tiny.mesh(1), 40)
  b, _ = _run(settings, tiny.mesh(1), 40)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert np.mean([s['loss'] for s in stats[-5:]]) < 0.9 * np.mean([s['loss'] for s in stats[:5]])


PLATFORMS = ('tpu', 'cuda', 'cpu')


def _abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.asarray(x).dtype), tree)


@pytest.mark.parametrize(
  ('name', 'binding'),
  [
    ('360', "Model.mlp_dtype = 'float32'"),
    ('360', "Model.mlp_dtype = 'bfloat16'"),
    pytest.param('360_grid', "Model.mlp_dtype = 'bfloat16'", marks=pytest.mark.hammer),
    pytest.param('360_fast', 'Model.deterministic_grid = True', marks=pytest.mark.hammer),
  ],
)
def test_training_and_rendering_lower_for_tpu_cuda_and_cpu(name, binding):
  """At the paper's own size: nothing in the programs is of one platform only."""
  settings = configs.load_config([f'configs/{name}.gin'], [binding])
  mesh = Mesh(np.array(jax.devices()), (sharding.AXIS,))
  cams, images = tiny.capture()
  state = train_step.abstract_state(settings)
  one = np.int32(1)
  args = (state, _abstract(cams), _abstract(batches.make_store(images)), one, one)
  step_fn = train_step.make_train_step(settings, mesh)
  exported = jax.export.export(step_fn.variant(1), platforms=PLATFORMS)(*args)
  assert exported.platforms == PLATFORMS
  assert exported.nr_devices == 8
  render_fn = renderer.make_chunk_renderer(settings, mesh)
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  frac = jax.ShapeDtypeStruct((), jnp.float32)
  exported = jax.export.export(render_fn.variant(16384), platforms=PLATFORMS)(
    state.params, args[1], scalar, scalar, frac
  )
  assert exported.platforms == PLATFORMS


def test_appearance_vectors_train_for_the_images_seen():
  settings = tiny.settings('Model.num_glo_features = 4', 'Model.num_glo_embeddings = 5')
  before = train_step.create_state(settings).params['glo']['embedding']
  after, _ = _run(settings, tiny.mesh(1), 1)
  moved = np.abs(after.params['glo']['embedding'] - before).max(-1)
  assert (moved[:3] > 0).all()  # The three images.
  assert (moved[3:] == 0).all()
