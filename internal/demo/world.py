"""The demo's procedural world and its ray tracer: a still life in an endless landscape.

Solids are ray traced in their own frames. The ground's pattern is a sum of plane waves, each
attenuated by its exact response to the pixel's footprint, so it does not alias towards the horizon.
Hills, clouds and sky depend only on the direction. Everything is a function of the seed.

World: z up, ground at z = 0, lengths in table radii. Colours are linear RGB.
Arrays of `n` rays or points: origins, dirs, points, normals [n, 3]; distances t [n].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

EPS = 1e-3
STILL_LIFE = 7  # Number of its solids, which come first; the rest are trees and boulders.
SUN_AZIMUTH, SUN_ELEVATION, SUN_RADIUS = np.radians([35.0, 38.0, 2.5])


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _dot(a, b):
  a, b = np.broadcast_arrays(a, b)
  return np.einsum('ni,ni->n', a, b)


def _linear(code: str) -> np.ndarray:
  """Converts an sRGB colour 'rrggbb' to linear RGB [3]."""
  return (np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], np.float32) / 255) ** 2.2


def _mix(a, b, x):
  """Interpolates from colour a to b by x [n] in [0, 1]: [n, 3]."""
  return a + (b - a) * x[:, None]


def _smoothstep(lo, hi, x):
  x = np.clip((x - lo) / (hi - lo), 0, 1)
  return x * x * (3 - 2 * x)


def direction(azimuth, elevation):
  return np.stack(
    [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)],
    -1,
  ).astype(np.float32)


SUN = direction(SUN_AZIMUTH, SUN_ELEVATION)
SUN_COLOR = 2.35 * _linear('fff0d2')
SKY_LIGHT, GROUND_LIGHT = 0.62 * _linear('b9d4f5'), 0.30 * _linear('c9b28a')


def sun_samples(count: int) -> np.ndarray:
  """Returns directions to count x count points on the sun's disc, for soft shadows."""
  cell = (np.arange(count) + 0.5) / count * 2 - 1
  x, y = (g.ravel() for g in np.meshgrid(cell, cell))
  x, y = 0.8 * x + 0.3 * y, 0.8 * y - 0.3 * x  # Rotated, so that rows do not align with edges.
  return direction(
    SUN_AZIMUTH + SUN_RADIUS * x / np.cos(SUN_ELEVATION), SUN_ELEVATION + SUN_RADIUS * y
  )


# Each solid, in its own frame: distance along the ray (inf: no hit), and the outward normal.


def _entry(t0, t1):
  """Returns the first hit of a convex solid that contains the ray between t0 and t1."""
  t = np.where(t0 > EPS, t0, t1)
  return np.where((t0 <= t1) & (t > EPS), t, np.inf)


def _hit_ball(o, d):
  a, b, c = _dot(d, d), _dot(o, d), _dot(o, o) - 1
  root = np.sqrt(np.maximum(b * b - a * c, 0))
  return np.where(b * b > a * c, _entry((-b - root) / a, (-b + root) / a), np.inf)


def _slab(o, d):
  """Returns the distances where rays enter and leave [-1, 1] on each axis: two [n, axes]."""
  d = np.where(np.abs(d) < 1e-9, 1e-9, d)
  ends = (-1 - o) / d, (1 - o) / d
  return np.minimum(*ends), np.maximum(*ends)


def _hit_box(o, d):
  t0, t1 = _slab(o, d)
  return _entry(t0.max(-1), t1.min(-1))


def _box_normal(p):
  axis = np.abs(p).argmax(-1)
  return np.where(np.arange(3) == axis[:, None], np.sign(p), 0)


def _hit_cylinder(o, d):
  """Hits the cylinder of radius 1 around z, -1 <= z <= 1."""
  t0, t1 = _slab(o[:, 2], d[:, 2])
  o, d = o[:, :2], d[:, :2]
  a, b, c = np.maximum(_dot(d, d), 1e-12), _dot(o, d), _dot(o, o) - 1
  root = np.sqrt(np.maximum(b * b - a * c, 0))
  t = _entry(np.maximum(t0, (-b - root) / a), np.minimum(t1, (-b + root) / a))
  return np.where(b * b > a * c, t, np.inf)


