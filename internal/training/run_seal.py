"""The seal of a run's folder: run.json, which holds the run's id and the hashes of its files.

It seals config.gin, scene.json and points.npy, as a manifest does a checkpoint. A run of an earlier
version has no seal, and its files are taken as they are.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence

from ..errors import UserError
from ..system import bucket, files

FILE = 'run.json'
CONFIG, SCENE, POINTS = 'config.gin', 'scene.json', 'points.npy'
STAGING = '.staging'  # Holds files that are being written.
_SEALED = (CONFIG, SCENE, POINTS)
_WAY_OUT = (
  'training wrote it. Copy the original back, or run the training command again, which writes it '
  f'anew. If the change is yours, pass it in --gin_bindings, or remove {FILE} to accept it.'
)


class RunFileError(UserError):
  """A file of a run that is not as training wrote it."""


def sha256(path: str) -> str:
  """Returns the SHA-256 of a file, in hexadecimal."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _read(folder: str) -> dict | None:
  """Reads run.json; None if it is missing or damaged."""
  try:
    seal = files.read_json(os.path.join(folder, FILE))
    sums = {str(name): list(accepted) for name, accepted in seal['sha256'].items()}
    notes = [str(text) for text in seal.get('warnings', ())]  # Earlier versions have none.
    return {'id': str(seal['id']), 'config': str(seal['config']), 'sha256': sums, 'warnings': notes}
  except (OSError, files.FileError, LookupError, TypeError, AttributeError):
    return None


def run_id(folder: str) -> str | None:
  """Returns the run's id; None for runs of earlier versions."""
  seal = _read(folder)
  return seal and seal['id']


def warnings(folder: str) -> list[str]:
  """Returns what was doubtful about how the run was trained."""
  seal = _read(folder)
  return seal['warnings'] if seal else []


def _sums(folder: str) -> dict[str, str]:
  paths = {name: os.path.join(folder, name) for name in _SEALED}
  return {name: sha256(path) for name, path in paths.items() if os.path.isfile(path)}


def write(
  folder: str, run: str, config: str, write_files: Callable[[str], None],
  new_warnings: Sequence[str] = (),
) -> None:  # fmt: skip
  """Writes the run's files and their seal.

  The seal is written first and accepts the previous files, too, so it fits if a kill comes between.

  Args:
    folder: the run's folder.
    run: the run's id.
    config: content of config.gin.
    write_files: writes the other files into a given folder.
    new_warnings: added to the run's `warnings`.
  """
  staging = os.path.join(folder, STAGING)
  shutil.rmtree(staging, ignore_errors=True)
  files.write_text(os.path.join(staging, CONFIG), config)
  write_files(staging)
  before, accepted = _read(folder), {name: [new] for name, new in _sums(staging).items()}
  for name, old in _sums(folder).items():
    if name in accepted and (before is None or old in before['sha256'].get(name, ())):
      accepted[name].append(old)
  seal = {'id': run, 'sha256': accepted, 'config': config}
  seal['warnings'] = [*(before['warnings'] if before else ()), *new_warnings]
  files.write_json(os.path.join(folder, FILE), seal, 1)
  for name in accepted:
    os.replace(os.path.join(staging, name), os.path.join(folder, name))
  shutil.rmtree(staging)


def changed_files(folder: str) -> list[str]:
  """Returns the names of sealed files that are not as training wrote them; [] without a seal."""
  sums, seal = _sums(folder), _read(folder)  # In this order, since training writes the seal first.
  accepted = seal['sha256'] if seal else {}
  return [name for name in accepted if sums.get(name) not in accepted[name]]


def check(folder: str) -> None:
  """Checks that the run's files are as training wrote them.

  Settings that were edited in config.gin are used and printed on stderr.

  Raises:
    RunFileError: scene.json has changed, or config.gin was cut.
  """
  changed, seal = changed_files(folder), _read(folder)
  if seal is None:
    if os.path.lexists(os.path.join(folder, FILE)):
      _warn(f'{os.path.join(folder, FILE)} is damaged, so the other files are not verified.')
    return
  if CONFIG in changed:
    _check_edits(os.path.join(folder, CONFIG), seal['config'])
  if SCENE in changed:
    raise RunFileError(f'{os.path.join(folder, SCENE)} has changed since {_WAY_OUT}')
  if POINTS in changed:
    _warn(f'{os.path.join(folder, POINTS)} has changed or is missing; it is only drawn.')


def _warn(text: str) -> None:
  print(bucket.shown(f'Warning: {text}'), file=sys.stderr)


def _check_edits(path: str, written: str) -> None:
  """Warns of edited settings; raises RunFileError if settings are missing."""
  text, written = files.read_text(path).rstrip(), written.rstrip()
  if text == written:
    return  # Some editors change the last line end.
  names = [re.findall(r'^([\w./]+) =', t, re.MULTILINE) for t in (written, text)]
  missing = [name for name in names[0] if name not in names[1]]
  if missing or written.startswith(text):
    change = 'was cut'
    if not written.startswith(text):
      change = f'has lost {", ".join(missing[:3])}{" and more" if len(missing) > 3 else ""}'
    raise RunFileError(f'{path} {change} since {_WAY_OUT}')
  known = written.splitlines()
  edits = [line for line in text.splitlines() if line.strip() and line not in known]
  _warn(
    f'{path} was edited after training and is used as it is: {"; ".join(edits)[:500] or "spaces"}.'
  )
