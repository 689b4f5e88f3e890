"""Renders the corner of a textured room from known cameras."""

import captures
import numpy as np
import scipy.ndimage

from internal import colmap
from internal.vis import pictures

SIZE, FOCAL, VIEWS = (256, 192), 220.0, 10


def texture(seed, n=512):
  """Random blobs of many sizes, [n, n, 3] in 0..255, so that SIFT finds features everywhere."""
  rng = np.random.default_rng(seed)
  total = 0
  for blur in (1.5, 3, 6, 12):
    noise = scipy.ndimage.gaussian_filter(rng.normal(size=(n, n, 3)), (blur, blur, 0), mode='wrap')
    total = total + noise / noise.std()
  return np.clip(128 + 38 * total, 0, 255)


TEXTURES = [texture(seed) for seed in range(3)]


def room_pose(turn, height=1.4, distance=2.6):
  """Returns a camera-to-world pose [3, 4], OpenGL axes, that looks into the corner at 0."""
  position = np.array([distance * np.cos(turn), distance * np.sin(turn), height])
  back = position - np.array([0.35, 0.35, 0.5])
  back = back / np.linalg.norm(back)
  right = np.cross([0, 0, 1], back)
  right = right / np.linalg.norm(right)
  return np.stack([right, np.cross(back, right), back, position], 1)


def render_room(pose, size=SIZE, focal=FOCAL):
  """Renders the corner, uint8 [h, w, 3]: the floor z = 0 and the walls x = 0 and y = 0."""
  width, height = size
  y, x = np.mgrid[:height, :width] + 0.5
  rays = np.stack([(x - width / 2) / focal, (height / 2 - y) / focal, -np.ones_like(x)], -1)
  rays = rays @ pose[:, :3].T
  t = -pose[:, 3] / rays  # [h, w, 3], the distance to each plane.
  t = np.where(t > 1e-6, t, np.inf)
  nearest = t.argmin(-1)
  hits = pose[:, 3] + t.min(-1)[..., None] * rays
  img = np.zeros((height, width, 3))
  for axis in range(3):
    on = nearest == axis
    u, v = hits[on][:, [a for a in range(3) if a != axis]].T * 130
    for c in range(3):
      img[on, c] = scipy.ndimage.map_coordinates(
        TEXTURES[axis][..., c], [u, v], order=1, mode='grid-wrap'
      )
  return pictures.to_uint8(img / 255)


def turns(n):
  """Azimuths of `n` cameras, in radians."""
  return np.linspace(np.radians(15), np.radians(75), n)


def true_model():
  """Returns the COLMAP model of the true cameras."""
  width, height = SIZE
  camera = colmap.Camera(1, 'PINHOLE', width, height, (FOCAL, FOCAL, width / 2, height / 2))
  images = {
    k + 1: colmap.Image(k + 1, *captures.to_colmap(room_pose(turn)), 1, f'view_{k}.png')
    for k, turn in enumerate(turns(VIEWS))
  }
  return colmap.Model({1: camera}, images, colmap.make_points())
