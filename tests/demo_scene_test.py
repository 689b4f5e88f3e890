"""The demo scene: the tracer against ray marching, the ground against sampling, the folder."""

import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from internal import colmap, configs, datasets
from internal.commands import demo_scene
from internal.datasets import scenes
from internal.demo import capture, world
from internal.system import installation

SETTINGS = ['--width', '24', '--height', '16', '--images', '9', '--seed', '3']

# Implicit function of each unit shape: negative inside.
IMPLICIT = {
  'ball': lambda p: np.linalg.norm(p, axis=-1) - 1,
  'box': lambda p: np.abs(p).max(-1) - 1,
  'cylinder': lambda p: np.maximum(np.hypot(p[..., 0], p[..., 1]), np.abs(p[..., 2])) - 1,
  'ring': lambda p: np.hypot(np.hypot(p[..., 0], p[..., 1]) - 1, p[..., 2]) - world.RING_TUBE,
}


def white(p):
  return np.ones_like(p)


def solid_of(shape):
  return world._solid(shape, white, [0.3, -0.2, 0.5], [0.7, 0.4, 0.5], turn=30, tilt=50)


def rays_at(solid, n=400, seed=0):
  """Returns rays from all around that hit or miss a solid closely."""
  rng = np.random.default_rng(seed)
  origins = solid.centre + 3 * world.unit(rng.normal(size=(n, 3)))
  aims = solid.centre + solid.reach * rng.uniform(-0.8, 0.8, (n, 3))
  return origins.astype(np.float32), world.unit(aims - origins).astype(np.float32)


@pytest.mark.parametrize('shape', IMPLICIT)
def test_first_hit_is_where_marching_first_gets_inside(shape):
  solid = solid_of(shape)
  origins, dirs = rays_at(solid)
  t, index = world.trace([solid], origins, dirs)
  steps = np.linspace(0, 6, 3001)
  marched = solid.local(origins[:, None] + steps[:, None] * dirs[:, None])
  inside = IMPLICIT[shape](marched) < 0
  clear = inside.any(1) & (inside.sum(1) > 5)  # Grazing rays may slip between two steps.
  assert 0.2 < clear.mean() < 0.98
  assert (index[clear] == 0).all()
  assert not (index >= 0)[~inside.any(1) & (IMPLICIT[shape](marched).min(1) > 0.01)].any()
  np.testing.assert_allclose(t[clear], steps[inside.argmax(1)][clear], atol=0.0025)


@pytest.mark.parametrize('shape', IMPLICIT)
def test_normals_are_those_of_the_implicit_surface(shape):
  solid = solid_of(shape)
  origins, dirs = rays_at(solid)
  t, index = world.trace([solid], origins, dirs)
  hit = index == 0
  points = (origins + t[:, None] * dirs)[hit].astype(np.float64)
  normals = world.unit(solid.normal(solid.local(points)) @ solid.to_local)
  assert ((normals * dirs[hit]).sum(-1) < 0.05).all()  # They face the ray.
  h = 1e-4 * np.eye(3)
  gradient = np.stack(
    [
      IMPLICIT[shape](solid.local(points + e)) - IMPLICIT[shape](solid.local(points - e)) for e in h
    ],
    -1,
  )
  agree = (normals * world.unit(gradient)).sum(-1)
  assert np.median(agree) > 0.9999
  assert (agree > 0.99).mean() > 0.97  # Except for points right on an edge.


def test_the_nearest_of_several_solids_is_seen():
  balls = [world._solid('ball', white, [x, 0, 0], 0.5) for x in (4, 2, 6)]
  t, index = world.trace(balls, np.zeros((1, 3)), np.array([[1.0, 0, 0]]))
  assert index[0] == 1
  assert t[0] == pytest.approx(1.5)


def test_the_still_life_casts_shadows():
  solids, land = world.build_solids(0), world.Landscape(0)
  toward_sun = np.append(world.unit(world.SUN[:2]), 0)
  down = np.array([[0, 0, -1]], np.float32)

  def seen_from_above(along):
    eye = (along * toward_sun + np.array([0, 0, 0.3])).astype(np.float32)
    return world.render_rays(solids, land, eye, down, 0.5, world.SUN)[0].mean()

  assert seen_from_above(-1.35) < 0.6 * seen_from_above(1.6)


