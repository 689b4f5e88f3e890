"""What a run leaves on disk comes back, on any devices, or says why not."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import captures
import jax
import numpy as np
import pytest
import tiny

from internal import datasets
from internal.devices import sharding
from internal.training import checkpoints, run_folder, run_seal, train_step


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A run's folder with checkpoints of steps 3, 5 and 8, of which two are kept."""
  folder = tmp_path_factory.mktemp('made')
  settings, mesh = tiny.settings(), tiny.mesh(8)
  state = sharding.replicate(train_step.create_state(settings), mesh)
  for step in (3, 5, 8):
    params = jax.tree.map(lambda p, step=step: p + step, state.params)
    state_then = state.replace(step=state.step + step, params=params)
    checkpoints.save(str(folder), state_then, keep=2, notes={'window': [step]})
  return folder, settings, state


@pytest.fixture
def saved(made, tmp_path):
  """A copy of it that may be damaged."""
  folder, settings, state = made
  return str(shutil.copytree(folder, tmp_path / 'run')), settings, state


def test_a_state_comes_back_exactly_on_another_number_of_devices(saved):
  folder, settings, state = saved
  back = checkpoints.restore(folder, settings, tiny.mesh(2), 8)
  assert int(back.step) == 8
  expected = jax.tree.map(lambda p: np.asarray(p + 8), state.params)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(back.params), expected)
  same = jax.tree.map(lambda a, b: (a == b).all(), back.opt_state, jax.device_get(state.opt_state))
  assert all(jax.tree.leaves(jax.device_get(same)))
  assert len(jax.tree.leaves(back.params)[0].sharding.device_set) == 2
  assert checkpoints.notes(folder, 8) == {'window': [8]}


def test_a_state_shared_out_among_devices_is_saved_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, '_LARGE', 512)
  settings, folder = tiny.settings(), str(tmp_path)
  state = train_step.create_state(settings)
  state = state.replace(opt_state=jax.tree.map(lambda x: x + 1, state.opt_state))
  placed = sharding.place(state, tiny.mesh(8))
  checkpoints.save(folder, placed)
  for mesh in (tiny.mesh(8), tiny.mesh(2), tiny.mesh(1)):
    back = checkpoints.restore(folder, settings, mesh, 0)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    where = jax.tree.map(lambda x: x.sharding.is_fully_replicated, back)
    assert all(jax.tree.leaves(where)) == (mesh.size == 1)
    params, _ = checkpoints.restore_params(folder, settings, 0, mesh)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_the_newest_are_kept_and_found(saved):
  folder, settings, _ = saved
  assert checkpoints.all_steps(folder) == [5, 8]
  assert checkpoints.latest_step(folder) == 8
  assert checkpoints.restore_params(folder, settings)[1] == 8
  params, step = checkpoints.restore_params(folder, settings, 5)
  assert step == 5
  assert float(params['nerf_mlp']['rgb']['bias'][0]) == 5


def _state_files(folder, step):
  return sorted(p for p in (Path(folder) / 'checkpoints' / str(step)).rglob('*') if p.is_file())


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(bytes(data))


def _truncate(path):
  os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize('harm', [_flip, _truncate, Path.unlink])
def test_whatever_file_is_damaged_the_checkpoint_before_is_taken(saved, harm, capsys):
  folder, _, _ = saved
  names = [p.relative_to(Path(folder) / 'checkpoints' / '8') for p in _state_files(folder, 8)]
  assert len(names) > 5
  for name in names:
    path = Path(folder) / 'checkpoints' / '8' / name
    whole = path.read_bytes()
    harm(path)
    assert checkpoints.newest(folder) == 5, name
    said = capsys.readouterr().err
    # A manifest that still parses accuses the file whose sum it has wrong.
    assert f'checkpoints/8 is damaged: {"" if name.name == "manifest.json" else name}' in said
    assert said.endswith('trying step 5.\n')
    path.write_bytes(whole)
  assert checkpoints.newest(folder) == 8
  assert capsys.readouterr().err == ''


