"""Tests of the viewer's page with a fake viser client, in a real browser, and during training."""

import contextlib
import functools
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from types import SimpleNamespace

import captures
import devtools
import jax
import numpy as np
import program_runner
import pytest
import tiny
import websockets.exceptions
import websockets.sync.client
from PIL import Image

from internal import configs, datasets, paths
from internal.splats import formats, gaussians, rasterizer
from internal.training import checkpoints, loop, run_folder
from internal.viewer import additions, session
from internal.viewer import admission as admission_lib
from internal.viewer import page as page_lib
from internal.viewer import server as server_lib

STEPS = 24
PAGE = 840, 740  # Pixels; drawing more takes longer, without a graphics card.
FREE = np.s_[350:690, 20:480]  # Left of viser's controls and below its notices.
WALK = np.linspace(0, 1, 1000)


def bindings(data, run):
  return (
    *program_runner.SMALLEST,
    f"Config.data_dir = '{data}'",
    f"Config.checkpoint_dir = '{run}'",
    f'Config.max_steps = {STEPS}',
    f'Config.checkpoint_every = {STEPS}',
    'Config.train_render_every = 0',
  )


class MovingDisplay:
  """A display whose camera moves after each picture."""

  def __init__(self, viewer):
    self.pictures, self.failures = [], []
    self._visitor = viewer.join(self)
    self._move()

  def _move(self):
    pose = np.eye(3, 4)
    pose[:, 3] = WALK[len(self.pictures)]
    self._visitor.set_view(session.View(pose, 0.8, (40, 30), session.MODES[len(self.pictures) % 3]))

  def show(self, picture, step, seconds, finest):
    self.pictures.append((picture, step))
    self._move()

  def show_compiling(self):
    pass

  def show_error(self, reason):
    self.failures.append(reason)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A folder with two short runs, `watched` in the viewer and `alone`, and the display."""
  folder = tmp_path_factory.mktemp('viewer')
  camera = ('PINHOLE', (20.0, 20.0, 8.0, 8.0))
  captures.write_colmap(folder / 'data', n=9, camera=camera, size=(16, 16))
  display = None
  for name in ('alone', 'watched'):
    settings = configs.load_config(['configs/360.gin'], bindings(folder / 'data', folder / name))
    scene, mesh = datasets.load_dataset(settings.config), tiny.mesh(1)
    viewer = session.Session(session.Renderer(settings, scene, mesh))
    if name == 'watched':
      display = MovingDisplay(viewer)
    on_step = session.Live(viewer, lambda step: step / STEPS, jax.block_until_ready)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(session, 'SHARE', 1.0)  # After every step.
      loop.train(settings, scene, mesh, on_step=on_step, on_step_every=1)
  return folder, display


def test_training_does_not_depend_on_being_watched(trained):
  folder, display = trained
  assert {step for _, step in display.pictures} == set(range(1, STEPS + 1))
  assert not display.failures
  states = []
  for name in ('alone', 'watched'):
    settings, _ = run_folder.open_run(str(folder / name))
    states.append(checkpoints.restore(str(folder / name), settings, tiny.mesh(1), STEPS))
  for a, b in zip(*map(jax.tree.leaves, states), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


class Handle:
  """A fake input or button; `set` and `press` act as a user."""

  def __init__(self, value=None, **more):
    self.value, self.content, self.visible, self._called = value, value, True, []

  def on_update(self, call):
    self._called.append(call)
    return call

  on_click = on_update

  def set(self, value):
    self.value = value
    self.press()

  def press(self):
    for call in self._called:
      call(None)

  def remove(self):
    self.visible = False


class Gui:
  def __init__(self):
    self.handles = {}

  def __getattr__(self, name):
    def add(label, *values, initial_value=None, **more):
      first = {'add_dropdown': 0, 'add_slider': 3}.get(name, 0)
      value = initial_value if initial_value is not None else values[first] if values else None
      if name == 'add_dropdown' and initial_value is None:
        value = values[0][0]
      handle = Handle(label if name == 'add_markdown' else value)
      self.handles.setdefault(label, []).append(handle)
      return handle

    return add

  @contextlib.contextmanager
  def add_folder(self, label, **more):
    yield

  def __getitem__(self, label):
    return self.handles[label][-1]


class Client:
  def __init__(self):
    self.client_id, self.gui, self.sent, self.nodes, self.notes = 0, Gui(), [], {}, []
    self.notices = []
    self.camera = SimpleNamespace(
      wxyz=np.array([1.0, 0, 0, 0]), position=np.array([0.1, 0.2, 0.3]), fov=0.8, aspect=2.0,
      on_update=lambda call: None,
    )  # fmt: skip
    self.scene = SimpleNamespace(
      set_background_image=lambda image, **more: self.sent.append((image, more)),
      add_camera_frustum=self._add, add_point_cloud=self._add, add_line_segments=self._add,
    )  # fmt: skip
    self.files = {}

  def _add(self, name, *args, **more):
    self.nodes[name] = Handle()
    self.nodes[name].args = args, more
    return self.nodes[name]

  atomic = staticmethod(contextlib.nullcontext)

  def add_notification(self, title, body, **more):
    self.notes.append((title, body))
    self.notices.append(Handle())
    return self.notices[-1]

  def send_file_download(self, name, content, save_immediately):
    self.files[name] = content


class FakeRenderer:
  far, chunk = 100.0, 1000

  def __init__(self):
    self.wanted, self.compiled = [], True

  def is_compiled(self, wanted):
    return self.compiled

  def __call__(self, params, frac, wanted, size, progress=None):
    self.wanted.append(wanted)
    image = np.full((size[1], size[0], 3), 90, np.uint8)
    return session.Picture(image, np.ones(size[::-1]), 'legend')

  def points(self, params, frac):
    return np.zeros((5, 3)), np.zeros((5, 3), np.uint8)


@pytest.fixture
def page(make_page):
  return make_page()


@pytest.fixture
def make_page(tmp_path):
  return functools.partial(_make_page, tmp_path)


def _make_page(tmp_path, **more):
  """A page, its fake client and renderer, and a function that renders all requests."""
  pytest.importorskip('viser', reason='requirements-viewer.txt is not installed')
  cams, _ = tiny.capture()
  transform = np.diag([0.5, 0.5, 0.5, 1])
  scene = SimpleNamespace(
    cameras=cams, names=('a', '<b>', 'c'), train=(1, 2), test=(0,), world_transform=transform
  )
  renderer, client = FakeRenderer(), Client()
  viewer = session.Session(renderer)
  capture = page_lib.Capture(str(tmp_path), scene, None, 50, **more)
  made = page_lib.Page(client, capture, viewer)

  def work():
    while viewer.work('params', 3, 0.5):
      pass

  work()
  return SimpleNamespace(page=made, client=client, gui=client.gui, renderer=renderer, work=work,
                         viewer=viewer, folder=tmp_path, cams=cams)  # fmt: skip


class TestPage:
  def test_shows_the_view_of_the_browsers_camera(self, page):
    image, more = page.client.sent[-1]
    assert image.shape == (256, 512, 3)
    assert more['depth'] is None  # Without overlays, no depth is sent.
    wanted = page.renderer.wanted[-1]
    np.testing.assert_allclose(wanted.pose[:, :3], np.diag([1, -1, -1]))  # OpenCV to OpenGL.
    np.testing.assert_allclose(wanted.pose[:, 3], [0.1, 0.2, 0.3])
    assert wanted.fov == 0.8
    assert 'step 3 of 50' in page.page._status.content

  def test_settings_change_the_picture(self, page):
    page.gui['Show'].set('depth')
    page.gui['Resolution'].set(128)
    page.gui['Clip by distance'].set(True)
    page.gui['Near'].set(1.0)
    page.gui['Far'].set(0.5)  # In front of the near plane.
    page.work()
    wanted = page.renderer.wanted[-1]
    assert (wanted.mode, wanted.size) == ('depth', (128, 64))
    assert wanted.clip[0] == 1.0 < wanted.clip[1]
    page.gui['Field of view'].set(30)
    page.work()
    assert page.renderer.wanted[-1].fov == pytest.approx(np.radians(30))

  def test_gaussians_are_seen_while_the_view_moves_in_colour(self, make_page):
    page = make_page(has_splats=True)
    time.sleep(1.1 * session.REST_SECONDS)
    page.work()
    assert page.renderer.wanted[-1].sketched
    assert page.client.sent[-1][0].shape == (256, 512, 3)
    page.page._request_view()
    assert page.client.sent[-1][0] is None  # No picture covers them.
    count = len(page.client.sent)
    page.page._request_view()
    page.work()
    assert len(page.client.sent) == count
    for label, value in (('Show', 'depth'), ('Gaussians while moving', False)):
      page.gui[label].set(value)
      page.work()
      assert not page.renderer.wanted[-1].sketched
      assert page.client.sent[-1][0] is not None
      page.gui['Show'].set('colour')
    page.gui['Gaussians while moving'].set(True)
    page.gui['Clip by distance'].set(True)
    page.work()
    assert not page.renderer.wanted[-1].sketched

  def test_goes_to_a_photograph(self, page):
    page.gui['Go to photograph'].set('1: <b>')
    page.work()
    np.testing.assert_allclose(page.renderer.wanted[-1].pose, page.cams.camtoworld[1], atol=1e-6)
    assert page.renderer.wanted[-1].fov == pytest.approx(2 * np.arctan(0.4), abs=1e-6)

  def test_cameras_and_points_can_be_shown_and_hidden(self, page):
    page.gui['Cameras'].set(True)
    page.gui['Points'].set(True)
    page.work()
    assert {'/cameras/0', '/cameras/1', '/cameras/2', '/points'} == set(page.client.nodes)
    assert page.client.sent[-1][1]['depth'].shape == (256, 512)
    _, more = page.client.nodes['/cameras/2'].args
    np.testing.assert_allclose(more['position'], page.cams.camtoworld[2, :, 3])
    page.gui['Cameras'].set(False)
    page.gui['Points'].set(False)
    page.work()
    assert not any(node.visible for node in page.client.nodes.values())
    assert page.client.sent[-1][1]['depth'] is None

  def test_keyframes_are_counted(self, page):
    page.gui['Add this view'].press()
    assert page.page._key_text.content == '1 keyframe; a path needs two.'
    page.gui['Remove the last'].press()
    assert page.page._key_text.content == '0 keyframes; a path needs two.'

  def test_path_is_saved_in_the_captures_frame(self, page):
    page.gui['Save the path'].press()
    assert 'at least two keyframes' in page.client.notes[-1][1]
    for x in (0.0, 0.5, 1.0):
      page.client.camera.position = np.array([x, 0, 0])
      page.gui['Add this view'].press()
    page.gui['Add this view'].press()
    assert 'are the same; remove one' in page.client.notes[-1][1]
    page.gui['Remove the last'].press()
    page.gui['Name'].value = '../deep/<script>'
    page.gui['Save the path'].press()
    page.gui['Save the path'].press()
    folder = page.folder / 'camera_paths'
    assert sorted(p.name for p in folder.iterdir()) == ['deep_script.json', 'deep_script_2.json']
    saved = json.loads((folder / 'deep_script.json').read_text())
    places = np.array([f['camera_to_world'] for f in saved['camera_path']])[:, [3, 7, 11]]
    assert len(places) == 60
    np.testing.assert_allclose(places[[0, -1]], [[0, 0, 0], [1, 0, 0]], atol=1e-6)  # 0.5 / scale.
    assert 'render.py' in page.page._key_text.content
    page.gui['Look along it'].set(1.0)
    np.testing.assert_allclose(page.client.camera.position, [0.5, 0, 0], atol=1e-6)

  def test_compiling_is_shown_until_the_first_picture(self, page):
    page.renderer.compiled = False
    page.gui['Field of view'].set(31)
    page.work()
    assert page.client.notes[-1][0] == 'Compiling'
    assert page.page._compiling is None  # The notice has been removed.
    assert not page.client.notices[-1].visible

  def test_the_video_of_the_path_is_rendered_or_stopped(self, page, monkeypatch):
    made = []

    def make(run, scene, path, say, stop):
      def task(renderer, params, frac, step, pause):
        while not stop.is_set():
          say(f'step {step}')
          yield

      made.append((run, path))
      return task

    monkeypatch.setattr(page_lib.video_task, 'make', make)
    page.gui['Render the video'].press()
    assert 'at least two keyframes' in page.client.notes[-1][1]
    for x in (0.0, 0.5):
      page.client.camera.position = np.array([x, 0, 0])
      page.gui['Add this view'].press()
    for _ in range(2):  # The same path is not saved again.
      page.gui['Render the video'].press()
      assert page.page._render.label == 'Stop rendering'
      while page.viewer._serve('params', 3, 0.5):
        pass
      assert page.viewer.work('params', 3, 0.5)
      assert page.page._video_text.content == 'step 3'
      page.gui['Render the video'].press()
      page.work()
      assert page.page._render.label == 'Render the video'
    assert made == [(str(page.folder), str(page.folder / 'camera_paths' / 'path.json'))] * 2

  def test_snapshot_is_saved_and_sent(self, page):
    page.gui['Size'].value = (40, 30)
    page.gui['Save as PNG'].press()
    page.work()
    path = page.folder / 'snapshots' / 'colour_step0000003.png'
    assert Image.open(path).size == (40, 30)
    assert page.client.files == {path.name: path.read_bytes()}
    page.gui['Size'].value = (5000, 30)
    page.gui['Save as PNG'].press()
    assert '[1, 4096]' in page.client.notes[-1][1]

  def test_disconnected_browsers_cost_nothing(self, page):
    page.page.close()
    page.page._request_view()
    assert not page.viewer.work('params', 4, 0.5)


def open_server(host='localhost', port=8080, origins=()):
  admission = admission_lib.Admission(host, origins)
  return server_lib._open_server(host, port, admission), admission


class TestOpening:
  def fails(self, words, **args):
    with pytest.raises(page_lib.ViewerError, match=words):
      open_server(**args)

  def test_without_viser(self, monkeypatch):
    monkeypatch.setitem(sys.modules, 'viser', None)
    self.fails('viser is not installed: pip install -r requirements-viewer.txt')

  def test_invalid_port(self):
    pytest.importorskip('viser')
    self.fails(r'\[1, 65535\], got 0', port=0)

  @pytest.mark.parametrize('host', ['192.0.2.7', 'no-such-host.invalid'])
  def test_a_host_that_is_not_this_machine(self, host):
    pytest.importorskip('viser')
    self.fails(f'--host {host} is not an address of this machine', host=host)

  @pytest.mark.parametrize('origin', ['example.org', 'ftp://a', 'http://a/b', 'http://a:x', ''])
  def test_a_malformed_origin(self, origin):
    self.fails(f"--origin must be a scheme.*got '{origin}'", origins=[origin])

  def test_a_viser_that_bypasses_the_checks_is_refused(self, monkeypatch):
    pytest.importorskip('viser')
    monkeypatch.setattr(admission_lib.Admission, 'installed', lambda _: contextlib.nullcontext())
    self.fails('leaves requests unchecked', port=free_port())

  def test_several_processes(self, monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(page_lib.ViewerError, match='one process only'):
      server_lib.open_page(None, None, None, None)

  def test_is_local_and_opens_no_tunnel(self, capsys):
    pytest.importorskip('viser', reason='requirements-viewer.txt is not installed')
    server, _ = open_server(port=free_port())
    try:
      assert server.get_host() == 'localhost'
      assert server.request_share_url() is None
      assert capsys.readouterr() == ('', '')
    finally:
      server.stop()
    server, admission = open_server('0.0.0.0', free_port())
    server.stop()
    err = capsys.readouterr().err
    assert 'Warning: the viewer answers other machines at 0.0.0.0' in err
    assert admission.token not in err
    assert admission.address(80) == f'http://{socket.gethostname()}:80/{admission.token}/'


@pytest.fixture(scope='module')
def opened():
  """A server and its admission, which admits two more origins."""
  pytest.importorskip('viser', reason='requirements-viewer.txt is not installed')
  server, admission = open_server(
    port=free_port(), origins=['https://proxy.example.org/', 'http://localhost:9000']
  )
  yield server, admission
  server.stop()


@pytest.fixture(scope='module')
def served(opened):
  """The server's port and token."""
  server, admission = opened
  return server.get_port(), admission.token


