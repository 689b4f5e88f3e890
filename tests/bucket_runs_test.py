"""Runs in a bucket (a local stand-in of Cloud Storage): killed and signalled, they lose nothing."""

import re
import signal
import threading

import gcs_server
import program_runner
import pytest
import resume_test

RUN = f'gs://{gcs_server.BUCKET}/runs/a'
NAMES = 'runs/a'  # Of the run's objects.


@pytest.fixture
def served():
  with gcs_server.serving() as (bucket, env):
    yield bucket, env


@pytest.fixture(scope='module')
def whole(start_training, tmp_path_factory):
  """An uninterrupted run in a local folder."""
  run = tmp_path_factory.mktemp('whole') / 'run'
  program = start_training(run)
  assert program.wait() == 0, program.text()
  return run


def hold(bucket, nth):
  """Makes the nth change from now wait, and all after it; returns events: reached, let go.

  Heartbeats are not counted.
  """
  reached, go, seen = threading.Event(), threading.Event(), []

  def on_change(name):
    if not name.endswith('train.lock'):
      seen.append(name)
      if len(seen) >= nth:
        reached.set()
        go.wait()
        raise gcs_server.Bucket.Dropped

  bucket.on_change = on_change
  return reached, go


def steps(bucket):
  """Returns the steps of which there is any object."""
  found = (re.match(rf'{NAMES}/checkpoints/(\w+)/', name) for name in bucket.names())
  return {match[1] for match in found if match}


# Changes: 4 files at the start (of which one is new later), a checkpoint about every 12.
KILLS = (2, 9, 11, 14, 16, 20, 30)


def test_killed_during_uploads_it_resumes_to_the_bits(served, start_training, whole, tmp_path):
  bucket, env = served
  partial = 0
  for k, nth in enumerate(KILLS):
    reached, go = hold(bucket, nth)
    program = start_training(RUN, output=tmp_path / f'output{k}', **env)
    assert program.until(reached.is_set), program.text()
    program.kill()
    assert program.wait() == -signal.SIGKILL
    go.set()
    partial += any(
      f'{NAMES}/checkpoints/{s}/manifest.json' not in bucket.names() for s in steps(bucket)
    )
    print(nth, steps(bucket), bucket.changes[-3:])
  bucket.on_change = lambda name: None
  program = start_training(RUN, output=tmp_path / 'output', **env)
  assert program.wait() == 0, program.text()
  print(program.text())
  print(bucket.changes)
  run = bucket.get(NAMES, tmp_path / 'run')
  assert resume_test.same(run, whole)
  assert resume_test.scalars(run) == resume_test.scalars(whole)
  names = lambda folder: {str(p.relative_to(folder)) for p in folder.iterdir()}
  assert names(run) == names(whole)
  assert names(run / 'checkpoints') == names(whole / 'checkpoints')
  assert partial > 2
