import argparse
import dataclasses
import errno
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from internal import cli, configs, image, knobs
from internal.__main__ import COMMANDS
from internal.commands import render, train, view
from internal.errors import UserError
from internal.system import installation

ROOT = pathlib.Path(__file__).parents[1]


class TestArguments:
  def parse(self, *argv):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(argv)

  def test_flags_repeat_and_take_several(self):
    args = self.parse(
      '--gin_configs=a.gin', '--gin_bindings=Config.factor = 4', '--gin_configs', 'b.gin', 'c.gin',
      '--gin_bindings', 'Config.near = 1', 'Config.far = 2', '--logtostderr',
    )  # fmt: skip
    assert args.gin_configs == ['a.gin', 'b.gin', 'c.gin']
    assert args.gin_bindings == ['Config.factor = 4', 'Config.near = 1', 'Config.far = 2']

  def test_parsing_twice_does_not_accumulate(self):
    assert self.parse('--gin_bindings', 'a').gin_bindings == ['a']
    assert self.parse('--gin_bindings', 'b').gin_bindings == ['b']
    assert self.parse().gin_bindings == []

  def test_unknown_flags_are_refused(self, capsys):
    with pytest.raises(SystemExit):
      self.parse('--gin_config=a.gin', '--colour')
    assert '--colour' in capsys.readouterr().err


