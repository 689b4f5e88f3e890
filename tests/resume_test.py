"""Runs that end before their time go on as if nothing had been: processes, signalled and killed."""

import json
import resource
import signal
import struct
import subprocess
import sys
import time
from concurrent import futures

import jax
import lives
import numpy as np
import pytest
import tiny
from tensorboardX.proto import event_pb2

from internal.training import checkpoints

_TIMES = ('time', 'train_seconds', 'rays_per_sec', 'test_seconds')


@pytest.fixture(scope='module')
def whole(start_training, tmp_path_factory):
  """A run that nobody interrupts."""
  run = tmp_path_factory.mktemp('whole') / 'run'
  life = start_training(run)
  assert life.wait() == 0, life.text()
  return run


def metrics(run):
  """The lines of metrics.jsonl without what a clock has measured."""
  rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  return [{k: v for k, v in row.items() if k not in _TIMES} for row in rows]


def same_state(a, b, step):
  """Whether parameters and optimizer state of two runs are equal at a step."""
  states = []
  for run in (a, b):
    settings, _ = checkpoints.open_run(str(run))
    state = checkpoints.restore(str(run), settings, tiny.mesh(1), step)
    states.append(jax.tree.map(np.asarray, state))
  equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), *states)
  return all(jax.tree.leaves(equal))


def same(a, b):
  """Whether parameters, optimizer state and metrics of two finished runs are equal."""
  assert checkpoints.newest(str(a)) == checkpoints.newest(str(b)) == lives.STEPS
  return same_state(a, b, lives.STEPS) and metrics(a) == metrics(b)


def scalars(run):
  """What TensorBoard shows, {(tag, step): value}, without what a clock has measured."""
  shown = {}
  for path in sorted((run / 'tensorboard').iterdir()):
    for event in events(path.read_bytes()):
      if event.session_log.status == event_pb2.SessionLog.START:
        shown = {(tag, step): v for (tag, step), v in shown.items() if step < event.step}
      for value in event.summary.value:
        if not value.tag.endswith(('rays_per_sec', 'seconds')):
          shown[value.tag, event.step] = value.simple_value
  return shown


def events(data):
  """The whole records of an events file: length, its checksum, an event, its checksum."""
  while len(data) >= 12:
    (length,) = struct.unpack_from('<Q', data)
    if len(data) < length + 16:
      return
    yield event_pb2.Event.FromString(data[12 : 12 + length])
    data = data[length + 16 :]


def kill(life, run, moment, rng):
  """Kills a life in the middle of `moment`; returns whether it was still alive."""
  folder, log = run / 'checkpoints', run / 'metrics.jsonl'
  if moment == 'start':
    deadline = time.monotonic() + rng.uniform(0, 4)
    life.until(lambda: time.monotonic() > deadline)
  else:
    going = life.until(lambda: 'first step' in life.text())
    if moment == 'step':
      size = log.stat().st_size if going else 0
      going = going and life.until(lambda: log.stat().st_size > size)
      time.sleep(rng.uniform(0, 0.1))
    elif moment == 'checkpoint':
      going = going and life.until(lambda: any(folder.glob('*.partial')))
      time.sleep(rng.uniform(0, 0.06))
    else:
      going = going and life.until(lambda: f'step {lives.STEPS}/{lives.STEPS}' in life.text())
      time.sleep(rng.uniform(0, 0.5))
  life.kill()
  return life.wait() == -signal.SIGKILL


MOMENTS = ('start', 'step', 'checkpoint', 'checkpoint')


@pytest.fixture(scope='module')
def killed(start_training, whole, tmp_path_factory):
  """Two runs, each killed at nine random moments and once while it renders its test image.

  They go on side by side. With each: the moments, and how often a half checkpoint was left.
  """

  def run_on(seed):
    run, rng = tmp_path_factory.mktemp('killed') / 'run', np.random.default_rng(seed)
    kills, halves = [], 0
    for moment in [*rng.choice(MOMENTS, 9), 'render']:
      life = start_training(run, said=f'{run}.{len(kills)}')
      assert kill(life, run, moment, rng), life.text()
      kills.append(moment)
      halves += any(run.glob('checkpoints/*.partial'))
    life = start_training(run)
    assert life.wait() == 0, life.text()
    return run, kills, halves

  with futures.ThreadPoolExecutor(2) as pool:
    return list(pool.map(run_on, (0, 1)))


