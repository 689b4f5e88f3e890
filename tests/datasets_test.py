"""Loaders, each on a capture that the test writes: cameras, pixels and error messages."""

import json
import os
import pathlib
import shutil

import captures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from internal import cameras, colmap, configs, datasets, structs
from internal.datasets import images, llff, scenes
from internal.system import warnings

ERRORS = (
  images.DataError,
  images.DataNotFoundError,
  colmap.ModelError,
  colmap.ModelNotFoundError,
)


def load(root, read_only=False, **kwargs) -> scenes.Scene:
  return datasets.load_dataset(configs.Config(data_dir=str(root), **kwargs), read_only)


def refused(root, **kwargs) -> str:
  with pytest.raises(ERRORS) as caught:
    load(root, **kwargs)
  message = str(caught.value)
  assert '\n' not in message
  return message


def normalised(found: scenes.Scene, poses: np.ndarray) -> np.ndarray:
  """What `world_transform` makes of the poses as written."""
  scale = np.cbrt(np.linalg.det(found.world_transform[:3, :3]))
  moved = found.world_transform[:3, :3] @ poses
  moved[..., 3] += found.world_transform[:3, 3]
  moved[..., :3] /= scale
  return moved


def intrinsic_matrix(found: scenes.Scene, i: int) -> np.ndarray:
  return np.linalg.inv(found.cameras.pixtocam[i].astype(np.float64))


# COLMAP-posed folders.


@pytest.mark.parametrize('ext', ['.bin', '.txt'])
def test_llff(tmp_path, ext):
  names, poses = captures.write_colmap(tmp_path, n=17, ext=ext)
  found = load(tmp_path)
  assert found.loader == 'llff'
  assert found.names == tuple(names)
  assert found.files == tuple(f'images/{name}' for name in names)
  assert found.test == (0, 8, 16)
  assert found.train == tuple(i for i in range(17) if i % 8)
  np.testing.assert_allclose(
    intrinsic_matrix(found, 3), [[20, 0, 8], [0, 21, 6], [0, 0, 1]], atol=1e-4
  )
  np.testing.assert_allclose(found.cameras.camtoworld, normalised(found, poses), atol=1e-6)
  assert np.abs(found.cameras.camtoworld[..., 3]).max() == pytest.approx(1)
  assert found.cameras.camtoworld[:, 2, 1].mean() > 0  # Up is up.
  assert found.background == 'none'
  assert found.bounds is None
  assert isinstance(found.cameras.pixtocam, np.ndarray)
  for i in (0, 16):
    np.testing.assert_array_equal(scenes.read_image(tmp_path, found, i), captures.pixels(i))


def test_rays_pass_through_the_points(tmp_path):
  """A point of the model, seen by COLMAP's projection in a pixel, lies on the pixel's ray."""
  camera = ('OPENCV', (20.0, 21.0, 8.5, 5.5, 0.05, -0.02, 0.003, -0.002))
  captures.write_colmap(tmp_path, camera=camera, names=[f'in/{i}.png' for i in range(6)])
  model = colmap.read_model(str(tmp_path / 'sparse/0'))
  found = load(tmp_path)
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, [16, 12], (6, 2))
  rays = jax.jit(cameras.pixels_to_rays)(found.cameras, jnp.arange(6), *jnp.asarray(pixels.T))
  for row, along in enumerate(np.asarray(rays.origins + 2 * rays.directions, np.float64)):
    image = next(i for i in model.images.values() if i.name == found.names[row])
    point = np.linalg.solve(found.world_transform, [*along, 1])[:3]
    w2c = np.linalg.inv(np.vstack([colmap.camera_to_world(image), [0, 0, 0, 1]]))
    x, y, z = (w2c @ [*point, 1])[:3] * [1, -1, -1]
    x, y = x / z, y / z
    fx, fy, cx, cy, k1, k2, p1, p2 = camera[1]
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2 * r2
    u = fx * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + cx
    v = fy * (y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y)) + cy
    np.testing.assert_allclose([u, v], pixels[row] + 0.5, atol=1e-3)


