"""What the command lines share: flags, and how errors are told."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable

from internal import configs

_ROOMS = os.path.dirname(os.path.abspath(__file__))


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


def parse_run_arguments(description: str, argv: list[str] | None = None) -> argparse.Namespace:
  """The flags of a program that works on a training run: the above and --checkpoint_dir."""
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--checkpoint_dir',
    metavar='DIR',
    help="the training run's folder; its own config counts, with --gin_bindings on top",
  )
  add_arguments(parser)
  return parser.parse_args(argv)


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
  """Whether a person can mend what an error tells of, so that no traceback is wanted.

  By this program's custom those are the ValueErrors that its own modules raise (not those that a
  library raises inside, which are bugs of ours), and what the operating system says of a file.
  """
  if isinstance(error, OSError) and error.errno is not None:
    return True
  raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
  folder = os.path.dirname(os.path.abspath(raised_in))
  ours = folder == os.path.dirname(_ROOMS) or (folder + os.sep).startswith(_ROOMS + os.sep)
  return ours and isinstance(error, (ValueError, OSError))


def run(main: Callable[[], None]) -> None:
  """Calls main; a user's error becomes one line on stderr and exit code 1.

  Any other error keeps its traceback; an interruption exits with 130, as shells do.
  """
  try:
    main()
  except KeyboardInterrupt:
    print('Interrupted.', file=sys.stderr)
    sys.exit(130)
  except Exception as error:
    if not _is_for_the_user(error):
      raise
    print(f'Error: {" ".join(str(error).split())}', file=sys.stderr)
    sys.exit(1)
