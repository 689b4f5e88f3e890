"""A stand-in for Google Cloud Storage: the part of its JSON API for whole objects, in memory.

TensorStore's driver for gs:// addresses talks to it if TENSORSTORE_GCS_HTTP_URL is its address. As
in Cloud Storage, an object appears as a whole when its upload ends, each write gives it a new
generation, and writes and deletions can require one (`ifGenerationMatch`; 0: no such object).
"""

import contextlib
import http.server
import json
import re
import threading
import urllib.parse
from pathlib import Path

BUCKET = 'stand-in'
RUN = f'gs://{BUCKET}/runs/a'  # A run for tests,
NAME = 'runs/a'  # and what the names of its objects start with.
_PAGE = 3  # Objects in one answer to a listing, so that callers must ask for more.


class Bucket:
  """Objects {name: (content, generation)}, and what a test wants to happen to requests.

  Attributes:
    changes: names of the objects written and, with '-' before, deleted, in order.
    on_change: called with such a name before a change is made; may wait, or drop it by `Dropped`.
    status: HTTP status with which all requests are answered instead, if not 0.
    unlisted: whether listing is not permitted.
  """

  class Dropped(Exception):
    """Ends a request without a change and without an answer."""

  def __init__(self):
    self.objects, self.changes, self.status, self.unlisted = {}, [], 0, False
    self.let_go()
    self._generation, self._lock = 1000, threading.Lock()

  def change(self, name: str, content: bytes | None, expected: str | None = None) -> int | None:
    """Writes or deletes (None) an object; returns its new generation.

    Returns None if its generation is not the expected one.
    """
    entry = f'-{name}' if content is None else name
    self.on_change(entry)
    with self._lock:
      if expected is not None and int(expected) != self.objects.get(name, (b'', 0))[1]:
        return None
      self.changes.append(entry)
      self._generation += 1
      if content is None:
        self.objects.pop(name, None)
      else:
        self.objects[name] = content, self._generation
      return self._generation

  def names(self, prefix: str = '') -> list[str]:
    return sorted(name for name in list(self.objects) if name.startswith(prefix))

  def put(self, folder: Path) -> None:
    """Stores a folder's files as the run's objects."""
    for path in folder.rglob('*'):
      if path.is_file():
        self.change(f'{NAME}/{path.relative_to(folder)}', path.read_bytes())

  def get(self, folder: Path) -> Path:
    """Writes the run's objects as files of a folder."""
    for name in self.names(f'{NAME}/'):
      path = folder / name.removeprefix(f'{NAME}/')
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(self.objects[name][0])
    return folder

  def steps(self, complete: bool = True) -> list[int]:
    """Returns the steps of the run's checkpoints: with a manifest, or else with any object."""
    what = 'manifest.json$' if complete else ''
    found = (re.match(rf'{NAME}/checkpoints/(\d+)/{what}', name) for name in self.names())
    return sorted({int(match[1]) for match in found if match})

  def hold(self, pattern: str, nth: int = 1) -> tuple[threading.Event, threading.Event]:
    """Makes a change wait: the nth of the run's whose name, as in `changes`, matches `pattern`.

    Returns:
      Two events: the change has been reached; it shall be dropped, as are all that follow it.
    """
    reached, drop, matching = threading.Event(), threading.Event(), []

    def on_change(name):
      if re.fullmatch(pattern, name.replace(f'{NAME}/', '')):
        matching.append(name)
      if len(matching) >= nth:
        reached.set()
        drop.wait()
        raise Bucket.Dropped

    self.on_change = on_change
    return reached, drop

  def let_go(self) -> None:
    """Ends `hold` for changes from now on."""
    self.on_change = lambda name: None


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *_):
    pass

  def _answer(self, status: int, content: bytes = b'', generation: int = 0) -> None:
    self.send_response(status)
    self.send_header('Content-Length', str(len(content)))
    self.send_header('x-goog-generation', str(generation))
    self.end_headers()
    self.wfile.write(content)

  def _handle(self) -> None:
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    name = query.get('name') or urllib.parse.unquote(url.path.partition('/o/')[2])
    content = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    bucket = self.server.bucket
    if status := bucket.status or (
      403 if self.command == 'GET' and bucket.unlisted and not name else 0
    ):
      self._answer(status, b'{"error": {"message": "as the test wants it"}}')
    elif f'/b/{BUCKET}/o' not in url.path:
      self._answer(404, b'{"error": {"message": "The specified bucket does not exist."}}')
    elif self.command == 'GET':
      self._get(name, query) if name else self._list(query)
    else:
      self._change(name, None if self.command == 'DELETE' else content, query)

  def _change(self, name: str, content: bytes | None, query: dict) -> None:
    try:
      existed = name in self.server.bucket.objects
      generation = self.server.bucket.change(name, content, query.get('ifGenerationMatch'))
    except Bucket.Dropped:
      self.close_connection = True
      return
    if content is None:
      self._answer(404 if not existed else 204 if generation else 412)
    else:
      about = json.dumps({'name': name, 'generation': str(generation)}).encode()
      self._answer(200 if generation else 412, about)

  def _get(self, name: str, query: dict) -> None:
    found = self.server.bucket.objects.get(name)
    self._answer(200, *found) if found else self._answer(404)

  def _list(self, query: dict) -> None:
    names = self.server.bucket.names(query.get('prefix', ''))
    first, after = query.get('startOffset', ''), query.get('pageToken', '')
    names = [n for n in names if n >= first and n > after]
    names = [n for n in names if n < query.get('endOffset', '\U0010ffff')]
    page = {'items': [{'name': n} for n in names[:_PAGE]]}
    if len(names) > _PAGE:
      page['nextPageToken'] = names[_PAGE - 1]
    self._answer(200, json.dumps(page).encode())

  do_GET = do_POST = do_DELETE = _handle


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True

  def handle_error(self, *_):
    """Says nothing: tests kill clients."""


@contextlib.contextmanager
def serving():
  """Serves a bucket; yields it and the environment variables of programs that use it."""
  server = _Server(('localhost', 0), _Handler)
  server.bucket = Bucket()
  threading.Thread(target=server.serve_forever, daemon=True).start()
  url = f'http://localhost:{server.server_port}'
  env = {'TENSORSTORE_GCS_HTTP_URL': url, 'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none'}
  try:
    yield server.bucket, env
  finally:
    server.shutdown()
    server.server_close()