class TestFlags:
  def load(self, *argv):
    args = train.parse(list(argv))
    return cli.load_settings(args), args

  def test_set_what_everybody_sets(self):
    flags = ('--data', 'my scene', '--out', 'runs/a', '--factor', '4', '--steps', '30')
    settings, _ = self.load(*flags, '--config', 'fast')
    config = settings.config
    assert (config.data_dir, config.checkpoint_dir) == ('my scene', 'runs/a')
    assert (config.factor, config.max_steps) == (4, 30)
    assert settings.nerf_mlp.encoding == 'grid'
    assert "Config.data_dir = 'my scene'" in settings.text  # That is config.gin.

  @pytest.mark.parametrize(
    ('name', 'path'),
    [
      ('fast', 'configs/360_fast.gin'),
      ('grid', 'configs/360_grid.gin'),
      ('paper', 'configs/360.gin'),
      ('360', 'configs/360.gin'),
      ('demo', 'configs/demo.gin'),
      ('blender_256', 'configs/blender_256.gin'),
      ('configs/demo.gin', 'configs/demo.gin'),
    ],
  )
  def test_configs_have_names(self, name, path):
    assert configs.config_path(name) == path

  def test_a_config_may_be_a_file(self, tmp_path):
    path = tmp_path / 'mine.gin'
    path.write_text('Config.factor = 8\n')
    assert self.load('--config', str(path))[0].config.factor == 8

  def test_an_unknown_config_lists_the_known_ones(self):
    with pytest.raises(configs.ConfigError, match=r'--config fsat: .* fast, grid, paper, 360,'):
      self.load('--config', 'fsat')

  def test_later_kinds_win(self, tmp_path, capsys):
    """A config, more files, flags, bindings."""
    path = tmp_path / 'a.gin'
    path.write_text('Config.factor = 3\nConfig.near = 0.7\nConfig.max_steps = 5\n')
    files = ('--gin_configs', str(path), '--config', 'paper')  # In any order.
    settings, args = self.load(
      *files, '--factor', '2', '--steps', '6', '--gin_bindings', 'Config.factor=8'
    )
    config = settings.config
    assert (config.factor, config.max_steps, config.near, config.far) == (8, 6, 0.7, 1e6)
    cli.show_notices(settings, args)
    assert capsys.readouterr().err == (
      'Note: --factor 2 has no effect: --gin_bindings wins, Config.factor = 8.\n'
    )

  def test_a_flag_and_an_equal_binding_need_no_note(self, capsys):
    settings, args = self.load('--data', '~/x', '--gin_bindings', 'Config.data_dir=~/x')
    cli.show_notices(settings, args)
    assert capsys.readouterr().err == ''

  def test_parsing_twice_does_not_accumulate(self):
    assert self.load('--factor', '2')[1].set_by_flag == {'factor': ('--factor 2', 2)}
    assert self.load()[1].set_by_flag == {}

  def test_one_config_only(self, capsys):
    with pytest.raises(SystemExit):
      self.load('--config', 'fast', '--config', 'paper')
    assert '--gin_configs adds more files' in capsys.readouterr().err

  def test_data_without_a_config_trains_fast_and_says_so(self, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(train.datasets, 'load_dataset', lambda config, **_: loaded.append(config))
    with pytest.raises(AttributeError):  # There is no scene.
      train.main(['--data', 'x', '--dry_run'])
    assert capsys.readouterr().err == 'Note: no --config given; using --config fast.\n'
    assert loaded[0] == dataclasses.replace(
      configs.load_config(['configs/360_fast.gin']).config, data_dir='x'
    )

  def test_render_flags(self, tmp_path):
    def chosen(*argv):
      args = render.parse(['runs/a', *argv])
      assert cli.run_folder(args) == 'runs/a'
      return configs.load_config([], cli.bindings(args)).config

    config = chosen('--path', 'orbit', '--frames', '7', '--size', '64', '48', '--out', 'v')
    assert (config.render_path_type, config.render_path_frames) == ('orbit', 7)
    assert (config.render_resolution, config.render_dir) == ((64, 48), 'v')
    path = tmp_path / 'a.json'
    path.touch()
    config = chosen('--path', str(path))
    assert (config.render_path_file, config.render_path_type) == (str(path), None)
    with pytest.raises(UserError, match='--path orbti: no such file or folder, and not one of'):
      chosen('--path', 'orbti')

  def test_each_flag_of_the_list_of_settings_exists(self):
    programs = {'train.py': train.parse([]), 'render.py': render.parse(['x'])}
    for name, flag in knobs.FLAGS.items():
      knob = next(k for g in knobs.groups() for k in g.knobs if k.name == name)
      program, listed = knob.flag.split()
      assert listed == flag
      assert hasattr(programs[program], flag.removeprefix('--'))

  def test_messages_name_the_flag_unless_a_binding_was_typed(self):
    text = 'Config.data_dir: gone. Set Config.factor = 4, not Config.factors.'
    cli._typed.clear()
    self.load('--data', 'x')
    own_name = '--data: gone. Set Config.factor = 4, not Config.factors.'
    assert cli.in_typed_names(text) == own_name
    assert cli.in_typed_names('Config.max_steps') == 'Config.max_steps (--steps)'
    self.load('--factor', '2')
    assert cli.in_typed_names(text) == '--data: gone. Set --factor 4, not Config.factors.'
    self.load('--gin_bindings', 'Config.factor=3', 'Config.max_steps=3')
    assert cli.in_typed_names(text) == own_name
    assert cli.in_typed_names('Config.max_steps') == 'Config.max_steps'


class TestListKnobs:
  def shown(self, parse, *argv):
    with pytest.raises(SystemExit) as caught:
      parse(list(argv))
    assert not caught.value.code

  def test_prints_settings_about_a_word_without_other_arguments(self, capsys):
    self.shown(view.parse, '--list_knobs', 'LLFFHOLD')
    out = capsys.readouterr().out
    assert 'Config.llffhold = 8\n' in out
    assert 'Every llffhold-th image' in out
    assert 'batch_size' not in out

  def test_prints_all(self, capsys):
    self.shown(train.parse, '--data', 'x', '--list_knobs')
    out = capsys.readouterr().out
    assert all(f'{name} = ' in out for name in ('Config.factor', 'Model.num_levels'))
    assert 'Config.factor = 0   (or train.py --factor)' in out

  def test_an_unknown_word_is_an_error_with_the_nearest_names(self):
    with pytest.raises(UserError, match=r'llfhold: no setting .* Nearest: Config\.llffhold'):
      train.parse(['--list_knobs', 'llfhold'])


class TestRunFolder:
  def folder(self, *argv):
    return cli.run_folder(cli.make_run_parser('about').parse_args(list(argv)))

  def test_by_flag(self):
    assert self.folder('--checkpoint_dir', 'runs/a') == 'runs/a'

  def test_by_binding(self):
    assert self.folder('--gin_bindings', "Config.checkpoint_dir = 'runs/b'") == 'runs/b'

  def test_by_config_file(self, tmp_path):
    path = tmp_path / 'a.gin'
    path.write_text("Config.checkpoint_dir = 'runs/c'\n")
    assert self.folder('--gin_configs', str(path)) == 'runs/c'

  def test_the_flag_wins(self):
    got = self.folder('--gin_bindings', "Config.checkpoint_dir = 'b'", '--checkpoint_dir', 'a')
    assert got == 'a'

  def test_by_position(self):
    assert self.folder('runs/a') == 'runs/a'
    assert self.folder('--data', 'x', 'runs/a', '--gin_bindings', 'Config.far=3') == 'runs/a'

  def test_two_are_an_error(self):
    with pytest.raises(configs.ConfigError, match='Two training runs'):
      self.folder('runs/a', '--checkpoint_dir', 'runs/b')

  def test_none_is_an_error_that_names_the_flag(self):
    with pytest.raises(configs.ConfigError, match='--checkpoint_dir'):
      self.folder()


class TestRun:
  def told(self, main, capsys):
    with pytest.raises(SystemExit) as caught:
      cli.run(main)
    return caught.value.code, capsys.readouterr().err

  def test_silent_success(self, capsys):
    cli.run(lambda: None)
    assert capsys.readouterr().err == ''

  def test_user_errors_are_one_line(self, capsys):
    code, err = self.told(lambda: configs.Config(factor=-1), capsys)
    assert code == 1
    assert err.count('\n') == 1
    assert 'Config.factor' in err
    assert 'Traceback' not in err

  def test_user_errors_inside_compiled_functions_are_one_line(self, capsys):
    code, err = self.told(lambda: image.ssim(np.zeros((3, 3, 3)), np.zeros((3, 3, 3))), capsys)
    assert code == 1
    assert 'SSIM needs 11' in err

  @pytest.mark.parametrize(
    ('error', 'said'),
    [
      (
        jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of\nmemory allocating 32 bytes.'),
        '(RESOURCE_EXHAUSTED: Out of memory allocating 32 bytes.)',
      ),
      (MemoryError('Unable to allocate 3 GiB'), '(Unable to allocate 3 GiB)'),
    ],
  )
  def test_too_little_memory_is_one_line_with_a_way_out(self, capsys, error, said):
    def main():
      raise error

    code, err = self.told(main, capsys)
    assert code == 1
    assert err.startswith(f'Error: There is too little memory {said}. End other programs')
    assert 'Config.micro_batches = 4' in err
    assert err.count('\n') == 1

  def test_other_errors_of_xla_keep_their_traceback(self):
    def main():
      raise jax.errors.JaxRuntimeError('INTERNAL: no')

    with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
      cli.run(main)

  def test_system_errors_are_one_line_with_a_way_out(self, capsys, tmp_path):
    blocker = tmp_path / 'file'
    blocker.touch()
    for path, words in (
      (blocker, 'is a file where a folder is needed. Move it away, or'),
      (blocker / 'folder', 'is below a file, which would have to be a folder. Correct'),
    ):
      code, err = self.told(lambda path=path: os.makedirs(path, exist_ok=True), capsys)
      assert code == 1
      assert err.startswith(f'Error: {path}: {words}')
      assert err.count('\n') == 1

  @pytest.mark.parametrize(
    ('number', 'words'),
    [(errno.EROFS, 'can only be read. Mount'), (errno.ENOSPC, 'is full. Free some space, or')],
  )
  def test_disks_that_cannot_be_written(self, capsys, number, words):
    def main():
      raise OSError(number, os.strerror(number), 'runs/a')

    code, err = self.told(main, capsys)
    assert code == 1
    assert err.startswith(f'Error: runs/a: the disk {words}')

  def test_a_message_of_several_lines_becomes_one(self, capsys):
    _, err = self.told(lambda: configs.load_config(['a\nb.gin']), capsys)
    assert err.count('\n') == 1

  @pytest.mark.parametrize(
    'main',
    [
      lambda: [][1],
      lambda: {}['key'],
      lambda: np.zeros(3) @ np.zeros(4),  # A ValueError, but a library's: our bug.
      lambda: Image.new('no such mode', (1, 1)),
    ],
  )
  def test_bugs_keep_their_traceback(self, main):
    with pytest.raises((IndexError, KeyError, ValueError)):
      cli.run(main)

  @pytest.mark.parametrize(
    ('signum', 'code', 'name'), [(signal.SIGINT, 130, 'SIGINT'), (signal.SIGTERM, 143, 'SIGTERM')]
  )
  def test_signals(self, capsys, monkeypatch, signum, code, name):
    monkeypatch.setattr(os, '_exit', sys.exit)
    before = signal.getsignal(signum)
    assert self.told(lambda: signal.raise_signal(signum), capsys) == (code, f'Stopped by {name}.\n')
    assert signal.getsignal(signum) == before


class TestCompilationCache:
  NAMES = (
    'jax_compilation_cache_dir',
    'jax_enable_compilation_cache',
    'jax_persistent_cache_min_compile_time_secs',
  )

  @pytest.fixture
  def home(self, tmp_path, monkeypatch):
    """A user who has told JAX nothing, at an empty home."""
    before = {name: getattr(jax.config, name) for name in self.NAMES}
    for name in self.NAMES:
      monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    jax.config.update('jax_compilation_cache_dir', None)
    yield tmp_path
    for name, value in before.items():
      jax.config.update(name, value)

  def test_is_in_the_home_folder(self, home):
    cli.run(lambda: None)
    folder = home / '.cache' / 'mipnerf360-jax'
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert list(folder.iterdir()) == []
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1

  def test_is_in_xdg_cache_home(self, home, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(home / 'xdg'))
    cli.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(home / 'xdg' / 'mipnerf360-jax')

  def test_a_relative_place_is_ignored(self, home, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', 'xdg')
    cli.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(home / '.cache' / 'mipnerf360-jax')

  @pytest.mark.parametrize('place', ['', '/elsewhere'])
  def test_the_users_own_place_wins(self, home, monkeypatch, place):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', place)
    cli.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None  # JAX has read the variable by itself.
    assert not (home / '.cache').exists()

  def test_a_folder_configured_in_jax_wins(self, home):
    jax.config.update('jax_compilation_cache_dir', '/elsewhere')
    cli.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == '/elsewhere'
    assert not (home / '.cache').exists()

  def test_can_be_switched_off(self, home):
    jax.config.update('jax_enable_compilation_cache', False)
    cli.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert not (home / '.cache').exists()

  def test_the_users_threshold_stays(self, home, monkeypatch):
    monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '7')
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 7)
    cli.enable_compilation_cache()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7

  @pytest.mark.parametrize('name', ['JAX_NUM_PROCESSES', 'SLURM_STEP_NUM_TASKS'])
  def test_is_left_alone_with_several_processes(self, home, monkeypatch, name):
    monkeypatch.setenv(name, '2')
    cli.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv(name, '1')
    cli.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is not None

  def test_an_unwritable_place_is_one_line(self, home, capsys):
    (home / '.cache').touch()
    ran = []
    cli.run(lambda: ran.append(True))
    err = capsys.readouterr().err
    assert ran == [True]
    assert jax.config.jax_compilation_cache_dir is None
    assert err.count('\n') == 1
    assert str(home / '.cache' / 'mipnerf360-jax') in err

  def test_a_user_without_a_home_folder(self, home, monkeypatch, capsys):
    monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
    monkeypatch.chdir(home)
    cli.enable_compilation_cache()
    assert 'no home folder' in capsys.readouterr().err
    assert list(home.iterdir()) == []

  def test_a_second_start_finds_what_the_first_compiled(self, tmp_path):
    program = """
import jax
from internal import cli
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
cli.run(lambda: jax.jit(lambda x: x.cumsum() + 3)(jax.numpy.ones(7)))
print('/jax/compilation_cache/cache_hits' in hits)
"""
    drop = ('JAX_COMPILATION_CACHE_DIR', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS')
    env = {k: v for k, v in os.environ.items() if k not in drop}
    env |= {'XDG_CACHE_HOME': str(tmp_path), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    root = pathlib.Path(cli.__file__).parent.parent
    starts = [
      subprocess.run(
        [sys.executable, '-c', program], cwd=root, env=env, capture_output=True, text=True
      ).stdout
      for _ in range(2)
    ]
    assert starts == ['False\n', 'True\n']


def test_lines_are_flushed_without_a_terminal():
  code = (
    'import os; from internal import cli\n'
    "cli.run(lambda: (print('said'), os._exit(0)))"  # Ends without flushing.
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True,
    cwd=pathlib.Path(__file__).parents[1],
    env={k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'},
  )  # fmt: skip
  assert done.stdout == 'said\n'


def test_each_script_starts_a_command_and_each_command_has_a_script():
  scripts = {p.stem for p in (ROOT / 'scripts').glob('*.py')}
  found = {pathlib.Path(installation.command(name)[1]) for name in COMMANDS}
  top = {ROOT / f'{name}.py' for name in ('train', 'eval', 'render')}
  assert found == top | {ROOT / 'scripts' / f'{name}.py' for name in scripts}
  for name in COMMANDS:
    assert f"main(['{name}'])" in pathlib.Path(installation.command(name)[1]).read_text()


@pytest.mark.parametrize('name', COMMANDS)
def test_examples_name_the_console_command_once_installed(name, monkeypatch):
  monkeypatch.setattr(installation, 'is_checkout', lambda: False)
  text = installation.examples(importlib.import_module(f'internal.commands.{name}').__doc__)
  assert f'mipnerf360 {name} ' in text
  assert 'python ' not in text
  assert 'requirements-' not in text


@pytest.mark.parametrize('name', COMMANDS)
def test_help_is_complete_with_an_example(name, monkeypatch):
  parsers = []

  def parse(parser, *_):
    parsers.append(parser)
    raise KeyboardInterrupt

  monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse)
  module = importlib.import_module(f'internal.commands.{name}')
  with pytest.raises(KeyboardInterrupt):
    module.main()
  (parser,) = parsers
  assert installation.command_text(name) in parser.format_help()
  assert [action.dest for action in parser._actions if not action.help] == []


def test_a_stop_waits_for_threads_that_write(monkeypatch):
  done = []

  def write():
    time.sleep(0.2)
    done.append('written')

  monkeypatch.setattr(os, '_exit', lambda code: done.append(code))
  threading.Thread(target=write).start()
  cli._end(143, at_once=True)
  assert done == ['written', 143]
