"""Runs in a bucket of Google Cloud Storage (gs://BUCKET/RUN), through a working copy on this disk.

Programs read and write the files of such a run in a local folder, its working copy. `fetch`
downloads files of the run and `push` uploads those that have changed. TensorStore, which writes the
checkpoints, brings the client, so nothing else needs to be installed.

An object appears in a bucket as a whole or not at all, and a write can be made conditional on the
object's generation, which each write changes. There is no rename, so whatever makes several objects
count is written last.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import UserError
from . import files

_PREFIX = 'mipnerf360-run-'  # Of working copies, in the folder for temporary files.
_AT_ONCE = 16  # Files that are transferred at the same time.
# Two minutes in all; TensorStore's own 32 retries take a quarter of an hour.
_RETRIES = {'max_retries': 8, 'initial_delay': '1s', 'max_delay': '32s'}
# Checkpoints (`training/bucket_checkpoints`), and files that are being written.
_LOCAL = re.compile(r'checkpoints/|\.|.*\.part(\.|$)')
_FIRST = 'run.json'  # Each run has it before all other files (`training/run_seal`).
ALLOW = (
  'Log in with `gcloud auth application-default login`, and give the account the role '
  'roles/storage.objectUser on the bucket. A VM needs the access scope cloud-platform'
)
_WAYS_OUT = {
  'PERMISSION_DENIED': ALLOW,
  'UNAUTHENTICATED': ALLOW,
  'NOT_FOUND': 'Create the bucket, or correct its name',
}


class BucketError(UserError):
  """A gs:// address that cannot be used, or a request that failed."""


class WorkingCopy:
  """The objects of a run, and a local folder for some of them.

  Names of objects are relative to the run, with '/': 'checkpoints/60/manifest.json'.

  Attributes:
    address: the run's address, without '/' at the end.
    folder: absolute path of the local folder.
  """

  def __init__(self, address: str):
    import tensorstore  # Takes half a second.

    name, _, path = address.removeprefix('gs://').partition('/')
    spec = {'driver': 'gcs', 'bucket': name, 'path': f'{path}/'}
    self.address = address
    with self._errors(''):
      retries = {'gcs_request_retries': _RETRIES}
      self._store = tensorstore.KvStore.open({**spec, 'context': retries}).result()
    self.folder, self._lock = _make_folder()
    self._pushed: dict[str, tuple[int, int]] = {}  # Size and time of files equal to their objects.

  @contextlib.contextmanager
  def _errors(self, name: str):
    """Raises errors of TensorStore, of many types, as a BucketError about an object."""
    try:
      yield
    except (BucketError, OSError, MemoryError):
      raise
    except Exception as e:
      reason = ' '.join(str(e).partition(' [http_response')[0].split())[:500]
      way_out = _WAYS_OUT.get(reason.partition(':')[0], 'Check the network')
      path = f'{self.address}/{name}'.rstrip('/')
      raise BucketError(f'{path} cannot be used: {reason}. {way_out}, and try again.') from e

  def names(self, prefix: str = '') -> list[str]:
    """Returns the names of all objects that start with `prefix`, sorted.

    Leaves out what cannot be a file of the run, such as 'eval/', which other programs make.

    If listing is not permitted, TensorStore (0.1.86) returns what it has got so far, which may be
    nothing. So the whole run is listed, and must have an object that is there and comes late.
    """
    for _ in range(2):  # A run may begin meanwhile.
      with self._errors(prefix):
        listed = sorted(name.decode() for name in self._store.list().result())
      if _FIRST in listed or self.read(_FIRST)[0] is None:
        return [name for name in listed if name.startswith(prefix) and _is_file_name(name)]
    raise BucketError(f'{self.address} cannot be listed. {ALLOW}.')

  def read(self, name: str) -> tuple[bytes | None, bytes]:
    """Returns an object's content, None if there is none, and its generation."""
    with self._errors(name):
      found = self._store.read(name).result()
    return (found.value if found.state == 'value' else None), found.stamp.generation

  def write(self, name: str, content: bytes | None, generation: bytes | None = None) -> bytes:
    """Writes an object, or deletes it (None).

    Args:
      name: the object.
      content: what it shall hold.
      generation: writes only if the object still has this generation, as returned by `read`.

    Returns:
      The new generation; b'' if the object had another one.
    """
    with self._errors(name):
      return self._store.write(name, content, if_equal=generation).result().generation

  def delete(self, names: Iterable[str]) -> None:
    """Deletes objects, in any order."""
    for part in _parts(names):
      self._results({name: self._store.write(name, None) for name in part})

  def _results(self, futures: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the results of requests about objects, or raises an error once all have ended."""
    for future in futures.values():
      future.exception()
    results = {}
    for name, future in futures.items():
      with self._errors(name):
        results[name] = future.result()
    return results

  def path(self, name: str) -> str:
    """Returns the path of an object's file in the working copy."""
    return os.path.join(self.folder, name)

  def fetch(self, names: Iterable[str]) -> None:
    """Downloads objects, in any order; removes the files of those that do not exist."""
    for part in _parts(names):
      results = self._results({name: self._store.read(name) for name in part})
      for name, found in results.items():
        path = self.path(name)
        if found.state == 'value':
          with files.whole(path) as temporary, open(temporary, 'wb') as f:
            f.write(found.value)
          self._pushed[name] = _state(path)
        elif os.path.exists(path):
          os.remove(path)

  def upload(self, names: Iterable[str]) -> None:
    """Uploads files, in any order."""
    for part in _parts(names):
      futures, states = {}, {name: _state(self.path(name)) for name in part}
      for name in part:
        with open(self.path(name), 'rb') as f:
          futures[name] = self._store.write(name, f.read())
      self._results(futures)
      self._pushed |= states

  def push(self) -> None:
    """Uploads the files that have changed, except for checkpoints; run.json before all others."""
    found = (os.path.join(root, name) for root, _, names in os.walk(self.folder) for name in names)
    names = (os.path.relpath(path, self.folder) for path in sorted(found))
    changed = [name for name in names if not _LOCAL.match(name) and self._has_changed(name)]
    self.upload(name for name in changed if name == _FIRST)
    self.upload(name for name in changed if name != _FIRST)

  def _has_changed(self, name: str) -> bool:
    return self._pushed.get(name) != _state(self.path(name))

  def close(self) -> None:
    """Removes the folder."""
    shutil.rmtree(self.folder, ignore_errors=True)
    os.close(self._lock)


def _is_file_name(name: str) -> bool:
  return not {'', '.', '..'}.intersection(name.split('/'))


def _state(path: str) -> tuple[int, int]:
  status = os.stat(path)
  return status.st_size, status.st_mtime_ns


def _parts(names: Iterable[str]) -> list[list[str]]:
  """Splits names into lists of as many as are transferred at once."""
  names = list(names)
  return [names[k : k + _AT_ONCE] for k in range(0, len(names), _AT_ONCE)]


def _make_folder() -> tuple[str, int]:
  """Makes a folder, locked as long as this process lives; returns it and the lock's descriptor.

  Removes those of processes that were killed.
  """
  root = os.path.abspath(tempfile.gettempdir())
  for old in glob.glob(os.path.join(glob.escape(root), f'{_PREFIX}*')):
    with contextlib.suppress(OSError):  # In use, or another user's.
      lock = _flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
      shutil.rmtree(old, ignore_errors=True)
      os.close(lock)
  while True:
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=root)
    with contextlib.suppress(FileNotFoundError):
      lock = _flock(folder, fcntl.LOCK_EX)
      if os.path.exists(folder):
        return folder, lock
      os.close(lock)  # Another process was faster and took it for an old one.


