"""Tests of the viewer's rendering session, with displays that are not browsers."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from internal import cameras, models
from internal.datasets import scenes, sparse_points
from internal.rendering import renderer as renderer_lib
from internal.rendering import trajectory
from internal.viewer import session, video_task

POSE = np.concatenate([np.eye(3), [[0.1], [0.2], [0.3]]], -1)


def view(mode='colour', size=(20, 12), clip=None, pose=POSE):
  return session.View(pose, 1.0, size, mode, clip)


def make_scene(cams, **more):
  n = len(cams.size)
  names = tuple(f'{i}.png' for i in range(n))
  return scenes.Scene(
    loader='llff', files=names, names=names, cameras=cams, train=tuple(range(1, n)), test=(0,),
    world_transform=np.eye(4), background='none', bounds=None, report={}, **more,
  )  # fmt: skip


class FakeDisplay:
  """Records what is shown."""

  def __init__(self):
    self.shown, self.compilations, self.failures, self.hidden = [], 0, [], 0

  def hide(self):
    self.hidden += 1

  def show(self, picture, step, seconds, finest):
    self.shown.append((picture, step, finest))

  def show_compiling(self):
    self.compilations += 1

  def show_error(self, reason):
    self.failures.append(reason)

  @property
  def sizes(self):
    return [picture.image.shape[1::-1] for picture, _, _ in self.shown]


class FakeRenderer:
  """Takes `cost` seconds of a fake clock for each ray, in chunks of 100."""

  chunk = 100

  def __init__(self, cost=1e-3):
    self.now, self.cost, self.calls, self.during = 0.0, cost, [], None

  def clock(self):
    return self.now

  def is_compiled(self, wanted):
    return bool(self.calls)

  def __call__(self, params, train_frac, wanted, size, progress=None):
    self.calls.append((wanted, size))
    for done in range(0, size[0] * size[1], 100):
      self.now += 100 * self.cost
      if self.during:
        self.during(done)
      if progress:
        progress(done, size[0] * size[1])
    return session.Picture(np.zeros((size[1], size[0], 3), np.uint8), None, '')


@pytest.fixture
def fake():
  return FakeRenderer()


@pytest.fixture
def viewer(fake):
  return session.Session(fake, fake.clock)


def work_all(viewer, step=1, limit=50):
  done = 0
  while viewer.work('params', step, 0.5):
    done += 1
    assert done < limit
  return done


class TestLoop:
  def test_first_picture_is_coarse_then_refined_to_full_size(self, viewer, fake):
    display = FakeDisplay()
    visitor = viewer.join(display)
    visitor.set_view(view(size=(640, 360)))
    work_all(viewer)
    assert display.sizes[-1] == (640, 360)
    assert [finest for *_, finest in display.shown] == [False] * (len(display.shown) - 1) + [True]
    areas = [w * h for w, h in display.sizes]
    assert areas[0] <= 64**2
    assert areas == sorted(areas)
    assert len(areas) == len(set(areas)) >= 3
    assert display.compilations == 1  # The first one is compiled.

  def test_first_picture_is_as_large_as_its_time_allows(self, viewer, fake):
    display = FakeDisplay()
    visitor = viewer.join(display)
    visitor.set_view(view(size=(640, 360)))
    work_all(viewer)
    fake.cost = 1e-5  # A faster device.
    work_all(viewer, step=2)
    visitor.set_view(view(size=(640, 360)))
    before = fake.now
    assert viewer.work('params', 2, 0.5)
    assert 0.25 * session.FIRST_SECONDS < fake.now - before <= session.FIRST_SECONDS + 0.01

  def test_no_work_without_visitors_or_requests(self, viewer, fake):
    assert not viewer.work('params', 1, 0.5)
    visitor = viewer.join(FakeDisplay())
    assert not viewer.work('params', 1, 0.5)  # It has not set a view.
    visitor.set_view(view())
    work_all(viewer)
    calls = len(fake.calls)
    assert not viewer.work('params', 1, 0.5)
    viewer.leave(visitor)
    visitor.set_view(view())
    assert not viewer.work('params', 2, 0.5)
    assert len(fake.calls) == calls

  def test_moving_cancels_refinements_but_not_the_first_picture(self, viewer, fake):
    display = FakeDisplay()
    visitor = viewer.join(display)
    visitor.set_view(view(size=(640, 360)))
    other = view(size=(640, 360), pose=POSE + 1)

    def move(done):
      if done == 300:
        visitor.set_view(other)

    fake.during = move
    viewer.work('params', 1, 0.5)
    assert len(display.shown) == 1  # The first one is shown nevertheless.
    fake.during = None
    assert viewer.work('params', 1, 0.5)
    fake.during = move
    began = fake.now
    viewer.work('params', 1, 0.5)
    assert len(display.shown) == 2
    assert fake.now - began < 0.6  # Much less than a full picture takes.
    fake.during = None
    viewer.work('params', 1, 0.5)
    assert fake.calls[-1][0] is other
    assert display.sizes[-1] == display.sizes[0]
    assert not display.failures

  def test_a_view_that_the_browser_draws_is_rendered_finely_when_it_rests(self, viewer, fake):
    display = FakeDisplay()
    visitor = viewer.join(display)
    drawn = dataclasses.replace(view(size=(640, 360)), sketched=True)
    for _ in range(3):
      visitor.set_view(drawn)
      assert not viewer.work('params', 1, 0.5)
      assert 0 < visitor.unrest() <= session.REST_SECONDS
      fake.now += 0.9 * session.REST_SECONDS
    assert (fake.calls, display.hidden) == ([], 3)
    fake.now += 0.2 * session.REST_SECONDS
    assert work_all(viewer) == 1
    assert display.sizes == [(640, 360)]
    assert [finest for *_, finest in display.shown] == [True]
    # New parameters do not wait.
    assert work_all(viewer, step=2) == 1
    assert display.hidden == 3

  def test_a_picture_is_not_shown_over_what_the_browser_draws_of_another_view(self, viewer, fake):
    display = FakeDisplay()
    visitor = viewer.join(display)
    drawn = dataclasses.replace(view(size=(640, 360)), sketched=True)
    for moment in (300, 640 * 360 - 100):  # While it is rendered, and after the last check.
      fake.now += 1

      def move(done, moment=moment):
        if done >= moment:
          fake.during = None
          visitor.set_view(drawn)

      visitor.set_view(drawn)
      fake.now += 1
      fake.during = move
      assert viewer.work('params', 1, 0.5)
      assert not display.shown
      assert not viewer.work('params', 1, 0.5)
    fake.now += 1
    work_all(viewer)
    assert len(display.shown) == 1
    assert not display.failures

  def test_serving_goes_on_when_a_view_comes_to_rest(self, viewer):
    display, real = FakeDisplay(), session.Session(FakeRenderer())
    display.show = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    real.join(display).set_view(dataclasses.replace(view(), sketched=True))
    with pytest.raises(KeyboardInterrupt):
      real.serve('params', 1, 0.5)

  def test_the_visitor_who_moved_comes_first(self, viewer, fake):
    first, second = FakeDisplay(), FakeDisplay()
    a, b = viewer.join(first), viewer.join(second)
    a.set_view(view(size=(640, 360)))
    viewer.work('params', 1, 0.5)
    b.set_view(view(size=(640, 360)))
    viewer.work('params', 1, 0.5)
    assert (len(first.shown), len(second.shown)) == (1, 1)
    work_all(viewer)
    assert first.sizes[-1] == second.sizes[-1] == (640, 360)
    assert len(first.shown) == len(second.shown)  # They take turns.

  def test_new_parameters_are_shown_at_full_size_at_once(self, viewer):
    display = FakeDisplay()
    viewer.join(display).set_view(view(size=(640, 360)))
    work_all(viewer)
    before = len(display.shown)
    assert work_all(viewer, step=2) == 1
    assert display.shown[before][1:] == (2, True)

  def test_an_error_is_shown_once_and_others_go_on(self, viewer, fake):
    bad, good = FakeDisplay(), FakeDisplay()
    visitor = viewer.join(bad)
    visitor.set_view(view())
    fake.during = lambda done: 1 / 0
    work_all(viewer)
    assert bad.failures == ['ZeroDivisionError: division by zero']
    fake.during = None
    viewer.join(good).set_view(view())
    work_all(viewer)
    assert good.shown
    assert not good.failures
    visitor.set_view(view())
    work_all(viewer)
    assert bad.shown

  def test_jobs_come_first_and_get_the_parameters(self, viewer, fake):
    display, calls = FakeDisplay(), []
    visitor = viewer.join(display)
    visitor.set_view(view())
    visitor.submit(lambda *args: calls.append(args))
    assert viewer.work('params', 7, 0.5)
    assert calls == [(fake, 'params', 0.5, 7)]
    assert not display.shown

  def test_serve_waits_for_work_and_ends_with_an_exception(self, viewer):
    class End(BaseException):
      pass

    display, naps = FakeDisplay(), []
    visitor = viewer.join(display)

    class FakeEvent:
      set, clear = staticmethod(lambda: None), staticmethod(lambda: None)

      def wait(self, timeout):
        assert timeout is None  # No view comes to rest.
        naps.append(len(display.shown))
        if len(naps) == 2:
          raise End
        visitor.set_view(view())

    viewer.has_work = FakeEvent()
    with pytest.raises(End):
      viewer.serve('params', 1, 0.5)
    assert naps == [0, len(display.shown)]
    assert display.shown


class TestSharpening:
  """The view moves a little, with a renderer whose pictures tell their size."""

  SIZE = (160, 96)

  @pytest.fixture
  def visit(self, monkeypatch):
    calls = []

    def sharpened(image, depth, pose, fov, size, reference):
      calls.append((image, pose, reference))
      return np.zeros((*size[::-1], 3), np.uint8), np.ones(size[::-1]), self.coverage

    monkeypatch.setattr(session.reprojection, 'sharpened', sharpened)
    self.coverage = 0.9
    return session.Visitor(FakeDisplay(), lambda: None), calls

  def picture(self, size, value=7):
    return session.Picture(np.full((*size[::-1], 3), value, np.uint8), np.ones(size[::-1]), 'words')

  def test_a_coarse_picture_gets_the_finest_ones_details(self, visit):
    visitor, calls = visit
    fine = self.picture(self.SIZE, 9)
    assert visitor.sharpen(view(size=self.SIZE), fine, True) is fine
    moved = view(size=self.SIZE, pose=POSE + 0.1)
    shown = visitor.sharpen(moved, self.picture((20, 12)), False)
    ((image, pose, reference),) = calls
    assert image.shape == (12, 20, 3)
    np.testing.assert_array_equal(pose, POSE + 0.1)
    np.testing.assert_array_equal(reference.pose, POSE)
    assert reference.image is fine.image
    assert (shown.image.shape, shown.size) == ((96, 160, 3), (20, 12))
    assert shown.legend == 'words'

  @pytest.mark.parametrize(('coverage', 'kept'), [(0.9, 9), (0.2, 7)])
  def test_one_that_shows_little_of_the_view_is_replaced(self, visit, coverage, kept):
    visitor, _ = visit
    visitor.sharpen(view(size=self.SIZE), self.picture(self.SIZE, 9), True)
    self.coverage = coverage
    visitor.sharpen(view(size=self.SIZE), self.picture((20, 12), 7), False)
    assert (visitor.sharpest[1].image == kept).all()

  @pytest.mark.parametrize('change', [{'mode': 'normals'}, {'clip': (1, 2)}, {'mode': 'depth'}])
  def test_another_kind_of_picture_is_not_mixed_in(self, visit, change):
    visitor, calls = visit
    visitor.sharpen(view(size=self.SIZE), self.picture(self.SIZE), True)
    coarse = self.picture((20, 12))
    assert visitor.sharpen(view(size=self.SIZE, **change), coarse, False) is coarse
    assert not calls


class TestTasks:
  def test_are_done_in_parts_while_no_view_waits(self, viewer, fake):
    display, done = FakeDisplay(), []
    visitor = viewer.join(display)
    visitor.set_view(view(size=(64, 36)))

    def task(renderer, params, frac, step, pause):
      assert (renderer, params, frac) == (fake, 'params', 0.5)
      for k in range(3):
        done.append((k, len(display.shown)))
        yield

    viewer.start(visitor, task)
    work_all(viewer)
    first = len(display.shown)
    assert done == [(k, first) for k in range(3)]
    assert not viewer.tasks

  def test_views_are_drawn_in_a_pause(self, viewer):
    display = FakeDisplay()
    visitor = viewer.join(display)

    def task(renderer, params, frac, step, pause):
      visitor.set_view(view(size=(64, 36)))
      pause(1, 2)
      yield len(display.shown)
      assert display.sizes[-1] == (64, 36)
      yield

    viewer.start(visitor, task)
    work_all(viewer)
    assert display.shown
    assert not display.failures

  def test_one_that_fails_is_shown_and_ends(self, viewer):
    display, done = FakeDisplay(), []
    visitor = viewer.join(display)

    def task(*_):
      yield
      raise ValueError('no space')

    viewer.start(visitor, task)
    viewer.start(visitor, lambda *_: iter(done.append(k) for k in range(2)))
    work_all(viewer)
    assert display.failures == ['ValueError: no space']
    assert len(done) == 2

  def test_outlive_their_visitor(self, viewer):
    visitor, done = viewer.join(FakeDisplay()), []
    viewer.start(visitor, lambda *_: iter(done.append(k) for k in range(3)))
    viewer.leave(visitor)
    work_all(viewer)
    assert len(done) == 3


class TestLive:
  def test_costs_nothing_without_visitors(self, viewer, fake):
    waits = []
    live = session.Live(viewer, lambda step: 0.5, waits.append)
    assert [live(step, 'params') for step in range(100)] == [0.0] * 100
    assert not waits
    assert not fake.calls

  def test_goes_on_with_tasks_without_visitors(self, viewer, monkeypatch):
    monkeypatch.setattr(session, 'SHARE', 1.0)  # After every step.
    live, done = session.Live(viewer, lambda step: 0.5, lambda params: None), []
    visitor = viewer.join(FakeDisplay())

    def task(renderer, params, frac, step, pause):
      for _ in range(2):
        done.append((params['w'].tolist(), step))
        yield

    viewer.start(visitor, task)
    viewer.leave(visitor)
    params = {'w': jax.numpy.ones(2)}
    for step in range(1000):
      live(step, params)
      if step == 0:
        params['w'].delete()  # As training does, which goes on with new ones.
    assert done == [([1, 1], 0)] * 2

  def test_takes_its_share_of_the_time_and_no_more(self, viewer, fake, monkeypatch):
    monkeypatch.setattr(session.time, 'monotonic', fake.clock)
    live = session.Live(viewer, lambda step: 0.5, lambda params: None)
    viewer.join(FakeDisplay()).set_view(view(size=(64, 36)))
    seconds = 0.0
    for step in range(8000):  # Long enough that a single picture does not matter.
      seconds += live(step, 'params')
      fake.now += 0.01  # A step of training.
    rendering = sum(w * h // 100 + bool(w * h % 100) for _, (w, h) in fake.calls) * 0.1
    assert seconds == pytest.approx(rendering)
    assert 0.4 < rendering / fake.now <= session.SHARE + 0.02


class TestLevel:
  @pytest.mark.parametrize('size', [(640, 360), (360, 640), (50, 50), (1, 1), (2048, 3)])
  @pytest.mark.parametrize('rays', [1, 1000, 1e5, 1e9])
  def test_is_the_finest_that_fits_or_the_smallest_allowed(self, size, rays):
    level = session.level_within(size, rays)
    w, h = session.shrunk(size, level)
    assert w * h <= rays or max(session.shrunk(size, level + 1)) < 48
    if level:
      w, h = session.shrunk(size, level - 1)
      assert w * h > rays


RENDERING = {
  'rgb': np.full((2, 3, 3), 0.5),
  'acc': np.float32([[0, 0.5, 1]] * 2),
  'distance_median': np.float32([[1, 2, 3]] * 2),
  'distance_percentiles': np.float32([[[1, 1, 1], [1, 2, 2], [1, 2, 4]]] * 2),
  'normals': np.zeros((2, 3, 3)),
}


class TestModes:
  @pytest.mark.parametrize('mode', session.MODES)
  def test_each_gives_a_picture(self, mode):
    image, legend = session.draw_mode(mode, RENDERING)
    assert image.shape == (2, 3, 3)
    assert image.dtype == np.uint8
    assert bool(legend) == (mode != 'colour')

  def test_spread_is_the_ratio_of_percentiles(self):
    image, _ = session.draw_mode('spread of distance', RENDERING)
    from internal.vis import pictures

    np.testing.assert_array_equal(image[0], pictures.apply_colormap(np.array([0, 0.5, 1])))

  def test_unknown(self):
    with pytest.raises(ValueError, match='must be one of colour'):
      session.draw_mode('smell', RENDERING)


@pytest.fixture(scope='module')
def field():
  """Settings, a scene and parameters."""
  settings = tiny.settings(
    'Config.far = 50.0',
    'Model.num_levels = 2',
    'PropMLP.net_depth = 1',
    'NerfMLP.net_depth = 1',
    'NerfMLP.net_depth_viewdirs = 1',
    'NerfMLP.net_width_viewdirs = 8',
    'NerfMLP.bottleneck_width = 8',
  )
  scene = make_scene(tiny.capture(2)[0])
  return settings, scene, models.init_params(models.build(settings), jax.random.key(0))


@pytest.fixture(scope='module')
def renderer(field):
  settings, scene, _ = field
  return session.Renderer(settings, scene, tiny.mesh(1))


class TestRenderer:
  def test_agrees_with_the_image_renderer(self, field, renderer):
    settings, _, params = field
    wanted = view(size=(20, 12))
    picture = renderer(params, 1.0, wanted, (10, 6))
    table = session.camera(wanted, (10, 6))
    whole = renderer_lib.make_image_renderer(settings, tiny.mesh(1))(params, table, 0)
    np.testing.assert_allclose(picture.image, 255 * whole['rgb'], atol=0.6)
    np.testing.assert_allclose(picture.depth, whole['distance_median'], rtol=1e-4)

  def test_camera_has_the_field_of_view_and_the_pose(self):
    table = session.camera(view(), (30, 20))
    rays = cameras.pixels_to_rays(table, np.zeros(2, int), np.array([15, 15]), np.array([0, 19]))
    up, down = np.asarray(rays.viewdirs)
    angle = np.arccos(up @ down)
    assert angle == pytest.approx(1.0 * 19 / 20, rel=0.02)
    assert up[1] > 0 > down[1]
    np.testing.assert_allclose(rays.origins, [POSE[:, 3]] * 2)

  def test_clipping_planes_bound_distances(self, field, renderer):
    _, _, params = field
    near, far = 2.0, 5.0
    picture = renderer(params, 1.0, view(clip=(near, far)), (8, 6))
    assert (picture.depth >= near).all()
    rendering = renderer._program(view(clip=(near, far)))(
      params, session.camera(view(), (8, 6)), 0, bounds=(near, far)
    )
    assert (rendering['acc'] < 0.999).any()  # The far plane is transparent.
    for distances in (rendering['distance_percentiles'], rendering['distance_mean']):
      assert (distances >= near - 1e-4).all()
      assert (distances <= far + 1e-4).all()

  def test_clipping_planes_work_as_config_near_and_far(self, field, renderer):
    settings, _, params = field
    table, clip = session.camera(view(), (8, 6)), (1.5, 50.0)
    other = dataclasses.replace(settings, config=dataclasses.replace(settings.config, near=1.5))
    want = renderer_lib.make_image_renderer(other, tiny.mesh(1))(params, table, 0)
    got = renderer._program(view(clip=clip))(params, table, 0, bounds=clip)
    for name in want:
      np.testing.assert_allclose(got[name], want[name], rtol=2e-4, atol=2e-5)

  def test_points_are_near_the_cameras(self, field, renderer):
    _, _, params = field
    places, colours = renderer.points(params, 1.0)
    assert places.shape == colours.shape
    assert places.shape[1] == 3
    assert len(places) > 0
    assert colours.dtype == np.uint8
    assert (np.linalg.norm(places, axis=-1) < 10).all()

  def test_ndc_has_no_depth(self, field):
    settings, scene, params = field
    cams = scene.cameras.replace(pixtocam_ndc=np.asarray(scene.cameras.pixtocam[0]))
    ndc = session.Renderer(settings, make_scene(cams), tiny.mesh(1))
    ndc._program = lambda wanted: lambda *_: RENDERING
    assert ndc(params, 1.0, view(), (3, 2)).depth is None


class TestVideo:
  def test_is_that_of_the_renderer_in_a_folder_of_its_own(self, field, renderer, tmp_path):
    settings, scene, params = field
    poses = np.asarray(scene.cameras.camtoworld)[[0, 1, 0]] + [[[0, 0, 0, 0.1]]]
    np.save(tmp_path / 'walk.npy', poses)
    viewer, words = session.Session(renderer), []
    visitor = viewer.join(FakeDisplay())

    def start(stop):
      words.clear()
      task = video_task.make(str(tmp_path), scene, str(tmp_path / 'walk.npy'), words.append, stop)
      viewer.start(visitor, task)
      while viewer.work(params, 5, 0.5):
        pass

    stop = threading.Event()
    stop.set()
    start(stop)  # It ends after the first frame.
    frames = tmp_path / 'render' / 'color'
    assert [p.name for p in frames.iterdir()] == ['00000.png']
    assert words[-1] == f'Stopped; 2 of 3 frames are missing in {tmp_path}/render'
    start(threading.Event())
    assert words[0] == f'Rendering 2 of 3 frames to {tmp_path}/render'
    assert (
      words[-1] == f'Video of step 5: {tmp_path}/render/color.mp4 and {tmp_path}/render/depth.mp4'
    )
    config = dataclasses.replace(settings.config, render_path_file=str(tmp_path / 'walk.npy'))
    cams, _ = trajectory.make_path(config, scene)
    for k in range(3):
      whole = renderer_lib.make_image_renderer(settings, tiny.mesh(1))(params, cams, k, 0.5)
      frame = np.asarray(Image.open(frames / f'{k:05d}.png'))
      np.testing.assert_allclose(frame, 255 * whole['rgb'], atol=1.1)
    assert (tmp_path / 'render' / 'color.mp4').stat().st_size > 300
    assert not visitor.display.failures


def test_sparse_points_are_in_the_normalised_world(tmp_path):
  from internal import colmap

  assert sparse_points.read(None, np.eye(4)) is None
  assert sparse_points.read(str(tmp_path), np.eye(4)) is None
  points = colmap.make_points([[1, 2, 3], [4, 5, 6]])
  colmap.write_model(str(tmp_path / 'sparse' / '0'), colmap.Model({}, {}, points))
  transform = np.array([[0, 2.0, 0, 1], [-2, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
  places, _ = sparse_points.read(str(tmp_path), transform)
  np.testing.assert_allclose(places, [[5, -2, 6], [11, -8, 12]])
