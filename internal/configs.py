"""All settings, as frozen dataclasses filled from gin files. The only module that imports gin.

Setting names match those in published .gin files, so these load unchanged. Functions are given by
name ('reciprocal') or as gin references (`@jnp.reciprocal`). A field's type lists its choices;
config_checks.py has the ranges of numbers, and the combinations that are not allowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, Literal

import gin

from . import bindings as bindings_lib
from . import config_checks, idle_settings, plugins
from .bindings import ConfigError
from .system import files, installation

_RayDistance = Literal['reciprocal', 'log', 'identity', 'piecewise', 'power']
_WeightInit = Literal[
  'he_uniform', 'he_normal', 'kaiming_uniform', 'kaiming_normal', 'glorot_uniform',
  'glorot_normal', 'xavier_uniform', 'xavier_normal', 'lecun_uniform', 'lecun_normal',
]  # fmt: skip


class Checked:
  """Base of the settings, which checks them; config_checks.py has the rules."""

  def __post_init__(self):
    for name, value in vars(self).items():
      if callable(value):  # A gin reference, such as @coord.contract, is kept as its name.
        object.__setattr__(self, name, value.__name__)
      elif isinstance(value, str) and value.startswith('~'):  # Quoted, so the shell left it.
        object.__setattr__(self, name, os.path.expanduser(value))
    problem = config_checks.problem(self, plugins.plugged())
    if problem:
      raise ConfigError(problem)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Config(Checked):
  """Data, training, evaluation and rendering."""

  plugins: Sequence[str] = ()  # Modules that these settings need; --plugins loads and records them.

  # Data.
  dataset_loader: str = 'llff'  # Format of the capture; docs/datasets.md lists them.
  data_dir: str | None = None  # Folder of the capture.
  # Folder of the run: checkpoints, logs and all outputs. May be an address, gs://BUCKET/RUN.
  checkpoint_dir: str | None = None
  factor: int = 0  # Downsampling factor: use images_<factor>/ (0: images/ at full size).
  min_images_fraction: float = 0.5  # Minimum fraction of posed images that must exist (1: all).
  allow_unlikely_cameras: bool = False  # Accept intrinsics that no usual lens has, with a warning.
  llffhold: int = 8  # Every llffhold-th image, by name, is held out as a test image.
  forward_facing: bool = False  # LLFF only: trace rays in NDC and render a spiral path.
  load_alphabetical: bool = True  # LLFF only: order images by name (False: by COLMAP image id).
  dtu_light_cond: int = 3  # DTU only: lighting condition, 0 to 6 (7: all of them).
  near: float = 2.0  # Distance along the ray where sampling starts, in scene units (>= 0).
  far: float = 6.0  # Distance where sampling ends (> near, at most 1e8).
  pixels_on: Literal['auto', 'device', 'host', 'disk'] = 'auto'  # Memory for the training pixels.
  pixel_cache_dir: str | None = None  # For pixels_on = 'disk' (None: .pixels/ in the capture).

  # Training.
  seed: int = 20220618  # Seed of the initial parameters and of all random draws.
  batching: Literal['all_images', 'single_image'] = 'all_images'  # Where a batch's rays come from.
  batch_size: int = 16384  # Rays per step, over all devices of all hosts.
  patch_size: int = 1  # Rays of a batch come in patches of this many pixels squared.
  max_skipped_updates: int = 100  # Stop after this many non-finite updates in a row (0: never).
  micro_batches: int = 0  # Sequential parts of a device's batch (0: as few as fit in memory).
  max_steps: int = 250000  # Length of the training and of its schedules, in steps.
  early_exit_steps: int | None = None  # Stop at this step; schedules still run over max_steps.
  steps_per_dispatch: int = 0  # Most steps given to the device at once (0: about 0.1 s of them).
  checkpoint_every: int = 25000  # Steps between checkpoints.
  checkpoint_keep: int = 2  # Number of checkpoints to keep, newest first (0: all).
  print_every: int = 100  # Steps between log lines.
  train_render_every: int = 5000  # Steps between renderings of test images (0: never).
  train_render_images: int = 1  # Number of test images in each, spread over the test set.
  gc_every: int = 10000  # Steps between Python garbage collections (0: never).
  randomized: bool = True  # Random jitter, noise and backgrounds in training (False: none).
  data_loss_type: Literal['mse', 'charb'] = 'charb'  # Squared error, or Charbonnier.
  charb_padding: float = 0.001  # Charbonnier loss sqrt(r^2 + padding^2): quadratic below this.
  data_loss_mult: float = 1.0  # Multiplier of the last level's data loss.
  data_coarse_loss_mult: float = 0.0  # Multiplier of the proposal levels' data losses (0: none).
  interlevel_loss_mult: float = 1.0  # Multiplier of the interlevel loss (0: none).
  interlevel_loss_type: Literal['bound', 'blur'] = 'bound'  # Eq. 13, or Zip-NeRF's smooth one.
  interlevel_blur: Sequence[float] = (0.03, 0.003)  # 'blur': half-width in s per proposal level.
  interlevel_every: int = 1  # Every n-th ray of a step trains the proposals (1: all).
  distortion_loss_mult: float = 0.01  # Multiplier of the distortion loss, Eq. 15 (0: none).
  # (lambda, scale): the distortion loss is of P(scale t, lambda), the power ladder of metric
  # distance t; Zip-NeRF has (-0.25, 1e4). None: of s.
  distortion_power: Sequence[float] | None = None
  # Multiplier of the mean distance in s from COLMAP's points to the weights of rays that see them
  # (0: none). Points with a large reprojection error count less.
  depth_loss_mult: float = 0.0
  depth_loss_rays: float = 0.1  # Fraction of a step's rays that see such points.
  # Fraction of the pixels whose residuals are taken as normal; the data loss leaves out patches of
  # larger ones, such as people who walk through (0: none are left out). Needs patches.
  robust_quantile: float = 0.0
  # Multiplier of the squared norm for each named part: {'nerf_mlp': 0.1, 'prop_mlp/trunk_0': 1}.
  weight_decay_mults: dict[str, float] = dataclasses.field(default_factory=dict)
  grid_decay_mult: float = 0.0  # Multiplier of the hash tables' mean squares, summed over levels.
  grid_decay_growth: float = 1.0  # Factor on grid_decay_mult from a level to the next finer one.
  # Multiplier of each plugged-in loss by name; those without one are not computed.
  loss_mults: dict[str, float] = dataclasses.field(default_factory=dict)
  lr_init: float = 0.002  # Learning rate at step 0, before warm-up.
  lr_final: float = 0.00002  # Learning rate at max_steps; log-linear in between.
  lr_delay_steps: int = 512  # Steps of warm-up (0: none).
  lr_delay_mult: float = 0.01  # Factor on the learning rate at the start of the warm-up.
  # Fraction of max_steps at the end over which the learning rate also falls linearly to 0 (but not
  # those of cameras and exposures).
  lr_cooldown: float = 0.0
  adam_beta1: float = 0.9  # Adam: decay of the mean of the gradients, per step.
  adam_beta2: float = 0.999  # Adam: decay of the mean of their squares, per step.
  adam_eps: float = 1e-6  # Adam: added to the root of that mean.
  grad_max_norm: float = 0.001  # Clip each MLP's gradient to this norm (0: off).
  grad_max_val: float = 0.0  # Clip each gradient entry to this magnitude (0: off).
  refine_cameras: bool = False  # Also train the training cameras; docs/poses.md.
  camera_start: float = 0.05  # Fraction of the training after which cameras move (0 to 1).
  camera_lr_init: float = 1e-4  # Cameras' learning rate at step 0, in focal lengths per step.
  camera_lr_final: float = 1e-5  # Cameras' learning rate at max_steps; log-linear in between.
  camera_prior: float = 10.0  # Multiplier of the squared changes of the cameras' intrinsics.
  # What is learned of each photograph's exposure: nothing, a gain per channel, or also the matrix
  # in which its camera balances colours and its vignette. New views show the mean.
  exposure: Literal['none', 'gain', 'gain_colour'] = 'none'
  exposure_lr_init: float = 5e-3  # Exposures' learning rate at step 0, in log units per step.
  exposure_lr_final: float = 1e-4  # Exposures' learning rate at max_steps; log-linear in between.

  # Evaluation.
  eval_only_once: bool = True  # False: evaluate new checkpoints as they appear, until max_steps.
  eval_save_output: bool = True  # Write the rendered test images.
  eval_report: bool = True  # Write report.html from the contents of the run's folder.
  eval_render_interval: int = 1  # Evaluate every n-th test image.
  eval_dataset_limit: int | None = None  # Maximum number of test images (None: all).
  eval_quantize_metrics: bool = True  # Round renderings to 8 bits before computing metrics.
  eval_crop_borders: int = 0  # Pixels to ignore at each side of an image in metrics.
  # Refine each test camera on the left half of its picture, and measure the right half.
  eval_refine_cameras: bool = False

  vis_normals: bool = False  # Evaluation and rendering also write normal maps of the density.

  # Rendering.
  render_chunk_size: int = 16384  # Rays per call, over all devices; halved until they fit.
  render_dir: str | None = None  # Output folder (None: <checkpoint_dir>/render).
  render_path: bool = False  # No effect; see ACCEPTED.
  render_path_frames: int = 120  # Number of frames of an ellipse, spiral, orbit or dolly.
  # None: 'spiral' for forward-facing captures, else 'ellipse'.
  render_path_type: Literal['ellipse', 'spiral', 'orbit', 'dolly'] | None = None
  render_path_file: str | None = None  # Poses (.npy), nerfstudio camera path, or COLMAP folder.
  render_path_space: Literal['capture', 'normalized'] = 'capture'  # Coordinates of that file.
  render_video_fps: int = 60  # Frames per second.
  render_video_crf: int = 18  # Compression of the video: 0 (lossless) to 51 (smallest).
  render_resolution: Sequence[int] | None = None  # (width, height) in pixels (None: the capture's).
  render_focal: float | None = None  # Focal length in pixels (None: the capture's or the file's).
  render_orbit_elevation: float | None = None  # In degrees (None: the cameras' own).
  render_orbit_radius: float = 1.0  # In units of the cameras' median distance from the subject.
  render_dolly_keyframe: str | None = None  # Image where a dolly starts (None: the first one).
  render_dolly_distance: float = 0.5  # Fraction of the way to the subject; negative: backwards.
  render_dolly_zoom: bool = False  # Change the focal length so that the subject keeps its size.
  render_camtype: Literal['perspective', 'fisheye', 'panorama'] | None = None  # None: capture's.
  render_spline_keyframes: str | None = None  # Image names, comma-separated, or a file of names.
  render_spline_n_interp: int = 30  # Frames per segment between keyframes.
  render_spline_degree: int = 5  # Polynomial degree of the spline.
  render_spline_smoothness: float = 0.03  # 0: pass exactly through the keyframes.
  render_spline_const_speed: bool = True  # False: equal steps in the spline's parameter.
  render_spline_closed: bool = False  # Return from the last keyframe to the first.
  z_variation: float = 0.0  # Ellipse: height variation, as a fraction of the cameras' range.
  z_phase: float = 0.0  # Ellipse: phase of the height variation, in turns (0: starts highest).
  vis_num_rays: int = 16  # Rays in the histogram plots written during training (0: no plots).

  @property
  def last_step(self) -> int:
    """The step at which training stops."""
    return min(self.max_steps, self.early_exit_steps or self.max_steps)


@dataclasses.dataclass(frozen=True)
class MLP(Checked):
  """Architecture of a field: positions (and directions) in, density (and colour) out."""

  net_depth: int = 8  # Number of hidden layers (trunk).
  net_width: int = 256  # Width of each hidden layer (trunk).
  bottleneck_width: int = 256  # Width of the layer between trunk and view layers (0: none).
  net_depth_viewdirs: int = 1  # Number of view-dependent layers (0: none).
  net_width_viewdirs: int = 128  # Width of each view-dependent layer.
  skip_layer: int = 4  # k: the outputs of layers k + 1, 2k + 1, ... get the encoding appended.
  skip_layer_dir: int = 0  # Likewise for view-dependent layers and their input (0: none).
  encoding: Literal['ipe', 'grid'] = 'ipe'  # Integrated positional encoding, or hash grid.
  # Constructor arguments of the encoding, which override those from the settings below.
  encoding_options: dict[str, object] = dataclasses.field(default_factory=dict, hash=False)
  min_deg_point: int = 0  # 'ipe': the lowest frequency is 2^min_deg_point.
  max_deg_point: int = 12  # 'ipe': the highest frequency is 2^(max_deg_point - 1).
  deg_view: int = 4  # Number of frequencies that encode view directions.
  # 'ipe': solid whose corners, subdivided, are the directions that are encoded.
  basis_shape: Literal['icosahedron', 'octahedron', 'tetrahedron'] = 'icosahedron'
  basis_subdivisions: int = 2  # Tessellation of the basis shape's edges (1: its own vertices).
  # Number of resolution levels of the hash grid. With Model.separate_prop_mlps, this and the other
  # grid_* of PropMLP may be tuples, a value per proposal level.
  grid_levels: int | Sequence[int] = 10
  grid_min_resolution: int | Sequence[int] = 16  # Cells per side of [-2, 2]^3, coarsest level.
  grid_max_resolution: int | Sequence[int] = 8192  # Cells per side, finest level.
  grid_log2_size: int | Sequence[int] = 21  # Maximum number of rows of a level's table, as log2.
  grid_features: int | Sequence[int] = 4  # Features per row of a table.
  grid_init: float | Sequence[float] = 1e-4  # Tables start uniform in [-grid_init, grid_init].
  grid_gain: float | Sequence[float] = 1.0  # Factor on the tables' features.
  # Append 2 w - 1 times a learned scale for each level, where w is its weight for the Gaussian's
  # size: the MLP can tell features near 0 from faded ones.
  grid_fading_features: bool | Sequence[bool] = False
  # Fraction of training over which levels come in, coarse to fine (0: all from the start).
  grid_coarse_to_fine: float | Sequence[float] = 0.0
  # Contraction of space before encoding (None: none).
  warp_fn: Literal['contract', 'donerf', 'inverted_sphere'] | Callable | None = None
  # Density as a function of raw density; the gradient of 'exp' is bounded above exp(15).
  density_activation: Literal['softplus', 'exp'] = 'softplus'
  density_bias: float = -1.0  # Added to raw density before density_activation.
  density_noise: float = 0.0  # Standard deviation of noise on raw density in training.
  rgb_padding: float = 0.001  # Colours are in [-padding, 1 + padding].
  rgb_bias: float = 0.0  # Added to raw colour before the sigmoid, after rgb_premultiplier.
  rgb_premultiplier: float = 1.0  # Factor on raw colour.
  bottleneck_noise: float = 0.0  # Standard deviation of noise on the bottleneck in training.
  weight_init: _WeightInit = 'he_uniform'  # Initializer of the kernels, in jax.nn.initializers.
  disable_rgb: bool = False  # Density only; the rule for proposal MLPs.
  disable_density_normals: bool = False  # No effect; see ACCEPTED.

  def for_level(self, level: int | None) -> MLP:
    """Returns these settings with sequences replaced by their number for a proposal level.

    Args:
      level: the proposal level, or None for an MLP that is not specific to one.

    Raises:
      ConfigError: a sequence has no number for the level.
    """
    own = {}
    for name, values in vars(self).items():
      if not isinstance(values, Sequence) or isinstance(values, str):
        continue
      where = f'{type(self).__name__}.{name}'
      if level is None:
        raise ConfigError(
          f'{where} must be one number, got {values}; only PropMLP may have one per proposal '
          'level, with Model.separate_prop_mlps = True.'
        )
      if level >= len(values):
        raise ConfigError(f'{where} must have a number for each proposal level, got {values}.')
      own[name] = values[level]
    return dataclasses.replace(self, **own) if own else self


@gin.configurable
@dataclasses.dataclass(frozen=True)
class NerfMLP(MLP):
  """Architecture of the last level's MLP."""


