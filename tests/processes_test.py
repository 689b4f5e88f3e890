"""Multi-process runs: when one process ends, all do, and the run resumes to the same bits."""

import functools
import json
import os
import shutil
import signal
import socket
import time

import gcs_server
import numpy as np
import program_runner
import pytest
import resume_test

from internal.training import checkpoints

SECONDS = 20  # Until the others end after a broken connection; less than processes.HEARTBEAT.
HEARTBEAT = {'HEARTBEAT': 10}  # Seconds, for processes whose connections stay open.
SPLIT = {'_LARGE': 512}  # Bytes: shards most arrays of a small model.


@pytest.fixture
def start_all(start_training):
  """Starts the processes of one run; `start_one` starts one of them, train.py by default."""

  def start(
    run,
    count,
    *bindings,
    start_one=start_training,
    only_the_first_writes=False,
    outputs=None,
    **kwargs,
  ):
    with socket.socket() as s:
      s.bind(('localhost', 0))
      where = f'localhost:{s.getsockname()[1]}'
    told = {'JAX_COORDINATOR_ADDRESS': where, 'JAX_NUM_PROCESSES': str(count)}
    begun = []
    for i in range(count):
      writes = i == 0 or not only_the_first_writes
      output = f'{outputs or run}.{i}' if writes else os.devnull
      told['JAX_PROCESS_ID'] = str(i)
      begun.append(start_one(run, *bindings, output=output, writes=writes, **told, **kwargs))
    return begun

  return start


def until_saved(run, programs):
  """Waits for the next checkpoint."""
  before = checkpoints.latest_step(str(run)) or 0
  assert programs[0].until(lambda: (checkpoints.latest_step(str(run)) or 0) > before)


def devices(count):
  """Returns the environment for a number of CPU devices."""
  return {'XLA_FLAGS': program_runner.xla_flags(count)}


def one_process(start_training, run, count, *bindings, **kwargs):
  """Runs training in one process with `count` devices."""
  program = start_training(run, *bindings, **devices(count), **kwargs)
  assert program.wait() == 0, program.text()
  assert f'{count} x cpu' in program.text()
  return run


def others_end(processes, victim, seconds):
  """Returns exit codes and outputs of all processes but the victim, which must end in time."""
  deadline = time.monotonic() + seconds
  rest = [program for i, program in enumerate(processes) if i != victim]
  codes = [program.wait() for program in rest]
  assert time.monotonic() < deadline
  return codes, [program.text() for program in rest]


def explains_the_end(text):
  """Returns whether an output explains the end without a traceback; JAX may abort first."""
  return ('because another process has ended' in text or 'another task died' in text) and (
    'Traceback' not in text
  )


@pytest.fixture(scope='module')
def one_with_two(start_training, tmp_path_factory):
  """A run of one process with two devices."""
  run = tmp_path_factory.mktemp('one') / 'run'
  return one_process(start_training, run, 2, constants=SPLIT)


@pytest.mark.hammer
def test_two_processes_one_signalled_then_one_killed(start_all, one_with_two, tmp_path):
  """The run ends with the bits of one process with two devices."""
  run, start = tmp_path / 'run', functools.partial(start_all, constants=SPLIT)
  processes = start(run, 2)
  until_saved(run, processes)
  processes[1].kill(signal.SIGTERM)
  assert [program.wait() for program in processes] == [143, 143], processes[0].text()
  step = checkpoints.newest(str(run))
  assert step % 7 == 0
  assert f'step {step:,} is saved' in processes[0].text()
  processes = start(run, 2)
  until_saved(run, processes)
  processes[0].kill()
  (code,), (text,) = others_end(processes, 0, SECONDS)
  assert code in (1, -signal.SIGABRT), text
  assert explains_the_end(text), text
  assert processes[0].wait() == -signal.SIGKILL
  assert checkpoints.newest(str(run)) < program_runner.STEPS
  processes = start(run, 2, only_the_first_writes=True)
  assert [program.wait() for program in processes] == [0, 0], processes[0].text()
  assert resume_test.same(run, one_with_two)


@pytest.mark.hammer
def test_two_processes_in_a_bucket_both_signalled_then_one_killed(
  start_all, one_with_two, stand_in, tmp_path
):
  """As when machines are taken away; the first process is killed while it uploads a checkpoint."""
  bucket, env = stand_in
  start = functools.partial(
    start_all, gcs_server.RUN, 2, outputs=tmp_path / 'output', constants=SPLIT, **env
  )
  processes = start()
  assert processes[0].until(bucket.steps), processes[0].text()
  [program.kill(signal.SIGTERM) for program in processes]
  assert [program.wait() for program in processes] == [143, 143], processes[0].text()
  step = bucket.steps()[-1]
  assert f'step {step:,} is saved in {gcs_server.RUN}; run' in processes[0].text()
  assert not bucket.names(f'{gcs_server.NAME}/train.lock')
  reached, drop = bucket.hold(r'checkpoints/\d+/default/.*', 4)
  processes = start()
  assert processes[0].until(reached.is_set), processes[0].text()
  processes[0].kill()
  (code,), (text,) = others_end(processes, 0, SECONDS)
  assert code in (1, -signal.SIGABRT), text
  assert explains_the_end(text), text
  assert processes[0].wait() == -signal.SIGKILL
  drop.set()
  assert bucket.steps(complete=False)[-1] > bucket.steps()[-1] == step
  bucket.let_go()
  processes = start()
  assert [program.wait() for program in processes] == [0, 0], processes[0].text()
  assert f'steps {step:,} to' in processes[0].text()
  assert resume_test.same(bucket.get(tmp_path / 'run'), one_with_two)


