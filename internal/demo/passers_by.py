"""People who walk through: figures that are pasted into some photographs of a capture."""

from __future__ import annotations

import numpy as np

_MOST = 2  # Figures in a photograph.


def paste(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns an image uint8 [h, w, 3] with one or two upright ellipses of striped cloth in it.

  Each is half to nine tenths of the image high, a third as wide and cut by the image's border, and
  has colours, stripes and folds of its own.
  """
  height, width = image.shape[:2]
  y, x = np.mgrid[:height, :width] + 0.5
  result = image.astype(np.float64)
  for _ in range(rng.integers(1, _MOST + 1)):
    tall = rng.uniform(0.5, 0.9) * height / 2  # Half axes in pixels.
    wide = tall * rng.uniform(0.28, 0.4)
    dx, dy = x - rng.uniform(0, width), y - rng.uniform(0.45, 0.75) * height
    reach = np.hypot(dx / wide, dy / tall)
    alpha = np.clip((1 - reach) * wide + 0.5, 0, 1)[..., None]  # Edges are a pixel wide.
    angle, turns = rng.uniform(0, np.pi), rng.uniform(2, 8)
    phase = (np.cos(angle) * dx + np.sin(angle) * dy) / tall * turns * np.pi
    stripes = (0.5 + 0.5 * np.sin(phase + rng.uniform(0, 2 * np.pi)))[..., None]
    colors = rng.uniform(20, 235, (2, 3))
    folds = 1 + 0.15 * np.sin(5 * dx / wide + rng.uniform(0, 2 * np.pi))[..., None]
    cloth = folds * (stripes * colors[0] + (1 - stripes) * colors[1])
    result = (1 - alpha) * result + alpha * cloth
  return (np.clip(result, 0, 255) + 0.5).astype(np.uint8)


def choose(count: int, fraction: float, rng: np.random.Generator, hold: int = 8) -> np.ndarray:
  """Returns the rows, ascending, of this fraction of `count` images, none of them held out.

  Every `hold`-th image from the first on is held out (Config.llffhold).
  """
  rows = np.flatnonzero(np.arange(count) % hold)
  return np.sort(rng.choice(rows, round(fraction * len(rows)), replace=False))
