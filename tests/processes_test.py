"""Several processes, of which one ends: the others do too, and the run goes on to the same bits."""

import functools
import json
import os
import shutil
import signal
import socket
import time

import lives
import numpy as np
import pytest
import resume_test

from internal.training import checkpoints

SECONDS = 20  # In which the others end where connections break: less than processes.HEARTBEAT.
HEARTBEAT = {'HEARTBEAT': 10}  # In its place, where they do not.
SPLIT = {'_LARGE': 512}  # Bytes: most of a small model's arrays are shared out among the devices.


@pytest.fixture
def start_all(start_training):
  """Starts processes of one run, which train unless `start_one` starts another program."""

  def start(run, count, *bindings, start_one=start_training, only_the_first_writes=False, **kwargs):
    with socket.socket() as s:
      s.bind(('localhost', 0))
      where = f'localhost:{s.getsockname()[1]}'
    told = {'JAX_COORDINATOR_ADDRESS': where, 'JAX_NUM_PROCESSES': str(count)}
    begun = []
    for i in range(count):
      writes = i == 0 or not only_the_first_writes
      said = f'{run}.{i}' if writes else os.devnull
      told['JAX_PROCESS_ID'] = str(i)
      begun.append(start_one(run, *bindings, said=said, writes=writes, **told, **kwargs))
    return begun

  return start


def until_saved(run, lives_of_run):
  """Waits for one more checkpoint."""
  before = checkpoints.latest_step(str(run)) or 0
  assert lives_of_run[0].until(lambda: (checkpoints.latest_step(str(run)) or 0) > before)


def devices(count):
  """The variable that gives a life so many."""
  return {'XLA_FLAGS': lives.ONE_DEVICE.replace('device_count=1', f'device_count={count}')}


def one_process(start_training, run, count, *bindings, **kwargs):
  """The same run by one process with as many devices."""
  life = start_training(run, *bindings, **devices(count), **kwargs)
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


def told_of_the_end(text):
  """Whether a process says why it ends, and no more; JAX may notice it first, and aborts."""
  return ('as another one has ended' in text or 'another task died' in text) and (
    'Traceback' not in text
  )


def test_of_two_one_is_signalled_then_the_first_is_killed(start_all, start_training, tmp_path):
  """And the run ends with the bits of one process with two devices."""
  run, start = tmp_path / 'run', functools.partial(start_all, constants=SPLIT)
  processes = start(run, 2)
  until_saved(run, processes)
  processes[1].kill(signal.SIGTERM)
  assert [life.wait() for life in processes] == [143, 143], processes[0].text()
  step = checkpoints.newest(str(run))
  assert step % 7 == 0
  assert f'step {step:,} is saved' in processes[0].text()
  processes = start(run, 2)
  until_saved(run, processes)
  processes[0].kill()
  (code,), (text,) = others_end(processes, 0, SECONDS)
  assert code in (1, -signal.SIGABRT), text
  assert told_of_the_end(text), text
  assert processes[0].wait() == -signal.SIGKILL
  assert checkpoints.newest(str(run)) < lives.STEPS
  processes = start(run, 2, only_the_first_writes=True)
  assert [life.wait() for life in processes] == [0, 0], processes[0].text()
  one = one_process(start_training, tmp_path / 'one', 2, constants=SPLIT)
  assert resume_test.same(run, one)


def test_of_four_one_is_killed(start_all, start_training, tmp_path):
  """Steps 31 to 60 are done twice: before it is killed, and again."""
  run, aside = tmp_path / 'run', tmp_path / 'aside'
  processes = start_all(run, 4, 'Config.checkpoint_keep = 0')
  assert processes[0].until((run / 'checkpoints' / '60').exists)
  processes[2].kill()
  codes, said = others_end(processes, 2, SECONDS)
  assert codes == [1, 1, 1], said
  assert all(map(told_of_the_end, said)), said
  assert processes[2].wait() == -signal.SIGKILL
  shutil.copytree(run, aside)
  for step in checkpoints.all_steps(str(run))[1:]:
    shutil.rmtree(checkpoints.folder_of(str(run), step))
  once = 'Config.early_exit_steps = 60'
  processes = start_all(run, 4, once, only_the_first_writes=True)
  assert [life.wait() for life in processes] == [0] * 4, processes[0].text()
  assert resume_test.same_state(run, aside, 60)
  rows = resume_test.metrics(run)
  assert rows == resume_test.metrics(aside)[: len(rows)]
  by_one = one_process(start_training, tmp_path / 'one', 4, once)
  assert len(rows) == 10
  nearly_same_metrics(by_one, run)


def nearly_same_metrics(a, b):
  """Processes add up in another order than devices of one, so bits may differ."""
  a, b = resume_test.metrics(a), resume_test.metrics(b)
  assert len(a) == len(b)
  for row, other in zip(a, b):
    np.testing.assert_allclose([*row.values()], [*other.values()], rtol=1e-3, atol=1e-5)


def test_two_with_two_devices_each_train_and_evaluate_as_one_with_four(
  start_all, start_training, nursery, tmp_path
):
  def start_eval(run, **kwargs):
    return nursery.start('eval', ('--checkpoint_dir', str(run)), **kwargs)

  one, two, short = tmp_path / 'one', tmp_path / 'two', 'Config.early_exit_steps = 30'
  one_process(start_training, one, 4, short)
  for start_one, bindings in ((start_training, [short]), (start_eval, [])):
    told = {**devices(2), 'constants': SPLIT}
    processes = start_all(two, 2, *bindings, start_one=start_one, **told)
    assert [life.wait() for life in processes] == [0, 0], processes[0].text()
  nearly_same_metrics(one, two)
  life = start_eval(one, said=tmp_path / 'said')
  assert life.wait() == 0, life.text()
  psnrs = [
    json.loads((run / 'eval' / 'results.json').read_text())['mean']['psnr'] for run in (one, two)
  ]
  assert abs(psnrs[0] - psnrs[1]) < 0.05


def test_one_hangs(start_all, tmp_path):
  processes = start_all(tmp_path / 'run', 2, constants=HEARTBEAT)
  assert processes[0].until(lambda: 'first step' in processes[0].text())
  processes[1].kill(signal.SIGSTOP)
  try:
    (code,), (text,) = others_end(processes, 1, 2 * HEARTBEAT['HEARTBEAT'])
  finally:
    processes[1].kill()
  assert code == -signal.SIGABRT, text
  assert told_of_the_end(text), text
  assert 'unhealthy (stopped sending heartbeats)' in text
