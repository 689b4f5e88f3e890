"""Shared parts of the commands: flags, the compilation cache, and error reporting."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax

from . import configs, knobs, plugins
from .devices import memory, processes, program_cache
from .errors import UserError
from .system import bucket, files, installation, progress, signals

_CACHE = 'mipnerf360-jax'
_CACHE_BYTES = 4 << 30
_LIST = '--list_knobs'
_PROCESS_COUNTS = ('JAX_NUM_PROCESSES', 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')

_debug = False
_flags: dict[str, str] = {}  # The flag for each setting that has one, for messages.
_typed: set[str] = set()  # The settings whose flag the user has typed.


def _set_debug() -> None:
  global _debug
  _debug = True


class _Switch(argparse.Action):
  """A flag that calls `const` when it is parsed."""

  def __init__(self, option_strings, dest, const, help):
    super().__init__(option_strings, argparse.SUPPRESS, nargs=0, const=const, help=help)

  def __call__(self, *_):
    self.const()


class _LoadPlugins(argparse.Action):
  """Imports plug-ins as soon as they are parsed: before any settings are read."""

  def __call__(self, parser, namespace, values, option_string=None):
    plugins.load(values)


class _Config(argparse.Action):
  """Puts a config, by name or path, before the files of --gin_configs."""

  def __call__(self, parser, namespace, values, option_string=None):
    if getattr(namespace, self.dest):
      parser.error('--config can be given once; --gin_configs adds more files')
    setattr(namespace, self.dest, values)
    namespace.gin_configs = [configs.config_path(values), *namespace.gin_configs]


class _Setting(argparse.Action):
  """A flag that sets a field of Config, whose name is `const`."""

  def __call__(self, parser, namespace, values, option_string=None):
    setattr(namespace, self.dest, values)
    words, value = (values, tuple(values)) if isinstance(values, list) else ([values], values)
    typed = ' '.join(map(str, (self.option_strings[0], *words)))
    namespace.set_by_flag = {**namespace.set_by_flag, self.const: (typed, value)}


class _Parser(argparse.ArgumentParser):
  """A parser whose --list_knobs works without the other arguments, and after --plugins anywhere."""

  def parse_known_args(self, args=None, namespace=None):
    words = sys.argv[1:] if args is None else list(args)
    lists = any(word.partition('=')[0] == _LIST for word in words)
    if lists and self.get_default('set_by_flag') is not None:
      parser = argparse.ArgumentParser(add_help=False)
      parser.add_argument(_LIST, nargs='?')
      add_plugins_argument(parser)
      print(knobs.listing(parser.parse_known_args(words)[0].list_knobs))
      sys.exit()
    return super().parse_known_args(args, namespace)


def make_parser(description: str) -> argparse.ArgumentParser:
  """Creates a parser with the flags that all commands share.

  The description, with examples, is shown verbatim. If the package is installed by pip, examples
  name the console command instead of scripts.
  """
  parser = _Parser(
    description=installation.examples(description),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--quiet', action=_Switch, const=progress.set_quiet,
    help='print only warnings, errors and results',
  )  # fmt: skip
  parser.add_argument(
    '--debug', action=_Switch, const=_set_debug, help='show the traceback of errors'
  )
  return parser


def add_arguments(parser: argparse.ArgumentParser, with_config: bool = True) -> None:
  """Adds --config, --gin_configs, --gin_bindings, --plugins and --list_knobs.

  All but the first and the last can be repeated and take many values.
  """
  parser.set_defaults(set_by_flag={})
  if with_config:
    parser.add_argument(
      '--config', action=_Config, metavar='NAME',
      help='settings to start from: fast (hash grids, minutes), grid (hash grids, better and '
      'slower), paper (hours), another name in configs/, or a .gin file',
    )  # fmt: skip
  parser.add_argument(
    '--gin_configs',
    nargs='+',
    action='extend',
    default=[],
    metavar='PATH',
    help='more .gin files; later ones win',
  )
  parser.add_argument(
    '--gin_bindings',
    nargs='+',
    action='extend',
    default=[],
    metavar='TEXT',
    help='settings that override files and flags, such as Config.lr_init=0.005',
  )
  parser.add_argument(
    _LIST, nargs='?', metavar='WORD',
    help='print every setting with its default and meaning, or those about a word, and exit',
  )  # fmt: skip
  add_plugins_argument(parser)
  # Accepted and ignored: published command lines pass it.
  parser.add_argument('--logtostderr', action='store_true', help=argparse.SUPPRESS)


def add_plugins_argument(parser: argparse.ArgumentParser) -> None:
  """Adds --plugins, which imports modules of your own that extend this package."""
  parser.add_argument(
    '--plugins', nargs='+', action=_LoadPlugins, default=argparse.SUPPRESS, metavar='MODULE',
    help='modules of your own to import, such as my_package.my_field (see CONTRIBUTING.md)',
  )  # fmt: skip


def add_setting(parser: argparse.ArgumentParser, flag: str, field: str, **options) -> None:
  """Adds a flag that sets a field of Config; `options` are those of `add_argument`."""
  _flags[f'Config.{field}'] = flag
  parser.add_argument(flag, action=_Setting, const=field, **options)


def make_run_parser(description: str) -> argparse.ArgumentParser:
  """Creates a parser for commands on a training run: RUN, --checkpoint_dir, --data, gin flags."""
  parser = make_parser(description)
  parser.add_argument('run', nargs='?', metavar='RUN', help="the training run's folder")
  parser.add_argument('--checkpoint_dir', metavar='DIR', help='the same as RUN')
  add_arguments(parser, with_config=False)
  add_setting(
    parser, '--data', 'data_dir', metavar='DIR', help='folder of the capture, if it has moved'
  )
  _flags['Config.checkpoint_dir'] = 'RUN'
  _typed.add('Config.checkpoint_dir')
  return parser


def bindings(args: argparse.Namespace) -> list[str]:
  """Returns the settings of the command line as bindings: those of flags, then --gin_bindings."""
  _typed.update(f'Config.{field}' for field in args.set_by_flag)
  for name in list(_flags):  # Messages keep the name that was typed.
    if any(re.match(rf'\s*{re.escape(name)}\b', text) for text in args.gin_bindings):
      del _flags[name]
  by_flag = [f'Config.{field} = {value!r}' for field, (_, value) in args.set_by_flag.items()]
  return [*by_flag, *args.gin_bindings]


def load_settings(args: argparse.Namespace) -> configs.Settings:
  """Loads the settings of a command line: gin files, then flags, then --gin_bindings.

  Raises:
    ConfigError: see `configs.load_config`.
  """
  return configs.load_config(args.gin_configs, bindings(args))


def run_text(name: str, folder: str, *words: str) -> str:
  """Returns the command line that runs a command on a training run, as users type it."""
  return installation.command_text(name, folder, *words, *plugins.flags())


def show_notices(settings: configs.Settings, args: argparse.Namespace | None = None) -> None:
  """Prints on stderr which settings and flags have no effect (main process only)."""
  lines = configs.notices(settings)
  for field, (typed, value) in (args.set_by_flag if args else {}).items():
    used = getattr(settings.config, field)
    if used != (os.path.expanduser(value) if isinstance(value, str) else value):
      lines.append(f'{typed} has no effect: --gin_bindings wins, Config.{field} = {used!r}.')
  if processes.is_main():
    for line in lines:
      print(f'Note: {line}', file=sys.stderr)


def in_typed_names(text: str) -> str:
  """Returns a message with flags in place of the settings that they have set.

  Other settings that have a flag keep their names, and the first mention is followed by the flag.
  """
  for name, flag in _flags.items():
    known = rf'\b{re.escape(name)}\b'
    if name in _typed:
      text = re.sub(known, flag, re.sub(rf'{known} = (?=\S)', f'{flag} ', text))
    else:
      text = re.sub(rf'{known}(?! =)', f'{name} ({flag})', text, count=1)
  return text


def show_warnings(report: Mapping[str, Any]) -> None:
  """Prints a capture's warnings (`scene.report`) on stderr, in the main process."""
  if processes.is_main():
    for line in report.get('warnings', ()):  # Older runs have none.
      print(f'Warning: {in_typed_names(line)}', file=sys.stderr)


