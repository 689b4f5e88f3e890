"""The viewer's page: its controls and what they do, on top of `viser`.

Each browser has its own page, with its own view and keyframes. viser's cameras have OpenCV axes;
everything else here is in the normalised world with OpenGL axes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable

import jax
import numpy as np

from .. import cli
from ..datasets import scenes
from ..rendering import keyframes
from ..system import progress
from ..vis import pictures
from . import session as session_lib
from . import video_task
from .admission import ViewerError

_OPENGL_TO_OPENCV = np.diag([1.0, -1, -1])
_MAX_SIDE = 4096  # Pixels of a snapshot's side.
_DEPTH_MARGIN = 1.03  # Depths are scaled by this, so that surfaces do not hide points on them.
_MAX_FPS = 120
_RENDER, _STOP = 'Render the video', 'Stop rendering'
_BLUE, _ORANGE, _RED = (40, 110, 220), (235, 130, 20), (215, 40, 60)


@dataclasses.dataclass(frozen=True)
class Capture:
  """The parts of a training run that the pages need."""

  folder: str  # The run's folder, where paths and snapshots are saved.
  scene: scenes.Scene
  points: tuple[np.ndarray, np.ndarray] | None  # [n, 3] and colours; None: made by rendering.
  last_step: int
  has_splats: bool = False  # The browser draws 3D Gaussians where no picture is shown.

  @property
  def is_ndc(self) -> bool:
    return self.scene.cameras.pixtocam_ndc is not None

  @property
  def spacing(self) -> float:
    """The median distance of cameras to their nearest neighbour, clipped to 0.02 to 0.5."""
    positions = np.asarray(self.scene.cameras.camtoworld)[:, :, 3]  # [n, 3]
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)  # [n, n]
    np.fill_diagonal(distances, np.inf)
    nearest = np.median(distances.min(-1)) if len(positions) > 1 else 0.3
    return float(np.clip(nearest, 0.02, 0.5))


def vertical_fov(cams, row: int) -> float:
  """Returns a camera's vertical field of view in radians, approximately for a fisheye."""
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
  """Returns (width, height) with the aspect ratio width / height, whose longer side is `side`."""
  if aspect > 1:
    return side, max(1, round(side / aspect))
  return max(1, round(side * aspect)), side


