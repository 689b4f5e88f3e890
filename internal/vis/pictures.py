"""Visualises depth, normals, opacity, errors and ray histograms, and lays out image sheets.

Inputs are images [h, w, 3], float in [0, 1] or uint8, and maps [h, w]; outputs are uint8 [h, w, 3].
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..system import files

# A colour map in OKLCh, from dark blue over violet and orange to pale yellow. Lightness rises
# linearly, so that it is perceptually uniform and also works in grey.
_LIGHTNESS = (0.13, 0.97)
_HUES = (262, 290, 330, 372, 402, 430, 465)  # Degrees.
_CHROMAS = (0.06, 0.16, 0.185, 0.17, 0.15, 0.15, 0.07)

ERROR_MAX = 0.3  # The error drawn brightest; fixed, to make pictures comparable.
_PAPER, _INK = 250, 40
_MARGIN = 6


def _oklab_to_srgb(lab: np.ndarray) -> np.ndarray:
  """Converts OKLab (Ottosson 2020) [..., 3] to sRGB in [0, 1]."""
  to_lms = np.array([
    [1, 0.3963377774, 0.2158037573],
    [1, -0.1055613458, -0.0638541728],
    [1, -0.0894841775, -1.2914855480],
  ])  # fmt: skip
  to_rgb = np.array([
    [4.0767416621, -3.3077115913, 0.2309699292],
    [-1.2684380046, 2.6097574011, -0.3413193965],
    [-0.0041960863, -0.7034186147, 1.7076147010],
  ])  # fmt: skip
  linear = np.clip((lab @ to_lms.T) ** 3 @ to_rgb.T, 0, 1)
  return np.where(
    linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055
  )


def _make_colormap() -> np.ndarray:
  """Returns the colour map as a table [256, 3] in [0, 1]."""
  x = np.linspace(0, 1, 256)
  knots = np.linspace(0, 1, len(_HUES))
  hue = np.deg2rad(np.interp(x, knots, _HUES))
  chroma = np.interp(x, knots, _CHROMAS)
  lightness = _LIGHTNESS[0] + (_LIGHTNESS[1] - _LIGHTNESS[0]) * x
  return _oklab_to_srgb(np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], -1))


_COLORMAP = _make_colormap()


def to_uint8(img: np.ndarray) -> np.ndarray:
  """Converts floats in [0, 1] (clipped; NaN becomes 0) to uint8; uint8 is returned as is."""
  img = np.asarray(img)
  if img.dtype == np.uint8:
    return img
  return np.round(255 * np.clip(np.nan_to_num(img), 0, 1)).astype(np.uint8)


def write_png(path: str, img: np.ndarray) -> None:
  """Writes an image [h, w, 3] atomically; creates the folder if necessary."""
  with files.whole(path) as temporary:
    # Half the time of the default compression, and 3% larger for photographs.
    Image.fromarray(to_uint8(img)).save(temporary, format='PNG', compress_level=1)


def apply_colormap(x: np.ndarray) -> np.ndarray:
  """Maps values in [0, 1] (clipped; NaN becomes 0) to colours, dark to bright: uint8 [..., 3]."""
  position = np.clip(np.nan_to_num(x), 0, 1) * (len(_COLORMAP) - 1)
  knots = np.arange(len(_COLORMAP))
  return to_uint8(np.stack([np.interp(position, knots, c) for c in _COLORMAP.T], -1))


def _finite(distance: np.ndarray) -> np.ndarray:
  """Clips distances to positive finite numbers; NaN counts as far away."""
  return np.clip(np.nan_to_num(distance, nan=np.inf), 1e-6, 1e12)


def _depth_curve(distance: np.ndarray) -> np.ndarray:
  """Returns 1 / sqrt(t), which balances near and far better than disparity or log distance."""
  return 1 / np.sqrt(_finite(distance))


def depth_range(distance: np.ndarray, acc: np.ndarray) -> tuple[float, float]:
  """Returns near and far for `depth_picture`: 1st and 99th percentile, weighted by opacity.

  `distance` and `acc` have equal shapes, of one image or of several that share a range.
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
  """Colours distances [h, w], near bright and far dark; empty space (acc 0) is white.

  `bounds` are the distances drawn brightest and darkest, by default `depth_range` of the image.
  """
  near, far = _depth_curve(np.array(bounds or depth_range(distance, acc)))
  x = (_depth_curve(distance) - far) / max(near - far, 1e-12)
  opacity = np.clip(np.nan_to_num(acc), 0, 1)[..., None]
  return to_uint8(opacity * (apply_colormap(x) / 255) + 1 - opacity)


