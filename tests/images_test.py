"""Decoding: every kind of picture becomes the right uint8 RGB or raises an error with its name."""

import contextlib
import os
import pathlib
import struct
import time
import tracemalloc
import zlib

import captures
import numpy as np
import pytest
from PIL import Image

from internal.datasets import images

RGB = captures.pixels(0)


def refused(path, **kwargs) -> str:
  with pytest.raises(images.DataError) as caught:
    images.decode(str(path), **kwargs)
  message = str(caught.value)
  assert os.path.basename(path) in message
  assert '\n' not in message
  return message


def saved(tmp_path, image: Image.Image, name='a.png', **kwargs) -> str:
  path = str(tmp_path / name)
  image.save(path, **kwargs)
  return path


@pytest.mark.parametrize('name', ['a.png', 'a.bmp', 'a.tif', 'a.webp', 'a.ppm'])
def test_rgb_is_as_stored(tmp_path, name):
  kwargs = {'lossless': True} if name == 'a.webp' else {}
  pixels = images.decode(saved(tmp_path, Image.fromarray(RGB), name, **kwargs))
  assert pixels.dtype == np.uint8
  assert pixels.flags.c_contiguous
  np.testing.assert_array_equal(pixels, RGB)


def test_grey_and_palette(tmp_path):
  grey = RGB[..., 0]
  expected = np.repeat(grey[..., None], 3, -1)
  np.testing.assert_array_equal(images.decode(saved(tmp_path, Image.fromarray(grey))), expected)
  palette = Image.fromarray(grey).convert('P')
  np.testing.assert_array_equal(images.decode(saved(tmp_path, palette)), expected)
  bits = Image.fromarray(grey > 127)
  assert bits.mode == '1'
  np.testing.assert_array_equal(
    images.decode(saved(tmp_path, bits)), np.where(expected > 127, 255, 0)
  )


def test_cmyk(tmp_path):
  image = Image.new('CMYK', (16, 12), (0, 255, 255, 0))
  pixels = images.decode(saved(tmp_path, image, 'a.jpg', quality=95))
  assert pixels.shape == (12, 16, 3)
  np.testing.assert_allclose(pixels[5, 5].astype(int), [255, 0, 0], atol=4)


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_16_bits_are_scaled_to_the_nearest(tmp_path, channels):
  values = np.random.default_rng(3).integers(0, 65536, (12, 16, channels))
  values.flat[:4] = 0, 128, 129, 65535
  if channels == 4:
    values[..., 3] = 65535
  path = tmp_path / 'a.png'
  path.write_bytes(captures.png_16(values))
  expected = np.round(values[..., :3] / 257)
  np.testing.assert_array_equal(
    images.decode(str(path)), np.broadcast_to(expected, (12, 16, 3)).astype(np.uint8)
  )


def test_unsupported_pixel_formats_are_errors(tmp_path):
  path = tmp_path / 'grey_alpha.png'
  path.write_bytes(captures.png_16(np.full((4, 4, 2), 30000)))
  assert '16 bits' in refused(path)
  for mode in ('F', 'I'):
    path = saved(tmp_path, Image.new(mode, (4, 4)), f'{mode}.tif')
    assert f'{mode!r}' in refused(path)


def test_alpha(tmp_path):
  rgba = captures.pixels(1, channels=4)
  path = saved(tmp_path, Image.fromarray(rgba))
  assert 'transparent' in refused(path)
  alpha = rgba[..., 3:] / 255
  expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
  pixels = images.decode(path, 'white')
  assert np.abs(pixels - expected).max() <= 0.5 + 1e-9
  rgba[..., 3] = 255
  path = saved(tmp_path, Image.fromarray(rgba))
  np.testing.assert_array_equal(images.decode(path), rgba[..., :3])


def test_transparent_palette_and_color_key(tmp_path):
  grey = np.zeros((4, 4), np.uint8)
  grey[0] = 200
  path = saved(tmp_path, Image.fromarray(grey).convert('P'), transparency=0)
  assert 'transparent' in refused(path)
  np.testing.assert_array_equal(images.decode(path, 'white')[:, 0, 0], [200, 255, 255, 255])


