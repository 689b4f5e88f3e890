"""Tests of the first Gaussians, of the fit, and of the command that exports them."""

import base64
import dataclasses
import pathlib
import re

import export_test
import jax
import jax.numpy as jnp
import numpy as np
import plyfile
import pytest
import tiny
import trajectory_test
from scipy import spatial

from internal import cameras
from internal.commands import export
from internal.export import points
from internal.rendering import renderer, trained
from internal.splats import comparison, distil, fit, formats, gaussians, rasterizer, surfaces, views
from internal.training import checkpoints, run_folder
from internal.vis import pictures

BLACK = np.zeros(3, np.float32)
draw = jax.jit(rasterizer.render, static_argnums=3)


@pytest.fixture(scope='module')
def scene():
  return export_test.make_scene()


def psnr(a, b):
  return -10 * np.log10(np.mean((np.asarray(a) - np.asarray(b)) ** 2))


def test_first_gaussians_are_discs_on_the_surface(scene):
  cams = views.teacher_cameras(scene, 12, 120)
  images = [export_test.render_ball(None, cams, k, 1.0) for k in range(12)]
  splats = surfaces.initial(cams, images, 500, 600)
  opacity = 1 / (1 + np.exp(-splats.opacity_logits))
  assert (opacity >= fit.DEAD).sum() == 500
  alive = jax.tree.map(lambda x: x[:500], splats)
  radius = np.linalg.norm(alive.means, axis=-1)
  np.testing.assert_allclose(radius, export_test.RADIUS, atol=1e-4)
  np.testing.assert_allclose(0.5 + gaussians.SH_0 * alive.sh[:, 0], 0.5 + alive.means, atol=1e-4)
  normal = np.asarray(gaussians.rotations(jnp.asarray(alive.quaternions)))[:, :, 2]
  flat = alive.log_scales[:, 2] < alive.log_scales[:, 0] - 1
  assert flat.mean() > 0.7
  along = np.abs((normal * alive.means).sum(-1))[flat] / export_test.RADIUS
  assert np.quantile(along, 0.1) > 0.97


def test_what_is_far_stands_on_the_shell(scene):
  cams = views.teacher_cameras(scene, 2, 30)
  sky = {
    'rgb': np.full((20, 30, 3), 0.5), 'acc': np.ones((20, 30)),
    'distance_median': np.full((20, 30), 1e9),
  }  # fmt: skip
  endless = {**sky, 'distance_median': np.full((20, 30), np.inf)}
  splats = surfaces.initial(cams, [sky, endless], 90, 90)
  distance = np.linalg.norm(splats.means, axis=-1) / surfaces.SHELL
  assert (distance > 0.99).all()
  assert (distance < 1.25).all()  # At the pictures' corners: the depth is the same everywhere.
  assert np.exp(splats.log_scales).min() > 1  # As wide as its pixel is there.


def test_teacher_cameras_stand_at_and_between_training_cameras(scene):
  train = np.asarray(scene.cameras.camtoworld)[list(scene.train)]
  cams = views.teacher_cameras(scene, 40, 60)
  poses = np.asarray(cams.camtoworld, np.float64)
  assert len(poses) == 40
  apart = np.linalg.norm(poses[:, None, :, 3] - train[None, :, :, 3], axis=-1).min(1)
  at_camera = apart < 1e-6
  assert at_camera[: len(train)].all()
  assert not at_camera[len(train) :].all()
  assert (apart < 0.6).all()  # Neighbours on the circle are 0.52 apart.
  turn = poses[:, :, :3]
  assert np.abs(turn @ turn.transpose(0, 2, 1) - np.eye(3)).max() < 1e-6
  # They look at the centre, as the training cameras do.
  toward = -poses[:, :, 2]
  to_centre = -poses[:, :, 3] / np.linalg.norm(poses[:, :, 3], axis=-1, keepdims=True)
  assert ((toward * to_centre).sum(-1) > 0.97).all()