@gin.configurable
@dataclasses.dataclass(frozen=True)
class PropMLP(MLP):
  """Architecture of the proposal MLPs (one shared by all levels, or Model.separate_prop_mlps)."""


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Model(Checked):
  """Sampling along the ray and compositing."""

  num_prop_samples: int = 64  # Intervals per ray at each proposal level.
  num_nerf_samples: int = 32  # Intervals per ray at the last level.
  num_levels: int = 3  # Number of levels: proposal levels, then the last one.
  # Function g of Eq. 11: intervals are spaced evenly in g(distance) (None: identity).
  raydist_fn: _RayDistance | Callable | None = None
  # Arguments of raydist_fn. 'power' has {'lam': -1.5, 'scale': 1.0}: P(scale t, lam).
  raydist_options: dict[str, object] = dataclasses.field(default_factory=dict, hash=False)
  ray_shape: Literal['cone', 'cylinder'] = 'cone'  # Shape of a pixel's ray; 'cylinder' for NDC.
  num_multisamples: Literal[0, 6] = 0  # Gaussians per interval: one (0), or Zip-NeRF's six.
  multisample_proposals: bool = True  # False: proposal levels have one Gaussian per interval.
  opaque_background: bool = False  # Make the last interval opaque: each ray ends somewhere.
  anneal_slope: float = 10.0  # Rate at which annealing of the weights (Eq. 18) ends (0: none).
  dilation_multiplier: float = 0.5  # Dilation before resampling, in mean interval widths.
  dilation_bias: float = 0.0025  # Added to that dilation, in s.
  single_jitter: bool = True  # One random offset per ray (False: one per interval).
  stop_level_grad: bool = True  # Block gradients from a level's intervals to the level before.
  # Closer to the camera than this, in world units, gradients of density and colour are scaled by
  # (distance / this)^2, against floaters near cameras (0: off).
  gradient_scaling: float = 0.0
  single_mlp: bool = False  # The NeRF MLP serves all levels; there is no proposal MLP.
  separate_prop_mlps: bool = False  # One PropMLP per proposal level; hash grids need this.
  outside_mlps: bool = False  # NeRF++: separate MLPs for positions outside the unit sphere.
  disable_integration: bool = False  # Zero covariances: encode points, not Gaussians.
  use_viewdirs: bool = True  # Colour depends on the view direction.
  bg_intensity_range: Sequence[float] = (1.0, 1.0)  # (low, high): random grey in training.
  num_glo_features: int = 0  # Size of the per-image appearance vector (0: none).
  # Rows of tables with one per image: appearance vectors, cameras, exposures. At least the
  # training images.
  num_glo_embeddings: int = 1000
  # Fraction of training in which the start of rays moves from near_anneal_init to 0 (None: off).
  near_anneal_rate: float | None = None
  near_anneal_init: float = 0.95  # Start of rays in s, 0 to 1, at the first step.
  resample_padding: float = 0.0  # Added to weights before sampling from them.
  resample_blur: bool = False  # Blur weights by one bin before sampling, as mip-NeRF does.
  use_gpu_resampling: bool = False  # No effect; see ACCEPTED.
  use_gpu_kernels: bool = True  # Use GPU-specific code on GPUs (False: plain XLA).
  mlp_dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # 'auto': bfloat16 except on CPUs.
  deterministic_grid: bool = False  # Bitwise reproducible grid gradients on GPUs; slower.

  def multisampled(self, last: bool) -> bool:
    """Returns whether intervals of the last (or a proposal) level have several Gaussians."""
    return self.num_multisamples > 0 and (last or self.multisample_proposals)


