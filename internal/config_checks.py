"""What values knobs may have: the checks that every config dataclass makes of its fields."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from typing import Any

from .errors import UserError


class ConfigError(UserError):
  """A config file, binding or value that cannot be used; the message says what to do."""


_CHOICES = {
  'batching': ('all_images', 'single_image'),
  'data_loss_type': ('mse', 'charb'),
  'pixels_on': ('auto', 'device', 'host', 'disk'),
  'ray_shape': ('cone', 'cylinder'),
  'raydist_fn': (None, 'reciprocal', 'log', 'identity', 'piecewise', 'power'),
  'warp_fn': (None, 'contract', 'donerf', 'inverted_sphere'),
  'encoding': ('ipe', 'grid'),
  'basis_shape': ('icosahedron', 'octahedron', 'tetrahedron'),
  'interlevel_loss_type': ('bound', 'blur'),
  'num_multisamples': (0, 6),
  'mlp_dtype': ('auto', 'float32', 'bfloat16'),
  'render_camtype': (None, 'perspective', 'fisheye', 'panorama'),
  'render_path_type': (None, 'ellipse', 'spiral', 'orbit', 'dolly'),
  'render_path_space': ('capture', 'normalized'),
  'weight_init': tuple(
    f'{name}_{law}'
    for name in ('he', 'kaiming', 'glorot', 'xavier', 'lecun')
    for law in ('uniform', 'normal')
  ),
}
# The least and the most (None: any) that whole numbers may be, where they are not None.
_RANGES = {
  **dict.fromkeys(
    (
      'batch_size', 'max_steps', 'early_exit_steps', 'llffhold', 'render_chunk_size', 'print_every',
      'checkpoint_every', 'eval_render_interval', 'render_path_frames', 'render_video_fps',
      'render_spline_n_interp', 'render_spline_degree', 'net_depth', 'net_width', 'skip_layer',
      'net_width_viewdirs', 'num_levels', 'num_prop_samples', 'num_nerf_samples',
      'num_glo_embeddings',
    ),
    (1, None),
  ),
  **dict.fromkeys(
    (
      'factor', 'micro_batches', 'checkpoint_keep', 'max_skipped_updates', 'gc_every',
      'train_render_every', 'train_render_images', 'eval_dataset_limit', 'eval_crop_borders',
      'vis_num_rays', 'bottleneck_width', 'net_depth_viewdirs', 'deg_view', 'num_glo_features',
    ),
    (0, None),
  ),
  'dtu_light_cond': (0, 7),
  'render_video_crf': (0, 51),
}  # fmt: skip
_POSITIVE = ('charb_padding', 'interlevel_blur', 'lr_init', 'lr_final', 'near_anneal_rate')


def fits(value: Any, hint: Any) -> bool:
  """Whether `value` is of the annotated type (an int may stand for a float)."""
  origin = typing.get_origin(hint)
  if origin in (typing.Union, types.UnionType):
    return any(fits(value, h) for h in typing.get_args(hint))
  if origin is Sequence:
    (each,) = typing.get_args(hint)
    return isinstance(value, (tuple, list)) and all(fits(v, each) for v in value)
  if origin is dict:
    key, of_key = typing.get_args(hint)
    return isinstance(value, dict) and all(
      fits(k, key) and fits(v, of_key) for k, v in value.items()
    )
  if hint is float:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if hint is int:
    return isinstance(value, int) and not isinstance(value, bool)
  return hint is Any or isinstance(value, hint)


def _finite(value: Any) -> bool:
  """Whether there is no infinity and no NaN in a value: gin could not write it to config.gin."""
  if isinstance(value, dict):
    return all(map(_finite, value.values()))
  if isinstance(value, (tuple, list)):
    return all(map(_finite, value))
  return not isinstance(value, float) or math.isfinite(value)


class Checked:
  """Checks each field's type and choices, and turns functions into their names."""

  def __post_init__(self):
    hints = typing.get_type_hints(type(self))
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      where = f'{type(self).__name__}.{field.name}'
      if callable(value) and not dataclasses.is_dataclass(value):
        value = value.__name__
        object.__setattr__(self, field.name, value)
      if field.name in _CHOICES:
        if value not in _CHOICES[field.name]:
          known = ', '.join(map(repr, _CHOICES[field.name]))
          raise ConfigError(f'{where} must be one of {known}, got {value!r}.')
      elif not fits(value, hints[field.name]):
        raise ConfigError(f'{where} must be {field.type}, got {value!r}.')
      if not _finite(value):
        raise ConfigError(f'{where} must be finite, got {value!r}.')
      low, high = _RANGES.get(field.name, (None, None))
      if value is not None and low is not None and not low <= value <= (high or math.inf):
        rule = f'at least {low}' if high is None else f'{low} to {high}'
        raise ConfigError(f'{where} must be {rule}, got {value}.')
      numbers = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
      if field.name in _POSITIVE and not all(v > 0 for v in numbers):
        raise ConfigError(f'{where} must be positive, got {value}.')
