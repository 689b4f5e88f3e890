"""Masks and weights: finding, sampling on any number of devices, and metrics."""

import captures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from datasets_test import load, refused, write_ngp, write_transforms
from scipy import ndimage

from internal import configs, image, losses
from internal.datasets import masks, scenes
from internal.devices import sharding
from internal.evaluation import metrics
from internal.training import batches, train_step


def pattern(seed, size=captures.SIZE):
  """Blobs and a lone pixel, bool [h, w]."""
  noise = ndimage.uniform_filter(np.random.default_rng(seed).normal(size=size[::-1]), 3)
  counts = noise > 0
  counts[0, -1] = True
  return counts


def save_mask(path, counts):
  captures.save_image(str(path), (255 * counts).astype(np.uint8))


class TestFiles:
  @pytest.mark.parametrize('name', ['004.png.png', '004.png'])
  def test_found_beside_a_colmap_capture(self, tmp_path, name):
    captures.write_colmap(tmp_path)
    assert load(tmp_path).masks == ()
    save_mask(tmp_path / 'masks' / name, pattern(0))
    found = load(tmp_path)
    assert found.masks == (None,) * 4 + (f'masks/{name}',) + (None,) * 4
    assert found.report['masks'] == 1
    np.testing.assert_array_equal(scenes.read_mask(tmp_path, found, 4), pattern(0))
    assert scenes.read_mask(tmp_path, found, 3) is None
    scenes.save_scene(str(tmp_path / 'scene.json'), found)
    assert scenes.load_scene(str(tmp_path / 'scene.json')).masks == found.masks

  def test_named_by_a_transforms_file(self, tmp_path):
    table, _ = write_ngp(tmp_path)
    table['frames'][0]['mask_path'] = './elsewhere/m.png'
    write_transforms(tmp_path, table)
    assert 'm.png: no such image' in refused(tmp_path, dataset_loader='transforms')
    save_mask(tmp_path / 'elsewhere' / 'm.png', pattern(0))
    found = load(tmp_path, dataset_loader='transforms')
    assert found.masks[8] == 'elsewhere/m.png'  # The table is written backwards.
    for value, message in ((3, 'mask_path must be a name'), ('../m.png', 'not a path inside')):
      table['frames'][0]['mask_path'] = value
      write_transforms(tmp_path, table)
      assert message in refused(tmp_path, dataset_loader='transforms')

  def test_a_downsampled_pixel_counts_if_all_its_pixels_do(self, tmp_path):
    captures.write_colmap(tmp_path)
    save_mask(tmp_path / 'masks' / '004.png', pattern(1))
    found = load(tmp_path, factor=2)
    wanted = pattern(1).reshape(6, 2, 8, 2).all((1, 3))
    np.testing.assert_array_equal(scenes.read_mask(tmp_path, found, 4), wanted)
    save_mask(tmp_path / 'masks' / '004.png', wanted)  # A small one may be given, too.
    np.testing.assert_array_equal(scenes.read_mask(tmp_path, load(tmp_path, factor=2), 4), wanted)

  def test_refusals(self, tmp_path):
    captures.write_colmap(tmp_path)
    save_mask(tmp_path / 'masks' / '004.png', pattern(1, (20, 15)))
    assert '004.png: is 20x15 pixels, but its picture has 16x12' in refused(tmp_path)
    save_mask(tmp_path / 'masks' / '004.png', np.zeros((12, 16)))
    with pytest.raises(masks.images.DataError, match=r'004\.png: leaves nothing'):
      scenes.read_mask(tmp_path, load(tmp_path), 4)
    with pytest.raises(masks.images.DataError, match='smaller than its picture'):
      masks.read(str(tmp_path / 'masks' / '004.png'), (17, 12))


NAMES = [f'{i:03}.jpg' for i in range(4)]


