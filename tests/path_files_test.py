"""Camera paths from files: each format, and errors for damaged files."""

import json

import captures
import numpy as np
import paths_test
import pytest

from internal import colmap, paths, structs
from internal.datasets import scenes
from internal.rendering import path_files
from internal.system import warnings


def write(tmp_path, drop=(), frame=None, **more):
  """A camera path of three frames as nerfstudio's viewer saves it; returns file and poses."""
  poses = captures.circle_poses(3)
  frames = [
    {'camera_to_world': paths.pad_poses(p).ravel().tolist(), 'fov': 50.0 + i, 'aspect': 1.5}
    for i, p in enumerate(poses)
  ]
  frames[1] |= frame or {}
  table = {
    'camera_type': 'perspective', 'render_width': 30, 'render_height': 20, 'fps': 24,
    'seconds': 3, 'camera_path': frames, 'keyframes': [], **more,
  }  # fmt: skip
  path = tmp_path / 'camera_path.json'
  path.write_text(json.dumps({k: v for k, v in table.items() if k not in drop}))
  return str(path), poses


def test_a_camera_path(tmp_path):
  path, poses = write(tmp_path)
  found = path_files.read(path)
  np.testing.assert_allclose(found.poses, poses)
  np.testing.assert_allclose(np.degrees(found.fov), [50, 51, 52])
  assert (found.size, found.lens, found.fps) == ((30, 20), structs.PERSPECTIVE, 24)


@pytest.mark.parametrize(
  ('kind', 'lens'), [('fisheye', structs.FISHEYE), ('equirectangular', structs.PANORAMA)]
)
def test_other_lenses(kind, lens, tmp_path):
  found = path_files.read(write(tmp_path, camera_type=kind, drop=['fps'])[0])
  assert found.lens == lens
  assert (found.fov is None) == (lens == structs.PANORAMA)
  assert found.fps is None


def test_nerfstudios_own_world_is_left_again(tmp_path):
  path, poses = write(tmp_path)
  similarity = paths_test.similarity(1)
  scale = np.cbrt(np.linalg.det(similarity[:3, :3]))
  rigid = similarity[:3] / scale  # nerfstudio moves first and scales then.
  (tmp_path / 'dataparser_transforms.json').write_text(
    json.dumps({'transform': rigid.tolist(), 'scale': scale})
  )
  found = path_files.read(path).poses
  np.testing.assert_allclose(paths_test.apply(similarity, found), poses, atol=1e-9)
  paths_test.assert_are_poses(found)


# nerfstudio's importer rotated the original world by A, (x, y, z) -> (x, z, -y). Training rotated
# the result by 90 degrees about z, moved it by (1, 2, 3) and halved it. By hand, for a camera at
# (4, 5, 6) of the transforms.json: rotated (-5, 4, 6), moved (-4, 6, 9), halved (-2, 3, 4.5).
APPLIED = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
TRAINED = [[0, -1, 0, -2], [1, 0, 0, 3], [0, 0, 1, 4.5], [0, 0, 0, 1]]
SAVED = [[0, 0, -1, 1], [1, 0, 0, 2], [0, -1, 0, 3]]  # The rotation times A, and the move.


@pytest.mark.parametrize('applied_scale', [1.0, 4.0])
def test_what_nerfstudios_importer_applied_is_applied_again(tmp_path, applied_scale):
  path, _ = write(tmp_path, frame={'camera_to_world': TRAINED})
  (tmp_path / 'dataparser_transforms.json').write_text(
    json.dumps({'transform': SAVED, 'scale': 0.5 * applied_scale})
  )
  found = path_files.read(path, scenes.Applied(APPLIED, applied_scale)).poses[1]
  np.testing.assert_allclose(found, np.c_[np.eye(3), [4, 5, 6]], atol=1e-12)


def test_nerfstudios_world_is_assumed_only_with_its_transform(tmp_path):
  path, poses = write(tmp_path)
  with warnings.collect() as found:
    np.testing.assert_array_equal(path_files.read(path).poses, poses)
  (warning,) = found
  assert warning.startswith(f'{path}: dataparser_transforms.json is not beside it')
  (tmp_path / 'dataparser_transforms.json').write_text(
    json.dumps({'transform': SAVED, 'scale': 0.5})
  )
  write(tmp_path, world='capture')  # As our viewer saves it.
  with warnings.collect() as found:
    np.testing.assert_array_equal(path_files.read(path).poses, poses)
  assert found == []


