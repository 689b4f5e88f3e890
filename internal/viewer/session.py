"""Interactive rendering: a coarse picture at once, refined while the camera rests.

One thread renders for all visitors. Their requests come from other threads. This module does not
depend on browsers; page.py connects it to one.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import numpy as np

from .. import cameras, configs, structs
from ..datasets import scenes
from ..rendering import renderer as renderer_lib
from ..rendering import surface_points, trajectory
from ..vis import pictures
from . import reprojection

MODES = ('colour', 'depth', 'opacity', 'normals', 'spread of distance')
SPREAD_MAX = 4.0  # The ratio drawn at full brightness; fixed, so that pictures are comparable.
FIRST_SECONDS = 0.12  # Target time of the first picture of a view.
REST_SECONDS = 0.2  # A view that the browser draws is rendered when it has not moved for so long.
SHARE = 0.5  # Of the training time, the most that rendering may take.
_MIN_SIDE = 32  # Pixels; a picture whose longer side is shorter is not worth showing.
_CHUNK_ON_CPU = 1024  # Rays; rendering can be cancelled after each chunk.
_LAST_DOUBLING = 0.6  # Levels; a last refinement smaller than this is not worth a picture.
_STEADY = ('colour', 'normals')  # Modes in which a surface keeps its colour as the camera moves.
_KEPT = 0.5  # A reference that shows less of the view than this fraction is replaced.
_POINT_SIDE, _POINT_VIEWS = 48, 24  # Size and number of the views that `points` renders.


@dataclasses.dataclass(frozen=True)
class View:
  """A view to render."""

  pose: np.ndarray  # [3, 4] OpenGL camera axes to the normalised world.
  fov: float  # Vertical, radians.
  size: tuple[int, int]  # Width and height of the finest picture, in pixels.
  mode: str = MODES[0]
  clip: tuple[float, float] | None = None  # Distances of the near and far planes; None: no planes.
  sketched: bool = False  # The browser draws it by itself until its finest picture is there.


_ANY_VIEW = View(np.eye(3, 4), 1.0, (1, 1))  # In colour, without planes.


@dataclasses.dataclass(frozen=True)
class Picture:
  """A rendered view."""

  image: np.ndarray  # [h, w, 3] uint8
  depth: np.ndarray | None  # [h, w] along the optical axis; None in NDC, which has no lengths.
  legend: str  # Explains the colours.
  size: tuple[int, int] | None = None  # Width and height as rendered, if the image is sharpened.


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
    self.chunk = settings.config.render_chunk_size  # Rays that are rendered at a time.
    if mesh.devices.flat[0].platform == 'cpu':
      self.chunk = max(1, min(self.chunk, _CHUNK_ON_CPU) // mesh.size) * mesh.size
    self.settings = settings.change('config', render_chunk_size=self.chunk)
    self._scene, self._mesh, self._programs = scene, mesh, {}

  @property
  def far(self) -> float:
    """The distance up to which rays are sampled."""
    return self.settings.config.far

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
      settings = self.settings
      if transparent:
        settings = settings.change('model', opaque_background=False)
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

  def frame(
    self, params, train_frac: float, cams: structs.Cameras, row: int, progress: Callable
  ) -> dict[str, np.ndarray]:
    """Renders a camera of a table; see `renderer.make_image_renderer`."""
    return self._program(_ANY_VIEW)(params, cams, row, train_frac, progress)

  def points(self, params, train_frac: float) -> tuple[np.ndarray, np.ndarray]:
    """Renders small training views; returns the surface points at their pixels.

    Leaves out points farther than 10 from the origin; the cameras are within about 1.

    Returns:
      Positions [n, 3] in the normalised world, and colours, uint8 [n, 3].
    """
    cams = trajectory.shrink(self._scene.cameras.take(np.array(self._scene.train)), _POINT_SIDE)
    count = len(cams.size)
    rows = np.unique(np.linspace(0, count - 1, min(count, _POINT_VIEWS)).round().astype(int))
    colour_program = self._program(_ANY_VIEW)
    positions, colours = [], []
    for row in rows.tolist():
      rendering = colour_program(params, cams, row, train_frac)
      xyz, rgb = surface_points.from_image(cams, row, rendering)  # [m, 3]
      kept = np.linalg.norm(xyz, axis=-1) < 10
      positions.append(xyz[kept])
      colours.append(rgb[kept])
    return np.concatenate(positions), np.concatenate(colours)


def level_within(size: tuple[int, int], rays: float) -> float:
  """Returns how often to halve a picture's sides, not a whole number, for at most `rays` pixels.

  Leaves the longer side at least 32 pixels.
  """
  level = max(0.0, np.log2(size[0] * size[1] / rays) / 2)
  while level and np.prod(shrunk(size, level)) > rays:  # Sides are rounded.
    level += 0.01
  return float(min(level, max(0.0, np.log2(max(size) / _MIN_SIDE))))


def shrunk(size: tuple[int, int], level: float) -> tuple[int, int]:
  """Returns (width, height) after halving both `level` times."""
  return tuple(max(1, round(side / 2**level)) for side in size)


class Display(Protocol):
  """Shows pictures to a visitor; the rendering thread calls its methods."""

  def show(self, picture: Picture, step: int, seconds: float, finest: bool) -> None:
    """Shows a picture of the model at a training step, which took `seconds` to render."""

  def hide(self) -> None:
    """Shows no picture, so that what the browser draws is seen; any thread may call this."""

  def show_compiling(self) -> None:
    """Shows that a program must be compiled first."""

  def show_error(self, reason: str) -> None:
    """Shows that a view or a job failed."""


class Visitor:
  """A visitor and the view it wants. Any thread may call the methods; `wake` wakes the renderer."""

  def __init__(self, display: Display, wake: Callable[[], None], clock=time.monotonic):
    self.display, self._wake, self._clock = display, wake, clock
    self.lock = threading.RLock()  # Held while the view changes, and while its picture is shown.
    self.jobs = collections.deque()
    self.view, self.version, self.moved = None, 0, 0.0
    # For the rendering thread: what was drawn last, how often its sides were halved, and when.
    self.drawn_version, self.drawn_step, self.level, self.served = 0, -1, 0.0, 0.0
    self.sharpest = None  # (what must stay the same, the picture as a Reference).

  def set_view(self, view: View) -> None:
    """Requests a view, which replaces the one before."""
    with self.lock:
      self.view, self.moved = view, self._clock()
      self.version += 1
      if view.sketched:
        self.display.hide()
    self._wake()

  def unrest(self) -> float:
    """Returns the seconds until the view may be rendered; 0 if the browser does not draw it."""
    if self.view is None or not self.view.sketched or self.drawn_version == self.version:
      return 0.0
    return max(0.0, self.moved + REST_SECONDS - self._clock())

  def submit(self, job: Callable) -> None:
    """Makes the rendering thread call `job(renderer, params, train_frac, step)`."""
    self.jobs.append(job)
    self._wake()

  def sharpen(self, view: View, picture: Picture, finest: bool) -> Picture:
    """Returns the picture, sharpened by the finest one so far if it is coarse.

    A picture is kept for this if it is the finest of its view, or if the one that was kept shows
    little of the view.
    """
    kind = view.mode, view.clip
    if picture.depth is None or view.mode not in _STEADY:
      return picture
    shown, coverage = picture, 0.0
    if not finest and self.sharpest and self.sharpest[0] == kind:
      image, depth, coverage = reprojection.sharpened(
        picture.image, picture.depth, view.pose, view.fov, view.size, self.sharpest[1]
      )
      shown = Picture(image, depth, picture.legend, picture.image.shape[1::-1])
    if finest or coverage < _KEPT:
      own = reprojection.Reference(picture.image, picture.depth, view.pose, view.fov)
      self.sharpest = kind, own
    return shown

  def priority(self, step: int) -> int | None:
    """Returns 0 for a new view, 1 to refine it, 2 for new parameters, None if all is drawn."""
    if self.view is None or self.unrest():
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
    self.tasks = collections.deque()  # (visitor, task) to do while no view waits.
    self._rate = None  # Rays per second.

  def join(self, display: Display) -> Visitor:
    """Adds a visitor; any thread may call this."""
    visitor = Visitor(display, self.has_work.set, self._clock)
    self.visitors = [*self.visitors, visitor]
    return visitor

  def leave(self, visitor: Visitor) -> None:
    """Removes a visitor and cancels its rendering; any thread may call this."""
    visitor.version += 1
    self.visitors = [v for v in self.visitors if v is not visitor]

  def start(self, visitor: Visitor, task: Callable[[], Iterator]) -> None:
    """Adds a long task, done in parts while no view waits, also after the visitor has left.

    `task(renderer, params, train_frac, step, pause)` returns an iterator of its parts; within a
    part, `pause()` renders the views that have come to wait.
    """
    self.tasks.append((visitor, task))
    self.has_work.set()

  def work(self, params, step: int, train_frac: float) -> bool:
    """Does what is most urgent: a job, a picture, or a part of a task; False if there is nothing.

    Errors are shown to the visitor who made the request, which is not tried again.
    """
    return self._serve(params, step, train_frac) or self._continue(params, step, train_frac)

  def _continue(self, params, step: int, train_frac: float) -> bool:
    """Does a part of the oldest task."""
    if not self.tasks:
      return False
    visitor, task = self.tasks[0]

    def pause(*_):
      while self._serve(params, step, train_frac):
        pass

    def go_on():
      nonlocal task
      if callable(task):
        # A copy of the parameters, since training goes on with them.
        own = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, params)
        task = task(self.renderer, own, train_frac, step, pause)
      self.tasks[0] = visitor, task
      next(task)

    self.tasks[0] = visitor, iter(())  # A part that fails is the last one.
    try:
      self._try(visitor, go_on)
    except StopIteration:
      self.tasks.popleft()
    return True

  def _serve(self, params, step: int, train_frac: float) -> bool:
    """Runs one job or renders one picture, the most urgent one; returns False if there is none."""
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
    except StopIteration:  # The end of a task.
      raise
    except Exception as error:  # Any error: training and other visitors must go on.
      visitor.level = 0
      visitor.display.show_error(f'{type(error).__name__}: {" ".join(str(error).split())[:300]}')

  def _draw(self, visitor: Visitor, params, step: int, train_frac: float) -> None:
    """Renders the next picture of a visitor's view."""
    version, view = visitor.version, visitor.view
    first = visitor.drawn_version != version
    if view.sketched:
      level = 0.0
    elif first:
      chunk = self.renderer.chunk
      rays = chunk if self._rate is None else FIRST_SECONDS * self._rate
      level = level_within(view.size, max(rays // chunk, 1) * chunk)  # A part costs as a whole.
    else:
      level = visitor.level - 1 if visitor.level > 1 + _LAST_DOUBLING else 0.0
    # Set before rendering, so that a view that fails is not tried again.
    visitor.drawn_version, visitor.drawn_step, visitor.level = version, step, level

    def check_view(*_):
      if visitor.version != version:
        raise ViewChanged

    compiled, size = self.renderer.is_compiled(view), shrunk(view.size, level)
    if not compiled:
      visitor.display.show_compiling()
    start = self._clock()
    # While the camera moves, first pictures are all that is shown, unless the browser draws.
    check = None if first and not view.sketched else check_view
    picture = self.renderer(params, train_frac, view, size, check)
    seconds = self._clock() - start
    if compiled:
      parts = -(-int(np.prod(size)) // self.renderer.chunk)
      self._rate = parts * self.renderer.chunk / max(seconds, 1e-6)
    picture = visitor.sharpen(view, picture, level == 0)
    with visitor.lock:
      if view.sketched:
        check_view()
      visitor.display.show(picture, step, seconds, level == 0)

  def serve(self, params, step: int, train_frac: float) -> None:
    """Renders until an exception, such as `signals.Stopped`, ends the loop."""
    while True:
      self.has_work.clear()
      if not self.work(params, step, train_frac):
        left = [seconds for v in self.visitors if (seconds := v.unrest())]
        self.has_work.wait(min(left, default=None))


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
    idle = not (self._session.visitors or self._session.tasks)
    if idle or time.monotonic() < self._next:
      return 0.0
    self._wait(params)
    start = time.monotonic()
    if not self._session.work(params, step, self._fraction(step)):
      return 0.0
    end = time.monotonic()
    self._next = end + (end - start) * (1 / SHARE - 1)
    return end - start