def make_world():
  """Gaussians, four cameras around them, and what these see."""
  rng = np.random.default_rng(0)
  n = 30
  splats = gaussians.Splats(
    means=rng.normal(0, 0.35, (n, 3)), log_scales=rng.normal(-2, 0.3, (n, 3)),
    quaternions=rng.normal(size=(n, 4)), opacity_logits=np.full(n, 2.0),
    sh=np.concatenate([rng.normal(0, 1, (n, 1, 3)), np.zeros((n, 15, 3))], 1),
  )  # fmt: skip
  splats = jax.tree.map(jnp.float32, splats)
  cams = trajectory_test.make_scene(4).cameras
  cams = cameras.make_cameras(
    cameras.pixtocam_from_intrinsics(20.0, 20.0, 8, 8), cams.camtoworld, [16, 16]
  )
  pinholes = [gaussians.pinhole(cams, row) for row in range(4)]
  colors = [np.asarray(draw(splats, c, BLACK, 2**14).rgb) for c in pinholes]
  rgba = [np.pad(255 * c, ((0, 0), (0, 0), (0, 1)), constant_values=255) for c in colors]
  return splats, views.Views(pinholes, [np.uint8(np.clip(c, 0, 255)) for c in rgba])


def test_the_fit_finds_what_the_pictures_show_and_adds_gaussians_where_they_lack():
  truth, seen = make_world()
  rng = np.random.default_rng(1)
  few = 20

  def noisy(x, noise):
    twice = np.concatenate([x[:few], x[:few]])
    return twice + noise * rng.normal(size=twice.shape)

  first = gaussians.Splats(
    means=noisy(truth.means, 0.05), log_scales=noisy(truth.log_scales, 0.3),
    quaternions=noisy(truth.quaternions, 0.1), sh=noisy(truth.sh, 0.1),
    opacity_logits=np.where(np.arange(40) < few, 2.0, surfaces.DEAD_LOGIT),
  )  # fmt: skip
  first = jax.tree.map(jnp.float32, first)
  found = distil.optimise(first, seen, views.Views([], []), BLACK, distil.Options(40, steps=90))

  def quality(splats):
    pictures = [draw(splats, camera, BLACK, 2**14).rgb for camera in seen.cameras]
    return np.mean([psnr(a, b[..., :3] / 255) for a, b in zip(pictures, seen.colors)])

  assert quality(found) > quality(first) + 4
  assert (jax.nn.sigmoid(found.opacity_logits) >= fit.DEAD).sum() > few


def test_short_fits_take_larger_steps_that_fall_alike():
  assert fit.rate(0, 10_000) == fit.rate(0, 40_000) == 1
  assert fit.rate(0, 2_500) == 2
  assert fit.rate(0, 100) == 5  # At most.
  for steps in (100, 10_000):
    np.testing.assert_allclose(fit.rate(steps, steps), 0.05 * fit.rate(0, steps), rtol=1e-5)


def test_halves_look_like_the_whole_and_take_the_dead_rows():
  truth, seen = make_world()
  rows = jax.tree.map(lambda x: jnp.concatenate([x[:10], x[10:14]]), truth)
  logits = jnp.where(jnp.arange(14) < 10, 0.0, surfaces.DEAD_LOGIT)
  state = fit.start(rows.replace(opacity_logits=logits))
  state = state.replace(need=jnp.zeros(14).at[3].set(5.0))  # The one of ten that is needed.
  moments = jax.tree.map(jnp.ones_like, state.moments)
  after = fit.relocate(state.replace(moments=moments), jax.random.key(0))
  alive = np.asarray(jax.nn.sigmoid(after.splats.opacity_logits) >= fit.DEAD)
  assert alive.tolist() == [True] * 11 + [False] * 3
  changed = np.any(np.asarray(after.splats.means != state.splats.means), -1)
  assert np.flatnonzero(changed).tolist() == [3, 10]
  middle = (after.splats.means[3] + after.splats.means[10]) / 2
  np.testing.assert_allclose(middle, truth.means[3], atol=1e-5)
  assert not np.any(after.need)
  assert np.asarray(after.moments.mu.means)[[3, 10]].max() == 0
  assert np.asarray(after.moments.mu.means)[0].min() == 1
  for camera in seen.cameras:
    pictures = [draw(s.splats, camera, BLACK, 2**14).rgb for s in (state, after)]
    assert psnr(*pictures) > 33


