"""Settings: shipped files load, defaults are the published ones, bad values are reported."""

import dataclasses
import glob
import os
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from internal import config_checks, configs, coord, models
from internal.training import train_step

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHIPPED = sorted(glob.glob(os.path.join(ROOT, 'configs', '*.gin')))


def shipped(name: str) -> configs.Settings:
  return configs.load_config([os.path.join(ROOT, 'configs', f'{name}.gin')])


def test_all_configs_are_present():
  names = {os.path.splitext(os.path.basename(path))[0] for path in SHIPPED}
  assert names >= {'360', '360_glo4', 'blender_256', 'blender_512', 'llff_256', 'llff_512', 'tat',
                   'demo', 'debug', '360_grid', '360_fast', 'blender_grid',
                   '360_zip'}  # fmt: skip


@pytest.mark.parametrize('path', SHIPPED, ids=os.path.basename)
def test_shipped_config_loads_and_opens_with_its_command(path):
  settings = configs.load_config([path])
  assert settings.prop_mlp.disable_rgb
  with open(path) as f:
    comment = f.read().split('\n\n')[0]
  assert all(line.startswith('#') for line in comment.split('\n'))
  name = os.path.basename(path)
  assert f'python train.py --gin_configs=configs/{name}' in comment or (
    name == 'demo.gin' and 'scripts/demo.sh' in comment
  )


@pytest.mark.parametrize('path', SHIPPED, ids=os.path.basename)
def test_shipped_config_loads_from_any_folder(path, tmp_path, monkeypatch):
  here = configs.load_config([path])
  monkeypatch.chdir(tmp_path)  # Some include 'configs/360.gin'.
  assert configs.load_config([path]) == here


@pytest.mark.parametrize(
  ('name', 'count'),
  [
    ('360', 9_007_493),
    ('tat', 9_007_493),
    ('360_glo4', 9_012_005),
    ('blender_256', 835_205),
    ('llff_256', 835_205),
    ('blender_512', 3_065_733),
    ('llff_512', 3_065_733),
    ('360_grid', 77_550_072),  # No published count: ours, as in the headers.
    ('360_fast', 66_647_198),
    ('blender_grid', 60_800_694),
    ('360_zip', 77_690_721),
    ('cpu', 2_695_086),
  ],
)
def test_shipped_config_has_the_published_size(name, count):
  shapes = train_step.abstract_state(shipped(name)).params
  assert models.num_params(shapes) == count


def test_published_defaults():
  settings = configs.load_config()
  config, model = settings.config, settings.model
  wanted = {
    'dataset_loader': 'llff', 'factor': 0, 'llffhold': 8, 'near': 2.0, 'far': 6.0,
    'batching': 'all_images', 'batch_size': 16384, 'max_steps': 250000, 'early_exit_steps': None,
    'micro_batches': 0, 'checkpoint_every': 25000, 'print_every': 100, 'train_render_every': 5000,
    'render_chunk_size': 16384, 'data_loss_type': 'charb', 'charb_padding': 1e-3,
    'data_loss_mult': 1.0, 'data_coarse_loss_mult': 0.0, 'interlevel_loss_mult': 1.0,
    'distortion_loss_mult': 0.01, 'weight_decay_mults': {}, 'lr_init': 2e-3, 'lr_final': 2e-5,
    'lr_delay_steps': 512, 'lr_delay_mult': 0.01, 'adam_beta1': 0.9, 'adam_beta2': 0.999,
    'adam_eps': 1e-6, 'grad_max_norm': 1e-3, 'grad_max_val': 0.0, 'eval_only_once': True,
    'eval_quantize_metrics': True, 'render_path_frames': 120, 'render_video_fps': 60,
    'render_video_crf': 18, 'render_spline_degree': 5, 'render_spline_smoothness': 0.03,
    'vis_num_rays': 16, 'gc_every': 10000,
  }  # fmt: skip
  assert {k: getattr(config, k) for k in wanted} == wanted
  wanted = {
    'num_prop_samples': 64, 'num_nerf_samples': 32, 'num_levels': 3, 'raydist_fn': None,
    'ray_shape': 'cone', 'opaque_background': False, 'anneal_slope': 10.0,
    'dilation_multiplier': 0.5, 'dilation_bias': 0.0025, 'single_jitter': True,
    'stop_level_grad': True, 'single_mlp': False, 'disable_integration': False,
    'use_viewdirs': True, 'num_glo_features': 0, 'num_glo_embeddings': 1000,
    'near_anneal_rate': None, 'near_anneal_init': 0.95, 'resample_padding': 0.0,
    'use_gpu_kernels': True, 'mlp_dtype': 'auto',
  }  # fmt: skip
  assert {k: getattr(model, k) for k in wanted} == wanted
  assert tuple(model.bg_intensity_range) == (1, 1)
  wanted = {
    'net_depth': 8, 'net_width': 256, 'bottleneck_width': 256, 'net_depth_viewdirs': 1,
    'net_width_viewdirs': 128, 'skip_layer': 4, 'min_deg_point': 0, 'max_deg_point': 12,
    'deg_view': 4, 'basis_shape': 'icosahedron', 'basis_subdivisions': 2, 'warp_fn': None,
    'density_bias': -1.0, 'density_noise': 0.0, 'rgb_padding': 0.001, 'rgb_bias': 0.0,
    'rgb_premultiplier': 1.0, 'bottleneck_noise': 0.0, 'weight_init': 'he_uniform',
    'disable_rgb': False,
  }  # fmt: skip
  for mlp in (settings.prop_mlp, settings.nerf_mlp):
    assert {k: getattr(mlp, k) for k in wanted} == wanted


