"""Devices and processes: who is who, and what fits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from internal import sharding


def test_a_mesh_over_all_devices_or_some():
  assert sharding.make_mesh().size == 8
  assert tiny.mesh(3).size == 3


@pytest.mark.parametrize(('count', 'nearest'), [(7, 8), (13, 16), (1, 8), (8190, 8192)])
def test_what_devices_do_not_divide_is_refused_with_the_nearest(count, nearest):
  with pytest.raises(
    ValueError, match=f'batch must be a multiple.*{count} on 8; nearest: {nearest}'
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


@pytest.mark.parametrize('missing', ['JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'])
def test_half_a_description_of_the_processes_is_refused(monkeypatch, missing):
  told = {'JAX_COORDINATOR_ADDRESS': 'x:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'}
  for name, value in told.items():
    monkeypatch.setenv(name, value)
  monkeypatch.delenv(missing)
  with pytest.raises(ValueError, match=f'JAX_COORDINATOR_ADDRESS is set.*{missing}'):
    sharding.initialize()


def test_who_joins_whom(monkeypatch):
  """By hand, under a launcher of several processes, or not at all."""
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args: calls.append(args))
  monkeypatch.setattr(sharding, '_on_tpu_vm', lambda: False)
  sharding.initialize()
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  sharding.initialize()
  assert calls == []
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
  sharding.initialize()
  assert calls == [()]
  told = {'JAX_COORDINATOR_ADDRESS': 'x:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'}
  for name, value in told.items():
    monkeypatch.setenv(name, value)
  sharding.initialize()
  assert calls[-1] == ('x:1', 2, 1)
