"""Renders scenes of textured boxes that are hard for pose estimation, from known cameras.

The scenes of `SCENES` are what a verdict on poses must tell apart: ordinary rooms, repeated and
symmetric objects, cameras that look outwards, all one way, or that only turn.
"""

import dataclasses
import functools
import pathlib

import captures
import numpy as np
import scipy.ndimage
import textured_corner
from PIL import ExifTags, Image

from internal import colmap
from internal.vis import pictures

SIZE, FOCAL = (480, 360), 420.0
_TEXELS = 110  # Of a unit of length.


@functools.cache
def texture(seed: int) -> np.ndarray:
  return textured_corner.texture(seed)


@dataclasses.dataclass(frozen=True)
class Quad:
  """The parallelogram corner + a * u + b * v, 0 <= a, b <= 1."""

  corner: np.ndarray
  u: np.ndarray
  v: np.ndarray
  texture: int


def box(low, high, textures) -> list[Quad]:
  """Returns the sides of a box; `textures` are those of x-, x+, y-, y+, z-, z+ (None: no side)."""
  low, high = np.asarray(low, float), np.asarray(high, float)
  quads = []
  for side, name in enumerate(textures):
    if name is None:
      continue
    axis, end = divmod(side, 2)
    a, b = [np.eye(3)[k] * (high - low) for k in range(3) if k != axis]
    corner = low.copy()
    corner[axis] = high[axis] if end else low[axis]
    # Opposite sides run opposite ways round, so that equal textures look the same from outside.
    if axis < 2 and end == (axis == 0):
      corner, a = corner + a, -a
    quads.append(Quad(corner, a, b, name))
  return quads


def look_at(eye, target) -> np.ndarray:
  """Returns a camera-to-world pose [3, 4], OpenGL axes, with z up."""
  eye = np.asarray(eye, float)
  back = (eye - target) / np.linalg.norm(eye - target)
  right = np.cross([0, 0, 1], back)
  right = right / np.linalg.norm(right)
  return np.stack([right, np.cross(back, right), back, eye], 1)


def render(quads, pose, size=SIZE, focal=FOCAL) -> np.ndarray:
  """Renders a view, uint8 [h, w, 3]; what no quad covers is grey."""
  width, height = size
  y, x = np.mgrid[:height, :width] + 0.5
  rays = np.stack([(x - width / 2) / focal, (height / 2 - y) / focal, -np.ones_like(x)], -1)
  rays, origin = rays @ pose[:, :3].T, pose[:, 3]
  nearest, image = np.full((height, width), np.inf), np.full((height, width, 3), 140.0)
  for quad in quads:
    normal = np.cross(quad.u, quad.v)
    with np.errstate(divide='ignore', invalid='ignore'):
      t = ((quad.corner - origin) @ normal) / (rays @ normal)
    local = origin + t[..., None] * rays - quad.corner
    a, b = ((local @ w) / (w @ w) for w in (quad.u, quad.v))
    hit = (t > 1e-6) & (t < nearest) & (a >= 0) & (a <= 1) & (b >= 0) & (b <= 1)
    if not hit.any():
      continue
    nearest[hit] = t[hit]
    at = [a[hit] * np.linalg.norm(quad.u) * _TEXELS, b[hit] * np.linalg.norm(quad.v) * _TEXELS]
    for c in range(3):
      image[hit, c] = scipy.ndimage.map_coordinates(
        texture(quad.texture)[..., c], at, order=1, mode='grid-wrap'
      )
  return pictures.to_uint8(image / 255)


def _ring(n, radius, height, target, turn=(0, 2 * np.pi)):
  angles = np.linspace(*turn, n, endpoint=turn[1] - turn[0] < 6)
  rng = np.random.default_rng(n)
  return [
    look_at([r * np.cos(a), r * np.sin(a), height + d], np.asarray(target) + rng.normal(0, 0.05, 3))
    for a, r, d in zip(angles, radius + rng.normal(0, 0.05, n), rng.normal(0, 0.08, n))
  ]


_ROOM = box((-4, -4, 0), (4, 4, 3), (10, 11, 12, 13, 14, None))
_EMPTY = box((-4, -4, 0), (4, 4, 3), (None, None, None, None, 14, None))
_THING = (20, 21, 22, 23, 24, 25)
_SAME = (20, 20, 20, 20, 24, 25)


def _around(n):
  return _ROOM + box((-0.5, -0.4, 0), (0.5, 0.4, 0.9), _THING), _ring(n, 2.2, 1.3, (0, 0, 0.5))


def _twins(n):
  """Two equal boxes at opposite ends of a room."""
  things = [
    *box((-1.6, -0.4, 0), (-0.8, 0.4, 0.8), _THING),
    *box((0.8, -0.4, 0), (1.6, 0.4, 0.8), _THING),
  ]
  return _ROOM + things, _ring(n, 3.0, 1.3, (0, 0, 0.4))