def test_several_cameras_sizes_and_folders(tmp_path):
  names = ['left/0.png', 'right/0.png', 'left/1.png']
  poses = captures.circle_poses(3)
  model = captures.make_model(names, poses)
  model.cameras[5] = colmap.Camera(5, 'OPENCV_FISHEYE', 10, 14, (9.0, 9, 5, 7, 0.1, 0, 0, 0))
  image = model.images[2]
  model.images[2] = colmap.Image(2, image.qvec, image.tvec, 5, image.name)
  colmap.write_model(str(tmp_path / 'sparse/0'), model, '.bin')
  for i, name in enumerate(names):
    size = (10, 14) if i == 1 else captures.SIZE
    captures.save_image(str(tmp_path / 'images' / name), captures.pixels(i, size))
  found = load(tmp_path)
  assert found.names == ('left/0.png', 'left/1.png', 'right/0.png')
  assert found.cameras.size.tolist() == [[16, 12], [16, 12], [10, 14]]
  assert found.cameras.lens.tolist() == [structs.PERSPECTIVE] * 2 + [structs.FISHEYE]
  np.testing.assert_allclose(found.cameras.distortion[2], [0.1, 0, 0, 0, 0, 0], atol=1e-7)
  for row, seed in ((0, 0), (1, 2)):
    np.testing.assert_array_equal(scenes.read_image(tmp_path, found, row), captures.pixels(seed))
  assert found.report['image_sizes'] == {'10x14': 1, '16x12': 2}
  assert found.report['camera_models'] == {'OPENCV_FISHEYE': 1, 'PINHOLE': 2}
  by_id = load(tmp_path, load_alphabetical=False)
  assert by_id.names == tuple(names)


def test_report(tmp_path):
  captures.write_colmap(tmp_path, n=9)
  captures.save_image(str(tmp_path / 'images' / 'unposed.png'), captures.pixels(0))
  report = load(tmp_path).report
  json.dumps(report)
  assert report['images_found'] == 10
  assert report['images_registered'] == 9
  assert report['images_missing'] == []
  assert report['images_unregistered'] == ['images/unposed.png']
  assert (report['train_images'], report['test_images']) == (7, 2)
  assert report['training_pixel_bytes'] == 7 * 16 * 12 * 3
  assert report['image_sizes'] == {'16x12': 9}
  assert report['image_folders'] == ['images']
  assert report['folder_to_be_made'] is None
  assert report['world_scale'] == pytest.approx(1 / 5, rel=0.1)
  assert max(report['camera_spread']) <= 2


def test_factor(tmp_path):
  captures.write_colmap(tmp_path, n=9)
  foreseen = load(tmp_path, read_only=True, factor=4)
  assert foreseen.report['folder_to_be_made'] == 'images_4'
  assert not (tmp_path / 'images_4').exists()
  found = load(tmp_path, factor=4)
  assert (tmp_path / 'images_4').is_dir()
  assert found.files == foreseen.files
  assert found.cameras.size.tolist() == foreseen.cameras.size.tolist() == [[4, 3]] * 9
  np.testing.assert_allclose(
    intrinsic_matrix(found, 0), [[5, 0, 2], [0, 5.25, 1.5], [0, 0, 1]], atol=1e-4
  )
  assert scenes.read_image(tmp_path, found, 0).shape == (3, 4, 3)
  assert found.report['folder_to_be_made'] is None


def test_intrinsics_are_over_the_nominal_factor(tmp_path):
  """15 / 4 is 3.75: the picture is 4 wide, the focal length still a quarter."""
  captures.write_colmap(tmp_path, n=9, size=(15, 13))
  found = load(tmp_path, factor=4)
  assert found.cameras.size[0].tolist() == [4, 3]
  np.testing.assert_allclose(
    intrinsic_matrix(found, 0), [[5, 0, 2], [0, 5.25, 1.5], [0, 0, 1]], atol=1e-4
  )