def test_360_has_the_published_settings():
  got = shipped('360')
  assert got.config == configs.Config(dataset_loader='llff', near=0.2, far=1e6, factor=4)
  assert got.model == configs.Model(raydist_fn='reciprocal', opaque_background=True)
  contract = {'warp_fn': 'contract'}
  assert got.nerf_mlp == configs.NerfMLP(net_depth=8, net_width=1024, **contract)
  assert got.prop_mlp == configs.PropMLP(net_depth=4, net_width=256, disable_rgb=True, **contract)


@pytest.mark.parametrize('path', SHIPPED, ids=os.path.basename)
def test_text_reads_back(path, tmp_path):
  first = configs.load_config(
    [path],
    [
      "Config.data_dir = 'it\\'s'",
      'Config.seed = 7',
      "Config.weight_decay_mults = {'NerfMLP': 0.1}",
    ],
  )
  (tmp_path / 'config.gin').write_text(first.text)
  second = configs.load_config([str(tmp_path / 'config.gin')])
  assert second.config.seed == 7
  assert second.config.weight_decay_mults == {'NerfMLP': 0.1}
  assert second.config.data_dir == "it's"
  for field in ('config', 'model', 'prop_mlp', 'nerf_mlp'):
    assert getattr(first, field) == getattr(second, field)


def test_text_includes_defaults():
  """Changing a default must not change the settings of an existing run."""
  text = configs.load_config().text
  for owner in (configs.Config, configs.Model, configs.PropMLP, configs.NerfMLP):
    for field in dataclasses.fields(owner):
      if field.default is not dataclasses.MISSING:  # gin does not see factories.
        assert f'{owner.__name__}.{field.name} = ' in text


def test_later_bindings_override_earlier_ones(tmp_path):
  path = tmp_path / 'a.gin'
  path.write_text('Config.factor = 4\nConfig.llffhold = 5\n')
  config = configs.load_config([str(path)], ['Config.factor = 2', 'Config.factor = 8']).config
  assert (config.factor, config.llffhold) == (8, 5)


def test_loads_do_not_affect_each_other():
  configs.load_config((), ['Config.factor = 4'])
  assert configs.Config().factor == 0
  assert configs.load_config().config.factor == 0


@pytest.mark.parametrize(
  ('binding', 'suggestion'),
  [
    ('Config.bach_size = 3', 'Config.batch_size'),
    ('Config.lr_int = 3', 'Config.lr_init'),
    ('Confg.batch_size = 3', 'Config.batch_size'),
    ('Config.num_prop_samples = 3', 'Model.num_prop_samples'),
    ('NerfMLP.net_widht = 3', 'NerfMLP.net_width'),
    ('PropMLP.warp_func = None', 'PropMLP.warp_fn'),
    ('Model.raydist = None', 'Model.raydist_fn'),
  ],
)
def test_unknown_name_lists_the_nearest_known(binding, suggestion):
  with pytest.raises(configs.ConfigError) as e:
    configs.load_config((), [binding])
  message = str(e.value)
  assert '\n' not in message
  assert suggestion in message.split('Nearest known: ')[1]


