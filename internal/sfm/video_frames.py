"""Extracts frames of a video into a capture: the sharpest one of each window of time.

Windows in which the camera stands still since the last frame are left out. Frames are upright, by
the video's rotation, and HDR colours (HLG or PQ) become ordinary ones.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ..system import progress, warnings
from ..vis import video
from . import photo_files, repeats
from . import photos as photos_lib

PER_SECOND, FEWEST, MOST = 2.0, 100, 300
_WHOLE, _ROUNDING = 0.9, 0.5  # A video is whole with this share of its length, less seconds.
_HDR = re.compile(r'Video:.*\b(arib-std-b67|smpte2084)\b')  # As ffmpeg names HLG and PQ.
# White is 203 cd/m2 (ITU-R BT.2408). Light from 80% of it to 1,000 cd/m2 is compressed.
_TO_SDR = (
  'zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,'
  'tonemap=mobius:param=0.8:desat=0:peak=5,zscale=t=iec61966-2-1:m=gbr:r=full,format=gbrp'
)


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

  There are fewer frames if the camera rests. Those that an earlier run wrote are kept.

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
  photos, last, still = [], None, 0
  decoded = _decode(program, path)
  frame_ranges = windows(frames, count or sensible_count(frames, seconds))
  for k, window in enumerate(progress.track(frame_ranges, 'choosing frames')):
    best = _sharpest(window, decoded)
    if best is None:  # The container announced more frames than it has.
      break
    score, number, pixels = best
    small = repeats.thumbnail(pixels)
    if last is not None and repeats.movement(last, small) < repeats.STILL_VIDEO:
      still += 1
      continue
    last = small
    name = f'frame_{k:04d}.jpg'
    target = f'{photos_lib.FOLDER}/{name}'
    if not os.path.exists(os.path.join(scene_dir, target)):
      with photos_lib.atomic_write(scene_dir, target) as temporary:
        Image.fromarray(pixels).save(temporary, **photos_lib.JPEG)
    photos.append(photos_lib.Photo(name, str(number), 'video', round(score, 6)))
  decoded.close()
  if len(photos) < 3:
    raise photos_lib.PosesError(
      f'{path}: has {warnings.count(len(photos), "frame")}'
      f'{" in which something moves" if still else ""}; at least 3 are needed. Use a longer video.'
    )
  if still:
    print(
      f'Note: {path}: {still} of {still + len(photos)} frames are left out: nothing moved since '
      'the one before.',
      file=sys.stderr,
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
  """Returns (frames, seconds) of a video; warns if its end is missing."""
  import imageio_ffmpeg

  try:
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(path)
  except (RuntimeError, OSError):
    frames, seconds = 0, 0.0
  if frames < 1:
    if path.lower().endswith(photo_files.VIDEOS):
      raise photos_lib.PosesError(
        f'{path}: cannot be read as a video: it is damaged or incomplete (a download or recording '
        'that was cut off?). Copy it again, or record a new one.'
      )
    raise photos_lib.PosesError(
      f'{path}: cannot be read as a video. Name a video, or a folder of photographs.'
    )
  with contextlib.closing(imageio_ffmpeg.read_frames(path)) as reader:
    announced = next(reader)['duration']
  if seconds < _WHOLE * announced - _ROUNDING:
    warnings.warn(
      f'{path}: only {progress.duration(seconds)} of {progress.duration(announced)} can be read. '
      'It may be cut off or damaged; if the rest is needed, copy it again.'
    )
  return frames, seconds


def _decode(program: str, path: str) -> Iterator[np.ndarray]:
  """Yields all frames of a video, uint8 [h, w, 3], upright."""
  command = [program, '-v', 'error', '-nostdin', '-i', path, '-map', '0:v:0']
  command += [
    *_colours(program, path),
    '-fps_mode',
    'passthrough',
    '-f',
    'image2pipe',
    '-c:v',
    'ppm',
    '-pix_fmt',
    'rgb24',
    '-',
  ]
  with tempfile.TemporaryFile() as log:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    try:
      while (frame := _read_ppm(process.stdout)) is not None:
        yield frame
    finally:
      process.kill()
      process.stdout.close()
      process.wait()


def _colours(program: str, path: str) -> list[str]:
  """Returns ffmpeg's options that turn HDR colours into ordinary ones."""

  def output(*args: str) -> str:
    done = subprocess.run([program, '-hide_banner', *args], capture_output=True)
    return (done.stdout + done.stderr).decode(errors='replace')

  if not _HDR.search(output('-nostdin', '-i', path)):
    return []
  filters = output('-filters')
  if all(f' {name} ' in filters for name in ('zscale', 'tonemap')):
    return ['-vf', _TO_SDR]
  warnings.warn(
    f'{path}: has HDR colours, which this ffmpeg cannot convert; they look pale. Record without '
    'HDR, or unset IMAGEIO_FFMPEG_EXE.'
  )
  return []


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