def _flock(path: str, operation: int) -> int:
  opened = os.open(path, os.O_RDONLY)
  try:
    fcntl.flock(opened, operation)
  except OSError:
    os.close(opened)
    raise
  return opened


_copies: dict[str, WorkingCopy] = {}  # By address.


def is_address(path: str | None) -> bool:
  """Returns whether a path is an address such as gs://bucket/run."""
  return bool(path) and re.match(r'[a-z][a-z0-9]+://', path) is not None


def local(path: str) -> str:
  """Returns the working copy's folder for a gs:// address, and other paths as they are.

  The folder is empty at first.

  Raises:
    BucketError: another kind of address, or one without a run.
  """
  if not is_address(path):
    return path
  address = path.rstrip('/')
  if not re.fullmatch(r'gs://[^/]+(/[^/]+)+', address):
    raise BucketError(f'{path!r} must be a folder, or an address such as gs://BUCKET/RUN.')
  if address not in _copies:
    _copies[address] = WorkingCopy(address)
  return _copies[address].folder


def of(folder: str) -> WorkingCopy | None:
  """Returns the working copy whose folder this is; None for other folders."""
  return next((copy for copy in _copies.values() if copy.folder == folder), None)


def around(path: str) -> WorkingCopy | None:
  """Returns the working copy that a path is in; None for other paths."""
  return next((c for c in _copies.values() if path.startswith(os.path.join(c.folder, ''))), None)


def fetch(folder: str, *prefixes: str) -> None:
  """Downloads all objects that start with one of `prefixes`; does nothing to other folders."""
  if copy := of(folder):
    copy.fetch(name for name in copy.names() if name.startswith(prefixes))


def push(folder: str) -> None:
  """Uploads what has changed in a working copy; does nothing to other folders."""
  if copy := of(folder):
    copy.push()


def shown(text: str) -> str:
  """Returns a message with addresses in place of the folders of working copies."""
  for copy in _copies.values():
    text = text.replace(copy.folder, copy.address)
  return text


@atexit.register
def close() -> None:
  """Removes all working copies."""
  while _copies:
    _copies.popitem()[1].close()
