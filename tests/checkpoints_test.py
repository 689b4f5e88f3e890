"""Checkpoints and run folders: exact restores on any devices, and named damage."""

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
from internal.system import files
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


def test_restores_exactly_on_another_number_of_devices(saved):
  folder, settings, state = saved
  back = checkpoints.restore(folder, settings, tiny.mesh(2), 8)
  assert int(back.step) == 8
  expected = jax.tree.map(lambda p: np.asarray(p + 8), state.params)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(back.params), expected)
  same = jax.tree.map(lambda a, b: (a == b).all(), back.opt_state, jax.device_get(state.opt_state))
  assert all(jax.tree.leaves(jax.device_get(same)))
  assert len(jax.tree.leaves(back.params)[0].sharding.device_set) == 2
  assert checkpoints.notes(folder, 8) == {'window': [8]}


def test_a_sharded_state_is_saved_whole(tmp_path, monkeypatch):
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


def test_keeps_and_finds_the_newest(saved):
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
def test_any_damaged_file_falls_back_to_the_previous_checkpoint(saved, harm, capsys):
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


def test_a_damaged_checkpoint_is_refused_when_requested_by_step(saved, capsys):
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


def _folder(folder, step):
  return Path(checkpoints.folder_of(folder, step))


def test_a_renamed_checkpoint_is_not_taken_for_another_step(saved, capsys):
  folder, settings, _ = saved
  _folder(folder, 8).rename(_folder(folder, 330))
  assert checkpoints.newest(folder) == 5
  assert '330 is damaged: it is the checkpoint of step 8' in capsys.readouterr().err
  with pytest.raises(checkpoints.CheckpointError, match=r'330 is damaged: it is .* of step 8'):
    checkpoints.restore_params(folder, settings, 330)


def test_swapped_checkpoints_are_not_used(saved):
  folder, settings, _ = saved
  for old, new in ((5, 1), (8, 5), (1, 8)):
    _folder(folder, old).rename(_folder(folder, new))
  with pytest.raises(checkpoints.CheckpointError, match='No intact checkpoint'):
    checkpoints.restore_params(folder, settings)


def _write_run_json(folder, run):
  run_seal.write(folder, run, '', lambda folder: None)


def test_a_checkpoint_of_another_run_is_not_used(saved, tmp_path, capsys):
  folder, _, state = saved
  _write_run_json(folder, 'a')
  checkpoints.save(folder, state.replace(step=state.step + 9))
  assert (checkpoints.newest(folder), checkpoints.saved_run_id(folder)) == (9, 'a')
  _write_run_json(str(tmp_path / 'other'), 'b')
  shutil.copytree(Path(folder) / 'checkpoints', tmp_path / 'other' / 'checkpoints')
  assert checkpoints.newest(str(tmp_path / 'other')) == 8  # Is of a version without ids.
  assert '9 is damaged: it is the checkpoint of another run' in capsys.readouterr().err


def _remove_identity(folder, step):
  path = _folder(folder, step) / 'manifest.json'
  path.write_text(json.dumps({'sha256': json.loads(path.read_text())['sha256']}))


def test_checkpoints_of_earlier_versions_are_read_unless_they_were_renamed(saved):
  folder, settings, _ = saved
  _remove_identity(folder, 8)
  assert checkpoints.restore_params(folder, settings)[1] == 8
  _folder(folder, 8).rename(_folder(folder, 10))
  with pytest.raises(checkpoints.CheckpointError, match='10 is that of step 8'):
    checkpoints.restore_params(folder, settings)


@pytest.mark.parametrize('moment', ['damage', 'restore'])
def test_a_checkpoint_removed_by_training_is_not_called_damaged(saved, monkeypatch, capsys, moment):
  folder, settings, state = saved
  function, calls = getattr(checkpoints, moment), []

  def after_training_went_on(*args):
    calls.append(args)
    if len(calls) < 3:
      new = state.replace(step=state.step + 8 + len(calls))
      checkpoints.save(folder, new, keep=1)
    return function(*args)

  monkeypatch.setattr(checkpoints, moment, after_training_went_on)
  # The second `restore` reads a copy.
  assert checkpoints.restore_params(folder, settings)[1] == {'damage': 10, 'restore': 9}[moment]
  assert capsys.readouterr().err == ''


def test_a_requested_checkpoint_that_is_removed_while_read(saved, monkeypatch):
  folder, settings, _ = saved
  read = checkpoints._read
  monkeypatch.setattr(
    checkpoints, '_read', lambda path, *args: (shutil.rmtree(path), read(path, *args))
  )
  with pytest.raises(checkpoints.CheckpointError, match='8 was removed while it was being read'):
    checkpoints.restore_params(folder, settings, 8)


