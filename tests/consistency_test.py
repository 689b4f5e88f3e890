"""What a capture's frames are held against: files, each other, and what cameras are like."""

import os
import pathlib
import shutil
import unicodedata

import captures
import numpy as np
import pytest
from datasets_test import frame, load, refused, write_blender, write_ngp, write_transforms
from PIL import Image

from internal import cameras, colmap
from internal.datasets import consistency, frames, images, scenes
from internal.system import warnings


def warned(root, **kwargs) -> str:
  return '\n'.join(load(root, **kwargs).report['warnings'])


def rename_in_model(root, names):
  model = captures.make_model(names, captures.circle_poses(len(names)))
  colmap.write_model(str(root / 'sparse/0'), model, '.bin')


@pytest.mark.parametrize('factor', [0, 2])
@pytest.mark.parametrize(
  ('disk', 'named'),
  [
    ('IMG_{}.jpg', 'IMG_{}.JPG'),
    ('b\u00fc_{}.png', unicodedata.normalize('NFD', 'b\u00fc_{}.png')),
    ('{}.png', '{}.jpg'),
    ('{}.png', '{}.HEIC'),
    ('cam/{}.png', 'cam\\{}.png'),
    ('{}.png', 'images/{}.png'),
    ('{}.png', '/data/s/images/{}.png'),
    ('{}.png', 'C:\\s\\images\\{}.png'),
    ('cam/{}.png', '{}.png'),
    ('cam/{}.png', '../other/images/cam/{}.png'),
  ],
)
def test_pictures_of_other_names_are_found(tmp_path, disk, named, factor):
  captures.write_colmap(tmp_path, names=[disk.format(i) for i in range(9)])
  rename_in_model(tmp_path, [named.format(i) for i in range(9)])
  found = load(tmp_path, factor=factor)
  if disk.endswith('.png') and not factor:
    np.testing.assert_array_equal(scenes.read_image(tmp_path, found, 4), captures.pixels(4))
  assert found.report['images_unregistered'] == []
  if '\\' not in named or ':' in named:  # Backslashes alone cannot be misread.
    (warning,) = found.report['warnings']
    assert '9 of 9 pictures have other names' in warning
    if named == 'images/{}.png':
      assert "'images/images/0.png' is 'images/0.png'" in warning


def test_ambiguous_names_are_refused(tmp_path):
  captures.write_colmap(tmp_path)
  for folder in ('l', 'r'):
    shutil.copytree(tmp_path / 'images', tmp_path / 'c' / folder)
  shutil.rmtree(tmp_path / 'images')
  shutil.move(tmp_path / 'c', tmp_path / 'images')
  message = refused(tmp_path)
  assert "'images/l/000.png', 'images/r/000.png'" in message
  shutil.rmtree(tmp_path / 'images/r')
  rename_in_model(tmp_path, ['a/000.png', 'b/000.png', '001.png'])
  for name in os.listdir(tmp_path / 'images/l'):
    shutil.move(tmp_path / 'images/l' / name, tmp_path / 'images' / name)
  assert "'a/000.png', 'b/000.png' have no file of their own" in refused(tmp_path)


def test_a_picture_put_aside_is_missing(tmp_path):
  captures.write_colmap(tmp_path)
  os.mkdir(tmp_path / 'images/bad')
  shutil.move(tmp_path / 'images/003.png', tmp_path / 'images/bad/003.png')
  found = load(tmp_path)
  assert found.report['images_missing'] == ['003.png']
  assert len(found.names) == 8


@pytest.mark.parametrize(
  ('put', 'says'),
  [
    (lambda path: path.with_suffix('.gif').touch(), "'003.gif', whose format is not read"),
    (lambda path: path.symlink_to('gone.png'), "is a link to 'gone.png', where nothing is"),
    (lambda path: path.symlink_to(path), "003.png', where nothing is"),
    (lambda path: path.mkdir(), '003.png: It is a folder'),
    (os.mkfifo, 'It is a pipe'),
  ],
  ids=['gif', 'dangling', 'loop', 'folder', 'pipe'],
)
def test_what_lies_in_place_of_a_missing_picture_is_said(tmp_path, put, says):
  captures.write_colmap(tmp_path)
  (tmp_path / 'images/003.png').unlink()
  put(tmp_path / 'images/003.png')
  assert says in warned(tmp_path)