@dataclasses.dataclass(frozen=True)
class Settings:
  """All settings of a run."""

  config: Config
  model: Model
  prop_mlp: PropMLP
  nerf_mlp: NerfMLP
  text: str  # All of them as gin text, which load_config reads back.

  def change(self, part: str, **values) -> Settings:
    """Returns settings with fields of a part ('config', 'model', ...) replaced; the text stays."""
    changed = dataclasses.replace(getattr(self, part), **values)
    return dataclasses.replace(self, **{part: changed})


OWNERS = {owner.__name__: owner for owner in (Config, Model, NerfMLP, PropMLP)}

# Settings of published files that are accepted but have no effect here, and why.
ACCEPTED = {
  'Config.render_path': 'render.py renders the camera path, eval.py the test images',
  'Model.use_gpu_resampling': 'the resampling algorithm is chosen by platform',
  'PropMLP.disable_density_normals': 'normals are computed only if Config.vis_normals is set',
  'NerfMLP.disable_density_normals': 'normals are computed only if Config.vis_normals is set',
}


def _owners(settings: Settings) -> dict[str, Any]:
  parts = (settings.config, settings.model, settings.prop_mlp, settings.nerf_mlp)
  return {type(part).__name__: part for part in parts}


def without_idle(settings: Settings) -> tuple:
  """Returns Config, Model, PropMLP and NerfMLP, with defaults for settings that have no effect."""
  owners = _owners(settings)
  changed = {owner: {} for owner in owners}
  for names in (ACCEPTED, *(names for names, _ in idle_settings.find(owners, ACCEPTED))):
    for name in names:
      owner, field = name.split('.')
      changed[owner][field] = getattr(type(owners[owner])(), field)
  return tuple(dataclasses.replace(part, **changed[name]) for name, part in owners.items())


