import argparse
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from internal import cli, configs, image, progress


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


class TestRunFolder:
  def folder(self, *argv):
    return cli.run_folder(cli.parse_run_arguments('about', list(argv)))

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

  def test_our_value_errors_are_one_line(self, capsys):
    code, err = self.told(lambda: configs.Config(factor=-1), capsys)
    assert code == 1
    assert err.count('\n') == 1
    assert 'Config.factor' in err
    assert 'Traceback' not in err

  def test_also_from_inside_a_compiled_function(self, capsys):
    code, err = self.told(lambda: image.ssim(np.zeros((3, 3, 3)), np.zeros((3, 3, 3))), capsys)
    assert code == 1
    assert 'SSIM needs 11' in err

  def test_also_files_that_the_system_refuses(self, capsys, tmp_path):
    blocker = tmp_path / 'file'
    blocker.touch()
    code, err = self.told(lambda: os.makedirs(blocker / 'folder'), capsys)
    assert code == 1
    assert str(blocker) in err

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

  def test_interruption(self, capsys):
    def main():
      raise KeyboardInterrupt

    code, err = self.told(main, capsys)
    assert code == 130
    assert err == 'Interrupted.\n'


class TestProgress:
  def test_yields_all_in_order(self):
    assert list(progress.track([3, 1, 2], 'frames')) == [3, 1, 2]
    assert list(progress.track([3, 1, 2], 'frames', enabled=False)) == [3, 1, 2]

  def test_without_a_terminal_lines_come_now_and_then(self, capsys, monkeypatch):
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(progress, 'time', SimpleNamespace(monotonic=lambda: float(next(clock))))
    list(progress.track(range(9), 'frames'))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == 'frames: 2/9, 52s left'
    assert [line.split()[1] for line in lines] == ['2/9,', '5/9,', '8/9,']

  def test_disabled_says_nothing(self, capsys, monkeypatch):
    monkeypatch.setattr(progress, '_SECONDS_PER_LINE', 0.0)
    list(progress.track(range(9), 'frames', enabled=False))
    assert capsys.readouterr().err == ''
