"""Evaluation at several scales: reduced images and cameras, the results, the table."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from internal import cameras, configs, coord, models, render, structs
from internal.commands import eval as eval_program
from internal.datasets import scenes
from internal.errors import UserError
from internal.evaluation import lpips, multiscale, tables
from internal.evaluation import results as results_lib
from internal.rendering import renderer, trained
from internal.training import train_step


def make_cameras(size=(101, 90), lens=structs.PERSPECTIVE, ndc=False, **kwargs):
  rng = np.random.default_rng(0)
  poses = np.concatenate([np.eye(3)[None].repeat(2, 0), rng.normal(size=(2, 3, 1)) / 9], -1)
  inverse = cameras.pixtocam_from_intrinsics(80.0, 75.0, 51.5, 43.25)
  return cameras.make_cameras(
    inverse, poses, size, lens=lens, pixtocam_ndc=inverse if ndc else None, **kwargs
  )


def rays(cams, x, y):
  return cameras.pixels_to_rays(cams, jnp.ones_like(x), x, y)


class TestReducedCameras:
  @pytest.mark.parametrize('n', [2, 4, 8])
  @pytest.mark.parametrize(('lens', 'ndc'), [(0, False), (1, False), (0, True)])
  def test_cones_are_n_times_as_wide(self, n, lens, ndc):
    """Without it, a reduced image would be rendered by thin rays: aliasing would not show."""
    full = make_cameras(lens=lens, ndc=ndc)
    reduced = multiscale.reduced_cameras(full, n)
    x, y = jnp.array([0, 3, 5]), jnp.array([1, 6, 7])
    # The pixels of full size beside the centre of the reduced ones.
    thin = rays(full, n * x + n // 2, n * y + n // 2)
    wide = rays(reduced, x, y)
    np.testing.assert_allclose(wide.radii / thin.radii, n, rtol=0.02 if lens else 1e-4)

  def test_a_pixel_looks_at_the_middle_of_those_that_it_averages(self):
    full, n = make_cameras(distortion=[0.01, 0, 0, 0, 0.001, 0]), 4
    reduced = multiscale.reduced_cameras(full, n)
    assert reduced.size.tolist() == [[25, 22]] * 2
    got = rays(reduced, jnp.array([3]), jnp.array([5]))
    # The four pixels in the middle of columns 12 to 15 and rows 20 to 23.
    x, y = np.meshgrid([13, 14], [21, 22])
    middle = rays(full, jnp.asarray(x.ravel()), jnp.asarray(y.ravel()))
    np.testing.assert_allclose(got.directions[0], middle.directions.mean(0), atol=1e-6)
    np.testing.assert_array_equal(got.origins[0], middle.origins[0])

  def test_full_size_is_unchanged(self):
    full = make_cameras()
    same = multiscale.reduced_cameras(full, 1)
    np.testing.assert_array_equal(same.pixtocam, full.pixtocam)
    np.testing.assert_array_equal(same.size, full.size)


class TestReducedImages:
  @pytest.mark.parametrize('n', [1, 2, 4, 8])
  def test_are_means_of_squares(self, n):
    img = np.random.default_rng(0).integers(0, 256, (21, 30, 3), np.uint8)
    got = multiscale.reduced_image(img, n)
    assert got.shape == (21 // n, 30 // n, 3)
    assert got.dtype == np.uint8
    for row, column in np.ndindex(got.shape[:2]):
      square = img[n * row : n * (row + 1), n * column : n * (column + 1)]
      np.testing.assert_array_equal(got[row, column], np.round(square.mean((0, 1))))

  def test_a_pixel_counts_if_all_that_it_averages_do(self):
    mask = np.ones((9, 8), bool)
    mask[5, 2] = mask[8, 0] = False  # The second is left out.
    wanted = np.ones((4, 4), bool)
    wanted[2, 1] = False
    np.testing.assert_array_equal(multiscale.reduced_mask(mask, 2), wanted)


def test_the_model_sees_the_wider_cone():
  """A mip model's picture changes with the scale of its cones; one of points does not."""
  cams = make_cameras(size=(96, 96))
  wide = multiscale.reduced_cameras(cams, 8)
  # The same directions with thin cones: the radius is the only difference.
  same = rays(wide, jnp.arange(12), jnp.arange(12))
  thin = dataclasses.replace(same, radii=same.radii / 8)
  params = train_step.create_state(tiny.settings()).params
  changes = {}
  for points in (False, True):
    model = models.build(tiny.settings(f'Model.disable_integration = {points}'))
    draw = jax.jit(lambda rays: model.apply({'params': params}, None, rays, 1.0, False)[0])  # noqa: B023
    changes[points] = float(jnp.abs(draw(same)[-1].rgb - draw(thin)[-1].rgb).max())
  assert changes[False] > 1e-4
  assert changes[True] == 0


