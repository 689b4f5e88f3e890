"""Ablations: how each config differs from 360.gin, the settings behind them, the command."""

import dataclasses
import json
import os
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from internal import configs, coord, losses, models, stepfun, structs
from internal.commands import ablate
from internal.evaluation import lpips
from internal.evaluation import results as results_lib
from internal.experiments import ablations, jobs, runs
from internal.fields import encodings

ROOT = Path(__file__).resolve().parents[1]

UNTRAINED_PROPOSALS = {'config.interlevel_loss_mult': 0}
AXES = {'basis_shape': 'octahedron', 'basis_subdivisions': 1}
BASELINE = {
  **UNTRAINED_PROPOSALS,
  'config.distortion_loss_mult': 0,
  'config.data_loss_type': 'mse',
  'model.num_levels': 2,
  'model.single_jitter': False,
  'model.anneal_slope': 0,
  'model.dilation_bias': 0,
  'model.dilation_multiplier': 0,
}


def mlps(which=('prop_mlp', 'nerf_mlp'), **changes):
  return {f'{mlp}.{name}': value for mlp in which for name, value in changes.items()}


MIPNERF = {
  **BASELINE,
  **mlps(['nerf_mlp'], net_width=256, warp_fn=None, min_deg_point=-20, max_deg_point=16, **AXES),
  'config.data_coarse_loss_mult': 0.1,
  'model.single_mlp': True,
  'model.num_prop_samples': 128,
  'model.num_nerf_samples': 128,
  'model.resample_blur': True,
  'model.resample_padding': 0.01,
}
NERF = {
  **BASELINE,
  **mlps(warp_fn=None, min_deg_point=-20, max_deg_point=10, **AXES),
  'nerf_mlp.net_width': 256,
  'prop_mlp.net_depth': 8,
  'prop_mlp.disable_rgb': False,
  'config.data_coarse_loss_mult': 1,
  'model.num_nerf_samples': 192,
  'model.disable_integration': True,
  'model.resample_padding': 1e-5,
}
BIG = {key: value for key, value in MIPNERF.items() if key != 'nerf_mlp.net_width'}
NERFPP = {key: value for key, value in NERF.items() if not key.endswith('min_deg_point')}
# What each row changes in 360.gin, and its number of parameters.
ROWS = {
  'full': ({}, 9_007_493),
  'a_no_interlevel': (UNTRAINED_PROPOSALS, 9_007_493),
  'b_no_distortion': ({'config.distortion_loss_mult': 0}, 9_007_493),
  'c_density_noise': (
    {'config.distortion_loss_mult': 0, 'nerf_mlp.density_noise': 1}, 9_007_493,
  ),
  'd_single_mlp': ({'model.single_mlp': True}, 8_680_580),
  'e_mipnerf_training': (
    {**UNTRAINED_PROPOSALS, 'model.single_mlp': True, 'config.data_coarse_loss_mult': 0.1},
    8_680_580,
  ),
  'f_small_mlp': ({'nerf_mlp.net_width': 256}, 1_148_549),
  'g_no_ipe': ({'model.disable_integration': True}, 9_007_493),
  'h_no_contraction': (mlps(warp_fn=None, min_deg_point=-20), 10_942_853),
  'i_donerf': ({**mlps(warp_fn='donerf'), 'model.raydist_fn': 'log'}, 9_007_493),
  'nerf': (NERF, 1_311_496),
  'mipnerf': (MIPNERF, 674_180),
  'mipnerf_big': (BIG, 8_090_756),
  'nerfpp': ({**NERFPP, 'model.outside_mlps': True}, 2_397_712),
}  # fmt: skip


def of_row(name):
  return configs.load_config([str(ROOT / ablations.published()[0][name].config)])


def test_every_row_has_a_config():
  known, _ = ablations.published()
  assert set(known) == set(ROWS)
  names = {path.stem for path in (ROOT / 'configs' / 'ablations').glob('*.gin')}
  assert names == set(ROWS) - {'full'}


