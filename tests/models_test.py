"""The encoding, the MLPs and the proposal loop: sizes, invariants, settings, gradients.

GPU-specific code paths are compared with plain XLA.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from dense_test import spy
from hopper_test import kernels, lower_for_cuda
from jax.sharding import Mesh

from internal import configs, coord, losses, models, stepfun, structs
from internal.devices import sharding
from internal.fields import encodings, hopper, mlp
from internal.rendering import renderer
from internal.training import batches, train_step

SCENE_360 = (
  'Config.near = 0.2',
  'Config.far = 1e6',
  'Model.raydist_fn = @jnp.reciprocal',
  'Model.opaque_background = True',
  'PropMLP.warp_fn = @coord.contract',
  'PropMLP.net_depth = 4',
  'PropMLP.net_width = 256',
  'PropMLP.disable_rgb = True',
  'NerfMLP.warp_fn = @coord.contract',
  'NerfMLP.net_depth = 8',
  'NerfMLP.net_width = 1024',
)
BLENDER = (
  'Model.num_levels = 2',
  'Model.num_prop_samples = 128',
  'PropMLP.net_depth = 4',
  'PropMLP.net_width = 256',
  'PropMLP.disable_rgb = True',
  'PropMLP.max_deg_point = 16',
  'NerfMLP.net_depth = 8',
  'NerfMLP.max_deg_point = 16',
)
AXES = ('PropMLP', 'NerfMLP')
OCTAHEDRON = tuple(f"{m}.basis_shape = 'octahedron'" for m in AXES) + tuple(
  f'{m}.basis_subdivisions = 1' for m in AXES
)
# Settings of a 360 scene with a tiny model.
TINY = (
  *SCENE_360,
  'Model.num_prop_samples = 12',
  'Model.num_nerf_samples = 8',
  'PropMLP.net_depth = 2',
  'PropMLP.net_width = 16',
  'NerfMLP.net_depth = 2',
  'NerfMLP.net_width = 16',
  'NerfMLP.bottleneck_width = 8',
  'NerfMLP.net_width_viewdirs = 8',
  'PropMLP.max_deg_point = 4',
  'NerfMLP.max_deg_point = 4',
)
KEY = jax.random.key(0)


def _rays(n=6):
  rng = np.random.default_rng(0)
  directions = rng.normal(size=(n, 3))
  viewdirs = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
  arrays = rng.uniform(-0.5, 0.5, (n, 3)), directions, viewdirs, np.full((n, 1), 1e-3)
  return structs.Rays(*map(jnp.float32, arrays), jnp.arange(n, dtype=jnp.int32))


RAYS = _rays()


@functools.cache
def _make(*bindings):
  """Returns settings, parameters and forward pass of the tiny model.

  The forward pass is not jitted: configurations share most operations, and compiling each operation
  once is faster than compiling each configuration. Parameters are random, drawn by shape.
  """
  settings = configs.load_config((), (*TINY, *bindings))
  model = models.build(settings)
  shapes = jax.eval_shape(functools.partial(models.init_params, model), KEY)
  rng = np.random.default_rng(2)

  def draw(leaf):
    bound = np.sqrt(6 / leaf.shape[0]) if leaf.ndim == 2 else 0.1
    return jnp.float32(rng.uniform(-bound, bound, leaf.shape))

  def apply(params, key, rays, train_frac=1.0, use_glo=True):
    return model.apply({'params': params}, key, rays, train_frac, use_glo)

  return settings, jax.tree.map(draw, shapes), apply


@functools.cache
def _plain(*bindings, random=False):
  _, params, apply = _make(*bindings)
  return apply(params, KEY if random else None, RAYS)


def _forward(*bindings, rays=RAYS, **kwargs):
  _, params, apply = _make(*bindings)
  return apply(params, kwargs.pop('key', None), rays, **kwargs)


def _differs(a, b):
  return float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) > 1e-4


class TestEncoding:
  def test_is_the_expectation_along_each_direction(self):
    rng = np.random.default_rng(1)
    mean, a = rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 5, 3, 3)) * 0.1
    cov = a @ np.swapaxes(a, -1, -2)
    encoding = encodings.IntegratedPositionalEncoding(0, 3, 'octahedron', 1)
    out = encoding(structs.Gaussians(jnp.float32(mean), jnp.float32(cov)))
    var = np.diagonal(cov, axis1=-2, axis2=-1)
    expected = [
      np.exp(-0.5 * 4**l * var) * fn(2**l * mean) for fn in (np.sin, np.cos) for l in range(3)
    ]
    np.testing.assert_allclose(out, np.concatenate(expected, -1), atol=1e-5)

  def test_of_the_paper_has_504_features_and_no_parameters(self):
    encoding = encodings.IntegratedPositionalEncoding(0, 12, 'icosahedron', 2)
    gaussians = structs.Gaussians(jnp.zeros((2, 3)), jnp.zeros((2, 3, 3)))
    out, variables = encoding.init_with_output(KEY, gaussians)
    assert out.shape == (2, 504)
    assert not variables


class TestSizes:
  @pytest.mark.parametrize(
    ('bindings', 'count'),
    [
      (SCENE_360, 9_007_493),
      ((*SCENE_360, 'Model.num_glo_features = 4', 'Model.num_glo_embeddings = 1000'), 9_012_005),
      ((*BLENDER, *OCTAHEDRON, 'NerfMLP.net_width = 256'), 835_205),
      ((*BLENDER, 'NerfMLP.net_width = 512'), 3_065_733),
    ],
    ids=['360', '360_glo4', 'width_256', 'width_512'],
  )
  def test_parameter_counts_are_exact(self, bindings, count):
    model = models.build(configs.load_config((), bindings))
    shapes = jax.eval_shape(functools.partial(models.init_params, model), KEY)
    assert models.num_params(shapes) == count
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))

  def test_initial_values(self):
    params = models.init_params(models.build(configs.load_config((), TINY)), KEY)
    assert params.keys() == {'prop_mlp', 'nerf_mlp'}
    for layers in params.values():
      for layer in layers.values():
        np.testing.assert_array_equal(layer['bias'], 0)
        fan_in = layer['kernel'].shape[0]
        # he_uniform: uniform within sqrt(6 / fan_in).
        largest, bound = np.max(np.abs(layer['kernel'])), np.sqrt(6 / fan_in)
        assert 0.5 * bound < largest <= bound

  def test_skip_and_view_layers(self):
    bindings = (*TINY, 'NerfMLP.net_depth = 6')
    model = models.build(configs.load_config((), bindings))
    shapes = jax.eval_shape(functools.partial(models.init_params, model), KEY)['nerf_mlp']
    kernels = {name: layer['kernel'].shape for name, layer in shapes.items()}
    assert kernels['trunk_4'] == (16, 16)
    assert kernels['trunk_5'] == (16 + 2 * 4 * 21, 16)  # After the fifth layer.
    assert kernels['bottleneck'] == (16, 8)
    assert kernels['view_0'] == (8 + 27, 8)
    assert kernels['density'] == (16, 1)
    assert kernels['rgb'] == (8, 3)


class TestHistory:
  @pytest.mark.parametrize('key', [None, KEY], ids=['still', 'random'])
  @pytest.mark.parametrize('frac', [0.0, 0.5, 1.0])
  def test_invariants(self, key, frac):
    renderings, history = _forward(key=key, train_frac=frac)
    assert [h.weights.shape for h in history] == [(6, 12), (6, 12), (6, 8)]
    for h in history:
      assert h.sdist.shape == h.tdist.shape == (6, h.weights.shape[-1] + 1)
      assert np.all(np.diff(h.sdist) >= 0)
      assert np.all((h.sdist >= 0) & (h.sdist <= 1))
      assert np.all((h.tdist >= np.float32(0.2)) & (h.tdist <= 1e6))
      assert np.all(h.weights >= 0)
      np.testing.assert_allclose(np.sum(h.weights, -1), 1, rtol=1e-5)  # Opaque background.
    assert renderings[0] is None
    assert renderings[1] is None
    out = renderings[2]
    assert out.rgb.shape == out.distance_percentiles.shape == (6, 3)
    assert out.acc.shape == out.distance_mean.shape == (6,)
    assert np.all(np.diff(out.distance_percentiles) >= 0)

  def test_weights_without_an_opaque_background(self):
    renderings, history = _forward('Model.opaque_background = False', 'Config.far = 3.0')
    acc = np.sum(history[-1].weights, -1)
    assert np.all((acc > 0) & (acc < 1))
    np.testing.assert_allclose(renderings[-1].acc, acc, rtol=1e-5)

  def test_keeps_any_leading_axes(self):
    rays = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), RAYS)
    _, params, apply = _make()
    nested, _ = jax.jit(apply)(params, None, rays)
    flat, _ = _plain()
    np.testing.assert_allclose(nested[-1].rgb.reshape(6, 3), flat[-1].rgb, atol=1e-4)

  def test_samples_follow_the_weights(self):
    # A density bias that makes the first interval opaque draws all further samples to the front,
    # within the dilation of that interval.
    _, params, apply = _make()
    params = _biased(params, 1e10)
    _, history = apply(params, None, RAYS)
    dilation = 0.0025 + 0.5 / 12
    assert np.all(history[1].sdist[:, -1] < 1 / 12 + 2 * dilation)
    assert np.all(history[1].sdist[:, 0] == 0)

  @pytest.mark.parametrize('frac', [0.0, 0.05, 1.0])
  def test_resamples_the_dilated_annealed_histogram(self, frac):
    _, history = _forward(train_frac=frac)
    for level, product in ((1, 12), (2, 144)):
      before = history[level - 1]
      t, w = stepfun.max_dilate_weights(
        before.sdist, before.weights, 0.0025 + 0.5 / product, (0.0, 1.0), True
      )
      logits = 10 * frac / (9 * frac + 1) * np.log(np.maximum(w, 1e-37))
      logits = np.where(np.diff(t) > 0, logits, -np.inf)[:, 1:-1]
      num = history[level].weights.shape[-1]
      expected = stepfun.sample_intervals(None, t[:, 1:-1], logits, num, True, (0.0, 1.0))
      np.testing.assert_allclose(history[level].sdist, expected, atol=1e-4)


def _biased(params, value, mlps=('prop_mlp', 'nerf_mlp')):
  """Returns the parameters with the bias of every density layer set to `value`."""
  params = dict(params)
  for name in mlps:
    density = {**params[name]['density'], 'bias': jnp.full((1,), value, jnp.float32)}
    params[name] = {**params[name], 'density': density}
  return params


class TestRandomness:
  def test_none_without_a_key(self):
    renderings, history = _plain()
    np.testing.assert_array_equal(_forward()[0][-1].rgb, renderings[-1].rgb)
    np.testing.assert_allclose(history[0].sdist[0], np.linspace(0, 1, 13), atol=1e-6)

  def test_a_key_jitters_rays_apart_and_repeats(self):
    _, history = _plain(random=True)
    _, again = _forward(key=KEY)
    _, other = _forward(key=jax.random.key(5))
    np.testing.assert_array_equal(history[-1].sdist, again[-1].sdist)
    assert _differs(history[0].sdist, other[0].sdist)
    inner = np.asarray(history[0].sdist[:, 1:-1])
    assert np.std(inner[:, 0]) > 1e-3  # Each ray its own jitter,
    np.testing.assert_allclose(np.diff(inner), 1 / 12, atol=1e-6)  # one for all of its strata.

  def test_with_a_key_per_ray_draws_are_independent_of_the_batch(self):
    bindings = (
      'Model.single_jitter = False',
      'Model.opaque_background = False',
      'Model.bg_intensity_range = (0.0, 1.0)',
      'NerfMLP.density_noise = 1.0',
      'NerfMLP.bottleneck_noise = 1.0',
    )
    _, params, apply = _make(*bindings)
    apply = jax.jit(apply)  # Drawing for each ray is many small operations.
    keys = jax.random.split(KEY, 6)
    whole = apply(params, keys, RAYS)
    half = apply(params, keys[2:4], jax.tree.map(lambda x: x[2:4], RAYS))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(half)):
      np.testing.assert_allclose(a[2:4], b, rtol=1e-3, atol=1e-5)
    first = np.asarray(whole[1][0].sdist)
    assert np.std(first[:, 1]) > 1e-3
    assert np.std(np.diff(first[0])) > 1e-3
    other = apply(params, keys[::-1], RAYS)
    assert _differs(other[0][-1].rgb, whole[0][-1].rgb)

  def test_jitter_per_interval_without_single_jitter(self):
    _, history = _forward('Model.single_jitter = False', key=KEY)
    assert np.std(np.diff(np.asarray(history[0].sdist[:, 1:-1]))) > 1e-3

  def test_density_noise(self):
    noisy = 'NerfMLP.density_noise = 1.0'
    assert _differs(_plain(noisy, random=True)[1][-1].weights, _plain(random=True)[1][-1].weights)
    same = _plain(noisy)[1][-1].weights, _plain()[1][-1].weights
    np.testing.assert_array_equal(*same)

  def test_bottleneck_noise(self):
    noisy = 'NerfMLP.bottleneck_noise = 1.0'
    assert _differs(_plain(noisy, random=True)[0][-1].rgb, _plain(random=True)[0][-1].rgb)

  def test_background_range(self):
    bindings = 'Model.opaque_background = False', 'Model.bg_intensity_range = (0.2, 0.8)'
    _, params, apply = _make(*bindings)
    params = _biased(params, -1e10)  # Nothing on the rays: the background is what shows.
    still, random = (apply(params, key, RAYS)[0][-1].rgb for key in (None, KEY))
    np.testing.assert_allclose(still, 0.5, rtol=1e-6)
    assert np.all((random >= 0.2) & (random <= 0.8))
    assert np.std(random[:, 0]) > 0.05
    np.testing.assert_allclose(random, np.tile(random[:, :1], 3))  # Grey.
    white = _make(bindings[0])[2](params, KEY, RAYS)[0][-1].rgb
    np.testing.assert_allclose(white, 1, rtol=1e-6)


class TestSwitches:
  def test_single_mlp(self):
    _, params, _ = _make('Model.single_mlp = True')
    assert params.keys() == {'nerf_mlp'}
    renderings, _ = _forward('Model.single_mlp = True')
    assert all(r is not None for r in renderings)

  def test_proposals_with_colour(self):
    renderings, history = _forward('PropMLP.disable_rgb = False')
    assert all(r is not None for r in renderings)
    assert history[0].rgb.shape == (6, 12, 3)
    assert _plain()[1][0].rgb is None

  def test_colours_are_padded_sigmoids(self):
    _, params, apply = _make()
    for raw, expected in ((1e10, 1.001), (-1e10, -0.001), (0.0, 0.5)):
      head = jax.tree.map(jnp.zeros_like, params['nerf_mlp']['rgb'])
      head['bias'] = jnp.full(3, raw)
      rgb = apply({**params, 'nerf_mlp': {**params['nerf_mlp'], 'rgb': head}}, None, RAYS)[0][
        -1
      ].rgb
      np.testing.assert_allclose(rgb, expected, atol=1e-5)

  def test_density_is_softplus_of_raw_minus_one(self):
    settings, params, _ = _make()
    nerf_mlp = mlp.MLP(settings.nerf_mlp)
    zeros = jax.tree.map(jnp.zeros_like, params['nerf_mlp'])
    gaussians = structs.Gaussians(jnp.ones((6, 8, 3)), jnp.zeros((6, 8, 3, 3)))
    density, rgb = nerf_mlp.apply({'params': zeros}, None, gaussians, jnp.ones((6, 3)))
    assert density.shape == (6, 8)
    assert rgb.shape == (6, 8, 3)
    np.testing.assert_allclose(density, np.log1p(np.exp(-1)), rtol=1e-5)

  def test_view_directions(self):
    turned = RAYS.replace(viewdirs=-RAYS.viewdirs)
    assert _differs(_forward(rays=turned)[0][-1].rgb, _plain()[0][-1].rgb)
    # They tint, but never move: density does not see them.
    np.testing.assert_array_equal(_forward(rays=turned)[1][-1].weights, _plain()[1][-1].weights)
    blind = 'Model.use_viewdirs = False'
    np.testing.assert_array_equal(_forward(blind, rays=turned)[0][-1].rgb, _plain(blind)[0][-1].rgb)

  def test_disable_integration(self):
    wide = RAYS.replace(radii=RAYS.radii * 300)
    assert _differs(_forward(rays=wide)[0][-1].rgb, _plain()[0][-1].rgb)
    points = 'Model.disable_integration = True'
    np.testing.assert_array_equal(_forward(points, rays=wide)[0][-1].rgb, _plain(points)[0][-1].rgb)

  def test_cylinders(self):
    assert _differs(
      _forward("Model.ray_shape = 'cylinder'")[1][-1].weights, _plain()[1][-1].weights
    )

  def test_contraction(self):
    # Without it, far points are beyond the lowest frequency's period.
    flat = 'PropMLP.warp_fn = None', 'NerfMLP.warp_fn = None'
    assert _differs(_forward(*flat)[1][-1].weights, _plain()[1][-1].weights)

  def test_near_anneal(self):
    bindings = 'Model.near_anneal_rate = 0.1', 'Model.near_anneal_init = 0.9'
    first = [_forward(*bindings, train_frac=f)[1] for f in (0.0, 0.05, 1.0)]
    for history, start in zip(first, (0.9, 0.5, 0.0)):
      np.testing.assert_allclose(history[0].sdist[:, 0], start, atol=1e-6)
      assert all(np.all(h.sdist >= np.float32(start) - 1e-6) for h in history)

  def test_resampling_without_dilation(self):
    bindings = 'Model.dilation_bias = 0.0', 'Model.dilation_multiplier = 0.0'
    assert _differs(_forward(*bindings)[1][-1].sdist, _plain()[1][-1].sdist)

  def test_first_distances_follow_the_ray_warp(self):
    _, history = _plain()
    _, s_to_t = coord.ray_warps('reciprocal', 0.2, 1e6)
    for h in history:
      np.testing.assert_allclose(h.tdist, s_to_t(h.sdist), rtol=1e-5)


class TestAppearance:
  glo = 'Model.num_glo_features = 4', 'Model.num_glo_embeddings = 6'

  def test_images_differ_in_training(self):
    same = RAYS.replace(cam_idx=jnp.zeros(6, jnp.int32))
    a, b = _forward(*self.glo, rays=same), _forward(*self.glo, rays=RAYS)
    np.testing.assert_allclose(a[0][-1].rgb[0], b[0][-1].rgb[0], atol=1e-6)
    assert _differs(a[0][-1].rgb[1:], b[0][-1].rgb[1:])
    np.testing.assert_array_equal(a[1][-1].weights, b[1][-1].weights)  # Colour only.

  def test_zeros_at_evaluation(self):
    _, params, apply = _make(*self.glo)
    still = apply(params, None, RAYS, use_glo=False)[0][-1].rgb
    other = RAYS.replace(cam_idx=RAYS.cam_idx[::-1])
    np.testing.assert_array_equal(apply(params, None, other, use_glo=False)[0][-1].rgb, still)
    zeroed = {**params, 'glo': jax.tree.map(jnp.zeros_like, params['glo'])}
    np.testing.assert_array_equal(apply(zeroed, None, RAYS)[0][-1].rgb, still)
    assert _differs(apply(params, None, RAYS)[0][-1].rgb, still)

  def test_works_without_view_directions(self):
    out, _ = _forward(*self.glo, 'Model.use_viewdirs = False')
    assert np.all(np.isfinite(out[-1].rgb))


@functools.cache
def _slopes(*bindings):
  """A compiled function from parameters to each loss term and its gradient."""
  settings, params, apply = _make(*bindings)
  batch = structs.Batch(RAYS, jnp.full((6, 3), 0.2))

  def terms(params, mults):
    renderings, history = apply(params, KEY, RAYS, 0.5)
    _, parts = losses.total(settings.config, params, renderings, history, batch)
    return sum(mults[name] * value for name, value in parts.items()), parts

  return params, jax.jit(jax.value_and_grad(terms, has_aux=True))


def _norms(tree):
  return {k: float(sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(v))) for k, v in tree.items()}


ALL_TERMS = {'data': 1.0, 'interlevel': 1.0, 'distortion': 0.01}


class TestGradients:
  @pytest.mark.parametrize(
    ('term', 'trained', 'untouched'),
    [
      ('data', 'nerf_mlp', 'prop_mlp'),
      ('distortion', 'nerf_mlp', 'prop_mlp'),
      ('interlevel', 'prop_mlp', 'nerf_mlp'),
    ],
  )
  def test_each_loss_trains_its_own_mlp(self, term, trained, untouched):
    params, slopes = _slopes()
    # Proposals that see nothing but the last, opaque interval lack weight everywhere else.
    params = _biased(params, -3.0, ('prop_mlp',))
    mults = {name: float(name == term) for name in ALL_TERMS}
    (value, _), grads = slopes(params, mults)
    assert value > 0
    norms = _norms(grads)
    assert norms[trained] > 1e-6
    assert norms[untouched] == 0

  @pytest.mark.parametrize(
    'key', [None, KEY, jax.random.split(KEY, 6)], ids=['none', 'one', 'each']
  )
  @pytest.mark.parametrize('more', [(), ('Model.num_glo_features = 2',)], ids=['plain', 'glo'])
  def test_every_nth_ray_trains_the_proposals_and_all_train_the_rest(self, key, more):
    settings, params, _ = _make('Config.interlevel_every = 3', *more)
    model, batch = models.build(settings), structs.Batch(RAYS, jnp.full((6, 3), 0.2))
    whole = configs.Config()

    def loss(params, rows, every, config):
      renderings, history = model.apply({'params': params}, key, RAYS, 0.5, proposals_every=every)
      taken = jax.tree.map(lambda x: x[rows], (renderings, history, batch))
      terms = losses.total(config, params, *taken)[1]
      return sum(terms.values()), terms

    slopes = jax.value_and_grad(loss, has_aux=True)
    (_, terms), grads = slopes(params, slice(None), 3, settings.config)
    (_, of_all), all_grads = slopes(params, slice(None), 1, whole)
    (_, of_two), two_grads = slopes(params, np.array([2, 5]), 1, whole)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-9)
    same(terms['data'], of_all['data'])
    same(terms['interlevel'], of_two['interlevel'])
    jax.tree.map(same, grads['nerf_mlp'], all_grads['nerf_mlp'])
    jax.tree.map(same, grads['prop_mlp'], two_grads['prop_mlp'])
    assert _norms(grads)['prop_mlp'] > 1e-6

  @pytest.mark.parametrize('opaque', [True, False])
  @pytest.mark.parametrize('start', ['zero', 'random'])
  def test_finite_at_extremes(self, opaque, start):
    params, slopes = _slopes(f'Model.opaque_background = {opaque}')
    if start == 'zero':
      params = jax.tree.map(jnp.zeros_like, params)
    for prop in (0.0, 1e10, -1e10, 1e30):
      for nerf in (0.0, 1e10, -1e10, 1e30):
        biased = _biased(_biased(params, prop, ('prop_mlp',)), nerf, ('nerf_mlp',))
        (value, _), grads = slopes(biased, ALL_TERMS)
        assert np.isfinite(value), (prop, nerf)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads)), (prop, nerf)

  def test_finite_where_gradients_flow_through_endpoints(self):
    params, slopes = _slopes('Model.stop_level_grad = False', 'Model.num_levels = 2')
    (_, _), grads = slopes(params, {**ALL_TERMS, 'interlevel': 0.0})
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert _norms(grads)['prop_mlp'] > 0  # The switch does something.


class TestBfloat16:
  def test_outputs_are_float32_and_near(self):
    half, full = _forward("Model.mlp_dtype = 'bfloat16'"), _plain()
    for leaf in jax.tree.leaves(half):
      assert leaf.dtype == jnp.float32
    _, params, _ = _make("Model.mlp_dtype = 'bfloat16'")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(half[0][-1].rgb, full[0][-1].rgb, atol=0.02)
    np.testing.assert_allclose(half[1][0].weights, full[1][0].weights, atol=0.02)
    assert np.any(half[0][-1].rgb != full[0][-1].rgb)

  def test_heads_are_float32(self):
    settings, params, _ = _make()
    nerf_mlp = mlp.MLP(settings.nerf_mlp, jnp.bfloat16)
    gaussians = structs.Gaussians(jnp.ones((6, 8, 3)), jnp.zeros((6, 8, 3, 3)))
    out = nerf_mlp.apply({'params': params['nerf_mlp']}, None, gaussians, RAYS.viewdirs)
    assert [x.dtype for x in out] == [jnp.float32] * 2

  @pytest.mark.parametrize(
    ('name', 'backend', 'expected'),
    [
      ('auto', 'cpu', 'float32'),
      ('auto', 'gpu', 'bfloat16'),
      ('auto', 'tpu', 'bfloat16'),
      ('float32', 'gpu', 'float32'),
      ('bfloat16', 'cpu', 'bfloat16'),
    ],
  )
  def test_auto_is_bfloat16_except_on_cpus(self, monkeypatch, name, backend, expected):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    assert models.mlp_dtype(name) == jnp.dtype(expected)


def _field_twin(cfg, params, features, viewdirs=None, glo=None):
  """The naive twin of the MLP: concatenates the inputs of each layer."""

  def linear(name, x):
    return x @ params[name]['kernel'] + params[name]['bias'][None, None]

  x = features
  for i in range(cfg.net_depth):
    x = jax.nn.relu(linear(f'trunk_{i}', x))
    if i > 0 and i % cfg.skip_layer == 0:  # After layers skip_layer + 1, 2 skip_layer + 1, ...
      x = jnp.concatenate([x, features], -1)
  raw = linear('density', x)[..., 0] + cfg.density_bias
  density = jnp.exp(raw) if cfg.density_activation == 'exp' else jax.nn.softplus(raw)
  if cfg.disable_rgb:
    return density, None
  parts = [x]
  if viewdirs is not None:
    parts = [linear('bottleneck', x)] if cfg.bottleneck_width > 0 else []
    parts.append(coord.pos_enc(viewdirs, 0, cfg.deg_view)[..., None, :])
  if glo is not None:
    parts.append(glo[..., None, :])
  parts = [jnp.broadcast_to(p, (*density.shape, p.shape[-1])) for p in parts]
  x = jnp.concatenate(parts, -1)
  for i in range(cfg.net_depth_viewdirs):
    x = jax.nn.relu(linear(f'view_{i}', x))
    if cfg.skip_layer_dir and i > 0 and i % cfg.skip_layer_dir == 0:
      x = jnp.concatenate([x, *parts], -1)
  return density, 1.002 * jax.nn.sigmoid(linear('rgb', x)) - 0.001


FIELDS = {
  'a_join_inside': {'net_depth': 4, 'skip_layer': 2},
  'a_join_at_the_end': {'net_depth': 3, 'skip_layer': 2},
  'a_join_at_the_end_without_colour': {'net_depth': 3, 'skip_layer': 2, 'disable_rgb': True},
  'joins_everywhere_without_views': {'net_depth': 3, 'skip_layer': 1, 'viewdirs': False},
  'no_views_no_view_layers': {'net_depth': 2, 'viewdirs': False, 'net_depth_viewdirs': 0},
  'no_views_but_appearance': {'net_depth': 1, 'viewdirs': False, 'glo': True},
  'no_bottleneck': {'net_depth': 2, 'bottleneck_width': 0},
  'no_bottleneck_no_view_layers': {'bottleneck_width': 0, 'net_depth_viewdirs': 0, 'glo': True},
  'no_view_layers': {'net_depth': 2, 'net_depth_viewdirs': 0},
  'three_view_layers': {'net_depth': 1, 'net_depth_viewdirs': 3, 'glo': True},
  'a_view_join_inside': {'net_depth': 1, 'net_depth_viewdirs': 4, 'skip_layer_dir': 2, 'glo': True},
  'view_joins_to_the_end': {'net_depth': 1, 'net_depth_viewdirs': 3, 'skip_layer_dir': 1},
  'exponential_density': {'net_depth': 1, 'density_activation': 'exp', 'density_bias': -0.5},
}


class TestField:
  @pytest.mark.parametrize('case', FIELDS)
  def test_is_the_architecture(self, case):
    options = dict(FIELDS[case])
    rng = np.random.default_rng(4)
    views = RAYS.viewdirs if options.pop('viewdirs', True) else None
    glo = jnp.float32(rng.normal(size=(6, 3))) if options.pop('glo', False) else None
    sizes = {'net_depth': 3, 'net_width': 16, 'bottleneck_width': 8, 'net_width_viewdirs': 8}
    cfg = configs.NerfMLP(max_deg_point=2, **{**sizes, **options})
    field = mlp.MLP(cfg)
    cov = jnp.broadcast_to(0.01 * jnp.eye(3), (6, 5, 3, 3))
    gaussians = structs.Gaussians(jnp.float32(rng.normal(size=(6, 5, 3))), cov)
    features = encodings.IntegratedPositionalEncoding(0, 2, 'icosahedron', 2)(gaussians)
    shapes = jax.eval_shape(field.init, KEY, None, gaussians, views, glo)['params']
    params = jax.tree.map(
      lambda s: jnp.float32(rng.normal(size=s.shape) * np.sqrt(2 / s.shape[0])), shapes
    )

    out = field.apply({'params': params}, None, gaussians, views, glo)
    wanted = _field_twin(cfg, params, features, views, glo)
    assert [x is None for x in out] == [x is None for x in wanted]
    for a, b in zip(*map(jax.tree.leaves, (out, wanted))):
      assert np.std(b) > 1e-2
      np.testing.assert_allclose(a, b, atol=1e-5 * np.max(np.abs(b)))


@pytest.fixture
def hopper_gpu(monkeypatch):
  """Makes the model believe that it runs on Hopper GPUs; the kernels can only be lowered."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(hopper, 'available', lambda: True)
  monkeypatch.setattr(hopper, '_blocks', lambda: 132)


