"""transforms.json: cameras by meaning, unused keys, masks, splits, points, applied transforms.

The pictures have 16x12 pixels; unless a test says otherwise, the file has fl_x 20, fl_y 21, cx 8.5.
"""

import json
import math
import struct

import captures
import numpy as np
import pytest
from datasets_test import intrinsic_matrix, refused, write_ngp, write_transforms
from datasets_test import load as load_any

from internal import configs
from internal.datasets import images, ply, scenes, sparse_points

APPLIED = [[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]]  # (x, y, z) -> (x, z, -y).


def load(root, **kwargs):
  return load_any(root, dataset_loader='transforms', **kwargs)


def loaded(root, table, drop=(), first=None):
  """The scene of a table without the keys `drop`; `first` updates the frame of row 0."""
  table = {key: value for key, value in table.items() if key not in drop}
  table['frames'] = [dict(frame) for frame in table['frames']]
  table['frames'][-1].update(first or {})  # write_ngp writes frames backwards.
  write_transforms(root, table)
  return load(root)


def focal(scene, i):
  return np.diag(intrinsic_matrix(scene, i))[:2]


class TestFocalLengths:
  @pytest.mark.parametrize(
    ('own', 'expected'),
    [
      ({'fl_x': 40}, (40, 40)),  # Square pixels, not the file's fl_y.
      ({'fl_y': 40}, (40, 40)),
      ({'fl_x': 40, 'fl_y': 44}, (40, 44)),
      ({'fx': 40, 'fy': 44}, (40, 44)),
      ({'camera_angle_x': math.pi / 2}, (8, 8)),  # 16 / 2 / tan(45 degrees).
      ({'camera_angle_y': math.pi / 2}, (6, 6)),
      ({'x_fov': 90}, (8, 8)),
      ({'x_fov': 90, 'y_fov': 60}, (8, 6 * 3**0.5)),  # tan(30 degrees) = 1 / sqrt(3).
      ({'fl_x': 8, 'camera_angle_y': math.pi / 2}, (8, 6)),
    ],
  )
  def test_a_frames_own_win_as_a_pair(self, tmp_path, own, expected):
    table, _ = write_ngp(tmp_path)
    scene = loaded(tmp_path, table, first=own)
    np.testing.assert_allclose(focal(scene, 0), expected, rtol=1e-5)
    np.testing.assert_allclose(focal(scene, 1), (20, 21), rtol=1e-5)
    assert all('far from square' in warning for warning in scene.report['warnings'])

  def test_degrees_of_the_whole_file(self, tmp_path):
    table, _ = write_ngp(tmp_path, x_fov=90)
    scene = loaded(tmp_path, table, drop=('fl_x', 'fl_y'))
    np.testing.assert_allclose(focal(scene, 3), (8, 8), rtol=1e-5)

  def test_angles_are_of_the_frames_own_size(self, tmp_path):
    table, _ = write_ngp(tmp_path)
    captures.save_image(str(tmp_path / 'images/000.png'), captures.pixels(0, (32, 24)))
    own = {'w': 32, 'h': 24, 'camera_angle_x': math.pi / 2, 'cx': 15, 'cy': 11}
    scene = loaded(tmp_path, table, first=own)
    wanted = [[16, 0, 15], [0, 16, 11], [0, 0, 1]]
    np.testing.assert_allclose(intrinsic_matrix(scene, 0), wanted, rtol=1e-5, atol=1e-4)
    assert scene.report['warnings'] == []

  def test_pixels_of_another_size_are_warned_of(self, tmp_path):
    table, _ = write_ngp(tmp_path)
    captures.save_image(str(tmp_path / 'images/000.png'), captures.pixels(0, (32, 24)))
    (warning,) = loaded(tmp_path, table, first={'w': 32, 'h': 24, 'fl_x': 40}).report['warnings']
    assert 'use its cx, cy unscaled' in warning
    assert '1 of 9 frames, e.g. images/000.png: 32x24, the file 16x12' in warning

  @pytest.mark.parametrize(
    ('values', 'size', 'text'),
    [
      ({'fl_x': 20}, (32, 24), 'another size than the file use its fl_x unscaled'),
      ({'fl_x': 20}, (12, 16), ''),  # A camera on its side.
      ({'fl_x': 20, 'fl_y': 24}, (12, 16), 'another size than the file use its fl_x, fl_y'),
      ({'fl_x': 20, 'cx': 8.5}, (12, 16), 'another size than the file use its cx unscaled'),
      ({'camera_angle_x': 0.8}, (12, 16), 'another shape than the file use its camera_angle_x'),
      ({'camera_angle_x': 0.8}, (32, 24), ''),
    ],
  )
  def test_a_file_without_a_size_has_that_of_most_frames(self, tmp_path, values, size, text):
    table, _ = write_ngp(tmp_path)
    captures.save_image(str(tmp_path / 'images/000.png'), captures.pixels(0, size))
    kept = {'frames': table['frames'], **values}
    warnings = loaded(tmp_path, kept).report['warnings']
    assert (len(warnings) == 1 and text in warnings[0]) if text else warnings == []

  @pytest.mark.parametrize(
    ('values', 'text'),
    [
      ({'camera_angle_x': math.pi / 2}, 'fl_x contradicts camera_angle_x, which is ignored'),
      ({'y_fov': 90}, 'fl_y contradicts y_fov, which is ignored'),
      ({'camera_angle_x': 60}, 'fl_x contradicts camera_angle_x'),  # Degrees by mistake.
      ({'fx': 20.3}, 'fl_x contradicts fx'),
    ],
  )
  def test_contradictions_are_warned_of(self, tmp_path, values, text):
    table, _ = write_ngp(tmp_path, **values)
    scene = loaded(tmp_path, table)
    (warning,) = scene.report['warnings']
    assert f'transforms.json: {text}' in warning
    assert '9 of 9 frames' in warning
    np.testing.assert_allclose(focal(scene, 0), (20, 21), rtol=1e-5)

  def test_rounded_angles_agree(self, tmp_path):
    angle = 2 * math.atan(8 / 20.1)  # 20.1 pixels: half a percent from 20.
    table, _ = write_ngp(tmp_path, camera_angle_x=angle)
    assert loaded(tmp_path, table).report['warnings'] == []

  @pytest.mark.parametrize(
    ('values', 'text'),
    [
      ({'fov': 50}, r"no focal length (the unit of 'fov' is not defined)"),
      ({'flx': 35, 'FL_Y': 35}, "(the unit of 'FL_Y', 'flx' is not defined)"),
      ({'focal_length': 35}, "(the unit of 'focal_length' is not defined)"),
      ({'camera_angle_x': 60}, "(camera_angle_x is 60). Add a positive 'fl_x' in pixels"),
      ({'x_fov': 180}, "(x_fov is 180). Add a positive 'fl_x' in pixels, an 'x_fov' below 180"),
      ({'fl_x': 20, 'y_fov': -1}, '(fl_x is 20; y_fov is -1)'),
    ],
  )
  def test_without_a_usable_one_the_keys_are_named(self, tmp_path, values, text):
    table, _ = write_ngp(tmp_path)
    del table['fl_x'], table['fl_y']
    write_transforms(tmp_path, {**table, **values})
    assert text in refused(tmp_path, dataset_loader='transforms')