@pytest.mark.parametrize('name', ROWS)
def test_a_row_changes_only_what_its_comment_says(name):
  ours, full = of_row(name), of_row('full')
  changes = {
    f'{part}.{field.name}': getattr(getattr(ours, part), field.name)
    for part in ('config', 'model', 'prop_mlp', 'nerf_mlp')
    for field in dataclasses.fields(getattr(ours, part))
    if getattr(getattr(ours, part), field.name) != getattr(getattr(full, part), field.name)
  }
  wanted, num_params = ROWS[name]
  unused = {k for k in changes if k.startswith('prop_mlp.')} if ours.model.single_mlp else set()
  assert {k: v for k, v in changes.items() if k not in unused} == wanted
  params, terms = traced(ours)
  assert models.num_params(params) == num_params
  for term in ('interlevel', 'distortion', 'data_coarse'):
    assert (term in terms) == (getattr(ours.config, f'{term}_loss_mult') > 0)
  row = ablations.published()[0][name]
  if row.million_params is not None:
    assert round(num_params / 1e6, 1) == row.million_params
  if name != 'full':
    comment = (ROOT / row.config).read_text().split('\n\n')[0].replace('\n# ', ' ')
    assert f'{num_params:,} parameters' in comment
    assert f'{row.psnr:.2f} dB' in comment


def traced(settings):
  """Returns the shapes of a row's parameters and of its loss terms."""
  vec, one = jnp.ones((4, 3)), jnp.ones((4, 1))
  rays = structs.Rays(vec, vec, vec, one, jnp.zeros(4, jnp.int32))
  model = models.build(settings)

  def loss(key):
    (renderings, history), state = model.init_with_output(key, key, rays, 0.5)
    batch = structs.Batch(rays, vec)
    terms = losses.total(settings.config, state['params'], renderings, history, batch)[1]
    return state['params'], terms

  return jax.eval_shape(loss, jax.random.key(0))


class TestWarps:
  def test_donerf_takes_the_square_root_of_lengths(self):
    direction = np.array([2.0, -1, 2]) / 3
    for length in (1e-2, 0.25, 1, 100, 1e6):
      got = coord.donerf(jnp.float32(direction * length))
      np.testing.assert_allclose(got, direction * length**0.5, rtol=1e-5)

  def test_inverted_sphere(self):
    x = np.random.default_rng(0).normal(size=(50, 3)) * 2
    r = np.maximum(1, np.linalg.norm(x, axis=-1, keepdims=True))
    got = coord.inverted_sphere(jnp.float32(x))
    np.testing.assert_allclose(got, np.concatenate([x / r, 1 / r], -1), rtol=1e-5)

  @pytest.mark.parametrize('warp', [coord.donerf, coord.inverted_sphere])
  def test_gradients_are_finite(self, warp):
    x = jnp.array([[0, 0, 0], [1e-20, 0, 0], [1, 0, 0], [1e6, -1e6, 1], [1e-3, 0, 0]], jnp.float32)
    assert jnp.isfinite(jax.vmap(jax.jacfwd(warp))(x)).all()
    assert jnp.isfinite(jax.vmap(jax.jacrev(warp))(x)).all()

  def test_four_axes_are_encoded(self):
    """The covariance of a map into four dimensions is J Sigma J^T, along its own axes."""
    rng = np.random.default_rng(0)
    mean = jnp.float32(rng.normal(size=(5, 3)) * 2)
    root = rng.normal(size=(5, 3, 3)) / 10
    cov = jnp.float32(root @ root.swapaxes(1, 2))
    warped = structs.Gaussians(*coord.linearize(coord.inverted_sphere, mean, cov))
    jacobian = np.asarray(jax.vmap(jax.jacfwd(coord.inverted_sphere))(mean))
    wanted = np.einsum('nij,njk,nik->ni', jacobian, cov, jacobian)
    features = encodings.IntegratedPositionalEncoding(0, 3, 'octahedron', 1, axes=4)(warped)
    twin = coord.integrated_pos_enc(warped.mean, jnp.float32(wanted), 0, 3)
    np.testing.assert_allclose(features, twin, atol=1e-5)
    with pytest.raises(configs.ConfigError, match='four axes'):
      configs.NerfMLP(encoding='grid', warp_fn='inverted_sphere')