@pytest.mark.parametrize('distance', [2.0, 6.0, 15.0])
def test_ground_is_averaged_over_the_footprint(distance):
  """A filtered lookup equals the mean of sharp lookups over a Gaussian spread of rays."""
  land, spread = world.Landscape(0), 0.004
  eye = np.array([0.3, -0.2, 1.2])
  rng = np.random.default_rng(0)
  offset = spread * rng.normal(size=(3000, 2))

  def look(dirs, footprint):
    dirs = world.unit(dirs).astype(np.float32)
    t = (-eye[2] / dirs[:, 2]).astype(np.float32)
    return land.ground((eye + t[:, None] * dirs).astype(np.float32), dirs, t * footprint)

  means, filtered, sharp = [], [], []
  for azimuth in np.linspace(0, 6, 24):
    forward = world.unit(
      np.array([distance * np.cos(azimuth), distance * np.sin(azimuth), -eye[2]])
    )
    side = world.unit(np.cross(forward, [0, 0, 1]))
    up = np.cross(side, forward)
    means.append(look(forward + offset[:, :1] * side + offset[:, 1:] * up, 0.0).mean(0))
    filtered.append(look(forward[None], spread)[0])
    sharp.append(look(forward[None], 0.0)[0])
  means, filtered, sharp = map(np.array, (means, filtered, sharp))
  error = np.sqrt(np.mean((filtered - means) ** 2))
  assert error < 0.02
  if distance > 5:
    assert error < 0.4 * np.sqrt(np.mean((sharp - means) ** 2))


def test_ground_has_no_detail_left_at_the_horizon():
  land = world.Landscape(0)
  angle = np.linspace(0, 0.1, 200)
  dirs = np.stack([np.cos(angle), np.sin(angle), np.full_like(angle, -0.002)], -1)
  dirs = world.unit(dirs).astype(np.float32)
  t = -1.0 / dirs[:, 2]
  albedo = land.ground(t[:, None] * dirs, dirs, -t * dirs[:, 2] / 0.002 * 0.003)
  assert albedo.std(0).max() < 0.05