def _symmetric(n):
  """A box with four equal sides in a room whose walls differ."""
  return _ROOM + box((-0.7, -0.7, 0), (0.7, 0.7, 1.6), _SAME), _ring(n, 2.3, 1.0, (0, 0, 0.8))


def _symmetric_alone(n):
  """A box with four equal sides on a floor, with nothing around."""
  return _EMPTY + box((-0.7, -0.7, 0), (0.7, 0.7, 1.6), _SAME), _ring(n, 2.3, 1.0, (0, 0, 0.8))


def _front_and_back(n):
  """Two equal sides of a box, photographed from the front and from the back and nowhere between."""
  arcs = [_ring(n // 2, 2.3, 1.0, (0, 0, 0.8), (a - 0.6, a + 0.6)) for a in (0, np.pi)]
  return _ROOM + box((-0.7, -0.7, 0), (0.7, 0.7, 1.6), _SAME), arcs[0] + arcs[1]


def _two_sided(n):
  """A wall with two equal faces, on a grey floor."""
  return box((-1.2, -0.15, 0), (1.2, 0.15, 1.8), (20, 21, 22, 22, None, 25)), _ring(
    n, 3.0, 1.1, (0, 0, 0.9)
  )


def _outwards(n):
  cameras = []
  for k, a in enumerate(np.linspace(0, 2 * np.pi, n, endpoint=False)):
    ahead = np.array([np.cos(a), np.sin(a), 0.05 * (-1) ** k])
    eye = 0.5 * ahead * [1, 1, 0] + [0, 0, 1.4 + 0.1 * (k % 3)]
    cameras.append(look_at(eye, eye + ahead))
  return _ROOM, cameras


def _rotation(n):
  angles = np.linspace(0, 2 * np.pi, n, endpoint=False)
  eye = np.array([0.3, 0.2, 1.4])
  return _ROOM, [look_at(eye, eye + np.array([np.cos(a), np.sin(a), 0.03])) for a in angles]


def _forward(n):
  rng = np.random.default_rng(3)
  things = [
    q
    for k in range(4)
    for q in box((-1.8 + k, 2.0 - 0.4 * k, 0), (-1.3 + k, 2.5 - 0.4 * k, 1.0), [30 + k] * 6)
  ]
  eyes = np.stack([rng.uniform(-1, 1, n), rng.uniform(-2.4, -2, n), rng.uniform(0.7, 1.6, n)], -1)
  return _ROOM + things, [look_at(eye, eye + np.array([0.02, 1, -0.05])) for eye in eyes]


def _corridor(n):
  """A corridor with equal doors, walked through."""
  walls = box((-1.2, 0, 0), (1.2, 14, 2.4), (40, 41, None, 42, 43, 44))
  doors = [
    Quad(np.array([-1.19, 1.0 + 3 * k, 0]), np.array([0, 1.0, 0]), np.array([0, 0, 2.0]), 45)
    for k in range(4)
  ]
  eyes = np.linspace(0.5, 8.5, n)
  return walls + doors, [
    look_at([0.15 * np.sin(k), y, 1.4], [-0.6, y + 2, 1.2]) for k, y in enumerate(eyes)
  ]


SCENES = {
  'around': _around,
  'twins': _twins,
  'symmetric': _symmetric,
  'symmetric_alone': _symmetric_alone,
  'front_and_back': _front_and_back,
  'two_sided': _two_sided,
  'outwards': _outwards,
  'rotation': _rotation,
  'forward': _forward,
  'corridor': _corridor,
}


def make(name: str, folder: pathlib.Path, n: int, exif: bool = False) -> None:
  """Writes the `n` photographs of a scene: PNG, or JPEG with a focal length in its EXIF data."""
  quads, poses = SCENES[name](n)
  folder.mkdir(parents=True, exist_ok=True)
  tags = Image.Exif()
  tags[ExifTags.Base.Model] = 'Phone 5'
  # COLMAP takes the longer side of the film for 35 mm.
  focal = round(35 * FOCAL / max(SIZE))
  tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = focal
  how = {'quality': 95, 'exif': tags} if exif else {}
  for k, pose in enumerate(poses):
    Image.fromarray(render(quads, pose)).save(folder / _name(k, exif), **how)


def true_model(name: str, n: int, exif: bool = False) -> colmap.Model:
  """Returns the model of a scene's true cameras, without points."""
  images = {
    k: colmap.Image(k, *captures.to_colmap(pose), 1, _name(k, exif))
    for k, pose in enumerate(SCENES[name](n)[1])
  }
  camera = colmap.Camera(1, 'PINHOLE', *SIZE, (FOCAL, FOCAL, SIZE[0] / 2, SIZE[1] / 2))
  return colmap.Model({1: camera}, images, colmap.make_points())


def _name(k: int, exif: bool) -> str:
  return f'{k:03d}.{"jpg" if exif else "png"}'
