"""Refined cameras: changes, preconditioner, gradients, training, and the refined scene."""

import dataclasses
import functools

import captures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import train_step_test
import trajectory_test

from internal import cameras, colmap, paths, structs
from internal.commands import eval as eval_program
from internal.devices import sharding
from internal.errors import UserError
from internal.evaluation import left_halves, results
from internal.export import cameras as export_cameras
from internal.rendering import trained
from internal.training import batches, camera_refinement, checkpoints, loop, per_camera, train_step
from internal.vis import pictures

WIDTH = camera_refinement.WIDTH
ON = ('Config.refine_cameras = True', 'Config.camera_start = 0.0')


def small_changes(n, scale=0.05, seed=0):
  return np.float32(scale * np.random.default_rng(seed).normal(size=(n, WIDTH)))


def mixed_cameras():
  """Perspective and fisheye cameras with distortion."""
  cams, _ = tiny.capture(4)
  distortion = [0.05, -0.01, 0, 0, 0.002, 0.001]
  return cameras.make_cameras(
    cams.pixtocam, cams.camtoworld, cams.size, distortion, np.array([0, 1, 0, 1])
  )


class TestChanges:
  def test_no_change_changes_nothing(self):
    cams = mixed_cameras()
    same = camera_refinement.apply(cams, np.zeros((4, WIDTH), np.float32))
    jax.tree.map(np.testing.assert_array_equal, same, cams)

  def test_rotations_are_rotations_by_about_the_norm(self):
    turn = np.float32(np.random.default_rng(0).normal(size=(50, 3)))
    turn *= (
      np.linspace(0, 1, 50, dtype=np.float32)[:, None] / np.linalg.norm(turn, axis=-1)[:, None]
    )
    rotations = np.asarray(camera_refinement._cayley(jnp.array(turn)), np.float64)
    np.testing.assert_allclose(
      rotations @ rotations.swapaxes(-1, -2), np.broadcast_to(np.eye(3), (50, 3, 3)), atol=1e-6
    )
    assert (np.linalg.det(rotations) > 0).all()
    np.testing.assert_allclose((rotations @ turn[..., None])[..., 0], turn, atol=1e-6)  # The axis.
    cosine = (np.trace(rotations, axis1=1, axis2=2) - 1) / 2
    angle = np.linalg.norm(turn, axis=-1)
    np.testing.assert_allclose(np.arccos(cosine.clip(-1, 1)), 2 * np.arctan(angle / 2), atol=2e-3)

  def test_points_on_a_changed_pixels_ray_project_back_to_it(self):
    cams, change = mixed_cameras(), small_changes(4, 0.02)
    changed = camera_refinement.apply(cams, change)
    x, y = (np.arange(5)[None] + np.arange(4)[:, None]) % 9, np.arange(5)[None].repeat(4, 0) % 7
    row = np.arange(4)[:, None].repeat(5, 1)
    rays = cameras.pixels_to_rays(changed, row, x, y)
    points = rays.origins + np.linspace(0.5, 9, 5)[None, :, None] * rays.directions
    found = camera_refinement.project(cams, points, change)
    pixel = np.stack([x + 0.5, y + 0.5, np.ones_like(x)], -1)
    wanted = np.einsum('nij,nmj->nmi', cams.pixtocam, pixel)[..., :2]
    np.testing.assert_allclose(found, wanted, atol=2e-5)

  def test_undistorted_pictures_stay_undistorted(self):
    cams, _ = tiny.capture()
    changed = camera_refinement.apply(cams, small_changes(3))
    assert not changed.distorted
    assert not np.any(changed.distortion)