class Page:
  """One visitor's page."""

  def __init__(self, client, capture: Capture, session: session_lib.Session):
    self._client, self._capture, self._session = client, capture, session
    self._lock = threading.Lock()  # viser runs each button's callback in a thread of its own.
    self._keys: list[keyframes.Keyframe] = []
    self._frames = []  # The path's frames: (pose, fov).
    self._camera_nodes, self._path_nodes = [], []
    self._points = None
    self._saved = None  # The last path that was saved: (document, its file).
    self._stop_video = None  # Stops the video that is being rendered.
    self._has_picture = False
    self._compiling = None  # The notice that a program is being compiled.
    self._visitor = session.join(self)
    self._build()
    client.camera.on_update(lambda _: self._request_view())
    self._request_view()

  def close(self) -> None:
    """Removes the visitor after its browser has disconnected."""
    self._session.leave(self._visitor)

  def _build(self) -> None:
    gui = self._client.gui
    self._status = gui.add_markdown('*waiting for the first picture*')
    self._build_view(gui)
    with gui.add_folder('Capture', expand_by_default=True):
      self._build_capture(gui)
    with gui.add_folder('Camera path', expand_by_default=False):
      self._build_path(gui)
    with gui.add_folder('Snapshot', expand_by_default=False):
      self._build_snapshot(gui)

  def _build_view(self, gui) -> None:
    self._mode = gui.add_dropdown('Show', session_lib.MODES)
    side, hint = 512 if jax.default_backend() == 'cpu' else 1024, 'Pixels of the longer side'
    self._side = gui.add_slider('Resolution', 64, 2048, 64, side, hint=hint)
    fov = float(np.degrees(self._client.camera.fov))
    self._fov = gui.add_slider('Field of view', 10, 120, 1, round(float(np.clip(fov, 10, 120))))
    self._clips = gui.add_checkbox('Clip by distance', False, visible=not self._capture.is_ndc)
    config_far = self._session.renderer.far
    self._near = gui.add_number('Near', 0.3, min=0.001, max=config_far, step=0.01, visible=False)
    self._far = gui.add_number('Far', 5.0, min=0.002, max=config_far, step=0.1, visible=False)
    self._sketches = gui.add_checkbox(
      'Gaussians while moving', self._capture.has_splats, visible=self._capture.has_splats
    )
    for handle in (self._sketches, self._mode, self._side, self._near, self._far):
      handle.on_update(lambda _: self._request_view())

    @self._fov.on_update
    def _(_):
      self._client.camera.fov = float(np.radians(self._fov.value))
      self._request_view()

    @self._clips.on_update
    def _(_):
      self._near.visible = self._far.visible = self._clips.value
      self._request_view()

  def _build_capture(self, gui) -> None:
    scene = self._capture.scene
    self._cameras = gui.add_checkbox('Cameras', False, hint='Blue: training. Orange: held out.')
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
    self._seconds = gui.add_number('Seconds per segment', 2.0, min=0.1, max=60, step=0.1)
    self._fps = gui.add_number('Frames per second', 30, min=1, max=_MAX_FPS, step=1)
    self._path_size = gui.add_vector2('Size', (1280, 720), min=(16, 16), step=1)
    self._position = gui.add_slider('Look along it', 0, 1, 0.005, 0)
    self._position.on_update(lambda _: self._preview_path())
    self._path_name = gui.add_text('Name', 'path')
    gui.add_button('Save the path').on_click(lambda _: self._edit(self._save_path))
    self._render = gui.add_button(_RENDER, hint="Renders the path's video into the run's folder")
    self._render.on_click(lambda _: self._edit(self._start_or_stop_video))
    self._video_text = gui.add_markdown('')

  def _build_snapshot(self, gui) -> None:
    self._shot_size = gui.add_vector2('Size', (1280, 720), min=(16, 16), step=1)
    gui.add_button('Save as PNG').on_click(lambda _: self._edit(self._snapshot))

  # Rendering.

  def _view(self, size: tuple[int, int]) -> session_lib.View:
    """Returns the view of the browser's camera with `size` (width, height) pixels."""
    camera = self._client.camera
    clip = None
    if self._clips.value:
      near = float(self._near.value)
      clip = near, max(float(self._far.value), near * 1.001)
    pose = _pose(camera.wxyz, camera.position)
    sketched = self._sketches.value and self._mode.value == session_lib.MODES[0] and not clip
    return session_lib.View(pose, float(camera.fov), size, self._mode.value, clip, sketched)

  def _request_view(self) -> None:
    size = _fitted(self._client.camera.aspect, int(self._side.value))
    self._visitor.set_view(self._view(size))

  def show(self, picture: session_lib.Picture, step: int, seconds: float, finest: bool) -> None:
    """Shows a picture; see `session.Display`."""
    has_overlay = self._cameras.value or self._dots.value or self._keys
    depth = _DEPTH_MARGIN * picture.depth if has_overlay and picture.depth is not None else None
    width, height = picture.size or picture.image.shape[1::-1]
    self._end_compiling()
    self._has_picture = True
    with self._client.atomic():
      self._client.scene.set_background_image(
        picture.image, format='jpeg', jpeg_quality=92 if finest else 75, depth=depth
      )
      legend = f'  \n{picture.legend}' if picture.legend else ''
      refining = '' if finest else ', refining'
      self._status.content = (
        f'step {step:,} of {self._capture.last_step:,}  \n'
        f'{width} x {height} in {seconds:.2f} s{refining}{legend}'
      )

  def hide(self) -> None:
    """Removes the picture; see `session.Display`."""
    if self._has_picture:
      self._has_picture = False
      with contextlib.suppress(RuntimeError):  # If the browser has disconnected.
        self._client.scene.set_background_image(None)
        self._status.content = '*Gaussians; the field follows when the view rests*'

  def show_compiling(self) -> None:
    """Shows that a program is being compiled; see `session.Display`."""
    self._status.content = '*compiling; this happens once for each kind of picture*'
    if self._compiling is None:
      with contextlib.suppress(RuntimeError):  # If the browser has disconnected.
        self._compiling = self._client.add_notification(
          'Compiling', 'Once for each kind of picture; then it is fast.',
          loading=True, with_close_button=False,
        )  # fmt: skip

  def _end_compiling(self) -> None:
    if self._compiling is not None:
      self._compiling.remove()
      self._compiling = None

  def show_error(self, reason: str) -> None:
    """Shows why a view or a job failed; see `session.Display`."""
    self._end_compiling()
    self._notify('Rendering failed', reason, 'red')

  def _notify(self, title: str, text: str, color: str | None = None) -> None:
    with contextlib.suppress(RuntimeError):  # If the browser has disconnected.
      self._client.add_notification(title, text, color=color)

  def _edit(self, act: Callable[[], object]) -> None:
    """Runs the action of a button, and shows its error if it fails."""
    try:
      with self._lock:
        act()
    except (ValueError, OSError) as error:
      self._notify('Error', str(error), 'red')

  # Cameras and points of the capture.

  def _show_cameras(self) -> None:
    scene, cams = self._capture.scene, self._capture.scene.cameras
    if not self._camera_nodes:
      held_out = set(scene.test)
      size = 0.35 * self._capture.spacing
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
        self._camera_nodes.append(node)
    for node in self._camera_nodes:
      node.visible = self._cameras.value
    self._request_view()

  def _show_points(self) -> None:
    if self._points is not None:
      self._points.visible = self._dots.value
      self._request_view()
    elif self._dots.value and self._capture.points is not None:
      self._add_points(*self._capture.points)
    elif self._dots.value:
      self._visitor.submit(
        lambda renderer, params, frac, _: self._add_points(*renderer.points(params, frac))
      )

  def _add_points(self, positions: np.ndarray, colours: np.ndarray) -> None:
    size = 0.05 * self._capture.spacing
    self._points = self._client.scene.add_point_cloud(
      '/points', np.float32(positions), colours, point_size=size, precision='float32',
      point_shape='circle', visible=self._dots.value,
    )  # fmt: skip
    self._request_view()

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
    self._request_view()

  # The camera path.

  def _add_key(self) -> None:
    view = self._view((1, 1))
    keys = [*self._keys, keyframes.Keyframe(view.pose, view.fov)]
    if len(keys) > 1:
      keyframes.between(keys[-2:], 1)  # Raises an error if both are the same camera.
    self._keys = keys
    self._show_path()

  def _remove_key(self) -> None:
    del self._keys[-1:]
    self._show_path()

  def _segment_frames(self) -> int:
    return max(1, round(float(self._seconds.value) * int(self._fps.value)))

  def _show_path(self) -> None:
    """Draws the keyframes and the path between them."""
    for node in self._path_nodes:
      node.remove()
    scene, size = self._client.scene, tuple(self._path_size.value)
    scale = 0.25 * self._capture.spacing
    self._path_nodes = [
      scene.add_camera_frustum(
        f'/path/key{k}', key.fov, size[0] / size[1], scale=scale, thickness=scale / 25,
        color=_RED, wxyz=_wxyz(key.pose), position=tuple(key.pose[:, 3]),
      )
      for k, key in enumerate(self._keys)
    ]  # fmt: skip
    self._frames = []
    count = len(self._keys)
    self._key_text.content = f'{count} keyframe{"" if count == 1 else "s"}; a path needs two.'
    if count > 1:
      poses, fovs = keyframes.between(self._keys, self._segment_frames())
      self._frames = list(zip(poses, fovs))
      ends = np.stack([poses[:-1, :, 3], poses[1:, :, 3]], 1)  # [n - 1, 2, 3]
      self._path_nodes.append(
        scene.add_line_segments('/path/line', np.float32(ends), _RED, thickness=scale / 15)
      )
      seconds = len(poses) / int(self._fps.value)
      self._key_text.content = (
        f'{count} keyframes, {len(poses)} frames, {progress.duration(seconds)}.'
      )
    self._request_view()

  def _preview_path(self) -> None:
    if self._frames:
      self._move(*self._frames[round(float(self._position.value) * (len(self._frames) - 1))])

  def _write_path(self, again: bool) -> tuple[dict, str]:
    """Saves the path to a new file, or if not `again` to the last one if that has the same path."""
    size = _checked_size(self._path_size.value)
    document = keyframes.document(
      self._keys,
      self._capture.scene.world_transform,
      size,
      int(self._fps.value),
      float(self._seconds.value),
    )
    folder = os.path.join(self._capture.folder, 'camera_paths')
    if again or not self._saved or self._saved[0] != document:
      path = keyframes.free_name(folder, self._path_name.value, '.json')
      keyframes.save(path, document)
      self._saved = document, path
    return self._saved

  def _save_path(self) -> None:
    document, path = self._write_path(again=True)
    self._key_text.content = (
      f'Saved {len(document["camera_path"])} frames. To render them:\n```\n'
      f'{cli.run_text("render", self._capture.folder, "--path", path)}\n```'
    )

  def _start_or_stop_video(self) -> None:
    if self._stop_video:
      self._stop_video.set()
      return
    _, path = self._write_path(again=False)
    stop = self._stop_video = threading.Event()
    self._render.label = _STOP
    self._say_of_video('*waiting*')
    run, scene = self._capture.folder, self._capture.scene
    task = video_task.make(run, scene, path, self._say_of_video, stop)

    def task_until_end(*args):
      try:
        yield from task(*args)
      finally:
        self._stop_video, self._render.label = None, _RENDER

    self._session.start(self._visitor, task_until_end)

  def _say_of_video(self, text: str) -> None:
    with contextlib.suppress(RuntimeError):  # If the browser has disconnected.
      self._video_text.content = text

  # Snapshots.

  def _snapshot(self) -> None:
    view = self._view(_checked_size(self._shot_size.value))

    def show_progress(done, total):
      self._status.content = f'snapshot: {done / total:.0%}'

    def job(renderer, params, frac, step):
      shot = renderer(params, frac, view, view.size, show_progress)
      name = f'{view.mode.split()[0]}_step{step:07d}'
      path = keyframes.free_name(os.path.join(self._capture.folder, 'snapshots'), name, '.png')
      pictures.write_png(path, shot.image)
      with open(path, 'rb') as f:
        self._client.send_file_download(os.path.basename(path), f.read(), save_immediately=True)
      self._status.content = f'Saved {os.path.relpath(path, self._capture.folder)}'

    self._visitor.submit(job)


def _checked_size(size) -> tuple[int, int]:
  width, height = (int(side) for side in size)
  if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
    raise ViewerError(f'Width and height must be in [1, {_MAX_SIDE}], got {width} x {height}.')
  return width, height
