"""Captures: a small module per format, and the one table of their names.

A new format is a module with `load(config, read_only) -> Scene` and a row here.
"""

from __future__ import annotations

from internal import configs
from internal.datasets import blender, images, llff, tat, transforms
from internal.datasets.scene import Scene

LOADERS = {
  'llff': llff.load,
  'blender': blender.load,
  'transforms': transforms.load,
  'tat_nerfpp': tat.load,
}

# Formats that configs of the field name and that have no reader here.
_ABSENT = ('tat_fvs', 'dtu')


def load_dataset(config: configs.Config, read_only: bool = False) -> Scene:
  """Reads the capture at Config.data_dir, as Config.dataset_loader says, but for its pixels.

  Missing downsampled pictures are made, unless `read_only`; then they are only reported.

  Raises:
    DataError, DataNotFoundError, colmap.ModelError, colmap.ModelNotFoundError: the capture cannot
      be used; one line says why and what to do.
  """
  name = config.dataset_loader
  if name not in LOADERS:
    what = 'has no reader in this version' if name in _ABSENT else 'is unknown'
    raise images.DataError(
      f'Config.dataset_loader = {name!r} {what}: there are {", ".join(map(repr, LOADERS))}.'
    )
  return LOADERS[name](config, read_only)