def test_additions_reach_the_page_and_nothing_else(opened, served):
  (_, admission), (port, token) = opened, served
  admission.additions = additions.Additions('const a = "first";', {'b.bin': b'123'})
  try:
    at = f'http://localhost:{port}/{token}'
    for path in ('', '/', '/index.html', '/?c=d'):
      request = urllib.request.Request(at + path, headers={'Accept-Encoding': 'gzip'})
      with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read().decode()
        assert answer.headers['Content-Type'].startswith('text/html')
      assert text.count('const a = "first";') == 1
      assert text.index('const a') < text.index('</script>')  # Before viser's own.
    with urllib.request.urlopen(f'{at}/b.bin', timeout=30) as answer:
      assert answer.read() == b'123'
    for wrong in (f'{at}/c.bin', f'http://localhost:{port}/b.bin'):
      with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(wrong, timeout=30)
    assert TestAdmission().status(port, f'/{token}/', f'http://localhost:{port}') == 101
  finally:
    admission.additions = None


class TestAdmission:
  def status(self, port, path, origin=None):
    """Returns the status of a websocket handshake, 101 if the server accepts it."""
    import viser

    try:
      with websockets.sync.client.connect(
        f'ws://localhost:{port}{path}', origin=origin, subprotocols=[f'viser-v{viser.__version__}']
      ) as socket:
        assert socket.recv(timeout=30)  # The page's content.
        return 101
    except websockets.exceptions.InvalidStatus as error:
      return error.response.status_code

  @pytest.mark.parametrize(
    'origin',
    [
      'http://localhost:{}', 'http://127.0.0.1:{}', 'http://[::1]:{}', 'http://LOCALHOST:{}',
      'https://proxy.example.org', 'http://localhost:9000',
      None,  # Not a browser.
    ],
  )  # fmt: skip
  def test_the_viewers_own_page_and_configured_origins_may_connect(self, served, origin):
    port, token = served
    origin = origin and origin.format(port)
    assert self.status(port, f'/{token}', origin) == 101
    assert self.status(port, f'/{token}/', origin) == 101

  @pytest.mark.parametrize(
    'origin',
    [
      'https://example.org', 'http://example.org:{}', 'http://localhost', 'http://localhost:1',
      'https://localhost:{}', 'http://localhost.example.org:{}', 'http://proxy.example.org',
      'https://proxy.example.org:444', 'null', 'file://', '', 'http://localhost:{}@example.org',
    ],
  )  # fmt: skip
  def test_foreign_pages_may_not_connect_even_with_the_token(self, served, origin, capsys):
    port, token = served
    origin = origin.format(port)
    assert [self.status(port, f'/{token}/', origin) for _ in 'ab'] == [403, 403]
    err = capsys.readouterr().err
    assert err.count('Warning: the viewer refused') == 1
    assert repr(origin) in err
    assert '--origin' in err

  def test_nothing_is_served_without_the_token(self, served):
    port, token = served
    own = f'http://localhost:{port}'
    wrong = token[:-1] + ('b' if token[-1] == 'a' else 'a')
    paths = ('/', f'/{wrong}/', f'/{token[:-1]}', f'//{token}/', f'/?token={wrong}', '/%FF\u20ac/')
    for path in map(urllib.parse.quote, paths):
      assert self.status(port, path, own) == 403
      with pytest.raises(urllib.error.HTTPError, match='403'):
        urllib.request.urlopen(own + path, timeout=30)

  def test_the_page_is_served_at_its_address(self, served):
    port, token = served
    for path in (f'/{token}/', f'/{token}', f'/{token}/index.html?a=b'):
      with urllib.request.urlopen(f'http://localhost:{port}{path}', timeout=30) as answer:
        assert b'<title>Viser</title>' in answer.read()
    for path in (f'/{token}/../server.py', f'/{token}/%2e%2e/index.html', f'/{token}/{token}/'):
      with pytest.raises(urllib.error.HTTPError, match='404'):
        urllib.request.urlopen(f'http://localhost:{port}{path}', timeout=30)

  def test_tokens_are_not_repeated(self):
    tokens = {admission_lib.Admission('localhost').token for _ in range(50)}
    assert len(tokens) == 50
    assert all(len(token) >= 20 for token in tokens)

  def test_the_servers_own_address_is_admitted_where_it_serves_other_machines(self):
    admission = admission_lib.Admission('0.0.0.0')
    assert admission._is_admitted('http://10.1.2.3:8080', ('10.1.2.3', 8080))
    assert admission._is_admitted(f'http://{socket.gethostname()}:8080', ('10.1.2.3', 8080))
    assert not admission._is_admitted('http://10.1.2.4:8080', ('10.1.2.3', 8080))


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


