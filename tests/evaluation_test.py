"""Renders whole images from chunks, and probes rays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from internal import cameras, models, structs
from internal.devices import sharding
from internal.rendering import renderer
from internal.training import train_step


def test_a_whole_image_is_rendered_in_chunks_of_any_fit(monkeypatch):
  """Chunks that do not fit the image, on one device and on eight, give the same picture.

  So they do of parameters as they are during training, some of them shared out among devices.
  """
  monkeypatch.setattr(sharding, '_LARGE', 512)
  settings = tiny.settings()
  cams, _ = tiny.capture()
  params = train_step.create_state(settings).params
  pictures = []
  for chunk, devices in ((64, 1), (24, 8), (1024, 2)):
    told = tiny.settings(f'Config.render_chunk_size = {chunk}')
    mesh = tiny.mesh(devices)
    render_image = renderer.make_image_renderer(told, mesh)
    calls = []
    out = render_image(
      sharding.place(params, mesh), cams, 1, progress=lambda *a, calls=calls: calls.append(a)
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
  renderings, _ = jax.jit(model.apply, static_argnums=4)({'params': params}, None, rays, 1.0, False)
  np.testing.assert_allclose(pictures[0][2, 5], renderings[-1].rgb[0], atol=1e-5)
  assert isinstance(rays, structs.Rays)


def test_a_chunk_that_the_devices_do_not_divide_is_refused():
  told = tiny.settings('Config.render_chunk_size = 30')
  with pytest.raises(ValueError, match=r'Config\.render_chunk_size.*devices \(8\), got 30; use 32'):
    renderer.make_chunk_renderer(told, tiny.mesh(8))


def test_chunks_are_halved_until_they_fit(capsys):
  cams, _ = tiny.capture()
  told, mesh = tiny.settings('Config.render_chunk_size = 16'), tiny.mesh(8)
  params = sharding.replicate(train_step.create_state(told).params, mesh)
  pictures = []
  for free, chunk in ((10**9, 16), (1, 8)):
    render_image = renderer.make_image_renderer(told, mesh, lambda _, free=free: free)
    calls = []
    out = render_image(params, cams, 0, progress=lambda *a, calls=calls: calls.append(a))
    assert calls[:2] == [(chunk, 96), (2 * chunk, 96)]
    assert len(calls) == 96 // chunk
    pictures.append(out['rgb'])
  np.testing.assert_allclose(*pictures, atol=1e-5)
  assert 'may run out of memory' in capsys.readouterr().err  # Of one byte; 8 devices need 8 rays.


def test_the_ray_probe_gives_each_level_of_the_diagonals_rays():
  settings = tiny.settings('Config.vis_num_rays = 5')
  cams, _ = tiny.capture()
  params = train_step.create_state(settings).params
  probe = renderer.make_ray_probe(settings, tiny.mesh(2))
  sdist, weights, rgb = probe(sharding.place(params, tiny.mesh(2)), cams, 2)
  assert [s.shape for s in sdist] == [(5, 9), (5, 9), (5, 5)]
  assert [w.shape for w in weights] == [(5, 8), (5, 8), (5, 4)]
  assert rgb[:2] == [None, None]
  assert rgb[2].shape == (5, 4, 3)
  np.testing.assert_allclose(weights[2].sum(-1), 1, atol=1e-5)  # The background is opaque.
  middle = cameras.pixels_to_rays(cams, jnp.array([2]), jnp.array([7]), jnp.array([4]))
  apply = jax.jit(models.build(settings).apply, static_argnums=4)
  _, history = apply({'params': params}, None, middle, 1.0, False)
  np.testing.assert_allclose(sdist[2][2], history[-1].sdist[0], atol=1e-5)
