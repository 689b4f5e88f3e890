"""Programs compiled for TPUs that are only described."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from internal.commands import compile as compile_program
from internal.devices import memory, sharding
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
  compiled = jax.jit(lambda x: x @ x).lower(x).compile()
  slow_products = described.Chip(memory=1e9, flops=1e6, bandwidth=1e12)
  row = described.account(compiled, slow_products, rays=64, seconds=1.0)
  assert row['bound_by'] == 'products'
  assert row['products_ms'] == pytest.approx(2 * 64**3 / 1e6 * 1e3, rel=0.05)
  assert row['rays_per_second_at_most'] == pytest.approx(64 / row['products_ms'] * 1e3)
  slow_memory = described.Chip(memory=1e4, flops=1e15, bandwidth=1e6, cores=2)
  row = described.account(compiled, slow_memory, rays=64, seconds=1.0)
  assert row['bound_by'] == 'memory'
  assert row['memory_ms'] == pytest.approx(row['traffic_bytes'] / 5e5 * 1e3)
  assert row['traffic_bytes'] >= 2 * 64 * 64 * 4
  assert not row['fits']  # 64 x 64 floats, in and out, take more than 5,000 bytes.


def test_the_first_choice_that_fits_is_taken():
  """The chip has 200,000 bytes, and half of the program's rows take 131,072 for their result."""
  chip = described.Chip(memory=2e5, flops=1e12, bandwidth=1e12)
  one = NamedSharding(Mesh(jax.devices()[:1], 'x'), PartitionSpec())
  args = (jax.ShapeDtypeStruct((1,), jnp.float32, sharding=one),)

  def variant(parts):
    return jax.jit(lambda x: jnp.tile(x, 2**16 // parts))

  free = described.free_memory(chip, args)
  assert free == 0.95 * 2e5 - 4
  program = memory.FirstFit(variant, (1, 2, 4, 8), lambda: free)
  row = described.measure(program, args, chip, lambda parts: parts)
  assert [tried['choice'] for tried in row['tried']] == [1]
  assert row['tried'][0]['needed_bytes'] >= 2**18
  assert row['fits']
  assert row['choice'] == 2


def test_free_memory_is_what_the_shards_of_arguments_leave():
  chip = described.Chip(memory=2000, flops=1, bandwidth=1, cores=2)
  mesh = sharding.make_mesh(jax.devices()[:4])
  args = (
    jax.ShapeDtypeStruct((8, 10), jnp.float32, sharding=sharding.sharded(mesh)),
    jax.ShapeDtypeStruct((50,), jnp.uint8, sharding=sharding.replicated(mesh)),
    np.int32(0),
  )
  assert described.free_memory(chip, args) == 950 - 80 - 50


@pytest.mark.hammer
def test_micro_batches_are_chosen_by_compiling_for_the_chip():
  """As in training: the fewest micro-batches whose program fits. All rays at once need 2.9 MB."""
  chip = described.Chip(memory=2e6, flops=1e12, bandwidth=1e12)
  mesh = sharding.make_mesh(jax.devices()[:2])
  row = described.train_row(tiny.settings(), chip, mesh, (2, 8, 8))
  assert row['fits']
  assert row['choice'] == 4
  needed = [tried['needed_bytes'] for tried in row['tried']]
  assert needed == sorted(needed, reverse=True)
  assert needed[-1] > row['temp_bytes']
  assert row['needed_bytes'] < 0.95 * 2e6


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
  # 54 MB when last looked at. It was 380 MB when features were copied and values not in blocks.
  assert row['traffic_bytes'] < 120e6