def run_folder(args: argparse.Namespace) -> str:
  """Returns the run's folder: RUN, or --checkpoint_dir, or else Config.checkpoint_dir.

  Raises:
    ConfigError: none or two are given, or a gin file or binding is invalid.
  """
  if args.run and args.checkpoint_dir and args.run != args.checkpoint_dir:
    raise configs.ConfigError(
      f'Two training runs given: RUN {args.run} and --checkpoint_dir {args.checkpoint_dir}.'
    )
  if args.checkpoint_dir and not args.run:
    _flags['Config.checkpoint_dir'] = '--checkpoint_dir'
  folder = args.run or args.checkpoint_dir or load_settings(args).config.checkpoint_dir
  if not folder:
    raise configs.ConfigError(
      'No training run given: add RUN, its folder, such as runs/my_scene (or --checkpoint_dir RUN).'
    )
  return folder


def _is_of_system(error: Exception) -> bool:
  return isinstance(error, OSError) and error.errno is not None


def _is_of_memory(error: Exception) -> bool:
  """Returns whether the memory of the device or of the computer is exhausted."""
  of_device = isinstance(error, jax.errors.JaxRuntimeError) and memory.is_exhausted(error)
  return of_device or isinstance(error, MemoryError)


def _is_user_error(error: Exception) -> bool:
  """Returns whether the user can fix the cause. `run` then prints one line, no traceback."""
  return isinstance(error, UserError) or _is_of_system(error) or _is_of_memory(error)


