import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from internal import cameras, configs, paths, structs
from internal.datasets import scenes
from internal.rendering import orbits, path_files, trajectory
from internal.system import warnings


def make_scene(n=8, lens=structs.PERSPECTIVE, bounds=None, pixtocam_ndc=None):
  """n cameras of 60x40 pixels on a circle, looking at its centre; the first is a test image."""
  angle = 2 * np.pi * np.arange(n) / n
  positions = np.stack([np.cos(angle), np.sin(angle), 0.1 * np.cos(3 * angle)], -1)
  poses = np.stack([paths.viewmatrix(p, np.array([0.0, 0, 1]), p) for p in positions])
  if pixtocam_ndc is not None:  # All look along -z.
    poses[:, :, :3] = np.eye(3)
  cams = cameras.make_cameras(
    pixtocam=cameras.pixtocam_from_intrinsics(50.0, 52.0, 29.0, 21.0),
    camtoworld=poses,
    size=[60, 40],
    distortion=[0.1, 0, 0, 0, 0.01, 0],
    lens=lens,
    pixtocam_ndc=pixtocam_ndc,
  )
  names = tuple(f'dir/img_{i}.jpg' for i in range(n))
  return scenes.Scene(
    loader='llff', files=names, names=names, cameras=cams, train=tuple(range(1, n)), test=(0,),
    world_transform=np.eye(4), background='none', bounds=bounds, report={},
  )  # fmt: skip


def make(scene=None, **config):
  return trajectory.make_path(configs.Config(**config), scene or make_scene())[0]


def camtopix(cams):
  return np.linalg.inv(np.asarray(cams.pixtocam[0], np.float64))


