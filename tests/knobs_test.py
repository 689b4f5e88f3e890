"""No dead settings: each field in configs.py changes what is computed or written.

A probe maps settings to something comparable: the traced program, what a loader reads, what the
training loop does. For each field, `KNOBS` has a probe and a value that must change its result.
"""

import ast
import contextlib
import dataclasses
import functools
import glob
import os
import re
import tempfile
import types

import captures
import formats_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import trajectory_test

from internal import cli, configs, datasets, idle_settings, losses, models, plugins, structs
from internal.commands import eval as eval_program
from internal.datasets import images, scenes
from internal.evaluation import metrics as metrics_lib
from internal.evaluation import results, train_renders
from internal.fields import encodings, mlp
from internal.rendering import renderer, trained, trajectory
from internal.training import (
  batches,
  camera_refinement,
  checkpoints,
  exposure,
  loop,
  nonfinite,  # fmt: skip
  pixel_store,
  run_folder,
  runlog,
  train_step,
)
from internal.vis import pictures

OWNERS = (configs.Config, configs.Model, configs.PropMLP, configs.NerfMLP)
COLOURED = 'PropMLP.disable_rgb = False'
GRID = ("{}.encoding = 'grid'", '{}.grid_levels = 2', '{}.grid_log2_size = 8')


def text_of(traced) -> str:
  """Returns a jaxpr as text, without the addresses that differ between traces."""
  return re.sub(r' at 0x[0-9a-f]+', '', str(traced))


# Probes. Each takes (settings, folder).


def rays():
  vec = jnp.ones((2, 3))
  return structs.Rays(vec, vec, vec, vec[:, :1], jnp.zeros(2, jnp.int32))


def model(settings, _):
  """The forward pass in training, with its parameters' initialisation."""
  init = models.build(settings).init_with_output
  return text_of(jax.make_jaxpr(lambda key, frac: init(key, key, rays(), frac))(key(), 0.5))


def key():
  return jax.random.key(0)


def field(settings, which, **how):
  """One MLP, with its parameters' initialisation."""
  gaussians = structs.Gaussians(jnp.ones((1, 2, 3)), jnp.ones((1, 2, 3, 3)))
  init = mlp.MLP(getattr(settings, which), **how).init_with_output
  return text_of(jax.make_jaxpr(lambda key: init(key, key, gaussians, jnp.ones((1, 3))))(key()))


def on_a_gpu(settings, _):
  """The program of a bfloat16 MLP on a GPU, as far as it can be traced without one."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'default_backend', lambda: 'gpu')
    kernels = settings.model.use_gpu_kernels
    return field(settings, 'nerf_mlp', dtype=jnp.bfloat16, gpu_kernels=kernels)


def gradient(settings, _):
  """The gradient of hash grid lookups."""
  cfg = settings.model
  grid = encodings.HashGrid(2, 4, 8, 6, 2, deterministic=cfg.deterministic_grid)
  gaussians = structs.Gaussians(jnp.ones((5, 3)), jnp.ones((5, 3, 3)))
  built = models.build(settings)
  used = built.apply({}, method=lambda m: m.nerf_mlp.deterministic)
  params = grid.init(key(), gaussians)
  grad = jax.grad(lambda p: grid.apply(p, gaussians).sum())
  return used, text_of(jax.make_jaxpr(grad)(params))


def loss(settings, _):
  """The loss of two levels, both with a colour."""
  config = settings.config

  def total(w, rgb):
    t = jnp.linspace(0.0, 1, 5)[None]
    history = [structs.RayHistory(t, t, w, None)] * 2
    rendering = structs.Rendering(rgb, w[:, 0], w[:, 0], w[:, :3])
    params = {'nerf_mlp': {'grid': {'table_0': w, 'table_1': w}, 'a': w}}
    batch = structs.Batch(None, rgb / 2, None, w[:, 0], w[:, 1])
    return losses.total(config, params, [rendering] * 2, history, batch)

  return text_of(jax.make_jaxpr(total)(jnp.ones((1, 4)), jnp.ones((1, 3))))


def optimizer(settings, _):
  """Three updates, and the learning rate at several steps."""
  adam, params = train_step.make_optimizer(settings.config), jnp.array([1.0, 2, 3])
  state, result = adam.init(params), []
  for grad in (jnp.array([1e-3, -2e-3, 0]), jnp.array([2.0, 1, -5]), jnp.array([1e-8, 1e-7, 1])):
    step, state = adam.update(grad, state, params)
    result.append(step)
  schedule = train_step.learning_rate(settings.config)
  return jax.tree.leaves([result, [schedule(k) for k in (0, 5, 20, 60, 100)]])


def step(settings, _):
  """The training step as a whole."""
  cams, images = tiny.capture()
  cams = exposure.add_tables(settings.config, cams)
  traced = train_step.make_train_step(settings, tiny.mesh(1))
  state = train_step.abstract_state(settings)
  store = batches.make_store(images)
  traced = traced.variant(traced.choices[0]).trace(state, cams, store, 1, 0)
  return text_of(traced.jaxpr)


def refining(settings, _):
  """The training step of cameras that may be refined."""
  cams, images = tiny.capture()
  eye = np.broadcast_to(np.eye(camera_refinement.WIDTH, dtype=np.float32), (3, 11, 11))
  cams = cams.replace(supervision=structs.Supervision(preconditioner=eye))
  traced = train_step.make_train_step(settings, tiny.mesh(1))
  args = train_step.abstract_state(settings), cams, batches.make_store(images), 1, 0
  return text_of(traced.variant(traced.choices[0]).trace(*args).jaxpr)


def protocol(settings, _):
  return results.protocol(settings.config, results.OWN_SPLIT)


def draw(settings, _):
  """The step's keys and the pixels drawn by them."""
  pixels = train_step.make_draw(settings.config, tiny.mesh(1))(3, np.array([[9, 9]] * 9))
  return [np.asarray(a).tolist() for a in pixels]