class TestLenses:
  def test_coefficients_of_two_lenses_are_not_mixed(self, tmp_path):
    table, _ = write_ngp(tmp_path, k1=0.1, k2=0.02)
    scene = loaded(tmp_path, table, first={'k1': 0.3})
    np.testing.assert_allclose(scene.cameras.distortion[:2, :2], [[0.3, 0], [0.1, 0.02]], atol=1e-7)

  def test_another_model_does_not_inherit_coefficients(self, tmp_path):
    table, _ = write_ngp(tmp_path, camera_model='OPENCV_FISHEYE', k1=0.1)
    scene = loaded(tmp_path, table, first={'camera_model': 'PINHOLE'})
    np.testing.assert_allclose(scene.cameras.distortion[:2, 0], [0, 0.1], atol=1e-7)
    assert scene.report['warnings'] == []

  def test_one_coordinate_of_the_principal_point_leaves_the_other_in_the_centre(self, tmp_path):
    table, _ = write_ngp(tmp_path, cy=5)
    scene = loaded(tmp_path, table, first={'cx': 7})
    np.testing.assert_allclose(intrinsic_matrix(scene, 0)[:2, 2], [7, 6], atol=1e-4)

  @pytest.mark.parametrize(
    ('values', 'text'),
    [
      ({'camera_model': 'PINHOLE', 'k1': 0.1}, 'PINHOLE has no coefficient k1; it is used'),
      ({'camera_model': 'OPENCV_FISHEYE', 'p1': 0.1}, 'no coefficient p1; it is ignored'),
      ({'camera_model': 'OPENCV', 'k5': 0.1}, 'OPENCV has no coefficient k5; it is ignored'),
      ({'k4': 0.001}, 'OPENCV has no coefficient k4; it is used'),
      ({'camera_model': 'OPENCV', 'is_fisheye': True}, 'contradicts is_fisheye, which is ignored'),
    ],
  )
  def test_what_the_model_does_not_have_is_warned_of(self, tmp_path, values, text):
    table, _ = write_ngp(tmp_path, **values)
    (warning,) = loaded(tmp_path, table).report['warnings']
    assert text in warning

  @pytest.mark.parametrize('value', ['false', 'true', 2, [], {}])
  def test_is_fisheye_is_true_or_false(self, tmp_path, value):
    write_ngp(tmp_path, is_fisheye=value)
    message = refused(tmp_path, dataset_loader='transforms')
    assert f'is_fisheye must be true or false, got {value!r}' in message

  def test_is_fisheye_may_be_a_number(self, tmp_path):
    table, _ = write_ngp(tmp_path, is_fisheye=0)
    scene = loaded(tmp_path, table, first={'is_fisheye': 1})
    assert scene.cameras.lens.tolist() == [1] + [0] * 8

  def test_other_lenses_of_instant_ngp_are_refused(self, tmp_path):
    write_ngp(tmp_path, equirectangular=True)
    message = refused(tmp_path, dataset_loader='transforms')
    assert "unknown camera model 'equirectangular'" in message