def write_masked(root, template, names=NAMES, **kwargs):
  """A COLMAP capture, and a mask for each photograph; `template` has {name} and {stem}."""
  captures.write_colmap(root, names=list(names), **kwargs)
  written = []
  for i, path in enumerate(names):
    folder, _, name = path.rpartition('/')
    values = {'folder': folder, 'name': name, 'stem': name.rsplit('.', 1)[0]}
    written.append(template.format(**values))
    counts = pattern(i)
    save_mask(root / written[-1], ~counts if 'dynamic' in template else counts)
  return written


class TestNames:
  @pytest.mark.parametrize(
    'template',
    [
      'masks/{name}',
      'masks/{name}.png',
      'masks/{stem}.png',
      'masks/{stem}.PNG',
      'masks/{stem}.tif',
      'masks/{stem}_mask.png',
      'masks/{name}_mask.png',
      'masks/{stem}.mask.png',
      'masks/{name}.mask.png',
      'masks/mask_{stem}.png',
      'masks/images/{stem}.png',
      'mask/{stem}.png',
      'Masks/{name}.png',
      'mask/dynamic_mask_{stem}.png',
      'images/{stem}_mask.png',
      'images/{stem}.mask.png',
      'images/{stem}-mask.bmp',
      'images/{name}.mask.png',
      'images/masks/{name}.png',
      'images/dynamic_mask_{stem}.png',
      'masks_2/{stem}.png',
    ],
  )
  def test_every_usual_name_is_found(self, tmp_path, template):
    written = write_masked(tmp_path, template, size=(32, 24))
    found = load(tmp_path, factor=2)
    assert found.masks == tuple(written)
    assert found.report['masks'] == 4
    assert found.report['images_unregistered'] == []
    warned = [w for w in found.report['warnings'] if 'dynamic_mask' not in w]
    assert warned == []
    for i in range(4):
      counts = scenes.read_mask(tmp_path, found, i)
      if template != 'masks/{name}':  # JPEG blurs.
        np.testing.assert_array_equal(counts, pattern(i))

  @pytest.mark.parametrize(
    'template',
    ['masks/{folder}/{stem}.png', 'masks/{folder}/{name}.png', 'images/{folder}/{stem}_mask.png'],
  )
  def test_subfolders(self, tmp_path, template):
    names = ['left/a.jpg', 'left/b.jpg', 'right/a.jpg', 'right/b.jpg']
    written = write_masked(tmp_path, template, names)
    assert load(tmp_path).masks == tuple(written)

  def test_a_subfolder_may_be_missing_if_the_names_are_unique(self):
    assert masks.pair(['l/a.jpg', 'r/b.jpg'], ['masks/a.png']) == {'l/a.jpg': ['masks/a.png']}
    assert masks.pair(['l/a.jpg', 'r/a.jpg'], ['masks/a.png']) == {}

  def test_pictures_of_one_stem_or_other_case_keep_their_own(self):
    pictures = ['a.jpg', 'a.png', 'A.jpg', 'mask_1.jpg', '1.jpg', 'é.jpg']
    found = masks.pair(
      pictures, ['a.jpg.png', 'a.png.png', 'A.png', 'mask_1.png', '1_MASK.png', 'e\u0301.png']
    )
    assert found == {
      'a.jpg': ['a.jpg.png'],
      'a.png': ['a.png.png'],
      'A.jpg': ['A.png'],
      'mask_1.jpg': ['mask_1.png'],
      '1.jpg': ['1_MASK.png'],
      'é.jpg': ['e\u0301.png'],
    }

  def test_photographs_of_masks_are_photographs(self, tmp_path):
    names = ['carnival_mask.jpg', 'carnival.jpg', 'mask_7.jpg']
    captures.write_colmap(tmp_path, names=names)
    captures.save_image(str(tmp_path / 'images' / 'mask_8.jpg'), captures.pixels(9))
    found = load(tmp_path)
    assert found.masks == ()
    assert found.report['images_unregistered'] == ['images/mask_8.jpg']


