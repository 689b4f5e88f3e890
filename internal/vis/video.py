"""MP4 videos from frame files, by the encoder that the imageio-ffmpeg package brings along."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..errors import UserError
from ..system import files


class VideoError(UserError):
  """Frames that cannot be encoded, or no encoder; the message says what to do."""


def find_ffmpeg() -> str:
  """The program that encodes and decodes videos.

  Raises:
    VideoError: there is none.
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


def _find_encoder(folder: str) -> str:
  """The encoder's program; `folder` is where the frames are."""
  try:
    return find_ffmpeg()
  except VideoError as e:
    raise VideoError(f'{e} The frames are kept in {folder}.') from None


def _read_even(path: str) -> np.ndarray:
  """A frame as uint8 [h, w, 3]; odd sides repeat their last line: H.264 wants even ones."""
  try:
    with Image.open(path) as picture:
      frame = np.asarray(picture.convert('RGB'))
  except OSError as e:
    reason = ' '.join(str(e).split())
    raise VideoError(
      f'{path}: cannot be read as a frame ({reason}). Delete it and render again.'
    ) from None
  height, width = frame.shape[:2]
  return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode='edge')


def write_video(frames: Sequence[str], path: str, fps: float = 60, crf: int = 18) -> None:
  """Encodes image files, in their order, as H.264 (yuv420p, BT.709) in an .mp4.

  The video appears under its name when it is whole.

  Args:
    frames: files, all of one size.
    path: of the video.
    fps: frames a second.
    crf: constant rate factor, 0 (lossless) to 51 (worst).

  Raises:
    VideoError: no frames, sizes that differ, an unreadable frame, a bad fps or crf, no encoder, or
      an encoder that fails.
  """
  if not frames:
    raise VideoError(f'There are no frames to make {path} of.')
  if not fps > 0 or not 0 <= crf <= 51:
    raise VideoError(f'A video needs fps > 0 and crf in 0..51, got fps {fps}, crf {crf}.')
  program = _find_encoder(os.path.dirname(frames[0]))
  with files.whole(path) as temporary:
    _encode(program, frames, temporary, fps, crf)


def _encode(program: str, frames: Sequence[str], path: str, fps: float, crf: int) -> None:
  first = _read_even(frames[0])
  height, width = first.shape[:2]
  command = [
    *(program, '-v', 'error', '-y'),
    *('-f', 'rawvideo', '-pix_fmt', 'rgb24', '-s', f'{width}x{height}', '-r', str(fps), '-i', '-'),
    *('-c:v', 'libx264', '-crf', str(crf), '-pix_fmt', 'yuv420p'),
    # Without the tags players guess the matrix by the size, and colours shift.
    *('-vf', 'scale=out_color_matrix=bt709:out_range=tv'),
    *('-colorspace', 'bt709', '-color_primaries', 'bt709', '-color_trc', 'bt709'),
    *('-movflags', '+faststart', path),
  ]
  # Not by the package's own writer: that loses the exit code, and forks under JAX's threads.
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
      said = ' '.join(log.read().decode(errors='replace').split()) or f'exit code {code}'
      raise VideoError(f'The video encoder failed: {said[-300:]}. The frames are kept.')


def _send(pipe, frames: Sequence[str], shape: tuple[int, ...]) -> None:
  with contextlib.suppress(BrokenPipeError), pipe:  # Its exit code says more.
    for name in frames:
      frame = _read_even(name)
      if frame.shape != shape:
        raise VideoError(
          f'{name}: is {frame.shape[1]}x{frame.shape[0]}, the first frame {shape[1]}x{shape[0]}. '
          'Delete it and render again.'
        )
      pipe.write(np.ascontiguousarray(frame))