def test_blur_is_that_of_mipnerf():
  w = np.random.default_rng(0).random((3, 6)).astype(np.float32)
  twin = np.empty_like(w)
  for ray, row in enumerate(w):
    for k in range(6):
      left, right = row[max(k - 1, 0)], row[min(k + 1, 5)]
      twin[ray, k] = (max(left, row[k]) + max(row[k], right)) / 2
  np.testing.assert_allclose(stepfun.blur_weights(jnp.asarray(w)), twin, rtol=1e-6)


def test_the_outer_mlps_see_only_samples_outside():
  """Changing their parameters changes samples outside of the unit sphere, and no others."""
  settings = tiny.settings('Model.outside_mlps = True', 'Config.near = 0.1', 'Config.far = 4.0')
  model = models.build(settings)
  params = models.init_params(model, jax.random.key(0))
  assert set(params) == {'nerf_mlp', 'nerf_mlp_outside', 'prop_mlp', 'prop_mlp_outside'}
  mean = jnp.array([[[0.5, 0, 0], [0, 0.9, 0], [0, 0, 1.1], [3, 0, 0]]], jnp.float32)
  gaussians = structs.Gaussians(mean, jnp.zeros((1, 4, 3, 3)))
  unit = jnp.array([[0, 0, 1.0]])
  rays = structs.Rays(unit, unit, unit, jnp.ones((1, 1)), jnp.zeros(1, jnp.int32))

  @jax.jit
  def query(params):
    return model.apply(
      {'params': params}, None, 2, rays, gaussians, None, 1.0, method=models.Model._query
    )

  before = query(params)
  changed = {'nerf_mlp': [True, True, False, False], 'nerf_mlp_outside': [False, False, True, True]}
  for part, wanted in changed.items():
    other = {**params, part: jax.tree.map(lambda x: x + 0.1, params[part])}
    for a, b in zip(before, query(other)):
      assert np.asarray(a != b).reshape(4, -1).any(-1).tolist() == wanted
  with pytest.raises(configs.ConfigError, match='outside_mlps'):
    configs.Model(outside_mlps=True, separate_prop_mlps=True)


@pytest.fixture
def ladder(tmp_path, monkeypatch):
  """Runs the command with stand-ins for the programs; returns the programs that it started."""
  started, failing, quality = [], set(), {}

  def program(command, job):
    name = os.path.basename(command[1])
    started.append((name, job.name))
    if job.name in failing:
      return False
    folder = tmp_path / 'out' / job.name
    stored = folder / 'config.gin'
    if name == 'train.py':
      at = command.index('--gin_bindings')
      settings = configs.load_config(command[3:at], command[at + 1 :])
      folder.mkdir(parents=True, exist_ok=True)
      stored.write_text(settings.text)
      row = {'step': 7, 'psnr': 9.0, 'train_seconds': 2.0, 'rays_per_sec': 100.0}
      (folder / 'metrics.jsonl').write_text(json.dumps(row) + '\n{"test_psnr": 3}\n')
    else:
      psnr = quality.get(job.name, 20 + len(started) / 10 if job.name != 'full' else 30.0)
      image = {'name': '0.png', 'psnr': psnr, 'ssim': 0.5, 'cc_psnr': psnr, 'cc_ssim': 0.5}
      image |= {'width': 4, 'height': 3, 'masked': False, 'seconds': 1.0}
      settings, split = configs.load_config([str(stored)]), results_lib.every(8)
      about = 7, 5, 'not installed', 1.0, (), 'area filter'
      results = results_lib.make(settings, split, [image], *about)
      (folder / 'eval').mkdir()
      (folder / 'eval' / 'results.json').write_text(json.dumps(results))
    return True

  def run_jobs(todo, slots, watch):
    failed = {}
    for job in todo:
      watch([jobs.Running(job, 0, None, 0)])
      if not all(program(command, job) for command in job.commands):
        failed[job.name] = 'exit code 1'
      watch([])
    return failed

  monkeypatch.setattr(jobs, 'run', run_jobs)
  monkeypatch.setattr(lpips, '_PACKAGE', 'lpips_jax_that_nobody_has')

  def main(*rows, bindings=('Config.max_steps = 7',), flags=(), scene='scene'):
    started.clear()
    flags = [*(['--rows', *rows] if rows else []), *flags]
    paths = ['--data_dir', str(tmp_path / scene), '--out', str(tmp_path / 'out')]
    ablate.main([*paths, *flags, '--gin_bindings', *bindings])
    return list(started)

  (tmp_path / 'scene').mkdir()
  main.failing, main.out, main.quality = failing, tmp_path / 'out', quality
  return main


