"""The rendering loop of the viewer, with visitors that are no browsers."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from internal import cameras, models
from internal.datasets import scenes, sparse_points
from internal.rendering import renderer as renderer_lib
from internal.viewer import session

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


class Guest:
  """Sees what is shown."""

  def __init__(self):
    self.shown, self.waits, self.failures = [], 0, []

  def show(self, picture, step, seconds, finest):
    self.shown.append((picture, step, finest))

  def wait(self):
    self.waits += 1

  def fail(self, reason):
    self.failures.append(reason)

  @property
  def sizes(self):
    return [picture.image.shape[1::-1] for picture, _, _ in self.shown]


class FakeRenderer:
  """Takes `cost` seconds of a clock per ray, in chunks of 100."""

  def __init__(self, cost=1e-3):
    self.now, self.cost, self.calls, self.during = 0.0, cost, [], None

  def clock(self):
    return self.now

  def knows(self, wanted):
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
def watched(fake):
  return session.Viewer(fake, fake.clock)


def work_all(watched, step=1, limit=50):
  done = 0
  while watched.work('params', step, 0.5):
    done += 1
    assert done < limit
  return done


class TestLoop:
  def test_coarse_at_once_then_finer_until_finest(self, watched, fake):
    guest = Guest()
    visitor = watched.join(guest)
    visitor.want(view(size=(640, 360)))
    work_all(watched)
    assert guest.sizes[-1] == (640, 360)
    assert [finest for *_, finest in guest.shown] == [False] * (len(guest.shown) - 1) + [True]
    areas = [w * h for w, h in guest.sizes]
    assert areas[0] <= 64**2
    assert areas == sorted(areas)
    assert len(areas) == len(set(areas)) >= 3
    assert guest.waits == 1  # For the one that is compiled.

  def test_first_picture_is_as_large_as_there_is_time_for(self, watched, fake):
    guest = Guest()
    visitor = watched.join(guest)
    visitor.want(view(size=(640, 360)))
    work_all(watched)
    fake.cost = 1e-5  # A faster device.
    work_all(watched, step=2)
    visitor.want(view(size=(640, 360)))
    before = fake.now
    assert watched.work('params', 2, 0.5)
    assert 0.25 * session.PROMPT < fake.now - before <= session.PROMPT + 0.01

  def test_nobody_and_nothing_to_do(self, watched, fake):
    assert not watched.work('params', 1, 0.5)
    visitor = watched.join(Guest())
    assert not watched.work('params', 1, 0.5)  # It has not said what it wants.
    visitor.want(view())
    work_all(watched)
    calls = len(fake.calls)
    assert not watched.work('params', 1, 0.5)
    watched.leave(visitor)
    visitor.want(view())
    assert not watched.work('params', 2, 0.5)
    assert len(fake.calls) == calls

  def test_moving_gives_up_fine_pictures_but_not_the_first(self, watched, fake):
    guest = Guest()
    visitor = watched.join(guest)
    visitor.want(view(size=(640, 360)))
    other = view(size=(640, 360), pose=POSE + 1)

    def move(done):
      if done == 300:
        visitor.want(other)

    fake.during = move
    watched.work('params', 1, 0.5)
    assert len(guest.shown) == 1  # The first is shown all the same.
    fake.during = None
    assert watched.work('params', 1, 0.5)
    fake.during = move
    began = fake.now
    watched.work('params', 1, 0.5)
    assert len(guest.shown) == 2
    assert fake.now - began < 0.6  # And not the whole picture's time.
    fake.during = None
    watched.work('params', 1, 0.5)
    assert fake.calls[-1][0] is other
    assert guest.sizes[-1] == guest.sizes[0]
    assert not guest.failures

  def test_of_two_the_one_who_moved_comes_first(self, watched, fake):
    first, second = Guest(), Guest()
    a, b = watched.join(first), watched.join(second)
    a.want(view(size=(640, 360)))
    watched.work('params', 1, 0.5)
    b.want(view(size=(640, 360)))
    watched.work('params', 1, 0.5)
    assert (len(first.shown), len(second.shown)) == (1, 1)
    work_all(watched)
    assert first.sizes[-1] == second.sizes[-1] == (640, 360)
    assert len(first.shown) == len(second.shown)  # They take turns.

  def test_new_parameters_are_shown_in_full_at_once(self, watched):
    guest = Guest()
    watched.join(guest).want(view(size=(640, 360)))
    work_all(watched)
    seen = len(guest.shown)
    assert work_all(watched, step=2) == 1
    assert guest.shown[seen][1:] == (2, True)

  def test_failure_is_told_once_and_others_go_on(self, watched, fake):
    bad, good = Guest(), Guest()
    visitor = watched.join(bad)
    visitor.want(view())
    fake.during = lambda done: 1 / 0
    work_all(watched)
    assert bad.failures == ['ZeroDivisionError: division by zero']
    fake.during = None
    watched.join(good).want(view())
    work_all(watched)
    assert good.shown
    assert not good.failures
    visitor.want(view())
    work_all(watched)
    assert bad.shown

  def test_jobs_come_first_and_get_the_field(self, watched, fake):
    guest, seen = Guest(), []
    visitor = watched.join(guest)
    visitor.want(view())
    visitor.ask(lambda *args: seen.append(args))
    assert watched.work('params', 7, 0.5)
    assert seen == [(fake, 'params', 0.5, 7)]
    assert not guest.shown

  def test_serve_sleeps_until_woken_and_ends_by_an_exception(self, watched):
    class End(BaseException):
      pass

    guest, naps = Guest(), []
    visitor = watched.join(guest)

    class Woken:
      set, clear = staticmethod(lambda: None), staticmethod(lambda: None)

      def wait(self):
        naps.append(len(guest.shown))
        if len(naps) == 2:
          raise End
        visitor.want(view())

    watched.woken = Woken()
    with pytest.raises(End):
      watched.serve('params', 1, 0.5)
    assert naps == [0, len(guest.shown)]
    assert guest.shown


class TestLive:
  def test_no_work_and_no_waiting_when_nobody_looks(self, watched, fake):
    waits = []
    live = session.Live(watched, lambda step: 0.5, waits.append)
    assert [live('params', step) for step in range(100)] == [0.0] * 100
    assert not waits
    assert not fake.calls

  def test_takes_its_share_and_no_more(self, watched, fake, monkeypatch):
    monkeypatch.setattr(session.time, 'monotonic', fake.clock)
    live = session.Live(watched, lambda step: 0.5, lambda params: None)
    watched.join(Guest()).want(view(size=(64, 36)))
    told = 0.0
    for step in range(2000):
      told += live('params', step)
      fake.now += 0.01  # A step of training.
    rendering = sum(w * h // 100 + bool(w * h % 100) for _, (w, h) in fake.calls) * 0.1
    assert told == pytest.approx(rendering)
    assert 0.4 < rendering / fake.now <= session.SHARE + 0.02


class TestCoarsest:
  @pytest.mark.parametrize('size', [(640, 360), (360, 640), (50, 50), (1, 1), (2048, 3)])
  @pytest.mark.parametrize('rays', [1, 1000, 1e5, 1e9])
  def test_is_the_finest_that_fits_or_the_smallest_worth_it(self, size, rays):
    level = session.coarsest(size, rays)
    w, h = session.shrunk(size, level)
    assert w * h <= rays or max(session.shrunk(size, level + 1)) < 48
    if level:
      w, h = session.shrunk(size, level - 1)
      assert w * h > rays


SEEN = {
  'rgb': np.full((2, 3, 3), 0.5),
  'acc': np.float32([[0, 0.5, 1]] * 2),
  'distance_median': np.float32([[1, 2, 3]] * 2),
  'distance_percentiles': np.float32([[[1, 1, 1], [1, 2, 2], [1, 2, 4]]] * 2),
  'normals': np.zeros((2, 3, 3)),
}


class TestModes:
  @pytest.mark.parametrize('mode', session.MODES)
  def test_each_is_a_picture(self, mode):
    image, legend = session.draw_mode(mode, SEEN)
    assert image.shape == (2, 3, 3)
    assert image.dtype == np.uint8
    assert bool(legend) == (mode != 'colour')

  def test_spread_is_the_ratio_of_percentiles(self):
    image, _ = session.draw_mode('spread of distance', SEEN)
    from internal.vis import pictures

    np.testing.assert_array_equal(image[0], pictures.apply_colormap(np.array([0, 0.5, 1])))

  def test_unknown(self):
    with pytest.raises(ValueError, match='must be one of colour'):
      session.draw_mode('smell', SEEN)


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
  def test_is_what_the_image_renderer_shows(self, field, renderer):
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

  def test_planes_bound_what_is_seen(self, field, renderer):
    _, _, params = field
    near, far = 2.0, 5.0
    picture = renderer(params, 1.0, view(clip=(near, far)), (8, 6))
    assert (picture.depth >= near).all()
    seen = renderer._program(view(clip=(near, far)))(
      params, session.camera(view(), (8, 6)), 0, bounds=(near, far)
    )
    assert (seen['acc'] < 0.999).any()  # One looks through the far plane.
    for distances in (seen['distance_percentiles'], seen['distance_mean']):
      assert (distances >= near - 1e-4).all()
      assert (distances <= far + 1e-4).all()

  def test_planes_are_the_configs_near_and_far(self, field, renderer):
    settings, _, params = field
    table, clip = session.camera(view(), (8, 6)), (1.5, 50.0)
    other = dataclasses.replace(settings, config=dataclasses.replace(settings.config, near=1.5))
    want = renderer_lib.make_image_renderer(other, tiny.mesh(1))(params, table, 0)
    got = renderer._program(view(clip=clip))(params, table, 0, bounds=clip)
    for name in want:
      np.testing.assert_allclose(got[name], want[name], rtol=2e-4, atol=2e-5)

  def test_points_lie_where_cameras_see_surfaces(self, field, renderer):
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
    ndc._program = lambda wanted: lambda *_: SEEN
    assert ndc(params, 1.0, view(), (3, 2)).depth is None


def test_sparse_points_are_moved_to_the_normalised_world(tmp_path):
  from internal import colmap

  assert sparse_points.read(None, np.eye(4)) is None
  assert sparse_points.read(str(tmp_path), np.eye(4)) is None
  points = colmap.make_points([[1, 2, 3], [4, 5, 6]])
  colmap.write_model(str(tmp_path / 'sparse' / '0'), colmap.Model({}, {}, points))
  transform = np.array([[0, 2.0, 0, 1], [-2, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
  places, _ = sparse_points.read(str(tmp_path), transform)
  np.testing.assert_allclose(places, [[5, -2, 6], [11, -8, 12]])
