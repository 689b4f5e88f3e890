"""Mip-NeRF 360 in JAX: unbounded, anti-aliased neural radiance fields.

The package has two names. In a checkout it is the folder `internal`; installed by pip it is
`mipnerf360`. Where both can be imported, both names give the same modules.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys

_NAMES = ('internal', 'mipnerf360')


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Imports `other.x` as this package's `x`, so that no module is ever loaded twice."""

  def __init__(self, other: str):
    self._other = other

  def find_spec(self, fullname, path=None, target=None):
    head, *rest = fullname.split('.')
    if head != self._other:
      return None
    spec = importlib.machinery.ModuleSpec(fullname, self)
    spec.loader_state = '.'.join([__name__, *rest])
    return spec

  def create_module(self, spec):
    module = importlib.import_module(spec.loader_state)
    spec.loader_state = module.__spec__
    return module

  def exec_module(self, module):
    # The import system has just put the alias's spec there; the module keeps its own.
    module.__spec__ = module.__spec__.loader_state


def _is_here(name: str) -> bool:
  """Whether an import of `name` would find this very folder."""
  spec = importlib.machinery.PathFinder.find_spec(name)
  folders = (spec and spec.submodule_search_locations) or ()
  here = os.path.realpath(os.path.dirname(__file__))
  return here in map(os.path.realpath, folders)


_API = ('Run', 'load_capture', 'load_run', 'load_settings', 'make_demo_scene', 'train')


def __getattr__(name: str):
  """Imports the API when asked for, so that a program that needs one function starts quickly."""
  if name == 'make_demo_scene':
    return importlib.import_module('.demo.capture', __name__).make_demo_scene
  if name in _API:
    return getattr(importlib.import_module('.api', __name__), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted({*globals(), *_API})


# Another project's `internal` is left alone.
for _other in set(_NAMES) - {__name__}:
  if _other == 'mipnerf360' or _is_here(_other):
    sys.meta_path.insert(0, _Alias(_other))