@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
def test_exif_rotation_applies_only_if_it_fits_the_camera(tmp_path, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  path = saved(tmp_path, Image.fromarray(RGB), exif=exif)
  np.testing.assert_array_equal(images.decode(path), RGB)
  np.testing.assert_array_equal(images.decode(path, size=(16, 12)), RGB)
  turned = np.asarray(
    Image.fromarray(RGB).transpose(
      {
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
      }[orientation]
    )
  )
  np.testing.assert_array_equal(images.decode(path, size=(12, 16)), turned)
  assert images.read_header(path) == images.Header(16, 12, orientation)
  assert '16x12' in refused(path, size=(11, 16))


def test_exif_upside_down_is_ignored(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 3
  path = saved(tmp_path, Image.fromarray(RGB), 'a.png', exif=exif)
  np.testing.assert_array_equal(images.decode(path, size=(16, 12)), RGB)


def test_a_rotated_size_without_a_tag_is_an_error(tmp_path):
  path = saved(tmp_path, Image.fromarray(RGB))
  assert 'its camera has 12x16' in refused(path, size=(12, 16))


def test_headers_are_read_without_the_pixels(tmp_path):
  path = saved(tmp_path, Image.fromarray(RGB))
  content = pathlib.Path(path).read_bytes()
  with open(path, 'wb') as f:
    f.write(content[: len(content) // 2])
  assert images.read_header(path) == images.Header(16, 12)
  assert 'cannot be read' in refused(path)


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.webp', 'a.tif'])
def test_damaged_files_are_named(tmp_path, name):
  path = saved(tmp_path, Image.fromarray(RGB), name)
  content = pathlib.Path(path).read_bytes()
  for length in (0, 1, 10, len(content) // 2):
    with open(path, 'wb') as f:
      f.write(content[:length])
    assert 'cannot be read as an image' in refused(path)
  with pytest.raises(images.DataNotFoundError, match='no such image'):
    images.decode(str(tmp_path / 'nothing.png'))


def test_memory_is_bounded_by_the_file_not_its_header(tmp_path):
  path = str(tmp_path / 'a.png')
  captures.save_image(path, captures.pixels(0))
  content = pathlib.Path(path).read_bytes()
  at = content.index(b'IDAT') - 4
  pathlib.Path(path).write_bytes(content[:at] + b'\x10' + content[at + 1 :])  # 2^28 bytes more.
  tracemalloc.start()
  try:
    with contextlib.suppress(images.DataError):
      images.decode(path)
    assert tracemalloc.get_traced_memory()[1] < 2**26
  finally:
    tracemalloc.stop()


def test_folders_and_pipes_are_not_opened(tmp_path):
  with pytest.raises(images.DataNotFoundError, match='no such image') as caught:
    images.read_header('y' * 10**5)  # As a damaged list of frames may have it.
  assert len(str(caught.value)) < 5000
  (tmp_path / 'folder.png').mkdir()
  os.mkfifo(tmp_path / 'pipe.png')  # To open it would wait for ever.
  for name in ('folder.png', 'pipe.png'):
    for read in (images.read_header, images.decode):
      with pytest.raises(images.DataNotFoundError, match=f'{name}: no such image'):
        read(str(tmp_path / name))


def test_bombs_and_empty_pictures_are_named(tmp_path):
  """The header of a PNG promises 6 GB or nothing at all."""
  good = pathlib.Path(saved(tmp_path, Image.fromarray(RGB), 'good.png')).read_bytes()
  for side, reason in ((60_000, 'bomb'), (0, 'cannot be read as an image')):
    body = b'IHDR' + struct.pack('>II', side, side) + good[24:29]
    path = tmp_path / f'{side}.png'
    path.write_bytes(good[:12] + body + struct.pack('>I', zlib.crc32(body)) + good[33:])
    tracemalloc.start()
    assert reason in refused(path)
    with pytest.raises(images.DataError, match=f'{side}.png: cannot be read as an image'):
      images.read_header(str(path))
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


def test_documents_and_videos_are_errors(tmp_path):
  for kind in ('GIF', 'EPS'):  # For EPS Pillow would start another program.
    path = tmp_path / f'{kind}.png'
    Image.fromarray(RGB).save(path, kind)
    assert 'cannot be read as an image' in refused(path)


def test_pictures_of_two_lenses_are_read(tmp_path):
  image = Image.fromarray(RGB)
  path = saved(tmp_path, image, 'a.mpo', save_all=True, append_images=[image])
  os.rename(path, tmp_path / 'a.jpg')
  assert images.decode(str(tmp_path / 'a.jpg')).shape == RGB.shape


@pytest.mark.parametrize(
  'name',
  ['../a.png', '/a.png', 'b/../../a.png', '..\\a.png', '', 'a\0b', 'b//a.png', 'b/', '\ud800'],
)
def test_names_stay_inside(tmp_path, name):
  with pytest.raises(images.DataError, match='not a path inside'):
    images.inside(str(tmp_path), name)


def test_names_inside_are_paths(tmp_path):
  for name in ('a.png', 'b/c.png', 'b..c/d.png'):
    assert images.inside(str(tmp_path), name) == os.path.join(str(tmp_path), name)


def test_links_stay_inside(tmp_path):
  """A capture and its folders may be links, as those on several disks are; what is in them not."""
  disk, capture = tmp_path / 'disk', tmp_path / 'capture'
  (disk / 'images').mkdir(parents=True)
  (disk / 'a.png').touch()
  (capture / 'train').mkdir(parents=True)
  (capture / 'images').symlink_to(disk / 'images')
  (tmp_path / 'link').symlink_to(capture)
  (disk / 'images' / 'b.png').touch()
  (disk / 'images' / 'again.png').symlink_to('b.png')
  (capture / 'train' / 'across.png').symlink_to('../images/b.png')
  for root in (capture, tmp_path / 'link'):
    for name in ('images/b.png', 'images/again.png', 'images/gone.png'):
      assert images.inside(str(root), name) == os.path.join(root, name)
  (capture / 'train' / 'to_train').symlink_to('.')
  assert images.inside(str(capture), 'train/to_train/c.png')
  (capture / 'a.png').symlink_to(disk / 'a.png')
  (capture / 'train' / 'a.png').symlink_to(disk / 'a.png')
  (capture / 'train' / 'up').symlink_to(disk)
  (disk / 'images' / 'a.png').symlink_to('../a.png')
  for name in ('a.png', 'train/a.png', 'train/up/a.png', 'images/a.png', 'train/across.png'):
    with pytest.raises(images.DataError, match=rf'{name}: is a link .* to .*Copy the picture'):
      images.inside(str(capture), name)


def test_list_images(tmp_path):
  for name in ('b.PNG', 'a/z.jpg', '.hidden.png', '.git/x.png', 'notes.txt', '._b.jpg', 'a.jpg'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b'')
  assert images.list_images(str(tmp_path)) == ['a.jpg', 'a/z.jpg', 'b.PNG']


def test_threads_keep_the_order_and_stop_at_an_error():
  assert images.in_threads(lambda x: x * x, list(range(50))) == [x * x for x in range(50)]
  done = []

  def work(i):
    if i == 0:
      raise KeyboardInterrupt
    time.sleep(0.002)
    done.append(i)

  with pytest.raises(KeyboardInterrupt):
    images.in_threads(work, list(range(1000)))
  assert len(done) < 500


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
  path = saved(tmp_path, Image.fromarray(RGB))
  (tmp_path / 'sub').mkdir()
  with monkeypatch.context() as patch:
    captures.deny(patch, path)
    assert 'may not be read. Allow it' in refused(path)
  captures.deny(monkeypatch, str(tmp_path / 'sub'))
  with pytest.raises(images.DataError, match='sub: may not be read'):
    images.list_images(str(tmp_path))


@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.webp'])
def test_thumbnails_are_averages(tmp_path, name):
  smooth = np.asarray(Image.fromarray(RGB).resize((320, 240), Image.Resampling.BICUBIC))
  path = saved(tmp_path, Image.fromarray(smooth), name)
  wanted = smooth.reshape(4, 60, 8, 40, 3).mean((1, 3))
  np.testing.assert_allclose(images.thumbnail(path, (8, 4)), wanted, atol=8)


def test_thumbnails_of_large_jpegs_need_little_memory(tmp_path):
  path = saved(tmp_path, Image.new('RGB', (4000, 3000), (9, 99, 200)), 'a.jpg')
  tracemalloc.start()
  small = images.thumbnail(path, (32, 32))
  assert tracemalloc.get_traced_memory()[1] < 4e6
  tracemalloc.stop()
  np.testing.assert_allclose(small, np.broadcast_to([9, 99, 200], (32, 32, 3)), atol=3)


def test_large_pictures_are_decoded_one_after_the_other(monkeypatch):
  monkeypatch.setattr(images, '_AT_ONCE', 100)
  now, most = [], []

  def work(pixels):
    with images.room_for((pixels, 1)), images.room_for((pixels, 1)):  # The second is of no account.
      now.append(pixels)
      most.append((sum(now), len(now)))
      time.sleep(0.002)
      now.remove(pixels)

  images.in_threads(work, [30, 30, 30, 60, 1000, 99, 30, 2000, 5, 5, 5] * 3)
  assert len(most) == 33
  assert all(total <= 100 or count == 1 for total, count in most)
  assert max(count for _, count in most) > 1
  with pytest.raises(ZeroDivisionError), images.room_for((1, 1)):
    1 / 0  # noqa: B018
  assert not images._decoding


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_a_picture_beyond_the_limit_is_refused_with_its_limit(tmp_path, monkeypatch):
  path = saved(tmp_path, Image.new('1', (2000, 1001)))
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10**6)
  assert 'it has more than 2 megapixels' in refused(path)
  path = saved(tmp_path, Image.new('1', (2000, 999)))
  assert images.decode(path).shape == (999, 2000, 3)