def choices(settings, _):
  return train_step._micro_batch_choices(settings.config, tiny.mesh(1), 1)


def incomplete(settings, folder):
  """How many images load of a capture of nine that lacks one."""
  captures.write_colmap(folder)
  os.unlink(os.path.join(folder, 'images', '004.png'))
  try:
    return len(datasets.load_dataset(dataclasses.replace(settings.config, data_dir=folder)).names)
  except images.DataNotFoundError as error:
    return str(error)


def wide(settings, folder):
  """Whether a capture loads whose focal length can hardly be right."""
  captures.write_colmap(folder, camera=('PINHOLE', (1.5, 1.5, 8.0, 6.0)))
  try:
    return len(datasets.load_dataset(dataclasses.replace(settings.config, data_dir=folder)).names)
  except images.DataError as error:
    return str(error)


def data(settings, folder):
  """What loaders read from a folder in several formats, with ids in another order than names."""
  if not os.path.isdir(os.path.join(folder, 'a')):
    for name in ('a', 'b'):
      names = ['1.png', '3.png', '2.png', *(f'{i}.png' for i in range(4, 10))]
      captures.write_colmap(os.path.join(folder, name), names=names)
      np.save(os.path.join(folder, name, 'poses_bounds.npy'), np.ones((9, 17)) * range(1, 18))
      formats_test.write_fvs(os.path.join(folder, name))
  name = settings.config.data_dir or 'a'
  config = dataclasses.replace(settings.config, data_dir=os.path.join(folder, name))
  scene = datasets.load_dataset(config)
  return scene.loader, folder + name, scene.files, scene.test, scene.bounds, scene.cameras.size


def tracked(settings, folder):
  """How many of a batch's rays see a known point."""
  captures.write_colmap(folder, ext='.txt')
  captures.write_tracks(folder, [[0, 0, 0]], [0.5], [range(1, 10)])
  config = dataclasses.replace(settings.config, data_dir=folder)
  scene = datasets.load_dataset(config)
  settings = dataclasses.replace(settings, config=config)
  return pixel_store.training_cameras(settings, scene).supervision.track_rays


def which_light(settings, folder):
  scan = os.path.join(folder, 'Rectified', 'scan1')
  if not os.path.isdir(scan):
    formats_test.write_dtu(folder)
  config = dataclasses.replace(settings.config, data_dir=scan)
  return datasets.load_dataset(config).files


