"""Checks of settings.

Types and choices come from a field's annotation, more choices from plug-ins, ranges from the tables
here; the functions named _*_conflict check combinations of fields.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

# The lowest and the highest number allowed. A highest of None means that there is no upper limit.
_RANGES = {
  **dict.fromkeys(
    (
      'batch_size', 'max_steps', 'early_exit_steps', 'llffhold', 'render_chunk_size', 'print_every',
      'patch_size', 'checkpoint_every', 'eval_render_interval', 'render_path_frames',
      'render_resolution', 'render_video_fps', 'render_spline_n_interp', 'net_depth', 'net_width',
      'skip_layer', 'net_width_viewdirs', 'num_levels', 'num_glo_embeddings', 'grid_levels',
      'grid_features', 'interlevel_every', 'basis_subdivisions',
    ),
    (1, None),
  ),
  **dict.fromkeys(
    (
      'factor', 'micro_batches', 'checkpoint_keep', 'max_skipped_updates', 'gc_every',
      'train_render_every', 'train_render_images', 'eval_dataset_limit', 'eval_crop_borders',
      'vis_num_rays', 'bottleneck_width', 'net_depth_viewdirs', 'num_glo_features',
      'steps_per_dispatch', 'skip_layer_dir', 'gradient_scaling', 'near', 'far', 'data_loss_mult',
      'data_coarse_loss_mult', 'interlevel_loss_mult', 'distortion_loss_mult', 'depth_loss_mult',
      'weight_decay_mults', 'grid_decay_mult', 'lr_delay_steps', 'lr_delay_mult', 'adam_beta1',
      'adam_beta2', 'grad_max_norm', 'grad_max_val', 'camera_prior', 'render_spline_smoothness',
      'anneal_slope', 'dilation_multiplier', 'dilation_bias', 'near_anneal_init',
      'resample_padding', 'density_noise', 'rgb_padding', 'bottleneck_noise',
    ),
    (0, None),
  ),
  **dict.fromkeys(
    (
      'grid_coarse_to_fine', 'depth_loss_rays', 'lr_cooldown', 'min_images_fraction',
      'robust_quantile', 'camera_start', 'bg_intensity_range',
    ),
    (0, 1),
  ),
  'seed': (0, 2**32 - 1),  # Draws use 32 bits: others would repeat the draws of one of these.
  'dtu_light_cond': (0, 7),
  'num_prop_samples': (2, None),  # The ends of a ray's intervals are extrapolated from two.
  'num_nerf_samples': (2, None),
  # Angles of 2^32 turns have no fraction in float32, and far above that squares overflow.
  'min_deg_point': (-32, 32),
  'max_deg_point': (-32, 32),
  'deg_view': (0, 32),
  'grid_log2_size': (1, 30),  # Rows have numbers of 32 bits.
  'grid_min_resolution': (1, 2**24),  # float32 positions in the cube are no finer.
  'grid_max_resolution': (1, 2**24),
  'render_video_crf': (0, 51),
  'render_spline_degree': (1, 5),
  'render_orbit_elevation': (-89, 89),
}  # fmt: skip
_MAX_FAR = 1e8  # The square of a much larger distance overflows float32.
_POSITIVE = (
  'charb_padding', 'interlevel_blur', 'lr_init', 'lr_final', 'camera_lr_init', 'camera_lr_final',
  'exposure_lr_init', 'exposure_lr_final', 'near_anneal_rate', 'grid_decay_growth', 'grid_init',
  'grid_gain', 'depth_loss_rays', 'adam_eps', 'render_focal', 'render_orbit_radius',
  'rgb_premultiplier',
)  # fmt: skip
_BELOW = {'adam_beta1': 1, 'adam_beta2': 1, 'near_anneal_init': 1, 'render_dolly_distance': 0.99}


def problem(settings: Any, plugged: Mapping[str, Collection[str]]) -> str | None:
  """Returns the error message for the first bad value in a settings dataclass, or None.

  Args:
    settings: the dataclass.
    plugged: names that plug-ins add to a field's choices, for the fields that plug-ins can extend.
  """
  hints = typing.get_type_hints(type(settings))
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    rule = _broken_rule(field, value, hints[field.name], plugged.get(field.name))
    if rule:
      quotes = ''
      if accepts_text(hints[field.name]) and isinstance(value, (int, float)):
        quotes = f" Write '{value}', with quotes, if it is text."
      return f'{type(settings).__name__}.{field.name} must be {rule}, got {value!r}.{quotes}'
  return _CONFLICTS[type(settings).__name__](settings)


def _broken_rule(
  field: dataclasses.Field, value: Any, hint: Any, plugged: Collection[str] | None
) -> str | None:
  """Returns the rule that the value breaks, as what it 'must be', or None."""
  choices = _choices(hint)
  if not _fits(value, hint) and not (choices and value in (plugged or ())):
    choices = (*choices, *(plugged or ())) if choices else ()
    if choices:
      more = " (a plug-in's name needs --plugins MODULE)" if plugged is not None else ''
      return f'one of {", ".join(map(repr, choices))}{more}'
    return describe(field.name, hint, plugged or ())
  if isinstance(value, dict) and plugged is not None and not value.keys() <= set(plugged):
    known = ', '.join(map(repr, plugged)) or 'none is loaded; see --plugins'
    return f'{{name: multiplier}} with names of plugged-in losses ({known})'
  numbers = _numbers(value)
  if not all(math.isfinite(v) for v in numbers if isinstance(v, float)):
    return 'finite'  # gin cannot write other numbers to config.gin.
  if value is None:
    return None
  lacking = field.name in _RANGES and not numbers and not isinstance(value, dict)  # Empty tuple.
  if lacking or not all(_in_limits(field.name, v) for v in numbers):
    return ', '.join(_limits(field.name))
  return None


def _in_limits(name: str, value: float) -> bool:
  """Returns whether a number is one that a setting of this name may have."""
  low, high = _RANGES.get(name, (-math.inf, None))
  high = math.inf if high is None else high
  return (
    low <= value <= high
    and (value > 0 or name not in _POSITIVE)
    and value < _BELOW.get(name, math.inf)
  )


def _limits(name: str) -> list[str]:
  """Returns the limits of a setting's numbers, in words."""
  low, high = _RANGES.get(name, (None, None))
  result = []
  if low is not None:
    result.append(f'at least {low}' if high is None else f'{low} to {high}')
  if name in _POSITIVE:
    result.append('above 0')
  return [*result, f'below {_BELOW[name]}'] if name in _BELOW else result