class TestKeys:
  def test_what_is_not_used_is_named(self, tmp_path):
    table, _ = write_ngp(
      tmp_path, fisheye_crop_radius=14.0, aabb_scale=16, offset=[0, 0, 0.5], lossmult=2
    )
    for frame in table['frames'][:4]:
      frame['depth_file_path'] = 'depth/0.png'
    (warning,) = loaded(tmp_path, table).report['warnings']
    assert 'transforms.json: these keys are not used: ' in warning
    assert (
      "'fisheye_crop_radius', 'aabb_scale', 'offset', 'lossmult', 'depth_file_path' of 4 frames"
      in warning
    )

  def test_other_files_of_frames_are_named(self, tmp_path):
    table, _ = write_ngp(tmp_path)
    (tmp_path / 'transforms_test.json').touch()
    (warning,) = loaded(tmp_path, table).report['warnings']
    assert "only transforms.json is read, not 'transforms_test.json'" in warning

  def test_metadata_and_what_is_off_are_not(self, tmp_path):
    table, _ = write_ngp(
      tmp_path, rolling_shutter=[0, 0, 0, 0], k5=0, k6=None, is_fisheye=False,
      enable_depth_loading=False, version='1.2', _comment='by hand',
    )  # fmt: skip
    scene = loaded(tmp_path, table, first={'sharpness': 30.2, 'colmap_im_id': 7, 'timestamp': 1e9})
    assert scene.report['warnings'] == []


