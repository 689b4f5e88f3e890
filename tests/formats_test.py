"""Free View Synthesis, DTU, multi-scale Blender and LLFF without COLMAP, on small captures."""

import json
import os
import pathlib

import captures
import numpy as np
import pytest
from datasets_test import intrinsic_matrix, load, normalised, refused

from internal.datasets import dtu, scenes

K = np.array([[20.0, 0, 8], [0, 21, 6], [0, 0, 1]])


def world_to_camera(poses):
  """R [n, 3, 3] and t [n, 3] with OpenCV axes, of OpenGL poses camera to world."""
  r = np.swapaxes(poses[:, :, :3] * [1, -1, -1], 1, 2)
  return r, -np.einsum('nij,nj->ni', r, poses[:, :, 3])


# Free View Synthesis.


def write_fvs(root, n=5):
  poses = captures.circle_poses(n)
  r, t = world_to_camera(poses)
  for scale, size in (('0.25', (8, 6)), ('0.50', captures.SIZE)):
    folder = os.path.join(root, 'dense', f'ibr3d_pw_{scale}')
    for i in range(n):
      captures.save_image(os.path.join(folder, f'im_{i:08}.png'), captures.pixels(i, size))
    k = np.diag([size[0] / 16, size[0] / 16, 1]) @ K
    for name, value in (('Ks', np.tile(k, (n, 1, 1))), ('Rs', r), ('ts', t)):
      np.save(os.path.join(folder, f'{name}.npy'), value.astype(np.float32))
  return poses


def test_tat_fvs(tmp_path):
  poses = write_fvs(tmp_path)
  found = load(tmp_path, dataset_loader='tat_fvs', llffhold=4)
  assert (found.train, found.test) == ((1, 2, 3), (0, 4))
  assert found.files[4] == 'dense/ibr3d_pw_0.50/im_00000004.png'  # The largest.
  np.testing.assert_allclose(found.cameras.camtoworld, normalised(found, poses), atol=1e-6)
  np.testing.assert_allclose(intrinsic_matrix(found, 3), K, atol=1e-4)
  np.testing.assert_array_equal(scenes.read_image(tmp_path, found, 4), captures.pixels(4))
  for _ in range(2):  # What the first call makes is no size of the capture's own.
    small = load(tmp_path, dataset_loader='tat_fvs', factor=2)
    assert small.files[4] == 'dense/ibr3d_pw_0.50_2/im_00000004.png'
  np.testing.assert_allclose(intrinsic_matrix(small, 3)[0], [10, 0, 4], atol=1e-4)


def test_tat_fvs_errors(tmp_path):
  assert 'ibr3d_pw_' in refused(tmp_path, dataset_loader='tat_fvs')
  write_fvs(tmp_path)
  folder = tmp_path / 'dense/ibr3d_pw_0.50'
  np.save(folder / 'ts.npy', np.zeros((4, 3)))
  assert 'ts.npy: must be finite numbers [5, 3]' in refused(tmp_path, dataset_loader='tat_fvs')
  (folder / 'Rs.npy').write_bytes(b'half')
  assert 'Rs.npy: no whole .npy' in refused(tmp_path, dataset_loader='tat_fvs')
  (folder / 'Ks.npy').unlink()
  assert 'Ks.npy' in refused(tmp_path, dataset_loader='tat_fvs')


# DTU.


def write_dtu(root, n=5, folder=''):
  """Rectified/scan1 and Calibration/cal18 below root; returns the scan and the poses."""
  scan = pathlib.Path(root, 'Rectified', 'scan1')
  poses = captures.circle_poses(n)
  calibration = pathlib.Path(root, 'Calibration', 'cal18')
  calibration.mkdir(parents=True)
  r, t = world_to_camera(poses)
  for i in range(n):
    for light, seed in (('3_r5000', i), ('max', 50 + i)):
      name = f'rect_{i + 1:03}_{light}.png'
      captures.save_image(str(scan / folder / name), captures.pixels(seed))
    projection = -1.7 * K @ np.concatenate([r[i], t[i][:, None]], 1)  # Known up to a factor.
    np.savetxt(calibration / f'pos_{i + 1:03}.txt', projection, '%.17g')
  return scan, poses


