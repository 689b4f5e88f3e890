"""The lock of a run's folder: who is refused, which locks are stale, and what a holder notices."""

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from internal.training import run_lock


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setattr(run_lock, '_HEARTBEAT', 0.05)
  monkeypatch.setattr(run_lock, '_STALE', 0.5)
  return str(tmp_path / 'run')


def _lock(folder, name=run_lock.FILE, **changes):
  """Writes the lock file of another process."""
  os.makedirs(folder, exist_ok=True)
  holder = {**run_lock._process(), 'since': 'noon', 'id': 'x', **changes}
  path = os.path.join(folder, name)
  with open(path, 'w') as f:
    json.dump(holder, f)
  return path


def _take(folder):
  with run_lock.locked(folder):
    run_lock.check()
    assert os.listdir(folder) == [run_lock.FILE]
  assert os.listdir(folder) == []


def test_the_lock_is_there_while_the_block_runs(folder):
  _take(folder)
  _take(folder)


def test_a_second_training_is_refused_and_told_by_whom(folder):
  host = run_lock._process()['host']
  with run_lock.locked(folder):
    with (
      pytest.raises(
        run_lock.RunLockError,
        match=rf'run is being trained by process {os.getpid()} on {host} since 20.* remove .*lock',
      ),
      run_lock.locked(folder),
    ):
      pass
    run_lock.check()
  assert os.listdir(folder) == []


def test_two_commands_do_not_write_one_folder(folder):
  with run_lock.output(folder, '--out'):
    with (
      pytest.raises(
        run_lock.RunLockError,
        match=rf'run is being written by process {os.getpid()} .* or set another --out\. If you',
      ),
      run_lock.output(folder, '--out'),
    ):
      pass
    with run_lock.locked(folder), run_lock.output(f'{folder}/eval'):  # Each has its own.
      run_lock.check()
  assert os.listdir(folder) == ['eval']
  assert os.listdir(f'{folder}/eval') == []
  _lock(folder, run_lock.OUTPUT_FILE, pid=2**22 + 5)  # Of a process that was killed.
  with run_lock.output(folder):
    assert f'"pid": {os.getpid()},' in run_lock._read(f'{folder}/{run_lock.OUTPUT_FILE}')


def start_at_once(lock):
  """Calls `lock` in eight threads at once; returns the locks taken and the number refused."""
  taken, refused, barrier = [], [], threading.Barrier(8)

  def start():
    barrier.wait()
    try:
      taken.append(lock())
    except run_lock.RunLockError:
      refused.append(1)

  threads = [threading.Thread(target=start) for _ in range(8)]
  [thread.start() for thread in threads]
  [thread.join() for thread in threads]
  return taken, len(refused)


def test_of_many_that_start_at_once_one_gets_it(folder):
  _lock(folder, pid=2**22 + 5, started='1')  # Stale.
  taken, refused = start_at_once(lambda: run_lock._Lock(folder))
  alive = [lock for lock in taken if run_lock._read(lock.path) == lock._text]
  assert len(alive) == 1
  for lock in taken:
    if lock is not alive[0]:  # Took it and lost it again: finds out before it writes.
      with pytest.raises(run_lock.RunLockError):
        lock.check()
  assert len(taken) + refused == 8
  for lock in taken:
    lock.release()


@pytest.mark.parametrize('changes', [{'pid': 2**22 + 5}, {'started': '1'}, {'pid': None}])
def test_a_lock_of_a_process_that_has_ended_is_taken_over(folder, changes):
  _lock(folder, **changes)
  _take(folder)


def test_a_killed_process_leaves_a_stale_lock(folder):
  program = f"""
import os
from internal.training import run_lock
with run_lock.locked({folder!r}):
  os.kill(os.getpid(), 9)
"""
  subprocess.run([sys.executable, '-c', program], cwd=os.path.dirname(os.path.dirname(__file__)))
  assert os.listdir(folder) == [run_lock.FILE]
  _take(folder)


@pytest.mark.parametrize('content', ['', '[]', '{"host": 3', '\x00' * 9])
@pytest.mark.parametrize('age', [0, 3600])
def test_damaged_locks_go_by_their_heartbeat(folder, content, age):
  path = _lock(folder)
  with open(path, 'w') as f:
    f.write(content)
  os.utime(path, (os.stat(path).st_mtime - age,) * 2)
  _take(folder)


@pytest.mark.parametrize('changes', [{'host': 'other'}, {'boot': 'other'}, {'namespace': 'other'}])
def test_other_hosts_and_boots_go_by_their_heartbeat(folder, changes):
  path = _lock(folder, **changes)
  _take(folder)  # Nobody touches it.
  path, end = _lock(folder, **changes), threading.Event()

  def beat():
    while not end.wait(0.05):
      os.utime(path)

  thread = threading.Thread(target=beat)
  thread.start()
  try:
    with pytest.raises(run_lock.RunLockError, match='since noon'), run_lock.locked(folder):
      pass
  finally:
    end.set()
    thread.join()


def test_a_copied_folder_is_not_held_by_the_training_in_the_original(folder, tmp_path):
  with run_lock.locked(folder):
    copy = str(tmp_path / 'copy')
    shutil.copytree(folder, copy)
    _take(copy)
    run_lock.check()
  with run_lock.locked(folder):
    os.rename(folder, tmp_path / 'moved')  # Here the training could still write.
    with pytest.raises(run_lock.RunLockError), run_lock.locked(tmp_path / 'moved'):
      pass


def test_a_holder_bears_that_its_lock_is_moved_aside_for_a_moment(folder):
  with run_lock.locked(folder):
    path = os.path.join(folder, run_lock.FILE)
    os.rename(path, f'{path}.aside')
    threading.Timer(0.02, os.rename, (f'{path}.aside', path)).start()
    run_lock.check()


def test_a_holder_touches_its_lock(folder):
  with run_lock.locked(folder):
    path = os.path.join(folder, run_lock.FILE)
    os.utime(path, (0, 0))
    deadline = threading.Event()
    for _ in range(100):
      if os.stat(path).st_mtime:
        break
      deadline.wait(0.05)
    assert os.stat(path).st_mtime


def test_a_holder_notices_another_holder_and_leaves_its_lock(folder):
  with run_lock.locked(folder):
    path = _lock(folder, host='other')
    with pytest.raises(run_lock.RunLockError, match='on other since noon'):
      run_lock.check()
  assert os.path.exists(path)


def test_a_holder_notices_that_its_folder_has_vanished(folder):
  with run_lock.locked(folder):
    os.remove(os.path.join(folder, run_lock.FILE))
    with pytest.raises(run_lock.RunLockError, match=r'no longer has train\.lock'):
      run_lock.check()
    shutil.rmtree(folder)
    with pytest.raises(run_lock.RunLockError, match='has vanished'):
      run_lock.check()
  assert not os.path.exists(folder)


def test_nothing_is_checked_without_a_lock():
  run_lock.check()