def test_after_a_failure_a_copy_is_read_which_training_cannot_remove(saved, monkeypatch):
  folder, settings, state = saved
  read, wanted = checkpoints._read, []

  def remove_and_read(path, *args):
    """Saves the next checkpoint and removes the one that is being read."""
    step = int(Path(path).name)
    wanted.append(step)
    checkpoints.save(folder, state.replace(step=state.step + step + 1), keep=1)
    return read(path, *args)

  monkeypatch.setattr(checkpoints, '_read', remove_and_read)
  params, step = checkpoints.restore_params(folder, settings)
  assert (wanted, step) == ([8, 9], 9)
  assert checkpoints.all_steps(folder) == [10]
  jax.tree.map(np.testing.assert_array_equal, params, state.params)


@pytest.mark.parametrize('function', ['rename', 'rmtree'])
def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(
  saved, monkeypatch, capsys, function
):
  folder, _, state = saved
  module = {'rename': os, 'rmtree': shutil}[function]
  original = getattr(module, function)

  def refuse(path, *args, **kwargs):
    if Path(path).name.startswith('5'):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    return original(path, *args, **kwargs)

  monkeypatch.setattr(module, function, refuse)
  checkpoints.save(folder, state.replace(step=state.step + 9), keep=2)
  assert 'checkpoints/5 cannot be removed: Permission denied' in capsys.readouterr().err
  assert checkpoints.newest(folder) == 9


def test_tidy_renames_damaged_and_removes_partial_checkpoints(saved):
  folder, _, state = saved
  steps = Path(folder) / 'checkpoints'
  (steps / '8' / 'manifest.json').unlink()
  (steps / '9.partial' / 'default').mkdir(parents=True)
  checkpoints.tidy(folder, checkpoints.newest(folder))
  assert {p.name for p in steps.iterdir()} == {'5', '8.damaged'}
  checkpoints.save(folder, state.replace(step=state.step + 8))
  assert checkpoints.all_steps(folder) == [5, 8]
  assert checkpoints.newest(folder) == 8


@pytest.mark.parametrize(
  ('error', 'advice'),
  [
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 'Free some disk space'),
    (ValueError('RESOURCE_EXHAUSTED: No space left on device [d/0]'), 'Free some disk space'),
    (PermissionError(errno.EACCES, os.strerror(errno.EACCES), 'x'), 'Remove the cause'),
    (ValueError('something else'), 'Remove the cause'),
  ],
)
def test_only_a_full_disk_gets_the_advice_to_free_space(saved, monkeypatch, error, advice):
  folder, _, state = saved

  def fail(*_, **__):
    raise error

  monkeypatch.setattr(checkpoints, '_seal', fail)
  with pytest.raises(checkpoints.CheckpointError, match=advice):
    checkpoints.save(folder, state.replace(step=state.step + 9))


@pytest.mark.parametrize('part', ['save', '_seal', 'rename'])
def test_a_failed_save_keeps_earlier_checkpoints(saved, monkeypatch, part):
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


def test_missing_checkpoints_and_runs_are_named(saved, tmp_path):
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


def test_intact_files_that_are_not_a_checkpoint_are_named(saved):
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


def test_a_manifest_cannot_open_files_outside_the_checkpoint(saved):
  folder, _, _ = saved
  secret = Path(folder) / 'secret'
  secret.write_text('x')
  manifest = Path(folder) / 'checkpoints' / '8' / 'manifest.json'
  for name in ('../../secret', str(secret)):
    manifest.write_text(json.dumps({'sha256': {name: run_seal.sha256(secret)}}))
    assert checkpoints.damage(folder, 8) == f'{name} is missing'


def test_files_are_flushed_before_the_folder_is_renamed(saved, monkeypatch):
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
def test_checkpoint_keep(saved, keep, left):
  folder, _, state = saved
  checkpoints.save(folder, state.replace(step=state.step + 9), keep=keep)
  assert checkpoints.all_steps(folder) == left


def test_spared_checkpoints_stay(saved):
  folder, _, state = saved
  checkpoints.save(folder, state.replace(step=state.step + 9), keep=1, spared=[5])
  assert checkpoints.all_steps(folder) == [5, 9]


