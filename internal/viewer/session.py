"""Interactive rendering: a coarse picture at once, refined while the camera rests.

One thread renders for all visitors. Their requests come from other threads. This module does not
depend on browsers; page.py connects it to one.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from .. import cameras, configs, structs
from ..datasets import scenes
from ..rendering import renderer as renderer_lib
from ..rendering import surface_points, trajectory
from ..vis import pictures

MODES = ('colour', 'depth', 'opacity', 'normals', 'spread of distance')
SPREAD_MAX = 4.0  # The ratio drawn at full brightness; fixed, so that pictures are comparable.
FIRST_SECONDS = 0.12  # Target time of the first picture of a view.
SHARE = 0.5  # Of the training time, the most that rendering may take.
_MIN_SIDE = 48  # Pixels; a picture whose longer side is shorter is not worth showing.
_CHUNK_ON_CPU = 2048  # Rays; rendering can be cancelled after each chunk.
_POINT_SIDE, _POINT_VIEWS = 48, 24  # Size and number of the views that `points` renders.


@dataclasses.dataclass(frozen=True)
class View:
  """A view to render."""

  pose: np.ndarray  # [3, 4] OpenGL camera axes to the normalised world.
  fov: float  # Vertical, radians.
  size: tuple[int, int]  # Width and height of the finest picture, in pixels.
  mode: str = MODES[0]
  clip: tuple[float, float] | None = None  # Distances of the near and far planes; None: no planes.


@dataclasses.dataclass(frozen=True)
class Picture:
  """A rendered view."""

  image: np.ndarray  # [h, w, 3] uint8
  depth: np.ndarray | None  # [h, w] along the optical axis; None in NDC, which has no lengths.
  legend: str  # Explains the colours.


class ViewChanged(Exception):
  """Cancels the rendering of a view that is out of date."""


def camera(view: View, size: tuple[int, int], pixtocam_ndc=None) -> structs.Cameras:
  """Returns the camera of a view, a pinhole with `size` (width, height) pixels, as one row."""
  width, height = size
  focal = height / 2 / np.tan(view.fov / 2)
  pixtocam = cameras.pixtocam_from_intrinsics(focal, focal, width / 2, height / 2)
  return cameras.make_cameras(pixtocam, view.pose[None], size, pixtocam_ndc=pixtocam_ndc)


def draw_mode(mode: str, rendering: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
  """Draws a rendering of `renderer.make_image_renderer` in one of MODES.

  Returns:
    The picture, uint8 [h, w, 3], and its legend.

  Raises:
    ValueError: the mode is unknown.
  """
  if mode == 'colour':
    return pictures.to_uint8(rendering['rgb']), ''
  if mode == 'depth':
    median, opacity = rendering['distance_median'], rendering['acc']
    near, far = pictures.depth_range(median, opacity)
    image = pictures.depth_picture(median, opacity, (near, far))
    return image, f'median distance, bright {near:.3g} to dark {far:.3g}'
  if mode == 'opacity':
    return pictures.apply_colormap(rendering['acc']), 'opacity, dark 0 to bright 1'
  if mode == 'normals':
    image = pictures.normal_picture(rendering['normals'], rendering['acc'])
    return image, 'red, green, blue are x, y, z'
  if mode == 'spread of distance':
    low, _, high = np.moveaxis(np.maximum(rendering['distance_percentiles'], 1e-9), -1, 0)
    image = pictures.apply_colormap(np.log(np.maximum(high / low, 1)) / np.log(SPREAD_MAX))
    return image, f'95th over 5th percentile of distance, dark 1 to bright {SPREAD_MAX:g} or more'
  raise ValueError(f'The mode must be one of {", ".join(MODES)}, got {mode!r}.')


class Renderer:
  """Renders views of a scene; compiles its programs on first use."""

  def __init__(self, settings: configs.Settings, scene: scenes.Scene, mesh):
    config = settings.config
    if mesh.devices.flat[0].platform == 'cpu':
      chunk = max(1, min(config.render_chunk_size, _CHUNK_ON_CPU) // mesh.size) * mesh.size
      config = dataclasses.replace(config, render_chunk_size=chunk)
    self._settings = dataclasses.replace(settings, config=config)
    self._scene, self._mesh, self._programs = scene, mesh, {}

  @property
  def far(self) -> float:
    """The distance up to which rays are sampled."""
    return self._settings.config.far

  def is_compiled(self, view: View) -> bool:
    """Returns whether the program that the view needs has been compiled."""
    return self._variant(view) in self._programs

  def _variant(self, view: View) -> tuple[bool, bool, bool]:
    """Returns the key of a program: (has normals, is clipped, has a transparent far plane)."""
    clipped = view.clip is not None
    return view.mode == 'normals', clipped, clipped and view.clip[1] < self.far

  def _program(self, view: View) -> Callable:
    variant = self._variant(view)
    if variant not in self._programs:
      with_normals, _, transparent = variant
      settings = self._settings
      if transparent:
        model = dataclasses.replace(settings.model, opaque_background=False)
        settings = dataclasses.replace(settings, model=model)
      self._programs[variant] = renderer_lib.make_image_renderer(
        settings, self._mesh, with_normals=with_normals
      )
    return self._programs[variant]

  def __call__(
    self,
    params,
    train_frac: float,
    view: View,
    size: tuple[int, int],
    progress: Callable[[int, int], None] | None = None,
  ) -> Picture:
    """Renders a view with `size` (width, height) pixels.

    `progress(done, total)` is called after each chunk of rays; an exception cancels the rendering.
    """
    ndc = self._scene.cameras.pixtocam_ndc
    cams = camera(view, size, ndc)
    rendering = self._program(view)(params, cams, 0, train_frac, progress, view.clip)
    image, legend = draw_mode(view.mode, rendering)
    depth = None
    if ndc is None:
      # Ray directions have z = -1 in camera axes, so their distances are depths along the axis.
      depth = np.where(rendering['acc'] > 0.5, rendering['distance_median'], self.far)
    return Picture(image, depth, legend)

  def points(self, params, train_frac: float) -> tuple[np.ndarray, np.ndarray]:
    """Renders small training views; returns the surface points at their pixels.

    Leaves out points farther than 10 from the origin; the cameras are within about 1.

    Returns:
      Positions [n, 3] in the normalised world, and colours, uint8 [n, 3].
    """
    cams = trajectory.shrink(self._scene.cameras.take(np.array(self._scene.train)), _POINT_SIDE)
    count = len(cams.size)
    rows = np.unique(np.linspace(0, count - 1, min(count, _POINT_VIEWS)).round().astype(int))
    colour_program = self._program(View(np.eye(3, 4), 1.0, (1, 1)))
    positions, colours = [], []
    for row in rows.tolist():
      rendering = colour_program(params, cams, row, train_frac)
      origins, directions = surface_points.pixel_rays(cams, row)
      xyz = origins + directions * rendering['distance_median'][..., None]  # [h, w, 3]
      kept = (rendering['acc'] > 0.5) & (np.linalg.norm(xyz, axis=-1) < 10)  # [h, w]
      positions.append(xyz[kept])
      colours.append(pictures.to_uint8(rendering['rgb'])[kept])
    return np.concatenate(positions), np.concatenate(colours)


def level_within(size: tuple[int, int], rays: float) -> int:
  """Returns how often to halve a picture's sides for at most `rays` pixels.

  Stops halving before the longer side has fewer than 48 pixels.
  """
  level = 0
  while np.prod(shrunk(size, level)) > rays and max(shrunk(size, level + 1)) >= _MIN_SIDE:
    level += 1
  return level


def shrunk(size: tuple[int, int], level: int) -> tuple[int, int]:
  """Returns (width, height) after halving both `level` times."""
  return tuple(max(1, round(side / 2**level)) for side in size)


class Display(Protocol):
  """Shows pictures to a visitor; the rendering thread calls its methods."""

  def show(self, picture: Picture, step: int, seconds: float, finest: bool) -> None:
    """Shows a picture of the model at a training step, which took `seconds` to render."""

  def show_compiling(self) -> None:
    """Shows that a program must be compiled first."""

  def show_error(self, reason: str) -> None:
    """Shows that a view or a job failed."""


class Visitor:
  """A visitor and the view it wants. Any thread may call the methods; `wake` wakes the renderer."""

  def __init__(self, display: Display, wake: Callable[[], None]):
    self.display, self._wake = display, wake
    self.jobs = collections.deque()
    self.view, self.version = None, 0
    # For the rendering thread: what was drawn last, how often its sides were halved, and when.
    self.drawn_version, self.drawn_step, self.level, self.served = 0, -1, 0, 0.0

  def set_view(self, view: View) -> None:
    """Requests a view, which replaces the one before."""
    self.view = view
    self.version += 1
    self._wake()

  def submit(self, job: Callable) -> None:
    """Makes the rendering thread call `job(renderer, params, train_frac, step)`."""
    self.jobs.append(job)
    self._wake()

  def priority(self, step: int) -> int | None:
    """Returns 0 for a new view, 1 to refine it, 2 for new parameters, None if all is drawn."""
    if self.view is None:
      return None
    if self.drawn_version != self.version:
      return 0
    if self.level > 0:
      return 1
    return 2 if self.drawn_step != step else None


class Session:
  """Schedules and renders the views of all visitors."""

  def __init__(self, renderer: Renderer, clock: Callable[[], float] = time.monotonic):
    self.renderer, self._clock = renderer, clock
    self.visitors: list[Visitor] = []
    self.has_work = threading.Event()
    self._rate = None  # Rays per second.

  def join(self, display: Display) -> Visitor:
    """Adds a visitor; any thread may call this."""
    visitor = Visitor(display, self.has_work.set)
    self.visitors = [*self.visitors, visitor]
    return visitor

  def leave(self, visitor: Visitor) -> None:
    """Removes a visitor and cancels its rendering; any thread may call this."""
    visitor.version += 1
    self.visitors = [v for v in self.visitors if v is not visitor]

  def work(self, params, step: int, train_frac: float) -> bool:
    """Runs one job or renders one picture, the most urgent one; returns False if there is none.

    Errors are shown to the visitor who made the request, which is not tried again.
    """
    visitors = self.visitors
    for visitor in visitors:
      if visitor.jobs:
        job = visitor.jobs.popleft()
        self._try(visitor, lambda job=job: job(self.renderer, params, train_frac, step))
        return True
    waiting = [v for v in visitors if v.priority(step) is not None]
    if not waiting:
      return False
    visitor = min(waiting, key=lambda v: (v.priority(step), v.served))
    visitor.served = self._clock()
    self._try(visitor, lambda: self._draw(visitor, params, step, train_frac))
    return True

  def _try(self, visitor: Visitor, act: Callable[[], None]) -> None:
    try:
      act()
    except ViewChanged:
      pass
    except Exception as error:  # Any error: training and other visitors must go on.
      visitor.level = 0
      visitor.display.show_error(f'{type(error).__name__}: {" ".join(str(error).split())[:300]}')

  def _draw(self, visitor: Visitor, params, step: int, train_frac: float) -> None:
    """Renders the next picture of a visitor's view."""
    version, view = visitor.version, visitor.view
    first = visitor.drawn_version != version
    if first:
      rays = _MIN_SIDE**2 if self._rate is None else FIRST_SECONDS * self._rate
      level = level_within(view.size, rays)
    else:
      level = max(visitor.level - 1, 0)
    # Set before rendering, so that a view that fails is not tried again.
    visitor.drawn_version, visitor.drawn_step, visitor.level = version, step, level

    def check_view(*_):
      if visitor.version != version:
        raise ViewChanged

    compiled, size = self.renderer.is_compiled(view), shrunk(view.size, level)
    if not compiled:
      visitor.display.show_compiling()
    start = self._clock()
    # First pictures are never cancelled: while the camera moves, they are all that is shown.
    picture = self.renderer(params, train_frac, view, size, None if first else check_view)
    seconds = self._clock() - start
    if compiled:
      self._rate = np.prod(size) / max(seconds, 1e-6)
    visitor.display.show(picture, step, seconds, level == 0)

  def serve(self, params, step: int, train_frac: float) -> None:
    """Renders until an exception, such as `signals.Stopped`, ends the loop."""
    while True:
      self.has_work.clear()
      if not self.work(params, step, train_frac):
        self.has_work.wait()


class Live:
  """A training callback that renders for visitors between two steps."""

  def __init__(self, session: Session, fraction: Callable[[int], float], wait: Callable):
    """Takes `fraction(step)`, the fraction of training done, and `wait(params)`, which blocks."""
    self._session, self._fraction, self._wait = session, fraction, wait
    self._next = 0.0  # Time from which rendering is allowed again.

  def __call__(self, step: int, params) -> float:
    """Renders one picture if there are visitors and training has had its share of the time.

    Returns:
      The seconds spent rendering.
    """
    if not self._session.visitors or time.monotonic() < self._next:
      return 0.0
    self._wait(params)
    start = time.monotonic()
    if not self._session.work(params, step, self._fraction(step)):
      return 0.0
    end = time.monotonic()
    self._next = end + (end - start) * (1 / SHARE - 1)
    return end - start
