"""Small captures that the tests write: cameras on a circle, pictures of noise."""

import builtins
import os
import struct
import zlib

import numpy as np
from PIL import Image

from internal import colmap

PINHOLE = ('PINHOLE', (20.0, 21.0, 8.0, 6.0))
SIZE = (16, 12)


def pixels(seed: int, size=SIZE, channels: int = 3) -> np.ndarray:
  """Noise, uint8 [h, w, channels]."""
  shape = (size[1], size[0], channels)
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_image(path, values, **kwargs) -> None:
  os.makedirs(os.path.dirname(path), exist_ok=True)
  Image.fromarray(values).save(path, **kwargs)


def deny(monkeypatch, path: str) -> None:
  """Simulates a file or folder without read permission, which root does not feel."""

  def refusing(real, itself):
    def call(place='.', *args, **kwargs):
      name = os.fspath(place) if isinstance(place, str | os.PathLike) else ''
      if name.startswith(f'{path}/') or (itself and name == path):
        raise PermissionError(13, 'Permission denied', name)
      return real(place, *args, **kwargs)

    return call

  monkeypatch.setattr(os, 'stat', refusing(os.stat, False))
  for module, name in ((os, 'scandir'), (os, 'listdir'), (builtins, 'open')):
    monkeypatch.setattr(module, name, refusing(getattr(module, name), True))


def circle_poses(n: int) -> np.ndarray:
  """[n, 3, 4] camera to world, OpenGL axes, looking at the middle from two heights; z is up."""
  poses = []
  for i in range(n):
    angle = 2 * np.pi * i / n
    position = np.array([5 * np.cos(angle), 3 * np.sin(angle), 1.0 + i % 2])
    back = position / np.linalg.norm(position)
    right = np.cross([0, 0, 1], back)
    right /= np.linalg.norm(right)
    poses.append(np.stack([right, np.cross(back, right), back, position], axis=1))
  return np.array(poses)


def to_colmap(pose: np.ndarray):
  """The quaternion and the translation of an OpenGL camera-to-world pose, COLMAP's way."""
  r = (pose[:, :3] * [1, -1, -1]).T
  # The quaternion is the eigenvector of the largest eigenvalue of this matrix (Bar-Itzhack, 2000).
  k = np.array(
    [
      [np.trace(r), r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]],
      [0, r[0, 0] - r[1, 1] - r[2, 2], r[0, 1] + r[1, 0], r[0, 2] + r[2, 0]],
      [0, 0, r[1, 1] - r[0, 0] - r[2, 2], r[1, 2] + r[2, 1]],
      [0, 0, 0, r[2, 2] - r[0, 0] - r[1, 1]],
    ]
  )
  quaternion = np.linalg.eigh(k, UPLO='U')[1][:, -1]
  return tuple(quaternion.tolist()), tuple((-r @ pose[:, 3]).tolist())


def make_model(names, poses, camera=PINHOLE, size=SIZE, points=()) -> colmap.Model:
  """A sparse model of one camera."""
  model, params = camera
  cameras = {1: colmap.Camera(1, model, *size, params)}
  images = {
    i: colmap.Image(i, *to_colmap(pose), camera_id=1, name=name)
    for i, (name, pose) in enumerate(zip(names, poses), 1)
  }
  return colmap.Model(cameras, images, colmap.make_points(points))


def write_colmap(root, n=9, names=None, ext='.bin', camera=PINHOLE, size=SIZE, points=()):
  """Writes images/ (noise of seed i) and sparse/0/; returns the names and the poses."""
  names = names or [f'{i:03}.png' for i in range(n)]
  poses = circle_poses(len(names))
  for i, name in enumerate(names):
    save_image(os.path.join(root, 'images', name), pixels(i, size))
  model = make_model(names, poses, camera, size, points)
  colmap.write_model(os.path.join(root, 'sparse', '0'), model, ext)
  return names, poses


def write_tracks(root, xyz, error, seen_by) -> None:
  """Writes points with tracks into the text model of `write_colmap`; ids of images start at 1."""
  lines = [
    ' '.join(map(str, (i, *point, 128, 128, 128, e, *(v for k in views for v in (k, 0)))))
    for i, (point, e, views) in enumerate(zip(xyz, error, seen_by), 1)
  ]
  with open(os.path.join(root, 'sparse', '0', 'points3D.txt'), 'w') as f:
    f.write('\n'.join([*lines, '']))


def png_16(values: np.ndarray) -> bytes:
  """A PNG of uint16 [h, w, 1 to 4]: Pillow can write no colours of 16 bits."""
  height, width, channels = values.shape
  kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

  def chunk(name, data):
    body = name + data
    return struct.pack('>I', len(data)) + body + struct.pack('>I', zlib.crc32(body))

  rows = values.astype('>u2').reshape(height, -1)
  raw = b''.join(b'\0' + row.tobytes() for row in rows)
  header = struct.pack('>IIBBBBB', width, height, 16, kind, 0, 0, 0)
  parts = chunk(b'IHDR', header), chunk(b'IDAT', zlib.compress(raw)), chunk(b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + b''.join(parts)