class TestPoses:
  def test_an_ellipse_by_default(self):
    scene = make_scene()
    cams = make(scene, render_path_frames=20, z_variation=0.5, z_phase=0.25)
    train = scene.cameras.camtoworld[list(scene.train)]
    wanted = paths.generate_ellipse_path(train, 20, 0.5, 0.25)
    np.testing.assert_allclose(cams.camtoworld, wanted, atol=1e-6)

  def test_a_spiral_for_forward_facing_captures(self):
    ndc = cameras.pixtocam_from_intrinsics(50, 50, 30, 20)
    cams = make(
      make_scene(bounds=(1.0, 8.0), pixtocam_ndc=ndc), forward_facing=True, render_path_frames=9
    )
    assert cams.camtoworld.shape == (9, 3, 4)
    assert cams.pixtocam_ndc is not None
    assert np.all(cams.camtoworld[:, 2, 2] > 0.8)  # All look forward.

  def test_a_spiral_needs_bounds(self):
    with pytest.raises(trajectory.TrajectoryError, match='bounds'):
      make(forward_facing=True)

  @pytest.mark.parametrize('spelling', ['dir/img_1.jpg, dir/img_3', 'file'])
  def test_a_spline_through_named_images(self, spelling, tmp_path):
    if spelling == 'file':
      (tmp_path / 'keys.txt').write_text('dir/img_1.jpg\ndir/img_3.jpg\n\n')
      spelling = str(tmp_path / 'keys.txt')
    scene = make_scene()
    cams = make(
      scene,
      render_spline_keyframes=spelling,
      render_spline_n_interp=7,
      render_spline_smoothness=0.0,
    )
    assert len(cams.size) == 7
    for frame, row in ((0, 1), (-1, 3)):
      np.testing.assert_allclose(cams.camtoworld[frame], scene.cameras.camtoworld[row], atol=1e-5)

  def test_an_unknown_keyframe_lists_the_nearest(self):
    with pytest.raises(trajectory.TrajectoryError, match=r"'dir/img_99'.*dir/img_"):
      make(render_spline_keyframes='dir/img_1.jpg,dir/img_99')

  @pytest.mark.parametrize('rows', [3, 4])
  def test_poses_from_a_file(self, rows, tmp_path):
    poses = np.tile(np.eye(4), (6, 1, 1))  # As make_scene's transform is the identity.
    poses[:, :3, 3] = np.arange(18).reshape(6, 3)
    np.save(tmp_path / 'p.npy', poses[:, :rows])
    cams = make(render_path_file=str(tmp_path / 'p.npy'))
    np.testing.assert_array_equal(cams.camtoworld, poses[:, :3])

  @pytest.mark.parametrize(
    'content', [np.zeros((4, 3, 3)), np.zeros((0, 3, 4)), np.full((2, 3, 4), np.nan), b'no array']
  )
  def test_bad_files_are_named(self, content, tmp_path):
    path = tmp_path / 'p.npy'
    if isinstance(content, bytes):
      path.write_bytes(content)
    else:
      np.save(path, content)
    with pytest.raises(path_files.PathFileError, match=r'p\.npy.*\[n, 3, 4\]'):
      make(render_path_file=str(path))

  def test_a_missing_file_is_named(self):
    with pytest.raises(path_files.PathFileError, match=r'no such file.*/nowhere\.npy'):
      make(render_path_file='/nowhere.npy')

  @pytest.mark.parametrize('space', ['capture', 'normalized'])
  def test_a_files_poses_are_in_the_captures_world_by_default(self, space, tmp_path):
    scene = make_scene()
    turn = np.array([[0, -1.0, 0], [1, 0, 0], [0, 0, 1]])
    transform = np.eye(4)
    transform[:3] = np.concatenate([0.25 * turn, [[3], [4], [5]]], 1)
    own = np.asarray(scene.cameras.camtoworld, np.float64)
    captured = paths.transform_poses(np.linalg.inv(transform), own)
    np.testing.assert_allclose(captured[0, :, 3], turn.T @ (own[0, :, 3] - [3, 4, 5]) / 0.25)
    np.save(tmp_path / 'p.npy', captured if space == 'capture' else own)
    scene = dataclasses.replace(scene, world_transform=transform)
    cams = make(scene, render_path_file=str(tmp_path / 'p.npy'), render_path_space=space)
    np.testing.assert_allclose(cams.camtoworld, own, atol=1e-6)

  @pytest.mark.parametrize(
    ('height', 'turn', 'text'),
    [
      # The cameras stand on a circle of radius 1 around the origin and look at it.
      (2.0, [1, 1, 1], None),  # From above, down.
      (2.0, [1, -1, -1], 'looks at nothing that the training cameras look at'),  # Up.
      (50.0, [1, 1, 1], "times the training cameras' extent away from all of them"),
    ],
  )
  def test_a_path_elsewhere_is_warned_of(self, height, turn, text, tmp_path, capsys):
    path = str(tmp_path / 'p.npy')
    np.save(path, np.c_[np.diag(np.array(turn, float)), [0, 0, height]][None])
    with warnings.collect() as found:
      make(render_path_file=path)
    assert len(found) == (text is not None)
    for warning in found:
      assert warning.startswith(f'{path}: ')
      assert text in warning
      make(render_path_file=path)  # Where nobody collects, it is printed.
      assert text in capsys.readouterr().err

  def test_panoramas_see_everything_and_single_frames_may_be_far(self, tmp_path):
    poses = np.tile(np.eye(3, 4), (3, 1, 1))
    poses[:, :, 3] = [[0, 0, 2.0], [0, 0, 50], [0, 0, 99]]
    poses[:, :, :3] = np.diag([1.0, -1, -1])  # Looking up.
    np.save(tmp_path / 'p.npy', poses)
    with warnings.collect() as found:
      make(render_path_file=str(tmp_path / 'p.npy'), render_camtype='panorama')
    assert found == []

  def test_an_orbit_a_helix_and_a_dolly(self):
    scene = make_scene()
    train = np.asarray(scene.cameras.camtoworld, np.float64)[1:]
    told = {'render_path_type': 'orbit', 'render_path_frames': 9, 'render_orbit_elevation': 20.0}
    wanted = orbits.generate_orbit_path(train, 9, 20, 1.5)
    cams = make(scene, **told, render_orbit_radius=1.5)
    np.testing.assert_allclose(cams.camtoworld, wanted, atol=1e-6)
    cams = make(scene, render_path_type='spiral', render_path_frames=9)
    np.testing.assert_allclose(cams.camtoworld, orbits.generate_helix_path(train, 9), atol=1e-6)
    cams = make(scene, render_path_type='dolly', render_path_frames=9)
    np.testing.assert_allclose(cams.camtoworld[0], train[0], atol=1e-6)
    cams = make(scene, render_path_type='dolly', render_dolly_keyframe='dir/img_4')
    np.testing.assert_allclose(cams.camtoworld[0], train[3], atol=1e-6)

  def test_a_dolly_zoom_keeps_what_is_looked_at_at_one_size(self):
    scene = make_scene()
    cams = make(scene, render_path_type='dolly', render_dolly_zoom=True, render_path_frames=9)
    focus = paths.focus_point(np.asarray(scene.cameras.camtoworld)[1:])
    pose = np.asarray(cams.camtoworld, np.float64)
    depth = ((pose[:, :, 3] - focus) * pose[:, :, 2]).sum(-1)
    assert depth[-1] == pytest.approx(depth[0] / 2, rel=1e-4)
    np.testing.assert_allclose(depth * cams.pixtocam[:, 0, 0], depth[0] / 50, rtol=1e-4)

  def test_splines_have_constant_speed_by_default(self):
    names = ','.join(f'dir/img_{i}' for i in (0, 1, 2, 5, 6))  # A long gap in the middle.
    told = {'render_spline_keyframes': names, 'render_spline_smoothness': 0.0}

    def unevenness(**more):
      steps = paths.motion_steps(np.asarray(make(**told, **more).camtoworld, np.float64), 1.0)
      return steps.max() / steps.min()

    assert unevenness() < 1.03
    assert unevenness(render_spline_const_speed=False) > 1.2
    closed = make(**told, render_spline_closed=True)
    assert len(closed.size) == 5 * 30

  def test_an_empty_list_of_photos(self):
    with pytest.raises(trajectory.TrajectoryError, match=r'must name images.*dir/img_0'):
      make(render_spline_keyframes=' , ')


