"""Killed and signalled runs resume to the bits of an uninterrupted run.

KILLS=200 kills that often, six times without it. KILL_SEED draws other moments.
"""

import collections
import importlib
import json
import math
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent import futures

import jax
import numpy as np
import program_runner
import pytest
import tiny
from tensorboardX.proto import event_pb2

from internal.training import checkpoints, run_folder, run_lock

KILLS = int(os.environ.get('KILLS', 6))
KILL_SEED = int(os.environ.get('KILL_SEED', 0))

# What differs between two runs of one machine.
_OF_THE_RUN = ('time', 'train_seconds', 'rays_per_sec', 'test_seconds', 'peak_bytes')


def metrics(run):
  """Returns the rows of metrics.jsonl without timings and memory."""
  rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  return [{k: v for k, v in row.items() if k not in _OF_THE_RUN} for row in rows]


def same_state(a, b, step):
  """Returns whether two runs have equal parameters and optimizer state at a step."""
  states = []
  for run in (a, b):
    settings, _ = run_folder.open_run(str(run))
    state = checkpoints.restore(str(run), settings, tiny.mesh(1), step)
    states.append(jax.tree.map(np.asarray, state))
  equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), *states)
  return all(jax.tree.leaves(equal))


def same(a, b):
  """Returns whether two finished runs have equal parameters, optimizer state and metrics."""
  assert checkpoints.newest(str(a)) == checkpoints.newest(str(b)) == program_runner.STEPS
  return same_state(a, b, program_runner.STEPS) and metrics(a) == metrics(b)


def scalars(run):
  """Returns the scalars that TensorBoard shows, {(tag, step): value}, without time and memory."""
  shown = {}
  for path in sorted((run / 'tensorboard').iterdir()):
    for event in events(path.read_bytes()):
      if event.session_log.status == event_pb2.SessionLog.START:
        shown = {(tag, step): v for (tag, step), v in shown.items() if step < event.step}
      for value in event.summary.value:
        if not value.tag.endswith(('rays_per_sec', 'seconds', 'peak_bytes')):
          shown[value.tag, event.step] = value.simple_value
  return shown


def events(data):
  """Yields the complete records of an events file: length, checksum, event, checksum."""
  while len(data) >= 12:
    (length,) = struct.unpack_from('<Q', data)
    if len(data) < length + 16:
      return
    yield event_pb2.Event.FromString(data[12 : 12 + length])
    data = data[length + 16 :]


def kill(program, run, moment, rng):
  """Kills a program in the middle of `moment`; returns whether it was still running."""
  folder, log = run / 'checkpoints', run / 'metrics.jsonl'
  if moment == 'start':
    deadline = time.monotonic() + rng.uniform(0, 4)
    program.until(lambda: time.monotonic() > deadline)
  else:
    going = program.until(lambda: 'first step' in program.text())
    if moment == 'step':
      size = log.stat().st_size if going else 0
      going = going and program.until(lambda: log.stat().st_size > size)
      time.sleep(rng.uniform(0, 0.1))
    elif moment == 'checkpoint':
      going = going and program.until(lambda: any(folder.glob('*.partial')))
      time.sleep(rng.uniform(0, 0.06))
    else:
      going = going and program.until(
        lambda: f'step {program_runner.STEPS}/{program_runner.STEPS}' in program.text()
      )
      time.sleep(rng.uniform(0, 0.5))
  program.kill()
  return program.wait() == -signal.SIGKILL


MOMENTS = ('start', 'step', 'checkpoint', 'checkpoint')


@pytest.fixture(scope='module')
def killed(start_training, whole, tmp_path_factory):
  """Runs, each killed at nine random moments and once while rendering its test image.

  A few kills are of one run, and of each kind. Two run side by side. Returns for each (run,
  moments, number of partial checkpoints left).
  """

  def run_on(seed):
    run, rng = tmp_path_factory.mktemp('killed') / 'run', np.random.default_rng(seed)
    kills, halves = [], 0
    few = rng.permutation(['checkpoint', *MOMENTS])
    for moment in [*(few if KILLS < 10 else rng.choice(MOMENTS, 9)), 'render']:
      program = start_training(run, output=f'{run}.{len(kills)}')
      if not kill(program, run, moment, rng):  # The run has ended.
        assert checkpoints.newest(str(run)) == program_runner.STEPS, program.text()
        break
      kills.append(moment)
      halves += any(run.glob('checkpoints/*.partial'))
    program = start_training(run)
    assert program.wait() == 0, program.text()
    return run, kills, halves

  runs = []
  with futures.ThreadPoolExecutor(2) as pool:
    while (left := KILLS - sum(len(kills) for _, kills, _ in runs)) > 0:
      first = KILL_SEED + len(runs)
      runs += pool.map(run_on, range(first, first + math.ceil(left / 10)))
  return runs