def test_quaternion_equals_the_rotation_matrix():
  for pose in capture.camera_poses(12, 0):
    rotation = pose[:, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    w, x, y, z = colmap.quaternion(rotation)
    again = [
      [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
      [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
      [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    np.testing.assert_allclose(again, rotation, atol=1e-12)


def test_cameras_circle_at_two_heights_and_look_at_the_middle():
  poses = capture.camera_poses(72, 0)
  eyes = -np.einsum('nij,ni->nj', poses[:, :, :3], poses[:, :, 3])
  heights = np.sort(eyes[:, 2])
  assert heights[36] - heights[35] > 0.5
  assert np.diff(np.sort(np.arctan2(eyes[:, 1], eyes[:, 0]))).max() < np.radians(10)
  middle = np.einsum('nij,j->ni', poses[:, :, :3], [0, 0, 0.72]) + poses[:, :, 3]
  assert (np.abs(middle[:, :2] / middle[:, 2:]) < 0.05).all()


@pytest.fixture(scope='module')
def scene_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('demo') / 'scene'
  demo_scene.main([str(folder), *SETTINGS])
  return folder


def test_the_colmap_loader_reads_it(scene_folder):
  config = configs.Config(data_dir=str(scene_folder), near=0.2, far=1e6)
  scene = datasets.load_dataset(config)
  assert len(scene.names) == 9
  assert scene.test == (0, 8)
  image = scenes.read_image(config.data_dir, scene, 0)
  assert image.shape == (16, 24, 3)
  assert image.std() > 20


def test_points_lie_under_pixels_of_their_colour(scene_folder):
  model = colmap.read_model(str(scene_folder / 'sparse' / '0'))
  assert len(model.points.xyz) >= 300
  focal = model.cameras[1].params[0]
  poses = capture.camera_poses(9, 3)
  best = np.full(len(model.points.xyz), np.inf)
  for pose, image in zip(poses, model.images.values()):
    pixels = np.asarray(PIL.Image.open(scene_folder / 'images' / image.name)).astype(float)
    seen = model.points.xyz @ pose[:, :3].T + pose[:, 3]
    x, y = (focal * seen[:, :2] / seen[:, 2:] + [12, 8]).T
    inside = (seen[:, 2] > 0) & (x >= 0) & (x < 24) & (y >= 0) & (y < 16)
    colors = pixels[y[inside].astype(int), x[inside].astype(int)]
    gap = np.abs(colors - model.points.rgb[inside]).max(-1)
    best[inside] = np.minimum(best[inside], gap)
  assert (best == 0).all()


def test_pixels_depend_only_on_the_seed():
  pose = capture.camera_poses(5, 0)[2]
  a, b, c = (capture.render_view(pose, 12, 8, 10.0, seed)[0] for seed in (0, 0, 1))
  assert (a == b).all()
  assert (a != c).any()


def test_a_second_run_is_skipped_and_new_settings_replace_the_scene(scene_folder, tmp_path, capsys):
  folder = tmp_path / 'scene'
  small = ['--width', '8', '--height', '8', '--images', '3']
  environment = dict(os.environ)
  demo_scene.main([str(folder), *small])
  assert dict(os.environ) == environment
  before = os.stat(folder / 'images' / 'view_000.png').st_mtime_ns
  demo_scene.main([str(folder), *small])
  assert 'already exists' in capsys.readouterr().out
  assert os.stat(folder / 'images' / 'view_000.png').st_mtime_ns == before
  demo_scene.main([str(folder), *small, '--seed', '1'])
  assert json.loads((folder / 'demo_scene.json').read_text())['seed'] == 1
  assert os.listdir(tmp_path) == ['scene']  # No temporary folder is left.


def test_people_walk_into_training_photographs_only(scene_folder, tmp_path):
  demo_scene.main([str(tmp_path / 'scene'), *SETTINGS, '--passers_by', '1'])
  for i in range(9):
    a, b = (
      np.asarray(PIL.Image.open(folder / 'images' / f'view_{i:03d}.png'))
      for folder in (scene_folder, tmp_path / 'scene')
    )
    assert (a != b).any() == (i % 8 != 0)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
  def fail(*args):
    raise RuntimeError('disk full')

  monkeypatch.setattr(capture, '_write_capture', fail)
  with pytest.raises(RuntimeError, match='disk full'):
    demo_scene.main([str(tmp_path / 'scene')])
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('wrong', [{'width': 7}, {'height': 7}, {'images': 2}, {'seed': -1}])
def test_arguments_out_of_range_are_errors(tmp_path, wrong):
  with pytest.raises(capture.DemoSceneError, match=r'must be 0 to 1, got 1\.5'):
    capture.make_demo_scene(tmp_path / 'scene', passers_by=1.5)
  with pytest.raises(capture.DemoSceneError, match='at least 3 images of at least 8x8'):
    capture.make_demo_scene(tmp_path / 'scene', **wrong)
  assert os.listdir(tmp_path) == []


def test_a_users_folder_is_never_replaced(tmp_path):
  (tmp_path / 'photo.png').write_bytes(b'mine')
  with pytest.raises(SystemExit, match='is not a demo scene'):
    demo_scene.main([str(tmp_path)])
  assert (tmp_path / 'photo.png').read_bytes() == b'mine'


def test_command_line_needs_no_jax(scene_folder):
  """A skipped run is quick because it does not import JAX."""
  script = installation.command('demo_scene')[1]
  code = (
    f'import runpy, sys; sys.argv = [{script!r}, {str(scene_folder)!r}, *{SETTINGS!r}];'
    f"runpy.run_path({script!r}, run_name='__main__'); assert 'jax' not in sys.modules"
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  assert 'already exists' in run.stdout
