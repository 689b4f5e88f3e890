"""Small pictures of other programs pass if they match their full-size ones, and only then."""

import os

import captures
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from internal.datasets import comparison, images, pyramid

N, SIZE = 6, (96, 64)


def scenery(seed, size=SIZE):
  """Returns a smooth picture with some noise, uint8 [h, w, 3]."""
  rng = np.random.default_rng(seed)
  smooth = ndimage.gaussian_filter(rng.normal(size=(*size[::-1], 3)), (6, 6, 0))
  noise = rng.normal(size=smooth.shape)
  return np.clip(128 + 40 * smooth / smooth.std() + 6 * noise, 0, 255).astype(np.uint8)


def reduced(pixels, resample=Image.Resampling.LANCZOS, factor=2):
  height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
  return np.asarray(Image.fromarray(pixels).resize((width, height), resample))


def write(root, full, small, ending='.jpg', factor=2):
  """Writes images/ and images_<factor>/, as another program would."""
  for folder, pictures in (('images', full), (f'images_{factor}', small)):
    for i, pixels in enumerate(pictures):
      captures.save_image(os.path.join(root, folder, f'{i:02}{ending}'), pixels)


def locate(root, names=None, ending='.jpg', factor=2):
  names = names or [f'{i:02}{ending}' for i in range(len(os.listdir(os.path.join(root, 'images'))))]
  return pyramid.locate(str(root), 'images', names, factor)


def refused(root, **kwargs):
  with pytest.raises(images.DataError, match='do not match those of images/') as caught:
    locate(root, **kwargs)
  assert 'Remove images_2/' in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize('filter_', ['NEAREST', 'BOX', 'BILINEAR', 'BICUBIC', 'LANCZOS'])
@pytest.mark.parametrize('ending', ['.jpg', '.png'])
def test_right_pictures_pass_with_any_filter(tmp_path, filter_, ending):
  full = [scenery(i) for i in range(N)] + [captures.pixels(i, SIZE) for i in range(N)]
  small = [reduced(pixels, Image.Resampling[filter_]) for pixels in full]
  write(tmp_path, full, small, ending)
  assert len(locate(tmp_path, ending=ending).files) == 2 * N


@pytest.mark.parametrize('noise', [0, 4])
def test_pictures_that_look_alike_pass(tmp_path, noise):
  """Frames of a camera at rest, pictures of one colour, and others of nearly that colour."""
  rng = np.random.default_rng(0)
  still = scenery(0).astype(float)
  full = [still + rng.normal(0, noise, still.shape) for _ in range(N)]
  full += [np.full_like(still, 77 + 0.3 * noise * i) for i in range(N)]
  full = [np.clip(pixels, 0, 255).astype(np.uint8) for pixels in full]
  write(tmp_path, full, [reduced(pixels) for pixels in full])
  locate(tmp_path)


def test_another_exposure_passes(tmp_path):
  full = [scenery(i) for i in range(N)]
  write(
    tmp_path, full, [(0.5 * reduced(p) + 30 * (i % 3)).astype(np.uint8) for i, p in enumerate(full)]
  )
  locate(tmp_path)


def test_swapped_pictures_are_named(tmp_path):
  full = [scenery(i) for i in range(N)]
  small = [reduced(pixels) for pixels in full]
  small[2], small[3] = small[3], small[2]
  write(tmp_path, full, small)
  assert "2 of 6 pictures do not match those of images/: '02.jpg' shows '03.jpg', not" in refused(
    tmp_path
  )


def test_flat_pictures_of_another_order_are_named(tmp_path):
  full = [np.full((64, 96, 3), 40 + 6 * i, np.uint8) for i in range(N)]
  write(tmp_path, full, [reduced(pixels) for pixels in full[::-1]])
  assert "'00.jpg' shows '05.jpg'" in refused(tmp_path)


def test_a_video_that_is_one_frame_late_is_noticed(tmp_path):
  """Neighbours differ by three of 200 columns."""
  wide = scenery(0, (200, 64))
  full = [wide[:, 3 * i : 3 * i + 96] for i in range(N + 1)]
  write(tmp_path, full[:N], [reduced(pixels) for pixels in full[1:]])
  assert "'00.jpg' shows '01.jpg'" in refused(tmp_path)


