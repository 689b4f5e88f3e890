"""Tests of models against matches, on captures that exist only as points and their projections."""

import dataclasses
import types

import numpy as np
import pose_scenes
import pytest

from internal.sfm import evidence, reconstruction

N, SIZE, FOCAL = 40, (400, 300), 300.0


def world_to_camera(pose):
  """Turns a camera-to-world pose [3, 4] with OpenGL axes into world-to-camera, OpenCV axes."""
  rotation = (pose[:, :3] * [1, -1, -1]).T
  return np.c_[rotation, -rotation @ pose[:, 3]]


def ring():
  angles = 2 * np.pi * np.arange(N) / N
  eyes = np.stack([3 * np.cos(angles), 3 * np.sin(angles), 1 + 0 * angles], -1)
  return [world_to_camera(pose_scenes.look_at(eye, np.zeros(3))) for eye in eyes]


def camera():
  params = [FOCAL, SIZE[0] / 2, SIZE[1] / 2]
  return reconstruction.colmap().Camera(
    model='SIMPLE_PINHOLE', width=SIZE[0], height=SIZE[1], params=params
  )


def project(poses, points):
  """Returns pixels [n, p, 2] and which points [n, p] are inside the pictures."""
  local = np.einsum('nij,pj->npi', [p[:, :3] for p in poses], points)
  local = local + np.stack([p[:, 3] for p in poses])[:, None]
  pixels = FOCAL * local[..., :2] / local[..., 2:] + np.array(SIZE) / 2
  return pixels, (local[..., 2] > 0.1) & ((pixels > 0) & (pixels < SIZE)).all(-1)


@dataclasses.dataclass
class Capture:
  folder: str
  names: list
  poses: list

  def test(self, poses, points=None):
    return evidence.Matches(self.folder, self.names).test(FakeModel(self.names, poses, points))


class FakeModel:
  """The part of a pycolmap Reconstruction that is tested.

  Args:
    names, poses: of the photographs.
    points: the 3D points of each photograph's features, [f, 3]; None if it has none.
  """

  def __init__(self, names, poses, points=None):
    self._names, self._poses = names, poses
    self._points = points or [np.zeros((0, 3))] * len(names)
    self.points3D = {
      k * 100_000 + i: types.SimpleNamespace(xyz=xyz)
      for k, rows in enumerate(self._points)
      for i, xyz in enumerate(rows)
    }

  def reg_image_ids(self):
    return range(len(self._names))

  def point3D_ids(self):
    return set(self.points3D)

  def image(self, k):
    pose = reconstruction.colmap().Rigid3d(self._poses[k])
    count = len(self._points[k])
    return types.SimpleNamespace(
      name=self._names[k],
      camera=camera(),
      cam_from_world=lambda: pose,
      num_points2D=lambda: count,
      get_observation_point2D_idxs=lambda: list(range(count)),
      get_observation_points2D=lambda: [
        types.SimpleNamespace(point3D_id=k * 100_000 + i) for i in range(count)
      ],
    )


def write(folder, poses, points, pairs, alike=()):
  """Writes a database: all features, true matches of `pairs` and false ones of `alike`.

  Args:
    pairs: pairs (i, j) of photographs.
    alike: triples (i, j, pixels): the photographs have features there, which match. One array
      [m, 2] for both, or [2, m, 2].
  """
  pycolmap = reconstruction.colmap()
  pixels, inside = project(poses, points)
  names = [f'{k:02d}.jpg' for k in range(len(poses))]
  number = [np.cumsum(row) - 1 for row in inside]  # Of each point among a photograph's features.
  with reconstruction.database(folder) as db:
    camera_id = db.write_camera(camera())
    ids = [db.write_image(pycolmap.Image(name=name, camera_id=camera_id)) for name in names]
    features = [pixels[k][inside[k]] for k in range(len(ids))]
    extra = []
    for i, j, added in alike:
      added = np.broadcast_to(added, (2, *np.shape(added)[-2:]))
      numbers = [len(features[k]) + np.arange(added.shape[1]) for k in (i, j)]
      extra.append((i, j, np.stack(numbers, 1)))
      features[i], features[j] = np.r_[features[i], added[0]], np.r_[features[j], added[1]]
    for image_id, rows in zip(ids, features):
      db.write_keypoints(image_id, rows.astype(np.float32))
    found = [(i, j, np.flatnonzero(inside[i] & inside[j])) for i, j in pairs]
    matches = [(i, j, np.stack([number[i][both], number[j][both]], 1)) for i, j, both in found]
    for i, j, rows in matches + extra:
      if len(rows):
        geometry = pycolmap.TwoViewGeometry(config=2, inlier_matches=rows.astype(np.uint32))
        db.write_two_view_geometry(ids[i], ids[j], geometry)
  return Capture(str(folder), names, poses)