class TestCameraPathOfNerfstudio:
  def write(self, tmp_path, **more):
    pose = np.eye(4)
    pose[:3, 3] = [1, 2, 3]
    frames = [{'camera_to_world': pose.ravel().tolist(), 'fov': fov} for fov in (90, 60)]
    table = {'camera_path': frames, 'render_width': 200, 'render_height': 100, 'fps': 24, **more}
    (tmp_path / 'path.json').write_text(json.dumps(table))
    return {'render_path_file': str(tmp_path / 'path.json')}

  def test_size_and_fields_of_view_are_the_files(self, tmp_path):
    told = self.write(tmp_path)
    cams = make(**told)
    np.testing.assert_array_equal(cams.size, [[200, 100]] * 2)
    focal = 1 / np.asarray(cams.pixtocam)[:, [0, 1], [0, 1]]
    np.testing.assert_allclose(focal, [[50, 50], [50 * 3**0.5, 50 * 3**0.5]], rtol=1e-5)
    np.testing.assert_allclose(cams.camtoworld[:, :, 3], [[1, 2, 3]] * 2)
    assert trajectory.make_path(configs.Config(**told), make_scene())[1] == 24

  def test_settings_count_on_top(self, tmp_path):
    told = self.write(tmp_path)
    cams = make(**told, render_resolution=(80, 40))
    np.testing.assert_allclose(1 / np.asarray(cams.pixtocam)[:, 1, 1], [20, 20 * 3**0.5], rtol=1e-5)
    cams = make(**told, render_focal=33.0)
    np.testing.assert_allclose(1 / np.asarray(cams.pixtocam)[:, 1, 1], 33, rtol=1e-5)

  def test_panoramas(self, tmp_path):
    cams = make(**self.write(tmp_path, camera_type='equirectangular'))
    assert cams.lenses == (structs.PANORAMA,)
    np.testing.assert_allclose(cams.camtoworld[0, :, :3], np.eye(3))  # As the file has them.


