"""The page of the viewer: what a visitor sees and can press, on `viser`.

Each browser is a visitor of its own: its view, its keyframes. viser's cameras have OpenCV axes; all
else here is in the normalised world with OpenGL axes, as everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import threading
from collections.abc import Callable

import jax
import numpy as np

from ..datasets import scenes
from ..errors import UserError
from ..rendering import keyframes
from ..system import installation, progress
from ..vis import pictures
from . import session

_OPENGL_TO_OPENCV = np.diag([1.0, -1, -1])
_MAX_SIDE = 4096  # Pixels of a snapshot.
_BEHIND = 1.03  # Times the distance of a surface, where things are hidden: not points on it.
_FASTEST = 120  # Frames per second of a path.
_BLUE, _ORANGE, _RED = (40, 110, 220), (235, 130, 20), (215, 40, 60)


class ViewerError(UserError):
  """What keeps the viewer from being opened."""


@dataclasses.dataclass(frozen=True)
class Capture:
  """What the pages need of a training run."""

  folder: str  # The run's; what visitors save goes there.
  scene: scenes.Scene
  points: tuple[np.ndarray, np.ndarray] | None  # [n, 3] and colours; None: taken from the field.
  last_step: int

  @property
  def is_ndc(self) -> bool:
    return self.scene.cameras.pixtocam_ndc is not None


def vertical_fov(cams, row: int) -> float:
  """A camera's vertical field of view in radians; of a fisheye, roughly."""
  slope = float(cams.size[row, 1] * cams.pixtocam[row, 1, 1]) / 2
  return float(np.clip(2 * np.arctan(slope), 0.1, 2.5))


def _wxyz(pose: np.ndarray) -> np.ndarray:
  import viser.transforms

  return viser.transforms.SO3.from_matrix(pose[:, :3] @ _OPENGL_TO_OPENCV).wxyz


def _pose(wxyz: np.ndarray, position: np.ndarray) -> np.ndarray:
  import viser.transforms

  rotation = viser.transforms.SO3(np.asarray(wxyz)).as_matrix() @ _OPENGL_TO_OPENCV
  return np.concatenate([rotation, np.asarray(position, np.float64)[:, None]], -1)


def _fitted(aspect: float, side: int) -> tuple[int, int]:
  """Width and height of that aspect whose longer one is `side`."""
  return (
    (side, max(1, round(side / aspect))) if aspect > 1 else (max(1, round(side * aspect)), side)
  )


