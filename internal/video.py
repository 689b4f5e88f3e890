"""MP4 videos from frame files, by the encoder that the imageio-ffmpeg package brings along."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image


class VideoError(ValueError):
  """Frames that cannot be encoded, or no encoder; the message says what to do."""


def _load_encoder(folder: str):
  try:
    import imageio_ffmpeg
  except ImportError:
    raise VideoError(
      f'The video encoder is missing: pip install imageio-ffmpeg, then run the same command again. '
      f'The frames are kept in {folder}.'
    ) from None
  return imageio_ffmpeg


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
  encoder = _load_encoder(os.path.dirname(frames[0]))
  first = _read_even(frames[0])
  temporary = f'{path}.{os.getpid()}.part.mp4'
  try:
    stream = encoder.write_frames(
      temporary,
      first.shape[1::-1],
      fps=fps,
      codec='libx264',
      quality=None,
      macro_block_size=2,
      ffmpeg_log_level='error',
      # Without the tag players guess the matrix by the size, and colours shift.
      output_params=[
        *('-crf', str(crf)),
        *('-vf', 'scale=out_color_matrix=bt709:out_range=tv'),
        *('-colorspace', 'bt709', '-color_primaries', 'bt709', '-color_trc', 'bt709'),
        *('-movflags', '+faststart'),
      ],
    )
    _send(stream, frames, first.shape)
    _check_count(encoder, temporary, len(frames))
    os.replace(temporary, path)
  finally:
    if os.path.exists(temporary):
      os.remove(temporary)


def _send(stream, frames: Sequence[str], shape: tuple[int, ...]) -> None:
  stream.send(None)
  try:
    for name in frames:
      frame = _read_even(name)
      if frame.shape != shape:
        raise VideoError(
          f'{name}: is {frame.shape[1]}x{frame.shape[0]}, the first frame {shape[1]}x{shape[0]}. '
          'Delete it and render again.'
        )
      stream.send(np.ascontiguousarray(frame))
  except OSError as e:
    raise VideoError(f'The video encoder stopped: {" ".join(str(e).split())}.') from None
  finally:
    stream.close()


def _check_count(encoder, path: str, wanted: int) -> None:
  """ffmpeg's exit code is lost in the package, so the file itself is asked."""
  try:
    count, _ = encoder.count_frames_and_secs(path)
  except (RuntimeError, OSError):
    count = 0
  if count != wanted:
    raise VideoError(
      f'The video encoder wrote {count} of {wanted} frames (is the disk full?). The frames are '
      'kept; run the same command again.'
    )