@pytest.mark.hammer
def test_four_processes_in_a_bucket_one_killed(start_all, stand_in, tmp_path):
  """Steps 15 to 28 run twice, before and after the kill."""
  bucket, env = stand_in
  often = 'Config.checkpoint_keep = 0', 'Config.checkpoint_every = 14'
  start = functools.partial(
    start_all, gcs_server.RUN, 4, *often, outputs=tmp_path / 'output', **env
  )
  processes = start()
  assert processes[0].until(lambda: 28 in bucket.steps()), processes[0].text()
  processes[2].kill()
  codes, said = others_end(processes, 2, SECONDS)
  assert codes == [1, 1, 1], said
  assert all(map(explains_the_end, said)), said
  assert processes[2].wait() == -signal.SIGKILL
  aside = bucket.get(tmp_path / 'aside')
  for step in bucket.steps()[1:]:
    bucket.change(f'{gcs_server.NAME}/checkpoints/{step}/manifest.json', None)
  processes = start('Config.early_exit_steps = 28')
  assert [program.wait() for program in processes] == [0] * 4, processes[0].text()
  run = bucket.get(tmp_path / 'run')
  assert bucket.steps(complete=False) == [14, 28]
  assert resume_test.same_state(run, aside, 28)
  rows = resume_test.metrics(run)
  assert rows == resume_test.metrics(aside)[: len(rows)]
  assert len(rows) == 4


@pytest.mark.hammer
def test_four_processes_one_killed(start_all, start_training, tmp_path):
  """Steps 31 to 60 run twice, before and after the kill."""
  run, aside = tmp_path / 'run', tmp_path / 'aside'
  processes = start_all(run, 4, 'Config.checkpoint_keep = 0')
  assert processes[0].until((run / 'checkpoints' / '60').exists)
  processes[2].kill()
  codes, said = others_end(processes, 2, SECONDS)
  assert codes == [1, 1, 1], said
  assert all(map(explains_the_end, said)), said
  assert processes[2].wait() == -signal.SIGKILL
  shutil.copytree(run, aside)
  for step in checkpoints.all_steps(str(run))[1:]:
    shutil.rmtree(checkpoints.folder_of(str(run), step))
  once = 'Config.early_exit_steps = 60'
  processes = start_all(run, 4, once, only_the_first_writes=True)
  assert [program.wait() for program in processes] == [0] * 4, processes[0].text()
  assert resume_test.same_state(run, aside, 60)
  rows = resume_test.metrics(run)
  assert rows == resume_test.metrics(aside)[: len(rows)]
  by_one = one_process(start_training, tmp_path / 'one', 4, once)
  assert len(rows) == 10
  nearly_same_metrics(by_one, run)


def nearly_same_metrics(a, b):
  """Compares metrics with tolerance: processes sum in another order than devices of one."""
  a, b = resume_test.metrics(a), resume_test.metrics(b)
  assert len(a) == len(b)
  for row, other in zip(a, b):
    np.testing.assert_allclose([*row.values()], [*other.values()], rtol=1e-3, atol=1e-5)


def test_two_with_two_devices_each_train_and_evaluate_as_one_with_four(
  start_all, start_training, runner, tmp_path
):
  def start_eval(run, **kwargs):
    return runner.start('eval', ('--checkpoint_dir', str(run)), **kwargs)

  one, two, short = tmp_path / 'one', tmp_path / 'two', 'Config.early_exit_steps = 30'
  one_process(start_training, one, 4, short)
  for start_one, bindings in ((start_training, [short]), (start_eval, [])):
    told = {**devices(2), 'constants': SPLIT}
    processes = start_all(two, 2, *bindings, start_one=start_one, **told)
    assert [program.wait() for program in processes] == [0, 0], processes[0].text()
  nearly_same_metrics(one, two)
  program = start_eval(one, output=tmp_path / 'output')
  assert program.wait() == 0, program.text()
  psnrs = [
    json.loads((run / 'eval' / 'results.json').read_text())['mean']['psnr'] for run in (one, two)
  ]
  assert abs(psnrs[0] - psnrs[1]) < 0.05


@pytest.mark.hammer
def test_a_process_hangs(start_all, tmp_path):
  processes = start_all(tmp_path / 'run', 2, constants=HEARTBEAT)
  assert processes[0].until(lambda: 'first step' in processes[0].text())
  processes[1].kill(signal.SIGSTOP)
  try:
    (code,), (text,) = others_end(processes, 1, 2 * HEARTBEAT['HEARTBEAT'])
  finally:
    processes[1].kill()
  assert code == -signal.SIGABRT, text
  assert explains_the_end(text), text
  assert 'unhealthy (stopped sending heartbeats)' in text