class TestPreconditioner:
  def test_a_unit_of_every_parameter_moves_pictures_about_equally_far(self):
    cams, settings = mixed_cameras(), tiny.settings()
    found = camera_refinement.preconditioners(cams, settings)
    rng, n = np.random.default_rng(3), len(cams.size)
    assert found.shape == (n, WIDTH, WIDTH)
    np.testing.assert_allclose(found, found.swapaxes(1, 2), atol=1e-3 * np.abs(found).max())
    # A naive twin: other points, and differences instead of derivatives.
    unit = rng.random((3, 4000))
    near, far = 0.2, 100.0
    t = 1 / (unit[2] / far + (1 - unit[2]) / near)
    x, y = (np.int32(cams.size[:, axis, None] * unit[axis]) for axis in (0, 1))
    rays = cameras.pixels_to_rays(cams, np.arange(n)[:, None].repeat(4000, 1), x, y)
    points = rays.origins + np.float32(t)[None, :, None] * rays.directions
    moved = np.zeros((n, WIDTH))
    for k in range(WIDTH):
      step = np.float32(1e-2 * found[:, :, k] / np.abs(found[:, :, k]).max(1)[:, None])
      ends = [camera_refinement.project(cams, points, s * step) for s in (1, -1)]
      rate = np.asarray(ends[0] - ends[1]) / 2 / 1e-2 * np.abs(found[:, :, k]).max(1)[:, None, None]
      moved[:, k] = np.mean(np.sum(rate**2, -1), 1)
    # (Sigma + D)^(-1/2) Sigma (Sigma + D)^(-1/2) < I; without damping it would be I.
    assert moved.max() < 1.1
    assert moved.min() > 0.1

  def test_the_definition(self, monkeypatch):
    a = np.random.default_rng(0).normal(size=(2, WIDTH, WIDTH))
    sigma = a @ a.swapaxes(1, 2)
    sigma[:, :, -1] = sigma[:, -1] = 0  # A parameter that moves nothing.
    monkeypatch.setattr(camera_refinement, '_sigma', lambda *_: sigma.copy())
    cams, _ = tiny.capture(2)
    found = camera_refinement.preconditioners(cams, tiny.settings()).astype(np.float64)
    diagonal = np.einsum('nii->ni', sigma)
    damped = sigma + np.maximum(0.1 * diagonal, 1e-8)[:, None] * np.eye(WIDTH)
    eye = np.broadcast_to(np.eye(WIDTH), (2, WIDTH, WIDTH))
    np.testing.assert_allclose(found @ damped @ found, eye, atol=1e-4)
    np.testing.assert_allclose(found[:, -1, -1], 1e4, rtol=1e-5)


GRIDS = tuple(x for x in train_step_test.GRID if 'adam' not in x and 'decay' not in x)


@pytest.mark.parametrize('field', [(), GRIDS])
def test_gradients_reach_the_cameras(field):
  bindings = (
    'Model.num_levels = 1',  # With more, cameras also move the proposals.
    'Model.disable_integration = True',  # Cones pass on no gradient.
    'NerfMLP.max_deg_point = 3',  # Smooth enough for differences.
    'Config.near = 1.0',
    'Config.camera_prior = 0.01',
  )
  settings = tiny.settings(*ON, *field, *bindings)
  cams, (_, images) = mixed_cameras(), tiny.capture(4)
  cams = camera_refinement.add_tables(settings, cams)
  params = train_step.create_state(settings).params
  # Tables begin so close to 0 that positions hardly matter.
  params['nerf_mlp'] = {
    name: jax.tree.map(lambda x, k=3e3 if name == 'grid' else 1: k * x, part)
    for name, part in params['nerf_mlp'].items()
  }
  batch_key, keys = train_step.step_keys(settings.config, jnp.array(0), settings.config.seed)
  ids = batches.draw_pixels(batch_key, cams.size, settings.config.batch_size, 'all_images')
  rgb = batches.lookup(batches.make_store(images), cams.size, *ids)
  batch = batches.make_batch(cams, *ids, rgb)
  gradient = jax.jit(train_step.make_loss_gradient(settings))

  def at(z):
    rows = params['cameras']['rows'].at[:4].set(z)
    grads, aux = gradient({**params, 'cameras': {'rows': rows}}, keys, batch, 0.5, cams)
    return float(aux['loss']), np.asarray(grads['cameras']['rows'])

  z, step = small_changes(4, 0.002), 1e-3
  _, grads = at(z)
  assert (grads[4:] == 0).all()  # There are four images.
  size = np.linalg.norm(grads)
  assert size > 1e-3
  for direction in (grads[:4] / size, small_changes(4, 1.0, 1) / np.sqrt(4 * WIDTH)):
    slope = (at(z + step * direction)[0] - at(z - step * direction)[0]) / 2 / step
    assert slope == pytest.approx((grads[:4] * direction).sum(), abs=0.1 * float(size))


@functools.cache
def run(bindings, steps, devices=1):
  """Trains a tiny capture for some steps; returns the state and its stats."""
  cams, images = tiny.capture()
  settings = tiny.settings(*bindings)
  cams = camera_refinement.add_tables(settings, cams)
  mesh = tiny.mesh(devices)
  step_fn = train_step.make_train_step(settings, mesh)
  state = sharding.place(train_step.create_state(settings), mesh)
  store = sharding.replicate(batches.make_store(images), mesh)
  history = []
  for _ in range(steps):
    state, stats = step_fn(state, sharding.replicate(cams, mesh), store)
    history.append(jax.device_get(stats))
  return jax.device_get(state), history


LATER = (*ON[:1], 'Config.camera_start = 0.02', 'Config.micro_batches = 2')