def test_a_damaged_checkpoint_is_not_read_even_where_it_is_asked_for(saved, capsys):
  folder, settings, _ = saved
  largest = max(_state_files(folder, 8), key=lambda p: p.stat().st_size)
  _flip(largest)
  with pytest.raises(checkpoints.CheckpointError, match=f'8 is damaged: .*{largest.name}'):
    checkpoints.restore_params(folder, settings, 8)
  assert checkpoints.restore_params(folder, settings)[1] == 5
  shutil.rmtree(largest.parents[1])
  (Path(folder) / 'checkpoints/5/manifest.json').write_text('[]')
  with pytest.raises(checkpoints.CheckpointError, match=r'No intact checkpoint .*\[5, 8\]'):
    checkpoints.restore_params(folder, settings)
  assert '; there is no other' in capsys.readouterr().err


def test_training_moves_damaged_and_half_made_ones_out_of_the_way(saved):
  folder, _, state = saved
  steps = Path(folder) / 'checkpoints'
  (steps / '8' / 'manifest.json').unlink()
  (steps / '9.partial' / 'default').mkdir(parents=True)
  checkpoints.tidy(folder, checkpoints.newest(folder))
  assert {p.name for p in steps.iterdir()} == {'5', '8.damaged'}
  checkpoints.save(folder, state.replace(step=state.step + 8))
  assert checkpoints.all_steps(folder) == [5, 8]
  assert checkpoints.newest(folder) == 8


