"""Progress bars and lines, with and without a terminal."""

import os
import pathlib
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from internal.system import progress

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(0, '0s'), (59.4, '59s'), (59.6, '1m00s'), (200, '3m20s'), (3600, '1h00m'), (7530, '2h05m')],
)
def test_durations(seconds, text):
  assert progress.duration(seconds) == text


@pytest.fixture
def clock(monkeypatch):
  ticks = iter(range(0, 1000, 5))
  monkeypatch.setattr(progress, 'time', SimpleNamespace(monotonic=lambda: float(next(ticks))))


class TestWithoutATerminal:
  def test_yields_all_in_order(self):
    assert list(progress.track([3, 1, 2], 'frames')) == [3, 1, 2]
    assert list(progress.track([3, 1, 2], 'frames', enabled=False)) == [3, 1, 2]
    assert list(progress.track(iter([3, 1, 2]), 'frames', total=3)) == [3, 1, 2]

  def test_lines_are_printed_at_intervals(self, capsys, clock):
    list(progress.track(range(9), 'frames'))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ['frames: 3/9, 30s left', 'frames: 6/9, 15s left', 'frames: 9/9, 0s left']

  def test_disabled_and_quiet_say_nothing(self, capsys, clock, monkeypatch):
    list(progress.track(range(9), 'frames', enabled=False))
    monkeypatch.setattr(progress, '_quiet', True)
    list(progress.track(range(9), 'frames'))
    progress.say('news')
    said = capsys.readouterr()
    assert said.err == said.out == ''

  def test_units_and_what_was_done_before(self, capsys, clock):
    with progress.Bar('a.zip', 100e6, 40e6, scale=1e6, unit='MB') as bar:
      for _ in range(3):
        bar.advance(10e6)
    assert capsys.readouterr().err == 'a.zip: 70/100 MB, 15s left\n'

  def test_an_unknown_total(self, capsys, clock):
    with progress.Bar('a.zip', scale=1e6, unit='MB') as bar:
      for _ in range(3):
        bar.advance(10e6)
    assert capsys.readouterr().err == 'a.zip: 30 MB\n'


def test_a_summary_is_a_column(capsys):
  progress.summary({'results': 'a/b.json', 'all': 3})
  assert capsys.readouterr().out == 'results  a/b.json\nall      3\n'


def on_a_terminal(program, *flags):
  """What a program shows on a terminal of its own, and its exit code."""
  ours, its = pty.openpty()
  env = {**os.environ, 'TERM': 'xterm', 'COLUMNS': '100', 'NO_COLOR': '1'}
  process = subprocess.Popen(
    [sys.executable, '-c', program, *flags], cwd=ROOT, env=env, stdin=its, stdout=its, stderr=its
  )
  os.close(its)
  shown = b''
  while True:
    try:
      block = os.read(ours, 4096)
    except OSError:  # Linux's way to say that nobody writes any more.
      break
    if not block:
      break
    shown += block
  os.close(ours)
  return shown.decode(), process.wait()


def screen(shown):
  """The lines that stay, of what was sent to a terminal that never scrolls."""
  lines, row = [''], 0
  for part in re.findall(r'\x1b\[\d*[A-Za-z]|\x1b\[\?\d+[hl]|\r|\n|[^\x1b\r\n]+', shown):
    if part == '\n':
      row += 1
      lines += [''] * (row + 1 - len(lines))
    elif part == '\x1b[2K':
      lines[row] = ''
    elif re.fullmatch(r'\x1b\[\d*A', part):
      row -= int(part[2:-1] or 1)
    elif part[0] not in '\r\x1b':
      lines[row] += part
  return [line.rstrip() for line in lines if line.strip()]


_PROGRAM = """
import sys, time
from internal import cli
from internal.system import progress
def main():
  cli.make_parser('about').parse_args()
  with progress.Bar('training', 40) as bar:
    bar.show(10, 'step 10  psnr 20')
    time.sleep(0.3)
    progress.say('checkpoint saved')
    for _ in progress.track(range(3), 'inner'):
      time.sleep(0.15)
    bar.show(20, 'step 20  psnr 21')
    time.sleep(0.3)
    if 'fail' in __doc__:
      raise OSError(2, 'gone', 'a.png')
  print('end')
cli.run(main)
"""


class TestOnATerminal:
  def test_one_line_is_updated_and_messages_stay(self):
    shown, code = on_a_terminal(f'__doc__ = "well"\n{_PROGRAM}')
    assert code == 0
    assert 'step 10  psnr 20' in shown
    assert 'step 20  psnr 21' in shown
    assert 'inner' in shown
    assert screen(shown) == ['checkpoint saved', 'end']

  def test_an_error_comes_after_the_line_is_gone(self):
    shown, code = on_a_terminal(f'__doc__ = "fail"\n{_PROGRAM}')
    assert code == 1
    assert screen(shown) == ['checkpoint saved', 'Error: a.png: gone.']

  def test_quiet(self):
    shown, code = on_a_terminal(f'__doc__ = "well"\n{_PROGRAM}', '--quiet')
    assert (shown, code) == ('end\r\n', 0)

  def test_debug_shows_where(self):
    shown, code = on_a_terminal(f'__doc__ = "fail"\n{_PROGRAM}', '--debug')
    assert code == 1
    assert 'Traceback' in shown
    assert screen(shown)[-1] == 'Error: a.png: gone.'
