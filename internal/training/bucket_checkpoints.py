"""Checkpoints of a run in a bucket, where a folder cannot be renamed.

A checkpoint counts once it has its manifest.json, which is uploaded last and removed first. Each is
written and verified in the run's working copy (`system/bucket`), by the same code as local ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from ..system import bucket

FOLDER = 'checkpoints'
MANIFEST = 'manifest.json'
PARTIAL = '.partial'  # Incomplete, or half deleted.
DAMAGED = '.damaged'


def _manifest(step: int | str) -> str:
  return f'{FOLDER}/{step}/{MANIFEST}'


def _folders(copy: bucket.WorkingCopy) -> dict[str, list[str]]:
  """Returns the names of the objects in each checkpoint's folder."""
  folders = {}
  for name in copy.names(f'{FOLDER}/'):
    folders.setdefault(name.split('/')[1], []).append(name)
  return folders


def steps(copy: bucket.WorkingCopy) -> list[str]:
  """Returns the names of the complete checkpoints' folders."""
  return [step for step, names in _folders(copy).items() if _manifest(step) in names]


def fetch(copy: bucket.WorkingCopy, step: int) -> None:
  """Downloads a checkpoint into the working copy, unless it is there.

  Some of its files are missing if training removes it meanwhile.
  """
  if os.path.exists(copy.path(_manifest(step))):
    return
  names = copy.names(f'{FOLDER}/{step}/')
  copy.fetch(name for name in names if name != _manifest(step))
  copy.fetch([_manifest(step)])


def upload(
  copy: bucket.WorkingCopy, step: int, names: Sequence[str], confirm: Callable[[], None]
) -> None:
  """Uploads the run's other files, then a checkpoint's files `names`, its manifest last.

  Args:
    copy: the run, whose working copy has the checkpoint.
    step: its step.
    names: its files, relative to its folder.
    confirm: called before the manifest; raises an error if this process may no longer write.
  """
  copy.push()  # First: each line of metrics.jsonl is written before the checkpoint of its step.
  copy.upload(f'{FOLDER}/{step}/{name}' for name in names if name != MANIFEST)
  confirm()
  copy.upload([_manifest(step)])


def remove(copy: bucket.WorkingCopy, step: int | str) -> None:
  """Removes a checkpoint, its manifest first."""
  copy.delete([_manifest(step)])
  copy.delete(copy.names(f'{FOLDER}/{step}/'))


def tidy(copy: bucket.WorkingCopy, start: int) -> None:
  """Removes incomplete checkpoints; those after `start`, which are damaged, become <step>.damaged.

  To rename one is to copy its objects. If this is interrupted, it starts again.
  """
  folders = _folders(copy)
  for folder, names in folders.items():
    if folder.endswith(PARTIAL) or (folder.isdecimal() and _manifest(folder) not in names):
      copy.delete(names)
    elif folder.isdecimal() and int(folder) > start:
      copy.delete(folders.get(folder + DAMAGED, ()))
      for name in names:
        copy.write(name.replace(f'/{folder}/', f'/{folder}{DAMAGED}/', 1), copy.read(name)[0])
      remove(copy, folder)