@pytest.mark.parametrize(
  ('binding', 'rule'),
  [
    ('Config.near = 7', 'near'),
    ('Config.batch_size = 0', 'Config.batch_size'),
    ('Config.batch_size = 1.5', 'Config.batch_size must be a whole number, at least 1'),
    ("Config.batch_size = '64'", 'Config.batch_size must be a whole number, at least 1'),
    ('Config.randomized = 1', 'Config.randomized must be True or False'),
    ('Config.factor = -1', 'Config.factor'),
    ('Config.micro_batches = -1', 'Config.micro_batches'),
    ("Config.data_loss_type = 'l1'", "'mse', 'charb'"),
    ("Config.batching = 'some'", "'all_images', 'single_image'"),
    ("Model.ray_shape = 'box'", "'cone', 'cylinder'"),
    ('Model.num_multisamples = 4', '0, 6'),
    ("NerfMLP.encoding = 'hash'", "'ipe', 'grid'"),
    ('PropMLP.grid_levels = 0', 'PropMLP.grid_levels must be at least 1'),
    ('PropMLP.grid_levels = (5, 6.5)', 'must be a whole number or a tuple of whole numbers'),
    ("Config.interlevel_loss_type = 'spline'", "'bound', 'blur'"),
    ('Config.interlevel_blur = (0.03, 0)', 'Config.interlevel_blur must be above 0'),
    ('Config.interlevel_every = 0', 'Config.interlevel_every must be at least 1'),
    (
      'Config.interlevel_every = 2\nModel.stop_level_grad = False',
      'Config.interlevel_every must be 1 where Model.stop_level_grad = False trains proposals',
    ),
    (
      'Config.interlevel_every = 2\nConfig.data_coarse_loss_mult = 0.1',
      'Config.interlevel_every must be 1 where Config.data_coarse_loss_mult trains proposals',
    ),
    ('Config.distortion_power = (-0.25,)', 'Config.distortion_power must be (lambda, scale)'),
    ('Config.distortion_power = (-0.25, 0.0)', 'scale > 0'),
    ('Config.grid_decay_growth = 0.0', 'Config.grid_decay_growth must be above 0'),
    ('NerfMLP.grid_init = 0.0', 'NerfMLP.grid_init must be above 0'),
    ('NerfMLP.grid_coarse_to_fine = 1.5', 'NerfMLP.grid_coarse_to_fine must be 0 to 1'),
    ("NerfMLP.density_activation = 'relu'", "'softplus', 'exp'"),
    ('Model.gradient_scaling = -1.0', 'Model.gradient_scaling must be at least 0'),
    ('Model.raydist_fn = @jnp.sqrt', 'jnp.sqrt'),
    ("NerfMLP.warp_fn = 'fold'", "'contract'"),
    ("NerfMLP.weight_init = 'zeros'", "'he_uniform', 'he_normal'"),
    ('NerfMLP.skip_layer = 0', 'NerfMLP.skip_layer must be at least 1, got 0'),
    ('PropMLP.net_depth = 0', 'PropMLP.net_depth must be at least 1'),
    ('NerfMLP.deg_view = -1', 'NerfMLP.deg_view must be 0 to 32, got -1'),
    ('NerfMLP.min_deg_point = 12', 'min_deg_point must be below max_deg_point, got 12 and 12'),
    ('Model.num_levels = 0', 'Model.num_levels must be at least 1'),
    ('Model.near_anneal_rate = 0.0', 'Model.near_anneal_rate must be above 0'),
    ('Model.num_glo_embeddings = 0', 'Model.num_glo_embeddings must be at least 1'),
    ('Model.bg_intensity_range = (1,)', 'Model.bg_intensity_range must be (low, high)'),
    ('Model.bg_intensity_range = (1, 0)', 'Model.bg_intensity_range must be (low, high)'),
    ("Config.weight_decay_mults = {'nerf_mlp': 'x'}", 'must be a dictionary from text to numbers'),
    ('Config.gc_every = -1', 'Config.gc_every must be at least 0'),
    ('Config.early_exit_steps = 0', 'Config.early_exit_steps must be at least 1'),
    ('Config.render_video_fps = 0', 'Config.render_video_fps must be at least 1'),
    (
      'Config.render_resolution = (10.5, 10)',
      'must be a tuple of whole numbers or None, at least 1',
    ),
    ('Config.render_video_crf = 52', 'Config.render_video_crf must be 0 to 51'),
    ('Config.charb_padding = 0', 'Config.charb_padding must be above 0'),
    ('Config.far = 1e10', 'Config.far must be at most 1e+08'),
    ('Config.adam_beta1 = 1.0', 'Config.adam_beta1 must be at least 0, below 1, got 1.0'),
    ('Config.adam_beta2 = -0.1', 'Config.adam_beta2 must be at least 0, below 1, got -0.1'),
    ('Config.adam_eps = 0', 'Config.adam_eps must be above 0'),
    ('Config.lr_delay_mult = -1', 'Config.lr_delay_mult must be at least 0'),
    ('Config.interlevel_loss_mult = -3', 'Config.interlevel_loss_mult must be at least 0'),
    ("Config.weight_decay_mults = {'nerf_mlp': -1}", 'must be at least 0'),
    ('Config.render_resolution = (10,)', 'Config.render_resolution must be (width, height)'),
    ('Config.seed = -1', 'Config.seed must be 0 to 4294967295'),
    ('Config.seed = 99999999999999999999', 'Config.seed must be 0 to 4294967295'),
    ('Model.num_nerf_samples = 1', 'Model.num_nerf_samples must be at least 2'),
    ('Model.num_prop_samples = 1', 'Model.num_prop_samples must be at least 2'),
    ('Model.near_anneal_init = 2', 'Model.near_anneal_init must be at least 0, below 1'),
    ('Model.bg_intensity_range = (0, 255)', 'Model.bg_intensity_range must be 0 to 1'),
    (
      "Model.raydist_fn = 'power'\nModel.raydist_options = {'scale': 0}",
      "Model.raydist_options: 'scale' must be a number, above 0, got 0",
    ),
    ('NerfMLP.max_deg_point = 200', 'NerfMLP.max_deg_point must be -32 to 32'),
    (
      "PropMLP.encoding = 'grid'\nPropMLP.grid_max_resolution = (32, 8)",
      'PropMLP.grid_min_resolution must be at most grid_max_resolution, got 16 and (32, 8)',
    ),
    ('train/Config.factor = 8', 'train/Config.factor: settings have no scopes'),
    ('a/b/NerfMLP.net_width = 8', 'Write NerfMLP.net_width'),
    ('Config.batch_size = ', ''),
    ('Config.batch_size 3', ''),
  ],
)
def test_bad_value_is_a_one_line_error(binding, rule):
  with pytest.raises(configs.ConfigError) as e:
    configs.load_config((), [binding])
  assert rule in str(e.value)
  assert '\n' not in str(e.value)


