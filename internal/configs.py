"""Every knob, on frozen dataclasses that gin fills: the only file that imports gin.

The names are those that .gin files of the field already use, so published files load unchanged.
Functions are given by name ('reciprocal') or in gin's way (`@jnp.reciprocal`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence

import gin

from .config_checks import Checked, ConfigError, fits
from .system import installation

_FARTHEST = 1e8


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Config(Checked):
  """Data, training, evaluation and rendering."""

  # Data.
  dataset_loader: str = 'llff'  # The capture's format; datasets.load_dataset has the table.
  data_dir: str | None = None
  checkpoint_dir: str | None = None  # Everything that a run makes lands here.
  factor: int = 0  # Use images_<factor>/ (0: images/ as they are).
  llffhold: int = 8  # Every llffhold-th image by name is a test image.
  forward_facing: bool = False  # LLFF: NDC rays and a spiral path.
  load_alphabetical: bool = True  # Sort images by name, not by COLMAP's ids.
  dtu_light_cond: int = 3  # DTU: which of the lights 0 to 6; 7: all of them.
  near: float = 2.0
  far: float = 6.0
  pixels_on: str = 'auto'  # Where training pixels live: 'device', 'host', 'disk', or what fits.
  pixel_cache_dir: str | None = None  # Of those on disk; .pixels/ in the capture if not set.

  # Training.
  seed: int = 20220618
  batching: str = 'all_images'
  batch_size: int = 16384  # Rays a step over all devices of all hosts.
  max_skipped_updates: int = 100  # Of a part in a row, as loss or gradient are not finite (0: any).
  micro_batches: int = 0  # Parts in which a device takes its rays (0: as few as its memory needs).
  max_steps: int = 250000
  early_exit_steps: int | None = None  # Stop here; the schedules still run over max_steps.
  checkpoint_every: int = 25000
  checkpoint_keep: int = 2  # The newest so many stay (0: all).
  print_every: int = 100
  train_render_every: int = 5000  # Render test images while training (0: never).
  train_render_images: int = 1  # How many, spread over the test set.
  gc_every: int = 10000  # Look for Python's garbage (0: never).
  randomized: bool = True
  data_loss_type: str = 'charb'
  charb_padding: float = 0.001
  data_loss_mult: float = 1.0
  data_coarse_loss_mult: float = 0.0
  interlevel_loss_mult: float = 1.0
  interlevel_loss_type: str = 'bound'  # The paper's, or 'blur' (Zip-NeRF's, smooth along the ray).
  interlevel_blur: Sequence[float] = (0.03, 0.003)  # Half-width in s for each proposal level.
  distortion_loss_mult: float = 0.01
  weight_decay_mults: dict[str, float] = dataclasses.field(default_factory=dict)
  grid_decay_mult: float = 0.0  # Of the mean squares of the grids' tables, summed over levels.
  lr_init: float = 0.002
  lr_final: float = 0.00002
  lr_delay_steps: int = 512
  lr_delay_mult: float = 0.01
  adam_beta1: float = 0.9
  adam_beta2: float = 0.999
  adam_eps: float = 1e-6
  grad_max_norm: float = 0.001  # Of each MLP's own gradient; 0: off.
  grad_max_val: float = 0.0  # Of each gradient entry; 0: off.

  # Evaluation.
  eval_only_once: bool = True  # False: wait for further checkpoints until max_steps.
  eval_save_output: bool = True
  eval_report: bool = True  # report.html, of what is in the run's folder then.
  eval_render_interval: int = 1  # Every so many-th test image.
  eval_dataset_limit: int | None = None  # At most so many test images.
  eval_quantize_metrics: bool = True
  eval_crop_borders: int = 0

  vis_normals: bool = False  # eval.py and render.py picture the normals of the density, too.

  # Rendering.
  render_chunk_size: int = 16384  # Rays at once over all devices; halved until they fit in memory.
  render_dir: str | None = None  # None: <checkpoint_dir>/render.
  render_path: bool = False  # Without effect: see ACCEPTED.
  render_path_frames: int = 120
  render_path_type: str | None = None  # None: 'ellipse', or 'spiral' where forward_facing.
  render_path_file: str | None = None  # .npy of poses, nerfstudio's camera path, COLMAP's folder.
  render_path_space: str = 'capture'  # The world of the file's poses: the capture's, 'normalized'.
  render_video_fps: int = 60
  render_video_crf: int = 18
  render_resolution: Sequence[int] | None = None  # (width, height)
  render_focal: float | None = None  # Pixels.
  render_orbit_elevation: float | None = None  # Degrees; None: as the cameras have.
  render_orbit_radius: float = 1.0  # Of the cameras' median distance from what they look at.
  render_dolly_keyframe: str | None = None  # The photo that it starts from; None: the first one.
  render_dolly_distance: float = 0.5  # Of the way to what the cameras look at; negative: away.
  render_dolly_zoom: bool = False  # The focal length keeps what they look at at one size.
  render_camtype: str | None = None
  render_spline_keyframes: str | None = None  # Comma-separated image names.
  render_spline_n_interp: int = 30
  render_spline_degree: int = 5
  render_spline_smoothness: float = 0.03
  render_spline_const_speed: bool = True  # False: equal steps of the spline's parameter.
  render_spline_closed: bool = False  # On from the last key photo to the first.
  z_variation: float = 0.0
  z_phase: float = 0.0
  vis_num_rays: int = 16

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.near < self.far:
      raise ConfigError(f'Config.near must be in [0, far), got near {self.near}, far {self.far}.')
    if self.far > _FARTHEST:
      raise ConfigError(
        f'Config.far must be at most {_FARTHEST:g}, got {self.far:g}: squares of that '
        'overflow float32. 1e6 is far enough for any sky.'
      )

  @property
  def last_step(self) -> int:
    """The step at which training stops."""
    return min(self.max_steps, self.early_exit_steps or self.max_steps)


@dataclasses.dataclass(frozen=True)
class MLP(Checked):
  """One field: positions (and directions) in, density (and colour) out."""

  net_depth: int = 8
  net_width: int = 256
  bottleneck_width: int = 256
  net_depth_viewdirs: int = 1
  net_width_viewdirs: int = 128
  skip_layer: int = 4  # The encoding joins again after layers 5, 9, ...
  encoding: str = 'ipe'  # Integrated positional encoding, or 'grid': a hash grid.
  min_deg_point: int = 0
  max_deg_point: int = 12
  deg_view: int = 4
  basis_shape: str = 'icosahedron'
  basis_subdivisions: int = 2
  grid_levels: int | Sequence[int] = 10  # (5, 6): for each of Model.separate_prop_mlps its own.
  grid_min_resolution: int | Sequence[int] = 16  # Cells along a side of [-2, 2]^3.
  grid_max_resolution: int | Sequence[int] = 8192
  grid_log2_size: int | Sequence[int] = 21  # Rows of a table, at most.
  grid_features: int | Sequence[int] = 4  # Numbers a row.
  warp_fn: str | Callable | None = None
  density_bias: float = -1.0
  density_noise: float = 0.0
  rgb_padding: float = 0.001
  rgb_bias: float = 0.0
  rgb_premultiplier: float = 1.0
  bottleneck_noise: float = 0.0
  weight_init: str = 'he_uniform'
  disable_rgb: bool = False
  disable_density_normals: bool = False  # Without effect: see ACCEPTED.

  def __post_init__(self):
    super().__post_init__()
    if self.encoding == 'grid' and self.warp_fn == 'inverted_sphere':
      raise ConfigError(
        f"{type(self).__name__}.warp_fn = 'inverted_sphere' has four axes, which grids have not; "
        "use 'contract'."
      )
    if not self.min_deg_point < self.max_deg_point:
      where = f'{type(self).__name__}.min_deg_point'
      raise ConfigError(
        f'{where} must be below max_deg_point, got {self.min_deg_point} and {self.max_deg_point}.'
      )
    for name in _GRID:
      values = getattr(self, name)
      values = values if isinstance(values, Sequence) else (values,)
      if not values or not all(fits(v, int) and v >= 1 for v in values):
        where = f'{type(self).__name__}.{name}'
        raise ConfigError(f'{where} must be at least 1, or several such, got {values}.')

  def for_level(self, level: int | None) -> MLP:
    """These settings with the numbers of one proposal level, or with None of all of them.

    Raises:
      ConfigError: a sequence without a number for the level.
    """
    own = {}
    for name in _GRID:
      values = getattr(self, name)
      if isinstance(values, Sequence):
        where = f'{type(self).__name__}.{name}'
        if level is None:
          raise ConfigError(
            f'{where} must be one number, got {values}; only PropMLP may have several, with '
            'Model.separate_prop_mlps = True.'
          )
        if level >= len(values):
          raise ConfigError(f'{where} must have a number for each proposal level, got {values}.')
        own[name] = values[level]
    return dataclasses.replace(self, **own) if own else self


_GRID = ('grid_levels', 'grid_min_resolution', 'grid_max_resolution', 'grid_log2_size',
         'grid_features')  # fmt: skip


@gin.configurable
@dataclasses.dataclass(frozen=True)
class NerfMLP(MLP):
  """The last level's MLP."""


