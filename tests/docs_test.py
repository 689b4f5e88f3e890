"""Every command in README, docs and configs: found on the page, and parsed by its own program.

`python -m pytest tests/docs_test.py --collect-only -k is_one_that` lists the commands.
"""

import argparse
import importlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from internal import cli, configs, plugins
from internal.__main__ import COMMANDS
from internal.system import installation

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').glob('*.md')])
CONFIGS = sorted(ROOT.glob('configs/**/*.gin'))
PROGRAMS = {installation.command_text(name).split()[1]: name for name in COMMANDS}
# Programs that need no parser of ours, and what the test does with their arguments.
FOREIGN = ('git clone', 'cd', 'source', 'pip install', 'gcloud', 'scontrol', '[', 'setup_env')
# Pages with shell programs (functions, loops) for TPU workers: only their syntax is checked.
BASH_PROGRAMS = ('multi_device.md',)
SCENES_360 = 'bicycle|flowers|garden|stump|treehill|room|counter|kitchen|bonsai'


class Parsed(BaseException):
  """Carries the parsed arguments out of a program, which must not run."""


def blocks(page: pathlib.Path) -> list[str]:
  """The shell blocks of a page, or the indented commands in a .gin file's header."""
  text = page.read_text()
  if page.suffix == '.gin':
    header = '\n'.join(line.removeprefix('#') for line in text.split('\n\n')[0].split('\n'))
    return [''.join(re.findall(r'^ {3,}\S.*\n?', header, re.MULTILINE))]
  found = re.findall(r'^( *)```(?:bash|sh|shell)\n(.*?)^\1```', text, re.MULTILINE | re.DOTALL)
  return [body for _, body in found]


def commands(block: str) -> list[list[str]]:
  """The simple commands of a shell block as lists of words, without leading assignments."""
  block = re.sub(r'(^|\s)#[^\n]*', r'\1', block)
  lexer = shlex.shlex(block.replace('\\\n', ' '), posix=True, punctuation_chars=True)
  lexer.whitespace = ' \t'
  lexer.wordchars += ':,%@!=$^'
  lexer.commenters = ''
  found, words, comment = [], [], False
  for word in lexer:
    comment = (comment or word.startswith('#')) and '\n' not in word
    if comment:
      continue
    if word == '\n' or set(word) <= set(';&|(){}'):
      found.append(words)
      words = []
    else:
      words.append(word)
  found = [[*w] for w in (*found, words)]
  for w in found:
    while w and (re.match(r'[A-Z_]+=', w[0]) or w[0] in ('srun', '{', '}')):
      w.pop(0)
  return [w for w in found if w]


CASES = [
  pytest.param(page, command, id=f'{page.name}: {" ".join(command)}')
  for page in (*PAGES, *CONFIGS)
  if page.name not in BASH_PROGRAMS
  for block in blocks(page)
  for command in commands(block)
]


def parse(words, monkeypatch):
  """Parses the arguments of a Python command with its program's own parser."""
  parse_args = argparse.ArgumentParser.parse_args

  def stop(parser, *args, **kwargs):
    raise Parsed(parse_args(parser, *args, **kwargs))

  monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', stop)
  monkeypatch.setattr(plugins, 'load', lambda _: None)
  module = importlib.import_module(f'internal.commands.{PROGRAMS[words[1]]}')
  with pytest.raises(Parsed) as parsed:
    module.main(words[2:])
  return parsed.value.args[0]


@pytest.mark.parametrize(('page', 'words'), CASES)
def test_each_command_is_one_that_its_program_takes(page, words, monkeypatch):
  monkeypatch.chdir(ROOT)
  if words[0] == 'python' and words[1] in PROGRAMS:
    args = parse(words, monkeypatch)
    if '--plugins' not in words:  # tests/plugins_test.py runs those.
      check_settings(args)
  elif words[0] in ('python', 'bash') or '/' in words[0]:
    program = pathlib.Path(words[words[0] in ('python', 'bash')])
    assert program.is_file() or program == pathlib.Path('.venv/bin/activate')
    assert words[0] in ('python', 'bash') or os.access(program, os.X_OK)
  else:
    assert ' '.join(words).startswith(FOREIGN), words
  for requirements in re.findall(r'requirements[\w-]*\.(?:txt|lock)', ' '.join(words)):
    assert (ROOT / requirements).is_file()