class TestWhatIsNotUsed:
  def test_a_folder_that_pairs_with_nothing_is_refused(self, tmp_path):
    captures.write_colmap(tmp_path, names=NAMES)
    for i in range(5):
      save_mask(tmp_path / 'masks' / f'frame_{i}.png', pattern(i))
    message = refused(tmp_path)
    assert 'masks: has 5 masks, but none has the name of a photograph' in message
    assert "'masks/frame_0.png', 'masks/frame_1.png', 'masks/frame_2.png' and 2 more" in message
    assert 'masks/000.jpg.png, masks/000.png or 000_mask.png' in message

  def test_of_arrays_too(self, tmp_path):
    captures.write_colmap(tmp_path, names=NAMES)
    (tmp_path / 'masks').mkdir()
    (tmp_path / 'masks' / 'notes.txt').touch()
    assert load(tmp_path).masks == ()
    np.save(tmp_path / 'masks' / '000.npy', pattern(0))
    assert '000.npy: cannot be read as an image' in refused(tmp_path)

  def test_some_pair(self, tmp_path):
    written = write_masked(tmp_path, 'masks/{stem}.png')
    (tmp_path / written[1]).rename(tmp_path / 'masks' / 'other.png')
    found = load(tmp_path)
    assert found.report['masks'] == 3
    missing, unpaired = found.report['warnings']
    assert (
      "3 of 4 photographs have a mask. In the others all pixels count: 'images/001.jpg'" in missing
    )
    assert "masks: 1 of 4 masks have no photograph and are not used: 'masks/other.png'" in unpaired

  def test_masks_of_photographs_without_a_pose_are_no_matter(self, tmp_path):
    write_masked(tmp_path, 'masks/{stem}.png')
    captures.save_image(str(tmp_path / 'images' / 'late.jpg'), captures.pixels(9))
    save_mask(tmp_path / 'masks' / 'late.png', pattern(9))
    found = load(tmp_path)
    assert found.report['warnings'] == []
    assert found.report['images_unregistered'] == ['images/late.jpg']

  @pytest.mark.parametrize(
    'name', ['masks_sam/000.png', 'my_masks/000.png', 'masks_4/000.png', 'segmentations/000.png']
  )
  def test_other_folders_are_named(self, tmp_path, name):
    captures.write_colmap(tmp_path, names=NAMES)
    save_mask(tmp_path / name, pattern(0))
    (warned,) = load(tmp_path).report['warnings']
    assert f'{name.split("/")[0]}: its 1 files are not used' in warned

  def test_one_mask_for_all_is_named(self, tmp_path):
    captures.write_colmap(tmp_path, names=NAMES)
    save_mask(tmp_path / 'mask.png', pattern(0))
    assert 'mask.png: is not used' in load(tmp_path).report['warnings'][0]

  @pytest.mark.parametrize('name', ['masks.zip', 'my_masks.tar.gz'])
  def test_an_archive_of_masks_is_named(self, tmp_path, name):
    captures.write_colmap(tmp_path, names=NAMES)
    (tmp_path / name).touch()
    (warned,) = load(tmp_path).report['warnings']
    assert f'{name}: is not used. If it has the masks, unpack it to masks/' in warned
    write_masked(tmp_path, 'masks/{stem}.png')
    assert load(tmp_path).report['warnings'] == []

  def test_a_smaller_copy_of_the_masks_is_no_matter(self, tmp_path):
    write_masked(tmp_path, 'masks/{stem}.png')
    save_mask(tmp_path / 'masks_4' / '000.png', pattern(0, (4, 3)))
    assert load(tmp_path).report['warnings'] == []

  def test_two_masks_of_one_photograph(self, tmp_path):
    write_masked(tmp_path, 'masks/{stem}.png')
    save_mask(tmp_path / 'masks' / '002.jpg.png', pattern(2))
    found = load(tmp_path)
    assert found.masks[2] == 'masks/002.jpg.png'
    assert found.report['warnings'] == []  # They are equal.
    save_mask(tmp_path / 'images' / '002_mask.png', pattern(9))
    (warned,) = load(tmp_path).report['warnings']
    assert "1 photographs have several masks, which differ. That of 'images/002.jpg' is" in warned
    assert "'masks/002.jpg.png', not 'masks/002.png', 'images/002_mask.png'" in warned