def test_cameras_wait_then_move_with_their_own_rate_on_any_devices():
  state, history = run(LATER, 4, devices=2)
  rows = state.params['cameras']['rows']
  assert np.abs(rows[:3, :9]).min() > 0
  assert (rows[3:] == 0).all()
  assert (rows[:, 9:] == 0).all()  # The pictures have no distortion.
  # Steps 2 and 3 of 100 move, by about the rate each: Adam's steps have unit size.
  rate = 1e-4 * 0.1 ** (np.array([2, 3]) / 100)
  assert np.abs(rows).max() <= 1.1 * rate.sum()
  other, _ = run(LATER, 4)
  moved = np.abs(rows - other.params['cameras']['rows'])[:3]
  assert np.median(moved) < 1e-3 * rate.sum()
  assert {'loss_camera_prior', 'grad_norm_cameras', 'skipped_cameras'} <= set(history[0])
  assert history[2]['loss_camera_prior'] == 0 < history[3]['loss_camera_prior']


def test_a_run_without_refinement_has_no_trace_of_it():
  plain = tiny.settings()
  assert per_camera.parts(plain.config) == {}
  assert 'cameras' not in train_step.abstract_state(plain).params
  cams, images = tiny.capture()
  rgb = batches.lookup(batches.make_store(images), cams.size, *([0], [0], [0]))
  assert batches.make_batch(cams, np.array([0]), np.array([0]), np.array([0]), rgb).pixel is None


def test_the_state_is_restored_exactly(tmp_path):
  settings = tiny.settings(*LATER)
  state, _ = run(LATER, 4)
  checkpoints.save(str(tmp_path), sharding.place(state, tiny.mesh(1)))
  back = checkpoints.restore(str(tmp_path), settings, tiny.mesh(2), 4)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), state)
  assert np.abs(back.opt_state['cameras'].mu['rows']).max() > 0


def params_of(settings, scene, change):
  """Returns parameters with the given changes of training cameras."""
  given = scene.cameras.take(np.array(scene.train))
  inverse = np.linalg.inv(camera_refinement.preconditioners(given, settings).astype(np.float64))
  z = np.einsum('nij,nj->ni', inverse, change)
  return {'cameras': {'rows': jnp.zeros((1000, WIDTH)).at[: len(z)].set(z)}}