def training(settings, folder):
  """What the training loop does, in order, with stand-ins for everything slow."""
  done, store = [], batches.make_store(tiny.capture()[1])
  place = os.path.join(folder, settings.config.checkpoint_dir or 'run')
  config = dataclasses.replace(settings.config, checkpoint_dir=place)
  settings = dataclasses.replace(settings, config=config)
  scene = dataclasses.replace(trajectory_test.make_scene(), test=(0, 1, 2))
  stats = structs.Stats(jnp.ones((9, 3)), ('loss', 'psnr', 'learning_rate'))

  class Step:
    micro_batches, fixed = 1, True
    account = staticmethod(lambda: '')

    def __init__(self, most):
      self.most = most

    def fit(self, *args, on_lowered):
      pass

    def __call__(self, state, cams, pixels, count):
      done.append(('dispatch', count))
      return state, stats

  class Log(types.SimpleNamespace):
    train_seconds = 0.0

    def __getattr__(self, name):
      if name.startswith('__'):
        raise AttributeError(name)
      if name == 'pause':
        return lambda _: contextlib.nullcontext()
      return lambda *args: done.append((name, args[0])) if name in ('steps', 'picture') else None

  def rendered(params, cams, row, *_):
    done.append(('render', row))
    return {'rgb': np.zeros((40, 60, 3)), 'acc': np.ones((40, 60)),
            'distance_median': np.ones((40, 60))}  # fmt: skip

  def probed(settings, _):
    count = settings.config.vis_num_rays
    return lambda *_: [[np.ones((count, 3))], [np.ones((count, 2))], [None]]

  with pytest.MonkeyPatch.context() as patch:
    for owner, name, stand_in in (
      (run_folder, 'start_run', lambda *_: (types.SimpleNamespace(params={}), [], 1)),
      (pixel_store, 'read', lambda *_: store),
      (train_step, 'make_train_step', lambda *_, most, **__: Step(most)),
      (renderer, 'make_image_renderer', lambda *_: rendered),
      (renderer, 'make_ray_probe', probed),
      (runlog, 'RunLog', lambda *_: Log()),
      (checkpoints, 'save', lambda place, state, keep, notes, spared: done.append((place, keep))),
      (run_folder, 'write_run', lambda *_: None),
      (scenes, 'read_image', lambda *_: np.zeros((40, 60, 3), np.uint8)),
      (pictures, 'write_png', lambda path, picture: done.append((path, picture.shape))),
      (loop.gc, 'collect', lambda: done.append('collected')),
      (metrics_lib, 'image_metrics', lambda *_: {'psnr': 1.0, 'ssim': 1.0}),
    ):
      patch.setattr(owner, name, stand_in)
    mesh = tiny.mesh(1)
    render_test = train_renders.TestRenders(settings, scene, mesh)
    loop.train(settings, scene, mesh, render_test=render_test)
  return done


def place_of_pixels(settings, folder):
  """Whether pixels go to the device, and which file they are read from."""
  scene = dataclasses.replace(trajectory_test.make_scene(), train=(1,))
  path = os.path.join(folder, scene.files[1])
  if not os.path.exists(path):
    captures.save_image(path, captures.pixels(0, (60, 40)))
  config = dataclasses.replace(settings.config, data_dir=folder)
  if config.pixel_cache_dir:
    config = dataclasses.replace(config, pixel_cache_dir=os.path.join(folder, 'elsewhere'))
  store = pixel_store.read(config, scene, progress=False)
  made = sorted(glob.glob(os.path.join(folder, '**', '*.rgb'), recursive=True, include_hidden=True))
  return pixel_store.place(config, scene), type(store.rgb), made


def patience(settings, folder):
  rows = [{'loss': np.nan, 'grad_norm_a': np.nan, 'skipped_a': k} for k in range(1, 8)]
  try:
    nonfinite.check(folder, settings.config.max_skipped_updates, 7, rows)
  except nonfinite.NonFiniteError as e:
    return str(e)
  return 'went on'


def reading_back(settings, _):
  """Whether a config.gin with the plug-ins of these settings loads."""
  try:
    load((f'Config.plugins = {settings.config.plugins!r}',))
  except plugins.PluginError as e:
    return str(e)
  return 'loaded'


def metrics(settings, _):
  img, truth = np.random.default_rng(0).random((2, 24, 24, 3)).astype(np.float32)
  return metrics_lib.image_metrics(img, truth, settings.config)