def test_masks_of_instant_ngp_are_inverted(tmp_path):
  """Its own say where something moves; one that is all black is the rule there."""
  write_masked(tmp_path, 'images/dynamic_mask_{stem}.png')
  save_mask(tmp_path / 'images' / 'dynamic_mask_002.png', np.zeros((12, 16)))
  found = load(tmp_path)
  assert "4 masks follow instant-ngp's rule" in found.report['warnings'][0]
  assert scenes.read_mask(tmp_path, found, 2).all()
  save_mask(tmp_path / 'images' / 'dynamic_mask_002.png', np.ones((12, 16)))
  with pytest.raises(masks.images.DataError, match='it is all white'):
    scenes.read_mask(tmp_path, found, 2)


def test_the_noise_of_jpegs_is_black(tmp_path):
  counts = np.zeros((64, 64), bool)
  counts[20:40, 12:50] = True
  save_mask(tmp_path / 'a.jpg', counts)
  assert (masks.decode(str(tmp_path / 'a.jpg')) == counts).all()
  grey = np.where(counts, 1, 0).astype(np.uint8)
  captures.save_image(str(tmp_path / 'a.png'), grey)
  assert (masks.decode(str(tmp_path / 'a.png')) == counts).all()


def test_labels_of_16_bits_are_not_black(tmp_path):
  labels = np.array([[0, 1, 2], [128, 129, 65535]], np.uint16)
  captures.save_image(str(tmp_path / 'a.png'), labels)
  assert (masks.decode(str(tmp_path / 'a.png')) == (labels > 0)).all()


def test_the_alpha_channel_of_a_mask_is_ambiguous(tmp_path):
  pixels = np.full((2, 3, 4), 255, np.uint8)
  captures.save_image(str(tmp_path / 'a.png'), pixels)
  assert masks.decode(str(tmp_path / 'a.png')).all()
  pixels[0, 0, 3] = 0
  captures.save_image(str(tmp_path / 'a.png'), pixels)
  with pytest.raises(masks.images.DataError, match=r'transparent pixels.*-alpha extract'):
    masks.decode(str(tmp_path / 'a.png'))


@pytest.mark.parametrize('denied', ['masks', 'masks/004.png', 'images'])
def test_what_may_not_be_read_is_not_missing(tmp_path, monkeypatch, denied):
  """Simulated, since root may read everything."""
  captures.write_colmap(tmp_path)
  save_mask(tmp_path / 'masks' / '004.png', pattern(0))
  captures.deny(monkeypatch, str(tmp_path / denied))
  with pytest.raises(
    (masks.images.DataError, PermissionError), match=f'{denied}.* may not be'
  ) as e:
    load(tmp_path)
  assert 'chmod' in str(e.value)


@pytest.fixture(scope='module')
def masked():
  """Three images of their own sizes, two of them masked, one nearly all."""
  cams, images = tiny.capture()
  allowed = [None, pattern(1, tuple(cams.size[1])), np.zeros(cams.size[2][::-1], bool)]
  allowed[2][3, 4:6] = True
  return cams, images, allowed