class TestMasks:
  def write(self, root, name):
    captures.save_image(str(root / name), np.full((12, 16), 255, np.uint8))

  def test_the_files_mask_counts_where_a_frame_has_none(self, tmp_path):
    table, _ = write_ngp(tmp_path, mask_path='./circle.png')
    self.write(tmp_path, 'circle.png')
    self.write(tmp_path, 'own.png')
    scene = loaded(tmp_path, table, first={'mask_path': 'own.png'})
    assert scene.masks == ('own.png', *['circle.png'] * 8)

  def test_a_missing_mask_is_an_error(self, tmp_path):
    write_ngp(tmp_path, mask_path='nowhere.png')
    message = refused(tmp_path, dataset_loader='transforms')
    assert 'nowhere.png' in message
    assert 'transforms.json' in message
    assert 'mask_path' in message


def test_transparent_pixels_are_put_on_white(tmp_path):
  table, _ = write_ngp(tmp_path)
  pixels = captures.pixels(1, channels=4)
  pixels[..., 3] = 0
  captures.save_image(str(tmp_path / 'images/001.png'), pixels)
  assert (scenes.read_image(str(tmp_path), loaded(tmp_path, table), 1) == 255).all()


def test_test_pictures_that_are_trained_on_are_warned_of(tmp_path):
  table, _ = write_ngp(tmp_path)
  names = [frame['file_path'] for frame in table['frames']]
  lists = {'train_filenames': names, 'test_filenames': names[:2], 'val_filenames': names[2:3]}
  scene = loaded(tmp_path, {**table, **lists})
  assert (scene.train, scene.test) == (tuple(range(9)), (7, 8))
  (warning,) = scene.report['warnings']
  assert '2 of 2 test images are also trained on' in warning
  assert "'images/007.png', 'images/008.png'" in warning


def test_frames_in_no_list_are_named(tmp_path):
  table, _ = write_ngp(tmp_path)
  lists = {'train_filenames': ['images/000.png'], 'test_filenames': ['images/001.png']}
  few, unused = loaded(tmp_path, {**table, **lists}).report['warnings'][::-1]
  assert '7 of 9 frames are in none of the lists train_filenames, test_filenames' in unused
  assert "'images/002.png'" in unused
  assert 'trains on 1 image only, of 9 frames' in few


class TestPoses:
  @pytest.mark.parametrize(
    ('matrix', 'text'),
    [
      (
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [5, 6, 7, 1]],
        'is 5, 6, 7, 1. Its last column is that: transpose the matrix',
      ),
      ([[1, 0, 0, 5], [0, 1, 0, 6], [0, 0, 1, 7], [0, 0, 0, 2]], 'is 0, 0, 0, 2. Export it again'),
      ([[1, 0, 0], [0, 1, 0], [0, 0, 1], [5, 6, 7]], 'must be 4x4 or 3x4 finite numbers'),
      ([[1, 0, 0, math.nan], [0, 1, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]], 'finite numbers'),
    ],
  )
  def test_what_is_not_a_pose_is_refused(self, tmp_path, matrix, text):
    table, _ = write_ngp(tmp_path)
    table['frames'][2]['transform_matrix'] = matrix
    write_transforms(tmp_path, table)
    message = refused(tmp_path, dataset_loader='transforms')
    assert 'transforms.json: frame 3 (images/006.png)' in message
    assert text in message

  def test_the_last_row_may_be_absent(self, tmp_path):
    table, _ = write_ngp(tmp_path)
    whole = loaded(tmp_path, table)
    for frame in table['frames']:
      del frame['transform_matrix'][3]
    short = loaded(tmp_path, table)
    np.testing.assert_array_equal(short.cameras.camtoworld, whole.cameras.camtoworld)