def notices(settings: Settings) -> list[str]:
  """Returns lines about settings that differ from their defaults but have no effect."""
  config, model = settings.config, settings.model
  owners = _owners(settings)
  result = []
  for name, reason in ACCEPTED.items():
    owner, field = name.split('.')
    value = getattr(owners[owner], field)
    if value != getattr(type(owners[owner]), field):
      result.append(f'{name} = {value!r} is accepted without effect: {reason}.')
  result += idle_settings.lines(owners, ACCEPTED)
  if config.exposure != 'none' and model.num_glo_features:
    result.append(
      f'Config.exposure = {config.exposure!r} and Model.num_glo_features = '
      f'{model.num_glo_features} learn the same changes between photographs: use one of them.'
    )
  return result


def _register(module: str, name: str) -> None:
  """Lets gin files refer to `@module.name`; the settings keep the bare name."""

  def stand_in(*args):
    raise ValueError(f'@{module}.{name} is only a name here; it cannot be called.')

  stand_in.__name__ = stand_in.__qualname__ = name
  gin.external_configurable(stand_in, name=name, module=module)


def _refuse_import(_, statement) -> None:
  """Refuses `import` in gin files, which would run arbitrary code."""
  raise ValueError(f'It imports {statement.module}, but settings run no code: remove that line.')


