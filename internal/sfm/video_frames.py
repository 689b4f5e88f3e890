"""A video into a capture: of each stretch of it the sharpest frame."""

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
  """The video's frames in `count` stretches that differ by one frame at most; none is empty."""
  count = max(1, min(count, frames))
  ends = [frames * k // count for k in range(count + 1)]
  return [range(*pair) for pair in itertools.pairwise(ends)]


def sensible_count(frames: int, seconds: float) -> int:
  """Two pictures a second, but 100 to 300, as far as there are so many frames."""
  return min(frames, int(np.clip(PER_SECOND * seconds, FEWEST, MOST)))


def take_frames(path: str, scene_dir: str, count: int | None = None) -> list[photos_lib.Photo]:
  """Writes the sharpest frame of each of `count` stretches of a video to `scene_dir`/images.

  Frames are turned as the video asks. Those that a run before wrote are kept.

  Args:
    path: of the video.
    scene_dir: the capture.
    count: how many; None: `sensible_count`.

  Returns:
    The frames, in their order.

  Raises:
    PosesError: the file cannot be read as a video, or has fewer than three frames.
    VideoError: there is no decoder.
  """
  program = video.find_ffmpeg()
  frames, seconds = _count(path)
  stretches = windows(frames, count or sensible_count(frames, seconds))
  photos = []
  decoded = _decode(program, path)
  # The container may promise more frames than there are; the last stretches are then left out.
  for k, stretch in enumerate(progress.track(stretches, 'choosing frames')):
    best = _sharpest(stretch, decoded)
    if best is None:
      break
    score, number, pixels = best
    name = f'frame_{k:04d}.jpg'
    target = f'{photos_lib.FOLDER}/{name}'
    if not os.path.exists(os.path.join(scene_dir, target)):
      with photos_lib.placed(scene_dir, target) as temporary:
        Image.fromarray(pixels).save(temporary, **photos_lib.JPEG)
    photos.append(photos_lib.Photo(name, str(number), 'video', round(score, 6)))
  decoded.close()
  if len(photos) < 3:
    raise photos_lib.PosesError(
      f'{path}: has {len(photos)} frames, too few to pose. Film for longer.'
    )
  return photos


def _sharpest(stretch: range, decoded: Iterator[np.ndarray]):
  """Of the next frames, whose numbers are given: sharpness, number and pixels; None at the end."""
  best = None
  for number, pixels in zip(stretch, decoded):
    score = photos_lib.sharpness(pixels)
    if best is None or score > best[0]:
      best = score, number, pixels
  return best


def _count(path: str) -> tuple[int, float]:
  """(frames, seconds) of a video."""
  import imageio_ffmpeg

  try:
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(path)
  except (RuntimeError, OSError):
    frames, seconds = 0, 0.0
  if frames < 1:
    raise photos_lib.PosesError(
      f'{path}: cannot be read as a video. Name a video file, or a folder of photographs.'
    )
  return frames, seconds


def _decode(program: str, path: str) -> Iterator[np.ndarray]:
  """All frames of a video, uint8 [h, w, 3], upright."""
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
  """The next picture of a stream of binary PPM files; None at its end or where it is cut off."""
  if pipe.readline() != b'P6\n':
    return None
  width, height = map(int, pipe.readline().split())
  pipe.readline()  # The largest value, 255.
  data = pipe.read(3 * width * height)
  if len(data) < 3 * width * height:
    return None
  return np.frombuffer(data, np.uint8).reshape(height, width, 3)