def test_without_a_transforms_json_the_original_world_is_the_captures(tmp_path):
  path, _ = write(tmp_path, frame={'camera_to_world': TRAINED})
  (tmp_path / 'dataparser_transforms.json').write_text(
    json.dumps({'transform': SAVED, 'scale': 0.5})
  )
  found = path_files.read(path).poses[1]
  np.testing.assert_allclose(found[:, 3], [4, -6, 5], atol=1e-12)  # A sends it to (4, 5, 6).


def test_a_colmap_model_is_in_the_original_world(tmp_path):
  pose = np.c_[np.eye(3), [4.0, -6, 5]]
  colmap.write_model(str(tmp_path), captures.make_model(['a.png'], [pose]))
  found = path_files.read(str(tmp_path), scenes.Applied(APPLIED, 2.0)).poses[0]
  np.testing.assert_allclose(found, np.c_[APPLIED[:3, :3], [8, 10, 12]], atol=1e-9)


def test_a_colmap_model_gives_its_images_poses_by_name(tmp_path):
  poses = captures.circle_poses(4)
  model = captures.make_model(['d.png', 'a.png', 'c.png', 'b.png'], poses)
  colmap.write_model(str(tmp_path), model)
  np.testing.assert_allclose(path_files.read(str(tmp_path)).poses, poses[[1, 3, 2, 0]], atol=1e-9)


@pytest.mark.parametrize(
  ('how', 'message'),
  [
    ({'drop': ['camera_path']}, "no list 'camera_path'"),
    ({'camera_path': []}, "no list 'camera_path'"),
    ({'camera_type': 'vr180_l'}, r"camera_type 'vr180_l' cannot be rendered.*equirectangular"),
    ({'camera_type': ['fisheye']}, 'cannot be rendered'),
    ({'drop': ['render_width']}, 'render_width must be a finite number'),
    ({'render_height': 0}, 'must be whole numbers from 1 to 100000'),
    ({'fps': -1}, 'fps must be above 0 and at most 1000, got -1'),
    ({'frame': {'camera_to_world': [1, 2, 3]}}, r'camera_to_world of frame 1 must be 16 finite'),
    ({'frame': {'camera_to_world': (2 * np.eye(4)).tolist()}}, 'pose 1 is not a rigid transform'),
    ({'frame': {'fov': 180}}, 'fov of frame 1 must be between 0 and 180 degrees, got 180'),
    ({'frame': {'fov': 'wide'}}, "fov of frame 1 must be a finite number, got 'wide'"),
  ],
)
def test_bad_camera_paths_are_named(how, message, tmp_path):
  with pytest.raises(path_files.PathFileError, match=rf'camera_path\.json.*{message}'):
    path_files.read(write(tmp_path, **how)[0])


@pytest.mark.parametrize('text', ['{"half', '[1, 2]', '[' * 100_000, 'NaN'])
def test_invalid_json_is_an_error(text, tmp_path):
  (tmp_path / 'p.json').write_text(text)
  with pytest.raises(path_files.PathFileError, match=r'p\.json: (is not valid|must be a) JSON'):
    path_files.read(str(tmp_path / 'p.json'))


def test_a_bad_account_of_nerfstudios_world(tmp_path):
  path, _ = write(tmp_path)
  account = {'transform': np.eye(4)[:3].tolist(), 'scale': 0}
  (tmp_path / 'dataparser_transforms.json').write_text(json.dumps(account))
  with pytest.raises(path_files.PathFileError, match=r'dataparser_transforms\.json.*positive'):
    path_files.read(path)


def test_a_folder_without_a_model(tmp_path):
  with pytest.raises(path_files.PathFileError, match='No sparse model'):
    path_files.read(str(tmp_path))


def test_mirrored_poses_of_an_array(tmp_path):
  np.save(tmp_path / 'p.npy', np.diag([1.0, -1, 1, 1])[None])
  with pytest.raises(path_files.PathFileError, match=r'p\.npy: pose 0 .*camera-to-world'):
    path_files.read(str(tmp_path / 'p.npy'))