_reading: list[str] = []  # The gin files that include each other now.


@contextlib.contextmanager
def _open_once(path: str) -> Iterator[IO[str]]:
  """Opens a gin file for gin; refuses one that includes itself, at once."""
  real = os.path.realpath(path)
  if real in _reading:
    raise ConfigError(f'{real}: includes itself. Remove that line.')
  _reading.append(real)
  try:
    with files.open_text(path) as f:
      yield f
  finally:
    _reading.pop()


_mentioned: set[str] = set()  # The macros that values refer to, also values that are overridden.
_new_reference = gin.config.ParserDelegate.macro


def _note_reference(delegate, name: str):
  """Notes that a value refers to a macro, `%name`."""
  _mentioned.add(name)
  return _new_reference(delegate, name)


gin.config.ParserDelegate.macro = _note_reference
gin.config.ParseContext.process_import = _refuse_import
# `include` searches the working folder, then the program's own. gin's other file readers would
# import Python packages to search them.
gin.config._FILE_READERS[:] = [(_open_once, files.is_file)]
gin.add_config_file_search_path(installation.DATA)
for _name in ('reciprocal', 'log'):
  _register('jnp', _name)
for _name in ('contract', 'donerf', 'inverted_sphere'):
  _register('coord', _name)


_OWN = frozenset(gin.config._REGISTRY._selector_map)


