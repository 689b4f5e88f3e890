"""Devices and processes: who is who, and what fits."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax._src import cloud_tpu_init

from internal.devices import memory, processes, sharding
from internal.errors import UserError


def test_a_mesh_over_all_devices_or_some():
  assert sharding.make_mesh().size == 8
  assert tiny.mesh(3).size == 3


@pytest.mark.parametrize(('count', 'nearest'), [(7, 8), (13, 16), (1, 8), (8190, 8192)])
def test_what_devices_do_not_divide_is_refused_with_the_nearest(count, nearest):
  with pytest.raises(
    ValueError, match=rf'batch must be divisible by .* \(8\), got {count}; use {nearest}'
  ):
    sharding.check_divisible('batch', count, sharding.make_mesh())


def test_what_they_divide_passes():
  sharding.check_divisible('batch', 16, sharding.make_mesh())


def test_rays_are_split_and_the_rest_is_whole():
  mesh = sharding.make_mesh()
  whole = sharding.replicate({'a': np.arange(5)}, mesh)['a']
  assert whole.sharding.is_fully_replicated
  np.testing.assert_array_equal(sharding.to_host(whole), np.arange(5))
  split = jax.jit(lambda x: sharding.shard_rays(x, mesh))(jnp.zeros((16, 3)))
  assert {s.data.shape for s in split.addressable_shards} == {(2, 3)}


def test_large_arrays_are_shared_out_where_devices_divide_their_rows(monkeypatch):
  monkeypatch.setattr(sharding, '_LARGE', 128)
  tree = {
    'large': np.arange(32, dtype=np.float32).reshape(16, 2),
    'odd': np.zeros((33, 1), np.float32),
    'small': np.zeros((16, 1), np.float32),
    'step': np.int32(7),
  }
  mesh = sharding.make_mesh()
  split = {name for name, spec in sharding.specs(tree, mesh).items() if spec == sharding.SPLIT}
  assert split == {'large'}
  assert sharding.specs(tree, tiny.mesh(1))['large'] == sharding.WHOLE
  placed = sharding.place(tree, mesh)
  assert {s.data.shape for s in placed['large'].addressable_shards} == {(2, 2)}
  for whole in (sharding.whole(placed, mesh), jax.jit(lambda t: sharding.whole(t, mesh))(placed)):
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(whole))
    jax.tree.map(np.testing.assert_array_equal, whole, tree)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(sharding.to_host, placed), tree)
  # Nothing is done for what is whole.
  assert sharding.whole(placed, mesh)['step'] is placed['step']


@pytest.mark.parametrize('large', [2**23, 32])
def test_a_gradient_taken_by_each_device_is_averaged_once(monkeypatch, large):
  monkeypatch.setattr(sharding, '_LARGE', large)
  mesh = sharding.make_mesh()
  x = jnp.arange(16.0)

  def loss(w, x):
    return jnp.mean((w['a'] * x - w['b'] + jnp.sum(w['c'] ** 2) + jnp.sum(w['d'])) ** 2)

  def gradient(w, x):
    return sharding.mean_over_devices(jax.value_and_grad(loss)(w, x))

  w = {
    'a': jnp.float32(2),
    'b': jnp.full(1, 3.0),
    'c': jnp.arange(16.0).reshape(8, 2) / 9,
    'd': jnp.ones((3, 4)),
  }
  out = sharding.WHOLE, sharding.specs(w, mesh)
  spread = jax.jit(sharding.per_device(gradient, mesh, (sharding.WHOLE, sharding.SPLIT), out))
  got, wanted = spread(w, x), jax.value_and_grad(loss)(w, x)
  # One for the small arrays, one for a large one that cannot be shared out, none for the other.
  text = spread.lower(w, x).as_text()
  assert text.count('"stablehlo.all_reduce"') == 1 + (large == 32)
  assert text.count('"stablehlo.reduce_scatter"') == (large == 32)
  assert got[1]['c'].sharding.is_fully_replicated == (large != 32)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)


class Fakes:
  """Programs that take given sizes (an exception: that fail to compile), and what was compiled."""

  def __init__(self, sizes):
    self.sizes, self.compiled = sizes, []

  def variant(self, choice):
    def compile_(args):
      self.compiled.append((choice, *args))
      if isinstance(self.sizes[choice], Exception):
        raise self.sizes[choice]
      memory = SimpleNamespace(
        temp_size_in_bytes=self.sizes[choice] - 30,
        output_size_in_bytes=70,
        alias_size_in_bytes=50,
        generated_code_size_in_bytes=10,
      )

      class Program:
        memory_analysis = staticmethod(lambda: memory)
        __call__ = staticmethod(lambda *args: (choice, *args))

      return Program()

    def lower(*args):
      def compile_with(options):
        assert options == memory.compiler_options()
        return compile_(args)

      return SimpleNamespace(compile=compile_with)

    return SimpleNamespace(lower=lower)


EXHAUSTED = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying ...')


class TestFirstFit:
  def fit(self, sizes, free):
    fakes = Fakes(sizes)
    return fakes, memory.FirstFit(fakes.variant, list(sizes), lambda: free)

  @pytest.mark.parametrize(
    ('free', 'choice'), [(1112, 1), (1110, 2), (556, 2), (555, 4), (None, 1)]
  )
  def test_takes_the_first_that_fits_in_nine_tenths(self, free, choice):
    fakes, program = self.fit({1: 1000, 2: 500, 4: 250}, free)
    assert program.choice is None
    assert program(7) == (choice, 7)
    assert (program.choice, program.needed, program.free) == (choice, 1000 // choice, free)
    assert program(8) == (choice, 8)
    assert [c for c, _ in fakes.compiled] == [c for c in (1, 2, 4) if c <= choice]  # Once each.

  def test_where_none_fits_the_last_is_tried_and_told(self, capsys):
    _, program = self.fit({1: 10**10, 2: 5 * 10**9}, 10**9)
    assert program(7) == (2, 7)
    said = capsys.readouterr().err
    assert said == 'Warning: may run out of memory: 5 GB of 1 GB free memory.\n'

  def test_what_does_not_even_compile_does_not_fit(self):
    _, program = self.fit({1: EXHAUSTED, 2: 500}, None)
    assert program(7) == (2, 7)
    _, program = self.fit({1: EXHAUSTED, 2: EXHAUSTED}, None)
    with pytest.raises(jax.errors.JaxRuntimeError, match='RESOURCE_EXHAUSTED'):
      program(7)

  def test_other_errors_are_errors(self):
    _, program = self.fit({1: jax.errors.JaxRuntimeError('INTERNAL: no'), 2: 500}, None)
    with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
      program(7)

  def test_other_shapes_are_compiled_with_the_same_choice(self):
    fakes, program = self.fit({1: 1000, 2: 500}, 600)
    program(np.zeros(3))
    program(np.ones(3))
    program(np.zeros(4))
    assert [(c, x.shape) for c, x in fakes.compiled] == [(1, (3,)), (2, (3,)), (2, (4,))]

  def test_runs_real_programs(self):
    def variant(parts):
      return jax.jit(lambda x: (x + 1, jnp.ones(1024 // parts)), donate_argnums=0)

    program = memory.FirstFit(variant, (1, 2), lambda: 3000)
    more, ones = program(jnp.zeros(4096))  # 16 KB, donated.
    assert ones.shape == (512,)
    np.testing.assert_array_equal(more, 1)
    assert 2048 <= program.needed < 2700


def test_free_memory_is_that_of_the_fullest_device():
  def mesh(*stats):
    devices = [SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    return SimpleNamespace(local_devices=devices)

  one, two = {'bytes_limit': 100, 'bytes_in_use': 40}, {'bytes_limit': 100, 'bytes_in_use': 70}
  assert memory.free_memory(mesh(one, two)) == 30
  assert memory.free_memory(mesh(one, {'bytes_limit': 100})) is None
  assert memory.free_memory(mesh(None)) is None
  assert memory.free_memory(sharding.make_mesh()) is None  # CPU.


def test_bytes_of_shapes_are_those_of_a_device_share():
  mesh = tiny.mesh(2)
  rows = sharding.placed_shapes({'large': np.zeros((2**20, 2), np.float32)}, mesh)
  same = sharding.replicated_shapes({'x': np.zeros(5), 'k': np.zeros(3, np.uint8)}, mesh)
  assert memory.sharded_bytes(rows) == 4 * 2**20  # Half of its rows.
  assert memory.sharded_bytes(same) == 4 * 5 + 3  # Doubles become floats.
  there = sharding.place(np.ones((2**20, 2), np.float32), mesh)
  assert (there.sharding, there.shape) == (rows['large'].sharding, rows['large'].shape)


_CHOOSE = """
import jax, jax.numpy as jnp
from internal.devices import memory, processes
processes.initialize()
variant = lambda parts: jax.jit(lambda x: x + jnp.ones(4096 // parts))
free = (10**9, 8192)[jax.process_index()]
program = memory.FirstFit(variant, (1, 2, 4, 8), lambda: free)
program(1.0)
print('chose', program.choice)
"""


def test_processes_choose_alike():
  """The second has room for a quarter only."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  told = {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}', 'JAX_NUM_PROCESSES': '2'}
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', _CHOOSE],
      cwd=Path(__file__).resolve().parents[1],
      env={**os.environ, 'XLA_FLAGS': '', **told, 'JAX_PROCESS_ID': str(i)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  said = [p.communicate(timeout=120)[0] for p in processes]
  assert [text.strip().splitlines()[-1] for text in said] == ['chose 4'] * 2


@pytest.mark.parametrize('missing', ['JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'])
def test_half_a_description_of_the_processes_is_refused(monkeypatch, missing):
  told = {'JAX_COORDINATOR_ADDRESS': 'x:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'}
  for name, value in told.items():
    monkeypatch.setenv(name, value)
  monkeypatch.delenv(missing)
  with pytest.raises(ValueError, match=f'JAX_COORDINATOR_ADDRESS is set.*{missing}'):
    processes.initialize()


def test_who_joins_whom(monkeypatch):
  """By hand, under a launcher of several processes, or not at all."""
  calls = []

  def join(*args, heartbeat_timeout_seconds):
    assert heartbeat_timeout_seconds == processes.HEARTBEAT == 30
    calls.append(args)

  monkeypatch.setattr(jax.distributed, 'initialize', join)
  monkeypatch.setattr(processes, '_on_tpu_vm', lambda: False)
  processes.initialize()
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  processes.initialize()
  assert calls == []
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
  processes.initialize()
  assert calls == [()]
  told = {'JAX_COORDINATOR_ADDRESS': 'x:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'}
  for name, value in told.items():
    monkeypatch.setenv(name, value)
  processes.initialize()
  assert calls[-1] == ('x:1', 2, 1)


def test_tpus_whose_workers_are_not_found(monkeypatch):
  def join(**_):
    raise ValueError('coordinator_address should be defined.')  # As JAX does.

  monkeypatch.setattr(jax.distributed, 'initialize', join)
  monkeypatch.setattr(cloud_tpu_init, 'running_in_cloud_tpu_vm', True)
  with pytest.raises(UserError, match=r'not found: coordinator_address .* JAX_NUM_PROCESSES \(1 '):
    processes.initialize()


def test_only_gpus_are_told_to_call_cublas(monkeypatch):
  assert memory.compiler_options() == {}  # Other backends do not know the name.
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert memory.compiler_options() == {'xla_gpu_enable_triton_gemm': False}
