"""Opens the viewer of a run, finished or in training: a `viser` server with a page per visitor."""

from __future__ import annotations

import argparse
import contextlib
import io
import socket
import sys
import warnings
from collections.abc import Callable

import jax
import numpy as np

from .. import configs, paths
from ..datasets import scenes, sparse_points
from ..rendering import orbits
from ..system import installation, progress
from ..training import train_step
from . import additions as additions_lib
from . import page as page_lib
from . import session as session_lib
from .admission import LOCAL, Admission, ViewerError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds --host, --port and --origin."""
  parser.add_argument(
    '--host', default='localhost', help='address of the viewer; 0.0.0.0 admits other machines'
  )
  parser.add_argument(
    '--port', type=int, default=8080, help='port of the viewer; if it is in use, the next free one'
  )
  parser.add_argument(
    '--origin', action='append', default=[], metavar='URL',
    help='also accept a page loaded from this address, as of a proxy or of another forwarded port: '
    'https://example.org or http://localhost:9000; may be repeated',
  )  # fmt: skip


def open_page(
  args: argparse.Namespace,
  settings: configs.Settings,
  scene: scenes.Scene,
  mesh,
  sketch: additions_lib.Additions | None = None,
) -> session_lib.Session:
  """Starts the server of a run and prints its address.

  With `sketch`, which draws the scene in the browser, the field is rendered when a view rests.

  Returns:
    The session, which renders when the caller's thread calls `work` or `serve`.

  Raises:
    ViewerError: viser is not installed, the address cannot be used, or there are several processes.
  """
  if jax.process_count() > 1:
    raise ViewerError(
      'The viewer works with one process only. Train without --viewer, and view the checkpoints '
      'with scripts/view.py.'
    )
  config = settings.config
  points = sparse_points.read(config.data_dir, scene.world_transform, scene.loader)
  capture = page_lib.Capture(
    config.checkpoint_dir, scene, points, config.last_step, sketch is not None
  )
  session = session_lib.Session(session_lib.Renderer(settings, scene, mesh))
  admission = Admission(args.host, args.origin)
  admission.additions = sketch
  server = _open_server(args.host, args.port, admission)
  server.gui.configure_theme(control_width='medium', show_logo=False, show_share_button=False)
  server.gui.set_panel_label('mip-NeRF 360')
  _set_initial_camera(server, capture)
  _serve_pages(server, lambda client: page_lib.Page(client, capture, session))
  progress.say(f'viewer at {admission.address(server.get_port())}')
  return session


def live(
  args: argparse.Namespace, settings: configs.Settings, scene: scenes.Scene, mesh
) -> Callable:
  """Opens a page as `open_page` does, for a run in training.

  Returns:
    A callback `(step, params) -> seconds spent` that training calls between dispatches.
  """
  session = open_page(args, settings, scene, mesh)

  def fraction(step: int) -> float:
    return float(train_step.train_fraction(step, settings.config.max_steps))

  return session_lib.Live(session, fraction, jax.block_until_ready)


def _open_server(host: str, port: int, admission: Admission):
  try:
    import viser
  except ImportError:
    raise ViewerError(f'viser is not installed: {installation.install_text("viewer")}') from None
  if not 0 < port < 65536:
    raise ViewerError(f'--port must be in [1, 65535], got {port}.')
  _check_host(host)
  if host not in LOCAL:
    print(
      f'Warning: the viewer answers other machines at {host}:{port}, without encryption. Anyone '
      "with the printed address can view the scene, and save paths and pictures in the run's "
      'folder.',
      file=sys.stderr,
    )
  with contextlib.redirect_stdout(io.StringIO()), admission.installed():  # viser prints a banner.
    server = viser.ViserServer(host=host, port=port, verbose=False)
  if not admission.is_installed:
    server.stop()
    raise ViewerError(
      f'viser {viser.__version__} starts its server in a way that leaves requests unchecked. '
      f'Install a tested version: {installation.install_text("viewer")}'
    )
  # What is sent to a browser that has just closed its page is lost, as it should be.
  warnings.filterwarnings('ignore', r'Queued a \w+ on a closed connection')
  # Otherwise any visitor could open a public tunnel to this server.
  server.request_share_url = lambda *_, **__: None
  return server


def _check_host(host: str) -> None:
  """Raises ViewerError unless this machine can listen at the host; viser would wait forever."""
  try:
    family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
      probe.bind(address)
  except OSError as error:
    raise ViewerError(
      f'--host {host} is not an address of this machine ({error}); use localhost, or 0.0.0.0 to '
      'admit other machines.'
    ) from None


def _serve_pages(server, make_page: Callable) -> None:
  """Makes a page for each browser that connects, and closes it when the browser disconnects."""
  pages = {}

  @server.on_client_connect
  def _(client):
    page = pages[client.client_id] = make_page(client)
    if client.client_id not in server.get_clients():  # Disconnected before the page was stored.
      page.close()

  @server.on_client_disconnect
  def _(client):
    if page := pages.pop(client.client_id, None):
      page.close()


def _set_initial_camera(server, capture: page_lib.Capture) -> None:
  """Starts visitors at the first test photograph, orbiting the point that the cameras look at."""
  scene = capture.scene
  cams = scene.cameras
  poses = np.asarray(cams.camtoworld, np.float64)
  row = (scene.test or scene.train)[0]
  pose = poses[row]
  focus = paths.focus_point(poses[list(scene.train)])
  ahead = max(float((pose[:, 3] - focus) @ pose[:, 2]), 0.3)
  up = orbits.mean_up(poses)
  server.scene.set_up_direction(tuple(up))
  server.initial_camera.position = tuple(pose[:, 3])
  server.initial_camera.look_at = tuple(pose[:, 3] - ahead * pose[:, 2])
  server.initial_camera.up = tuple(up)
  server.initial_camera.fov = page_lib.vertical_fov(cams, row)