class TestCommand:
  def test_runs_only_unfinished_rows(self, ladder):
    both = [('train.py', 'full'), ('eval.py', 'full')]
    assert ladder('full') == both
    assert ladder('full') == []
    assert ladder('a_no_interlevel', 'full', flags=['--table_only']) == []
    assert ladder('a_no_interlevel', 'full')[0] == ('train.py', 'a_no_interlevel')
    os.unlink(ladder.out / 'full' / 'eval' / 'results.json')
    os.rmdir(ladder.out / 'full' / 'eval')
    assert ladder('full') == both
    words = r'full holds a run with other settings: Config\.max_steps \(from 7 to 8\)\. '
    with pytest.raises(runs.RunError, match=words):
      ladder('full', bindings=['Config.max_steps = 8'])
    with pytest.raises(runs.RunError, match=r'Config\.data_dir \(from .*scene. to .*other.\)'):
      ladder('full', scene='other')

  def test_the_table_shows_published_numbers_beside_ours(self, ladder):
    names = ['full', *ablations.BIG_EFFECTS, 'nerf']
    ladder(*names)
    table = json.loads((ladder.out / 'ablations.json').read_text())
    assert [line['name'] for line in table['rows']] == names
    a = table['rows'][1]
    assert a['published']['psnr'] == 20.49
    assert a['published']['psnr_change'] == pytest.approx(20.49 - 24.37)
    assert a['psnr_change'] == pytest.approx(a['mean']['psnr'] - 30)
    assert table['worse_than_full'] == dict.fromkeys(ablations.BIG_EFFECTS, True)
    nerf = next(line for line in table['rows'] if line['name'] == 'nerf')
    assert nerf['published']['psnr_change'] == pytest.approx(23.85 - 27.69)
    text = (ladder.out / 'ablations.md').read_text()
    assert '| 22.80 | -1.57 | 0.515 | 0.480 | 20.60 | -9.40 | 0.500 | - | 100 |' in text
    assert '| 23.85* | -3.84 | - | - | 21.20 | -8.80 | 0.500 | - | 100 |' in text
    assert '| F: small NeRF MLP | 5 (1.1 M) |' in text
    assert 'f_small_mlp yes' in text

  def test_a_failed_row_does_not_stop_the_others(self, ladder):
    ladder.failing.add('full')
    with pytest.raises(runs.RunError, match='1 of 2 runs failed: full'):
      ladder('full', 'b_no_distortion')
    table = json.loads((ladder.out / 'ablations.json').read_text())
    assert table['rows'][0]['mean'] is None
    assert table['rows'][1]['mean']['psnr'] > 20
    assert table['rows'][1]['psnr_change'] is None

  def test_a_failure_shows_in_the_table_with_its_reason(self, ladder):
    ladder.failing.add('full')
    with pytest.raises(runs.RunError):
      ladder('full', 'b_no_distortion')
    text = (ladder.out / 'ablations.md').read_text()
    rows = [line for line in text.splitlines() if line.startswith('| ')]
    assert rows[0].endswith('| rays/s | status |')
    assert rows[2].endswith('| - | failed: exit code 1 |')
    assert rows[3].endswith('| 100 | finished |')
    # Later, the run's log tells.
    (ladder.out / 'full').mkdir()
    (ladder.out / 'full' / 'log.txt').write_text('a\nError: no such disk | x\n')
    ladder('full', 'b_no_distortion', flags=['--table_only'])
    assert r'| failed: Error: no such disk \| x |' in (ladder.out / 'ablations.md').read_text()

  def test_published_numbers_are_said_to_be_of_other_scenes(self, ladder):
    ladder('full', 'nerf')
    head = (ladder.out / 'ablations.md').read_text().splitlines()[0]
    assert head.startswith('Scene scene, 7 steps. Reduced pictures: made here by an area filter. ')
    assert 'The published numbers are of other scenes' in head
    assert 'bicycle' in head

  def test_mistakes_are_errors_before_anything_runs(self, ladder):
    with pytest.raises(runs.RunError, match=r"'z'; choose from full, a_no_interlevel"):
      ladder('z')
    with pytest.raises(configs.ConfigError, match='max_steps'):
      ladder(bindings=['Config.max_step = 7'])
    with pytest.raises(runs.RunError, match=r"near = 0.1'.* a single value"):
      ladder(flags=['--sweep', 'Config.near = 0.1'])
    with pytest.raises(runs.RunError, match=r"--gpus '0,,1': separate the GPUs by commas, such"):
      ladder('full', flags=['--gpus', '0,,1'])

  @pytest.mark.parametrize(
    ('name', 'flag'), [('data_dir', '--data_dir'), ('checkpoint_dir', '--out')]
  )
  def test_folders_are_set_by_flags_only(self, ladder, name, flag):
    with pytest.raises(runs.RunError, match=f'x.: use {flag} instead'):
      ladder('full', bindings=['Config.max_steps = 7', f'Config.{name}=x'])

  def test_configs_that_undo_a_row_are_refused(self, ladder):
    fast = ['--config', 'fast']
    with pytest.raises(runs.RunError, match='full and f_small_mlp have the same settings'):
      ladder('full', 'f_small_mlp', flags=fast)
    # The encoding's octaves would differ, but hash grids have none.
    with pytest.raises(runs.RunError, match='full and h_no_contraction have the same settings'):
      ladder('full', 'h_no_contraction', flags=fast)
    assert ladder('full', 'c_density_noise', flags=fast)

  @pytest.mark.parametrize(
    'setting', ['factor = 1, 2', 'llffhold = 8, 4', 'eval_crop_borders = 0, 1']
  )
  def test_rows_of_other_pictures_or_metrics_are_refused(self, ladder, setting):
    with pytest.raises(runs.RunError, match=f'differ in Config.{setting.split()[0]} '):
      ladder(flags=['--sweep', f'Config.{setting}'])

  def test_a_missing_capture_starts_no_row(self, ladder):
    with pytest.raises(runs.RunError, match=r'--data_dir .*nowhere: no such folder'):
      ladder('full', scene='nowhere')
    assert not ladder.out.exists()

  def test_submit_alone_is_refused(self, ladder, capsys):
    with pytest.raises(SystemExit):
      ladder('full', flags=['--submit'])
    assert 'add --slurm, or leave out --submit' in capsys.readouterr().err


