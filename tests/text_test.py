"""Text at the edges of commands: `~` in paths, terminals and locales that lack letters."""

import os
import subprocess
import sys

import pytest

from internal import __main__, configs


@pytest.mark.parametrize(
  ('word', 'expanded'),
  [
    ('~/runs', '/home/me/runs'),
    ('--out=~/runs', '/home/me/runs'),
    ('~', '/home/me'),
    ('a~b', 'a~b'),
    ("--gin_bindings=Config.data_dir = '~/x'", "--gin_bindings=Config.data_dir = '~/x'"),
  ],
)
def test_a_tilde_is_the_home_folder(monkeypatch, word, expanded):
  monkeypatch.setenv('HOME', '/home/me')
  assert __main__._expand_home(word).removeprefix('--out=') == expanded


def test_a_tilde_in_settings_and_gin_files(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a.gin').write_bytes("\ufeffConfig.data_dir = '~/ü'\r\n".encode())
  config = configs.load_config(['~/a.gin'], ["Config.render_dir = '~'"]).config
  assert config.data_dir == str(tmp_path / 'ü')
  assert config.render_dir == str(tmp_path)


@pytest.mark.parametrize(
  'env',
  [
    {'PYTHONIOENCODING': 'cp1252'},
    {'PYTHONIOENCODING': 'ascii'},
    {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
  ],
)
def test_any_name_is_printed_and_opened_anywhere(tmp_path, env):
  folder = os.fsencode(tmp_path) + '/ü 東'.encode() + b' \xe9'
  arguments = ['-m', 'internal', 'demo_scene', folder, '--images', '3', '--width', '8']
  command = [sys.executable, *arguments, '--height', '8']
  done = subprocess.run(command, capture_output=True, env={**os.environ, **env}, check=False)
  assert done.returncode == 0, done.stderr.decode('utf-8', 'replace')
  assert os.path.isdir(folder + b'/images')