def evaluating(settings, folder):
  """Which checkpoints and images are evaluated, and which files are written."""
  config = dataclasses.replace(settings.config, data_dir=folder)
  scene = dataclasses.replace(trajectory_test.make_scene(), test=(0, 2, 4, 6))
  for file in scene.files:
    if not os.path.exists(os.path.join(folder, file)):
      captures.save_image(os.path.join(folder, file), captures.pixels(0, (60, 40)))
  rows = eval_program.select_images(config, scene)

  def rendered(params, cams, row, fraction):
    blank = np.ones((40, 60))
    return {'rgb': np.zeros((40, 60, 3)), 'acc': blank, 'distance_median': blank}

  out = tempfile.mkdtemp(dir=folder)
  looks = iter([5, 7, config.max_steps])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoints, 'latest_step', lambda _: at.append(next(looks)) or at[-1])
    patch.setattr(checkpoints, 'newest', lambda _: at[-1])
    patch.setattr(eval_program, '_POLL_SECONDS', 0)
    at = []
    steps = list(eval_program.steps_to_evaluate('run', config))
  settings = dataclasses.replace(settings, config=config)
  run = trained.TrainedRun(out, settings, scene, tiny.mesh(1), {}, 5)
  eval_program.evaluate(run, rows, rendered)
  return steps, rows, sorted(os.listdir(os.path.join(out, 'eval')))


def path(settings, folder):
  """The cameras of a video."""
  config = settings.config
  file = os.path.join(folder, 'poses.npy')
  np.save(file, trajectory_test.make_scene().cameras.camtoworld[2:])
  if config.render_path_file:
    config = dataclasses.replace(config, render_path_file=file)
  cameras = np.linspace(0, 1, 24).reshape(8, 3)  # Heights for z_variation.
  scene = trajectory_test.make_scene(bounds=(1.0, 9.0))
  scene.cameras.camtoworld[:, :, 3] += cameras
  scene = dataclasses.replace(scene, world_transform=np.diag([2.0, 2, 2, 1]))
  return trajectory.make_path(config, scene)[0]


def video(settings, folder):
  """Which files render.py writes, and the settings of its video encoder."""
  from internal.commands import render as render_program
  from internal.rendering import videos

  done, config = [], settings.config
  config = dataclasses.replace(config, render_dir=os.path.join(folder, config.render_dir or 'r'))
  settings = dataclasses.replace(settings, config=config)
  scene = trajectory_test.make_scene()

  def make_renderer(*_, with_normals, **__):
    def rendered(params, cams, k, fraction):
      width, height = cams.size[k]
      maps = ('acc', 'distance_median', *(['normals'] if with_normals else []))
      return {'rgb': np.zeros((height, width, 3)), **{m: np.ones((height, width)) for m in maps}}

    return rendered

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_folder, 'open_run', lambda *_: (settings, scene))
    patch.setattr(checkpoints, 'restore_params', lambda *_, **__: ({}, 5))
    patch.setattr(renderer, 'make_image_renderer', make_renderer)
    patch.setattr(videos.pictures, 'normal_picture', lambda *_: np.zeros((9, 9, 3)))
    patch.setattr(videos.pictures, 'write_png', lambda path, _: done.append(path))
    patch.setattr(videos.video, 'write_video', lambda _, *how: done.append(how))
    render_program.main(['--checkpoint_dir', folder])
  return done


def chunk(settings, _):
  return renderer.make_chunk_renderer(settings, tiny.mesh(1)).choices


# Bindings for both sides of a case.
NAMES = repr(','.join(f'dir/img_{i}' for i in range(8)))
SPLINE = f'Config.render_spline_keyframes = {NAMES}', 'Config.render_spline_smoothness = 0.5'
ORBIT, DOLLY = (f"Config.render_path_type = '{name}'" for name in ('orbit', 'dolly'))
DTU = ("Config.dataset_loader = 'dtu'",)