@pytest.mark.parametrize('folder', ['', 'images'])
def test_dtu(tmp_path, folder):
  scan, poses = write_dtu(tmp_path, folder=folder)
  found = load(scan, dataset_loader='dtu', llffhold=5)
  assert (found.train, found.test) == ((1, 2, 3, 4), (0,))
  assert found.files[1] == os.path.join(folder, 'rect_002_3_r5000.png')
  np.testing.assert_allclose(found.cameras.camtoworld, normalised(found, poses), atol=1e-6)
  np.testing.assert_allclose(intrinsic_matrix(found, 2), K, atol=1e-4)
  np.testing.assert_array_equal(scenes.read_image(scan, found, 4), captures.pixels(4))
  all_lights = load(scan, dataset_loader='dtu', dtu_light_cond=7)
  np.testing.assert_array_equal(scenes.read_image(scan, all_lights, 0), captures.pixels(50))
  if folder:
    small = load(scan, dataset_loader='dtu', factor=2)
    assert small.files[1] == 'images_2/rect_002_3_r5000.png'
  else:
    assert 'images/' in refused(scan, dataset_loader='dtu', factor=2)


def test_dtu_errors(tmp_path):
  scan, _ = write_dtu(tmp_path)
  assert 'dtu_light_cond' in refused(scan, dataset_loader='dtu', dtu_light_cond=5)
  path = tmp_path / 'Calibration/cal18/pos_002.txt'
  for text in ('1 2 3', '0 ' * 12, 'nan ' * 12, '1 0 0 0 ' * 3):
    path.write_text(text)
    assert 'pos_002.txt: must be a 3x4 projection matrix' in refused(scan, dataset_loader='dtu')
  np.savetxt(path, np.eye(3, 4) + np.eye(3, 4, 1))
  assert 'pos_002.txt: has skewed pixels' in refused(scan, dataset_loader='dtu')
  path.unlink()
  assert 'pos_002.txt' in refused(scan, dataset_loader='dtu')
  os.rename(tmp_path / 'Calibration', tmp_path / 'elsewhere')
  assert 'cal18' in refused(scan, dataset_loader='dtu')


def test_decompose_projection():
  """Of random cameras, in front of which a known point is, with either sign of the matrix."""
  rng = np.random.default_rng(0)
  for sign in (1, -1) * 5:
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    rotation *= np.linalg.det(rotation)
    centre = rng.normal(size=3)
    k = np.triu(rng.uniform(0.5, 2, (3, 3)))
    k /= k[2, 2]
    projection = sign * 3 * k @ rotation @ np.column_stack([np.eye(3), -centre])
    for got, wanted in zip(dtu.decompose(projection), (k, rotation, centre)):
      np.testing.assert_allclose(got, wanted, atol=1e-9)


# Multi-scale Blender.


def write_multicam(root, scales=3):
  """Pictures of 16x12, 8x6, ... of each pose; returns the table and a row's pose and seed."""
  poses, tables, rows = captures.circle_poses(4), {}, []
  for part, views in (('train', (0, 1, 2)), ('test', (3,))):
    table = {key: [] for key in ('file_path', 'cam2world', 'width', 'height', 'focal', 'lossmult',
                                 'label', 'near', 'far', 'pix2cam')}  # fmt: skip
    for view in views:
      for d in range(scales):
        size, seed = (16 >> d, 12 >> d), 10 * view + d
        name = f'{part}/r_{view}_d{d}.png'
        captures.save_image(os.path.join(root, name), captures.pixels(seed, size, channels=4))
        pose = np.vstack([poses[view], [0, 0, 0, 1]]).tolist()
        values = (name, pose, *size, 20.0 / 2**d, 4.0**d, d, 2.0, 6.0, np.eye(3).tolist())
        for key, value in zip(table, values):
          table[key].append(value)
        rows.append((poses[view], seed, size))
    tables[part] = table
  pathlib.Path(root, 'metadata.json').write_text(json.dumps(tables))
  return tables, rows


