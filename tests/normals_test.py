"""Normals: against finite differences and a known field; computed only on request."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from internal import cameras, models, structs
from internal.rendering import normals, renderer
from internal.training import train_step
from internal.vis import pictures

IPE = (
  'NerfMLP.max_deg_point = 4',
  "NerfMLP.basis_shape = 'octahedron'",
  'NerfMLP.basis_subdivisions = 1',
)
GRID = (
  "NerfMLP.encoding = 'grid'",
  'NerfMLP.grid_levels = 2',
  'NerfMLP.grid_max_resolution = 20',
  'NerfMLP.grid_log2_size = 10',
  'Model.num_multisamples = 6',
  'Model.multisample_proposals = False',
)


def test_they_are_the_steepest_descent_of_density():
  settings = tiny.settings(*IPE)
  model = models.build(settings)
  shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
  params = jax.tree.map(lambda x: 0.4 * np.sin(7.0 * np.arange(x.size)).reshape(x.shape), shapes)
  params = jax.tree.map(jnp.float32, params)
  cams, _ = tiny.capture()
  rays = cameras.pixels_to_rays(cams, *(jnp.array(v) for v in ([0, 1, 2], [3, 9, 6], [2, 7, 4])))
  tdist = jnp.tile(jnp.linspace(0.3, 1.1, 5), (3, 1))
  weights = jnp.array([[0.1, 0.6, 0.2, 0.1], [0, 0, 0, 0], [0, 1, 0, 0]])
  history = structs.RayHistory(tdist, tdist, weights, None)
  got = jax.jit(normals.make_normals(settings))(params, rays, history)

  @jax.jit
  def density(shift):
    shift = jnp.broadcast_to(shift, (3, 4, 3))
    return model.apply({'params': params}, rays, tdist, shift, method='last_density')

  step = 2e-3
  slope = np.stack([density(step * e) - density(-step * e) for e in jnp.eye(3)[:, None, None]], -1)
  assert np.linalg.norm(slope, axis=-1).min() > 0
  wanted = -slope / np.linalg.norm(slope, axis=-1, keepdims=True)
  wanted = (weights[..., None] * wanted).sum(-2)
  np.testing.assert_allclose(got, wanted, atol=0.05)
  assert (np.asarray(got[1]) == 0).all()
  np.testing.assert_allclose(np.linalg.norm(got[2]), 1, rtol=1e-5)


def test_a_balls_normals_point_outwards(monkeypatch):
  """However little its density changes far away."""

  class Ball:
    def apply(self, _, rays, tdist, shift, train_frac, method):
      middle = (tdist[..., 1:] + tdist[..., :-1])[..., None] / 2
      x = rays.origins[..., None, :] + middle * rays.directions[..., None, :] + shift
      return 1e-25 / (1 + jnp.sum(x**2, -1))

  monkeypatch.setattr(models, 'build', lambda settings: Ball())
  x = jnp.array([[3.0, 0, 0], [0, -2, 1]])
  rays = types.SimpleNamespace(origins=x, directions=jnp.zeros_like(x))
  history = types.SimpleNamespace(tdist=jnp.array([[0.0, 1]] * 2), weights=jnp.ones((2, 1)))
  got = normals.make_normals(tiny.settings())(None, rays, history)
  np.testing.assert_allclose(got, x / jnp.linalg.norm(x, axis=-1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize('bindings', [IPE, GRID], ids=['ipe', 'grid'])
def test_images_have_them_where_asked_for(bindings):
  cams, _ = tiny.capture()
  settings = tiny.settings('Config.render_chunk_size = 64', *bindings)
  params = train_step.abstract_state(settings).params
  for asked in (False, True):
    chunk = renderer.make_chunk_renderer(settings, tiny.mesh(1), with_normals=asked).variant(64)
    shapes = jax.eval_shape(chunk, params, cams, 1, 0, 1.0)
    assert ('normals' in shapes) == asked
  assert shapes['normals'].shape == (64, 3)


def test_pictures():
  normal = np.array([[[1.0, 0, -1], [0, 0.5, 0], [0, 0, 0]]])
  acc = np.array([[1.0, 0.5, 0]])
  got = pictures.normal_picture(normal, acc)
  assert got.tolist() == [[[255, 128, 0], [191, 255, 191], [255, 255, 255]]]
