"""Pictures for people who look at a field as they please: coarse at once, finer while they wait.

One thread renders, for all visitors; what they want comes from other threads. Nothing here knows of
browsers (internal/viewer_ui.py does).
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
SPREAD_MAX = 4.0  # The ratio of distances that is drawn brightest; fixed, to compare pictures.
PROMPT = 0.12  # Seconds that the first picture of a view should take.
SHARE = 0.5  # Of the time, at most, that training gives to those who look.
_FEWEST = 48  # Pixels of the long side that are worth a picture.
_CHUNK_ON_CPU = 2048  # Rays at once: what a picture that is no longer wanted is given up after.
_POINT_SIDE, _POINT_VIEWS = 48, 24  # Pixels and cameras that points are taken from.


@dataclasses.dataclass(frozen=True)
class View:
  """What somebody wants to see."""

  pose: np.ndarray  # [3, 4] OpenGL camera axes to the normalised world.
  fov: float  # Vertical, radians.
  size: tuple[int, int]  # Width and height in pixels, of the finest picture.
  mode: str = MODES[0]
  clip: tuple[float, float] | None = None  # Distances of the near and far plane; None: none.


@dataclasses.dataclass(frozen=True)
class Picture:
  """What is seen in a view."""

  image: np.ndarray  # [h, w, 3] uint8
  depth: np.ndarray | None  # [h, w] along the optical axis; None in NDC, which has no lengths.
  legend: str  # What its colours mean.


class Moved(Exception):
  """The view is no longer wanted."""


def camera(view: View, size: tuple[int, int], pixtocam_ndc=None) -> structs.Cameras:
  """The one-row table of a view's camera, a pinhole of `size` (width, height)."""
  width, height = size
  focal = height / 2 / np.tan(view.fov / 2)
  pixtocam = cameras.pixtocam_from_intrinsics(focal, focal, width / 2, height / 2)
  return cameras.make_cameras(pixtocam, view.pose[None], size, pixtocam_ndc=pixtocam_ndc)


