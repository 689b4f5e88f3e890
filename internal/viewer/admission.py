"""Decides which requests the viewer's server answers, by a token in the address and the Origin.

A browser lets every page that it shows connect to servers on the same machine. So each request, and
each websocket handshake, must have the secret token that the printed address has as its first
segment. A request that a page makes must also come from the viewer's own page: its Origin must be
an address of this server, or one of those passed with --origin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hmac
import http
import secrets
import socket
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Sequence

from ..errors import UserError

LOCAL = ('localhost', '127.0.0.1', '::1')
_WILDCARDS = ('0.0.0.0', '::', '')
_PORTS = {'http': 80, 'https': 443}
_MAX_REPORTS = 20


class ViewerError(UserError):
  """A viewer that cannot be opened, or an input on its page that is out of range."""


def parse_origin(text: str) -> tuple[str, str, int]:
  """Parses an origin such as 'https://example.org:8443'.

  Returns:
    The scheme, the host in lower case, and the port.

  Raises:
    ValueError: the text is not an origin; a path after it is not allowed either.
  """
  parts = urllib.parse.urlsplit(text)
  if parts.scheme not in _PORTS or not parts.hostname or text.count('/') != 2:
    raise ValueError(text)
  return parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme]


def _checked_origin(text: str) -> tuple[str, str, int]:
  try:
    return parse_origin(text.rstrip('/'))
  except ValueError:
    raise ViewerError(
      '--origin must be a scheme, a host and maybe a port, as in https://example.org or '
      f'http://localhost:9000; got {text!r}.'
    ) from None


class Admission:
  """Checks the requests to one server.

  Attributes:
    token: the first segment of every address that the server answers.
    is_installed: whether a server has been started that checks its requests here.
    additions: an `additions.Additions` to viser's page, or None.
  """

  def __init__(self, host: str, origins: Sequence[str] = ()):
    """Takes the host that the server binds to, and further origins to admit.

    Raises:
      ViewerError: an origin is malformed.
    """
    self.token, self.is_installed = secrets.token_urlsafe(16), False
    self.additions = None
    self._host, self._reported = host, set()
    self._names = {*LOCAL, host.lower()}
    if host not in LOCAL:
      self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    self._origins = {_checked_origin(origin) for origin in origins}

  def address(self, port: int) -> str:
    """Returns the address of the page, which contains the token."""
    host = 'localhost' if self._host in LOCAL else self._host
    host = socket.gethostname() if host in _WILDCARDS else host
    return f'http://{f"[{host}]" if ":" in host else host}:{port}/{self.token}/'

  @contextlib.contextmanager
  def installed(self) -> Iterator[None]:
    """Makes the websocket server that viser starts in this context check its requests.

    viser has no parameter for this, so the function that it calls to start the server is replaced
    for as long as that takes.
    """
    import websockets.asyncio.server as module

    serve = module.serve
    module.serve = functools.partial(self._serve, serve)
    try:
      yield
    finally:
      module.serve = serve

  def _serve(self, serve: Callable, *args, process_request: Callable | None = None, **kwargs):
    self.is_installed = True
    check = functools.partial(self._process_request, process_request or (lambda *_: None))
    return serve(*args, process_request=check, **kwargs)

  def _process_request(self, following: Callable, connection, request):
    """Refuses a request, or hands it to viser without the token."""
    path, query, more = request.path.partition('?')
    _, token, *rest = [*path.split('/', 2), ''][:3]
    if not hmac.compare_digest(token.encode('utf-8', 'replace'), self.token.encode()):
      return connection.respond(
        http.HTTPStatus.FORBIDDEN, 'Open the address that the viewer printed, with its token.\n'
      )
    for origin in request.headers.get_all('Origin'):
      if not self._is_admitted(origin, connection.local_address):
        self._report(origin)
        return connection.respond(
          http.HTTPStatus.FORBIDDEN, 'This page may not use the viewer; see --origin.\n'
        )
    following = functools.partial(following, connection)
    request = dataclasses.replace(request, path=f'/{"".join(rest)}{query}{more}')
    return self.additions.answer(request, following) if self.additions else following(request)

  def _is_admitted(self, origin: str, local_address: tuple) -> bool:
    """Returns whether an Origin is the server's own or one of --origin.

    `local_address` is the address and port at which the server received the request.
    """
    try:
      scheme, host, port = parsed = parse_origin(origin)
    except ValueError:  # Also 'null', the origin of files and sandboxed frames.
      return False
    own = scheme == 'http' and host in {*self._names, local_address[0]} and port == local_address[1]
    return own or parsed in self._origins

  def _report(self, origin: str) -> None:
    """Says on stderr, once for each origin, how to admit it."""
    if origin not in self._reported and len(self._reported) < _MAX_REPORTS:
      self._reported.add(origin)
      print(
        f'Warning: the viewer refused a connection from a page of {origin[:200]!r}. If that is '
        'your proxy or forwarded port, pass it as --origin.',
        file=sys.stderr,
      )
