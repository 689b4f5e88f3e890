"""Downsampled folders: sizes, averages and atomic writes."""

import concurrent.futures
import os

import captures
import numpy as np
import pytest
from PIL import Image

from internal.datasets import images, pyramid
from internal.system import warnings


def fill(tmp_path, names, folder='images', size=captures.SIZE):
  for i, name in enumerate(names):
    captures.save_image(str(tmp_path / folder / name), captures.pixels(i, size))
  return str(tmp_path)


def only(tmp_path, *folders):
  """Nothing but these is in the capture: no temporary folder was left."""
  assert sorted(os.listdir(tmp_path)) == sorted(folders)


def test_area_average(tmp_path):
  root = fill(tmp_path, ['a.png', 'in/b.png'])
  pyramid.make(root, 'images', 4)
  for i, name in enumerate(['a.png', 'in/b.png']):
    small = images.decode(os.path.join(root, 'images_4', name))
    mean = captures.pixels(i).reshape(3, 4, 4, 4, 3).mean((1, 3))
    assert np.abs(small - mean).max() < 1  # Rounded twice: along rows, then along columns.
  only(tmp_path, 'images', 'images_4')


def test_folders_of_killed_processes_go_and_those_of_running_ones_stay(tmp_path):
  root = fill(tmp_path, ['a.png'])
  for name in ('.images_4.killed', '.images_4.running', '.images_40.killed'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'a.png').touch()
  with pyramid._locked(str(tmp_path / '.images_4.running')):
    pyramid.make(root, 'images', 4)
  only(tmp_path, 'images', 'images_4', '.images_4.running', '.images_40.killed')


@pytest.mark.parametrize(
  ('size', 'factor', 'expected'),
  [((4946, 3286), 4, (1237, 822)), ((3118, 2078), 2, (1559, 1039)), ((5, 3), 8, (1, 1))],
)
def test_sizes_are_rounded_as_the_published_ones(size, factor, expected):
  assert pyramid.downsampled_size(size, factor) == expected


def test_names_become_png_and_stay_apart():
  names = ['a.JPG', 'a/b.jpg', 'a/b.tif', 'c.d.png']
  assert pyramid.target_names(names) == ['a.png', 'a/b.jpg.png', 'a/b.tif.png', 'c.d.png']


def test_locate_makes_what_is_missing_once(tmp_path):
  names = ['b.bmp', 'a.jpg', 'a.png']
  root = fill(tmp_path, names, size=(10, 6))
  foreseen = pyramid.locate(root, 'images', names, 4, read_only=True)
  assert foreseen.to_be_made == 'images_4'
  only(tmp_path, 'images')
  made = pyramid.locate(root, 'images', names, 4)
  assert made.to_be_made is None
  assert made.files == ('images_4/b.png', 'images_4/a.jpg.png', 'images_4/a.png.png')
  assert made.files == foreseen.files
  assert made.headers == foreseen.headers == (images.Header(3, 2),) * 3
  before = os.stat(tmp_path / 'images_4').st_mtime_ns
  assert pyramid.locate(root, 'images', names, 4) == made
  assert os.stat(tmp_path / 'images_4').st_mtime_ns == before
  umask = os.umask(0)
  os.umask(umask)
  assert os.stat(tmp_path / 'images_4').st_mode & 0o777 == 0o777 & ~umask