class TestKills:
  def test_parameters_optimizer_state_and_metrics_equal_an_uninterrupted_run(self, killed, whole):
    assert 'test_psnr' in metrics(whole)[-1]
    assert all(same(run, whole) for run, _, _ in killed)
    counts = collections.Counter(kill for _, kills, _ in killed for kill in kills)
    moments = ', '.join(f'{n} at {moment}' for moment, n in sorted(counts.items()))
    print(f'{counts.total()} kills ({moments}) in {len(killed)} runs, equal to the bit')

  def test_they_were_killed_everywhere(self, killed):
    assert {kill for _, kills, _ in killed for kill in kills} == {*MOMENTS, 'render'}
    assert sum(halves for _, _, halves in killed) > KILLS // 10

  def test_no_incomplete_files_are_left(self, killed, whole):
    names = lambda folder: {p.name for p in folder.iterdir()}  # noqa: E731
    for run, _, _ in killed:
      assert names(run) == names(whole)
      assert names(run / 'checkpoints') == names(whole / 'checkpoints')

  def test_tensorboard_shows_each_step_once_as_well(self, killed, whole):
    wanted = scalars(whole)
    assert len(wanted) > 30
    for run, _, _ in killed:
      assert scalars(run) == wanted


def test_a_finished_run_is_tidied_after_a_kill(start_training, whole, tmp_path):
  """As a kill after the last checkpoint leaves it."""
  run = tmp_path / 'run'
  shutil.copytree(whole, run)
  (run / run_lock.FILE).write_text('{}')
  os.utime(run / run_lock.FILE, (1, 1))
  (run / 'metrics.1.part.jsonl').write_text('half')
  program = start_training(run)
  assert program.wait() == 0
  assert 'Nothing to do' in program.text()
  assert {p.name for p in run.iterdir()} == {p.name for p in whole.iterdir()}


class TestSignals:
  def test_training_saves_and_resumes(self, start_training, whole, tmp_path):
    run, start = tmp_path / 'run', 0
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
      program = start_training(run, output=f'{run}.{signum.name}')
      assert program.until(lambda program=program: 'first step' in program.text())
      program.kill(signum)
      assert program.wait() == code, program.text()
      assert f'steps {start} to {program_runner.STEPS}' in program.text()
      start = checkpoints.newest(str(run))
      assert 0 < start < program_runner.STEPS
      assert f'step {start} is saved in {run}; run the same command again' in program.text()
      assert program.text().endswith(f'Stopped by {signum.name}.\n')
    assert start_training(run).wait() == 0
    assert same(run, whole)

  @pytest.mark.parametrize(
    ('name', 'begun', 'made'),
    [('eval', '1/3 ', 'eval/results.json'), ('render', 'frames of', 'render/color.mp4')],
  )
  def test_eval_and_render_leave_nothing_half_written(self, runner, whole, name, begun, made):
    output = whole.parent / f'{name}.output'
    for _ in range(5):  # On a busy machine the signal may come too late.
      program = runner.start(name, ['--checkpoint_dir', str(whole)], output)
      assert program.until(lambda program=program: begun in program.text())
      program.kill(signal.SIGTERM)
      if code := program.wait():
        break
      shutil.rmtree((whole / made).parent)
    assert code == 143, program.text()
    assert program.text().endswith('Stopped by SIGTERM.\n')
    assert not (whole / made).exists()
    assert not list(whole.rglob('*.part*'))
    assert runner.start(name, ['--checkpoint_dir', str(whole)], output).wait() == 0
    assert (whole / made).exists()