def accepts_text(hint: Any) -> bool:
  """Returns whether a setting with this annotation takes a string: text or a choice's name."""
  if _is_union(hint):
    return any(map(accepts_text, typing.get_args(hint)))
  return hint is str or any(isinstance(choice, str) for choice in _choices(hint))


_KINDS = {
  int: ('a whole number', 'whole numbers'),
  float: ('a number', 'numbers'),
  bool: ('True or False', 'True or False'),
  str: ('text', 'texts'),
  type(None): ('None', 'None'),
  object: ('any value', 'values'),
}


def describe(name: str, hint: Any, plugged: Collection[str] = ()) -> str:
  """Returns what a setting's value must be, in words: 'a whole number, at least 1'.

  Args:
    name: the setting's name, without its owner.
    hint: its annotation.
    plugged: names that plug-ins add to its choices.
  """
  return ', '.join([' or '.join(dict.fromkeys(_kinds(hint, plugged))), *_limits(name)])


def _kinds(hint: Any, plugged: Collection[str]) -> list[str]:
  """Returns the alternatives of an annotation in words."""
  if _is_union(hint):
    return [kind for h in typing.get_args(hint) for kind in _kinds(h, plugged)]
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Literal:
    return [*map(repr, args), *map(repr, plugged)]
  if origin is Sequence:
    return [f'a tuple of {_KINDS.get(args[0], ("", "values"))[1]}']
  if origin is dict:
    return [f'a dictionary from text to {_KINDS.get(args[1], ("", "values"))[1]}']
  if hint in _KINDS:
    return [_KINDS[hint][0]]
  return [] if hint is Callable else ['a value']  # A function is one of the choices, by reference.


def _choices(hint: Any) -> tuple:
  """Returns the allowed values of a Literal (or of a union with one); () for other types."""
  if typing.get_origin(hint) is Literal:
    return typing.get_args(hint)
  if not _is_union(hint):
    return ()
  choices = tuple(c for h in typing.get_args(hint) for c in _choices(h))
  return (*choices, None) if choices and type(None) in typing.get_args(hint) else choices


def _is_union(hint: Any) -> bool:
  return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _fits(value: Any, hint: Any) -> bool:
  """Returns whether `value` has the annotated type (an int is accepted for a float)."""
  origin = typing.get_origin(hint)
  if origin is Literal:
    return value in typing.get_args(hint)
  if _is_union(hint):
    return any(_fits(value, h) for h in typing.get_args(hint))
  if origin is Sequence:
    (item,) = typing.get_args(hint)
    return isinstance(value, (tuple, list)) and all(_fits(v, item) for v in value)
  if origin is dict:
    key, item = typing.get_args(hint)
    return isinstance(value, dict) and all(
      _fits(k, key) and _fits(v, item) for k, v in value.items()
    )
  if hint in (int, float):
    return isinstance(value, (int, hint)) and not isinstance(value, bool)
  return isinstance(value, hint)


