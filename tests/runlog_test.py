"""The run log: valid JSON lines, no step twice after a resume, damaged lines kept aside."""

import errno
import io
import json
import math
import os
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from internal.training import runlog


def _rows(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def _stats(loss):
  return {'loss': np.float32(loss), 'psnr': np.float32(20.0)}


def test_steps_are_averaged_timed_and_printed(tmp_path, capsys):
  log = runlog.RunLog(str(tmp_path), 0, 1000)
  log.steps(100, [_stats(1.0), _stats(3.0)], 2, 4.0, 512, 2**31)
  log.close()
  (row,) = _rows(tmp_path)
  assert (row['step'], row['loss'], row['rays_per_sec'], row['train_seconds']) == (100, 2.0, 256, 4)
  assert row['peak_bytes'] == 2**31
  said = capsys.readouterr().out
  for part in ('100/1,000', 'loss 2.00000', 'psnr 20.00', '256 rays/s', '30m00s left'):
    assert part in said
  assert list((tmp_path / 'tensorboard').glob('events*'))


def test_untimed_steps_are_averaged_without_a_rate(tmp_path):
  log = runlog.RunLog(str(tmp_path), 0, 1000)
  log.steps(2, [_stats(1.0), _stats(3.0)], 1, 4.0, 512)
  log.steps(3, [_stats(5.0)], 0, 0.0, 512)
  log.close()
  first, second = _rows(tmp_path)
  assert (first['loss'], first['rays_per_sec']) == (2.0, 128)
  assert second['loss'] == 5
  assert 'rays_per_sec' not in second


def test_a_resume_drops_repeated_steps_and_keeps_the_training_time(tmp_path):
  log = runlog.RunLog(str(tmp_path), 0, 1000)
  for step in (100, 200, 300):
    log.steps(step, [_stats(step)], 1, 10.0, 1)
  log.close()
  with open(tmp_path / 'metrics.jsonl', 'a') as f:
    f.write('{"step": 400, "lo')  # Killed in the middle of a line.
  log = runlog.RunLog(str(tmp_path), 200, 1000)
  assert [r['step'] for r in _rows(tmp_path)] == [100, 200]
  assert log.train_seconds == 20
  log.steps(300, [_stats(3)], 1, 10.0, 1)
  log.close()
  assert [r['step'] for r in _rows(tmp_path)] == [100, 200, 300]
  assert _rows(tmp_path)[-1]['train_seconds'] == 30


def test_a_damaged_line_is_kept_aside_and_later_ones_stay(tmp_path, capsys):
  good = [json.dumps({'step': step, 'loss': 1.0}) for step in (1, 2, 3, 4, 5, 6)]
  damaged = ['{"step": 2, "lo\xffss": 1', '[]', '{"step": "3"}', '{"step": 4, "loss": [1]}', '']
  lines = [good[0], *damaged, *good[1:], '{"step": 7, "lo']
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes('\n'.join(lines).encode('latin-1'))
  assert [row['step'] for row in runlog.read_metrics(str(path))] == [1, 2, 3, 4, 5, 6]
  assert path.read_bytes() == '\n'.join(lines).encode('latin-1')
  runlog.RunLog(str(tmp_path), 5, 10).close()
  assert [row['step'] for row in _rows(tmp_path)] == [1, 2, 3, 4, 5]
  aside = tmp_path / 'metrics.jsonl.damaged'
  assert aside.read_bytes() == ('\n'.join(damaged) + '\n').encode('latin-1')
  assert capsys.readouterr().err.count('5 damaged lines') == 1
  runlog.RunLog(str(tmp_path), 5, 10).close()
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize('seconds', [0.0, -5.0])
def test_a_clock_that_stands_still_or_jumps_gives_no_rate(tmp_path, seconds):
  log = runlog.RunLog(str(tmp_path), 0, 10)
  log.steps(1, [_stats(1)], 1, seconds, 64)
  log.close()
  assert 'rays_per_sec' not in _rows(tmp_path)[0]


def test_tensorboard_shows_numbers_and_pictures(tmp_path):
  log = runlog.RunLog(str(tmp_path), 0, 10)
  picture = np.full((16, 24, 3), (200, 100, 50), np.uint8)
  log.scalars(3, {'psnr': 21.5}, 'test')
  log.picture(4, 'test/x', picture)
  log.close()
  (path,) = (tmp_path / 'tensorboard').iterdir()
  content, found = path.read_bytes(), []
  while content:  # Length, its checksum, the event, its checksum.
    (length,) = struct.unpack('<Q', content[:8])
    found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
    content = content[16 + length :]
  number, shown = ([(e.step, v) for e in found for v in e.summary.value if v.HasField(kind)]
                   for kind in ('simple_value', 'image'))  # fmt: skip
  assert [(step, v.tag, v.simple_value) for step, v in number] == [(3, 'test/psnr', 21.5)]
  ((step, value),) = shown
  assert (step, value.tag, value.image.width, value.image.height) == (4, 'test/x', 24, 16)
  decoded = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
  np.testing.assert_allclose(decoded, picture, atol=3)


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, number):
  log = runlog.RunLog(str(tmp_path), 0, 10)

  class Full(io.StringIO):
    def write(self, _):
      raise OSError(number, os.strerror(number))

  monkeypatch.setattr(runlog, 'open', lambda *_, **__: Full(), raising=False)
  with pytest.raises(OSError, match=r'metrics\.jsonl'):
    log.scalars(1, {'loss': 1.0})
  monkeypatch.setattr(log._board._writer, 'flush', lambda: Full().write(''))
  with pytest.raises(OSError, match='tensorboard'):
    log.picture(1, 'x', np.zeros((2, 2, 3), np.uint8))


def test_non_finite_numbers_become_null(tmp_path):
  log = runlog.RunLog(str(tmp_path), 0, 10)
  log.scalars(1, {'loss': math.nan, 'psnr': math.inf, 'ok': 1.0})
  log.close()
  (row,) = _rows(tmp_path)
  assert (row['loss'], row['psnr'], row['ok']) == (None, None, 1.0)


def test_other_processes_write_and_say_nothing(tmp_path, capsys):
  log = runlog.RunLog(str(tmp_path), 0, 10, enabled=False)
  log.steps(1, [_stats(1)], 1, 2.0, 1)
  log.say('hello')
  log.picture(1, 'x', np.zeros((2, 2, 3), np.uint8))
  log.close()
  assert log.train_seconds == 2
  assert list(tmp_path.iterdir()) == []
  assert capsys.readouterr().out == ''