def test_burying_removes_dead_and_widens_needles():
  truth, seen = make_world()
  logits = truth.opacity_logits.at[::2].set(surfaces.DEAD_LOGIT)
  needles = truth.replace(opacity_logits=logits, log_scales=truth.log_scales.at[:, 0].set(-30.0))
  least = fit.least_scales(needles.means, seen.cameras)
  buried = fit.bury(needles, least)
  assert len(buried.means) == 15
  np.testing.assert_allclose(jnp.exp(buried.log_scales[:, 0]), least[1::2], rtol=1e-4)
  distance = min(np.linalg.norm(buried.means[0] - c.position) for c in seen.cameras)
  np.testing.assert_allclose(least[1], 0.2 * distance / 20, rtol=1e-5)


def test_pairs_that_do_not_fit_get_room(capsys):
  state = fit.start(make_world()[0]).replace(overflow=jnp.int32(5))
  capacity, state = distil._grown(2**14, state)
  assert capacity > 2**14 + 5
  assert state.overflow == 0
  assert '5 pairs' in capsys.readouterr().out


@pytest.fixture
def ball_run(scene, monkeypatch):
  """Opening any run gives a trained field that shows the ball."""
  monkeypatch.setattr(run_folder, 'open_run', lambda *_: (tiny.settings(), scene))
  monkeypatch.setattr(checkpoints, 'restore_params', lambda *_, **__: ({}, 5))
  monkeypatch.setattr(renderer, 'make_image_renderer', lambda *_, **__: export_test.render_ball)


def test_the_command_writes_splats_in_the_captures_frame(
  ball_run, scene, tmp_path, capsys, monkeypatch
):
  found = []

  def rounding_steps(*args):
    found.append(distil_rounding(*args))
    return dataclasses.replace(found[0], means=np.full(len(found[0].means), 2.0**-5))

  distil_rounding = distil.rounding_steps
  monkeypatch.setattr(distil, 'rounding_steps', rounding_steps)
  arguments = ['--max_splats', '400', '--splat_steps', '0', '--splat_views', '6']
  export.main([str(tmp_path), '--what', 'page', *arguments])
  printed = capsys.readouterr().out
  folder = pathlib.Path(tmp_path, 'export')
  assert sorted(f.name for f in folder.iterdir()) == [
    'page.html', 'splats.json', 'splats.ply', 'splats.spz'
  ]  # fmt: skip
  for name in ('page.html', 'splats.ply', 'splats.spz'):
    assert str(folder / name) in printed
  rows = plyfile.PlyData.read(folder / 'splats.ply')['vertex']
  assert f'{len(rows)} Gaussians' in printed
  xyz = np.stack([rows[k] for k in 'xyz'], -1)
  centre = [-4, 2, -6]  # Where (0, 0, 0) was.
  # Where no camera looked, the background is closed; see backdrop.py.
  behind = np.linalg.norm(xyz - centre, axis=-1) > 1000
  assert 0 < behind.sum() < 40
  # The first ones: the fit would add others.
  assert (~behind).sum() == round(0.6 * (400 - behind.sum()))
  assert np.argmax(behind) == (~behind).sum()
  rows, xyz = rows[~behind], xyz[~behind]
  np.testing.assert_allclose(np.linalg.norm(xyz - centre, axis=-1), 0.8, atol=1e-3)
  # The copies in the .spz and the page are rounded: in the page's units to 1/32, here to 1/16.
  packed = formats.read_spz(str(folder / 'splats.spz')).means  # In another order.
  packed = packed[np.linalg.norm(packed - centre, axis=-1) < 100]
  assert len(packed) == len(xyz)
  np.testing.assert_array_equal(packed % 2.0**-4, 0)
  assert spatial.cKDTree(packed).query(xyz)[0].max() <= np.sqrt(3) * 2.0**-5 + 1e-6
  text = re.search('>(H4sI[^<]+)<', (folder / 'page.html').read_text())[1]
  shown = formats.unpack_spz(base64.b64decode(text)).means
  np.testing.assert_array_equal(shown % 2.0**-5, 0)
  assert np.any(shown % 2.0**-4)
  assert np.all(found[0].means[:20] > 0)
  # Colours show positions in the normalised world.
  world = xyz @ scene.world_transform[:3, :3].T + scene.world_transform[:3, 3]
  dc = np.stack([rows[f'f_dc_{k}'] for k in range(3)], -1)
  np.testing.assert_allclose(gaussians.SH_0 * dc, world, atol=1e-3)