def _numbers(value: Any) -> list[int | float]:
  """Returns the numbers in a value: itself, or its items."""
  items = value.values() if isinstance(value, dict) else value
  items = items if isinstance(value, (dict, tuple, list)) else (value,)
  return [v for v in items if isinstance(v, (int, float)) and not isinstance(v, bool)]


def _config_conflict(config: Any) -> str | None:
  if not config.near < config.far:
    return f'Config.near must be below Config.far, got near {config.near}, far {config.far}.'
  if config.far > _MAX_FAR:
    return (
      f'Config.far must be at most {_MAX_FAR:g}, got {config.far:g}: the square of a larger '
      'distance overflows float32. Use 1e6, which is far enough for any sky.'
    )
  power = config.distortion_power
  if power is not None and not (len(power) == 2 and power[1] > 0):
    return f'Config.distortion_power must be (lambda, scale) with scale > 0, got {power}.'
  if config.render_resolution is not None and len(config.render_resolution) != 2:
    return f'Config.render_resolution must be (width, height), got {config.render_resolution}.'
  if config.interlevel_every > 1 and config.data_coarse_loss_mult > 0:
    return (
      'Config.interlevel_every must be 1 where Config.data_coarse_loss_mult trains proposals, got '
      f'{config.interlevel_every}.'
    )
  return _patch_conflict(config)


def _patch_conflict(config: Any) -> str | None:
  size = config.patch_size
  if config.batch_size % size**2:
    return (
      f'Config.batch_size must be a multiple of the pixels of a patch, {size**2} '
      f'(Config.patch_size {size}), got {config.batch_size}.'
    )
  if size > 1 and config.depth_loss_mult > 0:
    return (
      'Config.depth_loss_mult draws single pixels, which patches do not have: set '
      f'Config.patch_size = 1, got {size}.'
    )
  if config.robust_quantile > 0 and (size < 4 or size % 2):
    return (
      'Config.robust_quantile needs an even Config.patch_size of at least 4, for pixels with '
      f'neighbours, got {size}. Use 8.'
    )
  return None


def _mlp_conflict(mlp: Any) -> str | None:
  owner = type(mlp).__name__
  if mlp.encoding == 'grid' and mlp.warp_fn == 'inverted_sphere':
    return (
      f"{owner}.warp_fn = 'inverted_sphere' has four axes, but {owner}.encoding = 'grid' needs "
      "three; use 'contract'."
    )
  lows, highs = _numbers(mlp.grid_min_resolution), _numbers(mlp.grid_max_resolution)
  pairs = zip(lows * len(highs), highs * len(lows))
  if mlp.encoding == 'grid' and any(low > high for low, high in pairs):
    return (
      f'{owner}.grid_min_resolution must be at most grid_max_resolution, got '
      f'{mlp.grid_min_resolution} and {mlp.grid_max_resolution}.'
    )
  if not mlp.min_deg_point < mlp.max_deg_point:
    return (
      f'{owner}.min_deg_point must be below max_deg_point, got {mlp.min_deg_point} and '
      f'{mlp.max_deg_point}.'
    )
  return None


def _model_conflict(model: Any) -> str | None:
  background = model.bg_intensity_range
  if len(background) != 2 or background[0] > background[1]:
    return f'Model.bg_intensity_range must be (low, high), got {background}.'
  scale = model.raydist_options.get('scale', 1)
  if model.raydist_fn == 'power' and not (_fits(scale, float) and scale > 0):
    return f"Model.raydist_options: 'scale' must be a number, above 0, got {scale!r}."
  if model.single_mlp and model.separate_prop_mlps:
    return 'Model.single_mlp and Model.separate_prop_mlps exclude each other; set one to False.'
  if model.outside_mlps and (model.separate_prop_mlps or model.num_multisamples):
    return 'Model.outside_mlps needs Model.separate_prop_mlps = False and num_multisamples = 0.'
  if model.single_mlp and not model.multisample_proposals:
    return 'Model.multisample_proposals = False needs Model.single_mlp = False.'
  return None


def conflict_between(config: Any, model: Any) -> str | None:
  """Returns the error message for settings of Config and Model that exclude each other, or None."""
  if config.interlevel_every > 1 and not model.stop_level_grad:
    return (
      'Config.interlevel_every must be 1 where Model.stop_level_grad = False trains proposals by '
      f'the last level, got {config.interlevel_every}.'
    )
  return None


_CONFLICTS = {
  'Config': _config_conflict,
  'Model': _model_conflict,
  **dict.fromkeys(('MLP', 'NerfMLP', 'PropMLP'), _mlp_conflict),
}