@gin.configurable
@dataclasses.dataclass(frozen=True)
class PropMLP(MLP):
  """The proposal levels' MLP (one set of weights for all, but see Model.separate_prop_mlps)."""


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Model(Checked):
  """Sampling along the ray and compositing."""

  num_prop_samples: int = 64
  num_nerf_samples: int = 32
  num_levels: int = 3  # The proposal levels and the last one.
  raydist_fn: str | Callable | None = None  # g of Eq. 11; None: identity.
  ray_shape: str = 'cone'
  num_multisamples: int = 0  # 0: one Gaussian a frustum; 6: Zip-NeRF's pattern of small ones.
  multisample_proposals: bool = True  # The proposal levels' frusta too, not the last level's alone.
  opaque_background: bool = False
  anneal_slope: float = 10.0
  dilation_multiplier: float = 0.5
  dilation_bias: float = 0.0025
  single_jitter: bool = True
  stop_level_grad: bool = True
  single_mlp: bool = False
  separate_prop_mlps: bool = False  # A PropMLP for each proposal level: grids need it.
  outside_mlps: bool = False  # NeRF++: for what is outside the unit sphere MLPs of its own.
  disable_integration: bool = False  # Covariances are zero: points, not Gaussians.
  use_viewdirs: bool = True
  bg_intensity_range: Sequence[float] = (1.0, 1.0)
  num_glo_features: int = 0
  num_glo_embeddings: int = 1000
  near_anneal_rate: float | None = None
  near_anneal_init: float = 0.95
  resample_padding: float = 0.0  # Added to weights before sampling from them.
  resample_blur: bool = False  # Widens them by a bin first, as mip-NeRF does.
  use_gpu_resampling: bool = False  # Without effect: see ACCEPTED.
  use_gpu_kernels: bool = True  # On GPUs, what is written for them; False: plain XLA.
  mlp_dtype: str = 'auto'  # Of hidden layers; 'auto': bfloat16, but float32 on CPUs.
  deterministic_grid: bool = False  # Grids' gradients repeat to the bit on GPUs too; slower.

  def __post_init__(self):
    super().__post_init__()
    if len(self.bg_intensity_range) != 2 or self.bg_intensity_range[0] > self.bg_intensity_range[1]:
      raise ConfigError(
        f'Model.bg_intensity_range must be (low, high), got {self.bg_intensity_range}.'
      )
    if self.single_mlp and self.separate_prop_mlps:
      raise ConfigError('Model.single_mlp and Model.separate_prop_mlps exclude each other.')
    if self.outside_mlps and (self.separate_prop_mlps or self.num_multisamples):
      raise ConfigError(
        'Model.outside_mlps needs Model.separate_prop_mlps = False and num_multisamples = 0.'
      )
    if self.single_mlp and not self.multisample_proposals:
      raise ConfigError('Model.multisample_proposals = False needs Model.single_mlp = False.')

  def multisampled(self, last: bool) -> bool:
    """Whether the frusta of the last level, or of a proposal level, are several Gaussians each."""
    return self.num_multisamples > 0 and (last or self.multisample_proposals)


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that one run was told."""

  config: Config
  model: Model
  prop_mlp: PropMLP
  nerf_mlp: NerfMLP
  text: str  # The whole, as gin text that load_config reads back.


# What files and command lines of the field may set although it has nothing to do here, and why.
ACCEPTED = {
  'Config.render_path': 'render.py renders the camera path, eval.py the test images',
  'Model.use_gpu_resampling': 'the way of resampling is chosen by platform',
  'PropMLP.disable_density_normals': 'normals are computed only where Config.vis_normals says so',
  'NerfMLP.disable_density_normals': 'normals are computed only where Config.vis_normals says so',
}


def notices(settings: Settings) -> list[str]:
  """A line for each setting that differs from its default and is without effect (ACCEPTED)."""
  owners = (settings.config, settings.model, settings.prop_mlp, settings.nerf_mlp)
  result = []
  for owner in owners:
    for field in dataclasses.fields(owner):
      name, value = f'{type(owner).__name__}.{field.name}', getattr(owner, field.name)
      if name in ACCEPTED and value != field.default:
        result.append(f'{name} = {value!r} is accepted without effect: {ACCEPTED[name]}.')
  return result


def _register(module: str, name: str) -> None:
  """Lets gin text say `@module.name`; the dataclasses keep the bare name."""

  def stand_in(*args):
    raise ValueError(f'@{module}.{name} is a name to be looked up, not a function to call.')

  stand_in.__name__ = stand_in.__qualname__ = name
  gin.external_configurable(stand_in, name=name, module=module)


def _refuse_import(_, statement) -> None:
  """gin would run any module and call any function, for a file that says what to train."""
  raise ValueError(f'It imports {statement.module}, but settings run no code: remove that line.')


gin.config.ParseContext.process_import = _refuse_import
# `include` looks for files, beside the working folder in the program's own; gin would also import
# Python packages to look inside them.
gin.config._FILE_READERS[:] = [(open, os.path.isfile)]
gin.add_config_file_search_path(installation.DATA)
for _name in ('reciprocal', 'log'):
  _register('jnp', _name)
for _name in ('contract', 'donerf', 'inverted_sphere'):
  _register('coord', _name)


def _advice(message: str) -> str:
  """The nearest known names to the one that gin complains about."""
  owners = (Config, Model, NerfMLP, PropMLP)
  known = [f'{c.__name__}.{f.name}' for c in owners for f in dataclasses.fields(c)]
  # Gin quotes only half of a wrong name; the binding itself stands in the message, or not.
  written = re.search(r'([A-Za-z]\w*\.\w+)\s*=', message)
  quoted = re.findall(r"'([\w.]+)'", message)
  wrong = written[1] if written else '.'.join(quoted)
  tail = wrong.rsplit('.', 1)[-1]
  near = [k for k in known if k.endswith(f'.{tail}')]  # Right name, wrong owner.
  near += difflib.get_close_matches(wrong, known, 3, 0.75)
  if not near:
    return ' internal/configs.py lists every known name.'
  return f' Nearest known: {", ".join(dict.fromkeys(near))}.'


def load_config(gin_configs: Sequence[str] = (), gin_bindings: Sequence[str] = ()) -> Settings:
  """Reads gin files, then bindings (`'Config.factor = 4'`), later ones winning.

  Raises:
    ConfigError: no such file, an unknown name (the nearest known ones are listed), a bad value.
  """
  gin.clear_config()
  try:
    for path in gin_configs:
      if not os.path.isfile(_found(path)):
        raise ConfigError(f'No such gin file: {path!r}. --gin_configs takes paths to .gin files.')
      with _gin_errors(f'{path}: bad gin config'):
        gin.parse_config_file(_found(path))
    with _gin_errors('Bad gin config'):
      gin.parse_config(list(gin_bindings))
    _refuse_scopes()
    with _gin_errors(f'Bad gin config ({", ".join(gin_configs) or "no file"})'):
      gin.finalize()
      settings = Config(), Model(), PropMLP(), NerfMLP()
      return Settings(*settings, text=gin.operative_config_str())
  finally:
    gin.clear_config()  # Else a `NerfMLP()` made by hand would have this file's values.


def _found(path: str) -> str:
  """The file of that name, or else the program's own: 'configs/360.gin' works in any folder."""
  return path if os.path.exists(path) else os.path.join(installation.DATA, path)


def _refuse_scopes() -> None:
  """Such as `train/Config.factor = 8`, which gin would keep for a scope that nobody enters."""
  scoped = re.search(r'^(?:[\w.]+/)+(\w+\.\w+) =', gin.config_str(), re.MULTILINE)
  if scoped:
    written = scoped[0].removesuffix(' =')
    raise ConfigError(f'{written}: settings have no scopes. Write {scoped[1]} to set it.')


@contextlib.contextmanager
def _gin_errors(where: str) -> Iterator[None]:
  """Whatever gin raises on text that it cannot use, as one line that opens with `where`."""
  try:
    yield
  except ConfigError as e:
    raise ConfigError(str(e).split('\n')[0]) from None
  except Exception as e:  # Its parser and Python's tokenizer raise nearly anything.
    message = ' '.join(str(e).split()) or type(e).__name__
    if len(message) > 600:  # A file that includes itself is named a thousand times.
      message = f'{message[:600]}...'
    raise ConfigError(f'{where}: {message}{_advice(message)}') from None