def test_model_may_lie_elsewhere(tmp_path):
  captures.write_colmap(tmp_path)
  shutil.move(tmp_path / 'sparse', tmp_path / 'colmap' / 'sparse')
  assert len(load(tmp_path).names) == 9
  shutil.move(tmp_path / 'colmap' / 'sparse' / '0', tmp_path / 'sparse')
  assert len(load(tmp_path).names) == 9


def test_exif_rotation(tmp_path):
  """COLMAP saw the pictures as stored in the first capture, turned in the second."""
  exif = Image.Exif()
  exif[0x0112] = 6
  for root, size in ((tmp_path / 'stored', (16, 12)), (tmp_path / 'turned', (12, 16))):
    captures.write_colmap(root, n=9, size=size)
    for i in range(9):
      captures.save_image(str(root / f'images/{i:03}.png'), captures.pixels(i), exif=exif)
    for factor in (0, 2):
      found = load(root, factor=factor)
      assert tuple(found.cameras.size[0] * max(factor, 1)) == size
      assert found.report['images_turned_by_exif'] == (9 if size == (12, 16) else 0)
      pixels = scenes.read_image(root, found, 0)
      assert pixels.shape[1::-1] == tuple(found.cameras.size[0])
    expected = captures.pixels(0) if size == (16, 12) else np.rot90(captures.pixels(0), -1)
    np.testing.assert_array_equal(scenes.read_image(root, load(root), 0), expected)


def test_forward_facing_with_bounds_file(tmp_path):
  names, poses = captures.write_colmap(tmp_path)
  table = np.zeros((9, 17))
  table[:, 15], table[:, 16] = np.linspace(4, 5, 9), np.linspace(30, 40, 9)
  np.save(tmp_path / 'poses_bounds.npy', table)
  poses[:, :, :3] = np.eye(3)  # All look along -z.
  colmap.write_model(str(tmp_path / 'sparse/0'), captures.make_model(names, poses), '.bin')
  found = load(tmp_path, forward_facing=True)
  scale = 1 / (0.75 * 4)
  np.testing.assert_allclose(found.bounds, [4 * scale, 40 * scale])
  np.testing.assert_allclose(found.cameras.camtoworld, normalised(found, poses), atol=1e-6)
  np.testing.assert_allclose(found.cameras.camtoworld.mean(0)[:, 3], 0, atol=1e-6)
  np.testing.assert_array_equal(found.cameras.pixtocam_ndc, found.cameras.pixtocam[0])
  assert found.report['world_scale'] == pytest.approx(scale)
  np.save(tmp_path / 'poses_bounds.npy', table[:, :5])
  assert 'poses_bounds.npy' in refused(tmp_path, forward_facing=True)
  np.save(tmp_path / 'poses_bounds.npy', table[:0])
  assert 'n > 0, has [0, 17]' in refused(tmp_path, forward_facing=True)
  np.save(tmp_path / 'poses_bounds.npy', -table)
  assert '0 < near <= far' in refused(tmp_path, forward_facing=True)


def test_bounds_from_points():
  """One camera looking down -z: only points before it and in the picture count."""
  pose = np.eye(4)[None, :3]
  points = [[0, 0, -2], [0.1, 0, -9], [0, 0, 1], [50, 0, -1]]
  model = captures.make_model(['a.png'], pose, points=points)
  near, far = llff.bounds_from_points(model)
  assert 2 <= near < 2.1
  assert 8.9 < far <= 9
  with pytest.raises(images.DataError, match='no points in view'):
    llff.bounds_from_points(captures.make_model(['a.png'], pose, points=points[2:]))


def test_no_folder_and_no_model(tmp_path):
  with pytest.raises(images.DataNotFoundError, match=r'Config\.data_dir is not set'):
    datasets.load_dataset(configs.Config())
  for loader in datasets.LOADERS:
    message = refused(tmp_path / 'nowhere', dataset_loader=loader)
    assert 'nowhere' in message
  message = refused(tmp_path)
  for place in llff.MODEL_FOLDERS:
    assert place in message
  assert f'scripts/poses.py PHOTOS {tmp_path}' in message


