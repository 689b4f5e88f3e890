"""The cache of compiled programs: damaged entries are compiled again, and the folder is bounded."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internal.devices import program_cache

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cache(tmp_path):
  return program_cache.CheckedCache(str(tmp_path), 1000)


def _names(folder):
  return sorted(os.listdir(folder))


def test_returns_what_was_put(cache, tmp_path):
  assert cache.get('a') is None
  cache.put('a', b'program')
  assert cache.get('a') == b'program'
  assert _names(tmp_path) == ['a-checked']
  cache.put('a', b'another')  # JAX puts again what it could not load.
  assert cache.get('a') == b'another'


@pytest.mark.parametrize('at', [0, 3, 10, -1])
def test_an_entry_with_a_flipped_bit_is_dropped(cache, tmp_path, at):
  cache.put('a', b'program')
  content = bytearray((tmp_path / 'a-checked').read_bytes())
  content[at] ^= 1
  (tmp_path / 'a-checked').write_bytes(content)
  assert cache.get('a') is None
  assert _names(tmp_path) == []


@pytest.mark.parametrize('size', [0, 1, 31, 32, 38])
def test_a_cut_entry_is_dropped(cache, tmp_path, size):
  cache.put('a', b'program')
  os.truncate(tmp_path / 'a-checked', size)
  assert cache.get('a') is None
  assert _names(tmp_path) == []


def test_a_damaged_entry_that_cannot_be_removed_is_not_used(cache, tmp_path, monkeypatch):
  def refuse(path):
    raise PermissionError(path)

  cache.put('a', b'program')
  os.truncate(tmp_path / 'a-checked', 38)
  monkeypatch.setattr(os, 'remove', refuse)
  assert cache.get('a') is None


def test_a_full_disk_is_told_once(cache, monkeypatch, capsys):
  def full(path, target):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, 'replace', full)
  cache.put('a', b'program')
  cache.put('b', b'program')
  message = capsys.readouterr().err
  assert message.count('\n') == 1
  assert 'Warning: some compiled programs are not cached: [Errno 28] No space left' in message
  assert 'a-checked' in message


def test_the_least_recently_used_entries_go(cache, tmp_path):
  for age, key in enumerate('cba'):
    cache.put(key, bytes(200))
    os.utime(tmp_path / f'{key}-checked', (1000 - age, 1000 - age))
  (tmp_path / 'old-cache').write_bytes(bytes(300))  # As JAX names its own.
  os.utime(tmp_path / 'old-cache', (10, 10))
  assert cache.get('a') is not None
  cache.put('d', bytes(200))
  assert _names(tmp_path) == ['a-checked', 'b-checked', 'c-checked', 'd-checked']
  cache.put('e', bytes(200))
  assert _names(tmp_path) == ['a-checked', 'c-checked', 'd-checked', 'e-checked']
  cache.put('large', bytes(2000))
  assert cache.get('large') is None


def test_half_written_entries_of_killed_programs_go(cache, tmp_path):
  for name, age in (('x.1.part', 7200), ('y.2.part', 10)):
    (tmp_path / name).touch()
    os.utime(tmp_path / name, (time.time() - age,) * 2)
  cache.put('a', b'program')
  assert _names(tmp_path) == ['a-checked', 'y.2.part']


_PROGRAM = """
import jax
from internal import cli
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
cli.run(lambda: print(jax.jit(lambda x: x.cumsum() + 3)(jax.numpy.ones(7))[-1]))
print('/jax/compilation_cache/cache_hits' in hits)
"""


def _start(folder):
  env = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(folder)}
  env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  done = subprocess.run(
    [sys.executable, '-c', _PROGRAM], cwd=ROOT, env=env, capture_output=True, text=True
  )
  assert (done.returncode, done.stderr) == (0, '')
  return done.stdout.split()


def test_a_program_survives_any_damaged_entry(tmp_path):
  assert _start(tmp_path) == ['10.0', 'False']
  assert _start(tmp_path) == ['10.0', 'True']
  entries = list(tmp_path.glob('*-checked'))
  assert entries
  for k, path in enumerate(entries):
    if k % 2:
      os.truncate(path, path.stat().st_size // 2)
    else:
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 1
      path.write_bytes(content)
  assert _start(tmp_path) == ['10.0', 'False']
  assert _start(tmp_path) == ['10.0', 'True']