class TestLens:
  def test_the_first_training_cameras_without_distortion(self):
    scene = make_scene()
    cams = make(scene)
    assert not cams.distorted
    assert np.all(cams.distortion == 0)
    np.testing.assert_array_equal(cams.size, np.tile([60, 40], (120, 1)))
    np.testing.assert_allclose(cams.pixtocam[0], scene.cameras.pixtocam[1], atol=1e-7)

  def test_more_pixels_show_the_same_view(self):
    cams = make(render_resolution=(180, 120))
    np.testing.assert_array_equal(cams.size[0], [180, 120])
    np.testing.assert_allclose(
      camtopix(cams), [[150, 0, 87], [0, 156, 63], [0, 0, 1]], rtol=1e-5, atol=1e-4
    )

  def test_another_aspect_keeps_the_width_of_the_view(self):
    cams = make(render_resolution=(120, 40))
    np.testing.assert_allclose(
      camtopix(cams), [[100, 0, 58], [0, 104, 21], [0, 0, 1]], rtol=1e-5, atol=1e-4
    )

  def test_a_given_focal_length(self):
    k = camtopix(make(render_resolution=(120, 80), render_focal=77.0))
    np.testing.assert_allclose([k[0, 0], k[1, 1]], 77, rtol=1e-6)

  def test_fisheye(self):
    cams = make(render_camtype='fisheye', render_path_frames=2)
    assert cams.lenses == (structs.FISHEYE,)
    pose = np.asarray(cams.camtoworld, np.float64)[0]
    # The last row looks straight down but for half a pixel of 180 / 40 degrees, the middle ahead.
    x, y = jnp.array([29, 29]), jnp.array([39, 19])
    rays = cameras.pixels_to_rays(cams, jnp.zeros_like(x), x, y)
    aside, half = np.array([-0.5, -0.5]), np.pi / 40
    for ray, down in zip(np.asarray(rays.viewdirs), (19.5, -0.5)):
      offset = half * np.array([aside[0], down])
      angle = np.linalg.norm(offset)
      right, below = np.sin(angle) * offset / angle
      wanted = pose[:, :3] @ [right, -below, -np.cos(angle)]
      np.testing.assert_allclose(ray, wanted, atol=1e-5)
    assert camtopix(make(render_camtype='fisheye', render_focal=9.0))[0, 0] == pytest.approx(9)

  def test_a_fisheye_of_the_capture_stays_as_it_is(self):
    cams = make(make_scene(lens=structs.FISHEYE), render_path_frames=2)
    np.testing.assert_allclose(camtopix(cams)[0, 0], 50, rtol=1e-5)

  def test_a_panorama_is_level(self):
    scene = make_scene()
    up = orbits.mean_up(np.asarray(scene.cameras.camtoworld, np.float64)[1:])
    cams = make(scene, render_camtype='panorama', render_path_frames=3, z_variation=1.0)
    np.testing.assert_allclose(cams.camtoworld[:, :, 1], np.tile(up, (3, 1)), atol=1e-6)
    # Its middle looks where the camera looks, as seen from above; the first column back.
    flat = make(scene, render_path_frames=3, z_variation=1.0).camtoworld[1, :, 2]
    flat = flat - (flat @ up) * up
    rays = cameras.pixels_to_rays(cams, jnp.ones(2, int), jnp.array([40, 0]), jnp.array([20, 20]))
    cosines = np.asarray(rays.viewdirs) @ flat / np.linalg.norm(flat)
    np.testing.assert_allclose(cosines, [-1, 1], atol=0.01)

  def test_a_panorama_sees_all_around(self):
    cams = make(render_camtype='panorama', render_path_frames=2)
    np.testing.assert_array_equal(cams.size[0], [80, 40])
    x, y = jnp.meshgrid(jnp.arange(80), jnp.arange(40))
    rays = cameras.pixels_to_rays(cams, jnp.zeros_like(x), x, y)
    area = np.sin((np.arange(40)[:, None] + 0.5) / 40 * np.pi)[..., None]
    # Weighted by the sphere's area, directions that cover it cancel.
    np.testing.assert_allclose((area * rays.viewdirs).mean((0, 1)), 0, atol=1e-3)

  def test_only_perspective_in_ndc(self):
    scene = make_scene(bounds=(1.0, 8.0), pixtocam_ndc=np.eye(3))
    with pytest.raises(trajectory.TrajectoryError, match='fisheye'):
      make(scene, forward_facing=True, render_camtype='fisheye')

  @pytest.mark.parametrize('size', [(100,), (0, 10), (10, -1)])
  def test_bad_sizes(self, size):
    with pytest.raises(configs.ConfigError, match='render_resolution'):
      make(render_resolution=size)

  def test_bad_focal_length(self):
    with pytest.raises(configs.ConfigError, match='render_focal'):
      make(render_focal=-1.0)


class TestShrink:
  @pytest.mark.parametrize('lens', ['perspective', 'panorama'])
  def test_corners_look_where_they_did(self, lens):
    cams = make(render_camtype=lens, render_resolution=(96, 64))
    small = trajectory.shrink(cams, 24)
    np.testing.assert_array_equal(small.size[0], [24, 16])
    for fraction in (np.array([0.0, 0, 1]), np.array([1.0, 1, 1])):
      wanted = cams.pixtocam[0] @ (fraction * [96, 64, 1])
      np.testing.assert_allclose(small.pixtocam[0] @ (fraction * [24, 16, 1]), wanted, atol=1e-5)

  def test_small_images_stay(self):
    cams = make()
    np.testing.assert_array_equal(trajectory.shrink(cams, 100).pixtocam, cams.pixtocam)