def _cylinder_normal(p):
  on_cap = np.abs(p[:, 2]) > np.hypot(p[:, 0], p[:, 1])
  return np.where(on_cap[:, None], np.sign(p) * [0, 0, 1], p * [1, 1, 0])


RING_TUBE = 0.32  # Radius of the tube; that of the ring is 1.


def _hit_ring(o, d):
  """Hits a torus around z, by sphere tracing."""
  speed = np.linalg.norm(d, axis=-1)
  t = np.maximum(-_dot(o, d) / speed**2 - 1.5 / speed, EPS)
  for _ in range(64):
    p = o + t[:, None] * d
    gap = np.hypot(np.hypot(p[:, 0], p[:, 1]) - 1, p[:, 2]) - RING_TUBE
    t = t + gap / speed
  return np.where((np.abs(gap) < EPS) & (t > EPS), t, np.inf)


def _ring_normal(p):
  return p - unit(p * [1, 1, 0])


@dataclasses.dataclass(frozen=True)
class Solid:
  """A shape with its placement and its paint, a function of points in the shape's frame."""

  hit: Callable
  normal: Callable
  paint: Callable
  centre: np.ndarray  # [3]
  to_local: np.ndarray  # [3, 3]
  reach: float  # Radius of its bounding sphere.
  gloss: float = 0.0

  def local(self, points):
    return (points - self.centre) @ self.to_local.T


def _solid(shape, paint, centre, size, turn=0.0, tilt=0.0, gloss=0.0) -> Solid:
  """Places a shape with half-axes `size`, tilted around x, then turned around z, in degrees."""
  (c, u), (s, v) = np.cos(np.radians([turn, tilt])), np.sin(np.radians([turn, tilt]))
  rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ [[1, 0, 0], [0, u, -v], [0, v, u]]
  size = np.broadcast_to(np.asarray(size, float), (3,))
  hit, normal, corner = {
    'ball': (_hit_ball, lambda p: p, 1.0),
    'box': (_hit_box, _box_normal, 3**0.5),
    'cylinder': (_hit_cylinder, _cylinder_normal, 2**0.5),
    'ring': (_hit_ring, _ring_normal, 1 + RING_TUBE),
  }[shape]
  to_local = (rotation / size).T.astype(np.float32)
  return Solid(hit, normal, paint, np.float32(centre), to_local, corner * size.max(), gloss)


def _checks(a, b, count):
  a, b = _linear(a), _linear(b)

  def paint(p):
    cell = np.floor(np.clip((p + 1) / 2, 0, 0.9999) * count + 1e-4).sum(-1)
    return _mix(a, b, cell % 2)

  return paint


def _bands(*codes, by=lambda p: (p[:, 2] + 1) / 2):
  """Paints bands of equal width over the periodic coordinate `by` in [0, 1)."""
  colors = np.stack([_linear(c) for c in codes])

  def paint(p):
    return colors[(np.floor(by(p) * len(codes)) % len(codes)).astype(int)]

  return paint


def _azimuth(p):
  return np.arctan2(p[:, 1], p[:, 0]) / (2 * np.pi)


def _table_paint(p):
  """Paints tiles around the side and wood rings on top."""
  side = _bands('2f5d8a', 'f2ead8', by=lambda p: 10 * _azimuth(p))(p)
  rim = np.abs(p[:, 2] - 0.15) > 0.62
  side = np.where(rim[:, None], _linear('e2d3b0'), side)
  radius = np.hypot(p[:, 0], p[:, 1])
  wood = _mix(_linear('b98550'), _linear('8f5b34'), 0.5 + 0.5 * np.sin(21 * radius))
  wood = np.where((radius > 0.9)[:, None], _linear('6d4023'), wood)
  return np.where((p[:, 2] > radius)[:, None], wood, side)


def _foliage(dark, light):
  dark, light = _linear(dark), _linear(light)
  return lambda p: _mix(dark, light, _smoothstep(-0.9, 1.0, p[:, 2]))