@pytest.mark.parametrize(
  ('file', 'loader'), [('transforms.json', 'transforms'), ('transforms_train.json', 'blender')]
)
def test_the_right_loader_is_named(tmp_path, file, loader):
  (tmp_path / file).write_text('{}')
  assert f"Config.dataset_loader = '{loader}'" in refused(tmp_path)


def test_loaders_by_name(tmp_path):
  for name, what in (('nothing', 'unknown'),):
    message = refused(tmp_path, dataset_loader=name)
    assert what in message
    for known in datasets.LOADERS:
      assert repr(known) in message


def test_truncated_model(tmp_path):
  captures.write_colmap(tmp_path)
  path = tmp_path / 'sparse/0/images.bin'
  path.write_bytes(path.read_bytes()[:-5])
  assert 'images.bin: truncated' in refused(tmp_path)


def test_missing_and_unreadable_images(tmp_path):
  captures.write_colmap(tmp_path)
  path = tmp_path / 'images' / '004.png'
  path.write_bytes(b'not a picture')
  for factor in (0, 2):
    message = refused(tmp_path, factor=factor)
    assert '004.png: cannot be read as an image' in message
    assert 'convert it to PNG' in message
  path.unlink()
  for factor in (0, 2):
    message = refused(tmp_path, factor=factor, min_images_fraction=1)
    assert '004.png: no such image' in message
    assert '1 of 9' in message
  assert sorted(os.listdir(tmp_path)) == ['images', 'sparse']


def test_a_preflight_lists_missing_images(tmp_path):
  captures.write_colmap(tmp_path)
  for name in ('000.png', '004.png'):
    (tmp_path / 'images' / name).unlink()
  for factor in (0, 2):
    config = configs.Config(data_dir=str(tmp_path), factor=factor)
    report = datasets.load_dataset(config, read_only=True).report
    assert report['images_missing'] == ['000.png', '004.png']
    counts = [report[f'{what}_images'] for what in ('train', 'test')]
    assert (report['images_found'], report['images_registered'], counts) == (7, 9, [6, 1])


def test_picture_and_camera_sizes_must_match(tmp_path):
  captures.write_colmap(tmp_path)
  path = str(tmp_path / 'images' / '004.png')
  captures.save_image(path, captures.pixels(4, (12, 16)))
  assert 'rotated by 90 degrees' in refused(tmp_path)
  captures.save_image(path, captures.pixels(4, (8, 6)))
  message = refused(tmp_path)
  assert '004.png: is 8x6 pixels, but its camera has 16x12' in message
  assert 'Config.factor' in message


def test_unusable_cameras(tmp_path):
  captures.write_colmap(tmp_path, camera=('FOV', (20.0, 20, 8, 6, 0.1)))
  message = refused(tmp_path)
  assert 'FOV' in message
  assert str(tmp_path / 'sparse') in message


def test_impossible_positions(tmp_path):
  names, poses = captures.write_colmap(tmp_path)
  poses[:, :, 3] = [1, 2, 3]
  colmap.write_model(str(tmp_path / 'sparse/0'), captures.make_model(names, poses), '.bin')
  message = refused(tmp_path)
  assert f'{tmp_path}: All 9 cameras stand at' in message
  poses[4, :, 3] = 1e200
  colmap.write_model(str(tmp_path / 'sparse/0'), captures.make_model(names, poses), '.bin')
  assert "'004.png' has the position" in refused(tmp_path)


def test_paths_stay_inside(tmp_path):
  captures.write_colmap(tmp_path)
  for name in ('../secret.png', '/secret.png'):
    model = captures.make_model(['a.png', name], captures.circle_poses(2))
    colmap.write_model(str(tmp_path / 'sparse/0'), model, '.bin')
    captures.save_image(str(tmp_path / 'images' / 'a.png'), captures.pixels(0))
    assert 'not a path inside' in refused(tmp_path)