def test_surplus_is_more_than_a_kill_may_leave(saved):
  folder, _, state = saved
  assert [checkpoints.surplus(folder, keep) for keep in (0, 1, 2)] == [[], [], []]
  checkpoints.save(folder, state.replace(step=state.step + 9), keep=0)
  assert [checkpoints.surplus(folder, keep) for keep in (0, 1, 2)] == [[], [5, 8, 9], []]


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

  def test_sealed_files_open_without_warnings(self, run, capsys):
    run_folder.open_run(run[0])
    run_folder.write_run(
      run[0], tiny.settings('Config.llffhold = 3'), datasets.load_dataset(run[1])
    )
    run_folder.open_run(run[0])
    assert capsys.readouterr().err == ''
    assert sorted(os.listdir(run[0])) == ['config.gin', 'run.json', 'scene.json']

  def test_a_changed_scene_is_no_evidence_of_other_poses(self, run, capsys):
    path, scene = Path(run[0]) / 'scene.json', datasets.load_dataset(run[1])
    run_folder.check_same_scene(run[0], scene)
    assert capsys.readouterr().err == ''
    scene.cameras.camtoworld[scene.train[0], 0, 3] += 0.5
    with pytest.raises(checkpoints.CheckpointError, match='trained with other poses'):
      run_folder.check_same_scene(run[0], scene)
    path.write_text(path.read_text() + ' ')
    run_folder.check_same_scene(run[0], scene)
    assert 'are not compared' in capsys.readouterr().err

  def test_other_sizes_of_the_training_images_are_named(self, run):
    scene = datasets.load_dataset(run[1])
    scene.cameras.size[scene.train[0]] = 8, 8
    with pytest.raises(checkpoints.CheckpointError, match='was 16x16, and is 8x8 now'):
      run_folder.check_same_scene(run[0], scene)

  def test_a_finished_run_with_other_settings_is_refused(self, run):
    folder, data = f'Config.checkpoint_dir = {run[0]!r}', f'Config.data_dir = {run[1].data_dir!r}'
    same = (folder, data, 'Config.llffhold = 3', 'Config.max_steps = 7', 'Config.print_every = 9')
    settings = tiny.settings(*same)
    scene = datasets.load_dataset(settings.config)
    run_folder.check_finished(settings, scene)
    other = tiny.settings(*same, 'NerfMLP.net_width_viewdirs = 5', 'Config.far = 3.0')
    with pytest.raises(
      checkpoints.CheckpointError,
      match=r'Config\.far from 1000000\.0 to 3.* \(2 settings differ',
    ):
      run_folder.check_finished(other, scene)

  def test_settings_that_change_are_recorded_with_the_step(self, run, capsys):
    settings = tiny.settings(
      'Config.llffhold = 3', 'Config.lr_init = 0.5', 'Config.print_every = 9'
    )
    scene = datasets.load_dataset(run[1])
    run_folder.write_run(run[0], settings, scene, 1200)
    wanted = 'Settings changed at step 1,200: Config.lr_init from 0.002 to 0.5.'
    assert wanted in capsys.readouterr().err
    run_folder.write_run(run[0], settings, scene, 1300)  # The same again.
    assert capsys.readouterr().err == ''
    assert run_seal.warnings(run[0]) == [wanted]

  @pytest.mark.parametrize('share', [0, 0.2, 0.5, 0.9, 0.99])
  def test_a_cut_config_is_refused(self, run, share):
    path = Path(run[0]) / 'config.gin'
    text = path.read_text()
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(run_seal.RunFileError, match=r'config\.gin was cut.*training command again'):
      run_folder.open_run(run[0])

  def test_a_lost_setting_is_named(self, run):
    path = Path(run[0]) / 'config.gin'
    lines = path.read_text().splitlines()
    path.write_text('\n'.join(line for line in lines if not line.startswith('Config.near')))
    with pytest.raises(run_seal.RunFileError, match=r'has lost Config\.near since training'):
      run_folder.open_run(run[0])
    lost = ('Config.near', 'Config.far')
    path.write_text('\n'.join(line for line in lines if not line.startswith(lost)))
    with pytest.raises(run_seal.RunFileError, match=r'has lost Config\.far, Config\.near since'):
      run_folder.open_run(run[0])
    (Path(run[0]) / 'run.json').unlink()  # Accepts it.
    run_folder.open_run(run[0])

  def test_encodings_of_an_editor_are_no_edit(self, run, capsys):
    path = Path(run[0]) / 'config.gin'
    text = path.read_text()
    path.write_bytes(b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode())
    run_folder.open_run(run[0])
    assert capsys.readouterr().err == ''
    path.write_text(text, encoding='utf-16')
    with pytest.raises(files.FileError, match=r'config\.gin: is UTF-16 text; save it as UTF-8'):
      run_folder.open_run(run[0])

  def test_an_edited_config_is_used_with_a_warning(self, run, capsys):
    path = Path(run[0]) / 'config.gin'
    path.write_text(path.read_text().replace('Config.far = 1000000.0', 'Config.far = 7.0'))
    settings, _ = run_folder.open_run(run[0])
    assert settings.config.far == 7
    assert 'was edited after training and is used as it is: Config.far = 7.0.' in (
      capsys.readouterr().err
    )

  def test_a_line_end_at_the_end_of_the_config_may_go(self, run, capsys):
    path = Path(run[0]) / 'config.gin'
    path.write_text(path.read_text().rstrip())
    run_folder.open_run(run[0])
    assert capsys.readouterr().err == ''

  def test_a_changed_scene_is_refused(self, run):
    path = Path(run[0]) / 'scene.json'
    path.write_text(path.read_text().replace('1.0', '1.5', 1))
    with pytest.raises(run_seal.RunFileError, match=r'scene\.json has changed since training'):
      run_folder.open_run(run[0])

  def test_changed_points_are_a_warning(self, run, capsys):
    points = Path(run[0]) / 'points.npy'
    config = (points.parent / 'config.gin').read_text()
    run_seal.write(run[0], 'a', config, lambda folder: np.save(f'{folder}/points.npy', np.eye(6)))
    run_folder.open_run(run[0])
    assert capsys.readouterr().err == ''
    _truncate(points)
    run_folder.open_run(run[0])
    assert 'points.npy has changed' in capsys.readouterr().err

  @pytest.mark.parametrize('content', [None, b'', b'[]', b'{"id": 1}', b'\xff', b'[' * 100_000])
  def test_runs_without_an_intact_seal_open(self, run, capsys, content):
    path = Path(run[0]) / 'run.json'
    path.unlink() if content is None else path.write_bytes(content)
    run_folder.open_run(run[0])
    err = capsys.readouterr().err
    assert err == '' if content is None else 'run.json is damaged' in err

  @pytest.mark.parametrize('moment', range(3))
  def test_a_kill_while_writing_leaves_files_that_match_the_seal(self, run, monkeypatch, moment):
    """Kills before one of three files gets its name; both configs stay valid."""
    folder, replace, calls = run[0], os.replace, []

    def kill(source, target):
      if os.path.dirname(target) == folder:
        calls.append(target)
        if len(calls) > moment:
          raise KeyboardInterrupt
      replace(source, target)

    settings, scene = tiny.settings('Config.max_steps = 7'), datasets.load_dataset(run[1])
    with monkeypatch.context() as patch:
      patch.setattr(os, 'replace', kill)
      with pytest.raises(KeyboardInterrupt):
        run_folder.write_run(folder, settings, scene)
    run_seal.check(folder)
    identity = run_seal.run_id(folder)
    run_folder.tidy(folder, 0)
    run_folder.write_run(folder, settings, scene)
    assert run_seal.run_id(folder) == identity
    assert sorted(os.listdir(folder)) == ['config.gin', 'run.json', 'scene.json']

  def test_leftovers_of_kills_are_removed(self, run):
    folder = Path(run[0])
    before = sorted(p.name for p in folder.iterdir())
    (folder / '.staging').mkdir()
    for name in ('.staging/config.gin', '.clock1', 'train.lock.9', 'metrics.3.part.jsonl'):
      (folder / name).touch()
    run_folder.tidy(run[0], 0)
    assert sorted(p.name for p in folder.iterdir()) == before

  def test_opens_with_bindings_that_do_not_change_the_scene(self, run):
    bindings = ['Config.llffhold = 3', 'Config.factor = 0', 'Config.eval_crop_borders = 2']
    settings, scene = run_folder.open_run(run[0], bindings)
    assert settings.config.eval_crop_borders == 2
    assert scene.test == (0, 3)

  @pytest.mark.parametrize(
    ('name', 'value', 'was'),
    [('llffhold', 8, 3), ('factor', 4, 0), ('dataset_loader', 'blender', 'llff')],
  )
  def test_bindings_that_change_the_scene_are_refused(self, run, name, value, was):
    with pytest.raises(checkpoints.CheckpointError) as caught:
      run_folder.open_run(run[0], [f'Config.{name} = {value!r}'])
    assert f'Config.{name} is {value!r}, but {run[0]} was trained with {was!r}' in str(caught.value)

  def test_training_resumes_only_with_the_same_images_and_poses(self, run):
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