KNOBS = {
  'Config': {
    'plugins': (reading_back, "('absent',)"),
    'dataset_loader': (data, "'tat_fvs'"),
    'data_dir': (data, "'b'"),
    'checkpoint_dir': (training, "'elsewhere'"),
    'factor': (data, '2'),
    'llffhold': (data, '3'),
    'min_images_fraction': (incomplete, '0.95'),
    'allow_unlikely_cameras': (wide, 'True'),
    'forward_facing': (data, 'True'),
    'load_alphabetical': (data, 'False'),
    'dtu_light_cond': (which_light, '7', *DTU),
    'near': (model, '0.5'),
    'far': (model, '5.0'),
    'pixels_on': (place_of_pixels, "'host'"),
    'pixel_cache_dir': (place_of_pixels, "'elsewhere'", "Config.pixels_on = 'disk'"),
    'seed': (draw, '3'),
    'batching': (draw, "'single_image'"),
    'batch_size': (draw, '8'),
    'patch_size': (draw, '2'),
    'max_skipped_updates': (patience, '5'),
    'micro_batches': (choices, '2'),
    'max_steps': (optimizer, '50'),
    'early_exit_steps': (training, '6'),
    'steps_per_dispatch': (training, '2'),
    'checkpoint_every': (training, '5'),
    'checkpoint_keep': (training, '1'),
    'print_every': (training, '3'),
    'train_render_every': (training, '3'),
    'train_render_images': (training, '2', 'Config.train_render_every = 6'),
    'gc_every': (training, '5'),
    'randomized': (step, 'False'),
    'data_loss_type': (loss, "'mse'"),
    'charb_padding': (loss, '0.1'),
    'data_loss_mult': (loss, '0.5'),
    'data_coarse_loss_mult': (loss, '0.5'),
    'interlevel_loss_mult': (loss, '0.0'),
    'interlevel_loss_type': (loss, "'blur'", 'Config.interlevel_blur = (0.1,)'),
    'interlevel_blur': (
      loss,
      '(0.2,)',
      'Config.interlevel_blur = (0.1,)',
      "Config.interlevel_loss_type = 'blur'",
    ),
    'interlevel_every': (step, '2'),
    'distortion_loss_mult': (loss, '0.5'),
    'distortion_power': (loss, '(-0.25, 100.0)'),
    'weight_decay_mults': (loss, "{'nerf_mlp/a': 0.1}"),
    'depth_loss_mult': (loss, '0.1'),
    'depth_loss_rays': (tracked, '0.5', 'Config.depth_loss_mult = 0.1'),
    'grid_decay_mult': (loss, '0.1', "NerfMLP.encoding = 'grid'"),
    'grid_decay_growth': (
      loss,
      '2.0',
      'Config.grid_decay_mult = 0.1',
      "NerfMLP.encoding = 'grid'",
    ),
    'loss_mults': (loss, "{'knob': 0.5}"),
    'lr_init': (optimizer, '0.1'),
    'lr_final': (optimizer, '0.001'),
    'lr_delay_steps': (optimizer, '10'),
    'lr_delay_mult': (optimizer, '0.5'),
    'lr_cooldown': (optimizer, '1.0'),
    'adam_beta1': (optimizer, '0.5'),
    'adam_beta2': (optimizer, '0.5'),
    'adam_eps': (optimizer, '0.1'),
    'grad_max_norm': (optimizer, '0.0'),
    'grad_max_val': (optimizer, '0.1', 'Config.grad_max_norm = 0.0'),
    'refine_cameras': (refining, 'True'),
    **{
      name: (refining, value, 'Config.refine_cameras = True')
      for name, value in (
        ('camera_start', '0.5'),
        ('camera_lr_init', '0.01'),
        ('camera_lr_final', '1e-6'),
        ('camera_prior', '3.0'),
      )
    },
    'exposure': (step, "'gain'"),
    'exposure_lr_init': (step, '0.1', "Config.exposure = 'gain'"),
    'exposure_lr_final': (step, '0.1', "Config.exposure = 'gain'"),
    'robust_quantile': (step, '0.5', 'Config.patch_size = 4'),
    'eval_only_once': (evaluating, 'False'),
    'eval_save_output': (evaluating, 'False'),
    'eval_report': (evaluating, 'False'),
    'eval_render_interval': (evaluating, '2'),
    'eval_dataset_limit': (evaluating, '1'),
    'eval_quantize_metrics': (metrics, 'False'),
    'eval_crop_borders': (metrics, '3'),
    'eval_refine_cameras': (protocol, 'True'),
    'vis_normals': (video, 'True'),
    'render_chunk_size': (chunk, '16'),
    'render_dir': (video, "'there'"),
    'render_path_frames': (path, '7'),
    'render_path_type': (path, "'orbit'"),
    'render_path_space': (path, "'normalized'", "Config.render_path_file = 'poses.npy'"),
    'render_orbit_elevation': (path, '30.0', ORBIT),
    'render_orbit_radius': (path, '1.5', ORBIT),
    'render_dolly_keyframe': (path, "'dir/img_5'", DOLLY),
    'render_dolly_distance': (path, '-0.5', DOLLY),
    'render_dolly_zoom': (path, 'True', DOLLY),
    'render_spline_const_speed': (path, 'False', *SPLINE),
    'render_spline_closed': (path, 'True', *SPLINE),
    'render_path_file': (path, "'poses.npy'"),
    'render_video_fps': (video, '5'),
    'render_video_crf': (video, '30'),
    'render_resolution': (path, '(30, 20)'),
    'render_focal': (path, '10.0'),
    'render_camtype': (path, "'panorama'"),
    'render_spline_keyframes': (path, NAMES),
    'render_spline_n_interp': (path, '5', *SPLINE),
    'render_spline_degree': (path, '2', *SPLINE),
    'render_spline_smoothness': (path, '0.0', *SPLINE),
    'z_variation': (path, '0.5'),
    'z_phase': (path, '0.25', 'Config.z_variation = 0.5'),
    'vis_num_rays': (training, '5', 'Config.train_render_every = 6'),
  },
  'Model': {
    'num_prop_samples': (model, '9'),
    'num_nerf_samples': (model, '9'),
    'num_levels': (model, '3'),
    'raydist_fn': (model, "'log'"),
    'raydist_options': (model, "{'scale': 2.0}", "Model.raydist_fn = 'power'"),
    'ray_shape': (model, "'cylinder'"),
    'num_multisamples': (model, '6'),
    'multisample_proposals': (model, 'False', 'Model.num_multisamples = 6'),
    'opaque_background': (model, 'False'),
    'anneal_slope': (model, '5.0'),
    'dilation_multiplier': (model, '0.2'),
    'dilation_bias': (model, '0.1'),
    'single_jitter': (model, 'False'),
    'stop_level_grad': (model, 'False'),
    'gradient_scaling': (model, '0.5'),
    'single_mlp': (model, 'True'),
    'separate_prop_mlps': (model, 'True'),
    'outside_mlps': (model, 'True'),
    'disable_integration': (model, 'True'),
    'use_viewdirs': (model, 'False'),
    'bg_intensity_range': (model, '(0.0, 1.0)', 'Model.opaque_background = False'),
    'num_glo_features': (model, '3'),
    'num_glo_embeddings': (model, '9', 'Model.num_glo_features = 3'),
    'near_anneal_rate': (model, '0.7'),
    'near_anneal_init': (model, '0.5', 'Model.near_anneal_rate = 0.7'),
    'resample_padding': (model, '0.01'),
    'resample_blur': (model, 'True'),
    'use_gpu_kernels': (on_a_gpu, 'False'),
    'mlp_dtype': (model, "'bfloat16'"),
    'deterministic_grid': (gradient, 'True', "NerfMLP.encoding = 'grid'"),
  },
  'NerfMLP': {
    'net_depth': (field, '2'),
    'net_width': (field, '9'),
    'bottleneck_width': (field, '9'),
    'net_depth_viewdirs': (field, '2'),
    'net_width_viewdirs': (field, '9'),
    'skip_layer': (field, '1', '{}.net_depth = 3'),
    'skip_layer_dir': (field, '1', '{}.net_depth_viewdirs = 3'),
    'encoding': (field, "'grid'"),
    'encoding_options': (field, "{'max_deg': 9}"),
    'min_deg_point': (field, '1'),
    'max_deg_point': (field, '9'),
    'deg_view': (field, '2'),
    'basis_shape': (field, "'octahedron'"),
    'basis_subdivisions': (field, '1'),
    'grid_levels': (field, '3', *GRID),
    'grid_min_resolution': (field, '9', *GRID),
    'grid_max_resolution': (field, '99', *GRID),
    'grid_log2_size': (field, '9', *GRID),
    'grid_features': (field, '3', *GRID),
    'grid_init': (field, '1e-5', *GRID),
    'grid_gain': (field, '10.0', *GRID),
    'grid_fading_features': (field, 'True', *GRID),
    'grid_coarse_to_fine': (field, '0.5', *GRID),
    'warp_fn': (field, 'None'),
    'density_activation': (field, "'exp'"),
    'density_bias': (field, '0.5'),
    'density_noise': (field, '0.5'),
    'rgb_padding': (field, '0.5'),
    'rgb_bias': (field, '0.5'),
    'rgb_premultiplier': (field, '0.5'),
    'bottleneck_noise': (field, '0.5'),
    'weight_init': (field, "'glorot_uniform'"),
    'disable_rgb': (field, 'True'),
  },
}
KNOBS['PropMLP'] = KNOBS['NerfMLP']
PARTS = {'Config': 'config', 'Model': 'model', 'NerfMLP': 'nerf_mlp', 'PropMLP': 'prop_mlp'}
# A small model in which most settings have an effect.
BASE = (
  *tiny.TINY,
  COLOURED,
  'Config.max_steps = 100',
  'Config.train_render_every = 0',
  'Config.grad_max_norm = 0.1',
  'Model.num_levels = 2',
  'NerfMLP.net_depth = 1',
  'PropMLP.net_depth = 1',
)
SHORT = ('Config.max_steps = 12',)