# The centre of the element with a label, or of the input that the label belongs to.
_CENTRE_OF = """(() => {
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n; n = walk.nextNode();) {
    if (n.textContent.trim() !== %r) continue;
    let e = n.parentElement;
    if (%s) for (let k = 0; k < 7 && e.tagName !== 'BUTTON'; k++) {
      const fields = [...e.querySelectorAll('input')].filter(f => f.offsetWidth > 5);
      if (fields.length) { e = fields.at(-1); break; }
      e = e.parentElement;
    }
    e.scrollIntoView({block: 'nearest'});
    const r = e.getBoundingClientRect();
    if (r.width) return [r.x + r.width / 2, r.y + r.height / 2];
  }
})()"""


@pytest.mark.skipif(devtools.find() is None, reason='no chromium is installed')
def test_in_a_browser(trained, tmp_path):
  pytest.importorskip('viser', reason='requirements-viewer.txt is not installed')
  run, port = trained[0] / 'watched', free_port()
  splats = _write_splats(run)
  said = (tmp_path / 'stderr.txt').open('w')
  program = subprocess.Popen(
    [sys.executable, 'scripts/view.py', str(run), '--port', str(port), '--gin_bindings',
     'Config.render_chunk_size = 2048'],
    cwd=program_runner.ROOT, stdout=subprocess.PIPE, stderr=said, text=True,
  )  # fmt: skip
  try:
    address = re.search(rf'http://localhost:{port}/[\w-]+/', program.stdout.readline())[0]
    with devtools.page(address, tmp_path, size=PAGE) as shown:
      text = 'document.body?.innerText'
      shown.until(f"{text}?.includes('step {STEPS} of {STEPS}')")

      _check_gaussians(shown, tmp_path / 'gaussians.png', run, splats)

      def centre(label, field=True):
        return shown.settled(_CENTRE_OF % (label, str(field).lower()))

      shown.type(*centre('Resolution'), '128')
      shown.until(f"{text}.includes('128 x') && !{text}.includes('refining')")

      def click_until(label, script, field=True):
        click = lambda: shown.click(*centre(label, field))  # noqa: E731
        click()
        shown.until(script, again=click)

      shown.click(*centre('Snapshot', False))
      shown.type(*centre('Size'), '120')
      click_until('Save as PNG', f"{text}.includes('Saved ')")
      shown.screenshot(tmp_path / 'shot.png')
      shown.click(*centre('Snapshot', False))
      shown.click(*centre('Camera path', False))
      click_until('Add this view', f"{text}.includes('1 keyframe;')")
      shown.drag((300, 400), (340, 410))
      shown.until(f"!{text}.includes('refining')")  # While it draws, it can miss a click.
      click_until('Add this view', f"{text}.includes('2 keyframes')")
      shown.type(*centre('Seconds per segment'), '0.1')
      shown.type(*centre('Size'), '16')
      click_until('Save the path', f"{text}.includes('render.py')")
      click_until('Render the video', f"{text}.includes('Video of step {STEPS}')")
      assert f'{run}/render/color.mp4' in shown.run(text)
      shown.drag((300, 400), (340, 410))  # Closed while pictures are on their way.
      assert not shown.errors
    time.sleep(1)
    assert (tmp_path / 'stderr.txt').read_text() == ''
  finally:
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 143
  said.close()
  assert (run / 'render' / 'color.mp4').stat().st_size > 300
  assert [p.name for p in sorted((run / 'render' / 'color').iterdir())] == [
    f'{k:05d}.png' for k in range(3)
  ]
  _check_picture(tmp_path / 'shot.png', run)
  _check_path(run)