def test_too_small_options_name_the_flag(ball_run, tmp_path):
  for flag in ('--max_splats', '--splat_views'):
    with pytest.raises(points.ExportError, match=f'{flag} must be at least 1, got 0'):
      export.main([str(tmp_path), '--what', 'splats', flag, '0'])


def colors_of(directions):
  """Smooth colours of directions [..., 3] in [0, 1]."""
  return 0.5 + 0.45 * np.sin(9 * np.asarray(directions) + np.arange(3))


def write_photographs(folder, scene, rows, change=lambda rgb: rgb):
  """Writes what cameras see of an infinitely far world."""
  y, x = np.mgrid[:40, :60]
  for row in rows:
    rays = cameras.pixels_to_rays(scene.cameras, np.full_like(x, row), x, y)
    rgb = change(np.round(255 * colors_of(rays.directions)))
    pictures.write_png(str(folder / 'dir' / f'img_{row}.jpg'), np.uint8(rgb))


def run_of(folder, scene):
  settings = tiny.settings(f"Config.data_dir = '{folder}'")
  return trained.TrainedRun('', settings, scene, None, {}, 0)


def test_photographs_are_taken_through_a_pinhole(scene, tmp_path):
  """With the lens's distortion in it, the picture would be off by 0.07."""
  write_photographs(tmp_path, scene, (3,))
  mask = np.ones((40, 60), bool)
  mask[:, :20] = False
  pictures.write_png(str(tmp_path / 'mask.png'), np.uint8(255 * mask[..., None].repeat(3, -1)))
  masked = dataclasses.replace(
    scene, masks=tuple('mask.png' if k == 3 else None for k in range(12))
  )
  seen = views.photographs(run_of(tmp_path, scene), [3])[1].colors[0]
  y, x = np.mgrid[:40, :60]
  flat = scene.cameras.replace(distortion=np.zeros((12, 6), np.float32), distorted=False)
  truth = colors_of(cameras.pixels_to_rays(flat, np.full_like(x, 3), x, y).directions)
  counts = seen[..., 3] > 0
  assert 0.85 < counts.mean() < 0.99  # A corner of the pinhole's picture is outside the photograph.
  np.testing.assert_allclose(seen[counts][:, :3] / 255, truth[counts], atol=0.01)
  bent = colors_of(cameras.pixels_to_rays(scene.cameras, np.full_like(x, 3), x, y).directions)
  assert np.abs(bent - truth).max() > 0.07
  behind = views.photographs(run_of(tmp_path, masked), [3])[1].colors[0][..., 3] > 0
  assert not behind[:, :18].any()
  np.testing.assert_array_equal(behind[:, 23:], counts[:, 23:])


def test_photographs_of_other_lenses_and_sizes_are_left_out_and_told(scene, tmp_path, capsys):
  size, lens = np.array(scene.cameras.size), np.array(scene.cameras.lens)
  size[4], lens[5] = (60, 41), 1
  cams = scene.cameras.replace(size=size, lens=lens)
  write_photographs(tmp_path, scene, (3,))
  mixed = run_of(tmp_path, dataclasses.replace(scene, cameras=cams))
  assert views.photographs(mixed, [3, 4, 5])[0] == [3]
  assert 'Leaving out 2 of 3 photographs' in capsys.readouterr().out