def draw_mode(mode: str, seen: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
  """A rendering, as `evaluation.make_image_renderer` has it, in one of MODES, and its legend.

  Raises:
    ValueError: an unknown mode.
  """
  if mode == 'colour':
    return pictures.to_uint8(seen['rgb']), ''
  if mode == 'depth':
    near, far = pictures.depth_range(seen['distance_median'], seen['acc'])
    image = pictures.depth_picture(seen['distance_median'], seen['acc'], (near, far))
    return image, f'median distance, bright {near:.3g} to dark {far:.3g}'
  if mode == 'opacity':
    return pictures.apply_colormap(seen['acc']), 'opacity, dark 0 to bright 1'
  if mode == 'normals':
    return pictures.normal_picture(seen['normals'], seen['acc']), 'red, green, blue are x, y, z'
  if mode == 'spread of distance':
    low, _, high = np.moveaxis(np.maximum(seen['distance_percentiles'], 1e-9), -1, 0)
    image = pictures.apply_colormap(np.log(np.maximum(high / low, 1)) / np.log(SPREAD_MAX))
    return image, f'95th over 5th percentile of distance, dark 1 to bright {SPREAD_MAX:g} or more'
  raise ValueError(f'The mode must be one of {", ".join(MODES)}, got {mode!r}.')


class Renderer:
  """Renders views of a scene; its programs are compiled when first needed."""

  def __init__(self, settings: configs.Settings, scene: scenes.Scene, mesh):
    config = settings.config
    if mesh.devices.flat[0].platform == 'cpu':
      fitting = max(1, min(config.render_chunk_size, _CHUNK_ON_CPU) // mesh.size) * mesh.size
      config = dataclasses.replace(config, render_chunk_size=fitting)
    self._settings = dataclasses.replace(settings, config=config)
    self._scene, self._mesh, self._programs = scene, mesh, {}

  @property
  def far(self) -> float:
    """The distance at which the field ends."""
    return self._settings.config.far

  def knows(self, view: View) -> bool:
    """Whether what the view needs has been compiled."""
    return self._kind(view) in self._programs

  def _kind(self, view: View) -> tuple[bool, bool, bool]:
    """With normals; between planes; and with a far plane that one can look through."""
    clipped = view.clip is not None
    return view.mode == 'normals', clipped, clipped and view.clip[1] < self.far

  def _program(self, view: View) -> Callable:
    kind = self._kind(view)
    if kind not in self._programs:
      with_normals, _, see_through = kind
      settings = self._settings
      if see_through:
        model = dataclasses.replace(settings.model, opaque_background=False)
        settings = dataclasses.replace(settings, model=model)
      self._programs[kind] = renderer_lib.make_image_renderer(
        settings, self._mesh, with_normals=with_normals
      )
    return self._programs[kind]

  def __call__(
    self,
    params,
    train_frac: float,
    view: View,
    size: tuple[int, int],
    progress: Callable[[int, int], None] | None = None,
  ) -> Picture:
    """The view in `size` (width, height); `progress` as in `evaluation.make_image_renderer`."""
    ndc = self._scene.cameras.pixtocam_ndc
    table = camera(view, size, ndc)
    seen = self._program(view)(params, table, 0, train_frac, progress, view.clip)
    image, legend = draw_mode(view.mode, seen)
    # Directions have z = -1 in the camera, so distances in units of them are along the axis.
    depth = np.where(seen['acc'] > 0.5, seen['distance_median'], self.far) if ndc is None else None
    return Picture(image, depth, legend)

  def points(self, params, train_frac: float) -> tuple[np.ndarray, np.ndarray]:
    """Points [n, 3] where training cameras see surfaces, at median distance, and their colours.

    Colours are uint8 [n, 3]. What is farther away than ten times the cameras' spread is left out.
    """
    table = trajectory.shrink(self._scene.cameras.take(np.array(self._scene.train)), _POINT_SIDE)
    count = len(table.size)
    rows = np.unique(np.linspace(0, count - 1, min(count, _POINT_VIEWS)).round().astype(int))
    plain = View(np.eye(3, 4), 1.0, (1, 1))
    places, colours = [], []
    for row in rows.tolist():
      seen = self._program(plain)(params, table, row, train_frac)
      origins, directions = surface_points.pixel_rays(table, row)
      place = origins + directions * seen['distance_median'][..., None]
      kept = (seen['acc'] > 0.5) & (np.linalg.norm(place, axis=-1) < 10)
      places.append(place[kept])
      colours.append(pictures.to_uint8(seen['rgb'])[kept])
    return np.concatenate(places), np.concatenate(colours)


def coarsest(size: tuple[int, int], rays: float) -> int:
  """How often to halve a picture's sides for it to have at most so many pixels, within reason."""
  level = 0
  while np.prod(shrunk(size, level)) > rays and max(shrunk(size, level + 1)) >= _FEWEST:
    level += 1
  return level


def shrunk(size: tuple[int, int], level: int) -> tuple[int, int]:
  """Width and height after halving so often."""
  return tuple(max(1, round(side / 2**level)) for side in size)


class Audience(Protocol):
  """Where pictures go; all of it is called by the rendering thread."""

  def show(self, picture: Picture, step: int, seconds: float, finest: bool) -> None:
    """Shows a picture of the field at a step, which took so long."""

  def wait(self) -> None:
    """Something is compiled first."""

  def fail(self, reason: str) -> None:
    """What was asked for could not be done."""


class Visitor:
  """Somebody who looks. The methods are for any thread; `wake` is called when there is work."""

  def __init__(self, audience: Audience, wake: Callable[[], None]):
    self.audience, self._wake = audience, wake
    self.jobs = collections.deque()
    self.view, self.version = None, 0
    # Of the rendering thread: what has been drawn, and how often its sides are halved.
    self.drawn_version, self.drawn_step, self.level, self.served = 0, -1, 0, 0.0

  def want(self, view: View) -> None:
    """This view is wanted, and none before it."""
    self.view = view
    self.version += 1
    self._wake()

  def ask(self, job: Callable) -> None:
    """Has the rendering thread call `job(renderer, params, train_frac, step)`."""
    self.jobs.append(job)
    self._wake()

  def unfinished(self, step: int) -> int | None:
    """How bad what it sees is: 0 (nothing of its view) is worst; None where nothing is to do."""
    if self.view is None:
      return None
    if self.drawn_version != self.version:
      return 0
    if self.level > 0:
      return 1
    return 2 if self.drawn_step != step else None


class Viewer:
  """Decides what is rendered next, and renders it."""

  def __init__(self, renderer: Renderer, clock: Callable[[], float] = time.monotonic):
    self.renderer, self._clock = renderer, clock
    self.visitors: list[Visitor] = []
    self.woken = threading.Event()
    self._rate = None  # Rays a second.

  def join(self, audience: Audience) -> Visitor:
    """A new visitor (from any thread)."""
    visitor = Visitor(audience, self.woken.set)
    self.visitors = [*self.visitors, visitor]
    return visitor

  def leave(self, visitor: Visitor) -> None:
    """The visitor is gone (from any thread); what it waits for is given up."""
    visitor.version += 1
    self.visitors = [v for v in self.visitors if v is not visitor]

  def work(self, params, step: int, train_frac: float) -> bool:
    """Renders the one picture, or does the one job, that is needed most; False if there is none.

    What fails is told to the visitor whose wish it was, and is not tried again.
    """
    visitors = self.visitors
    for visitor in visitors:
      if visitor.jobs:
        job = visitor.jobs.popleft()
        self._try(visitor, lambda job=job: job(self.renderer, params, train_frac, step))
        return True
    waiting = [v for v in visitors if v.unfinished(step) is not None]
    if not waiting:
      return False
    visitor = min(waiting, key=lambda v: (v.unfinished(step), v.served))
    visitor.served = self._clock()
    self._try(visitor, lambda: self._draw(visitor, params, step, train_frac))
    return True

  def _try(self, visitor: Visitor, act: Callable[[], None]) -> None:
    try:
      act()
    except Moved:
      pass
    except Exception as error:  # Whatever it is, neither training nor other visitors suffer.
      visitor.level = 0
      visitor.audience.fail(f'{type(error).__name__}: {" ".join(str(error).split())[:300]}')

  def _draw(self, visitor: Visitor, params, step: int, train_frac: float) -> None:
    """The next picture of a visitor's view."""
    version, view = visitor.version, visitor.view
    first = visitor.drawn_version != version
    if first:
      rays = _FEWEST**2 if self._rate is None else PROMPT * self._rate
      level = coarsest(view.size, rays)
    else:
      level = max(visitor.level - 1, 0)
    # Noted first, so that what fails is not tried for ever.
    visitor.drawn_version, visitor.drawn_step, visitor.level = version, step, level

    def still_wanted(*_):
      if visitor.version != version:
        raise Moved

    compiled, size = self.renderer.knows(view), shrunk(view.size, level)
    if not compiled:
      visitor.audience.wait()
    began = self._clock()
    # Who moves all the time must see something all the time: first pictures are not given up.
    picture = self.renderer(params, train_frac, view, size, None if first else still_wanted)
    seconds = self._clock() - began
    if compiled:
      self._rate = np.prod(size) / max(seconds, 1e-6)
    visitor.audience.show(picture, step, seconds, level == 0)

  def serve(self, params, step: int, train_frac: float) -> None:
    """Works until an exception, such as `signals.Stopped`, ends it."""
    while True:
      self.woken.clear()
      if not self.work(params, step, train_frac):
        self.woken.wait()


class Live:
  """A viewer of a field in training, worked by the training thread between its steps."""

  def __init__(self, viewer: Viewer, fraction: Callable[[int], float], wait: Callable):
    """`fraction(step)` is the share of training done, `wait(params)` awaits the steps so far."""
    self._viewer, self._fraction, self._wait = viewer, fraction, wait
    self._again = 0.0  # When there is time to render.

  def __call__(self, params, step: int) -> float:
    """Renders if somebody looks and training has had its share; returns the seconds it took."""
    if not self._viewer.visitors or time.monotonic() < self._again:
      return 0.0
    self._wait(params)
    began = time.monotonic()
    if not self._viewer.work(params, step, self._fraction(step)):
      return 0.0
    ended = time.monotonic()
    self._again = ended + (ended - began) * (1 / SHARE - 1)
    return ended - began
