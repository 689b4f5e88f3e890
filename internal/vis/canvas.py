"""A canvas with smooth lines, for pictures of scenes, cameras and paths (Pillow).

Everything is drawn at `FINE` times its size and then reduced. Coordinates, widths and font sizes
are pixels of the finished picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FINE = 2

Color = tuple[int, ...] | str


class Canvas:
  """Shapes, text and images on a background."""

  def __init__(
    self, width: int, height: int, background: Color = 'white', ink: Color = 'black', halo: int = 0
  ):
    """Makes an empty canvas; text is in `ink`, in a white outline of width `halo`."""
    self.image = Image.new('RGB', (width * FINE, height * FINE), background)
    self._draw = ImageDraw.Draw(self.image)
    self._ink, self._halo = ink, halo

  def text(
    self, x: float, y: float, text: str, size: int = 17, color: Color | None = None, anchor='la'
  ) -> None:
    """Writes text; `anchor` is Pillow's."""
    font, place, halo = ImageFont.load_default(size * FINE), (x * FINE, y * FINE), self._halo
    color = color or self._ink
    self._draw.text(place, text, color, font, anchor, stroke_width=halo * FINE, stroke_fill='white')

  def box(self, x0, y0, x1, y1, color: Color | None, radius=0.0, outline=None) -> None:
    """Draws a filled rectangle with rounded corners, or an outline of width 1."""
    corners = [round(v * FINE) for v in (x0, y0, x1, y1)]
    self._draw.rounded_rectangle(corners, radius * FINE, color, outline, FINE if outline else 1)

  def disc(self, x, y, radius: float, color: Color | None, outline=None, width=1.0) -> None:
    """Draws a filled disc, or a circle where `color` is None."""
    x, y, r = x * FINE, y * FINE, radius * FINE
    self._draw.ellipse([x - r, y - r, x + r, y + r], color, outline, round(width * FINE))

  def line(self, points: Sequence, color: Color, width: float = 1.0, joint=None) -> None:
    """Draws a line through `points` (x, y); `joint` is Pillow's."""
    scaled = [(x * FINE, y * FINE) for x, y in points]
    self._draw.line(scaled, color, max(1, round(width * FINE)), joint)

  def polygon(self, points: Sequence, color: Color) -> None:
    """Draws a filled polygon with corners (x, y)."""
    self._draw.polygon([(x * FINE, y * FINE) for x, y in points], color)

  def pyramid(self, corners: np.ndarray, color: Color, width: float = 1.0) -> None:
    """Draws a camera's view: `corners` [5, 2] are its centre and the four corners of its image."""
    eye, *image = corners
    self.line([*image, image[0]], color, width)
    for corner in image:
      self.line([eye, corner], color, width)

  def paste(self, x: float, y: float, pixels: np.ndarray, radius: float = 0) -> None:
    """Pastes uint8 `pixels` [FINE * h, FINE * w, 3], with rounded corners."""
    picture = Image.fromarray(pixels)
    mask = Image.new('L', picture.size, 0)
    corners = 0, 0, picture.width - 1, picture.height - 1
    ImageDraw.Draw(mask).rounded_rectangle(corners, radius * FINE, fill=255)
    self.image.paste(picture, (round(x * FINE), round(y * FINE)), mask)

  def finished(self) -> np.ndarray:
    """Returns the picture, uint8 [h, w, 3]."""
    size = self.image.width // FINE, self.image.height // FINE
    return np.asarray(self.image.resize(size, Image.Resampling.BOX))