# Sizes that the kernels support, with 256 intervals, and a skip connection to the heads.
KERNEL_SIZES = (
  "Model.mlp_dtype = 'bfloat16'",
  'NerfMLP.net_depth = 3',
  'NerfMLP.skip_layer = 1',
  'NerfMLP.net_width = 256',
  'NerfMLP.bottleneck_width = 256',
)


class TestGpuKernels:
  def _render_and_slopes(self, use):
    bindings = 'Model.num_levels = 1', f'Model.use_gpu_kernels = {use}'
    _, params, apply = _make(*KERNEL_SIZES, *bindings)

    def loss(params):
      ((rendering,), _) = apply(params, None, _rays(32), 0.5)
      return jnp.mean(rendering.rgb[:, 0]), rendering

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  def test_match_plain_xla(self, hopper_gpu, monkeypatch):
    calls = spy(monkeypatch)
    packed = []
    encode = encodings.packed_encoding.packed_pos_enc
    counted = lambda *args: packed.append(1) or encode(*args)  # noqa: E731
    monkeypatch.setattr(encodings.packed_encoding, 'packed_pos_enc', counted)
    wanted, without = self._render_and_slopes(False)
    assert not calls + packed
    slopes, rendering = self._render_and_slopes(True)
    assert packed
    assert sorted(set(calls)) == [
      'layer_gradient', 'layer_gradient outer', 'product bias relu', 'weight_gradient'
    ]  # fmt: skip
    np.testing.assert_allclose(rendering.rgb, without.rgb, atol=0.01)
    assert jax.tree.structure(slopes) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree.leaves_with_path(slopes), jax.tree.leaves(wanted)):
      assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(b), path

  def test_do_not_change_the_parameters(self, hopper_gpu):
    def initial(*bindings):
      model = models.build(configs.load_config((), (*TINY, *KERNEL_SIZES, *bindings)))
      return models.init_params(model, KEY)

    use, without = initial(), initial('Model.use_gpu_kernels = False')
    assert jax.tree.structure(use) == jax.tree.structure(without)
    jax.tree.map(np.testing.assert_array_equal, use, without)
    trunk = {'trunk_0', 'trunk_1', 'trunk_2', 'density'}
    assert use['nerf_mlp'].keys() == trunk | {'bottleneck', 'view_0', 'rgb'}
    assert use['prop_mlp'].keys() == {'trunk_0', 'trunk_1', 'density'}
    assert use['nerf_mlp']['trunk_2'].keys() == {'kernel', 'bias'}
    assert use['nerf_mlp']['trunk_2']['kernel'].shape == (256 + 168, 256)

  def test_are_not_used_in_float32(self, hopper_gpu, monkeypatch):
    def refuse(*args, **kwargs):
      raise AssertionError

    for module, name in (
      (hopper, 'product'),
      (hopper, 'weight_gradient'),
      (encodings.packed_encoding, 'packed_pos_enc'),
    ):
      monkeypatch.setattr(module, name, refuse)
    _, params, apply = _make(*KERNEL_SIZES, "Model.mlp_dtype = 'float32'")
    loss = lambda p: jnp.mean(apply(p, None, _rays(32))[0][-1].rgb)  # noqa: E731
    jax.eval_shape(jax.grad(loss), params)

  def test_training_and_rendering_at_full_size_lower_for_cuda(self, hopper_gpu):
    settings = configs.load_config(['configs/360.gin'])
    mesh = Mesh(np.array(jax.devices()), (sharding.AXIS,))
    cams, images = tiny.capture()

    def abstract(tree):
      return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.asarray(x).dtype), tree)

    state = train_step.abstract_state(settings)
    args = state, abstract(cams), abstract(batches.make_store(images)), np.int32(1), np.int32(0)
    text = lower_for_cuda(train_step.make_train_step(settings, mesh).variant(1), *args)
    assert 6 < len(set(kernels(text))) <= 9
    scalar, frac = (jax.ShapeDtypeStruct((), t) for t in (jnp.int32, jnp.float32))
    render = renderer.make_chunk_renderer(settings, mesh).variant(16384)
    text = lower_for_cuda(render, state.params, args[1], scalar, scalar, frac)
    assert len(kernels(text)) == 1  # The layer with the skip connection.


