import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from scipy import ndimage

from internal import configs, image
from internal.evaluation import lpips, metrics, results


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
    got = metrics.image_metrics(img, truth, configs.Config())
    assert tuple(got) == metrics.METRICS
    assert got['psnr'] == pytest.approx(wanted, abs=1e-3)
    exact = metrics.image_metrics(img, truth, configs.Config(eval_quantize_metrics=False))
    assert exact['psnr'] != got['psnr']
    assert exact['psnr'] == pytest.approx(
      -10 * np.log10(np.mean((img - truth / 255.0) ** 2)), abs=1e-3
    )

  def test_a_colour_cast_is_forgiven_only_by_the_corrected_metrics(self, pair):
    img, truth = pair
    got = metrics.image_metrics(img, truth, configs.Config())
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
    a, b = (metrics.image_metrics(x, truth, config) for x in (img, spoiled))
    assert a['psnr'] == pytest.approx(b['psnr'], abs=1e-5)
    assert metrics.image_metrics(spoiled, truth, configs.Config())['psnr'] < a['psnr'] - 3

  def test_values_out_of_range_are_clipped(self, pair):
    img, truth = pair
    got = [
      metrics.image_metrics(x, truth, configs.Config()) for x in (np.clip(4 * img, 0, 1), 4 * img)
    ]
    assert got[0] == got[1]

  def test_a_perfect_prediction(self, pair):
    _, truth = pair
    got = metrics.image_metrics(truth / 255.0, truth, configs.Config())
    assert np.isposinf(got['psnr'])
    assert got['ssim'] == pytest.approx(1, abs=1e-6)

  def test_lpips_is_of_what_the_others_are_of(self, pair):
    img, truth = pair
    seen = []

    def measure(a, b, mask):
      seen.append((np.asarray(a), np.asarray(b), mask))
      return dict.fromkeys(lpips.METRICS, 0.25)

    config = configs.Config(eval_crop_borders=2)
    got = metrics.image_metrics(img, truth, config, measure_lpips=measure)
    assert tuple(got) == (*metrics.METRICS, *lpips.METRICS)
    assert got['lpips_vgg'] == 0.25
    ((shown, wanted, mask),) = seen  # Once: not of the corrected colours.
    assert mask is None
    np.testing.assert_allclose(shown, np.round(np.clip(img, 0, 1) * 255)[2:-2, 2:-2] / 255)
    np.testing.assert_allclose(wanted, truth[2:-2, 2:-2] / 255, rtol=1e-6)
    mask = np.arange(truth[..., 0].size).reshape(truth.shape[:2]) % 40 < 30
    metrics.image_metrics(img, truth, config, mask, measure)
    np.testing.assert_array_equal(seen[-1][2], mask[2:-2, 2:-2])

  def test_sizes_must_agree(self, pair):
    with pytest.raises(ValueError, match='must have the same shape'):
      metrics.image_metrics(pair[0], pair[1][:, :-1], configs.Config())


class TestProtocol:
  def test_the_published_one_has_no_departures(self):
    got = results.protocol(configs.Config(dataset_loader='llff', factor=4), results.every(8))
    assert got['name'] == 'mip-NeRF 360'
    assert got['departures'] == []

  @pytest.mark.parametrize(
    ('change', 'word'),
    [
      ({'eval_quantize_metrics': False}, 'quantised'),
      ({'eval_crop_borders': 2}, '2 pixels'),
      ({'eval_render_interval': 12}, 'one in 12'),
      ({'eval_dataset_limit': 4}, 'at most 4'),
    ],
  )
  def test_every_departure_is_named(self, change, word):
    got = results.protocol(configs.Config(**change), results.OWN_SPLIT)
    assert got['name'] == 'mip-NeRF 360, modified'
    assert len(got['departures']) == 1
    assert word in got['departures'][0]

  @pytest.mark.parametrize('split', [results.every(10), 'every 8th image, not by name'])
  def test_another_split_is_a_departure(self, split):
    got = results.protocol(configs.Config(), split)
    assert got['departures'] == [f'test images: {split}; published: every 8th image by name']

  def test_what_tables_compare(self):
    got = results.protocol(configs.Config(eval_crop_borders=3), results.every(10))
    assert (got['quantized'], got['crop_borders'], got['render_interval']) == (True, 3, 1)
    assert got['test_split'] == 'every 10th image by name'
    assert set(got['lpips']) == {'lpips_paper', 'lpips_vgg'}

  @pytest.mark.parametrize(
    ('names', 'test', 'split'),
    [
      ('abcdefgh', (0, 3, 6), 'every 3th image by name'),
      ('bacdefgh', (0, 3, 6), 'every 3th image, not by name'),
      ('abcdefgh', (6, 7), "the capture's own"),
      ('abcdefgh', (0, 4), "the capture's own"),
    ],
  )
  def test_split_descriptions(self, names, test, split):
    scene = SimpleNamespace(names=tuple(names), test=test)
    assert results.test_split(configs.Config(llffhold=3), scene) == split