def test_folders_may_be_links(tmp_path):
  disk, capture = tmp_path / 'disk', tmp_path / 'capture'
  captures.write_colmap(disk)
  capture.mkdir()
  (capture / 'sparse').symlink_to(disk / 'sparse')
  (capture / 'images').symlink_to(disk / 'images')
  (tmp_path / 'link').symlink_to(capture)
  for factor in (0, 2):
    found = load(tmp_path / 'link', factor=factor)
    pixels = scenes.read_image(tmp_path / 'link', found, 3)
    assert pixels.shape[1::-1] == tuple(found.cameras.size[3])


@pytest.mark.parametrize('name', ['004.png', 'unposed.png'])
def test_links_out_of_the_capture_are_not_read(tmp_path, name):
  captures.write_colmap(tmp_path / 'capture')
  path = tmp_path / 'capture' / 'images' / name
  path.unlink(missing_ok=True)
  captures.save_image(str(tmp_path / 'secret.png'), captures.pixels(4))
  path.symlink_to(tmp_path / 'secret.png')
  assert f'{name}: is a link that leads outside' in refused(tmp_path / 'capture', factor=2)
  assert sorted(os.listdir(tmp_path / 'capture')) == ['images', 'sparse']
  if name == '004.png':
    assert f'{name}: is a link that leads outside' in refused(tmp_path / 'capture')


def test_no_training_images(tmp_path):
  captures.write_colmap(tmp_path)
  assert 'no training images' in refused(tmp_path, llffhold=1)
  model = colmap.Model({}, {}, colmap.make_points())
  colmap.write_model(str(tmp_path / 'sparse/0'), model, '.bin')
  assert 'no registered images' in refused(tmp_path)


# transforms.json.


def frame(pose, path, **kwargs):
  matrix = np.vstack([pose, [0, 0, 0, 1]]).tolist()
  return {'file_path': path, 'transform_matrix': matrix, **kwargs}


def write_transforms(root, table, file='transforms.json'):
  pathlib.Path(root, file).write_text(json.dumps(table))


def write_ngp(root, n=9, prefix='./images/', ext='.png', **table):
  """An instant-ngp capture; returns the table and the poses."""
  poses = captures.circle_poses(n)
  frames = []
  for i in reversed(range(n)):  # Files need not be sorted.
    captures.save_image(os.path.join(root, 'images', f'{i:03}.png'), captures.pixels(i))
    frames.append(frame(poses[i], f'{prefix}{i:03}{ext}'))
  table = {'fl_x': 20, 'fl_y': 21, 'cx': 8.5, 'cy': 6, 'w': 16, 'h': 12, **table, 'frames': frames}
  write_transforms(root, table)
  return table, poses


@pytest.mark.parametrize(
  ('prefix', 'ext'), [('./images/', '.png'), ('images/', ''), ('.\\images\\', '.png')]
)
def test_transforms(tmp_path, prefix, ext):
  _, poses = write_ngp(tmp_path, prefix=prefix, ext=ext, k1=0.1, k2=0.02, p1=0.003, p2=0.004)
  found = load(tmp_path, dataset_loader='transforms')
  assert found.files == tuple(f'images/{i:03}.png' for i in range(9))
  assert found.test == (0, 8)
  np.testing.assert_allclose(found.cameras.camtoworld, normalised(found, poses), atol=1e-6)
  np.testing.assert_allclose(
    intrinsic_matrix(found, 3), [[20, 0, 8.5], [0, 21, 6], [0, 0, 1]], atol=1e-4
  )
  np.testing.assert_allclose(
    found.cameras.distortion, [[0.1, 0.02, 0, 0, 0.003, 0.004]] * 9, atol=1e-7
  )
  np.testing.assert_array_equal(scenes.read_image(tmp_path, found, 2), captures.pixels(2))


