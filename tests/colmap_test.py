"""COLMAP models: round trips are exact and errors name the damaged file."""

import dataclasses
import os
import struct

import captures
import numpy as np
import pytest

from internal import colmap, structs
from internal.system import warnings

NAMES = ['a.png', 'deep/er/b c.JPG', 'ü.png']


def sample_model():
  rng = np.random.default_rng(1)
  cameras = {
    3: colmap.Camera(3, 'OPENCV', 640, 480, tuple(rng.normal(size=8).tolist())),
    1: colmap.Camera(1, 'SIMPLE_RADIAL', 99, 77, (0.1, 1 / 3, 1e-17, -2e20)),
  }
  poses = captures.circle_poses(3)
  images = {
    i: colmap.Image(i, *captures.to_colmap(poses[k]), camera_id=c, name=NAMES[k])
    for k, (i, c) in enumerate([(7, 3), (2, 1), (5, 3)])
  }
  points = colmap.make_points(
    rng.normal(size=(4, 3)), rng.integers(0, 256, (4, 3)), rng.random(4), [9, 2**40, 1, 3]
  )
  return colmap.Model(cameras, images, points)


def assert_same(a: colmap.Model, b: colmap.Model):
  assert a.cameras == b.cameras
  assert a.images == b.images
  for name in ('ids', 'xyz', 'rgb', 'error'):
    np.testing.assert_array_equal(getattr(a.points, name), getattr(b.points, name))
    assert getattr(a.points, name).dtype == getattr(b.points, name).dtype