def _in_words(error: Exception) -> str:
  """Returns an error's text. Errors of the system and of memory get a text that says what to do."""
  if _is_of_system(error):
    return files.in_words(error)
  if not _is_of_memory(error):
    return str(error)
  said = str(error)[:200] or 'the system says no more'
  return (
    f'There is too little memory ({said}). End other programs that use it (nvidia-smi lists those '
    'of a GPU), or need less: training with Config.micro_batches = 4 gives the same result, '
    'rendering with a smaller Config.render_chunk_size the same pictures.'
  )


def _cache_folder() -> str:
  """Creates and returns the user's folder for compiled programs.

  Raises:
    OSError: the folder cannot be created or written to.
  """
  root = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(root):  # The XDG specification says to ignore relative paths.
    root = os.path.join(os.path.expanduser('~'), '.cache')
  if not os.path.isabs(root):
    raise OSError('no home folder')
  folder = os.path.join(root, _CACHE)
  os.makedirs(folder, exist_ok=True)
  with tempfile.TemporaryFile(dir=folder):
    return folder


def enable_compilation_cache() -> None:
  """Enables JAX's compilation cache in the user's cache folder; call before compiling.

  Its entries are checked (`program_cache`) and, in that folder, limited to 4 GiB.
  Explicit settings win: JAX_COMPILATION_CACHE_DIR, even if empty, and
  JAX_ENABLE_COMPILATION_CACHE=false. Multi-process runs are left alone because only process 0
  writes the cache: on a host of its own, another process would miss programs that process 0 finds,
  and GPUs that autotune kernels together would wait for each other.
  """
  program_cache.install()
  config = jax.config
  configured = 'JAX_COMPILATION_CACHE_DIR' in os.environ or config.jax_compilation_cache_dir
  several = any(os.environ.get(name) not in (None, '', '1') for name in _PROCESS_COUNTS)
  if configured or several or not config.jax_enable_compilation_cache:
    return
  try:
    config.update('jax_compilation_cache_dir', _cache_folder())
  except OSError as error:
    print(
      f'Compiled programs are not cached: {error}. Set JAX_COMPILATION_CACHE_DIR to a folder.',
      file=sys.stderr,
    )
    return
  if 'JAX_COMPILATION_CACHE_MAX_SIZE' not in os.environ:
    config.update('jax_compilation_cache_max_size', _CACHE_BYTES)
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    # The default of one second skips programs that slow down a start.
    config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def _end(code: int, at_once: bool = False) -> None:
  """Exits; `at_once` without Python's own cleaning up, as always in a multi-process run.

  A regular exit would wait for the other processes, and they for this one. After a signal that
  arrived while XLA compiled, it would crash (jaxlib 0.10.2 destroys what is half made too late).
  """
  if not (at_once or processes.is_joined()):
    sys.exit(code)
  if not processes.is_joined():
    for thread in threading.enumerate():  # They may be writing files. A regular exit waits too.
      if not (thread.daemon or thread is threading.current_thread()):
        thread.join()
  bucket.close()  # Which os._exit would leave out.
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError):
      stream.flush()
  os._exit(code)


def run(main: Callable[[], None]) -> None:
  """Runs a command's main function with the compilation cache, signal handling and error reports.

  A UserError, an OSError of the system, too little memory, and the death of another process of the
  run are printed as one line on stderr, with exit code 1; --debug adds the traceback. Other errors
  keep their traceback. SIGTERM exits with 143, SIGINT with 130 and a closed output pipe with 141,
  as in shells.
  """
  _flags.clear()
  _typed.clear()
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # Log files show each line immediately.
      # A terminal that lacks a letter shows its code.
      stream.reconfigure(line_buffering=True, errors='backslashreplace')
  try:
    with signals.listening():
      enable_compilation_cache()
      try:
        main()
        processes.leave()  # Ends together: another process may still be receiving from this one.
      except BrokenPipeError:  # From `print`, or from another pipe than the output.
        if not signals.stop_for_closed_output():
          raise
  except signals.Stopped as stop:
    progress.close()
    print(f'Stopped by {stop.name}.', file=sys.stderr)
    _end(stop.exit_code, at_once=True)
  except Exception as error:
    progress.close()
    message = in_typed_names(bucket.shown(' '.join(_in_words(error).split())))
    user_error = _is_user_error(error)
    of_another = processes.is_of_another_process(error)
    if not (user_error or of_another or processes.is_joined()):
      raise
    if _debug or not (user_error or of_another):
      traceback.print_exc()
    if user_error:
      print(f'Error: {message}', file=sys.stderr)
    elif of_another:
      print(
        f'Error: process {jax.process_index()} of {jax.process_count()} ends '
        'because another process has ended or cannot be reached; see its output. Start all '
        f'processes with the same command again to resume from the newest checkpoint. '
        f'({message[:200]})',
        file=sys.stderr,
      )
    _end(1)
  finally:
    bucket.close()
