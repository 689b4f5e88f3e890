"""Tests of photographs and videos as phones write them."""

import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, features
from textured_corner import texture

from internal.datasets import images
from internal.sfm import photo_files, pipeline, reconstruction, repeats, video_frames
from internal.sfm import photos as photos_lib
from internal.system import warnings
from internal.vis import video

UPRIGHT = np.zeros((48, 64, 3), np.uint8)
UPRIGHT[:24, :32] = (240, 30, 30)  # Top left.
UPRIGHT[:24, 32:] = (30, 220, 30)
ON_ITS_SIDE = np.ascontiguousarray(np.rot90(UPRIGHT))  # As stored with the EXIF orientation 6.


def exif_data(orientation=1, taken=None, model='Phone 5', focal=26, subsec=None, **tags):
  exif = Image.Exif()
  exif[0x0112] = orientation
  details = exif.get_ifd(0x8769)
  numbers = {'lens': 0xA434, 'zoom': 0xA404, 'serial': 0xA431}
  values = {0x9003: taken, 0x9291: subsec, 0xA405: focal}
  values |= {numbers[name]: value for name, value in tags.items()}
  details.update({tag: value for tag, value in values.items() if value is not None})
  if model:
    exif[0x0110] = model
  return exif


def save(path, pixels, **exif):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif_data(**exif), quality=95)


def save_heic(path, pixels, exif, turned_by_file=True):
  """Writes a HEIC; `turned_by_file` adds the rotation property that phones write beside EXIF's."""
  pillow_heif = pytest.importorskip('pillow_heif')
  pillow_heif.register_heif_opener()
  path.parent.mkdir(parents=True, exist_ok=True)
  exif = exif.tobytes() if turned_by_file else exif  # Of bytes, the writer reads the orientation.
  Image.fromarray(pixels).save(path, format='HEIF', exif=exif, quality=95)


def run(tmp_path, folder='photos', **options):
  photos = photos_lib.import_photos(str(tmp_path / folder), str(tmp_path / 'scene'), **options)
  return [photo for photo in photos if not photo.same_as]


def pixels_of(tmp_path, name):
  with Image.open(tmp_path / 'scene' / 'images' / name) as found:
    return np.asarray(found).astype(int), found.format, found.getexif()


# Formats.


def test_heic_becomes_an_upright_jpeg_with_its_exif_data(tmp_path):
  exif = exif_data(6, taken='2024:01:01 10:00:00')
  save_heic(tmp_path / 'photos' / 'IMG 1.HEIC', ON_ITS_SIDE, exif)
  (photo,) = run(tmp_path)
  found, form, exif = pixels_of(tmp_path, 'IMG_1.jpg')
  assert form == 'JPEG'
  assert found.shape == UPRIGHT.shape
  assert abs(found - UPRIGHT).mean() < 6  # Colours at a quarter of the resolution.
  assert exif.get(0x0112, 1) == 1
  assert exif.get_ifd(0x8769)[0xA405] == 26
  assert photo.camera == 'Phone 5 26 64x48'


def test_heic_is_turned_by_its_own_property_and_not_by_exif(tmp_path):
  save_heic(tmp_path / 'photos' / 'a.heic', UPRIGHT, exif_data(6), turned_by_file=False)
  run(tmp_path)
  assert abs(pixels_of(tmp_path, 'a.jpg')[0] - UPRIGHT).mean() < 6


@pytest.mark.skipif(not features.check('avif'), reason='this Pillow reads no AVIF')
def test_avif_is_turned_upright(tmp_path):
  save(tmp_path / 'photos' / 'a.avif', ON_ITS_SIDE, orientation=6)
  run(tmp_path)
  assert abs(pixels_of(tmp_path, 'a.jpg')[0] - UPRIGHT).mean() < 6


def test_heic_of_ten_bits_is_reduced_to_eight(tmp_path):
  pillow_heif = pytest.importorskip('pillow_heif')
  (tmp_path / 'photos').mkdir()
  levels = np.repeat(np.linspace(0, 1023, 64).round()[None, :, None], 48, 0).repeat(3, -1)
  pillow_heif.encode(
    'RGB;16',
    (64, 48),
    (levels.astype(np.uint16) << 6).tobytes(),
    str(tmp_path / 'photos' / 'a.heic'),
    quality=95,
  )
  run(tmp_path)
  assert abs(pixels_of(tmp_path, 'a.jpg')[0] - levels / 1023 * 255).max() < 8


