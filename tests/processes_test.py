"""Several processes, of which one ends: the others do too, and the run goes on to the same bits."""

import os
import signal
import socket
import time

import lives
import pytest
import resume_test

from internal import checkpoints

SECONDS = 5  # In which the others end where connections break: far less than sharding.HEARTBEAT.
HEARTBEAT = 5  # In its place, where they do not.


@pytest.fixture
def start_all(start_training):
  """Starts processes of one training run."""

  def start(run, count, only_the_first_writes=False, **kwargs):
    with socket.socket() as s:
      s.bind(('localhost', 0))
      where = f'localhost:{s.getsockname()[1]}'
    told = {'JAX_COORDINATOR_ADDRESS': where, 'JAX_NUM_PROCESSES': str(count)}
    begun = []
    for i in range(count):
      writes = i == 0 or not only_the_first_writes
      said = f'{run}.{i}' if writes else os.devnull
      told['JAX_PROCESS_ID'] = str(i)
      begun.append(start_training(run, said=said, writes=writes, **told, **kwargs))
    return begun

  return start


def until_saved(run, lives_of_run):
  """Waits for one more checkpoint."""
  before = checkpoints.latest_step(str(run)) or 0
  assert lives_of_run[0].until(lambda: (checkpoints.latest_step(str(run)) or 0) > before)


def one_process(start_training, run, count):
  """The same run by one process with as many devices."""
  flags = lives.ONE_DEVICE.replace('device_count=1', f'device_count={count}')
  life = start_training(run, XLA_FLAGS=flags)
  assert life.wait() == 0, life.text()
  assert f'{count} x cpu' in life.text()
  return run


def others_end(processes, victim, seconds):
  """The exit codes of all but one, which end in time; and what they say."""
  deadline = time.monotonic() + seconds
  rest = [life for i, life in enumerate(processes) if i != victim]
  codes = [life.wait() for life in rest]
  assert time.monotonic() < deadline
  return codes, [life.text() for life in rest]


@pytest.mark.parametrize(('count', 'victim'), [(2, 1), (4, 0)])
def test_one_is_killed_and_all_go_on(start_all, start_training, tmp_path, count, victim):
  """To what one process with as many devices gives, though all but the first cannot write."""
  run = tmp_path / 'run'
  processes = start_all(run, count)
  until_saved(run, processes)
  processes[victim].kill()
  codes, said = others_end(processes, victim, SECONDS)
  # What the first one's end does to the others JAX may notice before we do; it aborts.
  assert set(codes) <= {1, -signal.SIGABRT if victim == 0 else 1}, said
  assert all('as another one has ended' in t or 'another task died' in t for t in said), said
  assert not any('Traceback' in text for text in said), said
  assert processes[victim].wait() == -signal.SIGKILL
  assert checkpoints.newest(str(run)) < lives.STEPS
  processes = start_all(run, count, only_the_first_writes=True)
  assert [life.wait() for life in processes] == [0] * count, processes[0].text()
  assert resume_test.same(run, one_process(start_training, tmp_path / 'one', count))


def test_one_is_signalled_and_another_hangs(start_all, tmp_path):
  run = tmp_path / 'run'
  processes = start_all(run, 2, heartbeat=HEARTBEAT)
  until_saved(run, processes)
  processes[1].kill(signal.SIGTERM)
  assert [life.wait() for life in processes] == [143, 143], processes[0].text()
  step = checkpoints.newest(str(run))
  assert step % 7 == 0
  assert f'step {step:,} is saved' in processes[0].text()
  processes = start_all(run, 2, heartbeat=HEARTBEAT)
  until_saved(run, processes)
  processes[1].kill(signal.SIGSTOP)
  try:
    codes, said = others_end(processes, 1, 2 * HEARTBEAT)
  finally:
    processes[1].kill()
  assert codes == [-signal.SIGABRT], said
  assert 'unhealthy (stopped sending heartbeats)' in said[0]
