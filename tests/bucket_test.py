"""Working copies of runs in a bucket, their checkpoints and their lock, on a local stand-in."""

import json
import os
import subprocess
import sys
import tempfile
import threading

import pytest
import run_lock_test
import tiny
from gcs_server import NAME, RUN

from internal.commands import view
from internal.devices import sharding
from internal.experiments import jobs
from internal.system import bucket, files
from internal.training import (
  bucket_checkpoints,
  checkpoints,
  run_folder,
  run_lock,
  run_seal,
  train_step,
)

LOCK = f'{NAME}/{run_lock.FILE}'


@pytest.fixture
def served(stand_in, monkeypatch, tmp_path):
  """The stand-in, which this process uses as Cloud Storage."""
  served, env = stand_in
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  monkeypatch.setattr(run_lock, '_HEARTBEAT', 0.05)
  monkeypatch.setattr(run_lock, '_STALE', 0.5)
  yield served
  served.status = 0
  bucket.close()
  assert not any(path.name.startswith('mipnerf360') for path in tmp_path.iterdir())


@pytest.fixture
def copy(served):
  """The working copy of an empty run."""
  return bucket.of(bucket.local(RUN))


def _write(copy, **contents):
  for name, text in contents.items():
    files.write_text(copy.path(name.replace('__', '/').replace('_', '.')), text)