def test_how_pictures_were_reduced_is_known(tmp_path):
  names = [f'{i}.png' for i in range(4)]
  root = fill(tmp_path, names)

  def reduction(factor=4, **kwargs):
    return pyramid.locate(root, 'images', names, factor, **kwargs).reduction

  assert reduction(0) == reduction(1) == 'none'
  assert reduction(read_only=True) == 'area filter'  # As it would be made.
  assert [reduction() for _ in range(2)] == ['area filter'] * 2
  os.remove(tmp_path / 'images_4' / pyramid._MANIFEST)  # Of another program, like the dataset's.
  assert [reduction() for _ in range(2)] == ['dataset'] * 2
  assert reduction(2) == 'area filter'
  path = str(tmp_path / 'images_2' / '1.png')  # Somebody has edited what was made here.
  captures.save_image(path, images.decode(path) // 2)
  assert [reduction(2) for _ in range(2)] == ['dataset'] * 2


def test_full_size(tmp_path):
  root = fill(tmp_path, ['a.png'])
  assert pyramid.locate(root, 'images', ['a.png'], 1).files == ('images/a.png',)
  with pytest.raises(images.DataNotFoundError, match=r'b\.png: no such image.*2 of 3'):
    pyramid.locate(root, 'images', ['a.png', 'b.png', 'c.png'])
  with pytest.raises(images.DataNotFoundError, match='No such folder'):
    pyramid.locate(root, 'pictures', ['a.png'])
  with pytest.raises(images.DataError, match='folder of their own'):
    pyramid.locate(os.path.join(root, 'images'), '', ['a.png'], 2)


@pytest.mark.parametrize('names', [['../a.png'], ['/etc/a.png'], ['x/../../a.png']])
def test_names_stay_inside(tmp_path, names):
  root = fill(tmp_path, ['a.png'])
  with pytest.raises(images.DataError, match='not a path inside'):
    pyramid.locate(root, 'images', names, 2)


def test_a_quarter_turn_stays_a_tag(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  captures.save_image(str(tmp_path / 'images' / 'a.jpg'), captures.pixels(0), exif=exif)
  found = pyramid.locate(str(tmp_path), 'images', ['a.jpg'], 2)
  assert found.headers == (images.Header(8, 6, 6),)


def test_a_failure_leaves_nothing(tmp_path):
  root = fill(tmp_path, [f'{i}.png' for i in range(6)])
  (tmp_path / 'images' / '3.png').write_bytes(b'no picture')
  with pytest.raises(images.DataError, match=r'3\.png'):
    pyramid.make(root, 'images', 2)
  only(tmp_path, 'images')


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
  root = fill(tmp_path, [f'{i}.png' for i in range(6)])

  def interrupted(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(images, 'save_png', interrupted)
  with pytest.raises(KeyboardInterrupt):
    pyramid.make(root, 'images', 2)
  only(tmp_path, 'images')


def test_the_folder_appears_whole(tmp_path, monkeypatch):
  root = fill(tmp_path, [f'{i}.png' for i in range(6)])
  save = images.save_png
  seen = []

  def watch(*args):
    seen.append(os.path.exists(tmp_path / 'images_2'))
    save(*args)

  monkeypatch.setattr(images, 'save_png', watch)
  pyramid.make(root, 'images', 2)
  assert seen == [False] * 6
  assert len(images.list_images(str(tmp_path / 'images_2'))) == 6


def test_two_at_once(tmp_path):
  names = [f'{i}.png' for i in range(20)]
  root = fill(tmp_path, names)
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    runs = [pool.submit(pyramid.make, root, 'images', 2) for _ in range(3)]
    assert [run.result() for run in runs] == [None] * 3
  assert images.list_images(str(tmp_path / 'images_2')) == sorted(names)
  only(tmp_path, 'images', 'images_2')


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
  root = fill(tmp_path, ['a.png'])

  def denied(path):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(os, 'mkdir', denied)
  with pytest.raises(images.DataError, match=r'images_2: cannot be made \(Permission denied\)'):
    pyramid.make(root, 'images', 2)


def test_endings_may_differ(tmp_path):
  fill(tmp_path, ['b.png', 'a.png', 'x/a.png'])
  root = fill(tmp_path, ['b.bmp', 'a.bmp', 'x/a.bmp'], 'images_4')
  pairs = pyramid.pair(root, 'images', 'images_4', ['b.png', 'x/a.png'])
  assert pairs == {'b.png': 'b.bmp', 'x/a.png': 'x/a.bmp'}


def test_numbered_names_pair_by_order(tmp_path):
  fill(tmp_path, ['IMG_7.png', 'IMG_9.png', 'IMG_8.png'])
  root = fill(tmp_path, ['image000.png', 'image001.png', 'image002.png'], 'images_8')
  pairs = pyramid.pair(root, 'images', 'images_8', ['IMG_9.png', 'IMG_8.png'])
  assert pairs == {'IMG_9.png': 'image002.png', 'IMG_8.png': 'image001.png'}


@pytest.mark.parametrize('small', [['a.png', 'b.png'], ['a.png', 'b.png', 'd.png'], ['0.png']])
def test_folders_that_do_not_match(tmp_path, small):
  """One picture too few; one replaced, whose order would mispair; other names, other count."""
  fill(tmp_path, ['a.png', 'b.png', 'c.png'])
  root = fill(tmp_path, small, 'images_4')
  with pytest.raises(images.DataError, match=r'does not match.*Remove images_4/'):
    pyramid.locate(root, 'images', ['a.png', 'b.png', 'c.png'], 4)


def test_the_full_size_may_be_gone(tmp_path):
  root = fill(tmp_path, ['a.jpg', 'b.jpg'], 'images_4')
  found = pyramid.locate(root, 'images', ['b.JPG', 'a.JPG'], 4)
  assert found.files == ('images_4/b.jpg', 'images_4/a.jpg')
  with pytest.raises(images.DataNotFoundError, match=r'No such folder.*images'):
    pyramid.locate(root, 'images', ['b.JPG'], 2)


def test_it_is_made_again_when_pictures_have_changed(tmp_path):
  names = ['a.png', 'b.png']
  root = fill(tmp_path, names)
  pyramid.locate(root, 'images', names, 2)
  for k, change in enumerate(('changed', 'added', 'lost')):
    if change == 'lost':
      os.remove(tmp_path / 'images_2' / 'a.png')
    elif change == 'added':
      names.append('c.png')
    captures.save_image(str(tmp_path / 'images' / names[-1]), captures.pixels(50 + k))
    with warnings.collect() as collected:
      foreseen = pyramid.locate(root, 'images', names, 2, read_only=True)
      assert foreseen.to_be_made == 'images_2'
      made = pyramid.locate(root, 'images', names, 2)
    assert made.files == foreseen.files
    assert 'images_2: is out of date for ' in collected[0]
    assert repr(names[-1]) in collected[0]
    small = images.decode(str(tmp_path / 'images_2' / names[-1]))
    mean = captures.pixels(50 + k).reshape(6, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(small - mean).max() <= 1
    only(tmp_path, 'images', 'images_2')
  with warnings.collect() as collected:
    pyramid.locate(root, 'images', names, 2)
  assert collected == []


def test_it_is_made_again_when_one_of_its_pictures_is_gone(tmp_path):
  names = ['a.png', 'b.png']
  root = fill(tmp_path, names)
  pyramid.locate(root, 'images', names, 2)
  before = images.decode(str(tmp_path / 'images_2' / 'a.png'))
  os.remove(tmp_path / 'images_2' / 'a.png')
  with warnings.collect() as collected:
    pyramid.locate(root, 'images', names, 2)
  assert "out of date for 1 of 2 pictures of images/: 'a.png'" in collected[0]
  np.testing.assert_array_equal(images.decode(str(tmp_path / 'images_2' / 'a.png')), before)
  only(tmp_path, 'images', 'images_2')


def test_it_is_not_made_again_when_only_times_have_changed(tmp_path):
  root = fill(tmp_path, ['a.png'])
  pyramid.locate(root, 'images', ['a.png'], 2)
  before = os.stat(tmp_path / 'images_2').st_mtime_ns
  os.utime(tmp_path / 'images' / 'a.png', (1, 1))
  pyramid.locate(root, 'images', ['a.png'], 2)
  assert os.stat(tmp_path / 'images_2').st_mtime_ns == before


def test_it_is_refused_when_it_cannot_be_made_again(tmp_path):
  names = ['a.png', 'b.png']
  root = fill(tmp_path, names)
  pyramid.locate(root, 'images', names, 2)
  os.remove(tmp_path / 'images' / 'b.png')
  assert len(pyramid.locate(root, 'images', names, 2).files) == 2
  fill(tmp_path, ['a.png'], size=(18, 12))
  with pytest.raises(
    images.DataError, match=r"images_2: is out of date for 1 of 2 .*'a.png'. Remove"
  ):
    pyramid.locate(root, 'images', names, 2)


def test_pictures_that_were_edited_are_kept(tmp_path):
  """As by a program that compresses them: from then on the folder is not ours."""
  names = [f'{i}.png' for i in range(4)]
  root = fill(tmp_path, names)
  pyramid.locate(root, 'images', names, 2)
  path = str(tmp_path / 'images_2' / '1.png')
  edited = images.decode(path) // 2
  captures.save_image(path, edited)
  pyramid.locate(root, 'images', names, 2)
  fill(tmp_path, ['2.png'], size=(18, 12))
  pyramid.locate(root, 'images', names, 2)
  np.testing.assert_array_equal(images.decode(path), edited)


def test_masks_among_the_pictures_are_not_made_small(tmp_path):
  root = fill(tmp_path, ['a.jpg', 'a_mask.png', 'b.jpg', 'sub/dynamic_mask_c.png', 'sub/c.png'])
  pyramid.make(root, 'images', 2)
  assert images.list_images(str(tmp_path / 'images_2')) == ['a.png', 'b.png', 'sub/c.png']


def test_digests_depend_on_all_of_a_small_file_and_on_parts_of_a_large_one(tmp_path):
  path = tmp_path / 'a'
  for size in (0, 10, 2**17, 2**20):
    content = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    path.write_bytes(content.tobytes())
    digests = {pyramid.digest(str(path))}
    for at in {0, size // 3, size - 1} if 0 < size <= 2**17 else {0, size - 1} if size else ():
      changed = content.copy()
      changed[at] ^= 1
      path.write_bytes(changed.tobytes())
      digests.add(pyramid.digest(str(path)))
    assert len(digests) == (1 if not size else 4 if size <= 2**17 else 3)
