"""SIGTERM and SIGINT: a program that is asked to end does so where nothing is lost.

The first signal raises `Stopped`, at once or, inside `postponed`, when the program sees fit. A
second one ends the process on the spot, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_REQUEST = 1.0  # Seconds: `timeout` and others send their one request twice in a row.


class Stopped(BaseException):
  """A signal asked the program to end; not an Exception, so that nobody takes it for an error."""

  def __init__(self, signum: int):
    super().__init__(signum)
    self.signum = signum

  @property
  def name(self) -> str:
    return signal.Signals(self.signum).name

  @property
  def exit_code(self) -> int:
    """As shells tell it: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + self.signum


class Request:
  """What `postponed` yields: the signal that came, 0 while none has."""

  signum = 0


_request: Request | None = None  # Set while a request is to wait.


def _handle(signum: int, _) -> None:
  if _request is None:
    raise Stopped(signum)
  _request.signum = _request.signum or signum


def _end_at_the_second(pipe: int) -> None:
  """Ends the process at its second signal, for which Python's handlers await the end of C code."""
  first = None
  while number := os.read(pipe, 1):
    if number[0] not in _SIGNALS:
      continue
    now = time.monotonic()
    first = now if first is None else first
    if now - first > _ONE_REQUEST:
      os._exit(128 + number[0])
  os.close(pipe)


@contextlib.contextmanager
def listening() -> Iterator[None]:
  """Within, both signals are taken; of the main thread."""
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  handlers = {signum: signal.signal(signum, _handle) for signum in _SIGNALS}
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  threading.Thread(target=_end_at_the_second, args=(reading,), daemon=True).start()
  try:
    yield
  finally:
    for signum, handler in handlers.items():
      signal.signal(signum, handler)
    signal.set_wakeup_fd(-1)
    os.close(writing)  # Which ends the thread.


def listen_again() -> None:
  """Takes SIGTERM back from a library that has set a handler of its own below Python's."""
  signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@contextlib.contextmanager
def postponed() -> Iterator[Request]:
  """Within, a signal is only noted; the block looks at `signum` where it can end."""
  global _request
  _request = Request()
  try:
    yield _request
  finally:
    _request = None