class TestOwnRows:
  """Rows from a file and from sweeps, over seeds."""

  @pytest.fixture
  def mine(self, ladder, tmp_path):
    path = tmp_path / 'rows.txt'
    path.write_text('plain:\nwide & slow:\n  NerfMLP.net_width = 300\n')
    return lambda *flags: ladder(flags=['--rows_file', str(path), *flags])

  def seeds_of(self, folder):
    return configs.load_config([str(folder / 'config.gin')]).config.seed

  def test_each_has_its_bindings_on_top_of_the_common_ones(self, mine, ladder):
    assert [name for program, name in mine() if program == 'train.py'] == ['plain', 'wide_slow']
    plain, wide = (
      configs.load_config([str(ladder.out / name / 'config.gin')])
      for name in ('plain', 'wide_slow')
    )
    assert (plain.nerf_mlp.net_width, wide.nerf_mlp.net_width) == (1024, 300)  # 360.gin's, own.
    assert plain.config.max_steps == wide.config.max_steps == 7
    text = (ladder.out / 'ablations.md').read_text()
    assert 'published' not in text
    assert 'Changes are from "plain".' in text
    assert '| wide & slow | 5 | 20.40 | +0.20 | 0.500 | +0.000 | - | - | 100 |' in text

  def test_a_sweep_makes_all_combinations(self, ladder):
    flags = ['--sweep', 'NerfMLP.net_width = 8, 16', 'Config.near = 0.1, 0.3']
    trained = [name for program, name in ladder(flags=flags) if program == 'train.py']
    assert trained == [f'net_width={w}_near={n}' for w in (8, 16) for n in (0.1, 0.3)]
    last = configs.load_config([str(ladder.out / trained[-1] / 'config.gin')])
    assert (last.nerf_mlp.net_width, last.config.near) == (16, 0.3)

  def test_seeds_have_folders_of_their_own_and_resume(self, mine, ladder):
    mine()
    seed = configs.Config().seed
    started = mine('--seeds', '3')
    # The first seed of each row was there already.
    more = [f'{row}_seed_{seed + k}' for k in (1, 2) for row in ('plain', 'wide_slow')]
    assert [name for program, name in started if program == 'train.py'] == more
    assert mine('--seeds', '3') == []
    assert self.seeds_of(ladder.out / 'plain') == seed
    assert self.seeds_of(ladder.out / f'plain_seed_{seed + 2}') == seed + 2
    with pytest.raises(runs.RunError, match='--seeds: must be 1 or more, got 0'):
      mine('--seeds', '0')

  def test_a_row_called_as_the_seed_of_another_is_refused(self, ladder, tmp_path):
    path, seed = tmp_path / 'rows.txt', configs.Config().seed + 1
    path.write_text(f'a:\na seed {seed}:\n  Config.near = 0.3\n')
    flags = ['--rows_file', str(path)]
    assert ladder(flags=flags)
    with pytest.raises(runs.RunError, match=rf"'a_seed_{seed}' and 'a' need different names"):
      ladder(flags=[*flags, '--seeds', '2'])

  def test_effects_beyond_the_spread_are_bold(self, mine, ladder):
    seed = configs.Config().seed
    for row, values in {'plain': (20, 21, 22), 'wide_slow': (24, 25, 26.0)}.items():
      names = [row, *(f'{row}_seed_{seed + k}' for k in (1, 2))]
      ladder.quality.update(zip(names, values))
    mine('--seeds', '3')
    text = (ladder.out / 'ablations.md').read_text()
    assert '| plain | 5 | 21.00 ± 1.00 | +0.00 |' in text
    assert '| wide & slow | 5 | 25.00 ± 1.00 | **+4.00** | 0.500 ± 0.000 | +0.000 |' in text
    assert 'the sum of the standard deviations' in text
    table = json.loads((ladder.out / 'ablations.json').read_text())
    assert table['rows'][1]['std']['psnr'] == pytest.approx(1)
    assert table['rows'][1]['seeds'] == [seed, seed + 1, seed + 2]
    assert table['rows'][1]['exceeds_spread'] == {
      'psnr': True, 'ssim': False, 'cc_psnr': True, 'cc_ssim': False
    }  # fmt: skip
    assert r'\textbf{25.00}{\scriptsize\,$\pm$\,1.00}' in (ladder.out / 'ablations.tex').read_text()

  def test_an_effect_within_the_spread_is_not(self, mine, ladder):
    seed = configs.Config().seed
    for row, values in {'plain': (20, 22.0), 'wide_slow': (22, 24.0)}.items():
      ladder.quality.update(zip([row, f'{row}_seed_{seed + 1}'], values))
    mine('--seeds', '2')  # The means differ by 2, the standard deviations are 1.41 each.
    text = (ladder.out / 'ablations.md').read_text()
    assert '| wide & slow | 5 | 23.00 ± 1.41 | +2.00 |' in text
    assert 'Bold' not in text

  def test_a_failed_seed_is_told_and_the_others_count(self, mine, ladder):
    name = f'plain_seed_{configs.Config().seed + 1}'
    ladder.failing.add(name)
    with pytest.raises(runs.RunError, match=f'1 of 4 runs failed: {name}'):
      mine('--seeds', '2')
    lines = (ladder.out / 'ablations.md').read_text().splitlines()
    assert lines[-2].endswith('| 1 of 2 runs failed: exit code 1 |')
    assert lines[-1].endswith('| finished |')

  def test_published_rows_and_own_rows_in_one_table(self, ladder, tmp_path):
    (tmp_path / 'rows.txt').write_text('plain:\n  Config.near = 0.3\n')
    ladder('full', flags=['--rows_file', str(tmp_path / 'rows.txt')])
    lines = (ladder.out / 'ablations.md').read_text().splitlines()
    assert lines[-1].startswith('| plain | 5 | - | - | - | - | 20.40 | -9.60 |')

  def test_a_job_array_has_a_task_for_each_run(self, mine, ladder, capsys):
    mine()
    assert mine('--seeds', '2', '--slurm=--partition=a') == []
    text = (ladder.out / 'slurm.sh').read_text()
    seed = configs.Config().seed + 1
    assert f'runs=(plain_seed_{seed} wide_slow_seed_{seed})' in text
    assert '#SBATCH --array=0-1\n' in text
    command = shlex.split(text.splitlines()[-1])
    args = ablate.parse([*command[3:-1], f'plain_seed_{seed}'])
    assert (args.seeds, args.slurm, args.only) == (2, None, [f'plain_seed_{seed}'])
    started = mine('--seeds', '2', '--only', f'plain_seed_{seed}')
    assert started == [(p, f'plain_seed_{seed}') for p in ('train.py', 'eval.py')]
    with pytest.raises(runs.RunError, match=r"--only: there is no run 'x'; choose from plain, "):
      mine('--only', 'x')


