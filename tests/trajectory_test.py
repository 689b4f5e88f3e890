import jax.numpy as jnp
import numpy as np
import pytest

from internal import cameras, configs, paths, structs, trajectory
from internal.datasets import scene as scene_lib


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
  return scene_lib.Scene(
    loader='llff', files=names, names=names, cameras=cams, train=tuple(range(1, n)), test=(0,),
    world_transform=np.eye(4), background='none', bounds=bounds, report={},
  )  # fmt: skip


def make(scene=None, **config):
  return trajectory.make_cameras(configs.Config(**config), scene or make_scene())


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
    poses = np.tile(np.eye(4), (6, 1, 1))
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
    with pytest.raises(trajectory.TrajectoryError, match=r'p\.npy.*\[n, 3, 4\]'):
      make(render_path_file=str(path))

  def test_a_missing_file_is_named(self):
    with pytest.raises(trajectory.TrajectoryError, match=r'no such file.*/nowhere\.npy'):
      make(render_path_file='/nowhere.npy')


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
    cams = make(render_camtype='fisheye')
    assert cams.lenses == (structs.FISHEYE,)

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

  @pytest.mark.parametrize('size', [(100,), (0, 10), (10.5, 10)])
  def test_bad_sizes(self, size):
    with pytest.raises(trajectory.TrajectoryError, match='render_resolution'):
      make(render_resolution=size)

  def test_bad_focal_length(self):
    with pytest.raises(trajectory.TrajectoryError, match='render_focal'):
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