@pytest.fixture(autouse=True)
def loss_of_a_plugin(monkeypatch):
  """Registers a loss for Config.loss_mults."""
  monkeypatch.setitem(plugins.loss, 'knob', lambda inputs: jnp.mean(inputs.renderings[-1].rgb))
  monkeypatch.setitem(plugins.loss.modules, 'knob', 'my_package.my_loss')


def cases():
  return [
    pytest.param(owner, name, id=f'{owner}.{name}') for owner in KNOBS for name in KNOBS[owner]
  ]


_outcomes = {}
ABOUT_FILES = (
  place_of_pixels,
  data,
  incomplete,
  wide,
  tracked,
  which_light,
  training,
  evaluating,
  path,
  video,
  patience,
)
load = functools.cache(lambda bindings: configs.load_config([], bindings))


def outcome(probe, owner, settings, folder=None):
  """Runs a probe; caches results of probes without files by their settings."""
  if probe in ABOUT_FILES:
    return probe(settings, str(folder))
  part = PARTS[owner] if probe is field else ''
  used = (settings,) if probe is not field else dataclasses.astuple(getattr(settings, part))
  case = probe, repr(used)
  if case not in _outcomes:
    _outcomes[case] = probe(settings, part)
  return _outcomes[case]


def differ(a, b) -> bool:
  if jax.tree.structure(a) != jax.tree.structure(b):
    return True
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
  return any(not np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(('owner', 'name'), cases())
def test_setting_has_an_effect(owner, name, tmp_path):
  probe, value, *base = KNOBS[owner][name]
  short = SHORT if probe is training else ()
  settings = load((*BASE, *short, *(b.format(owner) for b in base)))
  changed = {name: ast.literal_eval(value)}
  part = dataclasses.replace(getattr(settings, PARTS[owner]), **changed)
  other = dataclasses.replace(settings, **{PARTS[owner]: part})
  before, after = (outcome(probe, owner, s, tmp_path) for s in (settings, other))
  assert differ(before, after)
  assert not said_to_be_idle(other, f'{owner}.{name}')


def said_to_be_idle(settings, name) -> bool:
  return any(f'{name} = ' in line.split(': no effect')[0] for line in configs.notices(settings))


SWITCHED = {  # Values of switches whose rule is a function.
  'Config.max_steps': 100,
  'Config.render_path_file': 'poses.npy',
  'Config.render_spline_keyframes': NAMES[1:-1],
  'NerfMLP.net_depth_viewdirs': 1,
  'PropMLP.net_depth_viewdirs': 1,
}
IN_VAIN = {'Config.early_exit_steps': '200'}  # Values, where the one in KNOBS would have an effect.
# Probes that see the switches (or setting), where those in KNOBS do not. None: there is none whose
# result is the same to the letter, only in its numbers.
SEEING = {
  'Config.train_render_every': None,
  'Config.randomized': step,
  'Config.data_loss_mult Config.data_coarse_loss_mult': None,
  'Config.depth_loss_mult': None,
  'Config.interlevel_loss_mult Config.loss_mults': None,
  'NerfMLP.encoding PropMLP.encoding': None,
  'Model.num_levels': None,
  'Model.single_mlp': model,
  'Model.opaque_background': None,
  'Model.use_viewdirs': model,
  'NerfMLP.grid_levels': None,
  'PropMLP.grid_levels': None,
}
FOR_OTHER_FOLDERS = ('Config.dtu_light_cond', 'Config.llffhold')


def rules():
  return [
    pytest.param(switches, name, id=f'{" ".join(switches)}-{name}')
    for switches, names in dict((str(rule), rule) for rule in idle_settings.rules()).values()
    for name in names
    if name not in FOR_OTHER_FOLDERS
  ]


@pytest.mark.parametrize(('switches', 'name'), rules())
def test_setting_in_vain_is_said_to_have_no_effect(switches, name, tmp_path):
  name = name.replace('PropMLP.*', 'PropMLP.net_width')
  owner, field_name = name.split('.')
  probe, value, *base = KNOBS[owner][field_name]
  probe = SEEING.get(name, SEEING.get(' '.join(switches), probe))
  short = SHORT if probe is training else ()
  settings = load((*BASE, *short, *(b.format(owner) for b in base)))

  def set_to(settings, knob, value):
    part = PARTS[knob.split('.')[0]]
    changed = dataclasses.replace(getattr(settings, part), **{knob.split('.')[1]: value})
    return dataclasses.replace(settings, **{part: changed})

  for switch, when in switches.items():
    settings = set_to(settings, switch, SWITCHED[switch] if callable(when) else when[0])
  other = set_to(settings, name, ast.literal_eval(IN_VAIN.get(name, value)))
  assert said_to_be_idle(other, name)
  if probe is not None:
    before, after = (outcome(probe, owner, s, tmp_path) for s in (settings, other))
    assert not differ(before, after)


PROBES = {case[0]: case[2:] for knobs in KNOBS.values() for case in knobs.values()}


@pytest.mark.parametrize('probe', PROBES, ids=lambda probe: probe.__name__)
def test_probes_are_deterministic(probe, tmp_path):
  """Otherwise every setting would seem to have an effect."""
  base = *BASE, *SHORT, *(b.format('NerfMLP') for b in PROBES[probe])
  where = 'nerf_mlp' if probe is field else str(tmp_path)
  a, b = (probe(configs.load_config([], base), where) for _ in range(2))
  assert not differ(a, b)


def test_all_settings_are_covered():
  for owner in OWNERS:
    names = {f.name for f in dataclasses.fields(owner)}
    accepted = {n.split('.')[1] for n in configs.ACCEPTED if n.startswith(f'{owner.__name__}.')}
    assert set(KNOBS[owner.__name__]) == names - accepted
    assert accepted <= names


def test_accepted_settings_have_a_notice_and_no_effect(capsys):
  silent = load(BASE)
  assert configs.notices(silent) == []
  bindings = [f'{name} = True' for name in configs.ACCEPTED]
  settings = configs.load_config([], [*BASE, *bindings])
  cli.show_notices(settings)
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == len(configs.ACCEPTED)
  for name, line in zip(('render_path', 'use_gpu_resampling', 'disable_density_normals'), lines):
    assert re.fullmatch(rf'Note: \w+\.{name} = True is accepted without effect: .*\.', line)
  assert model(settings, None) == outcome(model, 'Model', silent)


def test_names_in_rules_exist():
  for switches, names in idle_settings.rules():
    for name in (*switches, *names):
      owner, field_name = name.split('.')
      assert field_name == '*' or field_name in KNOBS[owner]


def test_settings_in_vain_share_a_line_for_each_reason():
  settings = load((*BASE, 'Config.camera_prior = 3.0', 'Config.camera_start = 0.5'))
  assert configs.notices(settings) == [
    'Config.camera_start = 0.5, Config.camera_prior = 3.0: no effect with '
    'Config.refine_cameras = False.'
  ]


def test_exposures_and_appearance_vectors_together_have_a_notice():
  settings = load((*BASE, "Config.exposure = 'gain'", 'Model.num_glo_features = 4'))
  (line,) = configs.notices(settings)
  assert 'use one of them' in line


@pytest.mark.parametrize('path', glob.glob('configs/*.gin', root_dir=configs.installation.DATA))
def test_shipped_configs_set_nothing_in_vain(path):
  assert configs.notices(configs.load_config([path])) == []


def test_normals_do_not_change_training():
  more = load((*BASE, 'Config.vis_normals = True'))
  assert outcome(step, 'Config', load(BASE)) == outcome(step, 'Config', more)


def test_each_mlp_has_its_own_settings():
  shapes = {}
  for bindings in ((), ('NerfMLP.net_width = 24',), ('PropMLP.net_width = 24',)):
    settings = tiny.settings(*bindings)
    params = jax.eval_shape(lambda s=settings: models.init_params(models.build(s), key()))
    shapes[bindings] = {part: models.num_params(params[part]) for part in params}
  plain, nerf, prop = shapes.values()
  assert [plain[p] == nerf[p] for p in ('prop_mlp', 'nerf_mlp')] == [True, False]
  assert [plain[p] == prop[p] for p in ('prop_mlp', 'nerf_mlp')] == [False, True]
