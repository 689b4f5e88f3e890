"""Graceful shutdown on SIGTERM and SIGINT, and when nobody reads the output any more.

The first signal raises `Stopped`. Inside `postponed` it is only recorded, and the program stops at
a suitable point. A second signal ends the process immediately. A closed output pipe counts as
SIGPIPE, which Python ignores.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_REQUEST = 1.0  # Seconds; `timeout` and others send one request as two signals.


class Stopped(BaseException):
  """Raised by SIGTERM, SIGINT and SIGPIPE; not an Exception, so error handlers let it pass."""

  def __init__(self, signum: int):
    super().__init__(signum)
    self.signum = signum

  @property
  def name(self) -> str:
    return signal.Signals(self.signum).name

  @property
  def exit_code(self) -> int:
    """The exit code as in shells: 143 for SIGTERM, 130 for SIGINT, 141 for SIGPIPE."""
    return 128 + self.signum


class Request:
  """The recorded signal, yielded by `postponed`; `signum` is 0 until one arrives."""

  signum = 0


_request: Request | None = None  # Set inside `postponed`.


def _handle(signum: int, _) -> None:
  if _request is None:
    raise Stopped(signum)
  _request.signum = _request.signum or signum


def _repeat_dropped(unraisable) -> None:
  """Raises a `Stopped` again that Python has dropped, as in `__del__` and in callbacks of `gc`."""
  if not isinstance(unraisable.exc_value, Stopped):
    sys.__unraisablehook__(unraisable)
    return
  signum = unraisable.exc_value.signum
  # Another signal than the user's, which would count as the second one.
  signal.signal(signal.SIGALRM, lambda *_: _handle(signum, None))
  signal.setitimer(signal.ITIMER_REAL, 0.01)


def stop_for_closed_output() -> bool:
  """Stops the program as by SIGPIPE if stdout or stderr is a pipe that nobody reads.

  What it still prints there is discarded. Returns False if both can be written to.
  """
  closed = False
  for stream in (1, 2):
    poll = select.poll()
    poll.register(stream, 0)  # Errors are always reported.
    if any(event & select.POLLERR for _, event in poll.poll(0)):
      null = os.open(os.devnull, os.O_WRONLY)
      os.dup2(null, stream)
      os.close(null)
      closed = True
  if closed:
    _handle(signal.SIGPIPE, None)
  return closed


def _end_at_the_second(pipe: int) -> None:
  """Ends the process at the second signal; Python's handlers would wait for C code to return."""
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
  """Handles both signals inside the block; call from the main thread."""
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  handlers = {signum: signal.signal(signum, _handle) for signum in _SIGNALS}
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  hook, sys.unraisablehook = sys.unraisablehook, _repeat_dropped
  threading.Thread(target=_end_at_the_second, args=(reading,), daemon=True).start()
  try:
    yield
  finally:
    sys.unraisablehook = hook
    signal.setitimer(signal.ITIMER_REAL, 0)
    for signum, handler in handlers.items():
      signal.signal(signum, handler)
    signal.set_wakeup_fd(-1)
    os.close(writing)  # Ends the thread.


def listen_again() -> None:
  """Reinstalls the SIGTERM handler after a library has replaced it at the C level."""
  signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@contextlib.contextmanager
def postponed() -> Iterator[Request]:
  """Records signals inside the block, which checks `signum` where it can stop."""
  global _request
  _request = Request()
  try:
    yield _request
  finally:
    _request = None
