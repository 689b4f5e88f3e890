"""Settings that work only where another setting has some value, and who sets them in vain.

Without a word, an experiment with a setting that has no effect would seem to show that it does not
matter.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Values of a switch, or a function of its value and that of the setting that depends on it.
_When = tuple | Callable[[Any, Any], bool]


def _given(switch: Any, _) -> bool:
  return bool(switch)


def _reached(switch: float, own: float) -> bool:
  return own >= switch


_OWN_SPLIT = ('blender', 'multicam', 'tat_nerfpp')  # The capture says which images are for tests.
_OTHERS = ('tat_fvs', 'transforms')
_ORBIT = 'Config.render_orbit_elevation Config.render_orbit_radius'
_DOLLY = 'Config.render_dolly_keyframe Config.render_dolly_distance Config.render_dolly_zoom'
_ELLIPSE = 'Config.z_variation Config.z_phase'
_SPLINE = (
  'Config.render_spline_n_interp Config.render_spline_degree Config.render_spline_smoothness '
  'Config.render_spline_const_speed Config.render_spline_closed'
)
_GENERATED = f'Config.render_path_type Config.render_path_frames {_ORBIT} {_DOLLY} {_ELLIPSE}'
_COLOUR = (
  'MLP.bottleneck_width MLP.bottleneck_noise MLP.net_depth_viewdirs MLP.net_width_viewdirs '
  'MLP.skip_layer_dir MLP.deg_view MLP.rgb_padding MLP.rgb_bias MLP.rgb_premultiplier'
)

# Where all switches of a row have these values, its settings have no effect. A row names built-in
# choices only: what a plug-in makes of settings is not known. MLP stands for NerfMLP and PropMLP,
# PropMLP.* for all settings of PropMLP.
RULES: tuple[tuple[dict[str, _When], str], ...] = (
  # Data.
  ({'Config.dataset_loader': (*_OTHERS, *_OWN_SPLIT, 'dtu')}, 'Config.load_alphabetical'),
  ({'Config.dataset_loader': (*_OTHERS, *_OWN_SPLIT, 'llff')}, 'Config.dtu_light_cond'),
  ({'Config.dataset_loader': _OWN_SPLIT}, 'Config.llffhold'),
  ({'Config.pixels_on': ('device', 'host')}, 'Config.pixel_cache_dir'),
  # Training.
  ({'Config.max_steps': _reached}, 'Config.early_exit_steps'),
  ({'Config.train_render_every': (0,)}, 'Config.train_render_images Config.vis_num_rays'),
  ({'Config.train_render_images': (0,)}, 'Config.train_render_every Config.vis_num_rays'),
  ({'Config.randomized': (False,)}, 'Model.single_jitter MLP.density_noise MLP.bottleneck_noise'),
  ({'Config.data_loss_type': ('mse',)}, 'Config.charb_padding'),
  (
    {'Config.data_loss_mult': (0,), 'Config.data_coarse_loss_mult': (0,)},
    'Config.data_loss_type Config.charb_padding',
  ),
  (
    {'Config.interlevel_loss_mult': (0,)},
    'Config.interlevel_loss_type Config.interlevel_blur',
  ),
  ({'Config.interlevel_loss_type': ('bound',)}, 'Config.interlevel_blur'),
  ({'Config.interlevel_loss_mult': (0,), 'Config.loss_mults': ({},)}, 'Config.interlevel_every'),
  ({'Config.distortion_loss_mult': (0,)}, 'Config.distortion_power'),
  ({'Config.depth_loss_mult': (0,)}, 'Config.depth_loss_rays'),
  (
    {'NerfMLP.encoding': ('ipe',), 'PropMLP.encoding': ('ipe',)},
    'Config.grid_decay_mult Config.grid_decay_growth Model.deterministic_grid',
  ),
  ({'Config.grid_decay_mult': (0,)}, 'Config.grid_decay_growth'),
  ({'Config.lr_delay_steps': (0,)}, 'Config.lr_delay_mult'),
  ({'Config.lr_delay_mult': (1,)}, 'Config.lr_delay_steps'),
  (
    {'Config.refine_cameras': (False,)},
    'Config.camera_start Config.camera_lr_init Config.camera_lr_final Config.camera_prior',
  ),
  ({'Config.exposure': ('none',)}, 'Config.exposure_lr_init Config.exposure_lr_final'),
  (
    {
      'Model.num_glo_features': (0,),
      'Config.refine_cameras': (False,),
      'Config.exposure': ('none',),
    },
    'Model.num_glo_embeddings',
  ),
  # Rendering.
  ({'Config.render_path_file': (None,)}, 'Config.render_path_space'),
  (
    {'Config.render_path_file': _given},
    f'Config.render_spline_keyframes {_SPLINE} {_GENERATED}',
  ),
  ({'Config.render_spline_keyframes': (None,)}, _SPLINE),
  ({'Config.render_spline_keyframes': _given}, _GENERATED),
  ({'Config.render_path_type': (None, 'ellipse', 'spiral', 'dolly')}, _ORBIT),
  ({'Config.render_path_type': (None, 'ellipse', 'spiral', 'orbit')}, _DOLLY),
  ({'Config.render_path_type': ('spiral', 'orbit', 'dolly')}, _ELLIPSE),
  ({'Config.render_path_type': (None,), 'Config.forward_facing': (True,)}, _ELLIPSE),
  ({'Config.z_variation': (0,)}, 'Config.z_phase'),
  ({'Config.render_camtype': ('panorama',)}, 'Config.render_focal Config.render_dolly_zoom'),
  # The model.
  (
    {'Model.num_levels': (1,)},
    'Model.num_prop_samples Model.multisample_proposals Model.anneal_slope Model.resample_padding '
    'Model.resample_blur Model.dilation_multiplier Model.dilation_bias Model.stop_level_grad '
    'Model.single_mlp Model.separate_prop_mlps Config.data_coarse_loss_mult '
    'Config.interlevel_every PropMLP.*',
  ),
  ({'Model.single_mlp': (True,)}, 'PropMLP.*'),
  ({'Model.num_multisamples': (0,)}, 'Model.multisample_proposals'),
  ({'Model.opaque_background': (True,)}, 'Model.bg_intensity_range'),
  ({'Model.near_anneal_rate': (None,)}, 'Model.near_anneal_init'),
  (
    {'Model.use_viewdirs': (False,)},
    'MLP.deg_view MLP.bottleneck_width MLP.bottleneck_noise',
  ),
  # A field.
  (
    {'MLP.encoding': ('grid',)},
    'MLP.min_deg_point MLP.max_deg_point MLP.basis_shape MLP.basis_subdivisions',
  ),
  (
    {'MLP.encoding': ('ipe',)},
    'MLP.grid_levels MLP.grid_min_resolution MLP.grid_max_resolution MLP.grid_log2_size '
    'MLP.grid_features MLP.grid_init MLP.grid_gain MLP.grid_fading_features '
    'MLP.grid_coarse_to_fine',
  ),
  (
    {'MLP.encoding': ('ipe',), 'MLP.warp_fn': ('inverted_sphere',)},
    'MLP.basis_shape MLP.basis_subdivisions',
  ),
  ({'MLP.grid_levels': (1,)}, 'MLP.grid_max_resolution MLP.grid_coarse_to_fine'),
  ({'MLP.net_depth': (1,)}, 'MLP.skip_layer'),
  ({'MLP.disable_rgb': (True,)}, _COLOUR),
  ({'MLP.bottleneck_width': (0,)}, 'MLP.bottleneck_noise'),
  ({'MLP.net_depth_viewdirs': (0,)}, 'MLP.net_width_viewdirs'),
  ({'MLP.net_depth_viewdirs': _reached}, 'MLP.skip_layer_dir'),
)


def rules() -> Iterator[tuple[dict[str, _When], list[str]]]:
  """Yields RULES once for each MLP, with its name in place of MLP, as (switches, settings)."""
  for switches, names in RULES:
    for mlp in ('NerfMLP.', 'PropMLP.'):
      own = {re.sub(r'^MLP\.', mlp, name): when for name, when in switches.items()}
      yield own, [re.sub(r'^MLP\.', mlp, name) for name in names.split()]


def find(
  owners: Mapping[str, Any], known: Mapping[str, str]
) -> Iterator[tuple[list[str], dict[str, _When]]]:
  """Yields the settings that differ from their defaults and do nothing, with their switches.

  Args:
    owners: the settings, by the name of their dataclass.
    known: settings that never have an effect, which are left out.
  """
  defaults = {name: type(owner)() for name, owner in owners.items()}

  def value(name: str, of: Mapping[str, Any] = owners) -> Any:
    owner, field = name.split('.')
    return getattr(of[owner], field)

  def is_idle(name: str, switches: Mapping[str, _When]) -> bool:
    own = value(name)
    return own != value(name, defaults) and all(
      when(value(k), own) if callable(when) else value(k) in when for k, when in switches.items()
    )

  told = set(known)
  for switches, names in rules():
    named = [n for name in names for n in _expanded(name, owners)]
    idle = [n for n in named if n not in told and is_idle(n, switches)]
    if idle:
      told.update(idle)
      yield idle, switches


def lines(owners: Mapping[str, Any], known: Mapping[str, str]) -> list[str]:
  """Returns a line for each rule by which settings do nothing; arguments are those of `find`."""

  def shown(name: str) -> str:
    owner, field = name.split('.')
    return f'{name} = {getattr(owners[owner], field)!r}'

  return [
    f'{", ".join(map(shown, idle))}: no effect with {" and ".join(map(shown, switches))}.'
    for idle, switches in find(owners, known)
  ]


def _expanded(name: str, owners: Mapping[str, Any]) -> list[str]:
  """Returns all settings of an owner for `OWNER.*`, otherwise the name."""
  owner, field = name.split('.')
  if field != '*':
    return [name]
  return [f'{owner}.{f.name}' for f in dataclasses.fields(owners[owner])]