def test_same_capture_by_two_formats(tmp_path):
  names, poses = captures.write_colmap(tmp_path)
  frames = [frame(p, f'images/{n}') for p, n in zip(poses, names)]
  intrinsics = {'fl_x': 20, 'fl_y': 21, 'cx': 8, 'cy': 6, 'w': 16, 'h': 12}
  write_transforms(tmp_path, {**intrinsics, 'camera_model': 'PINHOLE', 'frames': frames})
  a, b = load(tmp_path), load(tmp_path, dataset_loader='transforms')
  assert a.files == b.files
  assert (a.train, a.test) == (b.train, b.test)
  np.testing.assert_allclose(a.cameras.camtoworld, b.cameras.camtoworld, atol=1e-6)
  np.testing.assert_allclose(a.cameras.pixtocam, b.cameras.pixtocam, atol=1e-7)


def test_transforms_per_frame_intrinsics_and_factor(tmp_path):
  table, _ = write_ngp(tmp_path, camera_model='OPENCV_FISHEYE', k1=0.1)
  table['frames'][0].update(fl_x=40, fl_y=42, k1=0.2, camera_model='OPENCV')
  write_transforms(tmp_path, table)
  found = load(tmp_path, dataset_loader='transforms', factor=2)
  last = 8  # The table is written backwards.
  np.testing.assert_allclose(np.diag(intrinsic_matrix(found, last)), [20, 21, 1], rtol=1e-5)
  np.testing.assert_allclose(np.diag(intrinsic_matrix(found, 0)), [10, 10.5, 1], rtol=1e-5)
  assert found.cameras.lens.tolist() == [structs.FISHEYE] * 8 + [structs.PERSPECTIVE]
  np.testing.assert_allclose(found.cameras.distortion[:, 0], [0.1] * 8 + [0.2], atol=1e-7)
  assert found.files[0] == 'images_2/000.png'
  assert scenes.read_image(tmp_path, found, 0).shape == (6, 8, 3)


def test_transforms_field_of_view(tmp_path):
  table, _ = write_ngp(tmp_path)
  for key in ('fl_x', 'fl_y', 'cx', 'cy', 'w', 'h'):
    del table[key]
  write_transforms(tmp_path, {**table, 'camera_angle_x': np.pi / 2})
  found = load(tmp_path, dataset_loader='transforms')
  np.testing.assert_allclose(
    intrinsic_matrix(found, 0), [[8, 0, 8], [0, 8, 6], [0, 0, 1]], atol=1e-4
  )
  write_transforms(tmp_path, table)
  assert 'no focal length' in refused(tmp_path, dataset_loader='transforms')


def test_transforms_split(tmp_path):
  table, _ = write_ngp(tmp_path)
  names = [f['file_path'] for f in table['frames']]
  lists = {'train_filenames': names[3:], 'val_filenames': names[:1], 'test_filenames': names[1:3]}
  write_transforms(tmp_path, {**table, **lists})
  found = load(tmp_path, dataset_loader='transforms')
  assert found.test == (6, 7)
  assert found.train == (0, 1, 2, 3, 4, 5)
  del lists['test_filenames']
  write_transforms(tmp_path, {**table, **lists})
  assert load(tmp_path, dataset_loader='transforms').test == (8,)
  write_transforms(tmp_path, {**table, 'test_filenames': 7})
  assert 'test_filenames must be a list' in refused(tmp_path, dataset_loader='transforms')
  write_transforms(tmp_path, {**table, 'test_filenames': ['images/nobody.png']})
  assert 'nobody.png' in refused(tmp_path, dataset_loader='transforms')


