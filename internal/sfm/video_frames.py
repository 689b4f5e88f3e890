"""Extracts frames of a video into a capture: the sharpest one of each window of time."""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ..system import progress
from ..vis import video
from . import photos as photos_lib

PER_SECOND, FEWEST, MOST = 2.0, 100, 300


def windows(frames: int, count: int) -> list[range]:
  """Splits the frames of a video into `count` windows, whose lengths differ by at most one.

  If there are fewer frames than windows, each frame is a window.
  """
  count = max(1, min(count, frames))
  ends = [frames * k // count for k in range(count + 1)]
  return [range(*pair) for pair in itertools.pairwise(ends)]


def sensible_count(frames: int, seconds: float) -> int:
  """Returns two frames a second, clipped to 100 to 300, and at most all frames."""
  return min(frames, int(np.clip(PER_SECOND * seconds, FEWEST, MOST)))


def extract_frames(path: str, scene_dir: str, count: int | None = None) -> list[photos_lib.Photo]:
  """Writes the sharpest frame of each of `count` windows of a video to `scene_dir`/images.

  Frames are upright. Those that an earlier run wrote are kept.

  Args:
    path: the video.
    scene_dir: the capture.
    count: number of frames; None: `sensible_count`.

  Returns:
    The frames, in order.

  Raises:
    PosesError: the file cannot be read as a video, or has fewer than three frames.
    VideoError: ffmpeg is not installed.
  """
  program = video.find_ffmpeg()
  frames, seconds = _count(path)
  photos = []
  decoded = _decode(program, path)
  frame_ranges = windows(frames, count or sensible_count(frames, seconds))
  for k, window in enumerate(progress.track(frame_ranges, 'choosing frames')):
    best = _sharpest(window, decoded)
    if best is None:  # The container announced more frames than it has.
      break
    score, number, pixels = best
    name = f'frame_{k:04d}.jpg'
    target = f'{photos_lib.FOLDER}/{name}'
    if not os.path.exists(os.path.join(scene_dir, target)):
      with photos_lib.atomic_write(scene_dir, target) as temporary:
        Image.fromarray(pixels).save(temporary, **photos_lib.JPEG)
    photos.append(photos_lib.Photo(name, str(number), 'video', round(score, 6)))
  decoded.close()
  if len(photos) < 3:
    raise photos_lib.PosesError(
      f'{path}: has {len(photos)} frames; at least 3 are needed. Use a longer video.'
    )
  return photos


def _sharpest(window: range, decoded: Iterator[np.ndarray]):
  """Returns (sharpness, number, pixels) of the sharpest frame of a window, None after the last."""
  best = None
  for number, pixels in zip(window, decoded):
    score = photos_lib.sharpness(pixels)
    if best is None or score > best[0]:
      best = score, number, pixels
  return best


def _count(path: str) -> tuple[int, float]:
  """Returns (frames, seconds) of a video."""
  import imageio_ffmpeg

  try:
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(path)
  except (RuntimeError, OSError):
    frames, seconds = 0, 0.0
  if frames < 1:
    raise photos_lib.PosesError(
      f'{path}: cannot be read as a video. Name a video, or a folder of photographs.'
    )
  return frames, seconds


def _decode(program: str, path: str) -> Iterator[np.ndarray]:
  """Yields all frames of a video, uint8 [h, w, 3], upright."""
  command = [program, '-v', 'error', '-nostdin', '-i', path, '-map', '0:v:0', '-fps_mode']
  command += ['passthrough', '-f', 'image2pipe', '-c:v', 'ppm', '-pix_fmt', 'rgb24', '-']
  with tempfile.TemporaryFile() as log:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    try:
      while (frame := _read_ppm(process.stdout)) is not None:
        yield frame
    finally:
      process.kill()
      process.stdout.close()
      process.wait()


def _read_ppm(pipe) -> np.ndarray | None:
  """Reads the next picture of a stream of binary PPM files; None at its end or if truncated."""
  if pipe.readline() != b'P6\n':
    return None
  width, height = map(int, pipe.readline().split())
  pipe.readline()  # The maximum value, 255.
  data = pipe.read(3 * width * height)
  if len(data) < 3 * width * height:
    return None
  return np.frombuffer(data, np.uint8).reshape(height, width, 3)