class TestWorkingCopy:
  def test_pushes_what_has_changed_and_nothing_that_is_unfinished(self, served, copy):
    _write(copy, a_txt='1', eval__b_txt='2', run_json='{}', checkpoints__5__c_txt='3')
    _write(copy, _staging__d_txt='4', eval__e_123_part_png='5', f_part='6')
    copy.push()
    assert served.changes[0] == f'{NAME}/run.json'
    assert sorted(served.changes[1:]) == [f'{NAME}/a.txt', f'{NAME}/eval/b.txt']
    copy.push()
    assert len(served.changes) == 3
    _write(copy, a_txt='new')
    copy.push()
    assert served.changes[3:] == [f'{NAME}/a.txt']
    assert served.objects[f'{NAME}/a.txt'][0] == b'new'

  def test_fetches_files_and_removes_those_that_are_gone(self, served, copy):
    for k in range(40):  # More than are transferred at once, and than a listing's page.
      served.change(f'{NAME}/eval/{k:02d}', str(k).encode())
    for name in ('runs/ab/eval/other', f'{NAME}/eval/', f'{NAME}/eval/../../x', f'{NAME}/eval//x'):
      served.change(name, b'')
    _write(copy, eval__00='old', gone='')
    assert copy.names('eval/') == [f'eval/{k:02d}' for k in range(40)]
    bucket.fetch(copy.folder, 'eval/')
    copy.fetch(['gone'])
    assert [files.read_text(copy.path(f'eval/{k:02d}')) for k in range(40)] == [
      *map(str, range(40))
    ]
    assert not os.path.exists(copy.path('gone'))
    copy.push()  # Has nothing to do.
    assert len(served.changes) == 44

  def test_writes_only_the_generation_that_it_has_read(self, served, copy):
    content, absent = copy.read('x')
    assert content is None
    first = copy.write('x', b'1', absent)
    assert copy.read('x') == (b'1', first)
    assert copy.write('x', b'2', absent) == b''
    assert copy.write('x', b'2', first)
    assert copy.write('x', b'3', first) == b''
    copy.write('x', None, first)
    assert copy.read('x')[0] == b'2'
    copy.delete(['x', 'no such object'])
    assert copy.names() == []

  def test_messages_have_addresses(self, copy):
    assert bucket.shown(f'{copy.folder}/eval/a.png is damaged') == f'{RUN}/eval/a.png is damaged'

  def test_there_is_one_for_each_run(self, served, copy):
    assert bucket.local(f'{RUN}/') == copy.folder
    assert bucket.local(f'{RUN}/b') != copy.folder
    assert bucket.local('runs/a') == 'runs/a'
    assert bucket.of('runs/a') is None

  def test_those_of_killed_processes_are_removed(self, copy, tmp_path):
    program = f"""
import os, tempfile
from internal.system import bucket
tempfile.tempdir = {str(tmp_path)!r}
bucket.local({RUN!r})
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, '-c', program], cwd=os.path.dirname(os.path.dirname(__file__)))
    assert len(list(tmp_path.iterdir())) == 2
    folder = bucket.local(f'{RUN}/b')
    assert {str(path) for path in tmp_path.iterdir()} == {copy.folder, folder}


@pytest.mark.parametrize('address', ['gs://only-a-bucket', 'gs://a//b', 's3://a/b', 'gs:///a'])
def test_other_addresses_are_refused(address):
  with pytest.raises(bucket.BucketError, match=r'must be a folder, or .* gs://BUCKET/RUN'):
    bucket.local(address)


@pytest.mark.parametrize(
  ('status', 'message'),
  [
    (403, r'runs/a/x cannot be used: PERMISSION_DENIED: as the test wants it.*storage.objectUser'),
    (401, r'runs/a/x cannot be used: PERMISSION_DENIED: .* `gcloud auth application-default login'),
    (400, r'runs/a/x cannot be used: as the test wants it. Check the network'),
  ],
)
def test_refused_requests_say_what_to_do(served, copy, status, message):
  served.status = status
  with pytest.raises(bucket.BucketError, match=message):
    copy.write('x', b'')


def test_a_bucket_that_does_not_exist(served):
  copy = bucket.of(bucket.local('gs://elsewhere/run'))
  with pytest.raises(bucket.BucketError, match=r'The specified bucket does not exist.*Create'):
    copy.write('x', b'')


def test_programs_that_cannot_use_it_name_the_command_that_copies_a_run():
  with pytest.raises(bucket.BucketError, match=f'gcloud storage rsync --recursive {RUN} RUN`'):
    view.main([RUN])
  with pytest.raises(bucket.BucketError, match='must be a folder of this machine'):
    jobs.run([jobs.Job('a', (('true',),), RUN)], [{}])
  with pytest.raises(files.FileError, match=f'^{RUN}/a.png: cannot be written'):
    files.write_text(f'{RUN}/a.png', '')


def test_a_bucket_that_may_not_be_listed(served, copy):
  """TensorStore then returns an empty list, which would make a run start from scratch."""
  served.unlisted = True
  with pytest.raises(bucket.BucketError, match=r'can be written but not listed. .*objectUser'):
    run_lock._BucketLock(copy)
  assert served.names() == []
  assert copy.names() == []
  copy.write('run.json', b'{}')
  with pytest.raises(bucket.BucketError, match=r'^gs://stand-in/runs/a cannot be listed'):
    checkpoints.all_steps(copy.folder)


@pytest.fixture(scope='module')
def state():
  return sharding.replicate(train_step.create_state(tiny.settings()), tiny.mesh(1))


def _save(copy, state, step, **kwargs):
  checkpoints.save(copy.folder, state.replace(step=state.step + step), **kwargs)


class TestCheckpoints:
  def test_the_manifest_is_written_last_and_removed_first(self, served, copy, state):
    _write(copy, metrics_jsonl='{"step": 3}\n')
    for step in (3, 5, 8):
      _save(copy, state, step, keep=2)
    assert checkpoints.all_steps(copy.folder) == [5, 8]
    assert not os.path.exists(copy.path('checkpoints'))  # The disk need not hold them.
    three = [name for name in served.changes if '/3/' in name]
    written = [name for name in three if name[0] != '-']
    assert written[-1] == three[len(written) - 1] == f'{NAME}/checkpoints/3/manifest.json'
    assert three[len(written)] == f'-{written[-1]}'
    assert len(three) == 2 * len(written)
    assert served.changes[0] == f'{NAME}/metrics.jsonl'

  def test_it_is_restored(self, copy, state):
    _save(copy, state, 8)
    back = checkpoints.restore(copy.folder, tiny.settings(), tiny.mesh(2), 8)
    assert int(back.step) == 8
    assert checkpoints.restore_params(copy.folder, tiny.settings())[1] == 8

  def test_without_a_manifest_there_is_none(self, served, copy, state):
    _save(copy, state, 3)
    _save(copy, state, 5)
    served.change(f'{NAME}/checkpoints/5/manifest.json', None)
    assert checkpoints.newest(copy.folder) == 3
    checkpoints.tidy(copy.folder, 3)
    assert served.steps(complete=False) == [3]
    with pytest.raises(checkpoints.CheckpointError, match=r'No checkpoint of step 5 in .*\[3\]'):
      checkpoints.restore_params(copy.folder, tiny.settings(), 5)

  @pytest.mark.parametrize('damage', [b'[]', None])
  def test_damage_is_named_and_set_aside(self, served, copy, state, damage, capsys):
    _save(copy, state, 3)
    _save(copy, state, 5)
    served.change(f'{NAME}/checkpoints/5/notes.json', damage)
    assert checkpoints.newest(copy.folder) == 3
    assert f'{RUN}/checkpoints/5 is damaged: notes.json ' in capsys.readouterr().err
    before = {name: served.objects[name][0] for name in served.names(f'{NAME}/checkpoints/5/')}
    checkpoints.tidy(copy.folder, 3)
    assert served.steps(complete=False) == [3]
    for name, content in before.items():
      assert served.objects[name.replace('/5/', '/5.damaged/')][0] == content

  def test_one_that_training_removes_during_the_download_is_gone_not_damaged(
    self, served, copy, state, monkeypatch
  ):
    _save(copy, state, 3)
    fetch = bucket.WorkingCopy.fetch

    def replace(self, names):
      monkeypatch.setattr(bucket.WorkingCopy, 'fetch', fetch)
      _save(copy, state, 5, keep=1)
      fetch(self, names)

    monkeypatch.setattr(bucket.WorkingCopy, 'fetch', replace)
    assert checkpoints.restore_params(copy.folder, tiny.settings())[1] == 5

  def test_a_network_that_fails_is_no_damage(self, served, copy, state):
    _save(copy, state, 3)
    served.status = 403
    with pytest.raises(bucket.BucketError, match='PERMISSION_DENIED'):
      checkpoints.newest(copy.folder)
    served.status = 0
    served.on_change = lambda name: setattr(served, 'status', 403)
    with pytest.raises(
      checkpoints.CheckpointError, match=r'5 could not be .*PERMISSION_DENIED.*step 3 is kept'
    ):
      _save(copy, state, 5)
    served.let_go()
    served.status = 0
    assert checkpoints.newest(copy.folder) == 3

  def test_a_training_that_loses_its_lock_during_the_upload_does_not_complete_it(
    self, served, copy, state
  ):
    def take_over(name):
      if name.startswith(f'{NAME}/checkpoints/5/'):
        served.let_go()
        _other(served)

    with run_lock.locked(copy.folder):
      _save(copy, state, 3)
      served.on_change = take_over
      with pytest.raises(run_lock.RunLockError, match='on other since noon'):
        _save(copy, state, 5)
    assert served.steps() == [3]
    assert served.steps(complete=False) == [3, 5]


def _other(served, **changes):
  """Writes the lock of another process."""
  holder = {**run_lock._process(), 'host': 'other', 'since': 'noon', 'id': 'x', 'address': RUN}
  served.change(LOCK, json.dumps({**holder, **changes}).encode())


def _take(served, copy):
  with run_lock.locked(copy.folder):
    run_lock.check()
    run_lock.confirm()
    assert served.names() == [LOCK]
  assert served.names() == []


class TestLock:
  def test_it_is_there_while_the_block_runs(self, served, copy):
    _take(served, copy)
    _take(served, copy)

  def test_a_second_training_is_refused(self, served, copy):
    with (
      run_lock.locked(copy.folder),
      pytest.raises(
        run_lock.RunLockError, match=f'{RUN} is being trained by process {os.getpid()}'
      ),
      run_lock.locked(copy.folder),
    ):
      pass
    assert served.names() == []

  def test_two_commands_do_not_write_one_folder(self, served, copy):
    folder = f'{copy.folder}/eval'
    with run_lock.output(folder):
      assert served.names() == [f'{NAME}/eval/{run_lock.OUTPUT_FILE}']
      with (
        pytest.raises(run_lock.RunLockError, match=f'{RUN}/eval is being written by process'),
        run_lock.output(folder),
      ):
        pass
    assert served.names() == []

  def test_of_many_that_start_at_once_one_gets_it(self, served, copy):
    _other(served)  # Stale.
    taken, refused = run_lock_test.start_at_once(lambda: run_lock._BucketLock(copy))
    assert (len(taken), refused) == (1, 7)
    taken[0].release()

  def test_of_a_process_of_this_machine_that_has_ended_it_is_taken_at_once(
    self, served, copy, capsys
  ):
    _other(served, **run_lock._process() | {'pid': 2**22 + 5})
    _take(served, copy)
    assert 'waiting' not in capsys.readouterr().err

  @pytest.mark.parametrize('content', [b'', b'[]', b'\xff{'])
  def test_a_damaged_one_goes_by_its_heartbeat(self, served, copy, content):
    served.change(LOCK, content)
    _take(served, copy)

  def test_that_of_a_copied_run_goes_by_its_heartbeat(self, served, copy):
    _other(served, **run_lock._process(), address='gs://stand-in/original')
    _take(served, copy)

  def test_a_process_elsewhere_that_writes_it_keeps_it(self, served, copy):
    _other(served)
    timer = threading.Timer(0.2, _other, [served])
    timer.start()
    with pytest.raises(run_lock.RunLockError, match='since noon'), run_lock.locked(copy.folder):
      pass
    timer.join()

  def test_a_holder_writes_it_again_and_again(self, served, copy):
    with run_lock.locked(copy.folder):
      first, end = served.objects[LOCK][1], threading.Event()
      while served.objects[LOCK][1] < first + 3:
        end.wait(0.01)
      run_lock.check()

  def test_a_holder_notices_another_holder_and_leaves_its_lock(self, served, copy):
    with run_lock.locked(copy.folder):
      _other(served)
      with pytest.raises(run_lock.RunLockError, match='on other since noon'):
        run_lock.confirm()
      with pytest.raises(run_lock.RunLockError, match='on other since noon'):
        run_lock.check()
    assert served.names() == [LOCK]

  def test_a_holder_notices_that_the_run_was_removed(self, served, copy):
    with run_lock.locked(copy.folder):
      served.change(LOCK, None)
      with pytest.raises(run_lock.RunLockError, match=r'no longer has train\.lock'):
        run_lock.confirm()
    assert served.names() == []

  def test_an_own_write_whose_answer_was_lost_is_its_own(self, served, copy):
    with run_lock.locked(copy.folder):
      served.change(LOCK, served.objects[LOCK][0])
      run_lock.confirm()
    assert served.names() == []


def test_names_of_files_agree():
  assert run_seal.FILE == bucket._FIRST
  assert bucket._LOCAL.match(f'{bucket_checkpoints.FOLDER}/')
  assert not any(map(bucket._LOCAL.match, run_folder._READ))