def check_settings(args):
  """The gin files and bindings resolve, and the paths have the one shape that the docs use."""
  config = configs.Config()
  if hasattr(args, 'set_by_flag'):
    config = cli.load_settings(args).config
  elif getattr(args, 'gin_configs', ()) or getattr(args, 'gin_bindings', ()):
    config = configs.load_config(args.gin_configs or (), args.gin_bindings).config
  data = config.data_dir, getattr(args, 'data_dir', None), getattr(args, 'data', None)
  assert all(re.match(r'data/\w|runs/\w+/', path) for path in data if path)
  runs = config.checkpoint_dir, getattr(args, 'checkpoint_dir', None)
  assert all(re.match(r'runs/\w', path) for path in runs if path)


@pytest.mark.parametrize('page', [*PAGES, *CONFIGS], ids=lambda page: page.name)
def test_paths_have_one_shape(page):
  if page.name in BASH_PROGRAMS:
    return
  text = page.read_text()
  assert not re.search(rf'data/({SCENES_360})\b', text)
  assert not re.search(
    rf'(?<![\w/])360/({SCENES_360})\b', text.replace('data/360/', '').replace('runs/360/', '')
  )


@pytest.mark.parametrize('shell', ['bash', 'zsh'])
def test_each_block_is_read_by_the_shell(shell):
  if not shutil.which(shell):
    pytest.skip(f'{shell} is not installed')
  for page in PAGES:
    for block in blocks(page):
      if shell == 'bash' or page.name not in BASH_PROGRAMS:
        done = subprocess.run(
          [shell, '-n'], input=block, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ''), (page.name, block)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_each_block_means_the_same_in_bash_and_zsh(page):
  if page.name in BASH_PROGRAMS:
    return
  for block in blocks(page):
    plain = re.sub(r"'[^']*'", "''", re.sub(r'"[^"]*"', '""', block))
    plain = re.sub(r'(^|\s)#.*', '', plain)
    # A zsh that people type into takes comments for arguments; those of SLURM are for files.
    assert not re.search(r'(^|\s)#(?!SBATCH)', block), block
    # bash splits an unquoted $name into words, zsh does not; only exit codes have no blanks.
    assert not re.search(r'\$(?!\?)', re.sub(r'gcloud.*', '', plain)), block
    # zsh refuses an unquoted [...] that names no file, and a word that starts with =.
    assert not re.search(r'\s\[(?! )\S*\]|\s=\w', plain), block


def test_the_pages_have_commands_and_the_first_two_are_the_demo_and_the_tests():
  assert len(CASES) > 60
  readme = re.findall(r'```bash\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
  assert [block.strip() for block in readme[:2]] == ['scripts/demo.sh', 'scripts/test.sh']


def test_a_wrong_flag_or_setting_on_a_page_is_noticed(monkeypatch):
  with pytest.raises(SystemExit):
    parse(['python', 'train.py', '--dry_ran'], monkeypatch)
  monkeypatch.undo()
  args = parse(['python', 'train.py', '--gin_bindings', 'Config.factr = 4'], monkeypatch)
  with pytest.raises(configs.ConfigError):
    check_settings(args)


def test_links_lead_somewhere():
  for page in PAGES:
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
      if re.match(r'https?:', target):
        continue
      name, _, anchor = target.partition('#')
      file = (page.parent / name).resolve() if name else page
      assert file.exists(), (page.name, target)
      if anchor:
        assert anchor in anchors(file), (page.name, target)


def anchors(page: pathlib.Path) -> set[str]:
  """The anchors of a page's headings, made as GitHub makes them."""
  text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
  heads = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads}