def test_settings_build_the_model_they_describe():
  settings = configs.load_config((), TINY)
  model = models.build(settings)
  assert (model.near, model.far) == (0.2, 1e6)
  assert model.nerf_config == settings.nerf_mlp
  assert dataclasses.is_dataclass(model.prop_config)


# A tiny model with grids in place of the positional encoding.
GRID = (
  "PropMLP.encoding = 'grid'",
  "NerfMLP.encoding = 'grid'",
  'PropMLP.net_depth = 1',
  'NerfMLP.net_depth = 1',
  'PropMLP.grid_levels = (2, 3)',
  'PropMLP.grid_min_resolution = 4',
  'PropMLP.grid_max_resolution = (8, 32)',
  'PropMLP.grid_log2_size = 8',
  'PropMLP.grid_features = 2',
  'NerfMLP.grid_levels = 3',
  'NerfMLP.grid_min_resolution = 4',
  'NerfMLP.grid_max_resolution = 64',
  'NerfMLP.grid_log2_size = 8',
  'Model.separate_prop_mlps = True',
)


def _with_tables(params, change):
  """Returns the parameters with `change(level, table)` for each table."""
  return {
    name: {
      **part,
      'grid': {key: change(int(key.split('_')[1]), table) for key, table in part['grid'].items()},
    }
    for name, part in params.items()
  }