def near(n, reach=6):
  """Pairs each photograph of a ring with the next ones."""
  return [(i, (i + d) % n) for i in range(n) for d in range(1, reach)]


@pytest.fixture(scope='module')
def points():
  rng = np.random.default_rng(0)
  return np.r_[rng.uniform(-1, 1, (400, 3)), rng.uniform(-6, 6, (1500, 3)) * [1, 1, 0.3]]


@pytest.fixture(scope='module')
def capture(tmp_path_factory, points):
  return write(tmp_path_factory.mktemp('ring'), ring(), points, near(N))


def turn_and_shift(degrees, shift=0.0):
  """Returns a movement [3, 4] of the world: round the z axis and along x."""
  c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
  return np.array([[c, -s, 0, shift], [s, c, 0, 0], [0, 0, 1, 0]])


def carried(pose, move):
  """Returns the pose of a camera that is carried along with the world."""
  rotation = pose[:, :3] @ move[:, :3].T
  return np.c_[rotation, pose[:, 3] - rotation @ move[:, 3]]


def test_true_poses_contradict_nothing(capture):
  found = capture.test(capture.poses)
  assert found.tested == N * 5
  assert found.is_clean
  assert found.verdict == evidence.GOOD
  assert found.share == 0


def test_the_frame_of_the_model_does_not_matter(capture):
  assert capture.test([carried(pose, turn_and_shift(70, 2.0)) for pose in capture.poses]).is_clean


def test_a_torn_ring_contradicts_pairs_across_the_tear(capture, points):
  """Epipolar lines alone do not see it: the cameras move in a plane."""
  moves = [turn_and_shift(-6 * k / N) for k in range(N)]  # The ring does not close.
  torn = [carried(pose, move) for pose, move in zip(capture.poses, moves)]
  _, inside = project(capture.poses, points)
  own = [points[seen] @ move[:, :3].T for seen, move in zip(inside, moves)]
  found = capture.test(torn, own)
  numbers = [{int(a[:2]), int(b[:2])} for a, b in found.contradicted]
  assert len(numbers) >= 10
  assert all(max(pair) - min(pair) > N - 6 for pair in numbers)  # From the last to the first.
  assert capture.test(torn).is_clean


def test_a_doubled_part_is_found_among_neighbours(capture):
  move = turn_and_shift(0, 1.5)
  doubled = [carried(p, move) if 10 <= k < 25 else p for k, p in enumerate(capture.poses)]
  found = capture.test(doubled)
  assert found.beside >= found.in_order > 0
  numbers = {int(name[:2]) for pair in found.contradicted for name in pair}
  assert numbers <= {*range(5, 15), *range(20, 30)}


def test_photographs_without_a_pose_are_left_out(capture):
  matches = evidence.Matches(capture.folder, capture.names)
  found = matches.test(FakeModel(capture.names[:20], capture.poses[:20]))
  assert found.tested == sum(j < 20 and i < 20 for i, j in near(N))
  assert found.is_clean


