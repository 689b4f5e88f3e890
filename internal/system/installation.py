"""The installation: where the package's files are and how to start its commands.

The package has two names. In a checkout it is the folder `internal`, beside train.py and configs/.
Installed by pip it is `mipnerf360`, with the configs inside and one console command.
"""

from __future__ import annotations

import os
import re
import shlex
import sys

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAME = __name__.split('.')[0]

_CHECKOUT = os.path.dirname(PACKAGE)
_BUNDLED = os.path.join(PACKAGE, 'bundled')  # A wheel has the configs here.
_TOP_LEVEL = ('train', 'eval', 'render')  # In a checkout, the other commands lie in scripts/.
_FILES = {'compile': 'compile_for', 'demo_scene': 'make_demo_scene'}

# The folder that has configs/.
DATA = _BUNDLED if os.path.isdir(_BUNDLED) else _CHECKOUT


def is_checkout() -> bool:
  """Returns whether the program runs from a checkout rather than an installed wheel."""
  return DATA == _CHECKOUT


def _script(command: str) -> str:
  """Returns the path of a command's script, relative to the checkout."""
  name = f'{_FILES.get(command, command)}.py'
  return name if command in _TOP_LEVEL else os.path.join('scripts', name)


def command(name: str) -> list[str]:
  """Returns the first words of a command line that runs a command."""
  if is_checkout():
    return [sys.executable, os.path.join(_CHECKOUT, _script(name))]
  return [sys.executable, '-m', NAME, name]


def install_text(extra: str) -> str:
  """Returns the command that installs an optional dependency, such as 'viewer'."""
  if is_checkout():
    return f'pip install -r requirements-{extra}.txt'
  return f'pip install "mipnerf360-jax[{extra}]"'


def command_text(name: str, *words: str) -> str:
  """Returns a command line as users type it: 'python train.py ...' or 'mipnerf360 train ...'.

  Args:
    name: of the command.
    words: its arguments, which are quoted for bash and zsh.
  """
  program = f'python {_script(name)}' if is_checkout() else f'mipnerf360 {name}'
  return ' '.join([program, *map(_quote, words)])


def train_text(data_dir: str, run: str, config: str, factor: int) -> str:
  """Returns the command line that trains a capture, as users type it.

  Args:
    data_dir: the capture's folder.
    run: the run's folder.
    config: the name of a config or a .gin file.
    factor: divides the size of the photographs.
  """
  flags = {'--config': config, '--data': data_dir, '--out': run, '--factor': str(factor)}
  return command_text('train', *(word for pair in flags.items() for word in pair))


def _quote(word: str) -> str:
  """Quotes a word for a shell, in double quotes where these are safe: most words have quotes."""
  if re.fullmatch(r'[\w@%+:,./-][\w@%+:,./=-]*', word):
    return word
  return shlex.quote(word) if re.search(r'["$`\\!]', word) else f'"{word}"'


def examples(text: str) -> str:
  """Returns a help text whose examples start commands in the way of this installation."""
  if is_checkout():
    return text
  names = {file: name for name, file in _FILES.items()}
  text = re.sub(r'pip install -r\s+requirements-([\w-]+)\.txt', lambda m: install_text(m[1]), text)
  return re.sub(
    r'\bpython (?:scripts/)?(\w+)\.py\b',
    lambda match: f'mipnerf360 {names.get(match[1], match[1])}',
    text,
  )
