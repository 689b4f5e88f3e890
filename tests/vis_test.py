import os

import numpy as np
import pytest
from PIL import Image

from internal.vis import pictures


def luma(rgb):
  return rgb.astype(float) @ np.array([0.2126, 0.7152, 0.0722])


class TestColormap:
  def test_brightness_rises_throughout(self):
    ramp = pictures.apply_colormap(np.linspace(0, 1, 256))
    assert ramp.shape == (256, 3)
    assert np.all(np.diff(luma(ramp)) > -0.5)
    assert luma(ramp)[0] < 12
    assert luma(ramp)[-1] > 225

  def test_equal_steps_look_different(self):
    ramp = pictures.apply_colormap(np.linspace(0, 1, 17)).astype(float)
    assert np.linalg.norm(np.diff(ramp, axis=0), axis=-1).min() > 12

  def test_values_outside_are_clipped_and_nan_is_dark(self):
    low, high, nan = pictures.apply_colormap(np.array([-3.0, 7.0, np.nan]))
    ends = pictures.apply_colormap(np.array([0.0, 1.0]))
    np.testing.assert_array_equal([low, high, nan], [ends[0], ends[1], ends[0]])


class TestToUint8:
  def test_rounds_clips_and_passes_bytes_on(self):
    got = pictures.to_uint8(np.array([-1, 0.5, 0.999, 2, np.nan]))
    np.testing.assert_array_equal(got, np.array([0, 128, 255, 255, 0], np.uint8))
    same = np.arange(6, dtype=np.uint8)
    assert pictures.to_uint8(same) is same


class TestWritePng:
  def test_png_round_trip_leaves_no_other_file(self, tmp_path):
    img = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = tmp_path / 'new' / 'folder' / 'a.png'
    pictures.write_png(str(path), img)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), img)
    assert os.listdir(path.parent) == ['a.png']

  def test_a_failure_keeps_the_old_file(self, tmp_path, monkeypatch):
    path = tmp_path / 'a.png'
    pictures.write_png(str(path), np.zeros((4, 4, 3)))
    before = path.read_bytes()

    def interrupted(self, name, **_):
      with open(name, 'wb') as f:
        f.write(b'half')
      raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt):
      pictures.write_png(str(path), np.ones((4, 4, 3)))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['a.png']


class TestDepth:
  def test_range_is_robust_and_weighted(self):
    distance = np.concatenate([np.linspace(1, 10, 1000), [1e-6, 1e9], np.full(500, 1e5)])
    acc = np.concatenate([np.ones(1002), np.zeros(500)])
    near, far = pictures.depth_range(distance, acc)
    assert 1 <= near < 1.2
    assert 9.8 < far <= 10

  def test_range_without_anything_opaque(self):
    near, far = pictures.depth_range(np.ones((3, 3)), np.zeros((3, 3)))
    assert 0 < near < far

  @pytest.mark.parametrize('odd', [np.inf, np.nan, 0.0])
  def test_range_is_finite_and_positive(self, odd):
    near, far = pictures.depth_range(np.array([1.0, 2.0, odd]), np.ones(3))
    assert 0 < near < far < np.inf

  def test_near_is_brighter(self):
    distance = np.geomspace(0.5, 1e6, 64).reshape(8, 8)
    brightness = luma(pictures.depth_picture(distance, np.ones((8, 8)))).ravel()
    assert np.all(np.diff(brightness) <= 0.5)
    assert brightness[0] - brightness[-1] > 200

  def test_content_keeps_contrast_before_a_distant_sky(self):
    """Ground from 1 to 10 with half the image at 1e6: the ground must use most of the map."""
    distance = np.where(np.arange(64) < 32, np.linspace(1, 10, 64), 1e6).reshape(8, 8)
    brightness = luma(pictures.depth_picture(distance, np.ones((8, 8)))).ravel()
    assert brightness[0] - brightness[31] > 80
    assert brightness[31] - brightness[32] > 40

  def test_given_bounds_make_images_comparable(self):
    a, b = np.full((4, 4), 2.0), np.geomspace(1, 9, 16).reshape(4, 4)
    b[1, 1] = 2
    ones = np.ones((4, 4))
    first, second = (pictures.depth_picture(d, ones, (1.0, 9.0)) for d in (a, b))
    np.testing.assert_array_equal(first[0, 0], second[1, 1])

  def test_empty_pixels_are_white(self):
    acc = np.array([[0.0, 1.0]])
    picture = pictures.depth_picture(np.array([[2.0, 3.0]]), acc)
    np.testing.assert_array_equal(picture[0, 0], 255)
    assert luma(picture[0, 1]) < 250

  @pytest.mark.parametrize('value', [0.0, 1.0, 1e9, np.inf, np.nan])
  def test_flat_and_odd_distances_are_drawn(self, value):
    picture = pictures.depth_picture(np.full((4, 4), value), np.ones((4, 4)))
    assert picture.dtype == np.uint8
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 1


class TestError:
  def test_zero_is_darkest_and_more_is_brighter(self):
    truth = np.full((1, 4, 3), 0.5)
    img = truth + np.array([0, 0.04, 0.1, 0.5])[None, :, None]
    brightness = luma(pictures.error_picture(img, truth))[0]
    assert np.all(np.diff(brightness) > 20)
    np.testing.assert_array_equal(
      pictures.error_picture(img, truth)[0, 0], pictures.apply_colormap(0.0)
    )

  def test_sign_does_not_matter_and_bytes_do_not_wrap(self):
    a, b = np.full((2, 2, 3), 10, np.uint8), np.full((2, 2, 3), 30, np.uint8)
    np.testing.assert_array_equal(pictures.error_picture(a, b), pictures.error_picture(b, a))


