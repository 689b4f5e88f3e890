"""Takes pictures of pages in a headless Chromium, over its debugging protocol."""

import base64
import io
import itertools
import json
import pathlib
import shutil
import subprocess
import time
import urllib.request

import numpy as np
from PIL import Image
from websockets.sync import client

_NAMES = 'chromium', 'chromium-browser', 'google-chrome'
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
_FLAGS = (
  '--headless=new', '--no-sandbox', '--use-gl=angle', '--use-angle=swiftshader',
  '--enable-unsafe-swiftshader', '--hide-scrollbars', '--remote-debugging-port=0',
  '--host-resolver-rules=MAP * ~NOTFOUND',  # No network: every name is unknown.
)  # fmt: skip


class Browser:
  """A headless Chromium with one page; use it inside `with`."""

  def __init__(self, folder: str):
    self._folder = str(folder)

  def __enter__(self):
    command = [CHROMIUM, *_FLAGS, f'--user-data-dir={self._folder}', 'about:blank']
    self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    port_file = pathlib.Path(self._folder, 'DevToolsActivePort')
    port = _wait(lambda: port_file.exists() and port_file.read_text().split('\n')[0])
    targets = json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/json'))
    url = next(t['webSocketDebuggerUrl'] for t in targets if t['type'] == 'page')
    self._socket, self._ids = client.connect(url, max_size=None), itertools.count(1)
    return self

  def __exit__(self, *_):
    self._socket.close()
    self._process.terminate()
    self._process.wait()

  def call(self, method: str, **params):
    """Calls a method of the protocol and returns its result."""
    number = next(self._ids)
    self._socket.send(json.dumps({'id': number, 'method': method, 'params': params}))
    while True:
      answer = json.loads(self._socket.recv(timeout=60))
      if answer.get('id') == number:
        return answer['result']

  def evaluate(self, expression: str):
    """Evaluates JavaScript in the page."""
    result = self.call('Runtime.evaluate', expression=expression, returnByValue=True)
    assert 'exceptionDetails' not in result, result
    return result['result'].get('value')

  def open(self, url: str, size: tuple[int, int], ready: str) -> None:
    """Opens a page of `size` pixels and waits until the expression `ready` is true."""
    width, height = size
    self.call(
      'Emulation.setDeviceMetricsOverride',
      width=width, height=height, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    self.call('Page.navigate', url=url)
    self.wait(ready)

  def wait(self, ready: str) -> None:
    """Waits until an expression is true."""
    _wait(lambda: self.evaluate(ready))

  def picture(self) -> np.ndarray:
    """Returns the page as it is, uint8 [h, w, 3]."""
    data = self.call('Page.captureScreenshot', format='png')['data']
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert('RGB'))


def _wait(condition, seconds: float = 60):
  end = time.monotonic() + seconds
  while not (value := condition()):
    assert time.monotonic() < end, 'the browser did not get ready'
    time.sleep(0.05)
  return value
