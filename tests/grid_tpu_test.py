"""Kernels of hash grids for TPUs: values in the interpreter, choice by platform, compilation."""

import importlib.util
import types

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from internal import configs
from internal.commands import train
from internal.devices import sharding
from internal.fields import grid, grid_tpu
from internal.profiling import described

RNG = np.random.default_rng(0)

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='libtpu is not installed (requirements-tpu-compile.txt)',
)


@pytest.fixture
def interpret(monkeypatch):
  """Runs lookups as on a TPU, with the kernels interpreted."""
  for name in ('read', 'add'):
    kernel = getattr(grid_tpu, name)
    monkeypatch.setattr(grid_tpu, name, lambda *args, kernel=kernel: kernel(*args, interpret=True))
  return lambda on: monkeypatch.setattr(grid_tpu, 'fits', lambda _: on)


def _case(resolution, size, features, points):
  table = jnp.float32(RNG.normal(size=(size, features)))
  x = jnp.float32(RNG.uniform(size=(*points, 3)))
  d_out = jnp.float32(RNG.normal(size=(*points, features)))

  def lookup(table):
    return grid.lookup(table, x, resolution)

  def both():
    out, vjp = jax.vjp(lookup, table)
    return out, vjp(d_out)[0]

  return both, x


# A table of one row has both corners of a pair in it.
@pytest.mark.parametrize(('size', 'features', 'crossing'), [(2**12, 4, 0.5), (1, 2, 0)])
def test_lookups_and_gradients_match_plain_xla(size, features, crossing, interpret):
  both, x = _case(512, size, features, (100, 11))  # Two blocks, the second not full.
  places = grid._places(jnp.zeros((size, features)), x, 512)
  crosses = np.mean(places.tiles >= 2**24)  # Some pairs are in two tiles.
  assert 0 < crosses < crossing if crossing else crosses == 0
  interpret(False)
  plain = both()
  interpret(True)
  for ours, twin in zip(both(), plain):
    assert ours.shape == twin.shape
    np.testing.assert_allclose(ours, twin, rtol=1e-5, atol=5e-5)


class TestChoice:
  def test_other_platforms_have_plain_xla(self):
    assert grid_tpu.vector_memory() == 0
    assert not grid_tpu.fits(jnp.zeros((8, 2)))

  def test_programs_that_xla_divides_between_devices_have_plain_xla(self, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    info = types.SimpleNamespace(vmem_capacity_bytes=2**27)
    monkeypatch.setattr(pltpu, 'get_tpu_info', lambda: info)
    assert grid_tpu.vector_memory() == 0  # Eight devices.
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    assert grid_tpu.vector_memory() == 2**27

  def test_tables_that_do_not_fit_have_plain_xla(self, monkeypatch):
    monkeypatch.setattr(grid_tpu, 'vector_memory', lambda: 64 * 2**20)
    table = lambda log2, features: jax.ShapeDtypeStruct((2**log2, features), jnp.float32)  # noqa: E731
    assert grid_tpu.fits(table(21, 4))
    assert not grid_tpu.fits(table(22, 4))
    assert not grid_tpu.fits(table(10, 3))  # Tiles have 1, 2, 4 or 8 features.


@needs_compiler
def test_a_level_compiles_for_a_tpu_to_kernels_without_gathers_and_scatters():
  _, mesh, _ = described.describe('v5e:2x2')
  rows = 2**12
  table, x = jax.ShapeDtypeStruct((rows, 4), jnp.float32), (4 * 1024, 3)

  def step(table, x):
    return jax.grad(lambda table: jnp.sum(grid.lookup(table, x, 512)))(table)

  specs = (sharding.WHOLE, sharding.SPLIT)
  step = jax.jit(sharding.per_device(step, mesh, specs, sharding.WHOLE))
  compiled = step.lower(table, jax.ShapeDtypeStruct(x, jnp.float32)).compile()
  hlo = compiled.as_text()
  assert 'tpu_custom_call' in hlo
  assert ' gather(' not in hlo
  assert ' scatter(' not in hlo


@pytest.mark.parametrize(
  ('backend', 'encoding', 'notes'), [('tpu', 'grid', 1), ('tpu', 'ipe', 0), ('gpu', 'grid', 0)]
)
def test_training_on_a_tpu_says_what_to_expect(backend, encoding, notes, monkeypatch, capsys):
  settings = configs.load_config([], [f"NerfMLP.encoding = '{encoding}'"])
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  train.show_grid_note(settings)
  assert capsys.readouterr().err.count('rays/s on a v5e chip') == notes
