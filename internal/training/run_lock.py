"""The lock of a folder: of a run, which keeps a second training out, or of a command's output.

The file train.lock, or output.lock, names its holder: host, process and start. It is stale if that
process is gone. For a process that cannot be looked up (another host, a container, before a
reboot), and for a lock that was copied with its folder, the holder's heartbeat decides: it touches
the file every few seconds. This works on shared disks without flock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from typing import NamedTuple

from ..devices import processes
from ..errors import UserError
from ..system import bucket, files

FILE = 'train.lock'
OUTPUT_FILE = 'output.lock'
_HEARTBEAT = 5.0  # Seconds.
_STALE = 30.0  # Seconds without a heartbeat.


class RunLockError(UserError):
  """The folder belongs to another program, or has vanished."""


class Use(NamedTuple):
  """What a folder is locked for, and the words for it."""

  file: str
  doing: str
  way_out: str


TRAINING = Use(FILE, 'trained', 'Wait for it, stop it, or set another Config.checkpoint_dir.')


def _read(path: str) -> str:
  """Returns a file's text, '' if it cannot be read."""
  try:
    return files.read_text(path)
  except (OSError, files.FileError):
    return ''


def _started(pid: int) -> str | None:
  """Returns a process's start in clock ticks since the boot; None if it has ended."""
  fields = _read(f'/proc/{pid}/stat').rpartition(')')[2].split()  # From field 3, the state.
  return fields[19] if len(fields) > 19 and fields[0] not in 'ZX' else None


def _process() -> dict:
  """Describes this process. Numbers of processes are only unique within a boot and a namespace."""
  pid, namespace = os.getpid(), ''
  with contextlib.suppress(OSError):
    namespace = os.readlink('/proc/self/ns/pid')
  return {
    'host': socket.gethostname(),
    'boot': _read('/proc/sys/kernel/random/boot_id').strip(),
    'namespace': namespace,
    'pid': pid,
    'started': _started(pid),
  }


def _holder(text: str | bytes) -> dict:
  """Parses a lock file; damaged ones name nobody."""
  try:
    holder = json.loads(text)
  except (ValueError, RecursionError):
    holder = None
  return holder if isinstance(holder, dict) else {}


def _beat_and_inode(path: str) -> tuple[float | None, int | None]:
  """Returns the time of the last heartbeat by the disk's clock, and the inode; None if gone."""
  try:
    with open(path, 'rb') as f:  # Opening refreshes what NFS has cached.
      status = os.fstat(f.fileno())
      return status.st_mtime, status.st_ino
  except FileNotFoundError:
    return None, None


def _beat(path: str) -> float | None:
  return _beat_and_inode(path)[0]


def _disk_time(folder: str) -> float:
  with tempfile.NamedTemporaryFile(dir=folder, prefix='.clock') as f:
    os.utime(f.name)
    return os.stat(f.name).st_mtime


def _is_alive(holder: dict) -> bool | None:
  """Returns whether a lock's holder is alive; None if it cannot be looked up from here."""
  this, keys = _process(), ('host', 'boot', 'namespace')
  if not all(this[key] and holder.get(key) == this[key] for key in keys):
    return None
  pid = holder.get('pid')
  return isinstance(pid, int) and _started(pid) == holder.get('started') is not None


def _say_waiting(path: str) -> None:
  print(f'{path} exists; waiting for a heartbeat of the program that wrote it.', file=sys.stderr)


def _is_held(path: str, holder: dict) -> bool:
  """Returns whether a lock's holder is alive; waits for a heartbeat if only that can tell."""
  last, inode = _beat_and_inode(path)
  is_copy = holder.get('inode', inode) != inode  # Its holder trains in another folder.
  if not is_copy and (alive := _is_alive(holder)) is not None:
    return alive
  _say_waiting(path)
  age = max(0.0, _disk_time(os.path.dirname(path)) - (last or 0))
  end = time.monotonic() + _STALE - age
  while _beat(path) == last is not None:
    if time.monotonic() >= end:
      return False
    time.sleep(min(_HEARTBEAT / 10, _STALE / 10))
  return _beat(path) is not None