# Numbers of any size and sign make sense for these, or a check of several settings limits them.
UNLIMITED = {
  'distortion_power', 'loss_mults', 'z_variation', 'z_phase', 'density_bias', 'rgb_bias',
}  # fmt: skip


def numeric(hint) -> bool:
  return hint in (int, float) or any(map(numeric, typing.get_args(hint)))


@pytest.mark.parametrize('owner', [configs.Config, configs.Model, configs.NerfMLP])
def test_each_number_has_its_limits(owner):
  for name, hint in typing.get_type_hints(owner).items():
    if numeric(hint):
      limited = bool(config_checks._limits(name))
      assert limited == (name not in UNLIMITED), name


@pytest.mark.parametrize('seed', [0, 2**32 - 1])
def test_all_seeds_start_a_run(seed):
  assert train_step.seed_of(configs.Config(seed=seed)).dtype == np.int32


def test_a_single_level_has_no_blur():
  assert configs.Config(interlevel_blur=()).interlevel_blur == ()


def test_the_fewest_samples_make_a_model():
  settings = tiny.settings('Model.num_prop_samples = 2', 'Model.num_nerf_samples = 2')
  models.init_params(models.build(settings), jax.random.key(0))


@pytest.mark.parametrize('degs', [(-32, -30), (30, 32)])
def test_the_highest_and_lowest_frequencies_are_finite(degs):
  mean, var = jnp.array([[0.0, 1, 1e6]]), jnp.array([[0.0, 1e-12, 1e6]])
  assert jnp.isfinite(coord.integrated_pos_enc(mean, var, *degs)).all()


def test_macros_and_text_that_looks_like_a_scope():
  path = 'x' * 80 + '\ntrain/Config.factor = 8'
  settings = configs.load_config(
    [], ['LR = 0.5', 'Config.lr_init = %LR', f'Config.data_dir={path!r}']
  )
  assert settings.config.lr_init == 0.5
  assert settings.config.data_dir == path


def test_int_is_accepted_for_float_and_function_for_its_name():
  settings = configs.load_config(
    (), ['Config.lr_init = 1', 'Model.raydist_fn = @jnp.log', 'NerfMLP.warp_fn = @coord.contract']
  )
  assert settings.config.lr_init == 1
  assert settings.model.raydist_fn == 'log'
  assert settings.nerf_mlp.warp_fn == 'contract'


