"""Drives a page in headless Chromium by the DevTools protocol."""

import base64
import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time
import urllib.request

import websockets.sync.client

_NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
_FLAGS = (
  '--headless=new', '--no-sandbox', '--disable-gpu-sandbox', '--use-angle=swiftshader',
  '--enable-unsafe-swiftshader', '--ignore-gpu-blocklist', '--hide-scrollbars', '--no-first-run',
  '--disable-dev-shm-usage', '--disable-background-networking', '--remote-debugging-port=0',
)  # fmt: skip


def find() -> str | None:
  """Returns the path of the browser, or None if none is installed."""
  return next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
  """A page; `errors` collects the exceptions and console errors of its scripts."""

  def __init__(self, socket):
    self._socket, self._ids, self.errors = socket, itertools.count(1), []
    for domain in ('Page', 'Runtime', 'Log'):
      self.call(f'{domain}.enable')

  def call(self, method: str, **params) -> dict:
    """Calls a method of the protocol and returns its result."""
    number = next(self._ids)
    self._socket.send(json.dumps({'id': number, 'method': method, 'params': params}))
    while True:
      message = json.loads(self._socket.recv(timeout=60))
      self._collect_errors(message)
      if message.get('id') == number:
        assert 'error' not in message, message
        return message['result']

  def _collect_errors(self, message: dict) -> None:
    event, params = message.get('method'), message.get('params', {})
    if event == 'Runtime.exceptionThrown':
      self.errors.append(json.dumps(params['exceptionDetails'])[:500])
    if event == 'Runtime.consoleAPICalled' and params['type'] == 'error':
      self.errors.append(json.dumps(params['args'])[:500])
    if event == 'Log.entryAdded' and params['entry']['level'] == 'error':
      self.errors.append(json.dumps(params['entry'])[:500])

  def run(self, script: str):
    """Evaluates a JavaScript expression, awaiting promises."""
    done = self.call('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
    assert 'exceptionDetails' not in done, done
    return done['result'].get('value')

  def until(self, script: str, seconds: float = 150, again=None):
    """Waits until an expression is truthy; returns its value.

    A slow page can miss a click, so `again` is called every twenty seconds.
    """
    end, next_try = time.monotonic() + seconds, time.monotonic() + 20
    while not (value := self.run(script)):
      if again and time.monotonic() > next_try:
        again()
        next_try = time.monotonic() + 20
      assert time.monotonic() < end, (script, self.run('document.body?.innerText'), self.errors)
      time.sleep(0.2)
    return value

  def settled(self, script: str):
    """Waits until an expression is truthy and stops changing, as a moving element's position."""
    value, before = self.until(script), None
    while value != before:
      time.sleep(0.25)
      value, before = self.until(script), value
    return value

  def mouse(self, event: str, x: float, y: float, **params) -> None:
    """Sends 'mousePressed', 'mouseMoved', 'mouseReleased' or 'mouseWheel'."""
    self.call('Input.dispatchMouseEvent', type=event, x=x, y=y, **params)

  def drag(self, start: tuple, end: tuple, steps: int = 8) -> None:
    """Drags with the left button."""
    self.mouse('mouseMoved', *start)
    self.mouse('mousePressed', *start, button='left', buttons=1, clickCount=1)
    for k in range(1, steps + 1):
      point = [a + (b - a) * k / steps for a, b in zip(start, end)]
      self.mouse('mouseMoved', *point, button='left', buttons=1)
    self.mouse('mouseReleased', *end, button='left', clickCount=1)

  def click(self, x: float, y: float) -> None:
    self.drag((x, y), (x, y), 1)

  def type(self, x: float, y: float, text: str) -> None:
    """Replaces the text of an input and presses Enter."""
    self.mouse('mousePressed', x, y, button='left', clickCount=3)
    self.mouse('mouseReleased', x, y, button='left', clickCount=3)
    self.call('Input.insertText', text=text)
    for kind in ('keyDown', 'keyUp'):
      self.call(
        'Input.dispatchKeyEvent', type=kind, key='Enter', code='Enter', windowsVirtualKeyCode=13
      )

  def screenshot(self, path) -> None:
    """Saves a screenshot as PNG."""
    shot = self.call('Page.captureScreenshot', format='png')
    with open(path, 'wb') as f:
      f.write(base64.b64decode(shot['data']))


@contextlib.contextmanager
def page(url: str, folder, size=(1280, 720), mobile: bool = False):
  """Opens a page in a new browser, which keeps its profile in `folder`."""
  log = pathlib.Path(folder) / 'browser.txt'
  with log.open('w') as out:
    browser = subprocess.Popen(
      [find(), *_FLAGS, f'--user-data-dir={folder}/profile', 'about:blank'],
      stdout=out, stderr=out, start_new_session=True,
    )  # fmt: skip
  try:
    end, found = time.monotonic() + 120, None
    while not found:
      assert browser.poll() is None, log.read_text()
      assert time.monotonic() < end, log.read_text()
      time.sleep(0.1)
      found = re.search(r'ws://[^/]+', log.read_text())
    address = found[0].replace('ws:', 'http:') + '/json'
    tabs = json.load(urllib.request.urlopen(address, timeout=30))
    tab_url = next(tab['webSocketDebuggerUrl'] for tab in tabs if tab['type'] == 'page')
    with websockets.sync.client.connect(tab_url, max_size=None) as socket:
      shown = Page(socket)
      width, height = size
      shown.call(
        'Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1,
        mobile=mobile,
      )  # fmt: skip
      shown.call('Page.navigate', url=url)
      yield shown
  finally:
    os.killpg(browser.pid, signal.SIGKILL)
    browser.wait()