def test_multicam(tmp_path):
  _, rows = write_multicam(tmp_path)
  found = load(tmp_path, dataset_loader='multicam')
  assert (len(found.train), len(found.test)) == (9, 3)
  assert found.background == 'white'
  assert found.weights == (1.0, 4.0, 16.0) * 4
  for i, (pose, seed, size) in enumerate(rows):
    np.testing.assert_allclose(found.cameras.camtoworld[i], pose, atol=1e-6)
    assert tuple(found.cameras.size[i]) == size
    focal = 20 * size[0] / 16
    wanted = [[focal, 0, size[0] / 2], [0, focal, size[1] / 2], [0, 0, 1]]
    np.testing.assert_allclose(intrinsic_matrix(found, i), wanted, atol=1e-4)
    rgba = captures.pixels(seed, size, channels=4) / 255
    wanted = 255 * (rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:])
    assert np.abs(scenes.read_image(tmp_path, found, i) - wanted).max() <= 0.5 + 1e-6
  scenes.save_scene(str(tmp_path / 'scene.json'), found)
  assert scenes.load_scene(str(tmp_path / 'scene.json')).weights == found.weights


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('lossmult', [1.0], 'all of one length'),
    ('focal', None, 'all of one length'),
    ('lossmult', [0] * 9, 'lossmult must be positive'),
    ('width', ['wide'] * 9, 'train: frame 1 (train/r_0_d0.png): w must be a number'),
    ('file_path', ['../a.png'] * 9, 'not a path inside'),
    ('cam2world', [3] * 9, 'transform_matrix'),
  ],
)
def test_multicam_errors(tmp_path, key, value, message):
  tables, _ = write_multicam(tmp_path)
  tables['train'][key] = value
  (tmp_path / 'metadata.json').write_text(json.dumps(tables))
  answer = refused(tmp_path, dataset_loader='multicam')
  assert message in answer
  assert 'metadata.json' in answer


@pytest.mark.parametrize('content', ['{', '[]', '{}', '{"train": 3}', '[' * 100_000])
def test_bad_metadata(tmp_path, content):
  assert "'blender'" in refused(tmp_path, dataset_loader='multicam')
  (tmp_path / 'metadata.json').write_text(content)
  assert 'metadata.json' in refused(tmp_path, dataset_loader='multicam')


# LLFF without a COLMAP model.


def write_llff(root, n=9):
  """Cameras that look along -z from a grid, which is what forward-facing means."""
  poses = np.zeros((n, 3, 4))
  poses[:, :, :3] = np.eye(3)
  poses[:, 0, 3], poses[:, 1, 3] = np.arange(n) % 3 - 1, np.arange(n) // 3 - 1
  table = np.zeros((n, 17))
  for i, pose in enumerate(poses):
    captures.save_image(os.path.join(root, 'images', f'{i:03}.png'), captures.pixels(i))
    right, up, back, position = pose.T
    matrix = np.stack([-up, right, back, position, [12, 16, 20.0]], -1)
    table[i] = [*matrix.ravel(), 4 + i / 10, 30.0]
  np.save(os.path.join(root, 'poses_bounds.npy'), table)
  return poses, table


def test_llff_without_a_model(tmp_path):
  poses, table = write_llff(tmp_path)
  found = load(tmp_path, forward_facing=True)
  assert found.test == (0, 8)
  np.testing.assert_allclose(found.cameras.camtoworld, normalised(found, poses), atol=1e-6)
  np.testing.assert_allclose(
    intrinsic_matrix(found, 0), [[20, 0, 8], [0, 20, 6], [0, 0, 1]], atol=1e-4
  )
  np.testing.assert_allclose(found.bounds, [1 / 0.75, 30 / 4 / 0.75])
  assert found.cameras.pixtocam_ndc is not None
  np.testing.assert_array_equal(scenes.read_image(tmp_path, found, 4), captures.pixels(4))
  captures.save_image(str(tmp_path / 'images/004_mask.png'), np.full((12, 16), 255, np.uint8))
  assert load(tmp_path, forward_facing=True).masks[4] == 'images/004_mask.png'
  np.save(tmp_path / 'poses_bounds.npy', table[:-1])
  assert '8 poses for 9 pictures' in refused(tmp_path, forward_facing=True)
  table[3, 4] = 12.5
  np.save(tmp_path / 'poses_bounds.npy', table)
  assert "'003.png' has the impossible size 16x12.5" in refused(tmp_path, forward_facing=True)