class TestKills:
  def test_parameters_optimizer_state_and_metrics_are_those_of_a_whole_run(self, killed, whole):
    assert 'test_psnr' in metrics(whole)[-1]
    assert all(same(run, whole) for run, _, _ in killed)

  def test_they_were_killed_everywhere(self, killed):
    assert {kill for _, kills, _ in killed for kill in kills} == {*MOMENTS, 'render'}
    assert sum(halves for _, _, halves in killed) > 2

  def test_nothing_is_left_of_what_was_not_finished(self, killed, whole):
    names = lambda folder: {p.name for p in folder.iterdir()}  # noqa: E731
    for run, _, _ in killed:
      assert names(run) == names(whole)
      assert names(run / 'checkpoints') == names(whole / 'checkpoints')

  def test_tensorboard_shows_each_step_once_as_well(self, killed, whole):
    wanted = scalars(whole)
    assert len(wanted) > 30
    for run, _, _ in killed:
      assert scalars(run) == wanted


class TestSignals:
  def test_training_saves_and_says_where_and_goes_on(self, start_training, whole, tmp_path):
    run, start = tmp_path / 'run', 0
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
      life = start_training(run, said=f'{run}.{signum.name}')
      assert life.until(lambda life=life: 'first step' in life.text())
      life.kill(signum)
      assert life.wait() == code, life.text()
      assert f'steps {start} to {lives.STEPS}' in life.text()
      start = checkpoints.newest(str(run))
      assert 0 < start < lives.STEPS
      assert f'step {start} is saved in {run}; the same command goes on' in life.text()
      assert life.text().endswith(f'Stopped by {signum.name}.\n')
    assert start_training(run).wait() == 0
    assert same(run, whole)

  @pytest.mark.parametrize(
    ('program', 'begun', 'made'),
    [('eval', '1/3 ', 'eval/results.json'), ('render', 'frames of', 'render/color.mp4')],
  )
  def test_eval_and_render_leave_nothing_half_written(self, nursery, whole, program, begun, made):
    said = whole.parent / f'{program}.said'
    life = nursery.start(program, ['--checkpoint_dir', str(whole)], said)
    assert life.until(lambda: begun in life.text())
    life.kill(signal.SIGTERM)
    assert life.wait() == 143, life.text()
    assert life.text().endswith('Stopped by SIGTERM.\n')
    assert not (whole / made).exists()
    assert not list(whole.rglob('*.part*'))
    assert nursery.start(program, ['--checkpoint_dir', str(whole)], said).wait() == 0
    assert (whole / made).exists()


class TestFullDisk:
  """A disk that takes no file larger than so much: checkpoints outgrow it, a log does not."""

  def test_a_run_says_so_and_keeps_its_last_checkpoint(
    self, start_training, nursery, small_capture, whole, tmp_path
  ):
    run = tmp_path / 'run'
    assert start_training(run, 'Config.early_exit_steps = 9').wait() == 0
    largest = max(p.stat().st_size for p in (run / 'checkpoints').rglob('*') if p.is_file())
    # By itself, since a pipe takes what it says however large files may be.
    full = (largest * 6 // 10,) * 2
    args = lives.arguments(small_capture, run, 'Config.early_exit_steps = 20')
    done = subprocess.run(
      [sys.executable, 'train.py', *args],
      cwd=lives.ROOT, env=nursery.env, capture_output=True, text=True, check=False,
      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, full),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    # Threads of TensorStore may still be talking, even in the middle of a line.
    said = done.stderr[done.stderr.index('Error: Step 20 could not be saved') :]
    assert 'File too large' in said
    assert 'The checkpoint of step 9 is kept' in said
    assert checkpoints.newest(str(run)) == 9
    assert start_training(run, 'Config.early_exit_steps = 20', said=f'{run}.again').wait() == 0
    assert checkpoints.newest(str(run)) == 20
    assert {p.name for p in (run / 'checkpoints').iterdir()} == {'9', '20'}
