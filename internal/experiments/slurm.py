"""SLURM job arrays with one task per run."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
from collections.abc import Sequence

from .. import plugins
from ..system import files, installation
from . import runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds --slurm, --submit, and --only, which a task of the array gets."""
  parser.add_argument(
    '--slurm', nargs='?', const='', metavar='OPTIONS',
    help='write a SLURM job array with these options: --slurm="--partition=gpu --time=8:00:00"',
  )  # fmt: skip
  parser.add_argument('--submit', action='store_true', help='submit the job array')
  parser.add_argument(
    '--only',
    nargs='+',
    metavar='RUN',
    help='start only these runs (folders in OUT)',
  )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
  """Parses a command line; --submit alone, which would run everything here, is an error."""
  args = parser.parse_args(argv)
  if args.submit and args.slurm is None:
    parser.error('--submit submits the job array of --slurm: add --slurm, or leave out --submit')
  return args


def write(
  args: argparse.Namespace, unfinished: Sequence[runs.Run], out: str, command: Sequence[str]
) -> None:
  """Writes a job array to `out`/slurm.sh, and submits it with --submit.

  Args:
    args: of the program, with the flags of `add_arguments` and gin flags.
    unfinished: the runs.
    out: their folder.
    command: the name of the program and the flags with which a task starts it, except gin flags.
  """
  name, *flags = command
  words = [*installation.command(name), *flags]
  for flag in ('gin_configs', 'gin_bindings'):
    words += [f'--{flag}', *getattr(args, flag)] if getattr(args, flag) else []
  path = os.path.join(out, 'slurm.sh')
  files.write_text(path, script(unfinished, args.slurm, [*words, *plugins.flags()]))
  if args.submit:
    submit(path)
  else:
    print(f'-> {path}; submit it with: sbatch {shlex.quote(path)}')
  print('When the jobs are done, the same command without --slurm prints the table.')


def submit(path: str) -> None:
  """Calls sbatch.

  Raises:
    RunError: there is no sbatch, or it did not accept the script.
  """
  try:
    subprocess.run(['sbatch', os.path.abspath(path)], check=True)
  except (OSError, subprocess.CalledProcessError) as error:
    raise runs.RunError(
      f'sbatch did not accept {path}: {error} Submit it on a SLURM login node: '
      f'sbatch {shlex.quote(path)}'
    ) from None


def script(all_runs: Sequence[runs.Run], options: str, command: Sequence[str]) -> str:
  """Returns the script of a SLURM job array with one task per run.

  Args:
    all_runs: the runs, all in one folder.
    options: further options for sbatch, quoted as in a shell.
    command: a task's command, to which `--only RUN` is appended.

  Raises:
    RunError: an option's quotes do not match, or an option or the folder has a control character.
  """
  out = os.path.dirname(all_runs[0].folder).replace('%', '%%')  # SLURM expands %A.
  directives = [
    ['--job-name=mipnerf360'],
    [f'--array=0-{len(all_runs) - 1}'],
    ['--ntasks=1'],
    ['--gpus=1'],
    [f'--output={out}/slurm_%A_%a.txt'],
    ['--open-mode=append'],
    ['--signal=B:TERM@300'],  # Leaves time to save a checkpoint before the limit.
    *_split_options(options),
  ]
  lines = [
    '#!/bin/bash',
    *map(_directive, directives),
    f'runs=({shlex.join(run.name for run in all_runs)})',
    f'cd {shlex.quote(os.getcwd())} || exit 1',
    '# exec: SLURM sends the signal to this shell, so the program replaces it.',
    f'exec {shlex.join(command)} --only "${{runs[$SLURM_ARRAY_TASK_ID]}}"',
  ]
  return '\n'.join(lines) + '\n'


def _split_options(options: str) -> list[list[str]]:
  """Splits --slurm at its options, each a list of the option and, if separate, its value."""
  try:
    words = shlex.split(options)
  except ValueError as error:
    raise runs.RunError(f'--slurm: {error} in {options!r}.') from None
  split = []
  for word in words:
    if split and not word.startswith('-'):
      split[-1].append(word)
    else:
      split.append([word])
  return split


def _directive(words: Sequence[str]) -> str:
  """Returns an #SBATCH line, quoted; sbatch unquotes it as a shell does, but reads single lines."""
  for word in words:
    if re.search(r'[\x00-\x1f\x7f]', word):
      raise runs.RunError(
        f'A SLURM script cannot have the option {word!r}: it contains a line break or another '
        'control character. Change --slurm, or choose another --out.'
      )
  return ' '.join(['#SBATCH', *map(_quote_option, words)])


def _quote_option(word: str) -> str:
  """Quotes a word as a shell would; of --name=value only the value."""
  name, equals, value = word.partition('=')
  if equals and name == shlex.quote(name):
    return f'{name}={shlex.quote(value)}'
  return shlex.quote(word)