def test_the_demo_ladder_is_that_of_the_paper():
  """Each row of demo.txt changes the same fields as the paper's row does, in a smaller model."""
  names = {
    'full model': 'full', 'no interlevel loss': 'a_no_interlevel',
    'no distortion loss': 'b_no_distortion', 'density noise instead': 'c_density_noise',
    'no proposal MLP': 'd_single_mlp',
    'no proposal MLP, trained as mip-NeRF': 'e_mipnerf_training',
    'no integrated encoding': 'g_no_ipe',
    'no contraction': 'h_no_contraction', "DONeRF's contraction": 'i_donerf',
  }  # fmt: skip
  rows = ablations.choose(rows_file=str(ROOT / 'configs/ablations/demo.txt'))
  made = {r.label: ablations.make_runs(r, 'd', 'o', [], [])[0].settings for r in rows}
  full = made['full model']
  for label, name in names.items():
    for field, value in ROWS[name][0].items():
      part, _, key = field.partition('.')
      assert getattr(getattr(made[label], part), key) == value
      assert getattr(getattr(full, part), key) != value
  assert made['small NeRF MLP'].nerf_mlp.net_width < full.nerf_mlp.net_width
  baselines = {
    'NeRF': 'nerf', 'mip-NeRF': 'mipnerf', 'NeRF with two more MLPs, as NeRF++': 'nerfpp',
    'mip-NeRF with the bigger MLP': 'mipnerf_big',
  }  # fmt: skip
  sizes = 'net_depth', 'net_width', 'num_prop_samples', 'num_nerf_samples', 'max_deg_point'
  for label, name in baselines.items():
    for field, value in ROWS[name][0].items():
      part, _, key = field.partition('.')
      assert key in sizes or getattr(getattr(made[label], part), key) == value, (label, field)
  assert set(made) == {*names, 'small NeRF MLP', *baselines}


@pytest.mark.parametrize(('config', 'file'), [('fast', 'zip'), ('grid', 'zip_grid')])
def test_rows_of_zip_nerf_load_and_differ(config, file):
  paths = [str(ROOT / 'configs' / f'360_{config}.gin')]
  rows = ablations.choose(rows_file=str(ROOT / 'configs' / 'ablations' / f'{file}.txt'))
  made = [ablations.make_runs(row, 'd', 'o', paths, [])[0].settings for row in rows]
  hashes = {results_lib.config_hash(settings) for settings in made}
  assert len(hashes) == len(rows) > 3
  if config == 'grid':  # The last row is the config, at another length.
    zipped = configs.load_config([str(ROOT / 'configs' / '360_zip.gin')])
    parts = [(s.model, s.nerf_mlp, s.prop_mlp) for s in (made[-1], zipped)]
    assert parts[0] == parts[1]
    names = 'near', 'distortion_power', 'distortion_loss_mult', 'lr_init', 'grid_decay_mult'
    for name in names:
      assert getattr(made[-1].config, name) == getattr(zipped.config, name)
