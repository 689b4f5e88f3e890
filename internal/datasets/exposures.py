"""Exposure of photographs, from their EXIF data."""

from __future__ import annotations

import math

from PIL import ExifTags, Image

from ..system import files
from . import images, scenes


def log_exposures(data_dir: str, scene: scenes.Scene) -> tuple[float, ...] | None:
  """Returns the log of each training photograph's exposure; None unless all of them have it.

  Exposure is shutter time times ISO speed over the squared f-number. A photograph of the same
  surface is brighter by this factor, in linear light, as far as the camera does not process it.
  """
  found = images.in_threads(lambda i: _log_exposure(data_dir, scene, i), scene.train)
  return None if None in found else tuple(found)


def _log_exposure(data_dir: str, scene: scenes.Scene, i: int) -> float | None:
  # Downsampled pictures have no EXIF data; the full-size ones in images/ do.
  for name in (scene.files[i], scene.names[i], images.join('images', scene.names[i])):
    if images.is_relative(name) and (found := read(images.inside(data_dir, name))) is not None:
      return found
  return None


def read(path: str) -> float | None:
  """Reads log(shutter time in seconds * ISO speed / f-number^2); None if any of them is unknown."""
  tags = ExifTags.Base
  try:
    if not files.is_file(path):
      return None
    with Image.open(path) as image:
      # Pillow decodes a whole PNG to search for EXIF data after its pixels.
      if image.format == 'PNG' and 'exif' not in image.info:
        return None
      details = image.getexif().get_ifd(ExifTags.IFD.Exif)
    seconds, aperture, speed = (
      details.get(tag) for tag in (tags.ExposureTime, tags.FNumber, tags.ISOSpeedRatings)
    )
    speed = speed[0] if isinstance(speed, tuple) else speed
    exposure = math.log(float(seconds) * float(speed) / float(aperture) ** 2)
  except Exception:  # Damaged EXIF data raises many types, and unknown values are None.
    return None
  return exposure if math.isfinite(exposure) else None