class TestConventions:
  def table(self, root, change):
    table, poses = write_ngp(root)
    for own, pose in zip(table['frames'], reversed(poses)):
      own['transform_matrix'] = [*np.asarray(change(pose)).tolist(), [0, 0, 0, 1]]
    return table

  @pytest.mark.parametrize(
    ('change', 'what'),
    [
      (lambda pose: pose * [1, -1, -1, 1], 'their axes are taken as x right, y down, z forward'),
      (
        lambda pose: world_to_camera(pose * [1, -1, -1, 1]),
        'they are taken as world to camera (OpenCV)',
      ),
      (lambda pose: world_to_camera(pose), 'they are taken as world to camera (OpenGL)'),
    ],
    ids=['opencv', 'inverse_opencv', 'inverse'],
  )
  def test_other_conventions_are_doubted(self, tmp_path, change, what):
    (warning,) = loaded(tmp_path, self.table(tmp_path, change)).report['warnings']
    assert 'transforms.json: 0% of the cameras look at the point' in warning
    assert f'and 100% if {what}' in warning

  @pytest.mark.parametrize(
    'change',
    [
      lambda pose: pose,
      # Side by side, with lines of sight that spread: they meet behind the cameras.
      lambda pose: np.c_[turn_about_y(-0.1 * pose[0, 3]), [pose[0, 3], 0, 0]],
      # Outwards, each from where it stands: they meet nowhere.
      lambda pose: np.c_[turn_about_y(7 * pose[0, 3] + 3 * pose[1, 3]), pose[:, 3]],
    ],
    ids=['inwards', 'one_way', 'any_way'],
  )
  def test_others_are_not(self, tmp_path, change):
    assert loaded(tmp_path, self.table(tmp_path, change)).report['warnings'] == []


def world_to_camera(pose):
  return np.linalg.inv(np.vstack([pose, [0, 0, 0, 1]]))[:3]


def turn_about_y(angle):
  return np.array(
    [[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]]
  )


class TestApplied:
  def test_is_kept_in_the_scenes_file(self, tmp_path):
    table, _ = write_ngp(tmp_path, applied_transform=APPLIED, applied_scale=0.5)
    scene = loaded(tmp_path, table)
    scenes.save_scene(str(tmp_path / 'scene.json'), scene)
    applied = scenes.load_scene(str(tmp_path / 'scene.json')).applied
    np.testing.assert_array_equal(applied.transform, [*APPLIED, [0, 0, 0, 1]])
    assert applied.scale == 0.5

  def test_files_of_older_versions_have_none(self, tmp_path):
    table, _ = write_ngp(tmp_path)
    path = tmp_path / 'scene.json'
    scenes.save_scene(str(path), loaded(tmp_path, table))
    fields = json.loads(path.read_text())
    assert fields.pop('applied') is None
    path.write_text(json.dumps(fields))
    assert scenes.load_scene(str(path)).applied is None

  @pytest.mark.parametrize('bad', [{'transform': np.zeros((4, 4)).tolist()}, {'scale': -1}, {}])
  def test_damaged_files_are_refused(self, tmp_path, bad):
    table, _ = write_ngp(tmp_path, applied_transform=APPLIED)
    path = tmp_path / 'scene.json'
    scenes.save_scene(str(path), loaded(tmp_path, table))
    fields = json.loads(path.read_text())
    fields['applied'] = {**fields['applied'], **bad} if bad else []
    path.write_text(json.dumps(fields))
    with pytest.raises(images.DataError, match=r'scene\.json'):
      scenes.load_scene(str(path))

  @pytest.mark.parametrize(
    'values',
    [
      {'applied_transform': [[1, 2], [3, 4]]},
      {'applied_scale': 0},
      {'applied_transform': np.zeros((3, 4)).tolist()},
      {'applied_transform': 'none'},
      {'applied_scale': -2},
      {'applied_scale': [1]},
    ],
  )
  def test_invalid_values_are_warned_of(self, tmp_path, values):
    table, _ = write_ngp(tmp_path, **values)
    scene = loaded(tmp_path, table)
    assert scene.applied is None
    (warning,) = scene.report['warnings']
    assert 'transforms.json: applied_transform must be' in warning


HEADER = """ply
format {}
comment written by a test
element vertex {}
property {f} x
property {f} y
property {f} z
property uchar red
property uint8 green
property uchar blue
element face 0
property list uchar int vertex_indices
end_header
"""