def test_transforms_alpha_is_on_white(tmp_path):
  write_ngp(tmp_path)
  rgba = np.zeros((12, 16, 4), np.uint8)
  captures.save_image(str(tmp_path / 'images/000.png'), rgba)
  found = load(tmp_path, dataset_loader='transforms')
  assert found.background == 'white'
  assert (scenes.read_image(tmp_path, found, 0) == 255).all()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'transform_matrix': [[1, 2], [3, 4]]}, 'transform_matrix'),
    ({'transform_matrix': [[float('nan')] * 4] * 4}, 'transform_matrix'),
    ({'transform_matrix': np.diag([2.0, 2, 2, 1]).tolist()}, 'not a rotation'),
    ({'transform_matrix': np.diag([1.0, 1, -1, 1]).tolist()}, 'not a rotation'),
    ({'fl_x': 'wide'}, 'fl_x must be a number'),
    ({'fl_x': -1}, 'focal length'),
    ({'w': 16.5}, 'pixels'),
    ({'camera_model': 'EQUIRECTANGULAR'}, "unknown camera model 'EQUIRECTANGULAR'"),
    ({'file_path': '../secret.png'}, 'not a path inside'),
    ({'file_path': '/secret.png'}, 'not a path inside'),
    ({'file_path': 3}, 'has the file_path 3, which must be text'),
    ({'file_path': None}, "has no 'file_path'"),
    ({'fl_x': 10**400}, 'fl_x must be a number'),
    ({'fl_x': 1e-300}, 'impossible intrinsics'),
    ({'cx': [0] * 1000}, 'cx must be a number, got [0, 0, 0, 0, 0, 0, ...]'),
    ({'w': 1e9}, 'pixels'),
  ],
)
def test_bad_frames_are_named(tmp_path, change, message):
  table, _ = write_ngp(tmp_path)
  table['frames'][4].update(change)
  write_transforms(tmp_path, table)
  answer = refused(tmp_path, dataset_loader='transforms')
  assert message in answer
  if 'file_path' in change and message == 'not a path inside':
    assert 'transforms.json: frame 5' in answer


@pytest.mark.parametrize(
  'content',
  ['{', '[]', '{"frames": 3}', '{"frames": []}', '{"frames": [1]}', '[' * 100_000, '9' * 5000],
  ids=lambda content: content[:20],
)
def test_bad_transforms_files(tmp_path, content):
  assert 'No such file' in refused(tmp_path, dataset_loader='transforms')
  (tmp_path / 'transforms.json').write_text(content)
  assert 'transforms.json' in refused(tmp_path, dataset_loader='transforms')


# Blender.


def write_blender(root):
  poses = captures.circle_poses(5)
  for part, rows in (('train', (0, 1, 2)), ('test', (3, 4))):
    frames = []
    for k, i in enumerate(rows):
      pixels = captures.pixels(i, channels=4)
      captures.save_image(os.path.join(root, part, f'r_{k}.png'), pixels)
      frames.append(frame(poses[i], f'./{part}/r_{k}', rotation=0.1))
    captures.save_image(os.path.join(root, part, 'r_0_depth_0001.png'), captures.pixels(9))
    table = {'camera_angle_x': 0.8, 'frames': frames}
    write_transforms(root, table, f'transforms_{part}.json')
  return poses


def test_blender(tmp_path):
  poses = write_blender(tmp_path)
  found = load(tmp_path, dataset_loader='blender')
  assert (found.train, found.test) == ((0, 1, 2), (3, 4))
  assert found.files[3] == 'test/r_0.png'
  np.testing.assert_allclose(found.cameras.camtoworld, poses, atol=1e-6)  # The world as it is.
  np.testing.assert_array_equal(found.world_transform, np.eye(4))
  focal = 8 / np.tan(0.4)
  np.testing.assert_allclose(
    intrinsic_matrix(found, 0), [[focal, 0, 8], [0, focal, 6], [0, 0, 1]], rtol=1e-5, atol=1e-4
  )
  rgba = captures.pixels(4, channels=4) / 255
  expected = 255 * (rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:])
  assert np.abs(scenes.read_image(tmp_path, found, 4) - expected).max() <= 0.5 + 1e-6
  half = load(tmp_path, dataset_loader='blender', factor=2)
  assert half.files[3] == 'test_2/r_0.png'
  assert half.cameras.size.tolist() == [[8, 6]] * 5
  np.testing.assert_allclose(intrinsic_matrix(half, 0)[0, 0], focal / 2, rtol=1e-5)
  os.unlink(tmp_path / 'transforms_test.json')
  assert 'transforms_test.json' in refused(tmp_path, dataset_loader='blender')