class TestDraws:
  def counts(self, masked, n, batching='all_images', keys=1):
    cams, _, allowed = masked
    supervision = batches.make_supervision(cams.size, allowed)
    draw = jax.jit(
      jax.vmap(lambda k: batches.draw_pixels(k, jnp.asarray(cams.size), n, batching, supervision))
    )
    drawn = draw(jax.random.split(jax.random.key(0), keys))
    seen = [np.zeros(size[::-1], int) for size in cams.size]
    for cam, x, y in zip(*(np.asarray(a).ravel() for a in drawn)):
      seen[cam][y, x] += 1
    return seen, drawn

  def test_uniform_over_what_counts_and_nothing_else(self, masked):
    seen, _ = self.counts(masked, 60_000)
    total = masked[0].size[0].prod() + masked[2][1].sum() + 2
    for of_image, allowed in zip(seen, masked[2]):
      allowed = np.ones(of_image.shape, bool) if allowed is None else allowed
      assert (of_image[~allowed] == 0).all()
      np.testing.assert_allclose(of_image[allowed], 60_000 / total, rtol=0.3)

  def test_single_image(self, masked):
    seen, (cam, _, _) = self.counts(masked, 50, 'single_image', keys=600)
    assert (np.asarray(cam) == np.asarray(cam)[:, :1]).all()
    assert (seen[2][~masked[2][2]] == 0).all()
    shares = np.array([s.sum() for s in seen]) / 30_000
    allowed = np.array([masked[0].size[0].prod(), masked[2][1].sum(), 2])
    np.testing.assert_allclose(shares, allowed / allowed.sum(), atol=0.06)

  def test_without_masks_nothing_changes(self, masked):
    size = masked[0].size
    assert batches.make_supervision(size) is None
    assert batches.make_supervision(size, [None] * 3, ()) is None
    assert batches.make_supervision(size, None, [1.0, 2.0, 3.0]).run_start is None


class TestTraining:
  def batch(self, masked, devices, images=None, host=False):
    """Two steps' batches, as a training step makes them, and their loss on so many devices."""
    cams, own_images, allowed = masked
    config, mesh = tiny.settings().config, tiny.mesh(devices)
    supervision = batches.make_supervision(cams.size, allowed, [1.0, 4.0, 16.0])
    cams = cams.replace(supervision=supervision)
    store = batches.make_store(images or own_images)
    draw = train_step.make_draw(config, mesh, supervision)

    def mean_error(batch):
      error = losses.squared_error(jnp.zeros_like(batch.rgb), batch.rgb, batch.weight)
      return sharding.mean_over_devices(error)

    @jax.jit
    def step(ids, rgb):
      batch = batches.make_batch(cams, *sharding.shard_rays(ids, mesh), rgb)
      each = sharding.per_device(mean_error, mesh, (sharding.SPLIT,), sharding.WHOLE)
      return batch, each(batch)

    result = []
    for k in range(2):
      ids = draw(k, cams.size)
      rgb = batches.lookup(jax.device_put(store), jnp.asarray(cams.size), *ids)
      if host:
        rgb = train_step.host_pixels(draw, k, store, cams.size, mesh)
      result.append(jax.device_get(step(ids, rgb)))
    return result

  def test_devices_and_hosts_agree(self, masked):
    for one, eight, host in zip(*(self.batch(masked, 1), self.batch(masked, 8),
                                  self.batch(masked, 8, host=True))):  # fmt: skip
      for other in (eight, host):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, other)
      batch, loss = one
      wanted = np.average((batch.rgb**2).mean(-1), weights=batch.weight)
      np.testing.assert_allclose(loss, wanted, rtol=1e-6)
      relative = np.array([1.0, 4.0, 16.0])[batch.rays.cam_idx]
      np.testing.assert_allclose(batch.weight, relative / relative.mean(), rtol=1e-6)

  def test_what_is_masked_cannot_matter(self, masked):
    cams, images, allowed = masked
    spoiled = [im.copy() for im in images]
    for im, counts in zip(spoiled, allowed):
      if counts is not None:
        im[~counts] = 255 - im[~counts]
    batch = self.batch(masked, 1)
    jax.tree.map(np.testing.assert_array_equal, batch, self.batch(masked, 1, spoiled))
    unmasked = cams, images, [None] * 3
    a, b = self.batch(unmasked, 1), self.batch(unmasked, 1, spoiled)
    assert (a[0][0].rgb != b[0][0].rgb).any()

  def test_the_train_step_uses_masks_and_weights(self, masked, monkeypatch):
    """Seen while it is traced: what it draws by, and what its loss is given."""
    cams, images, allowed = masked
    settings, seen = tiny.settings(), []
    supervision = batches.make_supervision(cams.size, allowed, [1.0, 4.0, 16.0])
    real_draw, real_total = batches.draw_pixels, losses.total
    monkeypatch.setattr(batches, 'draw_pixels', lambda *a: seen.append(a[4]) or real_draw(*a))
    monkeypatch.setattr(losses, 'total', lambda *a: seen.append(a[4].weight) or real_total(*a))
    step = train_step.make_train_step(settings, tiny.mesh(1)).variant(1)
    state = train_step.abstract_state(settings)
    store = batches.make_store(images)
    jax.eval_shape(step, state, cams.replace(supervision=supervision), store, 1, 0)
    assert seen[0].run_start.shape == supervision.run_start.shape
    assert seen[1].shape == (64,)

  def test_weights_are_of_the_data_loss(self):
    rgb, target = np.random.default_rng(0).random((2, 6, 3)).astype(np.float32)
    weight = jnp.array([1.0, 1, 4, 4, 16, 16]) / 7
    square = ((rgb - target) ** 2).mean(-1)
    wanted = (square * np.repeat([1, 4, 16], 2)).sum() / 42
    np.testing.assert_allclose(losses.squared_error(rgb, target, weight), wanted, rtol=1e-6)
    charb = np.sqrt((rgb - target) ** 2 + 1e-6).mean(-1)
    wanted = (charb * np.repeat([1, 4, 16], 2)).sum() / 42
    np.testing.assert_allclose(losses.charbonnier(rgb, target, 1e-3, weight), wanted, rtol=1e-6)


