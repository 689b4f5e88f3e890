"""What a run leaves on disk comes back, on any devices, or says why not."""

import pathlib

import jax
import numpy as np
import pytest
import tiny

from internal import checkpoints, sharding, train_step


@pytest.fixture
def saved(tmp_path):
  """A run's folder with checkpoints of steps 3, 5 and 8, of which two are kept."""
  settings, mesh = tiny.settings(), tiny.mesh(8)
  state = sharding.replicate(train_step.create_state(settings), mesh)
  with checkpoints.make_manager(str(tmp_path), keep=2) as manager:
    for step in (3, 5, 8):
      params = jax.tree.map(lambda p, step=step: p + step, state.params)
      checkpoints.save(manager, state.replace(step=state.step + step, params=params))
  return str(tmp_path), settings, state


def test_a_state_comes_back_exactly_on_another_number_of_devices(saved):
  folder, settings, state = saved
  with checkpoints.make_manager(folder) as manager:
    back = checkpoints.restore(manager, settings, tiny.mesh(2), 8)
  assert int(back.step) == 8
  expected = jax.tree.map(lambda p: np.asarray(p + 8), state.params)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(back.params), expected)
  same = jax.tree.map(lambda a, b: (a == b).all(), back.opt_state, jax.device_get(state.opt_state))
  assert all(jax.tree.leaves(jax.device_get(same)))
  assert len(jax.tree.leaves(back.params)[0].sharding.device_set) == 2


def test_the_newest_are_kept_and_found(saved):
  folder, settings, _ = saved
  assert checkpoints.all_steps(folder) == [5, 8]
  assert checkpoints.latest_step(folder) == 8
  assert checkpoints.restore_params(folder, settings)[1] == 8
  params, step = checkpoints.restore_params(folder, settings, 5)
  assert step == 5
  assert float(params['nerf_mlp']['rgb']['bias'][0]) == 5


def test_what_is_not_there_is_said(saved, tmp_path):
  folder, settings, _ = saved
  with pytest.raises(checkpoints.CheckpointError, match=r'of step 7 .*\[5, 8\]'):
    checkpoints.restore_params(folder, settings, 7)
  empty = str(tmp_path / 'other')
  assert checkpoints.latest_step(empty) is None
  with pytest.raises(checkpoints.CheckpointError, match=r'No checkpoint in .*other.*Train first'):
    checkpoints.restore_params(empty, settings)
  with pytest.raises(checkpoints.CheckpointError, match=r'other.*config\.gin is missing'):
    checkpoints.open_run(empty)


def test_damaged_checkpoints_are_named(saved):
  folder, settings, _ = saved
  for name in ('_METADATA', 'manifest.ocdbt'):
    (path,) = pathlib.Path(folder, 'checkpoints', '8').glob(f'*/{name}')
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(
      checkpoints.CheckpointError, match=r'checkpoints/8 cannot be read .* before'
    ):
      checkpoints.restore_params(folder, settings)
    path.write_bytes(content)
  assert checkpoints.restore_params(folder, settings)[1] == 8


@pytest.mark.parametrize(
  ('binding', 'words'),
  [
    ('NerfMLP.net_width = 24', r'nerf_mlp/\w+/(bias|kernel) is \(.*16.*\) there and \(.*24'),
    ('NerfMLP.net_depth = 3', r'nerf_mlp/trunk_2/bias is absent there'),
    ('Model.num_glo_features = 4', r'glo/embedding is absent there and \(1000, 4\)'),
    ('NerfMLP.net_depth = 1', r'nerf_mlp/trunk_1/bias is \(16,\) there and absent'),
  ],
)
def test_another_architecture_names_the_first_difference(saved, binding, words):
  folder, _, _ = saved
  with pytest.raises(checkpoints.CheckpointError, match=words):
    checkpoints.restore_params(folder, tiny.settings(binding))