class Page:
  """One visitor's page."""

  def __init__(self, client, capture: Capture, watched: session.Viewer):
    self._client, self._capture, self._watched = client, capture, watched
    self._lock = threading.Lock()  # Of all that buttons change: each press has its own thread.
    self._keys: list[keyframes.Keyframe] = []
    self._frames = []  # Of the path through them: (pose, fov).
    self._nodes, self._path_nodes = [], []
    self._points = None
    self._visitor = watched.join(self)
    self._build()
    client.camera.on_update(lambda _: self._look())
    self._look()

  def close(self) -> None:
    """The browser is gone."""
    self._watched.leave(self._visitor)

  def _build(self) -> None:
    gui = self._client.gui
    self._status = gui.add_markdown('*waiting for a picture*')
    self._build_view(gui)
    with gui.add_folder('Capture', expand_by_default=True):
      self._build_capture(gui)
    with gui.add_folder('Camera path', expand_by_default=False):
      self._build_path(gui)
    with gui.add_folder('Snapshot', expand_by_default=False):
      self._build_snapshot(gui)

  def _build_view(self, gui) -> None:
    on_cpu = jax.default_backend() == 'cpu'
    self._mode = gui.add_dropdown('Show', session.MODES)
    self._side = gui.add_slider(
      'Resolution', 64, 2048, 64, 512 if on_cpu else 1024, hint='Pixels of the longer side, at rest'
    )
    fov = float(np.degrees(self._client.camera.fov))
    self._fov = gui.add_slider('Field of view', 10, 120, 1, round(float(np.clip(fov, 10, 120))))
    self._clips = gui.add_checkbox('Clip by distance', False, visible=not self._capture.is_ndc)
    config_far = self._watched.renderer.far
    self._near = gui.add_number('Near', 0.3, min=0.001, max=config_far, step=0.01, visible=False)
    self._far = gui.add_number('Far', 5.0, min=0.002, max=config_far, step=0.1, visible=False)
    for handle in (self._mode, self._side, self._near, self._far):
      handle.on_update(lambda _: self._look())

    @self._fov.on_update
    def _(_):
      self._client.camera.fov = float(np.radians(self._fov.value))
      self._look()

    @self._clips.on_update
    def _(_):
      self._near.visible = self._far.visible = self._clips.value
      self._look()

  def _build_capture(self, gui) -> None:
    scene = self._capture.scene
    self._cameras = gui.add_checkbox('Cameras', False, hint='Blue: trained on. Orange: held out.')
    self._cameras.on_update(lambda _: self._show_cameras())
    self._dots = gui.add_checkbox('Points', False, visible=not self._capture.is_ndc)
    self._dots.on_update(lambda _: self._show_points())
    rows = {f'{i}: {name}': i for i, name in enumerate(scene.names)}
    pick = gui.add_dropdown('Go to photograph', ['', *rows], initial_value='')
    pick.on_update(lambda _: self._go_to(rows[pick.value]) if pick.value else None)

  def _build_path(self, gui) -> None:
    self._key_text = gui.add_markdown('No keyframes yet.')
    gui.add_button('Add this view').on_click(lambda _: self._edit(self._add_key))
    gui.add_button('Remove the last').on_click(lambda _: self._edit(self._remove_key))
    self._seconds = gui.add_number('Seconds a gap', 2.0, min=0.1, max=60, step=0.1)
    self._fps = gui.add_number('Frames a second', 30, min=1, max=_FASTEST, step=1)
    self._path_size = gui.add_vector2('Size', (1280, 720), min=(16, 16), step=1)
    self._along = gui.add_slider('Look along it', 0, 1, 0.005, 0)
    self._along.on_update(lambda _: self._look_along())
    self._path_name = gui.add_text('Name', 'path')
    gui.add_button('Save the path').on_click(lambda _: self._edit(self._save_path))

  def _build_snapshot(self, gui) -> None:
    self._shot_size = gui.add_vector2('Size', (1280, 720), min=(16, 16), step=1)
    gui.add_button('Save as PNG').on_click(lambda _: self._edit(self._snapshot))

  # What is seen.

  def _view(self, size: tuple[int, int]) -> session.View:
    """What the browser's camera sees, in so many pixels."""
    camera = self._client.camera
    clip = None
    if self._clips.value:
      near = float(self._near.value)
      clip = near, max(float(self._far.value), near * 1.001)
    pose = _pose(camera.wxyz, camera.position)
    return session.View(pose, float(camera.fov), size, self._mode.value, clip)

  def _look(self) -> None:
    self._visitor.want(self._view(_fitted(self._client.camera.aspect, int(self._side.value))))

  def show(self, picture: session.Picture, step: int, seconds: float, finest: bool) -> None:
    """Shows a picture (as `viewer.Audience`)."""
    things = self._cameras.value or self._dots.value or self._keys
    height, width = picture.image.shape[:2]
    with self._client.atomic():
      self._client.scene.set_background_image(
        picture.image,
        format='jpeg',
        jpeg_quality=92 if finest else 75,
        depth=_BEHIND * picture.depth if things and picture.depth is not None else None,
      )
      legend = f'  \n{picture.legend}' if picture.legend else ''
      more = '' if finest else ', refining'
      self._status.content = (
        f'step {step:,} of {self._capture.last_step:,}  \n'
        f'{width} x {height} in {seconds:.2f} s{more}{legend}'
      )

  def wait(self) -> None:
    """Says that something is compiled first (as `viewer.Audience`)."""
    self._status.content = '*compiling, once for this kind of picture*'

  def fail(self, reason: str) -> None:
    """Says what went wrong (as `viewer.Audience`)."""
    self._notify('That failed', reason, 'red')

  def _notify(self, title: str, text: str, color: str | None = None) -> None:
    with contextlib.suppress(RuntimeError):  # Where the browser has gone meanwhile.
      self._client.add_notification(title, text, color=color)

  def _edit(self, act: Callable[[], object]) -> None:
    """Does what a button asks for; what cannot be done is told."""
    try:
      with self._lock:
        act()
    except (ValueError, OSError) as error:
      self._notify('That cannot be done', str(error), 'red')

  # The capture.

  def _show_cameras(self) -> None:
    scene, cams = self._capture.scene, self._capture.scene.cameras
    if not self._nodes:
      held_out = set(scene.test)
      size = 0.35 * _spacing(np.asarray(cams.camtoworld)[:, :, 3])
      for row in sorted({*scene.train, *held_out}):
        node = self._client.scene.add_camera_frustum(
          f'/cameras/{row}',
          vertical_fov(cams, row),
          float(cams.size[row, 0] / cams.size[row, 1]),
          scale=size,
          thickness=size / 40,
          color=_ORANGE if row in held_out else _BLUE,
          wxyz=_wxyz(np.asarray(cams.camtoworld[row], np.float64)),
          position=tuple(cams.camtoworld[row, :, 3]),
        )
        node.on_click(lambda _, row=row: self._go_to(row))
        self._nodes.append(node)
    for node in self._nodes:
      node.visible = self._cameras.value
    self._look()

  def _show_points(self) -> None:
    if self._points is not None:
      self._points.visible = self._dots.value
      self._look()
    elif self._dots.value and self._capture.points is not None:
      self._add_points(*self._capture.points)
    elif self._dots.value:
      self._visitor.ask(
        lambda renderer, params, frac, _: self._add_points(*renderer.points(params, frac))
      )

  def _add_points(self, places: np.ndarray, colours: np.ndarray) -> None:
    size = 0.05 * _spacing(np.asarray(self._capture.scene.cameras.camtoworld)[:, :, 3])
    self._points = self._client.scene.add_point_cloud(
      '/points', np.float32(places), colours, point_size=size, precision='float32',
      point_shape='circle', visible=self._dots.value,
    )  # fmt: skip
    self._look()

  def _go_to(self, row: int) -> None:
    cams = self._capture.scene.cameras
    self._move(np.asarray(cams.camtoworld[row], np.float64), vertical_fov(cams, row))

  def _move(self, pose: np.ndarray, fov: float) -> None:
    camera = self._client.camera
    with self._client.atomic():
      camera.position = pose[:, 3]
      camera.wxyz = _wxyz(pose)
      camera.fov = fov
    self._fov.value = round(float(np.clip(np.degrees(fov), 10, 120)))
    self._look()

  # The path.

  def _add_key(self) -> None:
    view = self._view((1, 1))
    keys = [*self._keys, keyframes.Keyframe(view.pose, view.fov)]
    if len(keys) > 1:
      keyframes.between(keys[-2:], 1)  # Or it is the last one again, which is told.
    self._keys = keys
    self._show_path()

  def _remove_key(self) -> None:
    del self._keys[-1:]
    self._show_path()

  def _gap_frames(self) -> int:
    return max(1, round(float(self._seconds.value) * int(self._fps.value)))

  def _show_path(self) -> None:
    """Draws the keyframes and what is between them."""
    for node in self._path_nodes:
      node.remove()
    scene, size = self._client.scene, tuple(self._path_size.value)
    scale = 0.25 * _spacing(np.asarray(self._capture.scene.cameras.camtoworld)[:, :, 3])
    self._path_nodes = [
      scene.add_camera_frustum(
        f'/path/key{k}', key.fov, size[0] / size[1], scale=scale, thickness=scale / 25,
        color=_RED, wxyz=_wxyz(key.pose), position=tuple(key.pose[:, 3]),
      )
      for k, key in enumerate(self._keys)
    ]  # fmt: skip
    self._frames = []
    self._key_text.content = f'{len(self._keys)} keyframes; a path needs two.'
    if len(self._keys) > 1:
      poses, fovs = keyframes.between(self._keys, self._gap_frames())
      self._frames = list(zip(poses, fovs))
      ends = np.stack([poses[:-1, :, 3], poses[1:, :, 3]], 1)
      self._path_nodes.append(
        scene.add_line_segments('/path/line', np.float32(ends), _RED, thickness=scale / 15)
      )
      seconds = len(poses) / int(self._fps.value)
      self._key_text.content = (
        f'{len(self._keys)} keyframes, {len(poses)} frames, {progress.duration(seconds)}.'
      )
    self._look()

  def _look_along(self) -> None:
    if self._frames:
      self._move(*self._frames[round(float(self._along.value) * (len(self._frames) - 1))])

  def _save_path(self) -> None:
    size = _checked_size(self._path_size.value)
    made = keyframes.document(
      self._keys,
      self._capture.scene.world_transform,
      size,
      int(self._fps.value),
      float(self._seconds.value),
    )
    folder = os.path.join(self._capture.folder, 'camera_paths')
    path = keyframes.free_name(folder, self._path_name.value, '.json')
    keyframes.save(path, made)
    self._key_text.content = (
      f'Saved: {len(made["camera_path"])} frames. To render them:\n```\n'
      f'{installation.command_text("render")} '
      f'--checkpoint_dir {shlex.quote(self._capture.folder)} --gin_bindings '
      f'{shlex.quote(f"Config.render_path_file = {path!r}")}\n```'
    )

  # Snapshots.

  def _snapshot(self) -> None:
    view = self._view(_checked_size(self._shot_size.value))

    def progressed(done, total):
      self._status.content = f'snapshot: {done / total:.0%}'

    def job(renderer, params, frac, step):
      shot = renderer(params, frac, view, view.size, progressed)
      name = f'{view.mode.split()[0]}_step{step:07d}'
      path = keyframes.free_name(os.path.join(self._capture.folder, 'snapshots'), name, '.png')
      pictures.write_png(path, shot.image)
      with open(path, 'rb') as f:
        self._client.send_file_download(os.path.basename(path), f.read(), save_immediately=True)
      self._status.content = f'Saved: {os.path.relpath(path, self._capture.folder)}'

    self._visitor.ask(job)


def _checked_size(size) -> tuple[int, int]:
  width, height = (int(side) for side in size)
  if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
    raise ViewerError(f'Width and height must be in [1, {_MAX_SIDE}], got {width} x {height}.')
  return width, height


def _spacing(positions: np.ndarray) -> float:
  """How far cameras [n, 3] are apart from their nearest neighbours, typically."""
  apart = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
  np.fill_diagonal(apart, np.inf)
  nearest = np.median(apart.min(-1)) if len(positions) > 1 else 0.3
  return float(np.clip(nearest, 0.02, 0.5))