def _write_splats(run):
  """Writes Gaussians in front of the first test camera; returns them in the normalised world."""
  _, scene = run_folder.open_run(str(run))
  pose, rng, n = np.asarray(scene.cameras.camtoworld[scene.test[0]]), np.random.default_rng(0), 100
  splats = gaussians.Splats(
    means=pose[:, 3] + rng.normal(0, [0.6, 0.6, 0.2], (n, 3)) @ pose[:, :3].T - 1.5 * pose[:, 2],
    log_scales=rng.normal(-2.5, 0.4, (n, 3)),
    quaternions=rng.normal(size=(n, 4)),
    opacity_logits=rng.normal(1, 2, n),
    sh=rng.normal(0, 0.2, (n, 16, 3)),
  )
  (run / 'export').mkdir()
  own = formats.moved(splats, np.linalg.inv(scene.world_transform))
  formats.write_ply(str(run / 'export' / 'splats.ply'), own)
  return splats


def _check_gaussians(shown, path, run, splats):
  """Compares what the browser draws under viser's canvas, from the first camera, with ours."""
  shown.until("[...document.querySelectorAll('canvas')].some(c => c.dataset.pictures)")
  shown.run("document.querySelector('canvas[data-engine]').style.visibility = 'hidden'")
  shown.settled("[...document.querySelectorAll('canvas')].map(c => c.dataset.pictures).join()")
  shown.screenshot(path)
  shown.run("document.querySelector('canvas[data-engine]').style.visibility = ''")
  page = np.asarray(Image.open(path).convert('RGB')) / 255
  height, width = page.shape[:2]
  _, scene = run_folder.open_run(str(run))
  row = scene.test[0]
  pose = np.asarray(scene.cameras.camtoworld[row], np.float64)
  view = session.View(pose, page_lib.vertical_fov(scene.cameras, row), (width, height))
  camera = gaussians.pinhole(session.camera(view, view.size), 0)
  drawn = rasterizer.render(
    jax.tree.map(np.float32, splats), camera, np.zeros(3, np.float32), 2**18
  )
  assert drawn.overflow == 0
  expected = np.clip(drawn.rgb, 0, 1)[FREE]
  assert expected.std() > 0.08
  assert -10 * np.log10(np.mean((page[FREE] - expected) ** 2)) > 35


