"""Tracks: which pixels see which points, how far these are, and that batches draw them."""

import dataclasses

import captures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from internal import cameras, configs, datasets, structs
from internal.datasets import images, tracks
from internal.training import batches, pixel_store, train_step

XYZ = np.array([[0, 0, 0], [0.5, 0.2, 0.4], [-0.6, 0.3, 0.1], [0.1, -0.4, -0.2], [40, 30, 0]])
ERROR = [0.5, 1.0, 0.1, 0.4, 0.5]  # In pixels; the mean is 0.5.
SEEN_BY = [range(1, 10), (2, 3, 4), (2, 3), (1, 9, 6), range(1, 10)]  # 1 and 9 are test images.
CONFIG = configs.Config(depth_loss_mult=0.1, depth_loss_rays=0.25, batch_size=40)


LENSES = {
  'pinhole': captures.PINHOLE,
  'distorted': ('OPENCV', (20.0, 21.0, 8.0, 6.0, 0.1, -0.05, 1e-3, 2e-3)),
  'fisheye': ('OPENCV_FISHEYE', (14.0, 14.0, 8.0, 6.0, 0.02, -0.01, 0.0, 0.0)),
}


@pytest.fixture(params=LENSES)
def capture(request, tmp_path):
  return write(tmp_path, camera=LENSES[request.param])


def write(folder, **how):
  """Writes a capture of nine images with tracks; returns its settings and scene."""
  captures.write_colmap(str(folder), ext='.txt', **how)
  captures.write_tracks(str(folder), XYZ, ERROR, SEEN_BY)
  config = dataclasses.replace(CONFIG, data_dir=str(folder))
  return config, datasets.load_dataset(config)


def observations(found):
  """Returns rows (point's error, image) of the observations; errors tell points apart."""
  error = 0.5 * np.sqrt(-np.log(found.certainty))
  return {(round(float(e), 2), int(k)) for e, k in zip(error, found.cam_idx)}


def test_rays_of_the_pixels_meet_the_points(capture):
  config, scene = capture
  found = tracks.read(config.data_dir, scene, [None] * 7)
  cams = scene.cameras.take(np.array(scene.train))
  rays = cameras.pixels_to_rays(cams, found.cam_idx, found.x, found.y)
  at = rays.origins + found.distance[:, None] * rays.directions
  xyz = XYZ @ scene.world_transform[:3, :3].T + scene.world_transform[:3, 3]
  gaps = np.linalg.norm(np.asarray(at)[:, None] - xyz, axis=-1).min(1)
  pixel = found.distance / 14  # Half a diagonal of a pixel is 0.71 of its side.
  assert np.all(gaps < 0.8 * pixel)
  assert len(found.x) > 10


def test_test_images_and_points_of_two_views_do_not_count(tmp_path):
  config, scene = write(tmp_path)
  assert scene.test == (0, 8)
  found = tracks.read(config.data_dir, scene, [None] * 7)
  # Train rows are one less than image rows, whose ids start at 1. The last point is behind some.
  expected = {(0.5, k) for k in range(7)} | {(1.0, 0), (1.0, 1), (1.0, 2), (0.4, 4)}
  assert observations(found) == expected
  assert found.cam_idx.dtype == found.x.dtype == np.int32


def test_masked_pixels_do_not_count(tmp_path):
  config, scene = write(tmp_path)
  every = tracks.read(config.data_dir, scene, [None] * 7)
  mask = np.ones((12, 16), bool)
  mask[every.y[0], every.x[0]] = False
  found = tracks.read(config.data_dir, scene, [mask, *[None] * 6])
  gone = (every.cam_idx == 0) & (every.x == every.x[0]) & (every.y == every.y[0])
  assert len(found.x) == len(every.x) - gone.sum() < len(every.x)


def training_cameras(config, scene):
  return pixel_store.training_cameras(dataclasses.replace(tiny.settings(), config=config), scene)


def test_captures_without_tracks_are_refused(tmp_path):
  captures.write_colmap(str(tmp_path), points=XYZ)
  config = dataclasses.replace(CONFIG, data_dir=str(tmp_path))
  scene = datasets.load_dataset(config)
  with pytest.raises(images.DataError, match=r'three or more images see.*depth_loss_mult = 0'):
    training_cameras(config, scene)
  flat = dataclasses.replace(scene, cameras=scene.cameras.replace(pixtocam_ndc=np.eye(3)))
  with pytest.raises(images.DataError, match=r'without Config\.forward_facing'):
    training_cameras(config, flat)


def test_batches_begin_with_tracked_pixels(tmp_path):
  config, scene = write(tmp_path)
  cams = training_cameras(config, scene)
  key, supervision = jax.random.key(3), cams.supervision
  assert supervision.track_rays == 10
  draw = (key, jnp.asarray(cams.size), 40, 'all_images')
  plain, ids = batches.draw_pixels(*draw), batches.draw_pixels(*draw, supervision)
  for a, b in zip(plain, ids):
    np.testing.assert_array_equal(a[10:], b[10:])
  distance, certainty = batches.known_distances(key, 40, supervision)
  table = supervision.tracks
  rows = zip(table.cam_idx, table.x, table.y, table.distance, table.certainty)
  known = {tuple(map(float, row)) for row in rows}
  drawn = [tuple(map(float, row)) for row in zip(*ids, distance, certainty)]
  assert set(drawn[:10]) <= known
  assert len(set(drawn[:10])) > 3
  np.testing.assert_array_equal(certainty[10:], 0)
  batch = batches.make_batch(cams, *ids, jnp.zeros((40, 3), jnp.uint8), distance, certainty)
  np.testing.assert_array_equal(batch.distance, distance)
  off = dataclasses.replace(config, depth_loss_mult=0.0)
  assert training_cameras(off, scene).supervision is None
  assert batches.known_distances(key, 40, None) == (None, None)


def test_a_step_has_the_loss():
  cams, pictures = tiny.capture()
  n = np.arange(6)
  table = structs.Tracks(n % 3, n % 5, n % 4, np.float32(1 + 0.1 * n), np.float32(0.5 + 0.1 * n))
  cams = cams.replace(supervision=structs.Supervision(tracks=table, track_rays=16))
  settings = tiny.settings('Config.depth_loss_mult = 0.5')
  step = train_step.make_train_step(settings, tiny.mesh(8)).variant(1)
  state = train_step.abstract_state(settings)
  _, stats = jax.eval_shape(step, state, cams, batches.make_store(pictures), 1, 0)
  assert 'loss_depth' in stats.names