def plugged_configurables() -> list[tuple[str, Callable]]:
  """Returns the gin configurables that plug-ins have made, with the names that bindings use."""
  registry = gin.config._REGISTRY._selector_map
  return [(row.name, row.wrapped) for key, row in registry.items() if key not in _OWN]


def _advice(message: str) -> str:
  """Returns a sentence with the known names nearest to the one that gin's message is about."""
  # gin quotes owner and name separately; the whole binding is in the message only sometimes.
  written = re.search(r'([A-Za-z]\w*\.\w+)\s*=', message)
  wrong = written[1] if written else '.'.join(re.findall(r"'([\w.]+)'", message))
  return bindings_lib.nearest(wrong, OWNERS)


def load_config(gin_configs: Sequence[str] = (), gin_bindings: Sequence[str] = ()) -> Settings:
  """Loads gin files, then bindings on top; later ones override earlier ones.

  Args:
    gin_configs: paths of .gin files; 'configs/360.gin' also works outside the program's folder.
    gin_bindings: lines such as 'Config.factor = 4'; text may lack its quotes, as in
      'Config.data_dir=my_scene'.

  Raises:
    ConfigError: a missing file, an unknown name (lists the nearest known ones) or a bad value.
    PluginError: Config.plugins lists a module that is not loaded.
  """
  gin.clear_config()
  _mentioned.clear()
  places = {}  # Of macros.
  try:
    for path in gin_configs:
      if not files.is_file(_found(path)):
        raise ConfigError(f'No such gin file: {path!r}. --gin_configs takes paths to .gin files.')
      with _gin_errors(f'{path}: bad gin config'):
        gin.parse_config_file(_found(path))
      places = {**dict.fromkeys(_macros(), f'{path}: '), **places}
    for text in bindings_lib.readable(gin_bindings, OWNERS, plugins.plugged()):
      with _gin_errors(f'{" ".join(text.split())}: cannot be read'):
        gin.parse_config(text)
    _refuse_scopes()
    _check_macros(places)
    needed = gin.get_bindings('Config', resolve_references=False).get('plugins', ())
    if isinstance(needed, (tuple, list)):  # Otherwise Config refuses it.
      source = ', '.join(gin_configs) or 'Config.plugins'
      gin.bind_parameter('Config.plugins', plugins.require(needed, source))
    with _gin_errors(f'Bad gin config ({", ".join(gin_configs) or "no file"})'):
      gin.finalize()
      settings = Config(), Model(), PropMLP(), NerfMLP()
      if problem := config_checks.conflict_between(*settings[:2]):
        raise ConfigError(problem)
      return Settings(*settings, text=gin.operative_config_str())
  finally:
    gin.clear_config()  # Else a `NerfMLP()` in code would get this file's values.