def _check_picture(screenshot, run):
  """Compares the free part of the page with the snapshot."""
  page = Image.open(screenshot).convert('RGB')
  (snapshot,) = (run / 'snapshots').glob('*.png')
  picture = Image.open(snapshot)
  # Both have the same height of view.
  width = round(page.height * picture.width / picture.height)
  picture = picture.resize((width, page.height))
  left = (width - page.width) // 2
  picture = picture.crop((left, 0, left + page.width, page.height))
  actual, expected = (np.asarray(image, np.float32)[FREE] for image in (page, picture))
  assert expected.std() > 1
  assert np.abs(actual - expected).mean() < 4


def _check_path(run):
  """Checks that the first keyframe is the first test camera, in the capture's own frame."""
  saved = json.loads((run / 'camera_paths' / 'path.json').read_text())
  _, scene = run_folder.open_run(str(run))
  first = np.reshape(saved['keyframes'][0]['matrix'], (4, 4))
  place = scene.world_transform @ first[:, 3]
  np.testing.assert_allclose(place[:3], scene.cameras.camtoworld[scene.test[0], :, 3], atol=1e-3)
  ahead = paths.pad_poses(np.asarray(scene.cameras.camtoworld[scene.test[0]]))[:3, 2]
  turned = scene.world_transform[:3, :3] @ first[:3, 2]
  np.testing.assert_allclose(turned / np.linalg.norm(turned), ahead, atol=1e-3)
