"""The command line: `mipnerf360 COMMAND ...`, or `python train.py ...` in a checkout."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence

COMMANDS = {
  'train': 'train a scene',
  'eval': 'evaluate a trained scene on its test images',
  'render': 'render a video of a trained scene',
  'view': 'open a trained scene in a web page',
  'poses': 'pose photographs or a video',
  'export': 'export points, a mesh and depth maps',
  'tables': 'make tables of results',
  'run_dataset': 'train and evaluate all scenes of a dataset',
  'download': 'download a dataset',
  'reproduce': 'repeat a row of the results table',
  'ablate': 'train variants of one method and tabulate them',
  'benchmark': 'measure the speed of training and rendering',
  'scaling': 'measure how training scales with devices',
  'compile': 'compile for a TPU that is only described',
  'demo_scene': 'make the demo capture',
}

_WITHOUT_JAX = ('demo_scene',)  # Importing JAX would take longer than running these.


def main(argv: Sequence[str] | None = None) -> None:
  """Runs a command with the arguments in `sys.argv`.

  Args:
    argv: [command] if a script runs it; None takes the command from `sys.argv[1]`.
  """
  # Until the command handles it: Python's KeyboardInterrupt prints a traceback, or is dropped where
  # exceptions are ignored, and importing JAX takes seconds.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  _set_up_text()
  words = [*(argv or ()), *map(_expand_home, sys.argv[1:])]
  name = words[0] if words else '--help'
  if name in ('-h', '--help'):
    print(_usage())
    return
  if name not in COMMANDS:
    sys.exit(f'Error: no command {name!r}.\n\n{_usage()}')
  if argv is None:
    sys.argv[0] = f'{os.path.basename(sys.argv[0])} {name}'  # For usage lines.
  sys.argv[1:] = words[1:]
  program = importlib.import_module(f'.commands.{name}', __package__)
  if name in _WITHOUT_JAX:
    from .system import files, signals

    try:
      with signals.listening():
        program.main()
    except signals.Stopped as stop:
      sys.exit(stop.exit_code)
    except OSError as error:
      sys.exit(f'Error: {files.in_words(error)}')
  else:
    importlib.import_module('.cli', __package__).run(program.main)


def _set_up_text() -> None:
  """Makes names of any language usable in any locale, and printable on any terminal."""
  if sys.getfilesystemencoding() != 'utf-8' and sys.executable:
    os.execv(sys.executable, [sys.executable, '-X', 'utf8', *sys.orig_argv[1:]])
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')


def _expand_home(word: str) -> str:
  """Expands ~ in `~/runs` and `--out=~/runs`; shells leave the latter alone."""
  flag, equals, value = word.partition('=')
  if equals and flag.startswith('--'):
    return f'{flag}={os.path.expanduser(value)}'
  return os.path.expanduser(word)


def _usage() -> str:
  rows = '\n'.join(f'  {name:<13} {what}' for name, what in COMMANDS.items())
  return (
    f'usage: mipnerf360 COMMAND ...\n\ncommands:\n{rows}\n\n'
    'Run mipnerf360 COMMAND --help for its flags.'
  )


if __name__ == '__main__':
  main()
