import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from internal.experiments import jobs
from internal.system import signals

ROOT = Path(__file__).resolve().parents[1]


# Waits for a file, for up to 20 seconds.
WAIT = 'for i in $(seq 2000); do [ -e {} ] && break; sleep 0.01; done; [ $i -lt 2000 ]'


def sh(script):
  return ('/bin/sh', '-c', script)


def job(folder, name, *scripts):
  return jobs.Job(name, tuple(sh(s) for s in scripts), str(folder / name))


@pytest.fixture(autouse=True)
def _poll_quickly(monkeypatch):
  monkeypatch.setattr(jobs, '_POLL_SECONDS', 0.01)


class TestRun:
  def test_commands_run_in_order(self, tmp_path):
    todo = [job(tmp_path, name, 'echo one', 'echo two') for name in 'ab']
    assert jobs.run(todo, [{}]) == {}
    for name in 'ab':
      assert (tmp_path / name / 'log.txt').read_text() == 'one\ntwo\n'

  def test_a_failure_ends_only_its_job(self, tmp_path):
    todo = [
      job(tmp_path, 'a', 'echo fine; echo "no luck" >&2; exit 3', 'echo never'),
      job(tmp_path, 'b', 'echo b'),
    ]
    assert jobs.run(todo, [{}]) == {'a': 'exit code 3: no luck'}
    assert 'never' not in (tmp_path / 'a' / 'log.txt').read_text()
    assert (tmp_path / 'b' / 'log.txt').read_text() == 'b\n'

  def test_each_slot_runs_one_job_at_a_time_with_its_own_variables(self, tmp_path):
    # Each waits for the other, so they must run at the same time.
    meet = 'echo $GPU; touch ../{0}.here; ' + WAIT.format('../{1}.here')
    todo = [
      job(tmp_path, 'a', f'cd {tmp_path}/a; {meet.format("a", "b")}'),
      job(tmp_path, 'b', f'cd {tmp_path}/b; {meet.format("b", "a")}'),
      job(tmp_path, 'c', 'echo $GPU'),
    ]
    counts = []
    slots = [{'GPU': '5'}, {'GPU': '7'}]
    assert jobs.run(todo, slots, lambda running: counts.append(len(running))) == {}
    used = [(tmp_path / name / 'log.txt').read_text().strip() for name in 'abc']
    assert used[:2] == ['5', '7']
    assert used[2] in used[:2]
    assert max(counts) == 2

  def test_a_log_is_appended_to(self, tmp_path):
    for word in ('first', 'second'):
      jobs.run([job(tmp_path, 'a', f'echo {word}')], [{}])
    assert (tmp_path / 'a' / 'log.txt').read_text() == 'first\nsecond\n'

  def test_a_signal_ends_running_jobs_and_starts_no_others(self, tmp_path):
    ready = tmp_path / 'a' / 'ready'
    trapped = f"trap 'echo saved; exit 143' TERM; touch {ready}; {WAIT.format('never')}"
    todo = [job(tmp_path, 'a', trapped, 'echo never'), job(tmp_path, 'b', 'echo never')]

    def stop():
      while not ready.exists():
        time.sleep(0.01)
      os.kill(os.getpid(), signal.SIGTERM)

    with signals.listening():
      thread = threading.Thread(target=stop)
      thread.start()
      with pytest.raises(signals.Stopped):
        jobs.run(todo, [{}])
      thread.join()
    assert (tmp_path / 'a' / 'log.txt').read_text() == 'saved\n'
    assert not (tmp_path / 'b').exists()

  def test_a_folder_stays_locked_after_its_starter_was_killed(self, tmp_path):
    program = (
      'import sys; sys.path.insert(0, sys.argv[1]); from internal.experiments import jobs\n'
      'work = ("/bin/sh", "-c", sys.argv[3])\n'
      'jobs.run([jobs.Job("a", (work,), sys.argv[2] + "/a")], [{}])\n'
    )
    work = f'touch {tmp_path}/on; {WAIT.format(f"{tmp_path}/off")}'
    starter = subprocess.Popen([sys.executable, '-c', program, str(ROOT), str(tmp_path), work])
    while not (tmp_path / 'on').exists():
      assert starter.poll() is None
      time.sleep(0.01)
    starter.kill()
    starter.wait()
    todo = [job(tmp_path, 'a', 'echo second'), job(tmp_path, 'b', 'echo b')]
    failed = jobs.run(todo, [{}])
    assert failed == {'a': f'{tmp_path / "a"} is in use by another program'}
    assert (tmp_path / 'b' / 'log.txt').read_text() == 'b\n'
    (tmp_path / 'off').touch()
    deadline = time.monotonic() + 20
    while jobs.run(todo[:1], [{}]):
      assert time.monotonic() < deadline
    assert (tmp_path / 'a' / 'log.txt').read_text() == 'second\n'


class TestVisibleGpus:
  @pytest.fixture
  def smi(self, tmp_path, monkeypatch):
    """Installs an nvidia-smi that runs the given script."""

    def install(script):
      path = tmp_path / 'nvidia-smi'
      path.write_text(f'#!/bin/sh\n{script}\n')
      path.chmod(0o755)
      monkeypatch.setenv('PATH', f'{tmp_path}:/bin:/usr/bin')
      monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)

    return install

  def test_lists_those_of_the_driver(self, smi):
    smi('echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"; echo "  MIG x"; echo "GPU 1: NVIDIA H200"')
    assert jobs.visible_gpus() == ['0', '1']

  def test_a_broken_driver_means_none(self, smi):
    smi('echo "no devices"; exit 9')
    assert jobs.visible_gpus() == []

  def test_no_driver_means_none(self, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert jobs.visible_gpus() == []

  @pytest.mark.parametrize(
    ('variable', 'found'), [('2, 3', ['2', '3']), ('', []), ('GPU-8a', ['GPU-8a'])]
  )
  def test_cuda_visible_devices_wins(self, smi, monkeypatch, variable, found):
    smi('echo "GPU 0: x"')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', variable)
    assert jobs.visible_gpus() == found


def test_last_line_of_a_log(tmp_path):
  assert jobs.last_line(str(tmp_path)) == ''
  (tmp_path / 'log.txt').write_bytes(b'x' * 9000 + b'\nError: \xff it broke\n\n')
  assert jobs.last_line(str(tmp_path)) == 'Error: \ufffd it broke'
