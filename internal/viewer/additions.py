"""What the viewer's server adds to viser's page: a script, and files for it."""

from __future__ import annotations

import dataclasses
import http
from collections.abc import Callable, Mapping

_HEAD = b'<head>'


@dataclasses.dataclass(frozen=True)
class Additions:
  """A script that runs before those of viser's page, and files beside the page."""

  script: str
  files: Mapping[str, bytes]  # By name.

  def answer(self, request, following: Callable):
    """Answers a request for a file or for the page; `following(request)` answers all others."""
    from websockets import datastructures, http11

    if request.headers.get('Upgrade') == 'websocket':
      return following(request)
    name = request.path.partition('?')[0].strip('/')
    if name in self.files:
      body, kind = self.files[name], 'application/octet-stream'
    elif name in ('', 'index.html'):
      headers = datastructures.Headers(
        (key, value) for key, value in request.headers.raw_items() if key != 'Accept-Encoding'
      )
      page = following(dataclasses.replace(request, headers=headers))
      body, kind = self.extended(page.body), page.headers['Content-Type']
    else:
      return following(request)
    headers = datastructures.Headers({'Content-Type': kind, 'Content-Length': str(len(body))})
    return http11.Response(http.HTTPStatus.OK, 'OK', headers, body)

  def extended(self, page: bytes) -> bytes:
    """Returns a page with the script in front of its own ones."""
    before, head, after = page.partition(_HEAD)
    script = f'\n<script>\n(() => {{\n{self.script}\n}})();\n</script>'
    return before + head + script.encode() + after
