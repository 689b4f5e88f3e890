"""Tests of the GPU kernel that draws Gaussians, interpreted on the CPU, against plain XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import splats_rasterizer_test as scenes

from internal.splats import gaussians, rasterizer, tile_kernel

SIZE, ACROSS = (37, 21), 3


def make(count, capacity, **kwargs):
  """Returns features [n, 9] and the tiles' lists."""
  splats = scenes.make_splats(count, **kwargs)
  projected = jax.jit(gaussians.project)(splats, scenes.make_camera(SIZE))
  lists = jax.jit(rasterizer._make_lists, static_argnums=(1, 2))(projected, SIZE, capacity)
  parts = projected.xy, projected.conic, projected.opacity[:, None], projected.rgb
  return jnp.concatenate(parts, -1), lists


def check(features, lists):
  rows = rasterizer._rows(features, lists)
  draw = functools.partial(tile_kernel.draw, across=ACROSS, interpret=True)
  drawn = jax.jit(draw)(rows, lists.begin, lists.end, lists.segments)
  colors, through, _ = drawn
  blend = jax.jit(rasterizer._blend_groups, static_argnums=2)
  expected = blend(features, lists, ACROSS)
  np.testing.assert_allclose(colors, expected[0], atol=1e-5)
  np.testing.assert_allclose(through, expected[1], atol=1e-5)
  rng = np.random.default_rng(0)
  wanted = tuple(jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in expected)
  by_kernel = functools.partial(tile_kernel.gradients, across=ACROSS, interpret=True)
  rows_gradient = jax.jit(by_kernel)(
    rows, lists.begin, lists.end, lists.segments, drawn=drawn, g_colors=wanted[0],
    g_through=wanted[1],
  )  # fmt: skip
  used = int(lists.end[-1])
  np.testing.assert_array_equal(rows_gradient[used:], 0)  # Rows of no tile.
  found = np.zeros(features.shape)
  np.add.at(found, np.asarray(lists.ids)[:used], np.asarray(rows_gradient)[:used, :9])
  by_groups = functools.partial(rasterizer._differentiate_groups, ACROSS)
  truth = np.asarray(jax.jit(by_groups)(features, lists, expected, wanted))
  scale = np.abs(truth).max(0)
  np.testing.assert_allclose(found / scale, truth / scale, atol=1e-4)
  assert (scale > 0.01).all()
  return through


def test_the_kernel_draws_and_differentiates_as_plain_xla():
  features, lists = make(60, 700)
  assert int(jnp.max(lists.end - lists.begin)) > 32  # More than a chunk.
  through = check(features, lists)
  assert through.min() < 0.1


def test_it_stops_where_a_tile_is_opaque():
  features, lists = make(260, 3000, seed=3, spread=0.3, log_scale=0.5)
  features = features.at[:, 5].set(jnp.where(features[:, 5] > 0, 0.95, 0))
  through = check(features, lists)
  assert (np.asarray(through).max(1) < 1e-3).any()


def test_long_lists_are_cut_into_segments(monkeypatch):
  monkeypatch.setattr(tile_kernel, 'SEGMENT', 64)
  features, lists = make(700, 9000, seed=5, spread=0.8, log_scale=-0.5)
  assert int(jnp.max(lists.end - lists.begin)) > 4 * 64
  through = np.asarray(check(features, lists))
  # Some quarters of tiles are opaque while others are not.
  quarters = through.reshape(len(through), 4, -1).max(-1) < 1e-4
  assert (quarters.any(1) & ~quarters.all(1)).any()


def as_if_on_an_h200():
  """Names the GPU to lower for, which JAX asks for from 0.11 on."""
  fields = {field.name for field in dataclasses.fields(jax.sharding.AbstractDevice)}
  known = {'device_kind': 'NVIDIA H200', 'num_cores': 132, 'platform': 'gpu'}
  device = jax.sharding.AbstractDevice(**{k: v for k, v in known.items() if k in fields})
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def test_a_gpu_program_contains_the_kernel_and_others_do_not():
  features, lists = make(10, 200)
  blend = jax.jit(jax.grad(lambda f: rasterizer._blend(f, lists, ACROSS)[0].sum()))
  with as_if_on_an_h200():
    traced = blend.trace(features)
    text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ('cuda', 'cpu')}
  assert 'triton' in text['cuda']
  assert 'triton' not in text['cpu']
  assert 'while' in text['cpu']
