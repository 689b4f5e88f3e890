import json

import numpy as np
import pytest
from scipy import ndimage

from internal import configs, image, report


@pytest.fixture
def pair():
  """A photograph (uint8) and a rendering of it (float) with a colour cast and noise."""
  rng = np.random.default_rng(3)
  truth = ndimage.gaussian_filter(rng.normal(size=(32, 40, 3)), (3, 3, 0))
  truth = (truth - truth.min()) / (truth.max() - truth.min())
  img = 0.8 * truth + 0.07 + rng.normal(0, 0.01, truth.shape)
  return img.astype(np.float32), np.round(255 * truth).astype(np.uint8)


class TestImageMetrics:
  def test_psnr_is_of_the_quantised_prediction(self, pair):
    img, truth = pair
    quantised = np.round(np.clip(img, 0, 1) * 255) / 255
    wanted = -10 * np.log10(np.mean((quantised - truth / 255.0) ** 2))
    got = report.image_metrics(img, truth, configs.Config())
    assert tuple(got) == report.METRICS
    assert got['psnr'] == pytest.approx(wanted, abs=1e-3)
    exact = report.image_metrics(img, truth, configs.Config(eval_quantize_metrics=False))
    assert exact['psnr'] != got['psnr']
    assert exact['psnr'] == pytest.approx(
      -10 * np.log10(np.mean((img - truth / 255.0) ** 2)), abs=1e-3
    )

  def test_a_colour_cast_is_forgiven_only_by_the_corrected_metrics(self, pair):
    img, truth = pair
    got = report.image_metrics(img, truth, configs.Config())
    assert got['cc_psnr'] > got['psnr'] + 8
    fixed = image.quantize(image.color_correct(img, np.float32(truth / 255)))
    assert got['cc_ssim'] == pytest.approx(
      float(image.ssim(fixed, np.float32(truth / 255))), abs=1e-5
    )

  def test_borders_are_cropped(self, pair):
    img, truth = pair
    spoiled = img.copy()
    spoiled[:3] = spoiled[-3:] = spoiled[:, :3] = spoiled[:, -3:] = 0
    config = configs.Config(eval_crop_borders=3)
    a, b = (report.image_metrics(x, truth, config) for x in (img, spoiled))
    assert a['psnr'] == pytest.approx(b['psnr'], abs=1e-5)
    assert report.image_metrics(spoiled, truth, configs.Config())['psnr'] < a['psnr'] - 3

  def test_values_out_of_range_are_clipped(self, pair):
    img, truth = pair
    got = [
      report.image_metrics(x, truth, configs.Config()) for x in (np.clip(4 * img, 0, 1), 4 * img)
    ]
    assert got[0] == got[1]

  def test_a_perfect_prediction(self, pair):
    _, truth = pair
    got = report.image_metrics(truth / 255.0, truth, configs.Config())
    assert np.isposinf(got['psnr'])
    assert got['ssim'] == pytest.approx(1, abs=1e-6)

  def test_sizes_must_agree(self, pair):
    with pytest.raises(ValueError, match='compared'):
      report.image_metrics(pair[0], pair[1][:, :-1], configs.Config())


class TestProtocol:
  def test_the_published_one_has_no_departures(self):
    got = report.protocol(configs.Config(dataset_loader='llff', factor=4))
    assert got['name'] == 'mip-NeRF 360'
    assert got['departures'] == []

  @pytest.mark.parametrize(
    ('change', 'word'),
    [
      ({'eval_quantize_metrics': False}, 'quantised'),
      ({'eval_crop_borders': 2}, '2 pixels'),
      ({'eval_render_interval': 12}, 'one in 12'),
      ({'eval_dataset_limit': 4}, 'at most 4'),
      ({'llffhold': 10}, '10th'),
    ],
  )
  def test_every_departure_is_named(self, change, word):
    got = report.protocol(configs.Config(**change))
    assert got['name'] == 'mip-NeRF 360, modified'
    assert len(got['departures']) == 1
    assert word in got['departures'][0]


class TestResults:
  def rows(self, **change):
    row = {'psnr': 20.0, 'ssim': 0.5, 'cc_psnr': 21.0, 'cc_ssim': 0.6}
    return [
      {'name': 'a.png', **row, 'seconds': 60.0},
      {'name': 'b.png', **row, 'psnr': 30.0, 'seconds': 1.0, **change},
      {'name': 'c.png', **row, 'psnr': 25.0, 'seconds': 2.0},
    ]

  def test_says_all_that_is_asked_of_it(self):
    config = configs.Config(data_dir='/captures/bonsai/', factor=2)
    got = report.make_results(config, self.rows(), 5000, 9_007_493)
    assert got['mean'] == pytest.approx({'psnr': 25, 'ssim': 0.5, 'cc_psnr': 21, 'cc_ssim': 0.6})
    assert got['scene'] == 'bonsai'
    assert got['step'] == 5000
    assert got['num_params'] == 9_007_493
    assert got['num_images'] == len(got['per_image']) == 3
    assert got['seconds_per_image'] == 2  # Not drawn off by the minute of compiling.
    assert got['schema_version'] == report.SCHEMA_VERSION
    assert got['device']['count'] == 8
    assert set(got['software']) >= {'jax', 'numpy', 'python'}

  @pytest.mark.parametrize('value', [np.inf, -np.inf, np.nan, np.float32(np.nan)])
  def test_json_stays_valid_whatever_the_numbers(self, tmp_path, value):
    got = report.make_results(configs.Config(), self.rows(psnr=value), 1, 2)
    path = tmp_path / 'new' / 'results.json'
    report.write_json(str(path), got)

    def refuse(constant):
      raise AssertionError(f'{constant} is not JSON')

    back = json.loads(path.read_text(), parse_constant=refuse)
    assert back['per_image'][1]['psnr'] is None
    assert back['mean']['psnr'] is None
    assert back['mean']['ssim'] == 0.5
    assert [p.name for p in path.parent.iterdir()] == ['results.json']

  def test_numpy_numbers_come_back_as_they_were(self, tmp_path):
    path = tmp_path / 'a.json'
    report.write_json(str(path), {'a': np.int32(3), 'b': (np.float64(0.1), True), 'c': None})
    assert json.loads(path.read_text()) == {'a': 3, 'b': [0.1, True], 'c': None}

  def test_a_line_has_all_metrics(self):
    line = report.format_metrics(self.rows()[0])
    assert line == 'psnr 20.00  ssim 0.5000  cc_psnr 21.00  cc_ssim 0.6000'
