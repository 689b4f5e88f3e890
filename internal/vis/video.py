"""Encodes MP4 videos with the ffmpeg of the imageio-ffmpeg package."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tempfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..errors import UserError
from ..system import files


class VideoError(UserError):
  """Frames that cannot be encoded, or a missing encoder."""


def find_ffmpeg() -> str:
  """Returns the path of the ffmpeg program.

  Raises:
    VideoError: it is not installed.
  """
  try:
    import imageio_ffmpeg
  except ImportError:
    raise VideoError(
      'The video encoder is missing: pip install imageio-ffmpeg, then run the same command again.'
    ) from None
  try:
    return imageio_ffmpeg.get_ffmpeg_exe()
  except RuntimeError as e:
    raise VideoError(' '.join(str(e).split())) from None


def _read_even(path: str) -> np.ndarray:
  """Reads a frame as uint8 [h, w, 3], with odd sides padded, since H.264 needs even ones."""
  try:
    with open(path, 'rb') as f:  # Damaged lengths cannot read beyond the content.
      content = io.BytesIO(f.read())
    with Image.open(content) as picture:
      frame = np.asarray(picture.convert('RGB'))
  except Exception as e:  # Decoders raise many types.
    reason = ' '.join(str(e).split())
    raise VideoError(
      f'{path}: cannot be read as an image ({reason}). Delete it and render again.'
    ) from None
  height, width = frame.shape[:2]
  return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode='edge')


def write_video(frames: Sequence[str], path: str, fps: float = 60, crf: int = 18) -> None:
  """Encodes image files as H.264 (yuv420p, BT.709) in an .mp4, written atomically.

  Args:
    frames: image files of equal size, in order.
    path: the video's path.
    fps: frames per second.
    crf: constant rate factor, 0 (lossless) to 51 (worst).

  Raises:
    VideoError: there are no frames, their sizes differ, one is unreadable, fps or crf is out of
      range, or the encoder is missing or fails.
  """
  if not frames:
    raise VideoError(f'There are no frames for {path}.')
  if not fps > 0 or not 0 <= crf <= 51:
    raise VideoError(f'fps must be positive and crf in 0..51, got fps {fps}, crf {crf}.')
  try:
    program = find_ffmpeg()
  except VideoError as e:
    raise VideoError(f'{e} The frames are kept in {os.path.dirname(frames[0])}.') from None
  with files.whole(path) as temporary:
    _encode(program, frames, temporary, fps, crf)


def _encode(program: str, frames: Sequence[str], path: str, fps: float, crf: int) -> None:
  first = _read_even(frames[0])
  height, width = first.shape[:2]
  command = [
    *(program, '-v', 'error', '-y'),
    *('-f', 'rawvideo', '-pix_fmt', 'rgb24', '-s', f'{width}x{height}', '-r', str(fps), '-i', '-'),
    *('-c:v', 'libx264', '-crf', str(crf), '-pix_fmt', 'yuv420p'),
    # Without these tags, players guess the matrix from the size and colours shift.
    *('-vf', 'scale=out_color_matrix=bt709:out_range=tv'),
    *('-colorspace', 'bt709', '-color_primaries', 'bt709', '-color_trc', 'bt709'),
    *('-movflags', '+faststart', path),
  ]
  # The package's own writer drops the exit code, and forks despite JAX's threads.
  with tempfile.TemporaryFile() as log:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
    try:
      _send(process.stdin, frames, first.shape)
      code = process.wait()
    finally:
      process.kill()
      process.wait()
    if code:
      log.seek(0)
      output = ' '.join(log.read().decode(errors='replace').split()) or f'exit code {code}'
      raise VideoError(f'The video encoder failed: {output[-300:]}. The frames are kept.')


def _send(pipe, frames: Sequence[str], shape: tuple[int, ...]) -> None:
  with contextlib.suppress(BrokenPipeError), pipe:  # The exit code tells why the pipe broke.
    for name in frames:
      frame = _read_even(name)
      if frame.shape != shape:
        raise VideoError(
          f'{name}: is {frame.shape[1]}x{frame.shape[0]}, the first frame {shape[1]}x{shape[0]}. '
          'Delete it and render again.'
        )
      pipe.write(np.ascontiguousarray(frame))