@pytest.mark.parametrize('factor', [0, 2])
def test_a_subset_is_trained_on(tmp_path, factor):
  captures.write_colmap(tmp_path, n=10)
  for i in range(5):
    (tmp_path / f'images/{2 * i:03}.png').unlink()
  found = load(tmp_path, factor=factor)
  assert found.names == tuple(f'{i:03}.png' for i in (1, 3, 5, 7, 9))
  assert np.abs(found.cameras.camtoworld[..., 3]).max() == pytest.approx(1)
  (warning,) = found.report['warnings']
  assert "5 of 10 posed pictures are missing ('000.png', '002.png', '004.png' and 2" in warning
  assert 'All test images are missing' in warning  # 000 and 008.
  (tmp_path / 'images/001.png').unlink()
  if not factor:
    assert '6 of 10 are missing' in refused(tmp_path)
    assert len(load(tmp_path, min_images_fraction=0.4).names) == 4


def test_blender_subset(tmp_path):
  write_blender(tmp_path)
  (tmp_path / 'train/r_1.png').unlink()
  found = load(tmp_path, dataset_loader='blender')
  assert (found.train, found.test) == ((0, 1), (2, 3))
  assert '1 of 5' in found.report['warnings'][0]


def test_one_picture_twice(tmp_path):
  table, poses = write_ngp(tmp_path)
  table['frames'].append(dict(table['frames'][2]))
  write_transforms(tmp_path, table)
  found = load(tmp_path, dataset_loader='transforms')
  assert len(found.names) == 9
  assert '1 frame listed twice' in found.report['warnings'][0]
  table['frames'][-1] = frame(poses[0], table['frames'][2]['file_path'])
  write_transforms(tmp_path, table)
  assert 'has two different cameras' in refused(tmp_path, dataset_loader='transforms')


def test_a_held_out_picture_listed_twice_is_not_trained_on(tmp_path):
  table, _ = write_ngp(tmp_path)
  again = next(f for f in table['frames'] if '008' in f['file_path'])
  table['frames'].append({**again, 'file_path': 'images//./008.png'})
  write_transforms(tmp_path, table)
  found = load(tmp_path, dataset_loader='transforms')
  names = [found.names[i] for i in found.test]
  assert len(names) == 2
  assert not set(found.train) & set(found.test)
  (warning,) = found.report['warnings']
  assert '1 frame listed twice' in warning


def test_a_camera_far_away_is_named(tmp_path):
  names, poses = captures.write_colmap(tmp_path)
  write = lambda: colmap.write_model(  # noqa: E731
    str(tmp_path / 'sparse/0'), captures.make_model(names, poses), '.bin'
  )
  poses[4, :, 3] *= 50
  write()
  assert warned(tmp_path) == ''
  poses[4, :, 3] *= 1e4
  write()
  text = warned(tmp_path)
  assert '1 of 9 cameras are up to' in text
  assert "('004.png')" in text


def test_pictures_of_one_pose_are_warned_of(tmp_path):
  names, poses = captures.write_colmap(tmp_path)
  poses[4] = poses[3]
  colmap.write_model(str(tmp_path / 'sparse/0'), captures.make_model(names, poses), '.bin')
  assert "1 picture with exactly the pose of another one ('003.png = 004.png')" in warned(tmp_path)
  poses[1::2] = poses[::2][:4]  # As in a capture of two exposures each.
  colmap.write_model(str(tmp_path / 'sparse/0'), captures.make_model(names, poses), '.bin')
  assert '4 pictures with exactly' in warned(tmp_path)
  poses[1:7] = poses[0]
  colmap.write_model(str(tmp_path / 'sparse/0'), captures.make_model(names, poses), '.bin')
  assert 'exactly' not in warned(tmp_path)


@pytest.mark.parametrize(
  ('orientation', 'size', 'is_named'),
  [(1, (16, 12), False), (2, (16, 12), True), (3, (16, 12), True), (6, (16, 12), False),
   (6, (12, 12), True)],
)  # fmt: skip
def test_orientations_that_are_ignored_are_named_if_in_doubt(tmp_path, orientation, size, is_named):
  captures.write_colmap(tmp_path, names=[f'{i}.jpg' for i in range(9)], size=size)
  exif = Image.Exif()
  exif[0x0112] = orientation
  captures.save_image(str(tmp_path / 'images/3.jpg'), captures.pixels(3, size), exif=exif)
  found = load(tmp_path)
  text = '1 picture with an EXIF orientation, which is ignored, as COLMAP does: '
  text += f"'images/3.jpg ({orientation})'"
  assert (text in '\n'.join(found.report['warnings'])) == is_named
  assert found.report['images_not_turned_by_exif'] == (orientation != 1)