class TestRefinedScene:
  def test_without_refinement_the_scene_is_the_given_one(self):
    scene = trajectory_test.make_scene()
    assert camera_refinement.refined_scene(tiny.settings(), scene, {'nerf_mlp': {}}) is scene

  def test_a_common_drift_moves_test_cameras_and_leaves_the_capture_where_it_was(self):
    settings = tiny.settings(*ON)
    scene = trajectory_test.make_scene(12)
    scene = dataclasses.replace(scene, world_transform=np.diag([2.0, 2, 2, 1]))
    # The drift, as each camera's own change.
    angle, shift = 0.02, np.array([0.03, -0.01, 0.02])
    drift = np.eye(4)
    drift[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    drift[:3, 3] = shift
    poses = scene.cameras.camtoworld.astype(np.float64)
    wanted = paths.transform_poses(drift, poses)
    turns = poses[:, :, :3].swapaxes(1, 2) @ wanted[:, :, :3]  # In camera axes.
    axis = np.stack([turns[:, 2, 1], turns[:, 0, 2], turns[:, 1, 0]], -1)
    axis -= np.stack([turns[:, 1, 2], turns[:, 2, 0], turns[:, 0, 1]], -1)
    change = np.zeros((12, WIDTH))
    change[:, :3] = axis / 2 / np.sin(angle) * 2 * np.tan(angle / 2)
    change[:, 3:6] = np.einsum('nji,nj->ni', poses[:, :, :3], wanted[:, :, 3] - poses[:, :, 3])
    change[:, 6:] = [0.01, 0.002, -0.003, 0.01, 0.0]
    refined = camera_refinement.refined_scene(
      settings, scene, params_of(settings, scene, change[list(scene.train)])
    )
    np.testing.assert_allclose(refined.cameras.camtoworld, wanted, atol=1e-5)
    np.testing.assert_allclose(refined.world_transform, drift @ scene.world_transform, atol=1e-5)
    # The test camera has the others' lens, and the given scene is as it was.
    for name in ('pixtocam', 'distortion'):
      table = np.asarray(getattr(refined.cameras, name))
      np.testing.assert_allclose(table[0], table[1], rtol=1e-4, atol=1e-6)
      assert np.abs(table - getattr(scene.cameras, name)).max() > 1e-5
    np.testing.assert_array_equal(scene.cameras.camtoworld, np.float32(poses))

  def test_scenes_that_cannot_be_refined_are_refused(self):
    for kwargs, word in (
      ({'lens': structs.PANORAMA}, 'panoramas'), ({'pixtocam_ndc': np.eye(3)}, 'NDC')
    ):  # fmt: skip
      settings = tiny.settings(*ON, "Config.checkpoint_dir = 'run'")
      with pytest.raises(UserError, match=word):
        loop.check_settings(settings, trajectory_test.make_scene(**kwargs))

  def test_the_table_has_a_row_for_each_image(self):
    bindings = ("Config.checkpoint_dir = 'run'", 'Model.num_glo_embeddings = 5')
    with pytest.raises(UserError, match='num_glo_embeddings'):
      loop.check_settings(tiny.settings(*ON, *bindings), trajectory_test.make_scene())
    loop.check_settings(tiny.settings(*bindings), trajectory_test.make_scene())


class Sky:
  """A field at infinity, whose colours vary smoothly with the direction."""

  def colours(self, directions):
    waves = jnp.sin(directions @ jnp.float32([[3, 7, -5], [6, -4, 3], [-2, 5, 7]]))
    return 0.5 + 0.4 * waves

  def apply(self, variables, key, rays, frac, use_glo):
    rgb = self.colours(rays.viewdirs)
    return [structs.Rendering(rgb, rgb[:, 0], rgb[:, 0], rgb)], None


def test_test_cameras_find_their_place_by_the_left_halves(tmp_path, monkeypatch):
  sky, scene = Sky(), trajectory_test.make_scene()
  settings = tiny.settings(f"Config.data_dir = '{tmp_path}'", 'Config.eval_refine_cameras = True')
  monkeypatch.setattr(left_halves.models, 'build', lambda _: sky)
  monkeypatch.setattr(left_halves, '_RAYS', 256)
  y, x = np.mgrid[:40, :60]

  def directions(cams):
    return cameras.pixels_to_rays(cams, np.zeros_like(x), x, y).viewdirs

  truth = scene.cameras.take(np.array([0]))
  picture = pictures.to_uint8(np.asarray(sky.colours(directions(truth))))
  picture[:, 30:] = 0  # What is measured must not be seen.
  captures.save_image(tmp_path / scene.files[0].replace('.jpg', '.png'), picture)
  scene = dataclasses.replace(scene, files=tuple(f.replace('.jpg', '.png') for f in scene.files))
  turn = camera_refinement._cayley(jnp.float32([[0.006, -0.009, 0.003]]))[0]
  scene.cameras.camtoworld[0, :, :3] = scene.cameras.camtoworld[0, :, :3] @ np.asarray(turn)
  run = trained.TrainedRun(str(tmp_path), settings, scene, tiny.mesh(2), {}, 5)
  found = left_halves.make_refiner(run)(0)
  given = scene.cameras.take(np.array([0]))
  error = [np.abs(directions(cams) - directions(truth)).max() for cams in (given, found)]
  assert error[1] < 0.1 * error[0]
  assert left_halves.measured(picture) == slice(30, None)
  rendering = {'rgb': np.zeros((40, 60, 3))}
  scores, _ = eval_program.score_image(run, 0, rendering, None)
  assert scores['psnr'] == np.inf  # Of the right half, which is black; not of the left one.
  assert 'left halves' in results.protocol(settings.config, results.OWN_SPLIT)['departures'][0]


@pytest.mark.parametrize('lens', [structs.PERSPECTIVE, structs.FISHEYE])
def test_exported_cameras_are_those_of_the_scene(tmp_path, lens):
  scene = trajectory_test.make_scene(lens=lens)
  if lens == structs.FISHEYE:  # COLMAP's fisheye has no tangential terms.
    scene.cameras.distortion[:, 4:] = 0
  moved = np.diag([2.0, 2, 2, 1])
  moved[:3, 3] = [1, 2, 3]
  scene = dataclasses.replace(scene, world_transform=moved)
  scene.cameras.pixtocam[3, :2, :2] *= 0.9
  colmap.write_model(str(tmp_path), export_cameras.model(scene, 4), '.bin')
  model = colmap.read_model(str(tmp_path))
  assert len(model.cameras) == 2
  by_name = {image.name: image for image in model.images.values()}
  for row, name in enumerate(scene.names):
    image = by_name[name]
    pose = paths.transform_poses(moved, colmap.camera_to_world(image)[None])[0]
    np.testing.assert_allclose(pose, scene.cameras.camtoworld[row], atol=1e-6)
    camera = model.cameras[image.camera_id]
    assert (camera.width, camera.height) == (240, 160)
    own = colmap.intrinsics(camera)
    inverse = cameras.pixtocam_from_intrinsics(own.fx / 4, own.fy / 4, own.cx / 4, own.cy / 4)
    np.testing.assert_allclose(inverse, scene.cameras.pixtocam[row], atol=1e-6)
    np.testing.assert_allclose(own.distortion, scene.cameras.distortion[row], atol=1e-9)
    assert own.lens == lens


def test_lenses_that_colmap_lacks_are_not_exported():
  scene = trajectory_test.make_scene(lens=structs.PANORAMA)
  with pytest.raises(UserError, match='no COLMAP model'):
    export_cameras.model(scene, 1)
