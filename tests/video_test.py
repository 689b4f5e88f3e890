import os
import sys

import imageio_ffmpeg
import numpy as np
import pytest

from internal.vis import pictures, video

_COLORS = ((200, 30, 40), (20, 180, 60), (30, 40, 210), (240, 240, 240), (10, 10, 10))


@pytest.fixture
def frames(tmp_path):
  paths = []
  for k in range(10):
    img = np.full((34, 48, 3), _COLORS[k % 5], np.uint8)
    img[:, 24:] = _COLORS[(k + 1) % 5]
    paths.append(str(tmp_path / f'{k:03d}.png'))
    pictures.write_png(paths[-1], img)
  return paths


def decode(path):
  reader = imageio_ffmpeg.read_frames(path)
  meta = next(reader)
  width, height = meta['size']
  return meta, [np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in reader]


def test_frames_come_back_in_number_order_and_colour(frames, tmp_path):
  path = str(tmp_path / 'out.mp4')
  video.write_video(frames, path, fps=30, crf=10)
  meta, decoded = decode(path)
  assert meta['fps'] == 30
  assert meta['codec'] == 'h264'
  assert 'yuv420p' in meta['pix_fmt']
  assert len(decoded) == 10
  for k, frame in enumerate(decoded):
    assert frame.shape == (34, 48, 3)
    np.testing.assert_allclose(frame[4:-4, 4:20].mean((0, 1)), _COLORS[k % 5], atol=6)
    np.testing.assert_allclose(frame[4:-4, 28:-4].mean((0, 1)), _COLORS[(k + 1) % 5], atol=6)


def test_odd_sizes_gain_one_line(tmp_path):
  path, out = str(tmp_path / 'a.png'), str(tmp_path / 'out.mp4')
  pictures.write_png(path, np.full((33, 47, 3), 90, np.uint8))
  video.write_video([path] * 3, out)
  meta, decoded = decode(out)
  assert meta['size'] == (48, 34)
  np.testing.assert_allclose(decoded[0], 90, atol=3)  # The last lines too.


def test_leaves_no_temporary_file(frames, tmp_path):
  video.write_video(frames, str(tmp_path / 'out.mp4'))
  assert sorted(os.listdir(tmp_path)) == [f'{k:03d}.png' for k in range(10)] + ['out.mp4']


def test_crf_trades_size(frames, tmp_path):
  rng = np.random.default_rng(0)
  for path in frames:
    pictures.write_png(path, rng.random((34, 48, 3)))
  sizes = []
  for crf in (5, 45):
    video.write_video(frames, str(tmp_path / f'{crf}.mp4'), crf=crf)
    sizes.append(os.path.getsize(tmp_path / f'{crf}.mp4'))
  assert sizes[0] > 2 * sizes[1]


def test_a_missing_encoder_names_the_package_and_the_frames(frames, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'imageio_ffmpeg', None)
  with pytest.raises(video.VideoError, match='pip install imageio-ffmpeg') as caught:
    video.write_video(frames, str(tmp_path / 'out.mp4'))
  assert str(tmp_path) in str(caught.value)


class TestFailures:
  """Each leaves what was there before, and nothing beside it."""

  @pytest.fixture(autouse=True)
  def _old_video_stays(self, tmp_path, frames):
    old = tmp_path / 'out.mp4'
    old.write_bytes(b'the old one')
    before = sorted(os.listdir(tmp_path))
    yield
    assert old.read_bytes() == b'the old one'
    assert sorted(os.listdir(tmp_path)) == before

  def test_no_frames(self, tmp_path):
    with pytest.raises(video.VideoError, match='no frames'):
      video.write_video([], str(tmp_path / 'out.mp4'))

  @pytest.mark.parametrize('kwargs', [{'fps': 0}, {'crf': 52}, {'crf': -1}])
  def test_bad_settings(self, frames, tmp_path, kwargs):
    with pytest.raises(video.VideoError, match='fps must be positive and crf'):
      video.write_video(frames, str(tmp_path / 'out.mp4'), **kwargs)

  def test_a_frame_of_another_size(self, frames, tmp_path):
    pictures.write_png(frames[5], np.zeros((20, 20, 3)))
    with pytest.raises(video.VideoError, match=r'005\.png: is 20x20, the first frame 48x34'):
      video.write_video(frames, str(tmp_path / 'out.mp4'))

  def test_a_damaged_frame(self, frames, tmp_path):
    with open(frames[7], 'r+b') as f:
      f.truncate(60)
    with pytest.raises(video.VideoError, match=r'007\.png'):
      video.write_video(frames, str(tmp_path / 'out.mp4'))

  def test_an_encoder_that_dies(self, frames, tmp_path, monkeypatch):
    monkeypatch.setenv('IMAGEIO_FFMPEG_EXE', '/bin/false')
    with pytest.raises(video.VideoError, match='encoder'):
      video.write_video(frames, str(tmp_path / 'out.mp4'))