def _refuse(path: str, holder: dict, use: Use) -> None:
  folder = os.path.dirname(path)
  raise RunLockError(
    f'{folder} is being {use.doing} by process {holder.get("pid", "unknown")} on '
    f'{holder.get("host", "an unknown host")} since {holder.get("since", "an unknown time")}. '
    f'{use.way_out} If you know that it has ended, remove {path} and try again.'
  )


def _about() -> dict:
  """Describes this process as the holder of a lock that it is about to write."""
  return {**_process(), 'since': time.strftime('%Y-%m-%d %H:%M:%S %z'), 'id': uuid.uuid4().hex}


def _vanished(folder: str, state: str) -> RunLockError:
  return RunLockError(
    f'{folder} {state}: it was moved, removed or emptied during training. Nothing more is '
    'written there. Run the same command again to resume from the newest checkpoint that is left.'
  )


class _Lock:
  """A lock that this process holds."""

  def __init__(self, folder: str, use: Use = TRAINING):
    self.path, self._use = os.path.join(folder, use.file), use
    self._text, self._end = '', threading.Event()
    os.makedirs(folder, exist_ok=True)
    while not self._create():
      text = _read(self.path)
      if _is_held(self.path, _holder(text)):
        _refuse(self.path, _holder(text), self._use)
      self._remove_stale(text)
    threading.Thread(target=self._keep_alive, daemon=True).start()

  def _create(self) -> bool:
    """Creates the lock file; returns False if there is one."""
    try:
      opened = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
      return False
    self._text = json.dumps({**_about(), 'inode': os.fstat(opened).st_ino})
    try:
      with files.named_errors(self.path), open(opened, 'w', encoding='utf-8') as f:
        f.write(self._text)
    except OSError:
      os.remove(self.path)
      raise
    return True

  def _remove_stale(self, text: str) -> None:
    """Removes a stale lock; one that another start has replaced meanwhile is put back."""
    aside = f'{self.path}.{uuid.uuid4().hex}'
    with contextlib.suppress(FileNotFoundError):
      os.rename(self.path, aside)
      if _read(aside) != text:
        os.rename(aside, self.path)
        _refuse(self.path, _holder(_read(self.path)), self._use)
      os.remove(aside)

  def _keep_alive(self) -> None:
    while not self._end.wait(_HEARTBEAT):
      with contextlib.suppress(OSError):
        if _read(self.path) == self._text:
          os.utime(self.path)

  def check(self) -> None:
    """Raises RunLockError if the folder has vanished or another training has taken it over."""
    text = _read(self.path)
    if not text:  # Another start may have moved it aside for a moment (`_remove_stale`).
      time.sleep(0.1)
      text = _read(self.path)
    if text == self._text:
      return
    if text:
      _refuse(self.path, _holder(text), self._use)
    if os.path.lexists(self.path):
      return  # A disk that does not answer; what is written next will say so.
    folder = os.path.dirname(self.path)
    state = f'no longer has {self._use.file}' if os.path.isdir(folder) else 'has vanished'
    raise _vanished(folder, state)

  confirm = check

  def release(self) -> None:
    self._end.set()
    with contextlib.suppress(OSError):
      if _read(self.path) == self._text:
        os.remove(self.path)


