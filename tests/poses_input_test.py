"""Tests of how photographs and videos are imported into a capture."""

import os
import shutil

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image
from textured_corner import texture

from internal.datasets import images
from internal.sfm import diagnosis, incremental, pipeline, reconstruction, video_frames
from internal.sfm import photos as photos_lib
from internal.system import warnings
from internal.vis import pictures, video


def save_turned(path, pixels, orientation, **exif_tags):
  """Saves a JPEG with an EXIF orientation, as a camera does."""
  exif = Image.Exif()
  exif[0x0112] = orientation
  details = exif.get_ifd(0x8769)
  for tag, value in exif_tags.items():
    details[{'taken': 0x9003, 'focal': 0xA405}[tag]] = value
  exif[0x0110] = 'Phone 5'
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path, exif=exif, quality=95)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_photographs_stand_upright_and_originals_are_untouched(tmp_path, orientation):
  upright = np.zeros((48, 64, 3), np.uint8)
  upright[:24, :32] = (250, 20, 20)  # Top left.
  upright[:24, 32:] = (20, 250, 20)
  stored = {
    1: upright,
    2: upright[:, ::-1],
    3: upright[::-1, ::-1],
    4: upright[::-1],
    5: upright.swapaxes(0, 1),
    6: np.rot90(upright),
    7: upright[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(upright, -1),
  }[orientation]
  source = tmp_path / 'photos' / 'a.jpg'
  save_turned(source, np.ascontiguousarray(stored), orientation, focal=28)
  before = source.read_bytes()
  photo = photos_lib.import_photos(str(tmp_path / 'photos'), str(tmp_path / 'scene'))[0]
  assert source.read_bytes() == before
  with Image.open(tmp_path / 'scene' / 'images' / 'a.jpg') as taken:
    assert taken.getexif().get(0x0112, 1) == 1
    assert taken.getexif().get_ifd(0x8769)[0xA405] == 28  # COLMAP's first guess of the focal.
    assert abs(np.asarray(taken, int) - upright).mean() < 3  # It is a JPEG.
  assert photo.camera == 'Phone 5 28 64x48'


def test_upright_photographs_are_copied_and_other_formats_become_png(tmp_path):
  photos, scene = tmp_path / 'photos', tmp_path / 'scene'
  pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  save_turned(photos / 'sub' / 'a.jpg', pixels, 1)
  Image.fromarray(pixels).save(photos / 'b.webp', lossless=True)
  # In COLMAP's lists, spaces separate names, and a # begins a comment.
  Image.fromarray(pixels).save(photos / 'c ä (1).png')
  Image.fromarray(pixels).save(photos / '#2 #3.png', compress_level=1)
  names = [photo.name for photo in photos_lib.import_photos(str(photos), str(scene))]
  assert names == ['_2_#3.png', 'b.png', 'c_ä_(1).png', 'sub/a.jpg']
  assert (scene / 'images/sub/a.jpg').read_bytes() == (photos / 'sub/a.jpg').read_bytes()
  np.testing.assert_array_equal(np.asarray(Image.open(scene / 'images/b.png')), pixels)


def test_links_to_folders_are_named(tmp_path, capsys):
  write_photos(tmp_path / 'photos' / 'day 1')
  (tmp_path / 'photos' / 'day 2').symlink_to(tmp_path / 'photos' / 'day 1')
  assert len(photos_lib.import_photos(str(tmp_path / 'photos'), str(tmp_path / 'scene'))) == 3
  said = capsys.readouterr().err
  assert "skips 1 link to other folders; copy these to use their photographs: 'day 2'" in said


def test_jpegs_of_any_ending_are_taken_and_other_files_named(tmp_path, capsys):
  """`.jfif` is what browsers save; nothing but known clutter is left out in silence."""
  write_photos(tmp_path / 'photos')
  for name, ending in (('a.jpg', '.jfif'), ('b.jpg', '.JPE')):
    path = tmp_path / 'photos' / name
    path.rename(path.with_suffix(ending))
  for name in ('d.gif', 'e', 'f.jp2', 'Thumbs.db', 'notes.txt', 'IMG_1.AAE', '.DS_Store'):
    (tmp_path / 'photos' / name).write_bytes(b'x')
  with warnings.collect() as collected:
    photos = photos_lib.import_photos(str(tmp_path / 'photos'), str(tmp_path / 'scene'))
  assert [photo.name for photo in photos] == ['a.jfif', 'b.JPE', 'c_1.png']
  assert images.decode(str(tmp_path / 'scene/images/a.jfif')).shape == (20, 30, 3)
  (warning,) = collected
  assert '3 files of other formats' in warning
  assert "not used: 'd.gif', 'e', 'f.jp2'. Export them as JPEG" in warning
  assert capsys.readouterr().err.count('Warning') == 0


def test_names_sort_in_natural_order():
  names = ['IMG_10.jpg', 'IMG_9.jpg', 'a².jpg', '2.jpg', 'img_1.jpg']
  assert sorted(names, key=photos_lib.natural_key) == [
    '2.jpg',
    'a².jpg',
    'img_1.jpg',
    'IMG_9.jpg',
    'IMG_10.jpg',
  ]


def test_photographs_are_in_order_of_time_else_of_name(tmp_path):
  pixels = np.zeros((8, 8, 3), np.uint8)
  for name, taken in (('IMG_10', '2024:01:01 10:00:00'), ('IMG_9', '2024:01:01 11:00:00')):
    save_turned(tmp_path / 'timed' / f'{name}.jpg', pixels, 1, taken=taken)
    save_turned(tmp_path / 'plain' / f'{name}.jpg', pixels, 1)
  order = [
    [
      photo.name
      for photo in photos_lib.import_photos(str(tmp_path / kind), str(tmp_path / f'{kind}_scene'))
    ]
    for kind in ('timed', 'plain')
  ]
  assert order == [['IMG_10.jpg', 'IMG_9.jpg'], ['IMG_9.jpg', 'IMG_10.jpg']]


def test_masks_are_rotated_with_their_photographs(tmp_path):
  stored = np.zeros((30, 20, 3), np.uint8)
  save_turned(tmp_path / 'photos/a.jpg', stored, 6)
  save_turned(tmp_path / 'photos/b.jpg', np.zeros((20, 30, 3), np.uint8), 1)
  mask = np.zeros((30, 20), np.uint8)
  mask[:5] = 255
  (tmp_path / 'masks').mkdir()
  Image.fromarray(mask).save(tmp_path / 'masks/a.png')
  photos_lib.import_photos(
    str(tmp_path / 'photos'), str(tmp_path / 'scene'), str(tmp_path / 'masks')
  )
  upright = np.asarray(Image.open(tmp_path / 'scene/masks/a.jpg.png'))
  np.testing.assert_array_equal(upright, np.rot90(mask, -1))
  Image.fromarray(mask[:-1]).save(tmp_path / 'masks/b.png')
  with pytest.raises(ValueError, match=r'b\.png: is 20x29 pixels, but its photograph is 30x20'):
    photos_lib.import_photos(
      str(tmp_path / 'photos'), str(tmp_path / 'other'), str(tmp_path / 'masks')
    )


def write_photos(folder, names=('a.jpg', 'b.jpg', 'c 1.png')):
  for i, name in enumerate(names):
    save_turned(folder / name, np.full((20, 30, 3), 80 * i, np.uint8), 1)


def half_mask(path):
  path.parent.mkdir(exist_ok=True)
  mask = np.zeros((20, 30), np.uint8)
  mask[:5] = 255
  Image.fromarray(mask).save(path)


@pytest.mark.parametrize(
  'name', ['masks/a.jpg', 'masks/a_mask.png', 'masks/A.JPG.png', 'photos/a_mask.png']
)
def test_masks_of_every_usual_name_are_imported(tmp_path, capsys, name):
  write_photos(tmp_path / 'photos')
  half_mask(tmp_path / 'masks' / 'c 1.png')
  half_mask(tmp_path / name)
  args = str(tmp_path / 'photos'), str(tmp_path / 'scene'), str(tmp_path / 'masks')
  photos = photos_lib.import_photos(*args)
  assert [photo.name for photo in photos] == ['a.jpg', 'b.jpg', 'c_1.png']
  for photo, rows in zip(photos, (5, 20, 5)):
    mask = np.asarray(Image.open(tmp_path / 'scene' / 'masks' / f'{photo.name}.png'))
    assert set(np.unique(mask)) <= {0, 255}
    assert (mask > 0).sum() == 30 * rows
  said = capsys.readouterr().err
  assert ("used as masks, not as photographs: 'a_mask.png'" in said) == name.startswith('photos')
  assert '2 of 3 photographs have a mask' in said
  assert "'b.jpg'" in said


def test_masks_that_come_after_their_photographs_are_refused(tmp_path):
  write_photos(tmp_path / 'photos')
  args = str(tmp_path / 'photos'), str(tmp_path / 'scene')
  photos = photos_lib.import_photos(*args)
  half_mask(tmp_path / 'scene' / 'masks' / 'a.png')  # It is found in training.
  assert photos_lib.import_photos(*args, str(tmp_path / 'scene' / 'masks'), photos) == photos
  half_mask(tmp_path / 'photos' / 'b_mask.png')
  with pytest.raises(pipeline.PosesError, match=r"scene: was started before .* masks of 'b\.jpg'"):
    photos_lib.import_photos(*args, known=photos)


def test_masks_of_instant_ngp_are_imported_inverted(tmp_path):
  write_photos(tmp_path / 'photos')
  half_mask(tmp_path / 'photos' / 'dynamic_mask_a.png')
  photos_lib.import_photos(str(tmp_path / 'photos'), str(tmp_path / 'scene'))
  mask = np.asarray(Image.open(tmp_path / 'scene' / 'masks' / 'a.jpg.png'))
  assert (mask[:5] == 0).all()
  assert (mask[5:] == 255).all()


def test_masks_without_photographs_are_refused_or_warned_of(tmp_path, capsys):
  write_photos(tmp_path / 'photos')
  half_mask(tmp_path / 'masks' / 'x.png')
  args = str(tmp_path / 'photos'), str(tmp_path / 'scene'), str(tmp_path / 'masks')
  with pytest.raises(ValueError, match='masks: has 1 masks, but none has the name of a photograph'):
    photos_lib.import_photos(*args)
  half_mask(tmp_path / 'masks' / 'a.png')
  photos_lib.import_photos(*args)
  assert (
    "masks: 1 of 2 masks have no photograph and are not used: 'x.png'" in capsys.readouterr().err
  )


def test_photographs_in_the_capture_are_never_changed(tmp_path):
  folder = tmp_path / 'scene' / 'images'
  save_turned(folder / 'a.jpg', np.zeros((8, 12, 3), np.uint8), 1)
  before = (folder / 'a.jpg').stat().st_mtime_ns
  assert len(photos_lib.import_photos(str(folder), str(tmp_path / 'scene'))) == 1
  assert (folder / 'a.jpg').stat().st_mtime_ns == before
  save_turned(folder / 'b.jpg', np.zeros((8, 12, 3), np.uint8), 6)
  with pytest.raises(
    pipeline.PosesError, match=r'b\.jpg: must be rotated, .* no photograph is changed'
  ):
    photos_lib.import_photos(str(folder), str(tmp_path / 'scene'))


# Videos.


def write_sample_video(path, sharp, frames=24):
  """Writes a video in which only the frames `sharp` are; a grey stripe encodes the number."""
  rng = np.random.default_rng(0)
  base = scipy.ndimage.gaussian_filter(rng.uniform(0, 255, (96, 128, 3)), (1, 1, 0))
  base = (base - base.min()) / np.ptp(base)
  names = []
  for k in range(frames):
    img = base if k in sharp else scipy.ndimage.gaussian_filter(base, (3, 3, 0))
    img = img.copy()
    img[:16] = k / frames
    names.append(str(path.parent / f'{k:03d}.png'))
    pictures.write_png(names[-1], img)
  video.write_video(names, str(path), fps=8, crf=10)


def test_the_sharpest_frame_of_each_window_is_taken(tmp_path):
  sharp = (2, 11, 12, 23)
  write_sample_video(tmp_path / 'video.mp4', sharp)
  photos = video_frames.extract_frames(str(tmp_path / 'video.mp4'), str(tmp_path / 'scene'), 4)
  assert [photo.source for photo in photos] == [str(k) for k in sharp]
  assert [photo.name for photo in photos] == [f'frame_{k:04d}.jpg' for k in range(4)]
  for photo, number in zip(photos, sharp):
    with Image.open(tmp_path / 'scene' / 'images' / photo.name) as frame:
      assert frame.size == (128, 96)
      assert abs(np.asarray(frame)[2:12].mean() - 255 * number / 24) < 5
  with pytest.raises(pipeline.PosesError, match='has 2 frames; at least 3 are needed'):
    video_frames.extract_frames(str(tmp_path / 'video.mp4'), str(tmp_path / 'other'), 2)


def test_windows_cover_all_frames_evenly():
  for frames, count in ((24, 4), (100, 7), (5, 9), (1, 1)):
    found = video_frames.windows(frames, count)
    assert [k for window in found for k in window] == list(range(frames))
    lengths = [len(window) for window in found]
    assert len(found) == min(frames, count)
    assert max(lengths) - min(lengths) <= 1 <= min(lengths)
  assert video_frames.sensible_count(3000, 100.0) == 200
  assert video_frames.sensible_count(3000, 10.0) == 100
  assert video_frames.sensible_count(60, 10.0) == 60
  assert video_frames.sensible_count(90_000, 3000.0) == 300


def test_sharpness_depends_on_blur_and_not_on_brightness():
  img = texture(5, 200).astype(np.uint8)
  blurred = [
    pictures.to_uint8(scipy.ndimage.gaussian_filter(img, (s, s, 0)) / 255.0) for s in (1, 2, 4)
  ]
  scores = [photos_lib.sharpness(i) for i in (img, *blurred)]
  assert scores == sorted(scores, reverse=True)
  assert scores[2] < diagnosis.BLURRED * scores[0]
  assert abs(photos_lib.sharpness((img * 0.5).astype(np.uint8)) / scores[0] - 1) < 0.05
  assert photos_lib.sharpness(np.full((9, 9, 3), 7, np.uint8)) == 0
  assert photos_lib.sharpness(np.zeros((2, 2, 3), np.uint8)) == 0


@pytest.mark.parametrize('content', ['', '[' * 10**5, '[]', '{"asked": [], "photos": [1]}'])
def test_a_damaged_state_is_named(tmp_path, content):
  path = tmp_path / 'poses.json'
  path.write_text(content)
  with pytest.raises(photos_lib.PosesError, match=r'poses\.json: .*Remove its folder'):
    pipeline._resume(str(path), {})


def test_a_damaged_database_is_named(tmp_path):
  reconstruction.check_database(str(tmp_path))
  (tmp_path / 'database.db').write_bytes(b'SQLite format 3\0' + bytes(range(256)) * 40)
  with pytest.raises(photos_lib.PosesError, match=r'database\.db: is damaged .*Remove it'):
    reconstruction.check_database(str(tmp_path))


def test_a_damaged_snapshot_is_skipped(tmp_path):
  (tmp_path / '000003').mkdir()
  (tmp_path / '000003' / 'cameras.bin').write_bytes(b'x')
  assert incremental._newest_snapshot(str(tmp_path), 3) is None
  assert not (tmp_path / '000003').exists()


def test_names_that_are_not_utf8_are_refused(tmp_path):
  (tmp_path / 'ü.jpg').touch()
  pipeline._check(str(tmp_path), pipeline.Options())
  (tmp_path / os.fsdecode(b'\xe9.jpg')).touch()
  with pytest.raises(photos_lib.PosesError, match=r'needs names in UTF-8; rename it'):
    pipeline._check(str(tmp_path), pipeline.Options())


def test_too_little_space_is_noticed_before_the_slow_part(tmp_path, monkeypatch):
  photos, scene = tmp_path / 'photos', tmp_path / 'scene'
  photos.mkdir()
  for k in range(3):
    pixels = np.random.default_rng(k).integers(0, 256, (120, 160, 3), np.uint8)
    Image.fromarray(pixels).save(photos / f'{k}.png')
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage._replace(free=900_000))
  with pytest.raises(photos_lib.PosesError, match=r'scene: .* 1\.0 MB more .* 0\.9 MB are'):
    pipeline.make(str(photos), str(scene))
  assert not (scene / 'database.db').exists()


def test_colmap_errors_on_a_full_disk_say_so(tmp_path, monkeypatch):
  with pytest.raises(RuntimeError, match='factory'), pipeline._full_disk_named(str(tmp_path)):
    raise RuntimeError('No registered database factory succeeded.')
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage._replace(free=0))
  with pytest.raises(OSError, match='No space left'), pipeline._full_disk_named(str(tmp_path)):
    raise RuntimeError('No registered database factory succeeded.')