def opacity_picture(acc: np.ndarray) -> np.ndarray:
  """Converts opacity [h, w] to grey: empty space is black, opaque is white."""
  return to_uint8(np.repeat(np.nan_to_num(acc)[..., None], 3, -1))


def normal_picture(normals: np.ndarray, acc: np.ndarray) -> np.ndarray:
  """Colours normals [h, w, 3]: x, y, z from -1 to 1 become red, green, blue from 0 to 1.

  `normals` are weighted sums over a ray and `acc` [h, w] is the sum of the weights; empty space is
  white.
  """
  opacity = np.clip(np.nan_to_num(acc), 0, 1)[..., None]
  return to_uint8((np.nan_to_num(normals) + opacity) / 2 + 1 - opacity)


def error_picture(img: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """Colours the square root of the mean absolute error over channels; ERROR_MAX is brightest."""
  difference = to_uint8(img).astype(np.float32) - to_uint8(truth)
  return apply_colormap(np.sqrt(np.abs(difference).mean(-1) / 255 / ERROR_MAX))


def shrink(img: np.ndarray, max_width: int) -> np.ndarray:
  """Shrinks an image to at most `max_width`, keeping its aspect ratio; returns uint8."""
  picture = Image.fromarray(to_uint8(img))
  if picture.width > max_width:
    height = max(1, round(picture.height * max_width / picture.width))
    picture = picture.resize((max_width, height), Image.Resampling.BOX)
  return np.asarray(picture)


def enlarge(img: np.ndarray, max_width: int) -> np.ndarray:
  """Enlarges an image by the largest whole factor that fits into `max_width`."""
  times = max(1, max_width // img.shape[1])
  return to_uint8(img).repeat(times, 0).repeat(times, 1)


def sheet(
  images: Sequence[np.ndarray],
  captions: Sequence[str],
  columns: int | None = None,
  max_width: int = 800,
) -> np.ndarray:
  """Lays out images in rows, each below its caption.

  Args:
    images: [h, w, 3] of any sizes; wider ones are shrunk to max_width.
    captions: one per image; cut off at the column's width.
    columns: images per row; None for a single row.
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
    label = Image.new('RGB', (width, strip), (_PAPER,) * 3)  # Cuts off long captions.
    ImageDraw.Draw(label).text((2, 1), caption, fill=(_INK,) * 3, font=font)
    canvas.paste(label, (x, y))
    canvas.paste(picture, (x, y + strip))
  return np.asarray(canvas)


def comparison_sheet(
  rendering: Mapping[str, np.ndarray], truth: np.ndarray, note: str = ''
) -> np.ndarray:
  """Lays out truth, prediction, error and depth of a view; `note` follows 'prediction'.

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
  """Lays out many images on a sheet of about 4:3."""
  images = [enlarge(img, max_width) for img in images]
  height, width = np.max([img.shape[:2] for img in images], axis=0)
  columns = int(np.ceil(np.sqrt(len(images) * 4 / 3 * height / width)))
  return sheet(images, captions, columns, max_width)


def _histogram(
  sdist: np.ndarray, weights: np.ndarray, rgb: np.ndarray | None, size: tuple[int, int]
) -> np.ndarray:
  """Draws a ray's density over s in [0, 1] as bars, relative to its maximum.

  `sdist` is [n + 1], `weights` [n]; `rgb` [n, 3] are the bars' colours; `size` is (width, height).
  """
  width, height = size
  step = np.diff(sdist)
  density = np.where(step > 0, weights / np.maximum(step, 1e-9), 0)
  position = (np.arange(width) + 0.5) / width
  k = np.searchsorted(sdist, position, side='right') - 1
  inside = (k >= 0) & (k < len(weights))
  k = np.clip(k, 0, len(weights) - 1)
  # The square root keeps small densities visible next to a surface's peak.
  level = np.sqrt(np.where(inside, density[k], 0) / max(density.max(), 1e-9))
  filled = level[None] * height > np.arange(height)[::-1, None]
  color = np.full((width, 3), 0.45) if rgb is None else rgb[k]
  edges = np.isin(np.arange(width), np.round(sdist * width).astype(int))
  background = np.where(edges[:, None], 0.82, 0.93) * np.ones(3)
  return to_uint8(np.where(filled[..., None], color, background))


_RAY_LEGEND = (
  'Where samples lie along rays of a test image. One block per ray, one row per level: proposals '
  'first, the last level below.',
  "Bars: density, as the square root of its share of the row's highest. Colour: of the interval; "
  'grey: the level has none.',
  'Dark ticks: ends of intervals; the next level samples where the bars are.',
)
_TICKS = 4  # The axis is labelled at 0, 1/4, ... 1.


def _text_lines(lines: Sequence[str], width: int) -> np.ndarray:
  """Writes lines of text: uint8 [16 n + 4, width, 3]; long ones are cut off."""
  strip = Image.new('RGB', (width, 16 * len(lines) + 4), (_PAPER,) * 3)
  draw, font = ImageDraw.Draw(strip), ImageFont.load_default(12)
  for k, line in enumerate(lines):
    draw.text((0, 16 * k), line, fill=(_INK,) * 3, font=font)
  return np.asarray(strip)


def _axis(width: int, s_to_t: Callable | None) -> np.ndarray:
  """Draws the axis of s from 0 to 1, with metric distances t if `s_to_t` maps to them."""
  strip = Image.new('RGB', (width, 38), (_PAPER,) * 3)
  draw, font = ImageDraw.Draw(strip), ImageFont.load_default(12)
  draw.line([(0, 0), (width, 0)], (_INK,) * 3)
  for k in range(_TICKS + 1):
    s = k / _TICKS
    label = f's = {s:g}' if s_to_t is None else f's = {s:g}, t = {float(s_to_t(s)):.3g}'
    x, anchor = min(round(s * width), width - 1), 'lr'[k == _TICKS] if k in (0, _TICKS) else 'm'
    draw.line([(x, 0), (x, 5)], (_INK,) * 3)
    draw.text((x, 7), label, (_INK,) * 3, font, f'{anchor}a')
  title = 's: position along the ray between near (0) and far (1), as it is sampled'
  if s_to_t is not None:
    title += '; t: distance, where the cameras fill [-1, 1]'
  draw.text((0, 22), title, (_INK,) * 3, font)
  return np.asarray(strip)


def ray_picture(
  sdist: Sequence[np.ndarray],
  weights: Sequence[np.ndarray],
  rgb: Sequence[np.ndarray | None],
  max_rays: int = 16,
  width: int = 960,
  s_to_t: Callable | None = None,
) -> np.ndarray:
  """Draws histograms of a few rays: one block per ray, one row per level, with axis and legend.

  Args:
    sdist: interval endpoints in [0, 1] by level, [r, n + 1]; drawn as ticks.
    weights: by level, [r, n].
    rgb: colours of the intervals by level, [r, n, 3], or None for grey.
    max_rays: how many of the r rays to draw, evenly chosen.
    width: of a histogram, in pixels.
    s_to_t: maps s to the distance t for the axis; None writes only s.

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
  captions = [f'ray {ray + 1} of {count}, along the diagonal from the top left' for ray in rays]
  parts = [_text_lines(_RAY_LEGEND, width), sheet(blocks, captions, 1, width), _axis(width, s_to_t)]
  margin = ((0, 0), (_MARGIN, _MARGIN), (0, 0))
  parts = [p if k == 1 else np.pad(p, margin, constant_values=_PAPER) for k, p in enumerate(parts)]
  return np.concatenate(parts)