@jax.jit
def on_a_wall(cams, x, y, integrate):
  """Features of pixels [k] of camera 0 on a wall at z = -1: [k, f]."""
  cast = cameras.pixels_to_rays(cams, jnp.zeros_like(x), x, y)
  tdist = jnp.broadcast_to(jnp.array([0.999, 1.001]), (*x.shape, 2))
  gaussians = render.cast_rays(tdist, cast.origins, cast.directions, cast.radii, 'cone')
  variance = jnp.diagonal(gaussians.cov[:, 0], axis1=-2, axis2=-1)[:, :2]
  return coord.integrated_pos_enc(gaussians.mean[:, 0, :2], variance * integrate, 0, 8)


def test_cones_beat_points_at_an_eighth():
  """A field that is linear in its features is fitted to a striped wall at full size only."""
  inverse = cameras.pixtocam_from_intrinsics(96.0, 96.0, 48.0, 48.0)
  cams = cameras.make_cameras(inverse, np.eye(3, 4)[None], [96, 96])
  at = (np.arange(96) + 0.5) / 96 - 0.5
  stripes = sum(np.sin(2.0**k * at + k) for k in range(3, 8)) / 12
  painted = 0.5 + stripes + stripes[:, None]
  picture = np.round(255 * np.clip(painted, 0, 1)).astype(np.uint8)[..., None].repeat(3, -1)
  psnr = {}
  for integrate in (1.0, 0.0):
    for n in (1, 8):
      y, x = np.indices((96 // n, 96 // n)).reshape(2, -1)
      features = np.asarray(on_a_wall(multiscale.reduced_cameras(cams, n), x, y, integrate))
      truth = multiscale.reduced_image(picture, n).reshape(-1, 3) / 255
      if n == 1:
        fit = np.linalg.lstsq(features, truth, rcond=1e-4)[0]
      psnr[integrate, n] = -10 * np.log10(np.mean((features @ fit - truth) ** 2))
  assert psnr[1, 1] == pytest.approx(psnr[0, 1], abs=1)  # At full size they are as good.
  assert psnr[1, 8] > 30
  assert psnr[0, 8] < 20


@pytest.fixture
def run(tmp_path):
  """A run of three images of 101x90 on disk, two of them for testing."""
  (tmp_path / 'data').mkdir()
  rng = np.random.default_rng(0)
  names = ('a.png', 'b.png', 'c.png')
  for name in names:
    Image.fromarray(rng.integers(0, 256, (90, 101, 3), np.uint8)).save(tmp_path / 'data' / name)
  inverse = cameras.pixtocam_from_intrinsics(80.0, 80.0, 50.5, 45.0)
  cams = cameras.make_cameras(inverse, np.eye(4)[None, :3].repeat(3, 0), size=[101, 90])
  scene = scenes.Scene(
    loader='llff', files=names, names=names, cameras=cams, train=(1,), test=(0, 2),
    world_transform=np.eye(4), background='none', bounds=None, report={},
  )  # fmt: skip
  config = configs.Config(data_dir=str(tmp_path / 'data'))
  settings = dataclasses.replace(tiny.settings(), config=config)
  params = {'w': np.ones(5, np.float32)}
  return trained.TrainedRun(str(tmp_path), settings, scene, tiny.mesh(1), params, 70)


def grey(params, cams, i, step_fraction):
  width, height = np.asarray(cams.size)[i]
  return {'rgb': np.full((height, width, 3), 0.5, np.float32)}


class TestEvaluate:
  @pytest.fixture(autouse=True)
  def _lpips(self, monkeypatch):
    numbers = {'lpips_paper': 0.125, 'lpips_vgg': 0.25}
    monkeypatch.setattr(lpips, 'load', lambda: lambda a, b, mask: numbers)

  def test_measures_each_scale_and_their_mean(self, run, tmp_path, capsys):
    results = eval_program.evaluate_scales(run, [0, 2], grey)
    folder = tmp_path / 'eval' / 'multiscale'
    assert results_lib.read(str(folder / 'results.json')) == json.loads(json.dumps(results))
    assert results['protocol']['name'].startswith('mip-NeRF 360, multi-scale test')
    assert '1, 1/2, 1/4, 1/8' in results['protocol']['description']
    scales = {scale['reduction']: scale for scale in results['scales']}
    assert {n: list(scale['image_sizes']) for n, scale in scales.items()} == {
      1: ['101x90'], 2: ['50x45'], 4: ['25x22'], 8: ['12x11']
    }  # fmt: skip
    for n, scale in scales.items():
      wanted = []
      for k, name in enumerate('ac'):
        img = np.asarray(Image.open(tmp_path / 'data' / f'{name}.png'))
        truth = multiscale.reduced_image(img, n)
        saved = np.asarray(Image.open(folder / f'{k:03d}_{name}_{n}_truth.png'))
        np.testing.assert_array_equal(saved, truth)
        wanted.append(-10 * np.log10(np.mean((truth / 255 - 128 / 255) ** 2)))
      got = [row['psnr'] for row in scale['per_image']]
      np.testing.assert_allclose(got, wanted, atol=1e-3)
      assert scale['mean']['psnr'] == pytest.approx(np.mean(wanted), abs=1e-3)
    of_scales = [scale['mean']['psnr'] for scale in scales.values()]
    assert of_scales == sorted(of_scales)  # Averaged noise is nearly grey.
    assert results['mean']['psnr'] == pytest.approx(np.mean(of_scales))
    assert results['per_image'][1]['psnr'] == pytest.approx(
      np.mean([scale['per_image'][1]['psnr'] for scale in scales.values()])
    )
    assert results['num_images'] == 2
    assert ' 1/8  psnr' in capsys.readouterr().out

  def test_lpips_is_left_out_where_images_are_too_small(self, run):
    scales = eval_program.evaluate_scales(run, [0], grey)
    assert [s['mean']['lpips_vgg'] for s in scales['scales']] == [0.25, 0.25, 0.25, None]
    assert scales['mean']['lpips_vgg'] is None

  def test_small_images_are_an_error_before_anything_is_rendered(self, run):
    multiscale.check_sizes(run.scene, [0])
    cams = run.scene.cameras.replace(size=run.scene.cameras.size - 3)
    with pytest.raises(UserError, match=r'a\.png: has 98x87 pixels; --multiscale needs 88x88'):
      multiscale.check_sizes(dataclasses.replace(run.scene, cameras=cams), [0])

  def test_the_table_has_a_column_for_each_scale(self, run):
    found = eval_program.evaluate_scales(run, [0, 2], grey)
    other = {**found, 'scene': 'other', 'seed': 5}
    make = lambda *methods: tables.make(  # noqa: E731
      {str(k): [tables.Run(f'{k}.json', x) for x in m] for k, m in enumerate(methods)}
    )
    table = make([found], [found])
    assert table.columns == ('1', '1/2', '1/4', '1/8', 'mean')
    row = table.rows[0]
    means = [scale['mean']['psnr'] for scale in found['scales']]
    got = [table.value(row, 'psnr', column) for column in table.columns]
    assert got == pytest.approx([*means, np.mean(means)])
    with pytest.raises(tables.TablesError, match='need the same scenes of every method and seed'):
      make([found], [other])
    single = {key: value for key, value in found.items() if key != 'scales'}
    with pytest.raises(tables.TablesError, match=r'0\.json and 1\.json differ in scales'):
      make([found], [single])


def test_one_program_renders_all_scales():
  """The camera table is an argument, so scales do not compile again."""
  settings = tiny.settings()
  cams, _ = tiny.capture(width=24, height=16)
  params = train_step.create_state(settings).params
  mesh = tiny.mesh(1)
  render_image = renderer.make_image_renderer(settings, mesh)
  sizes = [
    render_image(params, multiscale.reduced_cameras(cams, n), 0)['rgb'].shape for n in (1, 2, 4, 8)
  ]
  assert sizes == [(16, 24, 3), (8, 12, 3), (4, 6, 3), (2, 3, 3)]