def test_colours_for_hdr_displays_are_warned_of(tmp_path, capsys):
  pillow_heif = pytest.importorskip('pillow_heif')
  (tmp_path / 'photos').mkdir()
  for name, coding in (('a.heic', 18), ('b.heic', 1)):
    pillow_heif.encode(
      'RGB',
      (64, 48),
      UPRIGHT.tobytes(),
      str(tmp_path / 'photos' / name),
      quality=95,
      transfer_characteristics=coding,
    )
  run(tmp_path)
  said = capsys.readouterr().err
  assert "photos: 'a.heic' have colours coded for HDR displays" in said


def test_content_counts_and_not_the_ending(tmp_path):
  save_heic(tmp_path / 'photos' / 'a.jpg', UPRIGHT, exif_data())
  (tmp_path / 'photos' / 'b.HEIC').write_bytes(b'')
  Image.fromarray(255 - UPRIGHT).save(tmp_path / 'photos' / 'b.HEIC', format='JPEG', quality=95)
  assert [photo.name for photo in run(tmp_path)] == ['a.jpg', 'b.jpg']
  assert pixels_of(tmp_path, 'a.jpg')[1] == 'JPEG'
  assert abs(pixels_of(tmp_path, 'a.jpg')[0] - UPRIGHT).mean() < 6
  original = (tmp_path / 'photos' / 'b.HEIC').read_bytes()
  assert (tmp_path / 'scene' / 'images' / 'b.jpg').read_bytes() == original