def test_pixels_that_do_not_count_do_not_change_the_fit():
  truth, seen = make_world()
  half = [np.where(np.arange(16)[None, :, None] < 8, c, [0, 0, 0, 0]) for c in seen.colors]
  states = []
  for wrong in (0, 200):
    picture = half[0].astype(np.uint8)
    picture[:, 8:, :3] = wrong
    states.append(fit.step(fit.start(truth), seen.cameras[0], picture, BLACK, np.float32(1), 2**14))
  jax.tree.map(np.testing.assert_array_equal, *(s.splats for s, _ in states))


def test_splats_are_scored_by_the_test_photographs(tmp_path, capsys, monkeypatch):
  splats, seen = make_world()
  scene = trajectory_test.make_scene(4)
  cams = cameras.make_cameras(
    cameras.pixtocam_from_intrinsics(20.0, 20.0, 8, 8), scene.cameras.camtoworld, [16, 16]
  )
  scene = dataclasses.replace(scene, cameras=cams, test=(0, 2))
  run = run_of(tmp_path, scene)
  assert comparison.compare(splats, run) == ({}, None)
  assert 'without photographs' in capsys.readouterr().out
  for row in scene.test:
    noisy = np.uint8(np.clip(seen.colors[row][..., :3] + 10.0, 0, 255))
    pictures.write_png(str(tmp_path / 'dir' / f'img_{row}.jpg'), noisy)
  grey = {'rgb': np.full((16, 16, 3), 0.5), 'acc': np.ones((16, 16)), 'distance_median': None}
  monkeypatch.setattr(renderer, 'make_image_renderer', lambda *_, **__: lambda *_: grey)
  shown = {}
  monkeypatch.setattr(
    pictures, 'sheet', lambda images, captions, **_: shown.update(images=images, captions=captions)
  )
  found = comparison.compare(splats, run)[0]
  expected, of_grey = [], []
  for row in scene.test:
    drawn = np.clip(draw(splats, seen.cameras[row], BLACK, 2**14).rgb, 0, 1)
    truth = np.clip(seen.colors[row][..., :3] + 10.0, 0, 255) / 255
    expected.append(psnr(np.round(255 * drawn) / 255, truth))
    of_grey.append(psnr(128 / 255, truth))
  np.testing.assert_allclose(found['psnr'], np.mean(expected), atol=1e-3)
  np.testing.assert_allclose(found['field_psnr'], np.mean(of_grey), atol=1e-3)
  assert found['field_ssim'] < found['ssim']
  assert found['images'] == 2
  assert found['pictures_per_second'] > 0
  assert 0.5 < found['ssim'] < 1
  # The worse photograph first: itself, the field, the Gaussians, and three pictures of errors.
  worse = scene.test[int(np.argmin(expected))]
  assert shown['captions'][0] == scene.names[worse]
  assert f'{min(expected):.2f} dB' in shown['captions'][2]
  assert len(shown['images']) == 12


def test_what_is_lost_is_shown_as_errors_of_the_pixels_that_count(monkeypatch):
  shown = []
  monkeypatch.setattr(pictures, 'sheet', lambda images, *_, **__: shown.extend(images))
  photo = np.full((4, 4, 4), 100, np.uint8)
  photo[0, :, 3] = 0  # Outside a mask.
  field, own = np.full((4, 4, 3), 100 / 255), np.full((4, 4, 3), 100 / 255)
  own[:, 0], field[0, 1] = 1, 0
  comparison.lost([('a', own, field, photo, [30.0, 0.9, 40.0, 0.9])])
  truth, _, _, between, of_field, of_own = (image[::100, ::100] for image in shown)
  assert (truth == 100).all()
  none = pictures.apply_colormap(np.zeros(1))[0]
  wrong = [(image != none).any(-1) for image in (between, of_field, of_own)]
  column, corner = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
  column[:, 0] = corner[0, 1] = True
  np.testing.assert_array_equal(wrong[0], column | corner)
  assert not wrong[1].any()
  np.testing.assert_array_equal(wrong[2], column & (np.arange(4) > 0)[:, None])