class _BucketLock:
  """A lock in a bucket that this process holds."""

  def __init__(self, copy: bucket.WorkingCopy, folder: str = '', use: Use = TRAINING):
    self._copy, self._use, self._name = copy, use, f'{folder}/{use.file}'.lstrip('/')
    self.path = f'{copy.address}/{self._name}'
    self._text = json.dumps({**_about(), 'address': copy.address}).encode()
    self._generation, self._taken_by = self._take(), None  # `_taken_by`: the lock found instead.
    self._beating, self._end = threading.Lock(), threading.Event()
    if self._name not in copy.names():  # Else this would be noticed at the first checkpoint.
      self.release()
      raise bucket.BucketError(f'{copy.address} can be written but not listed. {bucket.ALLOW}.')
    threading.Thread(target=self._keep_alive, daemon=True).start()

  def _take(self) -> bytes:
    """Writes the lock once it is free or stale, and returns its generation."""
    while True:
      text, generation = self._copy.read(self._name)
      if text is not None and self._is_held(holder := _holder(text), generation):
        _refuse(self.path, holder, self._use)
      if own := self._copy.write(self._name, self._text, generation):
        return own

  def _is_held(self, holder: dict, generation: bytes) -> bool:
    """As the function of this name. Heartbeats are counted here, since the clocks may differ."""
    is_copy = holder.get('address') != self._copy.address
    if not is_copy and (alive := _is_alive(holder)) is not None:
      return alive
    _say_waiting(self.path)
    end = time.monotonic() + _STALE
    while time.monotonic() < end:
      time.sleep(_HEARTBEAT / 10)
      text, now = self._copy.read(self._name)
      if now != generation:
        return text is not None
    return False

  def _keep_alive(self) -> None:
    while not self._end.wait(_HEARTBEAT) and self._taken_by is None:
      with contextlib.suppress(bucket.BucketError):
        self._beat()

  def _beat(self) -> None:
    with self._beating:
      if self._taken_by is not None:
        return
      generation = self._copy.write(self._name, self._text, self._generation)
      if not generation:
        text, generation = self._copy.read(self._name)
        if text != self._text:  # Else it is an earlier write whose answer was lost.
          self._taken_by = text or b''
      self._generation = generation

  def check(self) -> None:
    """As `_Lock.check`, by what the last heartbeat found, so without waiting for the network."""
    if self._taken_by:
      _refuse(self.path, _holder(self._taken_by), self._use)
    if self._taken_by is not None:
      raise _vanished(self._copy.address, f'no longer has {self._use.file}')

  def confirm(self) -> None:
    """Checks with a heartbeat.

    Raises:
      RunLockError: as `check`.
      BucketError: the bucket cannot be reached.
    """
    self._beat()
    self.check()

  def release(self) -> None:
    self._end.set()
    with self._beating, contextlib.suppress(bucket.BucketError):
      if self._taken_by is None:
        self._copy.write(self._name, None, self._generation)


_held: _Lock | _BucketLock | None = None  # By this process.


@contextlib.contextmanager
def _locked(folder: str, use: Use) -> Iterator[_Lock | _BucketLock | None]:
  """Locks a folder inside the block; the main process does it for all, which call this."""
  error = lock = None
  if processes.is_main():
    try:
      copy = bucket.of(folder) or bucket.around(folder)
      if copy:
        inner = '' if folder == copy.folder else os.path.relpath(folder, copy.folder)
        lock = _BucketLock(copy, inner, use)
      else:
        lock = _Lock(os.path.abspath(folder), use)
    except (UserError, OSError) as e:
      error = e
  if not processes.on_all(error is None):
    raise error or RunLockError(f'The main process cannot lock {folder}.')
  try:
    yield lock
  finally:
    if lock:
      lock.release()


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
  """Locks a run's folder for training inside the block; all processes call this.

  Raises:
    RunLockError: another training holds it; the message names it.
  """
  global _held
  with _locked(folder, TRAINING) as lock:
    before, _held = _held, lock
    try:
      yield
    finally:
      _held = before


def output(folder: str, flag: str = '') -> contextlib.AbstractContextManager:
  """Locks a folder that a command writes to, such as RUN/render; all processes call this.

  Args:
    folder: the folder.
    flag: the setting or flag that chooses another one, for the message.

  Raises:
    RunLockError: another command writes to it; the message names it.
  """
  way_out = f'Wait for it, stop it, or set another {flag}.' if flag else 'Wait for it, or stop it.'
  return _locked(folder, Use(OUTPUT_FILE, 'written', way_out))


def check() -> None:
  """Checks before writing that the lock is still this process's; does nothing outside `locked`.

  Raises:
    RunLockError: another training has taken the folder over, or it has vanished.
  """
  if _held:
    _held.check()


def confirm() -> None:
  """As `check`, but asks a bucket at once instead of relying on the last heartbeat.

  Raises:
    RunLockError: as `check`.
    BucketError: the bucket cannot be reached.
  """
  if _held:
    _held.confirm()
