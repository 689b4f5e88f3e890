"""Opens the viewer of a run, trained or in training: a web page on `viser` for each visitor."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable

import jax
import numpy as np

from .. import configs, paths
from ..datasets import scenes, sparse_points
from ..rendering import orbits
from ..system import progress
from ..training import train_step
from . import page as page_lib
from . import session
from .page import ViewerError

_LOCAL = ('localhost', '127.0.0.1', '::1')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds --host and --port."""
  parser.add_argument(
    '--host', default='localhost', help="the viewer's address; 0.0.0.0 lets other machines in"
  )
  parser.add_argument(
    '--port', type=int, default=8080, help="the viewer's port; the next free one if it is taken"
  )


def open_page(
  args: argparse.Namespace, settings: configs.Settings, scene: scenes.Scene, mesh
) -> session.Viewer:
  """Opens the page of a run and says where; the result is to be worked by the caller's thread.

  Raises:
    ViewerError: viser is missing, the address cannot be used, or there are several processes.
  """
  if jax.process_count() > 1:
    raise ViewerError(
      'The viewer is for one process. Train without --viewer, and look at the checkpoints with '
      'scripts/view.py.'
    )
  config = settings.config
  points = sparse_points.read(config.data_dir, scene.world_transform)
  capture = page_lib.Capture(config.checkpoint_dir, scene, points, config.last_step)
  watched = session.Viewer(session.Renderer(settings, scene, mesh))
  server = _open_server(args.host, args.port)
  server.gui.configure_theme(control_width='medium', show_logo=False, show_share_button=False)
  server.gui.set_panel_label('mip-NeRF 360')
  _place(server, capture)
  _receive(server, lambda client: page_lib.Page(client, capture, watched))
  host = server.get_host()
  progress.say(f'viewer at http://{"localhost" if host in _LOCAL else host}:{server.get_port()}')
  return watched


def live(
  args: argparse.Namespace, settings: configs.Settings, scene: scenes.Scene, mesh
) -> Callable:
  """A function that training calls after each step with its parameters and number.

  It returns the seconds that it took. As `open_page`, of which it also has the errors.
  """
  watched = open_page(args, settings, scene, mesh)
  fraction = lambda step: float(train_step.train_fraction(step, settings.config.max_steps))  # noqa: E731
  return session.Live(watched, fraction, jax.block_until_ready)


def _open_server(host: str, port: int):
  try:
    import viser
  except ImportError:
    raise ViewerError('The viewer needs viser: pip install -r requirements-viewer.txt') from None
  if not 0 < port < 65536:
    raise ViewerError(f'--port must be in [1, 65535], got {port}.')
  if host not in _LOCAL:
    print(
      f'Warning: whoever reaches {host}:{port} can look at the scene, and save paths and pictures '
      'in the folder of the run.',
      file=sys.stderr,
    )
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # It prints a panel of its own.
      server = viser.ViserServer(host=host, port=port, verbose=False)
  except OSError as error:
    raise ViewerError(f'No viewer at --host {host} --port {port}: {error}.') from None
  # Any visitor could have it make a tunnel to the outside.
  server.request_share_url = lambda *_, **__: None
  return server


def _receive(server, make_page: Callable) -> None:
  """Has a page made for each browser, and closed when it is gone."""
  pages = {}

  @server.on_client_connect
  def _(client):
    page = pages[client.client_id] = make_page(client)
    if client.client_id not in server.get_clients():  # Gone already, and nobody will say so.
      page.close()

  @server.on_client_disconnect
  def _(client):
    if page := pages.pop(client.client_id, None):
      page.close()


def _place(server, capture: page_lib.Capture) -> None:
  """Where visitors stand at first: at a photograph, turning around what the cameras look at."""
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