def build_solids(seed: int) -> list[Solid]:
  """Returns the still life, followed by trees and boulders at growing distances."""
  top = 0.42
  spiral = _bands('c8342c', 'f4efe4', by=lambda p: 1.5 * p[:, 2] + _azimuth(p))
  solids = [
    _solid('cylinder', _table_paint, [0, 0, top / 2], [1, 1, top / 2]),
    _solid('box', _checks('c65a2e', 'f6e7c8', 3), [-0.45, 0.3, top + 0.27], 0.27, turn=28),
    _solid('ball', _bands('0f7f86', 'f3f1e6', '1d3f72', 'f0b83c', '0f7f86'), [0.43, 0.4, top + 0.3],
           0.3, turn=40, tilt=25, gloss=0.35),
    _solid('ring', _bands('e9b31f', '8a2a6b', by=lambda p: 6 * _azimuth(p)),
           [0.28, -0.5, top + 0.32], 0.25, turn=-25, tilt=82, gloss=0.25),
    _solid('cylinder', spiral, [-0.12, -0.12, top + 0.45], [0.11, 0.11, 0.45]),
    _solid('ball', _bands('e8a91c'), [-0.12, -0.12, top + 1.03], 0.15, gloss=0.5),
    _solid('box', _bands('3f8f57', '3f8f57', 'e8e3cf', '3f8f57', '3f8f57'),
           [-0.55, -0.45, top + 0.11], [0.2, 0.13, 0.11], turn=-35),
  ]  # fmt: skip
  rng = np.random.default_rng(seed)
  for i in range(26):
    distance = 6.5 * 1.13**i * rng.uniform(0.9, 1.1)
    azimuth = 2.4 * i + rng.uniform(-0.3, 0.3)  # The golden angle spreads them evenly.
    x, y = distance * np.cos(azimuth), distance * np.sin(azimuth)
    grow = (distance / 7) ** 0.45 * rng.uniform(0.85, 1.2)
    if i % 3 == 0:
      paint = _foliage('7a6f63', 'c9bda6')
      solids.append(_solid('ball', paint, [x, y, 0.25 * grow], [0.8 * grow, 0.6 * grow, 0.6 * grow],
                           turn=rng.uniform(0, 180)))  # fmt: skip
    elif i % 3 == 1:  # A cypress.
      solids.append(_solid('ball', _foliage('17402c', '4f8a3c'), [x, y, 1.6 * grow],
                           [0.45 * grow, 0.45 * grow, 1.75 * grow]))  # fmt: skip
    else:  # A round tree.
      crown = _foliage(*[('2c5a27', '9dbb4a'), ('a1531f', 'efb13c')][i % 2])
      solids.append(_solid('ball', crown, [x, y, 2.0 * grow], [1.05 * grow] * 2 + [0.95 * grow]))
      solids.append(_solid('cylinder', _bands('5b3d28'), [x, y, 0.6 * grow],
                           [0.13 * grow, 0.13 * grow, 0.6 * grow]))  # fmt: skip
  return solids


def trace(solids, origins, dirs):
  """Returns first hits: distances [n] (inf: none) and indices into `solids` [n] (-1: none)."""
  t = np.full(len(dirs), np.inf, np.float32)
  index = np.full(len(dirs), -1)
  started, away2 = _dot(origins, dirs), _dot(origins, origins)
  for i, solid in enumerate(solids):
    # Rays that meet the bounding sphere. The margins allow for rounding errors of the expansion.
    along = dirs @ solid.centre - started
    reach2 = solid.reach**2 - solid.centre @ solid.centre
    apart2 = (1 - 4e-6) * away2 - origins @ (2 * solid.centre)
    near = np.flatnonzero((apart2 - along * along < reach2) & (along > -1.1 * solid.reach))
    if near.size:
      o, d = solid.local(origins[near]), dirs[near] @ solid.to_local.T
      new = solid.hit(o, d)
      closer = new < t[near]
      t[near[closer]], index[near[closer]] = new[closer], i
  return t, index


