"""Runs in a bucket (a local stand-in of Cloud Storage): killed and signalled, they lose nothing."""

import functools
import json
import signal

import pytest
import resume_test
from gcs_server import NAME, RUN


@pytest.fixture
def filled(stand_in, whole):
  """The stand-in, with that run."""
  stand_in[0].put(whole)
  return stand_in


def names(folder):
  return {path.name for path in folder.iterdir()}


# The change before which training is killed, and the checkpoints that are there then.
KILLS = (
  ('config.gin', 1, []),
  ('checkpoints/30/default/.*', 5, []),
  ('checkpoints/30/manifest.json', 1, []),
  ('-checkpoints/30/manifest.json', 1, [30, 60, 90]),
  ('-checkpoints/60/.*', 4, [90, 120]),
)


@pytest.mark.hammer
def test_killed_during_uploads_it_resumes_to_the_bits(stand_in, start_training, whole, tmp_path):
  bucket, env = stand_in
  tmp_path.joinpath('tmp').mkdir()
  env |= {'TMPDIR': str(tmp_path / 'tmp')}
  for k, (pattern, nth, complete) in enumerate(KILLS):
    reached, drop = bucket.hold(pattern, nth)
    program = start_training(RUN, output=tmp_path / f'output{k}', **env)
    assert program.until(reached.is_set), program.text()
    program.kill()
    assert program.wait() == -signal.SIGKILL
    drop.set()
    assert bucket.steps() == complete
  bucket.let_go()
  program = start_training(RUN, output=tmp_path / 'output', **env)
  assert program.wait() == 0, program.text()
  assert f'steps 120 to 300 -> {RUN}\n' in program.text()
  assert str(tmp_path) not in program.text()  # Where its working copy was.
  assert not any((tmp_path / 'tmp').iterdir())
  run = bucket.get(tmp_path / 'run')
  assert resume_test.same(run, whole)
  assert resume_test.scalars(run) == resume_test.scalars(whole)
  assert names(run) == names(whole)
  assert names(run / 'checkpoints') == names(whole / 'checkpoints')
  assert f"Config.checkpoint_dir = '{RUN}'" in (run / 'config.gin').read_text()


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
  filled, start_training, whole, tmp_path
):
  bucket, env = filled
  bucket.change(f'{NAME}/checkpoints/300/default/_METADATA', b'{}')
  program = start_training(RUN, output=tmp_path / 'output', **env)
  assert program.wait() == 0, program.text()
  said = f'Checkpoint {RUN}/checkpoints/300 is damaged: default/_METADATA has changed since it'
  assert said in program.text()
  run = bucket.get(tmp_path / 'run')
  assert names(run / 'checkpoints') == {'270', '300', '300.damaged'}
  assert (run / 'checkpoints/300.damaged/default/_METADATA').read_bytes() == b'{}'
  assert resume_test.same(run, whole)


@pytest.mark.parametrize(
  ('program', 'made'),
  [
    ('eval', {'results.json', 'report.html', 'contact_sheet.png', '000_000_prediction.png'}),
    ('render', {'color', 'color.mp4', 'depth', 'depth.mp4', 'render.json'}),
  ],
)
def test_eval_and_render_write_to_the_bucket(filled, runner, tmp_path, program, made):
  bucket, env = filled
  before = len(bucket.changes)
  done = runner.start(program, ['--checkpoint_dir', f'{RUN}/'], tmp_path / 'output', **env)
  assert done.wait() == 0, done.text()
  run = bucket.get(tmp_path / 'run')
  assert made <= names(run / program)
  changed = [name.removeprefix('-') for name in bucket.changes[before:]]
  assert all(name.startswith(f'{NAME}/{program}/') for name in changed)
  assert 'output.lock' not in names(run / program)
  assert f'{RUN}/{program}/' in done.text()
  written = b''.join(bucket.objects[name][0] for name in bucket.names(f'{NAME}/'))
  assert b'mipnerf360-run-' not in written + done.text().encode()  # The working copy's name.
  if program == 'eval':
    assert json.loads((run / 'eval/results.json').read_text())['step'] == 300


def test_an_interrupted_rendering_goes_on(filled, runner, tmp_path):
  bucket, env = filled
  copies = tmp_path / 'tmp'
  copies.mkdir()
  start = functools.partial(runner.start, 'render', ['--checkpoint_dir', RUN])
  program = start(tmp_path / 'first', **env, TMPDIR=str(copies))
  # More than one, since a picture that is half written at the signal is not kept.
  assert program.until(lambda: len([*copies.glob('*/render/depth/*.png')]) > 2)
  program.kill(signal.SIGTERM)
  assert program.wait() == 143, program.text()
  assert bucket.names(f'{NAME}/render/render.json')
  frames = bucket.names(f'{NAME}/render/depth/')
  assert 0 < len(frames) < 40
  program = start(tmp_path / 'second', **env)
  assert program.wait() == 0, program.text()
  assert f'{40 - len(frames)} to do -> {RUN}/render' in program.text()
