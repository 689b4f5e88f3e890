"""Camera paths through keyframes."""

import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from internal import paths
from internal.rendering import keyframes, path_files


def keys(n=4, seed=0):
  rng = np.random.default_rng(seed)
  turns = Rotation.from_rotvec(0.4 * np.arange(n)[:, None] * [0, 0, 1]).as_matrix()
  gaps = np.array([1, 0.1, 1, 0.3])[:n, None]  # Far from equal.
  places = np.cumsum(gaps * rng.uniform(0.7, 1, (n, 3)), 0)
  poses = np.concatenate([turns, places[..., None]], -1)
  return [keyframes.Keyframe(pose, 0.5 + 0.2 * i) for i, pose in enumerate(poses)]


def similarity(seed=1, scale=0.37):
  transform = np.eye(4)
  transform[:3, :3] = scale * Rotation.random(rng=np.random.default_rng(seed)).as_matrix()
  transform[:3, 3] = [3, -2, 1]
  return transform


def test_path_begins_ends_and_passes_at_the_keyframes():
  wanted = keys()
  poses, fovs = keyframes.between(wanted, 100)
  assert len(poses) == len(fovs) == 300
  for k, at in ((0, 0), (3, -1)):
    np.testing.assert_allclose(poses[at], wanted[k].pose, atol=1e-6)
    assert fovs[at] == pytest.approx(wanted[k].fov)
  for key in wanted:
    nearest = np.argmin(np.linalg.norm(poses[:, :, 3] - key.pose[:, 3], axis=-1))
    np.testing.assert_allclose(poses[nearest], key.pose, atol=0.02)
    assert fovs[nearest] == pytest.approx(key.fov, abs=0.01)
  assert (np.diff(fovs) >= 0).all()


@pytest.mark.parametrize('n', [0, 1])
def test_path_needs_two(n):
  with pytest.raises(ValueError, match=f'at least two keyframes, got {n}'):
    keyframes.between(keys()[:n], 10)


def test_equal_neighbours_are_named():
  with pytest.raises(ValueError, match='Keyframes 1 and 2'):
    keyframes.between([*keys(2), keys(2)[1]], 10)


def test_capture_frame_is_where_the_pose_came_from():
  """A pose of the capture, normalised as poses are, comes back."""
  original = np.stack([key.pose for key in keys()])
  transform = similarity()
  scale = np.cbrt(np.linalg.det(transform[:3, :3]))
  moved = transform[:3] @ paths.pad_poses(original)
  moved[:, :, :3] /= scale
  np.testing.assert_allclose(keyframes.to_capture(moved, transform), original, atol=1e-12)


def test_document_is_nerfstudios(tmp_path):
  """16 numbers row by row, the last row 0 0 0 1, vertical fov in degrees, aspect width / height."""
  wanted, transform = keys(), similarity()
  path = str(tmp_path / 'deep' / 'a.json')
  keyframes.save(path, keyframes.document(wanted, transform, (640, 480), 24, 0.5))
  with open(path) as f:
    found = json.load(f)
  assert (found['camera_type'], found['fps']) == ('perspective', 24)
  assert (found['render_width'], found['render_height']) == (640, 480)
  assert len(found['camera_path']) == 36
  assert found['seconds'] == 1.5
  for frame, key in zip(
    (found['camera_path'][0], found['camera_path'][-1]), (wanted[0], wanted[-1])
  ):
    matrix = np.reshape(frame['camera_to_world'], (4, 4))
    np.testing.assert_array_equal(matrix[3], [0, 0, 0, 1])
    np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-9)
    place = transform @ matrix[:, 3]
    np.testing.assert_allclose(place[:3], key.pose[:, 3], atol=1e-6)
    ahead = transform[:3, :3] @ -matrix[:3, 2]
    np.testing.assert_allclose(ahead / np.linalg.norm(ahead), -key.pose[:, 2], atol=1e-6)
    assert frame['fov'] == pytest.approx(np.degrees(key.fov))
    assert frame['aspect'] == pytest.approx(4 / 3)
  for entry, key in zip(found['keyframes'], wanted, strict=True):
    pose = np.reshape(entry['matrix'], (4, 4))[None, :3]
    np.testing.assert_allclose(pose, keyframes.to_capture(key.pose[None], transform), atol=1e-12)


@pytest.mark.parametrize(
  ('name', 'file'),
  [('a', 'a.json'), ('a.json', 'a.json'), ('../../x', 'x.json'), ('<b>/ü', 'b.json'),
   ('', 'unnamed.json'), ('..', 'unnamed.json'), ('a b', 'a_b.json')],
)  # fmt: skip
def test_free_name_stays_in_the_folder(tmp_path, name, file):
  assert keyframes.free_name(str(tmp_path), name, '.json') == str(tmp_path / file)


def test_free_name_takes_no_files_place(tmp_path):
  for wanted in ('a.json', 'a_2.json', 'a_3.json'):
    path = keyframes.free_name(str(tmp_path), 'a', '.json')
    assert path == str(tmp_path / wanted)
    (tmp_path / wanted).touch()


def test_render_reads_what_is_saved(tmp_path):
  wanted, path = keys(), str(tmp_path / 'a.json')
  keyframes.save(path, keyframes.document(wanted, similarity(), (640, 480), 24, 0.5))
  found = path_files.read(path)
  poses = paths.transform_poses(similarity(), found.poses)
  np.testing.assert_allclose(poses[[0, -1]], [wanted[0].pose, wanted[-1].pose], atol=1e-6)
  np.testing.assert_allclose(found.fov[[0, -1]], [wanted[0].fov, wanted[-1].fov])
  assert (found.size, found.fps) == ((640, 480), 24)