class TestPoints:
  @pytest.mark.parametrize(
    'form', ['ascii 1.0', 'binary_little_endian 1.0', 'binary_big_endian 1.0']
  )
  def test_positions_and_colours(self, tmp_path, form):
    header = HEADER.format(form, 2, f='double' if 'big' in form else 'float').encode()
    rows = [(1, -2, 3.5, 255, 0, 7), (4, 5, 6, 1, 2, 3)]
    if form.startswith('ascii'):
      body = b'1 -2 3.5 255 0 7\n4 5 6 1 2 3\n'
    else:
      layout = '>dddBBB' if 'big' in form else '<fffBBB'
      body = b''.join(struct.pack(layout, *row) for row in rows)
    (tmp_path / 'a.ply').write_bytes(header + body)
    xyz, rgb = ply.read_points(str(tmp_path / 'a.ply'))
    np.testing.assert_array_equal(xyz, [[1, -2, 3.5], [4, 5, 6]])
    np.testing.assert_array_equal(rgb, [[255, 0, 7], [1, 2, 3]])

  @pytest.mark.parametrize(
    'content',
    [
      b'', b'ply\n', b'\xff' * 5000, HEADER.format('ascii 1.0', 3, f='float').encode() + b'1 2 3',
      HEADER.format('ascii 1.0', 10**15, f='float').encode(),
      HEADER.format('binary_little_endian 1.0', 10**15, f='float').encode(),
      HEADER.format('ascii 1.0', 1, f='list').encode() + b'1 2 3 4 5 6',
      HEADER.format('morse 1.0', 0, f='float').encode(),
      HEADER.format('ascii 1.0', -1, f='float').encode(),
    ],
  )  # fmt: skip
  def test_damaged_files_are_named(self, tmp_path, content):
    (tmp_path / 'a.ply').write_bytes(content)
    with pytest.raises(images.DataError, match=r'a\.ply: cannot be read as PLY points'):
      ply.read_points(str(tmp_path / 'a.ply'))

  def test_a_captures_points_are_saved_in_the_normalised_world(self, tmp_path):
    table, poses = write_ngp(tmp_path, ply_file_path='sparse_pc.ply')
    rows = ''.join(f'{x} {y} {z} 9 8 7\n' for x, y, z in poses[:, :, 3])  # Where the cameras are.
    text = HEADER.format('ascii 1.0', len(poses), f='float') + rows
    (tmp_path / 'sparse_pc.ply').write_text(text)
    scene = loaded(tmp_path, table)
    assert scene.report['warnings'] == []
    sparse_points.save(str(tmp_path), configs.Config(data_dir=str(tmp_path)), scene)
    xyz, rgb = sparse_points.load(str(tmp_path))
    np.testing.assert_allclose(xyz, scene.cameras.camtoworld[:, :, 3], atol=1e-5)
    assert rgb.tolist() == [[9, 8, 7]] * 9

  @pytest.mark.parametrize('name', ['nowhere.ply', '../outside.ply', 3])
  def test_a_missing_file_is_warned_of(self, tmp_path, name):
    table, _ = write_ngp(tmp_path, ply_file_path=name)
    (warning,) = loaded(tmp_path, table).report['warnings']
    assert 'transforms.json: ' in warning
    assert str(name) in warning
    assert sparse_points.read(str(tmp_path), np.eye(4), 'transforms') is None


def test_a_missing_picture_needs_neither_a_size_nor_a_mask(tmp_path):
  table, _ = write_ngp(tmp_path)
  for key in ('w', 'h'):
    del table[key]
  for i, frame in enumerate(reversed(table['frames'])):
    frame['mask_path'] = f'm{i}.png'
    if i != 4:
      captures.save_image(str(tmp_path / f'm{i}.png'), np.full((12, 16), 255, np.uint8))
  write_transforms(tmp_path, table)
  (tmp_path / 'images/004.png').unlink()
  report = load(tmp_path, read_only=True).report
  assert report['images_missing'] == ['images/004.png']
  assert report['masks'] == 8
