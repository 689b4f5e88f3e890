"""Dataset loaders: one module per format, and the table of their names.

A new format is a module with `load(config, read_only) -> Scene` and a row here, or a plug-in.
"""

from __future__ import annotations

import dataclasses

from .. import configs, plugins
from ..system import warnings
from . import blender, dtu, images, llff, multicam, tat, tat_fvs, transforms
from .scenes import Scene

LOADERS = plugins.dataset
for _name, _load in {
  'llff': llff.load,
  'blender': blender.load,
  'multicam': multicam.load,
  'transforms': transforms.load,
  'tat_nerfpp': tat.load,
  'tat_fvs': tat_fvs.load,
  'dtu': dtu.load,
}.items():
  plugins.dataset(_name)(_load)


def load_dataset(config: configs.Config, read_only: bool = False) -> Scene:
  """Loads the capture at Config.data_dir with Config.dataset_loader; pixels are read later.

  Makes missing downsampled pictures; with `read_only` it writes nothing and only reports them.
  Warnings (`warnings.warn`) are collected in `scene.report['warnings']`; commands print them with
  `cli.show_warnings`.

  Raises:
    DataError, DataNotFoundError, colmap.ModelError, colmap.ModelNotFoundError: the capture cannot
      be used.
  """
  name = config.dataset_loader
  if name not in LOADERS:
    raise images.DataError(
      f'Config.dataset_loader = {name!r} is unknown; use one of {", ".join(map(repr, LOADERS))}.'
    )
  with warnings.collect() as collected:
    scene = LOADERS[name](config, read_only)
  return dataclasses.replace(scene, report={**scene.report, 'warnings': collected})