class TestSheet:
  def test_every_image_is_there_unchanged_in_its_order(self):
    images = [np.full((20, 30, 3), v, np.uint8) for v in (10, 90, 170, 230)]
    got = pictures.sheet(images, list('abcd'), columns=2)
    rows, cols = {}, {}
    for img in images:
      y, x = np.nonzero((got == img[0, 0]).all(-1))
      value = int(img[0, 0, 0])
      assert len(y) >= 600
      rows[value], cols[value] = y.mean(), x.mean()
    assert abs(rows[10] - rows[90]) < 2
    assert rows[10] < rows[170] - 20
    assert abs(cols[10] - cols[170]) < 2
    assert cols[10] < cols[90] - 30

  def test_wide_images_are_shrunk_in_proportion(self):
    small = pictures.shrink(np.zeros((100, 400, 3)), 100)
    assert small.shape == (25, 100, 3)
    assert pictures.shrink(np.zeros((5, 7, 3)), 100).shape == (5, 7, 3)

  def test_small_images_are_enlarged_by_whole_pixels(self):
    img = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    big = pictures.enlarge(img, 10)
    assert big.shape == (6, 9, 3)
    np.testing.assert_array_equal(big[1::3, 1::3], img)
    np.testing.assert_array_equal(pictures.enlarge(img, 2), img)

  def test_captions_are_drawn_and_do_not_run_into_the_neighbour(self):
    images = [np.full((20, 60, 3), 250, np.uint8)] * 2
    plain = pictures.sheet(images, ['', ''])
    left = pictures.sheet(images, ['a very long caption indeed, longer than that', ''])
    assert left.shape == plain.shape
    changed = np.nonzero((left != plain).any(-1).any(0))[0]
    assert len(changed) > 20
    assert changed.max() < plain.shape[1] / 2

  def test_images_of_different_sizes(self):
    images = [np.full((h, w, 3), 99, np.uint8) for h, w in ((10, 40), (50, 20), (30, 30))]
    got = pictures.sheet(images, ['', '', ''], columns=2)
    assert (got == 99).all(-1).sum() == sum(img.shape[0] * img.shape[1] for img in images)

  def test_contact_sheet_is_about_four_to_three(self):
    for count in (1, 7, 37):
      sheet = pictures.contact_sheet([np.zeros((40, 60, 3))] * count, ['x'] * count)
      if count > 1:
        assert 0.8 < sheet.shape[1] / sheet.shape[0] < 2.2

  def test_comparison_shows_all_four(self):
    rendering = {
      'rgb': np.full((30, 40, 3), 0.25),
      'acc': np.ones((30, 40)),
      'distance_median': np.full((30, 40), 3.0),
    }
    truth = np.full((30, 40, 3), 128, np.uint8)
    got = pictures.comparison_sheet(rendering, truth, 'PSNR 12.3')
    for color in (
      (128,) * 3,
      (64,) * 3,
      tuple(pictures.error_picture(rendering['rgb'], truth)[0, 0]),
    ):
      assert (got == np.array(color)).all(-1).sum() >= 30 * 40


class TestRayPicture:
  def make(self, rays=3):
    s = np.tile(np.linspace(0, 1, 9), (rays, 1))
    w = np.zeros((rays, 8))
    w[:, 6] = 1
    return s, w, np.tile([0.9, 0.1, 0.2], (rays, 8, 1))

  def test_bars_stand_where_the_weight_is(self):
    s, w, rgb = self.make(1)
    got = pictures.ray_picture([s], [w], [rgb], width=160)
    x = np.nonzero((got == pictures.to_uint8(rgb[0, 0])).all(-1))[1] - 6  # The sheet's margin.
    assert (x.min(), x.max()) == (120, 139)  # Bin 6 of 8, of 160 pixels.

  def test_the_axis_has_the_distances_and_the_legend_explains(self):
    s, w, rgb = self.make(2)
    plain = pictures.ray_picture([s], [w], [rgb])
    metric = pictures.ray_picture([s], [w], [rgb], s_to_t=lambda x: 2 + 3 * x)
    assert plain.shape == metric.shape
    changed = np.nonzero((plain != metric).any((1, 2)))[0]
    assert changed.min() > plain.shape[0] - 38  # Only the axis, at the bottom.
    legend = plain[:48, 6:-6]
    assert (legend < 128).any((1, 2)).sum() > 20
    axis = plain[-38:-32, 6:-6]  # The line and its five ticks.
    assert (axis[3] < 128).all(-1).nonzero()[0].tolist() == [0, 240, 480, 720, 959]

  def test_rays_are_thinned(self):
    s, w, rgb = self.make(20)
    few = pictures.ray_picture([s, s], [w, w], [None, rgb], max_rays=4)
    assert few.shape == pictures.ray_picture([s[:4]] * 2, [w[:4]] * 2, [None, rgb[:4]]).shape

  def test_no_width_and_no_weight(self):
    s = np.zeros((2, 5))
    got = pictures.ray_picture([s], [np.zeros((2, 4))], [None])
    assert got.dtype == np.uint8
