"""Which settings make the method of a run, and which of them differ between two runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .. import configs

# Fields of Config in which runs of one method may differ: paths, logging and rendering. What
# evaluation does is described by the protocol of its results, and early_exit_steps by their step.
_OTHERS = (
  'data_dir', 'checkpoint_dir', 'factor', 'pixels_on', 'pixel_cache_dir', 'micro_batches',
  'early_exit_steps', 'plugins', 'min_images_fraction', 'allow_unlikely_cameras',
)  # fmt: skip
_PREFIXES_OF_OTHERS = (
  'eval_', 'render_', 'train_render_', 'z_', 'vis_', 'print_', 'checkpoint_', 'gc_',
)  # fmt: skip


def _values(settings: configs.Settings) -> dict[str, tuple[Any, Any]]:
  """Returns value and default of each setting of the method, by its full name."""
  defaults = configs.Config(), configs.Model(), configs.PropMLP(), configs.NerfMLP()
  parts = settings.config, settings.model, settings.prop_mlp, settings.nerf_mlp
  found = {}
  for part, default in zip(parts, defaults):
    for name in (field.name for field in dataclasses.fields(part)):
      full = f'{type(part).__name__}.{name}'
      other = name.startswith(_PREFIXES_OF_OTHERS) and part is settings.config
      if not (other or name in _OTHERS or full in configs.ACCEPTED):
        found[full] = getattr(part, name), getattr(default, name)
  return found


def _plain(value: Any) -> Any:
  """Normalises a setting for comparison as JSON: tuples become lists, integers floats."""
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  if isinstance(value, Mapping):
    return {key: _plain(v) for key, v in value.items()}
  return float(value) if type(value) is int else value


def chosen(settings: configs.Settings) -> dict[str, Any]:
  """Returns the settings of the method that differ from the default, as for JSON, by full name."""
  plain = {name: (_plain(a), _plain(b)) for name, (a, b) in _values(settings).items()}
  return {name: value for name, (value, default) in plain.items() if value != default}


def changes(before: configs.Settings, after: configs.Settings) -> dict[str, str]:
  """Returns each setting of the method that differs, as 'from OLD to NEW' by full name."""
  old, new = _values(before), _values(after)
  return {
    name: f'from {old[name][0]!r} to {value!r}'
    for name, (value, _) in new.items()
    if _plain(value) != _plain(old[name][0])
  }