def test_missing_file_is_named():
  with pytest.raises(configs.ConfigError, match=r"No such gin file: 'nowhere/a\.gin'"):
    configs.load_config(['nowhere/a.gin'])


def test_missing_include_is_named(tmp_path):
  path = tmp_path / 'a.gin'
  path.write_text("include 'nowhere.gin'\n")
  with pytest.raises(configs.ConfigError, match=r'nowhere\.gin'):
    configs.load_config([str(path)])


def test_early_exit_stops_before_max_steps():
  assert configs.Config(max_steps=100).last_step == 100
  assert configs.Config(max_steps=100, early_exit_steps=40).last_step == 40
  assert configs.Config(max_steps=100, early_exit_steps=400).last_step == 100


def test_settings_made_in_code_have_defaults():
  configs.load_config([], ['NerfMLP.net_width = 7'])
  assert configs.NerfMLP() == configs.load_config().nerf_mlp


def test_grid_configs_share_sampling_and_bounds_with_360():
  paper = shipped('360')
  for name in ('360_grid', '360_fast'):
    got = shipped(name)
    for mlp in (got.nerf_mlp, got.prop_mlp):
      assert mlp.encoding == 'grid'
      assert mlp.warp_fn == 'contract'
    assert got.model.num_levels == paper.model.num_levels == 3
    assert got.model.opaque_background
    assert (got.config.near, got.config.far) == (paper.config.near, paper.config.far)


def test_for_level_takes_the_number_of_a_proposal_level():
  prop = configs.PropMLP(grid_levels=(5, 6), grid_log2_size=19)
  first, second = prop.for_level(0), prop.for_level(1)
  assert (first.grid_levels, second.grid_levels) == (5, 6)
  assert first == configs.PropMLP(grid_levels=5, grid_log2_size=19)
  assert configs.PropMLP().for_level(None) == configs.PropMLP().for_level(1) == configs.PropMLP()
  with pytest.raises(configs.ConfigError, match=r'got \(5, 6\)'):
    prop.for_level(2)
  with pytest.raises(configs.ConfigError, match='separate_prop_mlps'):
    configs.NerfMLP(grid_levels=(5, 6)).for_level(None)


def test_contradicting_mlp_settings_are_refused():
  with pytest.raises(configs.ConfigError, match='exclude each other'):
    configs.Model(single_mlp=True, separate_prop_mlps=True)
  with pytest.raises(configs.ConfigError, match='multisample_proposals'):
    configs.Model(single_mlp=True, num_multisamples=6, multisample_proposals=False)


@pytest.mark.parametrize('value', ['far = 1e999', "weight_decay_mults = {'nerf_mlp': -1e999}"])
def test_non_finite_values_are_refused(value):
  with pytest.raises(configs.ConfigError, match=r'Config\.\w+ must be finite, got .*inf'):
    configs.load_config([], [f'Config.{value}'])


@pytest.mark.parametrize(
  'line', ['import os', 'from os import path', 'from __gin__ import dynamic_registration']
)
def test_settings_run_no_code(tmp_path, line):
  """The config.gin in a run's folder may come from somebody else."""
  trap = tmp_path / 'sprung'
  call = "configs.Config.data_dir = @os.mkdir()\nos.mkdir.path = '{trap}'\n"
  imports = 'import os\nfrom internal import configs\n'
  inner, outer = tmp_path / 'inner.gin', tmp_path / 'outer.gin'
  inner.write_text(f'{line}\n{imports}{call.format(trap=trap)}')
  outer.write_text(f"include '{inner}'\n")
  for path in (inner, outer):
    with pytest.raises(configs.ConfigError, match=rf'{path.name}: .*settings run no code'):
      configs.load_config([str(path)])
  with pytest.raises(configs.ConfigError, match='settings run no code'):
    configs.load_config([], [line])
  assert not trap.exists()


@pytest.mark.parametrize(
  'content', [b'\xff', b"include 'a.gin'", b'Config.factor = [', b'Config.factor = 9' + b'9' * 5000]
)
def test_damaged_files_are_named(tmp_path, monkeypatch, content):
  monkeypatch.chdir(tmp_path)  # For the file that includes itself.
  path = tmp_path / 'a.gin'
  path.write_bytes(content)
  with pytest.raises(configs.ConfigError) as caught:
    configs.load_config([str(path)])
  assert str(path) in str(caught.value)