# Tanks and Temples.


def write_tat(root):
  poses = captures.circle_poses(5)
  k = np.diag([20.0, 21, 1, 1])
  k[:2, 2] = 8, 6
  for part, rows in (('train', (0, 1, 2)), ('test', (3, 4))):
    for folder in ('pose', 'intrinsics'):
      os.makedirs(os.path.join(root, part, folder))
    for i in rows:
      captures.save_image(os.path.join(root, part, 'rgb', f'{i:05}.png'), captures.pixels(i))
      matrix = np.vstack([poses[i] * [1, -1, -1, 1], [0, 0, 0, 1]])
      for folder, value in (('pose', matrix), ('intrinsics', k)):
        text = ' '.join(map(repr, value.ravel().tolist()))
        pathlib.Path(root, part, folder, f'{i:05}.txt').write_text(text)
  return poses


def test_tat(tmp_path):
  poses = write_tat(tmp_path)
  found = load(tmp_path, dataset_loader='tat_nerfpp')
  assert (found.train, found.test) == ((0, 1, 2), (3, 4))
  assert found.files[4] == 'test/rgb/00004.png'
  np.testing.assert_allclose(found.cameras.camtoworld, normalised(found, poses), atol=1e-6)
  np.testing.assert_allclose(
    intrinsic_matrix(found, 3), [[20, 0, 8], [0, 21, 6], [0, 0, 1]], atol=1e-4
  )
  np.testing.assert_array_equal(scenes.read_image(tmp_path, found, 4), captures.pixels(4))
  small = load(tmp_path, dataset_loader='tat_nerfpp', factor=2)
  assert small.files[4] == 'test/rgb_2/00004.png'
  (tmp_path / 'train/pose/00001.txt').write_text('1 0 0 0 0 1 0 0 0 0 1 0 5 6 7 1')
  message = refused(tmp_path, dataset_loader='tat_nerfpp')
  assert 'must be 0, 0, 0, 1, but is 5, 6, 7, 1. Its last column is that: transpose' in message
  (tmp_path / 'train/pose/00001.txt').write_text('1 2 3')
  assert '00001.txt: must be a 4x4 matrix' in refused(tmp_path, dataset_loader='tat_nerfpp')
  os.unlink(tmp_path / 'train/pose/00001.txt')
  assert '00001.txt' in refused(tmp_path, dataset_loader='tat_nerfpp')
  shutil.rmtree(tmp_path / 'train')
  assert 'train/ and test/' in refused(tmp_path, dataset_loader='tat_nerfpp')


@pytest.mark.parametrize(
  ('name', 'total', 'test', 'size'),
  [('bonsai', 292, 37, (800, 533)), ('phone_toy', 82, 11, (720, 720))],
)
def test_real_captures(name, total, test, size):
  root = os.path.join(os.path.dirname(__file__), '..', '..', 'shared', 'data', name)
  if not os.path.isdir(root):
    pytest.skip(f'the real capture {name} is not here')
  found = load(root)
  assert len(found.names) == total
  assert len(found.test) == test
  assert found.cameras.size.tolist() == [list(size)] * total
  assert list(found.names) == sorted(found.names)
  (pixels,) = scenes.read_images(root, found, [found.test[1]], progress=False)
  assert pixels.shape == (size[1], size[0], 3)
  assert 20 < pixels.mean() < 235


def test_warnings_are_collected_once_and_only_while_a_capture_is_loaded():
  warnings.warn('dropped')
  with warnings.collect() as outer:
    warnings.warn('a')
    with warnings.collect() as inner:
      warnings.warn('b')
    warnings.warn('a')
  assert (outer, inner) == (['a'], ['b'])