def test_a_damaged_heic_is_named(tmp_path):
  save_heic(tmp_path / 'photos' / 'a.heic', UPRIGHT, exif_data())
  whole = (tmp_path / 'photos' / 'a.heic').read_bytes()
  for length in (24, len(whole) // 2):
    (tmp_path / 'photos' / 'a.heic').write_bytes(whole[:length])
    with pytest.raises(images.DataError, match=r'a\.heic: cannot be read as an image'):
      run(tmp_path)


def test_heic_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pillow_heif', None)
  save(tmp_path / 'photos' / 'b.jpg', UPRIGHT)
  start = b'\0\0\0\x18ftyp' + b'heic' + b'\0\0\0\0' + b'mif1heic'
  (tmp_path / 'photos' / 'a.HEIC').write_bytes(start)
  with pytest.raises(pipeline.PosesError) as error:
    run(tmp_path)
  assert str(error.value) == (
    f"{tmp_path / 'photos'}: 1 of its 2 photographs, such as 'a.HEIC', are HEIC files: pip install "
    '-r requirements-heic.txt. Or export them as JPEG.'
  )


def test_brands_tell_heic_from_avif(tmp_path):
  for brands, kind in (
    (b'heic\0\0\0\0mif1', 'HEIF'),
    (b'mif1\0\0\0\0avif', 'AVIF'),
    (b'isom\0\0\0\0mp42', None),
    (b'mif1\0\0\0\0heic', 'HEIF'),
  ):
    (tmp_path / 'a').write_bytes((8 + len(brands)).to_bytes(4, 'big') + b'ftyp' + brands)
    assert photo_files.content(str(tmp_path / 'a')) == kind
  (tmp_path / 'a').write_bytes(b'')
  assert photo_files.content(str(tmp_path / 'a')) is None


def test_live_photos_and_converted_twins_are_left_out_and_named(tmp_path, capsys):
  folder = tmp_path / 'photos'
  for name in ('IMG_1', 'IMG_2'):
    save(folder / f'{name}.JPG', UPRIGHT + np.uint8(len(name) + int(name[-1])))
    (folder / f'{name}.MOV').write_bytes(b'video')
  (folder / 'IMG_1.HEIC').write_bytes(b'not opened')
  (folder / 'IMG_2.DNG').write_bytes(b'not opened')
  (folder / 'IMG_3.DNG').write_bytes(b'not opened')
  assert [photo.name for photo in run(tmp_path)] == ['IMG_1.JPG', 'IMG_2.JPG']
  said = capsys.readouterr().err
  assert "skips 2 videos, as Live Photos have beside each picture: 'IMG_1.MOV'" in said
  assert "skips 2 files beside a JPEG or PNG of the same name: 'IMG_1.HEIC', 'IMG_2.DNG'" in said
  assert "not used: 'IMG_3.DNG'. Export it as JPEG to use it." in said
  for path in folder.glob('*.JPG'):
    path.unlink()
  for path in [*folder.glob('*.DNG'), *folder.glob('*.HEIC')]:
    path.unlink()
  with pytest.raises(pipeline.PosesError, match=r"no photographs .* but 2 videos, such as 'IMG_1"):
    run(tmp_path)


def test_a_gain_map_is_left_where_it_is(tmp_path):
  folder = tmp_path / 'photos'
  folder.mkdir()
  picture, gain = Image.fromarray(UPRIGHT), Image.fromarray(UPRIGHT[::2, ::2])
  for name, hour in (('b', 10), ('a', 11)):
    exif = exif_data(taken=f'2024:01:01 {hour}:00:00')
    picture.save(folder / f'{name}.jpg', 'MPO', save_all=True, append_images=[gain], exif=exif)
  assert [photo.name for photo in run(tmp_path)] == ['b.jpg', 'a.jpg']  # MPO has times too.
  assert (tmp_path / 'scene/images/a.jpg').read_bytes() == (folder / 'a.jpg').read_bytes()


# Cameras.


def cameras(tmp_path, **files):
  """Imports files of the given EXIF data; returns the groups that share intrinsics, sorted."""
  rng = np.random.default_rng(0)
  for name, (shape, exif) in files.items():
    pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
    save(tmp_path / 'photos' / f'{name.replace("__", "/")}.jpg', pixels, **exif)
  groups = {}
  for photo in run(tmp_path):
    groups.setdefault(photo.camera, []).append(images.stem(photo.name))
  return sorted(groups.values())


def test_intrinsics_are_shared_by_camera_and_lens_and_not_by_folder(tmp_path):
  wide, tall = (30, 40), (40, 30)
  groups = cameras(
    tmp_path,
    day1__a=(wide, {}),
    day2__b=(wide, {}),
    day2__c=(wide, {'focal': 13, 'lens': '0.5x'}),
    day1__d=(wide, {'focal': 13, 'lens': '0.5x'}),
    day1__e=(wide, {'zoom': 1.5}),
    day1__f=(tall, {'orientation': 6}),  # Held as the first two: upright it is as wide.
    day1__g=(tall, {}),  # Portrait: the same lens, but another size.
    day1__h=(wide, {'model': 'Phone 6'}),
    day1__i=(wide, {'serial': 'X1'}),
  )
  assert groups == [
    ['day1/a', 'day1/f', 'day2/b'],
    ['day1/d', 'day2/c'],
    ['day1/e'],
    ['day1/g'],
    ['day1/h'],
    ['day1/i'],
  ]


def test_without_exif_the_folder_and_size_stand_for_the_camera(tmp_path, capsys):
  none = {'model': None, 'focal': None}
  groups = cameras(
    tmp_path,
    left__a=((30, 40), none),
    left__b=((30, 40), none),
    right__c=((30, 40), none),
    right__d=((20, 40), none),
    right__e=((30, 40), {}),
  )
  assert groups == [['left/a', 'left/b'], ['right/c'], ['right/d'], ['right/e']]
  said = capsys.readouterr().err
  assert "4 of 5 photographs, such as 'left/a.jpg', have no camera in their EXIF data" in said


def test_features_of_large_photographs_fit_into_the_memory(tmp_path, monkeypatch):
  pycolmap = pytest.importorskip('pycolmap')
  with reconstruction.database(tmp_path) as db:
    for width, height in ((4032, 3024), (640, 480)):  # The first is reduced to 3200x2400.
      db.write_camera(pycolmap.Camera.create_from_model_name(1, 'PINHOLE', 3000, width, height))
  monkeypatch.setattr(reconstruction.os, 'cpu_count', lambda: 16)
  for gigabytes, threads in ((64, 16), (16, 4), (1, 1)):
    monkeypatch.setattr(
      reconstruction.pixel_store, 'available_memory', lambda free=gigabytes: free * 10**9
    )
    assert reconstruction._feature_options(str(tmp_path)).num_threads == threads


def test_small_pictures_get_fewer_features(tmp_path):
  pycolmap = pytest.importorskip('pycolmap')
  for size, most in (((640, 480), 4096), ((1000, 600), 6000), ((4032, 3024), 8192)):
    (tmp_path / str(most)).mkdir()
    with reconstruction.database(tmp_path / str(most)) as db:
      db.write_camera(pycolmap.Camera.create_from_model_name(1, 'PINHOLE', 3000, *size))
    options = reconstruction._feature_options(str(tmp_path / str(most)))
    assert options.sift.max_num_features == most


# Repeats.


TEXTURE = texture(3)[:150, :300]


def view(shift, blur=0.0):
  """A part of a texture, 200 wide, moved by `shift` pixels."""
  big = scipy.ndimage.shift(TEXTURE, (0, -shift, 0), order=1)[:, 50:250]
  big = scipy.ndimage.gaussian_filter(big, (blur, blur, 0)) if blur else big
  return big.round().astype(np.uint8)


@pytest.mark.parametrize('shift', [0.5, 1.0, 2.0])
def test_movement_is_a_share_of_the_width(shift):
  a, b = (repeats.thumbnail(view(s)) for s in (0, shift))
  assert shift / 200 * 0.7 < repeats.movement(a, b) < shift / 200 * 2
  assert repeats.movement(a, a) == 0


def test_light_is_no_movement_but_a_turntable_is():
  still = view(0).astype(float)
  brighter = (still * 0.8 + 40).round().astype(np.uint8)
  assert repeats.movement(repeats.thumbnail(view(0)), repeats.thumbnail(brighter)) < 0.001
  noisy = still + np.random.default_rng(0).normal(0, 4, still.shape)
  noisy = np.clip(noisy, 0, 255).astype(np.uint8)
  assert repeats.movement(repeats.thumbnail(view(0)), repeats.thumbnail(noisy)) < 0.003
  turned = view(0)
  turned[50:100, 70:130] = view(8)[50:100, 70:130]  # A tenth of the picture.
  assert repeats.movement(repeats.thumbnail(view(0)), repeats.thumbnail(turned)) > 0.01
  grey = np.full((30, 40, 3), 90, np.uint8)
  assert repeats.movement(repeats.thumbnail(grey), repeats.thumbnail(grey)) == 0


def burst(folder):
  """Three photographs of a burst at one place, two of a burst that moves, and a later one."""
  for name, shift, blur, second, fraction in (
    ('IMG_1', 0.0, 1.0, 1, '10'),
    ('IMG_2', 0.2, 0.0, 1, '30'),
    ('IMG_3', 0.4, 1.5, 2, '50'),
    ('IMG_4', 12.0, 0.0, 3, '00'),
    ('IMG_5', 0.1, 0.0, 40, '00'),
  ):
    taken = f'2024:01:01 10:00:{second:02d}'
    save(folder / f'{name}.jpg', view(shift, blur), taken=taken, subsec=fraction)


def test_of_a_burst_the_sharpest_is_kept(tmp_path, capsys):
  burst(tmp_path / 'photos')
  assert [photo.name for photo in run(tmp_path)] == ['IMG_2.jpg', 'IMG_4.jpg', 'IMG_5.jpg']
  left = sorted(path.name for path in (tmp_path / 'scene' / 'images').iterdir())
  assert left == ['IMG_2.jpg', 'IMG_4.jpg', 'IMG_5.jpg']
  said = capsys.readouterr().err
  assert '2 of 5 photographs repeat others (bursts, copies) and are left out' in said
  assert "such as 'IMG_2.jpg' for 'IMG_1.jpg'" in said
  assert len(list((tmp_path / 'photos').iterdir())) == 5  # The originals are not touched.


def test_photographs_with_given_poses_are_all_kept(tmp_path):
  burst(tmp_path / 'photos')
  assert len(run(tmp_path, stored=())) == 5


def test_photographs_that_were_posed_as_stored_are_not_turned(tmp_path):
  pytest.importorskip('pycolmap')
  for name in ('a', 'b'):
    save(tmp_path / 'photos' / f'{name}.jpg', ON_ITS_SIDE, orientation=6)
  photos = run(tmp_path, stored={'a.jpg'})
  stored = (tmp_path / 'scene' / 'images' / 'a.jpg').read_bytes()
  assert stored == (tmp_path / 'photos' / 'a.jpg').read_bytes()
  reconstruction.extract_features(str(tmp_path / 'scene'), photos, None)
  with reconstruction.database(tmp_path / 'scene') as db:
    sizes = {i.name: db.read_camera(i.camera_id) for i in db.read_all_images()}
  found = {name: (camera.width, camera.height) for name, camera in sizes.items()}
  assert found == {'a.jpg': (48, 64), 'b.jpg': (64, 48)}  # COLMAP ignores the orientation.


def test_a_burst_that_grows_keeps_what_was_used(tmp_path):
  burst(tmp_path / 'photos')
  sharpest = tmp_path / 'IMG_2.jpg'
  (tmp_path / 'photos' / 'IMG_2.jpg').rename(sharpest)
  args = str(tmp_path / 'photos'), str(tmp_path / 'scene')
  first = photos_lib.import_photos(*args)
  used = [photo.name for photo in first if not photo.same_as]
  assert used == ['IMG_1.jpg', 'IMG_4.jpg', 'IMG_5.jpg']
  sharpest.rename(tmp_path / 'photos' / 'IMG_2.jpg')
  again = photos_lib.import_photos(*args, known=first)
  assert [photo.name for photo in again if not photo.same_as] == used
  assert {p.source: p.same_as for p in again if p.same_as} == {
    'IMG_2.jpg': 'IMG_1.jpg',
    'IMG_3.jpg': 'IMG_1.jpg',
  }


def test_masks_of_a_burst_are_left_out_with_their_photographs(tmp_path):
  burst(tmp_path / 'photos')
  (tmp_path / 'masks').mkdir()
  for k in range(1, 6):
    Image.new('L', (200, 150), 255).save(tmp_path / 'masks' / f'IMG_{k}.png')
  args = [str(tmp_path / name) for name in ('photos', 'scene', 'masks')]
  first = photos_lib.import_photos(*args)
  left = sorted(path.name for path in (tmp_path / 'scene' / 'masks').iterdir())
  assert left == ['IMG_2.jpg.png', 'IMG_4.jpg.png', 'IMG_5.jpg.png']
  assert photos_lib.import_photos(*args, known=first) == first


def test_copies_of_a_file_count_once(tmp_path):
  none = {'model': None, 'focal': None}
  save(tmp_path / 'photos' / 'a.jpg', view(0), **none)
  save(tmp_path / 'photos' / 'b.jpg', view(30), **none)
  (tmp_path / 'photos' / 'a (1).jpg').write_bytes((tmp_path / 'photos' / 'a.jpg').read_bytes())
  assert len(run(tmp_path)) == 2


# Videos.


def ffmpeg(*args, content=None):
  command = [video.find_ffmpeg(), '-v', 'error', '-y', *map(str, args)]
  done = subprocess.run(command, input=content, capture_output=True)
  assert done.returncode == 0, done.stderr.decode()


def write_raw(path, frames, *options):
  """Encodes frames [n, h, w, 3] uint8 with ffmpeg's options."""
  height, width = frames[0].shape[:2]
  source = ['-f', 'rawvideo', '-pix_fmt', 'rgb24', '-s', f'{width}x{height}', '-r', '10', '-i', '-']
  ffmpeg(*source, *options, path, content=np.stack(frames).tobytes())


def test_pauses_of_a_video_are_left_out(tmp_path, capsys):
  shifts = [0, 4, 8, *[8.2] * 8, 12, 16, 20]
  write_raw(tmp_path / 'a.mp4', [view(s) for s in shifts], '-crf', '12', '-pix_fmt', 'yuv420p')
  photos = video_frames.extract_frames(str(tmp_path / 'a.mp4'), str(tmp_path / 'scene'), 14)
  assert [int(photo.source) for photo in photos] == [0, 1, 2, 11, 12, 13]
  assert 'a.mp4: 8 of 14 frames are left out' in capsys.readouterr().err
  write_raw(tmp_path / 'b.mp4', [view(0)] * 9, '-pix_fmt', 'yuv420p')
  with pytest.raises(pipeline.PosesError, match='has 1 frame in which something moves'):
    video_frames.extract_frames(str(tmp_path / 'b.mp4'), str(tmp_path / 'other'))


def test_a_video_that_was_held_upright_is_upright(tmp_path):
  frames = [np.ascontiguousarray(np.rot90(view(4 * k))) for k in range(4)]
  write_raw(tmp_path / 'a.mp4', frames, '-crf', '5', '-pix_fmt', 'yuv420p')
  ffmpeg(
    '-display_rotation', '-90', '-i', tmp_path / 'a.mp4', '-c', 'copy', tmp_path / 'turned.mp4'
  )
  photos = video_frames.extract_frames(str(tmp_path / 'turned.mp4'), str(tmp_path / 'scene'))
  found = pixels_of(tmp_path, photos[1].name)[0]
  assert found.shape == (150, 200, 3)
  assert abs(found - view(4).astype(int)).mean() < 12


def test_a_variable_frame_rate_loses_no_frame(tmp_path):
  frames = [view(5 * k) for k in range(12)]
  write_raw(
    tmp_path / 'a.mp4',
    frames,
    *('-vf', "settb=1/1000,setpts='if(lt(N,6),N*33,200+N*150)'", '-fps_mode', 'vfr'),
    *('-enc_time_base', '1/1000'),
    *('-crf', '10', '-pix_fmt', 'yuv420p'),
  )
  photos = video_frames.extract_frames(str(tmp_path / 'a.mp4'), str(tmp_path / 'scene'))
  assert [int(photo.source) for photo in photos] == list(range(12))
  for k in (3, 9):
    found = pixels_of(tmp_path, photos[k].name)[0]
    errors = [abs(found - frame.astype(int)).mean() for frame in frames]
    assert int(np.argmin(errors)) == k


def test_a_video_that_was_cut_off_is_warned_of(tmp_path):
  shown = ('-vf', 'noise=alls=60:allf=t', '-movflags', '+faststart', '-pix_fmt', 'yuv420p')
  write_raw(tmp_path / 'a.mp4', [view(5 * k) for k in range(40)], *shown)
  content = (tmp_path / 'a.mp4').read_bytes()
  (tmp_path / 'cut.mp4').write_bytes(content[: len(content) // 2])
  with warnings.collect() as found:
    video_frames.extract_frames(str(tmp_path / 'a.mp4'), str(tmp_path / 'scene'), 5)
    assert not found
    video_frames.extract_frames(str(tmp_path / 'cut.mp4'), str(tmp_path / 'other'), 5)
  assert len(found) == 1
  assert re.search(r'cut.mp4: only [12]s of 4s can be read', found[0])


GREYS = [(30,) * 3, (120,) * 3, (200,) * 3]
COLOURS = [*GREYS, (190, 60, 50), (60, 160, 70), (50, 70, 180)]


@pytest.mark.parametrize('curve', ['arib-std-b67', 'smpte2084'])  # HLG and PQ.
def test_hdr_video_becomes_ordinary_colours(tmp_path, curve):
  patches = np.repeat(np.array(COLOURS, np.uint8), 16, 0)[None].repeat(64, 0)  # [64, 96, 3]
  convert = (
    'format=gbrp,setparams=colorspace=gbr:color_primaries=bt709:color_trc=iec61966-2-1:range=pc,'
    'zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt2020,'
    f'zscale=t={curve}:m=bt2020nc:r=tv:npl=203,format=yuv420p10le'
  )
  write_raw(
    tmp_path / 'a.mp4',
    [patches, patches[:, ::-1], np.roll(patches, 8, 1)],
    *('-vf', convert, '-c:v', 'libx265', '-crf', '8', '-x265-params', 'log-level=none'),
    *('-color_primaries', 'bt2020', '-color_trc', curve, '-colorspace', 'bt2020nc'),
  )
  photos = video_frames.extract_frames(str(tmp_path / 'a.mp4'), str(tmp_path / 'scene'))
  found = pixels_of(tmp_path, photos[0].name)[0]
  for k, colour in enumerate(COLOURS):
    centre = found[24:40, 16 * k + 5 : 16 * k + 11].mean((0, 1))
    assert abs(centre - colour).max() < 5, (colour, centre)  # Unconverted, white is 166 or 132.