def test_look_alikes_that_cover_a_part_of_the_picture_do_not_count(tmp_path, points):
  """The photographs 0 and 20 show opposite sides whose middles match better than any neighbour."""
  middle = np.random.default_rng(0).uniform(-60, 60, (1500, 2)) + np.array(SIZE) / 2
  poses = ring()
  capture = write(tmp_path, poses, points, near(N, 2), [(0, 20, middle)])
  found = capture.test(poses)
  assert found.is_clean
  assert found.share > 0


def test_neighbours_raise_a_doubt_whatever_their_matches_cover(tmp_path, points):
  """As where the way round the end of a thin wall joins two faces that look alike."""
  middle = np.random.default_rng(0).uniform(-60, 60, (1500, 2)) + np.array(SIZE) / 2
  poses, alike = ring(), np.stack([middle, middle + np.array([0, 40])])
  found = write(tmp_path, poses, points, near(N, 2), [(0, 2, alike)]).test(poses)
  assert found.contradicted == (('00.jpg', '02.jpg'),)
  assert (found.beside, found.in_order) == (1, 0)
  assert found.verdict == evidence.DOUBTFUL


def test_a_pure_rotation_contradicts_nothing(tmp_path, points):
  eye = np.array([0.2, 0.1, 0.0])
  angles = 2 * np.pi * np.arange(N) / N
  poses = [
    world_to_camera(pose_scenes.look_at(eye, eye + np.array([np.cos(a), np.sin(a), 0])))
    for a in angles
  ]
  capture = write(tmp_path, poses, points, near(N, 3))
  found = capture.test(poses)
  assert found.tested > N
  assert found.is_clean


def two_arcs(folder, points, order=range(N)):
  """Half a ring, then the other half; the order jumps, and opposite photographs look alike."""
  halves = [(i, j) for i, j in near(N) if i < j and (i < N // 2) == (j < N // 2)]
  names = {k: place for place, k in enumerate(order)}
  pairs = [(names[i], names[j]) for i, j in halves]
  everywhere = np.random.default_rng(0).uniform((0, 0), SIZE, (800, 2))
  alike = [(names[k], names[k + N // 2], everywhere) for k in range(0, N // 2, 3)]
  poses = ring()
  return write(folder, [poses[k] for k in order], points, pairs, alike)


def test_a_jump_between_places_that_look_alike_is_doubtful(tmp_path, points):
  capture = two_arcs(tmp_path, points)
  folded = capture.poses[: N // 2] * 2  # The second half of the ring stands in the first.
  found = capture.test(folded)
  assert found.jumps == (('19.jpg', '20.jpg'),)
  assert found.verdict == evidence.DOUBTFUL
  assert found.as_json()['jumps'] == [['19.jpg', '20.jpg']]


def test_photographs_in_no_order_have_no_jumps(tmp_path, points):
  shuffled = np.random.default_rng(0).permutation(N).tolist()
  assert not two_arcs(tmp_path, points, shuffled).test(ring()).jumps


@pytest.mark.parametrize('lost', [{12, 13}, {0, 1}, {N - 2, N - 1}])
def test_two_photographs_without_matches_are_no_jump(tmp_path, points, lost):
  pairs = [pair for pair in near(N) if not lost & set(pair)]
  found = write(tmp_path, ring(), points, pairs).test(ring())
  assert not found.jumps
  assert found.verdict == evidence.GOOD


def test_poses_that_no_match_can_test_are_doubtful(tmp_path, points):
  found = write(tmp_path, ring(), points[:15], near(N)).test(ring())
  assert found.tested == 0
  assert found.verdict == evidence.DOUBTFUL


def test_epipolar_errors_are_in_focal_lengths():
  a, b = np.eye(3, 4), np.c_[np.eye(3), [1.0, 0, 0]]
  rays = np.array([[0.1, 0.2], [-0.3, 0.1], [0.0, -0.2]])
  moved = rays + np.array([-0.5, 0])
  assert evidence.epipolar_error(a, b, rays, moved) == pytest.approx(0)
  # Lines are horizontal; the Sampson distance shares an error between both pictures.
  off = moved + np.array([0, 0.02])
  assert evidence.epipolar_error(a, b, rays, off) == pytest.approx(0.02 / np.sqrt(2))
