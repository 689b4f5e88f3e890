"""What the command lines share: flags, the compilation cache, and how errors are told."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable

import jax

from . import configs
from .devices import processes
from .errors import UserError
from .system import installation, progress, signals

_CACHE = 'mipnerf360-jax'
_PROCESS_COUNTS = ('JAX_NUM_PROCESSES', 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')

_debug = False


def _set_debug() -> None:
  global _debug
  _debug = True


class _Switch(argparse.Action):
  """A flag that calls `const` where it is met."""

  def __init__(self, option_strings, dest, const, help):
    super().__init__(option_strings, argparse.SUPPRESS, nargs=0, const=const, help=help)

  def __call__(self, *_):
    self.const()


def make_parser(description: str) -> argparse.ArgumentParser:
  """A program's flags: those that all programs have, to begin with.

  The description is shown as it is written: what the program does, and examples. Installed by pip,
  examples name the console command.
  """
  if not installation.is_checkout():
    description = re.sub(r'\bpython (?:scripts/)?(\w+)\.py\b', r'mipnerf360 \1', description)
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--quiet', action=_Switch, const=progress.set_quiet,
    help='say nothing but warnings, errors and results',
  )  # fmt: skip
  parser.add_argument(
    '--debug', action=_Switch, const=_set_debug, help='show where in the code an error comes from'
  )
  return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds --gin_configs and --gin_bindings, each repeatable and taking several values."""
  parser.add_argument(
    '--gin_configs', nargs='+', action='extend', default=[], metavar='PATH', help='.gin files'
  )
  parser.add_argument(
    '--gin_bindings',
    nargs='+',
    action='extend',
    default=[],
    metavar='TEXT',
    help='settings on top of the files, e.g. "Config.factor = 4"',
  )
  # Command lines in print carry it; there is nothing for it to do.
  parser.add_argument('--logtostderr', action='store_true', help=argparse.SUPPRESS)


def make_run_parser(description: str) -> argparse.ArgumentParser:
  """The flags of a program that works on a training run: the above and --checkpoint_dir."""
  parser = make_parser(description)
  parser.add_argument(
    '--checkpoint_dir',
    metavar='DIR',
    help="the training run's folder; its own config counts, with --gin_bindings on top",
  )
  add_arguments(parser)
  return parser


def show_notices(settings: configs.Settings) -> None:
  """Says on stderr, by the main process, what of the settings has no effect."""
  if processes.is_main():
    for line in configs.notices(settings):
      print(f'Note: {line}', file=sys.stderr)


def run_folder(args: argparse.Namespace) -> str:
  """The training run that the flags name, by --checkpoint_dir or by Config.checkpoint_dir.

  Raises:
    ConfigError: neither is given, or a gin file or binding cannot be used.
  """
  folder = args.checkpoint_dir
  if not folder:
    folder = configs.load_config(args.gin_configs, args.gin_bindings).config.checkpoint_dir
  if not folder:
    raise configs.ConfigError('Which training run? Say --checkpoint_dir DIR.')
  return folder


def _is_for_the_user(error: Exception) -> bool:
  """Whether a person can fix the cause: a UserError, or a file that the system refuses."""
  return isinstance(error, UserError) or (isinstance(error, OSError) and error.errno is not None)


def _cache_folder() -> str:
  """Where this user's compiled programs are kept, made and found writable.

  Raises:
    OSError: there is no such place.
  """
  root = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(root):  # Its specification says to ignore others.
    root = os.path.join(os.path.expanduser('~'), '.cache')
  if not os.path.isabs(root):
    raise OSError('no home folder')
  folder = os.path.join(root, _CACHE)
  os.makedirs(folder, exist_ok=True)
  with tempfile.TemporaryFile(dir=folder):
    return folder


def enable_compilation_cache() -> None:
  """Keeps compiled programs for the next start, in the user's cache folder; call before compiling.

  What JAX was told already counts: a JAX_COMPILATION_CACHE_DIR, even an empty one, and
  JAX_ENABLE_COMPILATION_CACHE=false. Several processes are left alone, since only the first one
  writes: with folders of their own the others would miss what it finds, and GPUs whose processes
  share the search for the fastest kernels would wait for each other.
  """
  config = jax.config
  told = 'JAX_COMPILATION_CACHE_DIR' in os.environ or config.jax_compilation_cache_dir
  several = any(os.environ.get(name) not in (None, '', '1') for name in _PROCESS_COUNTS)
  if told or several or not config.jax_enable_compilation_cache:
    return
  try:
    config.update('jax_compilation_cache_dir', _cache_folder())
  except OSError as error:
    print(
      f'Compiled programs are not kept: {error}. JAX_COMPILATION_CACHE_DIR can say where.',
      file=sys.stderr,
    )
    return
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    # A second, which is the default, leaves out programs that a start waits for.
    config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def _end(code: int) -> None:
  """Ends the process: where others are still joined to it, at once, so that they notice.

  Else it would wait for them at its exit, and they for it.
  """
  if not processes.is_joined():
    sys.exit(code)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def run(main: Callable[[], None]) -> None:
  """Calls main; a user's error becomes one line on stderr and exit code 1 (--debug shows more).

  So does what is seen of another process that has ended. Any other error keeps its traceback.
  SIGTERM exits with 143 and SIGINT with 130, as shells do. Programs that main compiles are kept
  for the next start.
  """
  if isinstance(sys.stdout, io.TextIOWrapper):  # In a log file, too, lines come as they are said.
    sys.stdout.reconfigure(line_buffering=True)
  try:
    with signals.listening():
      enable_compilation_cache()
      main()
  except signals.Stopped as stop:
    progress.close()
    print(f'Stopped by {stop.name}.', file=sys.stderr)
    _end(stop.exit_code)
  except Exception as error:
    progress.close()
    said = ' '.join(str(error).split())
    for_the_user = _is_for_the_user(error)
    of_another = processes.is_of_another_process(error)
    if not (for_the_user or of_another or processes.is_joined()):
      raise
    if _debug or not (for_the_user or of_another):
      traceback.print_exc()
    if for_the_user:
      print(f'Error: {said}', file=sys.stderr)
    elif of_another:
      print(
        f'Error: process {jax.process_index()} of {jax.process_count()} ends, as another one has '
        'ended or cannot be reached; that one may say why. The same command, started for all of '
        f'them again, goes on from the newest checkpoint. ({said[:200]})',
        file=sys.stderr,
      )
    _end(1)