def error_of(folder) -> str:
  with pytest.raises((colmap.ModelError, colmap.ModelNotFoundError)) as caught:
    colmap.read_model(str(folder))
  message = str(caught.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize('ext', ['.bin', '.txt'])
def test_round_trip_is_exact(tmp_path, ext):
  model = sample_model()
  colmap.write_model(str(tmp_path), model, ext)
  assert_same(colmap.read_model(str(tmp_path)), model)


def test_numpy_numbers_can_be_written(tmp_path):
  image = colmap.Image(1, tuple(np.array([1.0, 0, 0, 0])), tuple(np.ones(3)), 1, 'a.png')
  camera = colmap.Camera(1, 'SIMPLE_PINHOLE', 4, 4, tuple(np.array([0.1, 2, 2])))
  colmap.write_model(str(tmp_path), colmap.Model({1: camera}, {1: image}, colmap.make_points()))
  back = colmap.read_model(str(tmp_path))
  assert back.cameras[1].params == (0.1, 2, 2)
  assert back.images[1].tvec == (1, 1, 1)


def test_bin_is_preferred_and_points_may_be_missing(tmp_path):
  colmap.write_model(str(tmp_path), sample_model(), '.bin')
  (tmp_path / 'cameras.txt').write_text('nonsense')
  (tmp_path / 'images.txt').write_text('nonsense')
  (tmp_path / 'points3D.bin').unlink()
  assert colmap.read_model(str(tmp_path)).points.xyz.shape == (0, 3)


def write_with_tracks(folder):
  """A model by hand, with the 2D points and the tracks that COLMAP writes and nobody needs."""
  camera = struct.pack('<QIiQQ4d', 1, 1, 1, 16, 12, 20.0, 21.0, 8.0, 6.0)
  images = struct.pack('<Q', 2)
  for i, count in ((1, 2), (2, 1)):
    images += struct.pack('<I7dI', i, 1, 0, 0, 0, i, 0, 0, 1) + b'im%d\0' % i
    images += struct.pack('<Q', count) + struct.pack('<ddq', 1.5, 2.5, -1) * count
  points = struct.pack('<Q', 3)
  for i, track in ((1, 2), (2, 0), (3, 1)):
    points += struct.pack('<Q3d3BdQ', i, i, 2 * i, 3 * i, i, 0, 255, 0.5 * i, track)
    points += struct.pack('<II', 1, 0) * track
  files = {'cameras.bin': camera, 'images.bin': images, 'points3D.bin': points}
  for name, content in files.items():
    (folder / name).write_bytes(content)
  return files


def test_2d_points_and_tracks_are_skipped(tmp_path):
  write_with_tracks(tmp_path)
  model = colmap.read_model(str(tmp_path))
  assert [i.name for i in model.images.values()] == ['im1', 'im2']
  assert model.images[2].tvec == (2, 0, 0)
  np.testing.assert_array_equal(model.points.xyz, np.outer([1, 2, 3], [1, 2, 3]))
  np.testing.assert_array_equal(model.points.rgb[:, 0], [1, 2, 3])
  np.testing.assert_array_equal(model.points.error, [0.5, 1, 1.5])
  assert model.points.seen_by.size == model.points.views.sum() == 0


@pytest.mark.parametrize('ext', ['.bin', '.txt'])
def test_tracks_are_read_if_asked_for(tmp_path, ext):
  tracks = ((7, 4_000_000_000), (), (9,))
  points = struct.pack('<Q', 3)
  for i, track in enumerate(tracks):
    points += struct.pack('<Q3d3BdQ', i, i, 0, 0, 9, 9, 9, 0.5, len(track))
    points += b''.join(struct.pack('<II', image, 5) for image in track)
  lines = [f'{i} {i} 0 0 9 9 9 0.5 {" ".join(f"{k} 5" for k in t)}' for i, t in enumerate(tracks)]
  colmap.write_model(str(tmp_path), sample_model(), ext)
  content = points if ext == '.bin' else '\n'.join(lines).encode()
  (tmp_path / f'points3D{ext}').write_bytes(content)
  points = colmap.read_model(str(tmp_path), with_tracks=True).points
  assert points.seen_by.tolist() == [7, 4_000_000_000, 9]
  assert points.views.tolist() == [2, 0, 1]
  assert points.xyz[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize('track', ['1 0 x 0', '-1 0', '4294967296 0'])
def test_damaged_tracks_are_refused(tmp_path, track):
  colmap.write_model(str(tmp_path), sample_model(), '.txt')
  (tmp_path / 'points3D.txt').write_text(f'5 1 2 3 255 0 9 0.25 {track}\n')
  with pytest.raises(colmap.ModelError, match=r'points3D\.txt'):
    colmap.read_model(str(tmp_path), with_tracks=True)


def test_text_as_colmap_writes_it(tmp_path):
  (tmp_path / 'cameras.txt').write_text('# comment\n\n1 PINHOLE 16 12 20 21 8 6\n')
  (tmp_path / 'images.txt').write_text(
    '# a\n# b\n1 1 0 0 0 0 0 0 1 one.png\n1.5 2.5 -1 3 4 7\n2 0 1 0 0 1e0 0 0 1 two words.png\n\n'
  )
  (tmp_path / 'points3D.txt').write_text('# c\n5 1 2 3 255 0 9 0.25 1 0 1 1\n')
  model = colmap.read_model(str(tmp_path))
  assert [i.name for i in model.images.values()] == ['one.png', 'two words.png']
  assert model.points.ids.tolist() == [5]
  assert model.points.rgb.tolist() == [[255, 0, 9]]


@pytest.mark.parametrize('name', ['cameras.bin', 'images.bin', 'points3D.bin'])
def test_every_truncation_is_named(tmp_path, name):
  content = write_with_tracks(tmp_path)[name]
  for length in range(len(content)):
    (tmp_path / name).write_bytes(content[:length])
    message = error_of(tmp_path)
    assert name in message
    assert 'at byte' in message
    assert 'copy the model again' in message


@pytest.mark.parametrize('name', ['cameras.bin', 'images.bin', 'points3D.bin'])
@pytest.mark.parametrize('count', [4, 2**33, 2**63, 2**64 - 1])
def test_absurd_counts_take_no_memory(tmp_path, name, count):
  content = write_with_tracks(tmp_path)[name]
  (tmp_path / name).write_bytes(struct.pack('<Q', count) + content[8:])
  assert name in error_of(tmp_path)


def test_absurd_counts_inside_records(tmp_path):
  files = write_with_tracks(tmp_path)
  at = files['images.bin'].index(b'im1\0') + 4
  damaged = files['images.bin'][:at] + b'\xff' * 8 + files['images.bin'][at + 8 :]
  (tmp_path / 'images.bin').write_bytes(damaged)
  assert "2D points of 'im1'" in error_of(tmp_path)
  files = write_with_tracks(tmp_path)
  damaged = files['points3D.bin'][: 8 + 43] + b'\xff' * 8 + files['points3D.bin'][8 + 51 :]
  (tmp_path / 'points3D.bin').write_bytes(damaged)
  assert 'track of point 1' in error_of(tmp_path)


def test_trailing_bytes_are_an_error(tmp_path):
  content = write_with_tracks(tmp_path)['images.bin']
  (tmp_path / 'images.bin').write_bytes(content + b'\0')
  assert '1 unexpected bytes' in error_of(tmp_path)


def test_missing_folder_and_missing_model(tmp_path):
  assert 'No such folder' in error_of(tmp_path / 'nowhere')
  assert 'No sparse model' in error_of(tmp_path)
  (tmp_path / 'cameras.bin').write_bytes(b'')
  (tmp_path / 'images.txt').write_bytes(b'')
  assert 'No sparse model' in error_of(tmp_path)


def test_unknown_camera_models(tmp_path):
  content = write_with_tracks(tmp_path)['cameras.bin']
  (tmp_path / 'cameras.bin').write_bytes(content[:12] + struct.pack('<i', 77) + content[16:])
  assert 'unknown camera model id 77' in error_of(tmp_path)
  (tmp_path / 'cameras.bin').unlink()
  (tmp_path / 'images.txt').write_text('')
  (tmp_path / 'cameras.txt').write_text('\n1 WIDE 16 12 20 8 6\n')
  message = error_of(tmp_path)
  assert "cameras.txt:2: unknown camera model 'WIDE'" in message
  assert 'OPENCV_FISHEYE' in message


@pytest.mark.parametrize(
  ('file', 'line'),
  [
    ('cameras.txt', '1 PINHOLE 16 12 20 21 8'),
    ('cameras.txt', '1 PINHOLE 16 12 20 21 8 x'),
    ('cameras.txt', '1 PINHOLE 16'),
    ('cameras.txt', 'words'),
    ('cameras.txt', '2 PINHOLE 0 12 20 21 8 6'),
    ('cameras.txt', '2 PINHOLE 16 12 nan 21 8 6'),
    ('images.txt', '2 1 0 0 0 0 0 0 1'),
    ('images.txt', '2 1 0 0 0 0 0 zero 1 b.png'),
    ('images.txt', '2 0 0 0 0 0 0 0 1 b.png'),
    ('images.txt', '2 1 0 0 0 0 0 inf 1 b.png'),
    ('points3D.txt', '1 2 3 4'),
    ('points3D.txt', '1 2 3 4 300 0 0 1'),
    ('points3D.txt', 'one 2 3 4 0 0 0 1'),
    ('points3D.txt', '-1 2 3 4 0 0 0 1'),
    ('points3D.txt', f'{2**64} 2 3 4 0 0 0 1'),
    ('points3D.txt', '1 2 3 4 0 nan 0 1'),
  ],
)
def test_bad_text_lines_are_numbered(tmp_path, file, line):
  (tmp_path / 'cameras.txt').write_text('1 PINHOLE 16 12 20 21 8 6\n')
  (tmp_path / 'images.txt').write_text('1 1 0 0 0 0 0 0 1 a.png\n\n')
  (tmp_path / 'points3D.txt').write_text('')
  assert len(colmap.read_model(str(tmp_path)).images) == 1
  with open(tmp_path / file, 'a') as f:
    f.write(line + '\n')
  number = len((tmp_path / file).read_text().splitlines())
  assert f'{file}:{number}:' in error_of(tmp_path)


def _write_text(folder, images):
  (folder / 'cameras.txt').write_text('1 PINHOLE 16 12 20 21 8 6\n')
  (folder / 'images.txt').write_bytes(images.encode())


_POSE = '1 0 0 0 0 0 0 1'


@pytest.mark.parametrize(
  'images',
  [
    f'1 {_POSE} a.png\n2 {_POSE} b c.png\n',
    f'1 {_POSE} a.png\n\n2 {_POSE} b c.png',
    f'1 {_POSE} a.png\n1.5 2 -1\n2 {_POSE} b c.png\n3 4 7 5 6 -1\n',
    f'1 {_POSE} a.png\n# points:\n1.5 2 -1 3 4 7\n\n2 {_POSE} b c.png\n\n\n',
    f'\ufeff# a\r\n\r\n1 {_POSE} a.png\r\n\r\n1.5 2.5 -1\r\n# b\r\n2 {_POSE} b c.png\r\n',
    f'1 {_POSE} a.png\n1 1 0 0 0 0 0 0 1 10 11 12\n2 {_POSE} b c.png\n',
  ],
)
def test_images_are_told_from_2d_points_by_content(tmp_path, images):
  _write_text(tmp_path, images)
  assert [i.name for i in colmap.read_model(str(tmp_path)).images.values()] == ['a.png', 'b c.png']


def test_names_of_numbers_and_of_any_bytes(tmp_path):
  _write_text(tmp_path, f'1 {_POSE} 000\n\n2 {_POSE} 001\n1 2 3\n')
  (tmp_path / 'images.txt').open('ab').write(b'3 1 0 0 0 0 0 0 1 \xe9.png\n')
  names = [i.name for i in colmap.read_model(str(tmp_path)).images.values()]
  assert names == ['000', '001', os.fsdecode(b'\xe9.png')]


@pytest.mark.parametrize(
  ('images', 'number'),
  [
    (f'1 {_POSE} a.png\n2 {_POSE} 001\n', 2),  # A name, or a cut line of points?
    (f'1 {_POSE} a.png\n\n2 {_POSE} 1 2 3\n', 3),  # A name of three numbers, or four points?
    (f'1 {_POSE} a.png\n1.5 2 -1 3\n', 2),
    (f'1 {_POSE} a.png\n1.5 2 -1\n1.5 2 -1\n', 3),
    ('1.5 2 -1\n', 1),
  ],
)
def test_lines_that_cannot_be_told_apart_are_errors(tmp_path, images, number):
  _write_text(tmp_path, images)
  assert f'images.txt:{number}: expected' in error_of(tmp_path)


@pytest.mark.parametrize('ext', ['.bin', '.txt'])
def test_repeated_names_and_ids_are_errors(tmp_path, ext):
  model = captures.make_model(['a.png', 'b.png', 'a.png'], captures.circle_poses(3))
  colmap.write_model(str(tmp_path), model, ext)
  assert "images 1 and 3 have the same name, 'a.png'" in error_of(tmp_path)
  images = {key: dataclasses.replace(model.images[1], name=key) for key in 'ab'}
  colmap.write_model(str(tmp_path), dataclasses.replace(model, images=images), ext)
  assert 'image 1 is defined twice' in error_of(tmp_path)
  cameras = {1: model.cameras[1], 2: model.cameras[1]}
  colmap.write_model(str(tmp_path), dataclasses.replace(model, cameras=cameras), ext)
  assert f'cameras{ext}' in error_of(tmp_path)
  assert 'camera 1 is defined twice' in error_of(tmp_path)


def test_quaternions_of_any_length():
  for scale in (1e-320, 1e-200, 1e200):
    image = colmap.Image(1, (0.0, scale, 0.0, 0.0), (0.0, 0.0, 0.0), 1, 'a')
    np.testing.assert_array_equal(
      colmap.camera_to_world(image)[:, :3], np.diag([1, -1, -1]) @ np.diag([1, -1, -1])
    )


def test_an_image_without_its_camera_is_an_error(tmp_path):
  model = captures.make_model(['a.png'], captures.circle_poses(1))
  colmap.write_model(str(tmp_path), colmap.Model({}, model.images, model.points))
  assert 'uses camera 1, which' in error_of(tmp_path)


@pytest.mark.parametrize(
  ('model', 'params', 'expected'),
  [
    ('SIMPLE_PINHOLE', (9, 1, 2), (9, 9, 1, 2, (0, 0, 0, 0, 0, 0), structs.PERSPECTIVE)),
    ('PINHOLE', (9, 8, 1, 2), (9, 8, 1, 2, (0, 0, 0, 0, 0, 0), structs.PERSPECTIVE)),
    ('SIMPLE_RADIAL', (9, 1, 2, 3), (9, 9, 1, 2, (3, 0, 0, 0, 0, 0), structs.PERSPECTIVE)),
    ('RADIAL', (9, 1, 2, 3, 4), (9, 9, 1, 2, (3, 4, 0, 0, 0, 0), structs.PERSPECTIVE)),
    (
      'OPENCV',
      (9, 8, 1, 2, 3, 4, 5, 6),
      (9, 8, 1, 2, (3, 4, 0, 0, 5, 6), structs.PERSPECTIVE),
    ),
    (
      'OPENCV_FISHEYE',
      (9, 8, 1, 2, 3, 4, 5, 6),
      (9, 8, 1, 2, (3, 4, 5, 6, 0, 0), structs.FISHEYE),
    ),
    ('SIMPLE_RADIAL_FISHEYE', (9, 1, 2, 3), (9, 9, 1, 2, (3, 0, 0, 0, 0, 0), structs.FISHEYE)),
    ('RADIAL_FISHEYE', (9, 1, 2, 3, 4), (9, 9, 1, 2, (3, 4, 0, 0, 0, 0), structs.FISHEYE)),
  ],
)
def test_intrinsics(model, params, expected):
  assert len(params) == colmap.CAMERA_MODELS[model]
  assert colmap.intrinsics(colmap.Camera(1, model, 4, 4, params)) == colmap.Intrinsics(*expected)


def test_unsupported_camera_models_are_errors():
  usable = 0
  for model, count in colmap.CAMERA_MODELS.items():
    try:
      colmap.intrinsics(colmap.Camera(1, model, 4, 4, (1.0,) * count))
      usable += 1
    except colmap.ModelError as e:
      assert model in str(e)  # noqa: PT017
      assert 'image_undistorter' in str(e)  # noqa: PT017
  assert usable == 8
  with pytest.raises(colmap.ModelError, match='focal lengths'):
    colmap.intrinsics(colmap.Camera(1, 'SIMPLE_PINHOLE', 4, 4, (0.0, 1.0, 2.0)))


def test_camera_to_world_inverts_the_pose():
  """A point in front of the OpenCV camera is in front of the OpenGL one; y and z are negated."""
  for pose in captures.circle_poses(5):
    quaternion, translation = captures.to_colmap(pose)
    scaled = tuple(3 * q for q in quaternion)  # COLMAP normalises what it reads.
    image = colmap.Image(1, scaled, translation, 1, 'a')
    np.testing.assert_allclose(colmap.camera_to_world(image), pose, atol=1e-12)
  image = colmap.Image(1, (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 5.0), 1, 'a')
  np.testing.assert_allclose(
    colmap.camera_to_world(image), [[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, -5]], atol=1e-12
  )


def test_quarter_turn():
  """90 degrees around x: the world's y is the camera's z."""
  half = np.sqrt(0.5)
  image = colmap.Image(1, (half, half, 0.0, 0.0), (0.0, 0.0, 0.0), 1, 'a')
  forward = -colmap.camera_to_world(image)[:, 2]
  np.testing.assert_allclose(forward, [0, 1, 0], atol=1e-12)


@pytest.mark.parametrize(('scene', 'images'), [('bonsai', 292), ('phone_toy', 82)])
def test_real_models(scene, images):
  root = os.path.join(os.path.dirname(__file__), '..', '..', 'shared', 'data', scene, 'sparse', '0')
  if not os.path.isdir(root):
    pytest.skip(f'the real capture {scene} is not here')
  model = colmap.read_model(root)
  assert len(model.images) == images
  assert len(model.points.xyz) > 5000
  assert np.isfinite(model.points.xyz).all()
  assert 0.2 < model.points.error.mean() < 0.7


def rig_files(poses, first_id=1):
  """rigs.bin and frames.bin of one rig with two cameras, the second turned and moved."""
  quarter = (0.5**0.5, 0.0, 0.0, 0.5**0.5, 1.0, 2.0, 3.0)
  rigs = struct.pack('<QIIiIiIB7d', 1, 1, 2, 0, 1, 0, 2, 1, *quarter)
  frames = struct.pack('<Q', len(poses))
  for k, pose in enumerate(poses):
    ids = first_id + 2 * k
    frames += struct.pack('<II7dI', k + 1, 1, *pose, 2)
    frames += struct.pack('<iIQiIQ', 0, 1, ids, 0, 2, ids + 1)
  return rigs, frames


def rig_model():
  rig = [(1.0, 0.0, 0.0, 0.0, float(k), 0.0, 5.0) for k in range(3)]
  cameras = {i: colmap.Camera(i, 'PINHOLE', 16, 12, (20.0, 20.0, 8.0, 6.0)) for i in (1, 2)}
  ims = {}
  for k, pose in enumerate(rig):
    ims[2 * k + 1] = colmap.Image(2 * k + 1, pose[:4], pose[4:], 1, f'a{k}.png')
    x, y, z = pose[4:]  # A quarter turn about z, then the offset of the sensor.
    turned = (-y + 1, x + 2, z + 3)
    ims[2 * k + 2] = colmap.Image(2 * k + 2, (0.5**0.5, 0, 0, 0.5**0.5), turned, 2, f'b{k}.png')
  return rig, colmap.Model(cameras, ims, colmap.make_points())


def _warned(folder):
  with warnings.collect() as found:
    colmap.warn_of_contradictions(str(folder), colmap.read_model(str(folder)))
  return found


def test_rigs_that_contradict_the_images_are_warned_of(tmp_path):
  rig, model = rig_model()
  colmap.write_model(str(tmp_path), model, '.bin')
  for name, content in zip(('rigs', 'frames'), rig_files(rig)):
    (tmp_path / f'{name}.bin').write_bytes(content)
  assert _warned(tmp_path) == []
  rig[1] = (*rig[1][:4], 9.0, 9.0, 9.0)
  (tmp_path / 'frames.bin').write_bytes(rig_files(rig)[1])
  (warning,) = _warned(tmp_path)
  assert "frames.bin: 2 of 6 images (e.g. 'a1.png') have another pose" in warning
  (tmp_path / 'frames.bin').write_bytes(rig_files(rig[:2])[1])
  assert '4 images, not 6' in _warned(tmp_path)[0]
  (tmp_path / 'frames.bin').write_bytes(rig_files(rig)[1][:-3])
  assert 'frames.bin: truncated' in _warned(tmp_path)[0]


def test_text_that_is_newer_or_different_is_warned_of(tmp_path):
  _, model = rig_model()
  colmap.write_model(str(tmp_path), model, '.bin')
  colmap.write_model(str(tmp_path), model, '.txt')
  assert _warned(tmp_path) == []
  later = os.path.getmtime(tmp_path / 'images.bin') + 100
  os.utime(tmp_path / 'images.txt', (later, later))
  assert 'images.txt and cameras.txt are newer; the binary files are used' in _warned(tmp_path)[0]
  model.images[1] = dataclasses.replace(model.images[1], tvec=(7.0, 7.0, 7.0))
  colmap.write_model(str(tmp_path), model, '.txt')
  assert "different (1 of 6 images (e.g. 'a0.png') have another pose" in _warned(tmp_path)[0]