class TestConfigHash:
  def test_scenes_share_it_and_methods_do_not(self):
    def hashed(*bindings):
      return results.config_hash(configs.load_config(['configs/360.gin'], bindings))

    here = hashed()
    assert len(here) == 16
    assert (
      hashed("Config.data_dir = 'a'", 'Config.factor = 2', 'Config.eval_crop_borders = 2') == here
    )
    assert hashed('Config.print_every = 7', 'Config.render_chunk_size = 64') == here
    assert hashed('Config.early_exit_steps = 1000') == here
    assert hashed('Config.far = 1000000', 'Config.adam_beta1 = 0.9') == here
    assert hashed('Model.bg_intensity_range = [1, 1]') == here
    assert hashed("Config.pixel_cache_dir = 'a'", 'Model.use_gpu_resampling = True') == here
    assert hashed('NerfMLP.disable_density_normals = True') == here
    others = [
      hashed(binding)
      for binding in (
        'Config.seed = 1',
        'Config.max_steps = 9',
        'Config.charb_padding = 0.1',
        'Model.num_prop_samples = 8',
        'NerfMLP.net_width = 8',
        'PropMLP.net_width = 8',
      )
    ]
    assert len({here, *others}) == 7


class TestResults:
  def rows(self, **change):
    row = {'psnr': 20.0, 'ssim': 0.5, 'cc_psnr': 21.0, 'cc_ssim': 0.6}
    row |= {'width': 20, 'height': 16, 'masked': False}
    return [
      {'name': 'a.png', **row, 'seconds': 60.0},
      {'name': 'b.png', **row, 'psnr': 30.0, 'seconds': 1.0, **change},
      {'name': 'c.png', **row, 'psnr': 25.0, 'seconds': 2.0, 'width': 16, 'masked': True},
    ]

  def test_says_all_that_is_asked_of_it(self):
    settings = tiny.settings("Config.data_dir = '/captures/bonsai/'", 'Config.factor = 2')
    got = results.make(settings, results.every(8), self.rows(), 5000, 9_007_493, 'no weights', 77.5)
    mean = {'psnr': 25, 'ssim': 0.5, 'cc_psnr': 21, 'cc_ssim': 0.6}
    assert got['mean'] == pytest.approx({**mean, 'lpips_paper': None, 'lpips_vgg': None})
    assert got['lpips']['absent'] == 'no weights'
    assert got['scene'] == 'bonsai'
    assert got['step'] == 5000
    assert got['train_seconds'] == 77.5
    assert got['num_params'] == 9_007_493
    assert got['num_images'] == len(got['per_image']) == 3
    assert got['image_sizes'] == {'16x16': 1, '20x16': 2}
    assert got['masked_images'] == 1
    assert got['seconds_per_image'] == 2  # Not drawn off by the minute of compiling.
    assert got['schema_version'] == results.SCHEMA_VERSION
    assert got['mlp_dtype'] == 'float32'  # Which 'auto' means on a CPU.
    assert got['config_hash'] == results.config_hash(settings)
    assert got['device']['count'] == 8
    assert set(got['software']) >= {'jax', 'flax', 'numpy', 'python'}

  def test_lpips_is_averaged_where_it_was_measured(self):
    rows = self.rows()
    for k, row in enumerate(rows):
      row |= {'lpips_paper': 0.1 * k, 'lpips_vgg': 0.2 * k}
    got = results.make(tiny.settings(), results.every(8), rows, 1, 2)
    assert got['mean']['lpips_paper'] == pytest.approx(0.1)
    assert got['mean']['lpips_vgg'] == pytest.approx(0.2)
    assert got['lpips']['absent'] is None

  @pytest.mark.parametrize('value', [np.inf, -np.inf, np.nan, np.float32(np.nan)])
  def test_json_stays_valid_whatever_the_numbers(self, tmp_path, value):
    got = results.make(tiny.settings(), results.every(8), self.rows(psnr=value), 1, 2)
    path = tmp_path / 'new' / 'results.json'
    results.write_json(str(path), got)

    def refuse(constant):
      raise AssertionError(f'{constant} is not JSON')

    back = json.loads(path.read_text(), parse_constant=refuse)
    assert back['per_image'][1]['psnr'] is None
    assert back['mean']['psnr'] is None
    assert back['mean']['ssim'] == 0.5
    assert [p.name for p in path.parent.iterdir()] == ['results.json']

  def test_numpy_numbers_come_back_as_they_were(self, tmp_path):
    path = tmp_path / 'a.json'
    results.write_json(str(path), {'a': np.int32(3), 'b': (np.float64(0.1), True), 'c': None})
    assert json.loads(path.read_text()) == {'a': 3, 'b': [0.1, True], 'c': None}

  def test_a_line_has_all_metrics(self):
    line = metrics.format_metrics(self.rows()[0])
    assert line == 'psnr 20.00  ssim 0.5000  cc_psnr 21.00  cc_ssim 0.6000'
    more = {**self.rows()[0], 'lpips_paper': 0.25, 'lpips_vgg': None}
    assert metrics.format_metrics(more) == line + '  lpips_paper 0.2500'