class Landscape:
  """The ground's pattern, hills, clouds and sky for one seed."""

  def __init__(self, seed: int):
    rng = np.random.default_rng(seed + 1)
    waves = 28
    length = 16 * 0.82 ** np.arange(waves)  # Wavelengths, 16 down to 0.075 table radii.
    angle = 2.4 * np.arange(waves) + rng.uniform(0, 0.5, waves)
    self.meadow = (2 * np.pi / length * np.stack([np.cos(angle), np.sin(angle)]), length**0.25)
    self.meadow_phase = rng.uniform(0, 2 * np.pi, (2, waves))
    self.cloud = (np.stack([np.cos(angle), np.sin(angle)])[:, :16] * 1.25 ** np.arange(16),
                  1.25 ** -np.arange(16), rng.uniform(0, 2 * np.pi, 16))  # fmt: skip
    self.ridge_phase = rng.uniform(0, 2 * np.pi, (3, 9))

  def ground(self, points, dirs, footprint):
    """Returns the albedo [n, 3]; `footprint` [n] is the standard deviation of the pixel's cone."""
    flat = dirs[:, :2] / np.maximum(np.linalg.norm(dirs[:, :2], axis=-1, keepdims=True), 1e-6)
    stretch = 1 / np.maximum(np.abs(dirs[:, 2]), 1e-3) ** 2 - 1  # Along the view.

    def attenuation(k):
      """Returns the attenuation of waves k [2, m] averaged over the footprint: [n, m]."""
      var = (k * k).sum(0) + stretch[:, None] * (flat @ k) ** 2
      return np.exp(-0.5 * np.minimum(footprint[:, None] ** 2 * var, 40))

    k, amp = (x.astype(np.float32) for x in self.meadow)
    wave, left = points[:, :2] @ k, attenuation(k) * (amp / np.linalg.norm(amp))
    lush = _dot(np.cos(wave + self.meadow_phase[0]), left)
    dry = _dot(np.cos(wave + self.meadow_phase[1]), left)
    grass = _mix(_linear('4d7a34'), _linear('a9b552'), 0.5 + 0.32 * lush)
    grass = _mix(grass, _linear('c7a565'), np.clip(0.25 + 0.35 * dry, 0, 1))
    # Paving: the first harmonics of a checkerboard of cell 0.6. Lanczos factors reduce ringing.
    harmonics = np.array([1, 3, 5], np.float32)
    soften = 4 / np.pi / harmonics * np.sinc(harmonics / 7)
    sides = []
    for turn in (0.35, 0.35 + np.pi / 2):
      k = np.pi / 0.6 * harmonics * np.array([[np.cos(turn)], [np.sin(turn)]], np.float32)
      sides.append((np.sin(points[:, :2] @ k) * attenuation(k) * soften).sum(-1))
    tiles = _mix(_linear('a88f78'), _linear('e4d7bd'), 0.5 + 0.5 * sides[0] * sides[1])
    edge = np.hypot(points[:, 0], points[:, 1]) + 0.25 * lush
    return np.clip(_mix(tiles, grass, _smoothstep(3.6, 4.3, edge)), 0.01, 1)

  def haze(self, dirs):
    """Returns the sky's colour at the horizon, warmer towards the sun: [n, 3]."""
    glow = _smoothstep(-1, 1, dirs[:, :2] @ SUN[:2] / np.linalg.norm(SUN[:2]))
    return _mix(_linear('b3cbe0'), _linear('f3dcc0'), glow)

  def sky(self, dirs):
    """Returns the colour of sky and clouds: [n, 3]."""
    up = np.clip(dirs[:, 2], 0, 1)
    color = _mix(self.haze(dirs), _linear('3d7fcb'), 1 - np.exp(-4.5 * up))
    toward = np.clip(dirs @ SUN, 0, 1)
    k, amp, phase = self.cloud
    flat = dirs[:, :2] / (up + 0.22)[:, None] * 1.1
    puff = np.cos(flat @ k + phase) @ amp / np.linalg.norm(amp)
    color = _mix(color, _linear('fbf6ee'), 0.85 * _smoothstep(0.0, 1.0, puff) * (1 - up))
    return color + (0.25 * toward**6 + 1.5 * toward**120)[:, None] * _linear('ffdf9e')

  def background(self, dirs):
    """Returns the colour of the sky behind three ridges of hills: [n, 3]."""
    color, haze = self.sky(dirs), self.haze(dirs)
    azimuth = np.arctan2(dirs[:, 1], dirs[:, 0])[:, None]
    elevation = np.degrees(np.arcsin(np.clip(dirs[:, 2], -1, 1)))
    ridges = (  # Height and roughness in degrees, harmonics, colours low and high, haze.
      (8.0, 3.4, np.array([2, 3, 5, 7, 11, 13, 17, 23, 29]), '6f86b0', 'eef2fb', 0.30),
      (4.6, 1.8, np.array([3, 4, 7, 9, 12, 15, 19, 22, 26]), '4d7d78', '7fa287', 0.28),
      (2.0, 0.9, np.array([4, 6, 9, 11, 14, 18, 21, 25, 31]), '3f6b3d', '86a04f', 0.15),
    )
    for (high, rough, m, low, top, hazy), phase in zip(ridges, self.ridge_phase):
      amp = m**-0.6 / np.linalg.norm(m**-0.6)
      crest = high + rough * np.cos(azimuth * m + phase) @ amp * 1.4
      slope = -np.sin(azimuth * m + phase) @ (amp * m) / m[4]
      share = np.clip(elevation / np.maximum(crest, 0.1), 0, 1)
      land = _mix(_linear(low), _linear(top), _smoothstep(0.45, 1.0, share + 0.15 * slope))
      land = land * (0.9 + 0.22 * np.tanh(slope))[:, None]
      land = _mix(land, haze, hazy + (1 - hazy) * (1 - share) ** 3)
      color = np.where((elevation < crest)[:, None], land, color)
    return color


