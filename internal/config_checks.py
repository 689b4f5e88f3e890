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

# (lowest, highest) allowed integer; a highest of None is no limit.
_RANGES = {
  **dict.fromkeys(
    (
      'batch_size', 'max_steps', 'early_exit_steps', 'llffhold', 'render_chunk_size', 'print_every',
      'patch_size', 'checkpoint_every', 'eval_render_interval', 'render_path_frames',
      'render_video_fps', 'render_spline_n_interp', 'render_spline_degree', 'net_depth',
      'net_width', 'skip_layer', 'net_width_viewdirs', 'num_levels', 'num_prop_samples',
      'num_nerf_samples', 'num_glo_embeddings', 'grid_levels', 'grid_min_resolution',
      'grid_max_resolution', 'grid_log2_size', 'grid_features', 'interlevel_every',
    ),
    (1, None),
  ),
  **dict.fromkeys(
    (
      'factor', 'micro_batches', 'checkpoint_keep', 'max_skipped_updates', 'gc_every',
      'train_render_every', 'train_render_images', 'eval_dataset_limit', 'eval_crop_borders',
      'vis_num_rays', 'bottleneck_width', 'net_depth_viewdirs', 'deg_view', 'num_glo_features',
      'steps_per_dispatch', 'skip_layer_dir', 'gradient_scaling',
    ),
    (0, None),
  ),
  'dtu_light_cond': (0, 7),
  'grid_coarse_to_fine': (0, 1),
  'depth_loss_rays': (0, 1),
  'lr_cooldown': (0, 1),
  'min_images_fraction': (0, 1),
  'robust_quantile': (0, 1),
  'camera_start': (0, 1),
  'camera_prior': (0, None),
  'render_video_crf': (0, 51),
}  # fmt: skip
_MAX_FAR = 1e8  # The square of a much larger distance overflows float32.
_POSITIVE = (
  'charb_padding', 'interlevel_blur', 'lr_init', 'lr_final', 'camera_lr_init', 'camera_lr_final',
  'exposure_lr_init', 'exposure_lr_final', 'near_anneal_rate', 'grid_decay_growth', 'grid_init',
  'grid_gain', 'depth_loss_rays',
)  # fmt: skip


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
    return f'one of {", ".join(map(repr, choices))}' if choices else field.type
  if isinstance(value, dict) and plugged is not None and not value.keys() <= set(plugged):
    known = ', '.join(map(repr, plugged)) or 'none is loaded; see --plugins'
    return f'{{name: multiplier}} with names of plugged-in losses ({known})'
  numbers = _numbers(value)
  if not all(math.isfinite(v) for v in numbers if isinstance(v, float)):
    return 'finite'  # gin cannot write other numbers to config.gin.
  if value is None:
    return None
  low, high = _RANGES.get(field.name, (-math.inf, None))
  if field.name in _RANGES and not (numbers and all(low <= v <= (high or v) for v in numbers)):
    return f'at least {low}' if high is None else f'{low} to {high}'
  if field.name in _POSITIVE and not all(v > 0 for v in numbers):
    return 'positive'
  return None


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
  text = ' or '.join(dict.fromkeys(_kinds(hint, plugged)))
  low, high = _RANGES.get(name, (None, None))
  if low is not None:
    text += f', at least {low}' if high is None else f', {low} to {high}'
  return f'{text}, above 0' if name in _POSITIVE else text


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
  if not 0 <= config.near < config.far:
    return f'Config.near must be in [0, far), got near {config.near}, far {config.far}.'
  if config.far > _MAX_FAR:
    return (
      f'Config.far must be at most {_MAX_FAR:g}, got {config.far:g}: the square of a larger '
      'distance overflows float32. Use 1e6, which is far enough for any sky.'
    )
  power = config.distortion_power
  if power is not None and not (len(power) == 2 and power[1] > 0):
    return f'Config.distortion_power must be (lambda, scale) with scale > 0, got {power}.'
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