@pytest.mark.parametrize('part', ['save', '_seal', 'rename'])
def test_a_failure_to_save_keeps_what_there_is(saved, monkeypatch, part):
  folder, _, state = saved

  def full(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')

  place = {'save': checkpoints.ocp.Checkpointer, '_seal': checkpoints, 'rename': os}[part]
  with monkeypatch.context() as patch:
    patch.setattr(place, part, full)
    with pytest.raises(
      checkpoints.CheckpointError, match=r'Step 9 could .*No space.* of step 8 is'
    ):
      checkpoints.save(folder, state.replace(step=state.step + 9))
  assert {p.name for p in (Path(folder) / 'checkpoints').iterdir()} == {'5', '8'}
  assert checkpoints.newest(folder) == 8


def test_no_pickle_is_ever_read(saved, monkeypatch):
  folder, settings, _ = saved

  def refuse(*_, **__):
    raise AssertionError('a pickle is read')

  for name in ('load', 'loads', 'Unpickler'):
    monkeypatch.setattr(pickle, name, refuse)
  assert checkpoints.restore_params(folder, settings)[1] == 8


def test_what_is_not_there_is_said(saved, tmp_path):
  folder, settings, _ = saved
  with pytest.raises(checkpoints.CheckpointError, match=r'of step 7 .*\[5, 8\]'):
    checkpoints.restore_params(folder, settings, 7)
  empty = str(tmp_path / 'other')
  assert checkpoints.latest_step(empty) is None
  with pytest.raises(
    checkpoints.CheckpointError, match=r'No intact checkpoint in .*other.*Train first'
  ):
    checkpoints.restore_params(empty, settings)
  with pytest.raises(checkpoints.CheckpointError, match=r'other.*config\.gin is missing'):
    run_folder.open_run(empty)


def _seal_anew(step):
  (step / 'manifest.json').unlink()
  checkpoints._seal(str(step), {})


def test_files_that_are_as_they_were_written_but_no_checkpoint_are_named(saved):
  """Such as somebody else's, with a manifest that fits."""
  folder, settings, _ = saved
  step = Path(folder) / 'checkpoints' / '8'
  for name in ('_METADATA', 'manifest.ocdbt'):
    (path,) = step.glob(f'*/{name}')
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    _seal_anew(step)
    with pytest.raises(checkpoints.CheckpointError, match=r'checkpoints/8 cannot be read .*Remove'):
      checkpoints.restore_params(folder, settings)
    path.write_bytes(whole)
  _seal_anew(step)
  assert checkpoints.restore_params(folder, settings)[1] == 8


def test_a_manifest_opens_nothing_beside_the_checkpoint(saved):
  folder, _, _ = saved
  secret = Path(folder) / 'secret'
  secret.write_text('x')
  manifest = Path(folder) / 'checkpoints' / '8' / 'manifest.json'
  for name in ('../../secret', str(secret)):
    manifest.write_text(json.dumps({'sha256': {name: run_seal.sha256(secret)}}))
    assert checkpoints.damage(folder, 8) == f'{name} is missing'


def test_all_is_on_the_disk_before_it_gets_its_name(saved, monkeypatch):
  folder, _, state = saved
  flushed, renamed = set(), []

  def fsync(opened):
    flushed.add(os.path.basename(os.readlink(f'/proc/self/fd/{opened}')))

  def rename(source, target, rename=os.rename):
    renamed.append((set(flushed), {p.name for p in Path(source).rglob('*')}))
    rename(source, target)

  monkeypatch.setattr(os, 'fsync', fsync)
  monkeypatch.setattr(checkpoints.os, 'rename', rename)
  checkpoints.save(folder, state.replace(step=state.step + 9))
  (before, there), *_ = [entry for entry in renamed if 'manifest.json' in entry[1]]
  assert there <= before


@pytest.mark.parametrize(('keep', 'left'), [(1, [9]), (2, [8, 9]), (0, [5, 8, 9])])
def test_as_many_are_kept_as_told(saved, keep, left):
  folder, _, state = saved
  checkpoints.save(folder, state.replace(step=state.step + 9), keep=keep)
  assert checkpoints.all_steps(folder) == left


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


class TestScene:
  @pytest.fixture
  def run(self, tmp_path):
    """A run's folder, with what it was trained on."""
    folder = tmp_path / 'capture'
    captures.write_colmap(folder, n=6, camera=('PINHOLE', (20.0, 20.0, 8.0, 8.0)), size=(16, 16))
    settings = tiny.settings(f'Config.data_dir = {str(folder)!r}', 'Config.llffhold = 3')
    run_folder.write_run(str(tmp_path / 'run'), settings, datasets.load_dataset(settings.config))
    return str(tmp_path / 'run'), settings.config

  def test_opens_with_bindings_that_leave_it_as_it_is(self, run):
    bindings = ['Config.llffhold = 3', 'Config.factor = 0', 'Config.eval_crop_borders = 2']
    settings, scene = run_folder.open_run(run[0], bindings)
    assert settings.config.eval_crop_borders == 2
    assert scene.test == (0, 3)

  @pytest.mark.parametrize(
    ('name', 'value', 'was'),
    [('llffhold', 8, 3), ('factor', 4, 0), ('dataset_loader', 'blender', 'llff')],
  )
  def test_other_bindings_are_refused(self, run, name, value, was):
    with pytest.raises(checkpoints.CheckpointError) as caught:
      run_folder.open_run(run[0], [f'Config.{name} = {value!r}'])
    assert f'Config.{name} is {value!r}, but {run[0]} was trained with {was!r}' in str(caught.value)

  def test_training_goes_on_with_the_same_pictures_and_poses(self, run):
    folder, config = run
    scene = datasets.load_dataset(config)
    run_folder.check_same_scene(folder, scene)
    run_folder.check_same_scene(folder + 'another', scene)
    other = datasets.load_dataset(dataclasses.replace(config, llffhold=4))
    with pytest.raises(checkpoints.CheckpointError, match=r'other images: .* \(2 images differ\)'):
      run_folder.check_same_scene(folder, other)
    poses = scene.cameras.camtoworld.copy()
    poses[1, 0, 3] += 0.01
    moved = dataclasses.replace(scene, cameras=scene.cameras.replace(camtoworld=poses))
    with pytest.raises(checkpoints.CheckpointError, match=r'other poses: .* \(1 cameras differ\)'):
      run_folder.check_same_scene(folder, moved)
