"""Pictures for people: depth, error, sheets of many images, ray histograms.

In: float images [h, w, 3] in [0, 1] or uint8; maps [h, w]. Out: uint8 [h, w, 3]. numpy only.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..system import files

# Our own map, in OKLCh: dark blue over violet and orange to a pale yellow. Lightness rises evenly,
# so that equal steps look equal, and it reads the same in grey.
_LIGHTNESS = (0.13, 0.97)
_HUES = (262, 290, 330, 372, 402, 430, 465)  # Degrees.
_CHROMAS = (0.06, 0.16, 0.185, 0.17, 0.15, 0.15, 0.07)

ERROR_MAX = 0.3  # The error that is drawn brightest; fixed, so that pictures can be compared.
_PAPER, _INK = 250, 40
_MARGIN = 6


def _oklab_to_srgb(lab: np.ndarray) -> np.ndarray:
  """OKLab (Ottosson 2020) [..., 3] to sRGB in [0, 1]."""
  to_lms = np.array(
    [
      [1, 0.3963377774, 0.2158037573],
      [1, -0.1055613458, -0.0638541728],
      [1, -0.0894841775, -1.2914855480],
    ]
  )
  to_rgb = np.array(
    [
      [4.0767416621, -3.3077115913, 0.2309699292],
      [-1.2684380046, 2.6097574011, -0.3413193965],
      [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
  )
  linear = np.clip((lab @ to_lms.T) ** 3 @ to_rgb.T, 0, 1)
  return np.where(
    linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055
  )


def _make_colormap(n: int = 256) -> np.ndarray:
  """The map as a table [n, 3] in [0, 1]."""
  x = np.linspace(0, 1, n)
  knots = np.linspace(0, 1, len(_HUES))
  hue = np.deg2rad(np.interp(x, knots, _HUES))
  chroma = np.interp(x, knots, _CHROMAS)
  lightness = _LIGHTNESS[0] + (_LIGHTNESS[1] - _LIGHTNESS[0]) * x
  return _oklab_to_srgb(np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], -1))


_COLORMAP = _make_colormap()


def to_uint8(img: np.ndarray) -> np.ndarray:
  """Float in [0, 1] (clipped; NaN is 0) or uint8, to uint8."""
  img = np.asarray(img)
  if img.dtype == np.uint8:
    return img
  return np.round(255 * np.clip(np.nan_to_num(img), 0, 1)).astype(np.uint8)


def write_png(path: str, img: np.ndarray) -> None:
  """Writes an image [h, w, 3], making its folder; the file is never seen half-written."""
  with files.whole(path) as temporary:
    Image.fromarray(to_uint8(img)).save(temporary, format='PNG')


def apply_colormap(x: np.ndarray) -> np.ndarray:
  """Values in [0, 1] (clipped; NaN is 0), dark to bright: [...] -> uint8 [..., 3]."""
  position = np.clip(np.nan_to_num(x), 0, 1) * (len(_COLORMAP) - 1)
  knots = np.arange(len(_COLORMAP))
  return to_uint8(np.stack([np.interp(position, knots, c) for c in _COLORMAP.T], -1))


def _finite(distance: np.ndarray) -> np.ndarray:
  """Distances as positive finite numbers; NaN counts as far away."""
  return np.clip(np.nan_to_num(distance, nan=np.inf), 1e-6, 1e12)


def _depth_curve(distance: np.ndarray) -> np.ndarray:
  """1 / sqrt(t): disparity brings out what is near, the logarithm what is far; this is between."""
  return 1 / np.sqrt(_finite(distance))


def depth_range(distance: np.ndarray, acc: np.ndarray) -> tuple[float, float]:
  """Near and far distance for `depth_picture`: 1st and 99th percentile weighted by opacity.

  `distance` and `acc` have one shape, any: one image, or several for a range common to them.
  """
  distance = _finite(np.ravel(distance))
  order = np.argsort(distance)
  cdf = np.cumsum(np.clip(np.nan_to_num(np.ravel(acc)[order]), 0, 1), dtype=np.float64)
  if not len(cdf) or cdf[-1] <= 0:
    return 1.0, 2.0
  picked = np.searchsorted(cdf, np.array([0.01, 0.99]) * cdf[-1])
  near, far = distance[order][np.minimum(picked, len(cdf) - 1)]
  return float(near), float(far)


def depth_picture(
  distance: np.ndarray, acc: np.ndarray, bounds: tuple[float, float] | None = None
) -> np.ndarray:
  """Distances [h, w] as colours, near bright and far dark; what is empty (acc 0) is white.

  `bounds` are the distances drawn brightest and darkest; None: `depth_range` of this image.
  """
  near, far = _depth_curve(np.array(bounds or depth_range(distance, acc)))
  x = (_depth_curve(distance) - far) / max(near - far, 1e-12)
  opacity = np.clip(np.nan_to_num(acc), 0, 1)[..., None]
  return to_uint8(opacity * (apply_colormap(x) / 255) + 1 - opacity)


def opacity_picture(acc: np.ndarray) -> np.ndarray:
  """Opacity [h, w] as grey: what is empty is black, what is opaque white."""
  return to_uint8(np.repeat(np.nan_to_num(acc)[..., None], 3, -1))


def normal_picture(normals: np.ndarray, acc: np.ndarray) -> np.ndarray:
  """Normals [h, w, 3] as colours: -1 to 1 along x, y, z as 0 to 1 of red, green, blue.

  `normals` are means by weight, of which acc [h, w] is the sum; what is empty is white.
  """
  opacity = np.clip(np.nan_to_num(acc), 0, 1)[..., None]
  return to_uint8((np.nan_to_num(normals) + opacity) / 2 + 1 - opacity)


def error_picture(img: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """Mean absolute difference over channels (its square root), brightest from ERROR_MAX up."""
  difference = to_uint8(img).astype(np.float32) - to_uint8(truth)
  return apply_colormap(np.sqrt(np.abs(difference).mean(-1) / 255 / ERROR_MAX))


def shrink(img: np.ndarray, max_width: int) -> np.ndarray:
  """[h, w, 3] as uint8, at most max_width wide, its proportions kept."""
  picture = Image.fromarray(to_uint8(img))
  if picture.width > max_width:
    height = max(1, round(picture.height * max_width / picture.width))
    picture = picture.resize((max_width, height), Image.Resampling.BOX)
  return np.asarray(picture)


def enlarge(img: np.ndarray, max_width: int) -> np.ndarray:
  """[h, w, 3] with each pixel repeated a whole number of times, as far as max_width allows."""
  times = max(1, max_width // img.shape[1])
  return to_uint8(img).repeat(times, 0).repeat(times, 1)


def sheet(
  images: Sequence[np.ndarray],
  captions: Sequence[str],
  columns: int | None = None,
  max_width: int = 800,
) -> np.ndarray:
  """Lays images out in rows, each with its caption above it.

  Args:
    images: [h, w, 3] each, of any sizes; wider ones are shrunk to max_width.
    captions: one each; cut off at a column's width.
    columns: images a row; None: all in one.
    max_width: in pixels.

  Returns:
    uint8 [h, w, 3].
  """
  columns = min(columns or len(images), len(images))
  pictures = [Image.fromarray(shrink(img, max_width)) for img in images]
  width = max(p.width for p in pictures)
  points = int(np.clip(width / 28, 9, 18))
  font, strip = ImageFont.load_default(points), points + 8
  rows = [pictures[k : k + columns] for k in range(0, len(pictures), columns)]
  tops = np.cumsum([_MARGIN] + [max(p.height for p in row) + strip + _MARGIN for row in rows])
  size = (columns * (width + _MARGIN) + _MARGIN, int(tops[-1]))
  canvas = Image.new('RGB', size, (_PAPER,) * 3)
  for k, (picture, caption) in enumerate(zip(pictures, captions)):
    x, y = _MARGIN + k % columns * (width + _MARGIN), int(tops[k // columns])
    label = Image.new('RGB', (width, strip), (_PAPER,) * 3)  # Cuts off what is too long.
    ImageDraw.Draw(label).text((2, 1), caption, fill=(_INK,) * 3, font=font)
    canvas.paste(label, (x, y))
    canvas.paste(picture, (x, y + strip))
  return np.asarray(canvas)


def comparison_sheet(
  rendering: Mapping[str, np.ndarray], truth: np.ndarray, note: str = ''
) -> np.ndarray:
  """Truth, prediction, error and depth of one view; the note stands beside 'prediction'.

  `rendering` has rgb [h, w, 3], distance_median and acc [h, w]; truth is [h, w, 3].
  """
  panels = {
    'truth': truth,
    f'prediction   {note}': rendering['rgb'],
    f'error (brightest: {ERROR_MAX:g} or more)': error_picture(rendering['rgb'], truth),
    'median depth (near is bright)': depth_picture(rendering['distance_median'], rendering['acc']),
  }
  return sheet([enlarge(img, 400) for img in panels.values()], list(panels), columns=2)


def contact_sheet(
  images: Sequence[np.ndarray], captions: Sequence[str], max_width: int = 320
) -> np.ndarray:
  """Pictures of many images, in about as many columns as make the whole 4:3."""
  images = [enlarge(img, max_width) for img in images]
  height, width = np.max([img.shape[:2] for img in images], axis=0)
  columns = int(np.ceil(np.sqrt(len(images) * 4 / 3 * height / width)))
  return sheet(images, captions, columns, max_width)


def _histogram(
  sdist: np.ndarray, weights: np.ndarray, rgb: np.ndarray | None, size: tuple[int, int]
) -> np.ndarray:
  """One ray's density over s in [0, 1] as bars, as high as it is to its own maximum.

  `sdist` [n + 1], `weights` [n], `rgb` [n, 3] the bars' colours or None; size (width, height).
  """
  width, height = size
  step = np.diff(sdist)
  density = np.where(step > 0, weights / np.maximum(step, 1e-9), 0)
  position = (np.arange(width) + 0.5) / width
  k = np.searchsorted(sdist, position, side='right') - 1
  inside = (k >= 0) & (k < len(weights))
  k = np.clip(k, 0, len(weights) - 1)
  # The square root keeps small densities visible beside a surface's peak.
  level = np.sqrt(np.where(inside, density[k], 0) / max(density.max(), 1e-9))
  filled = level[None] * height > np.arange(height)[::-1, None]
  color = np.full((width, 3), 0.45) if rgb is None else rgb[k]
  edges = np.isin(np.arange(width), np.round(sdist * width).astype(int))
  background = np.where(edges[:, None], 0.82, 0.93) * np.ones(3)
  return to_uint8(np.where(filled[..., None], color, background))


def ray_picture(
  sdist: Sequence[np.ndarray],
  weights: Sequence[np.ndarray],
  rgb: Sequence[np.ndarray | None],
  max_rays: int = 16,
  width: int = 960,
) -> np.ndarray:
  """The histograms of a few rays: a block a ray, a row of bars a level, s from 0 to 1 across.

  Args:
    sdist: of each level, [r, n + 1] endpoints in [0, 1]; bins' ends are drawn as ticks.
    weights: of each level, [r, n].
    rgb: of each level, [r, n, 3] colours of its bins, or None (drawn grey).
    max_rays: the r rays are thinned to these, evenly.
    width: of the bars, in pixels.

  Returns:
    uint8 [h, w, 3].
  """
  count = len(sdist[0])
  rays = np.unique(np.linspace(0, count - 1, min(count, max_rays)).round().astype(int))
  blocks = []
  for ray in rays:
    rows = []
    for s, w, color in zip(sdist, weights, rgb):
      bars = _histogram(s[ray], w[ray], None if color is None else color[ray], (width, 18))
      rows += [bars, np.full((2, width, 3), _PAPER, np.uint8)]
    blocks.append(np.concatenate(rows))
  captions = [f'ray {ray}' for ray in rays]
  return sheet(blocks, captions, columns=1, max_width=width)