@pytest.mark.parametrize(
  ('turn', 'words'),
  [
    (lambda a: a[::-1, ::-1], 'is turned by 180 degrees against'),
    (lambda a: a[:, ::-1], 'is mirrored against'),
    (lambda a: np.rot90(a), 'is turned by 90 degrees against'),
    (lambda a: np.rot90(a, -1), 'is turned by 270 degrees against'),
  ],
)
def test_turned_pictures_are_named(tmp_path, turn, words):
  full = [scenery(i, (64, 64)) for i in range(N)]
  write(tmp_path, full, [np.ascontiguousarray(turn(reduced(pixels))) for pixels in full])
  assert f"6 of 6 pictures do not match those of images/: '00.jpg' {words} '00.jpg'" in refused(
    tmp_path
  )


@pytest.mark.parametrize('make', [scenery, lambda i: captures.pixels(i, SIZE)])
def test_other_pictures_of_the_same_names_are_refused(tmp_path, make):
  write(tmp_path, [make(i) for i in range(N)], [reduced(make(100 + i)) for i in range(N)])
  assert 'shows something else than' in refused(tmp_path)


def test_an_exif_turn_that_training_applies_too_is_applied(tmp_path):
  """The full-size pictures lie on their side, the small ones do not."""
  upright = [scenery(i, (64, 96)) for i in range(N)]
  write(
    tmp_path, [np.ascontiguousarray(np.rot90(p)) for p in upright], [reduced(p) for p in upright]
  )
  exif = Image.Exif()
  exif[0x0112] = 6
  for i in range(N):
    path = str(tmp_path / 'images' / f'{i:02}.jpg')
    Image.open(path).save(path, exif=exif)
  locate(tmp_path)


def test_pictures_are_compared_once(tmp_path, monkeypatch):
  full = [scenery(i) for i in range(N)]
  write(tmp_path, full, [reduced(pixels) for pixels in full])
  calls = []
  real = comparison.check
  monkeypatch.setattr(comparison, 'check', lambda *args: calls.append(args[3]) or real(*args))
  locate(tmp_path)
  locate(tmp_path)
  captures.save_image(str(tmp_path / 'images' / '03.jpg'), full[3] // 2 + 60)
  locate(tmp_path)
  assert [len(names) for names in calls] == [N, 1]
  captures.save_image(str(tmp_path / 'images_2' / '04.jpg'), reduced(full[5]))
  assert "'04.jpg' shows '05.jpg', not '04.jpg'" in refused(tmp_path)


def test_the_order_of_other_names_must_be_that_of_the_pictures(tmp_path):
  """1.png, 10.png, 11.png, 2.png, with small ones that were counted in natural order."""
  names = [f'{i}.png' for i in range(1, 13)]
  for i, name in enumerate(names):
    captures.save_image(str(tmp_path / 'images' / name), scenery(i))
    captures.save_image(str(tmp_path / 'images_2' / f'img_{i:04}.png'), reduced(scenery(i)))
  assert "'img_0001.png' shows '2.png', not '10.png'" in refused(tmp_path, names=names)
  for i, name in enumerate(sorted(names)):
    pixels = reduced(scenery(names.index(name)))
    captures.save_image(str(tmp_path / 'images_2' / f'img_{i:04}.png'), pixels)
  assert locate(tmp_path, names).files[1] == 'images_2/img_0004.png'


def test_of_many_pictures_some_are_compared(monkeypatch):
  monkeypatch.setattr(comparison, '_MOST', 4)
  monkeypatch.setattr(comparison.files, 'is_file', lambda path: True)
  read = []

  def thumbnails(full, small, label):
    read.extend(full)
    return (np.zeros((len(full), 4, 4, 3)),) * 2 + (np.zeros(len(full), bool),)

  monkeypatch.setattr(comparison, 'read_thumbnails', thumbnails)
  names = [str(i) for i in range(1000)]
  comparison.check('a', 'b', {n: n for n in names}, names, 'a/', 'b/')
  assert len(read) <= 12
  assert '0' in os.path.basename(read[0])