def _colour_slopes(*bindings):
  """Returns the gradient of the colours' squares, and the rendering. Not jitted; see `_make`."""
  _, params, apply = _make(*bindings)

  def loss(params):
    out = apply(params, None, RAYS)[0][-1]
    return jnp.sum(out.rgb**2), out

  return jax.grad(loss, has_aux=True)(params)


def test_gradients_near_cameras_are_scaled_and_values_are_not():
  # A single level: its samples do not depend on the parameters.
  base = 'Config.far = 3.0', 'Model.num_levels = 1'
  plain, value = _colour_slopes(*base)
  reaches = 0.01, 50.0, 100.0
  near, far, further = (_colour_slopes(*base, f'Model.gradient_scaling = {r}') for r in reaches)
  for _, other in (near, far, further):
    jax.tree.map(np.testing.assert_array_equal, value, other)
  jax.tree.map(np.testing.assert_array_equal, plain, near[0])  # No sample is so near.
  assert 0 < _norms(far[0])['nerf_mlp'] < 0.1 * _norms(plain)['nerf_mlp']
  # Beyond all samples the factor is d^2 / reach^2: a quarter for twice the reach.
  quarter = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-9)
  jax.tree.map(lambda a, b: quarter(b, a / 4), far[0], further[0])


def test_rays_may_start_at_the_camera():
  grads, out = _colour_slopes(
    *GRID,
    'Model.num_levels = 1',
    'Config.near = 0.0',
    "Model.raydist_fn = 'power'",
    "Model.raydist_options = {'lam': -1.5, 'scale': 2.0}",
    "NerfMLP.density_activation = 'exp'",
    'NerfMLP.grid_fading_features = True',
  )
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((grads, out)))
  assert all(norm > 0 for norm in _norms(grads['nerf_mlp']['grid']).values())


