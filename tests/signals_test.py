"""SIGTERM and SIGINT, once and twice, and closed output pipes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internal.system import signals

ROOT = Path(__file__).resolve().parents[1]


def test_the_first_signal_is_raised():
  with (
    signals.listening(),
    pytest.raises(signals.Stopped) as caught,
  ):
    signal.raise_signal(signal.SIGTERM)
  assert (caught.value.name, caught.value.exit_code) == ('SIGTERM', 143)


def test_the_first_signal_is_recorded_inside_postponed():
  with signals.listening():
    with signals.postponed() as request:
      assert request.signum == 0
      signal.raise_signal(signal.SIGINT)
      signal.raise_signal(signal.SIGTERM)
      assert request.signum == signal.SIGINT
    with pytest.raises(signals.Stopped):
      signal.raise_signal(signal.SIGINT)


def test_handlers_are_as_before_afterwards():
  before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  with signals.listening():
    signals.listen_again()
  assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
  assert signal.set_wakeup_fd(-1) == -1


class _Dropping:
  """Python drops what `__del__` raises."""

  def __del__(self):
    signal.raise_signal(signal.SIGTERM)


def test_a_signal_while_python_drops_exceptions_stops_the_program_as_well():
  def main():
    _Dropping()
    time.sleep(10)

  with signals.listening(), pytest.raises(signals.Stopped):
    main()
  with signals.listening(), signals.postponed() as request:
    _Dropping()
    assert request.signum == signal.SIGTERM


ENTRIES = [
  ['train.py'],
  ['scripts/export.py'],
  ['-m', 'internal', 'render'],
  ['-c', 'import sys; from mipnerf360.__main__ import main; main()', 'eval'],
]


@pytest.mark.parametrize('words', ENTRIES, ids=' '.join)
def test_ctrl_c_during_imports_ends_the_program_at_once(words, tmp_path):
  """JAX's import is stood in for by one that says so and takes long."""
  (tmp_path / 'jax.py').write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)")
  (tmp_path / 'mipnerf360').symlink_to(ROOT / 'internal')
  process = subprocess.Popen(
    [sys.executable, *words], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert process.stdout.readline() == 'importing\n'
  process.send_signal(signal.SIGINT)
  assert process.communicate(timeout=10) == ('', '')
  assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize(('end', 'signum'), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)])
def test_a_signal_while_the_demo_is_made_leaves_nothing(tmp_path, end, signum):
  command = [sys.executable, 'scripts/make_demo_scene.py', str(tmp_path / 'demo'), '--images=999']
  process = subprocess.Popen(
    command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
  )
  while not list(tmp_path.glob('.demo.*/scene/images/*')):
    assert process.poll() is None
    time.sleep(0.05)
  end(process.pid, signum)
  assert process.communicate(timeout=60) == (None, '')
  assert process.returncode == 128 + signum
  assert list(tmp_path.iterdir()) == []


_BUSY = """
import hashlib
from internal.system import signals
with signals.listening(), signals.postponed() as request:
  print('busy', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', {count})  # Minutes in C code; other threads may run.
  print('asked by', request.signum)
"""


def _start_busy(count):
  command = [sys.executable, '-c', _BUSY.format(count=count)]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == 'busy\n'
  return process


def test_the_second_signal_ends_the_process_even_inside_c_code():
  process = _start_busy(10**9)
  process.terminate()
  time.sleep(signals._ONE_REQUEST + 0.2)
  assert process.poll() is None
  process.send_signal(signal.SIGINT)
  assert process.wait(10) == 130
  process.stdout.close()


def test_two_signals_in_quick_succession_are_one_request():
  process = _start_busy(10**6)
  for _ in range(2):
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.05)
  assert process.communicate(timeout=60)[0] == f'asked by {signal.SIGTERM.value}\n'
  assert process.returncode == 0


_CRASHING = """
import atexit, os, signal, sys
from internal import cli
def main():
  atexit.register(os.abort)  # As what XLA has half compiled does.
  sys.stdout.reconfigure(line_buffering=False)
  print('a line')
  signal.raise_signal(signal.{name})
cli.run(main)
"""


@pytest.mark.parametrize(('name', 'code'), [('SIGINT', 130), ('SIGTERM', 143)])
def test_a_stop_leaves_without_what_may_crash_at_the_end(name, code):
  command = [sys.executable, '-c', _CRASHING.format(name=name)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert (done.stdout, done.stderr) == ('a line\n', f'Stopped by {name}.\n')
  assert done.returncode == code


_PRINTING = """
import sys
from internal import cli
from internal.system import progress, signals
def main():
  if 'postponed' in sys.argv:
    with signals.postponed() as request:
      while not request.signum:
        progress.say('a line')
    open(sys.argv[1], 'w').write(f'saved after {request.signum}')
    raise signals.Stopped(request.signum)
  while True:
    print('a line', flush=True)
cli.run(main)
"""


@pytest.mark.parametrize('postponed', [True, False])
def test_a_closed_pipe_stops_the_program_as_a_signal_would(tmp_path, postponed):
  command = [sys.executable, '-c', _PRINTING, str(tmp_path / 'saved'), *['postponed'] * postponed]
  process = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == 'a line\n'  # As `| head -1` does.
  process.stdout.close()
  assert process.stderr.read() == 'Stopped by SIGPIPE.\n'
  assert process.wait(60) == 141
  assert not postponed or (tmp_path / 'saved').read_text() == 'saved after 13'


def test_another_broken_pipe_is_an_error():
  assert not signals.stop_for_closed_output()