def _occlusion(solids, points, normals):
  """Returns the fraction of sky light that the still life does not block: [n]."""
  left = np.ones(len(points), np.float32)
  for solid in solids[:STILL_LIFE]:
    to = solid.centre - points
    gap = np.maximum(np.sqrt(_dot(to, to)), solid.reach * 0.6)
    facing = np.clip(_dot(to, normals) / gap, 0, 1)
    left *= 1 - 0.55 * facing * np.minimum((0.75 * solid.reach / gap) ** 2, 1)
  return left


def _light(solids, points, normals, dirs, albedo, gloss, sun):
  """Returns the shaded colour from sun, shadows, sky, bounce light and highlight: [n, 3]."""
  facing = (normals @ sun).clip(0)
  shadowed = trace(solids, points + 4 * EPS * normals, np.broadcast_to(sun, points.shape))[1] >= 0
  facing = np.where(shadowed, 0, facing)
  sky = _mix(GROUND_LIGHT, SKY_LIGHT, 0.5 + 0.5 * normals[:, 2])
  light = facing[:, None] * SUN_COLOR * 0.62 + sky * _occlusion(solids, points, normals)[:, None]
  shine = np.clip(_dot(normals, unit(sun - dirs)), 0, 1) ** 40 * gloss * (facing > 0)
  return albedo * light + shine[:, None] * SUN_COLOR


def render_rays(solids, land, origin, dirs, pixel, sun):
  """Returns linear colours [n, 3] and distances [n] of rays along unit `dirs` from `origin` [3]."""
  origins = np.broadcast_to(origin, dirs.shape)
  t, index = trace(solids, origins, dirs)
  on_ground = np.where(dirs[:, 2] < 0, -origin[2] / np.minimum(dirs[:, 2], -1e-7), np.inf)
  index = np.where(on_ground < t, len(solids), index)
  t = np.minimum(t, on_ground)
  hit, missed = np.flatnonzero(index >= 0), np.flatnonzero(index < 0)
  color = np.zeros_like(dirs)
  color[missed] = land.background(dirs[missed])
  points = origins[hit] + t[hit, None] * dirs[hit]
  normals, albedo = np.tile(np.float32([0, 0, 1]), (len(hit), 1)), np.zeros_like(points)
  gloss = np.zeros(len(hit))
  for i in np.unique(index[hit]):
    mine = np.flatnonzero(index[hit] == i)
    if i == len(solids):
      footprint = t[hit[mine]] * pixel * 0.4
      albedo[mine] = land.ground(points[mine], dirs[hit[mine]], footprint)
      continue
    local = solids[i].local(points[mine])
    normals[mine] = unit(solids[i].normal(local) @ solids[i].to_local)
    albedo[mine], gloss[mine] = solids[i].paint(local), solids[i].gloss
  lit = _light(solids, points, normals, dirs[hit], albedo, gloss, sun)
  fog = 1 - np.exp(-t[hit] / 90)
  color[hit] = lit + (land.haze(dirs[hit]) - lit) * fog[:, None]
  return color, t