class TestGrid:
  def test_parameters_are_a_dict_with_an_mlp_per_level(self):
    _, params, _ = _make(*GRID)
    assert params.keys() == {'prop_mlp_0', 'prop_mlp_1', 'nerf_mlp'}
    sizes = {k: {n: t.shape for n, t in v['grid'].items()} for k, v in params.items()}
    assert sizes == {
      'prop_mlp_0': {'table_0': (125, 2), 'table_1': (256, 2)},
      'prop_mlp_1': {'table_0': (125, 2), 'table_1': (256, 2), 'table_2': (256, 2)},
      'nerf_mlp': {'table_0': (125, 4), 'table_1': (256, 4), 'table_2': (256, 4)},
    }
    assert params['prop_mlp_1']['trunk_0']['kernel'].shape == (6, 16)
    assert params['nerf_mlp']['trunk_0']['kernel'].shape == (12, 16)

  @pytest.mark.parametrize(('encoding', 'multisamples'), [('ipe', 6), ('grid', 0), ('grid', 6)])
  def test_encodings_support_multisampling(self, encoding, multisamples):
    bindings = (f'Model.num_multisamples = {multisamples}',)
    bindings += GRID if encoding == 'grid' else ()
    renderings, history = _forward(*bindings, key=KEY)
    assert renderings[-1].rgb.shape == (6, 3)
    assert [h.weights.shape for h in history] == [(6, 12), (6, 12), (6, 8)]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((renderings, history)))

  @pytest.mark.parametrize('encoding', [(), GRID], ids=['ipe', 'grid'])
  def test_proposals_without_multisampling(self, encoding):
    wide = RAYS.replace(radii=RAYS.radii * 100)
    points = 'Model.num_multisamples = 6'
    single, last, every = (
      _forward(*encoding, *bindings, rays=wide)
      for bindings in ((), (points, 'Model.multisample_proposals = False'), (points,))
    )
    for level in (0, 1):  # Proposals as without, the last level as with several.
      np.testing.assert_array_equal(last[1][level].weights, single[1][level].weights)
    assert _differs(last[1][0].weights, every[1][0].weights)
    assert _differs(last[0][-1].rgb, single[0][-1].rgb)

  def test_multisamples_rotate_randomly_only_with_a_key(self):
    bindings = (*GRID, 'Model.num_multisamples = 6')
    wide = RAYS.replace(radii=RAYS.radii * 100)
    still = [_forward(*bindings, rays=wide)[0][-1].rgb for _ in range(2)]
    np.testing.assert_array_equal(*still)
    turned = [_forward(*bindings, rays=wide, key=k)[1][0].weights for k in (KEY, jax.random.key(1))]
    assert _differs(*turned)

  def test_each_proposal_level_has_its_own_field(self):
    _, params, apply = _make(*GRID)
    _, before = apply(params, None, RAYS)
    _, after = apply(_biased(params, 2.0, ('prop_mlp_1',)), None, RAYS)
    np.testing.assert_array_equal(before[0].weights, after[0].weights)
    assert _differs(before[1].weights, after[1].weights)

  def test_separate_fields_without_grids(self):
    _, params, _ = _make('Model.separate_prop_mlps = True')
    assert params.keys() == {'prop_mlp_0', 'prop_mlp_1', 'nerf_mlp'}
    shapes = [jax.tree.map(jnp.shape, params[f'prop_mlp_{i}']) for i in range(2)]
    assert shapes[0] == shapes[1]

  def test_the_deterministic_gradient_is_the_same(self):
    weights = jnp.float32(np.random.default_rng(0).normal(size=(6, 3)))

    def slopes(*bindings):
      _, params, apply = _make(*GRID, *bindings)
      loss = lambda p: jnp.sum(weights * apply(p, None, RAYS)[0][-1].rgb)  # noqa: E731
      return jax.jit(jax.grad(loss))(params)['nerf_mlp']['grid']

    a, b = slopes(), slopes('Model.deterministic_grid = True')
    assert _norms(a)['table_2'] > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), a, b)

  def test_levels_come_in_over_the_training(self):
    bindings = 'NerfMLP.grid_coarse_to_fine = 0.5', 'PropMLP.grid_coarse_to_fine = (0.5, 0.2)'
    _, params, apply = _make(*GRID)
    _, _, grown = _make(*GRID, *bindings)
    full, done = (f(params, None, RAYS, 0.5) for f in (apply, grown))
    jax.tree.map(np.testing.assert_array_equal, full, done)
    assert _differs(full[0][-1].rgb, grown(params, None, RAYS, 0.4)[0][-1].rgb)
    changed = _with_tables(params, lambda i, table: table if i == 0 else table + 1)
    start = [grown(p, None, RAYS, 0.0) for p in (params, changed)]  # Level 0 alone.
    jax.tree.map(np.testing.assert_array_equal, *start)
    assert _differs(apply(changed, None, RAYS, 0.0)[0][-1].rgb, start[0][0][-1].rgb)

  def test_density_elsewhere_is_that_of_the_same_moment(self):
    settings, params, _ = _make(*GRID, 'NerfMLP.grid_coarse_to_fine = 0.5')
    model, tdist = models.build(settings), jnp.tile(jnp.linspace(0.3, 1.1, 5), (6, 1))
    shift, variables = jnp.zeros((6, 4, 3)), {'params': params}
    density = lambda *frac: model.apply(  # noqa: E731
      variables, RAYS, tdist, shift, *frac, method='last_density'
    )
    assert _differs(density(0.1), density())
    np.testing.assert_array_equal(density(0.5), density())

  def test_every_table_trains(self):
    params, slopes = _slopes(*GRID, "Config.interlevel_loss_type = 'blur'")
    params = _biased(params, -3.0, ('prop_mlp_0', 'prop_mlp_1'))
    (_, _), grads = slopes(params, ALL_TERMS)
    for part in grads.values():
      assert all(norm > 0 for norm in _norms(part['grid']).values())

  def test_finite_where_gradients_flow_through_endpoints(self):
    params, slopes = _slopes(
      *GRID,
      'Model.stop_level_grad = False',
      'Model.num_levels = 2',
      'Model.num_multisamples = 6',
      'NerfMLP.grid_levels = 1',
      'PropMLP.grid_levels = 1',
    )
    (_, _), grads = slopes(params, {**ALL_TERMS, 'interlevel': 0.0})
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert _norms(grads)['prop_mlp_0'] > 0

  def test_points_without_extent_are_not_faded(self):
    points = 'Model.disable_integration = True'
    wide = RAYS.replace(radii=RAYS.radii * 300)
    a, b = _forward(*GRID, points, rays=wide), _forward(*GRID, points)
    np.testing.assert_array_equal(a[0][-1].rgb, b[0][-1].rgb)
    assert _differs(_forward(*GRID, rays=wide)[0][-1].rgb, _plain(*GRID)[0][-1].rgb)

  @pytest.mark.parametrize(
    ('binding', 'rule'),
    [
      ('Model.separate_prop_mlps = False', r'PropMLP\.grid_levels must be one number'),
      ('Model.num_levels = 4', 'must have a number for each proposal level'),
    ],
  )
  def test_several_numbers_are_for_separate_proposals(self, binding, rule):
    model = models.build(configs.load_config((), (*TINY, *GRID, binding)))
    with pytest.raises(configs.ConfigError, match=rule):
      models.init_params(model, KEY)