def test_an_animated_picture_is_named(tmp_path):
  captures.write_colmap(tmp_path, names=[f'{i}.webp' for i in range(9)])
  first, second = (Image.fromarray(captures.pixels(k)) for k in (0, 1))
  first.save(tmp_path / 'images/3.webp', save_all=True, append_images=[second])
  text = warned(tmp_path)
  assert "1 animated picture, of which the first frame is used: 'images/3.webp'" in text


@pytest.mark.parametrize(('factor', 'is_named'), [(4, False), (8, True)])
def test_a_factor_that_leaves_few_pixels_is_warned_of(tmp_path, factor, is_named):
  camera = ('PINHOLE', (600.0, 600.0, 320.0, 240.0))
  captures.write_colmap(tmp_path, size=(640, 480), n=5, camera=camera)
  text = f'Config.factor = {factor} makes pictures of 80x60 pixels'
  assert (text in warned(tmp_path, read_only=True, factor=factor)) == is_named


def test_copies_are_warned_of_and_leak_into_the_test_images(tmp_path):
  captures.write_colmap(tmp_path)
  shutil.copy(tmp_path / 'images/000.png', tmp_path / 'images/003.png')
  text = warned(tmp_path)
  assert "1 of 2 test images are also trained on ('000.png')" in text
  assert '000.png = 003.png' in text


@pytest.mark.parametrize(('noise', 'is_refused'), [(1e-7, True), (1e-3, False)])
def test_cameras_in_one_place_but_for_noise(tmp_path, noise, is_refused):
  names, poses = captures.write_colmap(tmp_path)
  poses[:, :, 3] = [1, 2, 3] + noise * np.random.default_rng(0).standard_normal((9, 3))
  colmap.write_model(str(tmp_path / 'sparse/0'), captures.make_model(names, poses), '.bin')
  if is_refused:
    assert 'All 9 cameras stand at [1.0, 2.0, 3.0]' in refused(tmp_path)
  else:
    assert '9 cameras are within' in warned(tmp_path)


@pytest.mark.parametrize(
  ('camera', 'text'),
  [
    ((20.0, 40.0, 8.0, 6.0), 'pixels far from square'),
    ((20.0, 20.0, 0.5, 0.5), 'fractions'),
    ((20.0, 20.0, 0.3, -0.2), 'offset from the middle'),
    ((20.0, 20.0, 32.0, 24.0), 'pictures 4 times as large'),
    ((1.5, 1.5, 8.0, 6.0), 'in millimetres'),
  ],
)
def test_absurd_lenses_are_refused_unless_allowed(tmp_path, camera, text):
  captures.write_colmap(tmp_path, camera=('PINHOLE', camera))
  message = refused(tmp_path)
  assert text in message
  assert 'Config.allow_unlikely_cameras' in message
  assert text in warned(tmp_path, allow_unlikely_cameras=True)


@pytest.mark.parametrize(
  ('camera', 'text'),
  [
    ((20.0, 26.0, 8.0, 6.0), 'pixels far from square'),
    ((15.0, 20.0, 8.0, 6.0), 'scaled by the shape of the picture'),
    ((20.0, 20.0, 3.0, 6.0), 'outside the middle half'),
    ((160.0, 160.0, 8.0, 6.0), 'that of larger pictures'),
    ((3.0, 3.0, 8.0, 6.0), 'field of view of 139 degrees'),
    ((20.0, 21.0, 8.0, 6.0), ''),
    ((24.0, 20.0, 8.0, 6.0), ''),  # Anamorphic.
    ((20.0, 20.0, 6.4, 7.2), ''),  # Cropped.
  ],
)
def test_unlikely_lenses_are_warned_of(tmp_path, camera, text):
  captures.write_colmap(tmp_path, camera=('PINHOLE', camera))
  found = warned(tmp_path)
  assert (text in found) if text else (found == '')


REAL_LENSES = {
  'phone': (3100, (4032, 3024), 'OPENCV', (0.07, -0.15, 0.0002, 0.0)),
  'phone, one coefficient': (3100, (4032, 3024), 'SIMPLE_RADIAL', (0.02,)),
  'action camera': (1160, (2704, 2028), 'OPENCV', (-0.27, 0.09, 0.0001, 0.0002)),
  'action camera as a fisheye': (
    1770,
    (4000, 3000),
    'OPENCV_FISHEYE',
    (0.045, 0.006, -2e-3, -2e-4),
  ),
  'drone': (500, (1280, 720), 'RADIAL', (-0.28, 0.06)),
  'KITTI': (960, (1392, 512), 'OPENCV', (-0.3691, 0.1968, 0.0013, 0.0006)),
  'EuRoC': (458, (752, 480), 'OPENCV', (-0.2834, 0.07396, 0.00019, 1.8e-5)),
  'TUM VI': (191, (512, 512), 'OPENCV_FISHEYE', (0.0034, 0.0007, -0.002, 0.0002)),
  'ScanNet++': (610, (1752, 1168), 'OPENCV_FISHEYE', (0.0409, -0.0048, 0.0014, -0.0013)),
  'telephoto': (8000, (4000, 3000), 'SIMPLE_RADIAL', (3.0,)),
}


