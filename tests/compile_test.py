"""Programs compiled for TPUs that are only described."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
import tiny

from internal.commands import compile as compile_program
from internal.devices import sharding
from internal.profiling import described

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='libtpu is not installed (requirements-tpu-compile.txt)',
)

HLO = """
  %all-reduce.1 = (f32[10,4]{1,0}, bf16[8]{0}) all-reduce(%a, %b), replica_groups={}
  %x = bf16[2,3]{1,0:T(8,128)} all-gather-start(%c), dimensions={0}
  %y = bf16[2,3]{1,0} all-gather-done(%x)
  %z = f32[7] add(%all-reduce.1, %w)
"""


def test_collectives_are_counted_with_their_bytes():
  assert described.collectives(HLO) == {
    'all-reduce': {'count': 1, 'bytes': 176},
    'all-gather': {'count': 1, 'bytes': 12},
  }


def test_account_takes_the_larger_of_products_and_memory():
  x = jnp.zeros((64, 64))
  compiled, _ = described.compile_timed(jax.jit(lambda x: x @ x), (x,))
  slow_products = described.Chip(memory=1e9, flops=1e6, bandwidth=1e12)
  row = described.account(compiled, slow_products, rays=64, seconds=1.0)
  assert row['bound_by'] == 'products'
  assert row['products_ms'] == pytest.approx(2 * 64**3 / 1e6 * 1e3, rel=0.05)
  assert row['rays_per_second_at_most'] == pytest.approx(64 / row['products_ms'] * 1e3)
  slow_memory = described.Chip(memory=1e4, flops=1e15, bandwidth=1e6, cores=2)
  row = described.account(compiled, slow_memory, rays=64, seconds=1.0)
  assert row['bound_by'] == 'memory'
  assert row['memory_ms'] == pytest.approx(row['bytes_accessed'] / 5e5 * 1e3)
  assert not row['fits']  # 64 x 64 floats, in and out, take more than 5,000 bytes.


def test_the_first_choice_that_fits_is_taken():
  chip = described.Chip(memory=2e5, flops=1e12, bandwidth=1e12)

  def variant(parts):
    return jax.jit(lambda x: jnp.sort(jnp.tile(x, 2**16 // parts)))

  row = described.measure(variant, (1, 2, 4, 8), (jnp.zeros(1),), chip, lambda parts: parts)
  assert [tried['choice'] for tried in row['tried']] == [1]
  assert row['fits']
  assert row['choice'] == 2


@pytest.mark.parametrize('topology', ['v9:2x2', 'v5e', 'v5e:', 'v5e:2y2'])
def test_unknown_topologies_are_refused(topology):
  with pytest.raises(described.TopologyError, match='v5e:4x4'):
    described.describe(topology)


def test_exit_code_and_json_say_what_does_not_fit(tmp_path, monkeypatch, capsys):
  chip = described.Chip(memory=1e3, flops=1e12, bandwidth=1e12)
  mesh = sharding.make_mesh(jax.devices()[:2])
  monkeypatch.setattr(described, 'describe', lambda _: (chip, mesh, 1))
  monkeypatch.setattr(compile_program, 'load_settings', lambda _: tiny.settings())
  file = tmp_path / 'rows.json'
  argv = ['--topology', 'v5e:2x2', '--only', 'render', '--json', str(file)]
  with pytest.raises(SystemExit) as stop:
    compile_program.main([*argv, '--capture', '2', '8', '8'])
  assert stop.value.code == 1
  assert 'DOES NOT FIT' in capsys.readouterr().out
  (row,) = json.loads(file.read_text())['rows']
  assert (row['fits'], row['devices'], row['program']) == (False, 2, 'render')


@needs_compiler
def test_360_compiles_for_a_pod_slice_with_one_all_reduce(tmp_path):
  """At a reduced width and batch; full sizes are in docs/tpu.md."""
  file = tmp_path / 'tpu.json'
  compile_program.main(
    [
      '--topology', 'v5e:2x2', '--only', 'train', '--json', str(file),
      '--gin_configs', 'configs/360.gin', '--gin_bindings', 'Config.batch_size = 1024',
      'NerfMLP.net_width = 128', 'PropMLP.net_width = 64',
    ]
  )  # fmt: skip
  (row,) = json.loads(file.read_text())['rows']
  assert row['fits']
  assert row['devices'] == 4
  assert {kind: n['count'] for kind, n in row['collectives'].items()} == {'all-reduce': 1}
  assert row['needed_bytes'] < row['memory_bytes']
  assert row['flops'] > 1e9