class TestTwoPrograms:
  def test_a_second_training_is_refused_and_the_first_goes_on(
    self, start_training, whole, tmp_path
  ):
    run = tmp_path / 'run'
    first = start_training(run)
    assert first.until((run / 'config.gin').exists)
    second = start_training(run, "Config.data_dir = '/elsewhere'", output=f'{run}.early')
    assert second.wait() == 1  # Has another capture, which is not there.
    second = start_training(run, 'Config.max_steps = 2', output=f'{run}.second')
    assert second.wait() == 1, second.text()
    assert f'Error: {run} is being trained by process {first.pid} on ' in second.text()
    assert first.wait() == 0, first.text()
    assert same(run, whole)

  @pytest.mark.parametrize(
    ('name', 'folder', 'flags'),
    [
      ('eval', 'eval', ['--gin_bindings', 'Config.eval_crop_borders = 1']),
      ('render', 'video', []),
      ('export', 'export', ['--what', 'cameras']),
    ],
  )
  def test_two_commands_do_not_write_one_folder(self, whole, name, folder, flags):
    program = importlib.import_module(f'internal.commands.{name}')
    with (
      run_lock.output(str(whole / folder)),
      pytest.raises(run_lock.RunLockError, match=f'{folder} is being written by process'),
    ):
      program.main([str(whole), *flags, *['--out', str(whole / folder)] * (name != 'eval')])
    assert not (whole / folder / run_lock.OUTPUT_FILE).exists()

  @pytest.mark.hammer
  def test_eval_beside_training_never_calls_a_checkpoint_damaged(
    self, start_training, runner, tmp_path
  ):
    run = tmp_path / 'run'
    often = ('Config.checkpoint_every = 10', 'Config.checkpoint_keep = 1')
    training = start_training(run, *often, 'Config.max_steps = 20000')
    assert training.until(lambda: checkpoints.latest_step(str(run)))
    for k in range(4):
      program = runner.start('eval', ['--checkpoint_dir', str(run)], f'{run}.eval{k}')
      assert program.wait() == 0, program.text()
      assert 'damaged' not in program.text()
    training.kill()
    assert training.wait() == -signal.SIGKILL

  def test_a_folder_that_vanishes_ends_the_run(self, start_training, tmp_path):
    run = tmp_path / 'run'
    program = start_training(run, 'Config.max_steps = 20000')
    assert program.until(lambda: checkpoints.latest_step(str(run)))
    run.rename(tmp_path / 'moved')
    assert program.wait() == 1
    assert f'Error: {run} has vanished' in program.text()
    assert not (run / 'checkpoints').exists()


@pytest.mark.hammer
def test_a_closed_pipe_ends_training_with_a_checkpoint(start_training, whole, tmp_path):
  run, pipe = tmp_path / 'run', tmp_path / 'pipe'
  os.mkfifo(pipe)
  reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
  program = start_training(run, output=pipe)
  log = run / 'metrics.jsonl'
  assert program.until(lambda: log.exists() and log.stat().st_size)
  os.close(reader)
  assert program.wait() == 141
  step = checkpoints.newest(str(run))
  assert 7 <= step < program_runner.STEPS
  assert step % 7 == 0  # Where the next line would have been.
  assert start_training(run).wait() == 0
  assert same(run, whole)


class TestFullDisk:
  """A limit on the file size that checkpoints exceed and logs do not."""

  def test_a_run_reports_it_and_keeps_its_last_checkpoint(
    self, start_training, runner, small_capture, whole, tmp_path
  ):
    run = tmp_path / 'run'
    assert start_training(run, 'Config.early_exit_steps = 9').wait() == 0
    largest = max(p.stat().st_size for p in (run / 'checkpoints').rglob('*') if p.is_file())
    # With pipes for its output, to which the limit does not apply.
    full = (largest * 6 // 10,) * 2
    args = program_runner.arguments(small_capture, run, 'Config.early_exit_steps = 20')
    done = subprocess.run(
      [sys.executable, 'train.py', *args],
      cwd=program_runner.ROOT, env=runner.env, capture_output=True, text=True, check=False,
      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, full),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    # Threads of TensorStore may still print, even in the middle of a line.
    said = done.stderr[done.stderr.index('Error: Step 20 could not be saved') :]
    assert 'File too large' in said
    assert 'The checkpoint of step 9 is kept' in said
    assert checkpoints.newest(str(run)) == 9
    assert start_training(run, 'Config.early_exit_steps = 20', output=f'{run}.again').wait() == 0
    assert checkpoints.newest(str(run)) == 20
    assert {p.name for p in (run / 'checkpoints').iterdir()} == {'9', '20'}