def lens_frame(f, size, model, distortion):
  focal = (f,) if model == 'SIMPLE_RADIAL' or model == 'RADIAL' else (f, f)
  camera = colmap.Camera(1, model, *size, (*focal, size[0] / 2, size[1] / 2, *distortion))
  return frames.Frame(
    'a.png', 'images', 'a.png', colmap.intrinsics(camera), size, np.eye(3, 4), model
  )


@pytest.mark.parametrize('lens', REAL_LENSES.values(), ids=REAL_LENSES.keys())
def test_the_distortion_of_real_lenses_is_taken(lens):
  with warnings.collect() as collected:
    consistency.check_lenses('s', [lens_frame(*lens)], 1e12, False)
  assert collected == []


@pytest.mark.parametrize(
  ('lens', 'text'),
  [
    ((51.2, (64, 48), 'SIMPLE_RADIAL', (-0.5,)), 'no ray meets 23.4% of its pixels'),
    ((51.2, (64, 48), 'SIMPLE_RADIAL', (-3.0,)), 'no ray meets 85.5% of its pixels'),
    ((51.2, (64, 48), 'SIMPLE_RADIAL', (500.0,)), 'from the axis 6.9-fold'),
    ((51.2, (64, 48), 'OPENCV', (0.0, 0.0, 0.9, 0.0)), 'no ray meets'),
    ((30.0, (64, 48), 'OPENCV_FISHEYE', (-1.0, 0.0, 0.0, 0.0)), 'no ray meets'),
  ],
)
def test_impossible_distortion_is_refused_unless_allowed(lens, text):
  frame = lens_frame(*lens)
  with pytest.raises(images.DataError, match=text):
    consistency.check_lenses('s', [frame], 1e12, False)
  with warnings.collect() as collected:
    consistency.check_lenses('s', [frame], 1e12, True)
  assert text in collected[0]


@pytest.mark.parametrize(
  ('lens', 'text'),
  [
    ((51.2, (64, 48), 'SIMPLE_RADIAL', (-0.3,)), 'no ray meets 1.6% of its pixels'),
    ((30.0, (64, 48), 'OPENCV_FISHEYE', (5.0, 5.0, 5.0, 5.0)), 'from the axis 2.6-fold'),
    # The black corners around the picture of a round fisheye.
    ((620, (1920, 1920), 'OPENCV_FISHEYE', (-0.03, -0.004, 0.001, -0.0008)), 'meets 30.1%'),
  ],
)
def test_doubtful_distortion_is_warned_of(lens, text):
  with warnings.collect() as collected:
    consistency.check_lenses('s', [lens_frame(*lens)], 1e12, False)
  (warning,) = collected
  assert text in warning


def test_each_distinct_camera_is_traced_once(monkeypatch):
  lenses = [lens_frame(*REAL_LENSES[name]) for name in ('drone', 'TUM VI') for _ in range(50)]
  called = []
  real = cameras.check_distortion
  monkeypatch.setattr(
    cameras,
    'check_distortion',
    lambda table, *a: (called.append(len(table.lens)), real(table, *a))[1],
  )
  consistency.check_lenses('s', lenses, 1e12, False)
  assert called == [2]


def test_the_larger_model_is_used(tmp_path):
  names, poses = captures.write_colmap(tmp_path)
  small = captures.make_model(names[:3], poses[:3])
  shutil.move(tmp_path / 'sparse/0', tmp_path / 'sparse/1')
  colmap.write_model(str(tmp_path / 'sparse/0'), small, '.bin')
  text = warned(tmp_path)
  assert 'sparse/1 (9 pictures) is used, not sparse/0 (3 pictures)' in text
  pathlib.Path(tmp_path / 'sparse/1/images.bin').write_bytes(b'damaged')
  assert 'sparse/0 (3 pictures) is used, not sparse/1 (damaged)' in warned(tmp_path)
