"""The command that programs print to train a capture: which config, which size, how quoted."""

import shlex
import subprocess

import pytest

from internal import cli, plugins
from internal.commands import train
from internal.devices import starting
from internal.system import installation


def test_the_factor_is_that_of_the_published_scenes():
  sizes = {(4946, 3286): 4, (3118, 2078): 2, (1600, 900): 0, (1080, 1920): 2, (12000, 9000): 8}
  assert {size: starting.recommend_factor(size) for size in sizes} == sizes


@pytest.mark.parametrize(('accelerator', 'batch', 'factor'), [(True, 10240, 0), (False, 1024, 2)])
def test_the_command_trains_with_the_config_and_size_of_the_machine(accelerator, batch, factor):
  command = starting.train_command("data/it's mine", (720, 405), accelerator)
  words = shlex.split(command)
  assert words[:2] == ['python', 'train.py']
  args = train.parse(words[2:])
  config = cli.load_settings(args).config
  assert (config.data_dir, config.checkpoint_dir) == ("data/it's mine", "runs/it's mine")
  assert (config.batch_size, config.factor) == (batch, factor)


def test_without_a_gpu_both_commands_are_given(monkeypatch):
  here, there = (starting.train_command('data/a', (4000, 3000), gpu) for gpu in (False, True))
  assert '--config cpu' in here
  assert '--factor 8' in here
  assert '--config fast' in there
  assert '--factor 4' in there
  lines = starting.advice('data/a', (4000, 3000)).split('\n')
  assert (lines[0].strip(), lines[-1].strip()) == (here, there)
  monkeypatch.setattr(starting, 'has_accelerator', lambda: True)
  assert starting.advice('data/a', (4000, 3000)).strip() == there


@pytest.mark.parametrize('shell', ['bash', 'zsh'])
@pytest.mark.parametrize(
  'word',
  ["Config.data_dir = 'a b'", 'plain/path.gin', '$HOME', 'a"b', 'a`b', '!x', '=ls', '~', '*', ''],
)
def test_words_reach_the_program_as_they_are(shell, word):
  text = installation.command_text('train', word).removeprefix('python train.py ')
  try:
    done = subprocess.run([shell, '-c', f"printf '%s' {text}"], capture_output=True, text=True)
  except FileNotFoundError:
    pytest.skip(f'no {shell} here')
  assert done.stdout == word


def test_commands_on_a_run_repeat_its_plugins(monkeypatch):
  monkeypatch.setattr(plugins, 'flags', lambda: ['--plugins', 'my.mod'])
  assert cli.run_text('view', 'runs/a') == 'python scripts/view.py runs/a --plugins my.mod'
  assert cli.run_text('render', 'runs/a', '--path', 'a b.json') == (
    'python render.py runs/a --path "a b.json" --plugins my.mod'
  )