_SHORT_NAMES = {'paper': '360'}


def config_path(name: str) -> str:
  """Returns the path of a .gin file, or of the shipped config with a name: fast, grid, paper, demo.

  Raises:
    ConfigError: there is none; lists those that are shipped.
  """
  if name.endswith('.gin') and files.is_file(_found(name)):
    return name
  stem = _SHORT_NAMES.get(name, name)
  for path in (f'configs/{stem}.gin', f'configs/360_{stem}.gin'):
    if files.is_file(_found(path)):
      return path
  shipped = glob.glob('*.gin', root_dir=os.path.join(installation.DATA, 'configs'))
  names = sorted(path.removesuffix('.gin') for path in shipped)
  raise ConfigError(
    f'--config {name}: no such config or file. Use fast, grid, paper, {", ".join(names)}, or the '
    'path of a .gin file.'
  )


def _found(path: str) -> str:
  """Returns the path if the file exists, else the path of the shipped file of that name."""
  path = os.path.expanduser(path)
  return path if files.exists(path) else os.path.join(installation.DATA, path)


def _refuse_scopes() -> None:
  """Refuses scoped bindings (`train/Config.factor = 8`), which would silently have no effect."""
  scoped = re.search(r'^(?:[\w.]+/)+(\w+\.\w+) =', gin.config_str(), re.MULTILINE)
  if scoped:
    written = scoped[0].removesuffix(' =')
    raise ConfigError(f'{written}: settings have no scopes. Write {scoped[1]} to set it.')


def _macros() -> dict[str, object]:
  """Returns the values of all macros, `RATE = 0.1`, by name."""
  bound = gin.config._CONFIG.items()
  return {scope: row['value'] for (scope, selector), row in bound if selector == 'gin.macro'}


def _check_macros(places: Mapping[str, str]) -> None:
  """Refuses macros that no value refers to, and values that refer to a macro that is not there.

  Args:
    places: the files of the macros that are in files, by the macro's name.
  """
  macro, macros, used = gin.get_configurable('gin.macro'), _macros(), set(_mentioned)
  for (scope, selector), row in gin.config._CONFIG.items():
    for field, value in row.items():
      for reference in gin.config.iterate_references({field: value}, to=macro):
        name = reference.config_key[0]
        used.add(name)
        if name not in macros:
          where = scope if selector == 'gin.macro' else f'{selector.rsplit(".", 1)[-1]}.{field}'
          raise ConfigError(
            f'{places.get(where, "")}{where} = {value!r}: there is no {name}. Give it a value too, '
            f'such as {name} = 1, or write the value instead of %{name}.'
          )
  for name, value in macros.items():
    if name not in used:
      problem = bindings_lib.unused_macro(name, value, OWNERS)
      raise ConfigError(f'{places.get(name, "")}{problem}')


@contextlib.contextmanager
def _gin_errors(where: str) -> Iterator[None]:
  """Re-raises any error of gin as a one-line ConfigError that starts with `where`."""
  try:
    yield
  except ConfigError as e:
    raise ConfigError(str(e).split('\n')[0]) from None
  except Exception as e:  # gin's parser and Python's tokenizer raise many types.
    message = ' '.join(str(e).split()) or type(e).__name__
    if len(message) > 600:  # A file that includes itself is listed a thousand times.
      message = f'{message[:600]}...'
    raise ConfigError(f'{where}: {message}{_advice(message)}') from None