class TestMetrics:
  @pytest.fixture
  def pair(self):
    rng = np.random.default_rng(3)
    truth = ndimage.gaussian_filter(rng.normal(size=(32, 40, 3)), (3, 3, 0))
    truth = (truth - truth.min()) / np.ptp(truth)
    img = 0.8 * truth + 0.07 + rng.normal(0, 0.01, truth.shape)
    counts = np.ones((32, 40), bool)
    counts[22:, 30:] = False
    return img.astype(np.float32), np.round(255 * truth).astype(np.uint8), counts

  def test_what_is_masked_cannot_matter(self, pair):
    img, truth, counts = pair
    spoiled = np.where(counts[..., None], img, 1 - img)
    config = configs.Config()
    wanted = metrics.image_metrics(img, truth, config, counts)
    assert metrics.image_metrics(spoiled, truth, config, counts) == wanted
    assert metrics.image_metrics(spoiled, truth, config)['psnr'] < wanted['psnr'] - 3
    cropped = configs.Config(eval_crop_borders=10)  # All that the mask leaves out, just.
    same = metrics.image_metrics(img, truth, cropped, counts)
    assert same['ssim'] == pytest.approx(
      metrics.image_metrics(img, truth, cropped)['ssim'], rel=1e-5
    )

  def test_psnr_is_of_the_valid_pixels_and_ssim_of_whole_windows(self, pair):
    img, truth, counts = pair
    got = metrics.image_metrics(img, truth, configs.Config(), counts)
    error = (np.round(255 * np.clip(img, 0, 1)) / 255 - truth / 255.0)[counts]
    assert got['psnr'] == pytest.approx(-10 * np.log10(np.mean(error**2)), abs=1e-3)
    a, b = image.quantize(img), np.float32(truth / 255)
    windows = [
      float(image.ssim(a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]))
      for y in range(22)
      for x in range(30)
      if counts[y : y + 11, x : x + 11].all()
    ]
    assert got['ssim'] == pytest.approx(np.mean(windows), abs=1e-5)

  def test_no_whole_window_is_no_number(self, pair):
    img, truth, counts = pair
    scattered = np.random.default_rng(0).random(counts.shape) > 0.5
    got = metrics.image_metrics(img, truth, configs.Config(), scattered)
    assert np.isnan(got['ssim'])
    assert np.isfinite(got['psnr'])
