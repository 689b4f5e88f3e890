"""Extension points: tables of encodings, losses, datasets, camera paths and ray distances.

The package's own entries and those of plug-ins are registered alike: `@plugins.loss('sparsity')`. A
plug-in is a module outside of this package that registers entries when it is imported, which the
flag `--plugins my_package.my_module` does. CONTRIBUTING.md has an example of each kind.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from .errors import UserError

_PACKAGE = __name__.split('.')[0]


class PluginError(UserError):
  """A plug-in that is missing, cannot be imported, or uses a name that is taken."""


class Table(dict[str, Any]):
  """Entries by name; calling a table with a name returns a decorator that adds an entry."""

  def __init__(self, kind: str, setting: str):
    super().__init__()
    self.kind = kind  # What an entry is, for messages.
    self.setting = setting  # The setting that selects entries by name.
    self.modules = {}  # The module that registered each entry.

  def __call__(self, name: str) -> Callable:
    """Returns a decorator that registers its argument under `name`.

    Raises:
      PluginError: another module has registered the name. (A notebook's cell may do so again.)
    """
    # The caller's module: an entry such as a functools.partial does not know its own.
    module = sys._getframe(1).f_globals['__name__']
    other = self.modules.get(name, module)
    if other != module:
      raise PluginError(f'{other} and {module} both register a {self.kind} {name!r}; rename one.')

    def register(entry):
      self[name], self.modules[name] = entry, module
      return entry

    return register

  def plugged(self) -> list[str]:
    """Returns the names registered outside of this package."""
    return [name for name, module in self.modules.items() if module.split('.')[0] != _PACKAGE]


encoding = Table('encoding', 'encoding')  # Subclasses of fields.encodings.Encoding.
loss = Table('loss', 'loss_mults')  # Functions from losses.Inputs to a scalar.
dataset = Table('dataset', 'dataset_loader')  # Functions (config, read_only) -> scenes.Scene.
camera_path = Table('camera path', 'render_path_type')  # Functions (config, scene) -> [n, 3, 4].
ray_distance = Table('ray distance', 'raydist_fn')  # Functions () -> (g, inverse of g).
TABLES = (encoding, loss, dataset, camera_path, ray_distance)


def plugged() -> dict[str, list[str]]:
  """Returns the names that plug-ins add to each setting's choices."""
  return {table.setting: table.plugged() for table in TABLES}


def loaded() -> tuple[str, ...]:
  """Returns the modules outside of this package that have registered entries, sorted."""
  return tuple(sorted({table.modules[name] for table in TABLES for name in table.plugged()}))


def load(modules: Iterable[str]) -> None:
  """Imports plug-ins; the working folder is searched after all others.

  Raises:
    PluginError: a module cannot be imported, registers nothing, or registers a name that is taken.
  """
  if os.getcwd() not in map(os.path.abspath, sys.path):
    sys.path.append(os.getcwd())
  for name in modules:
    before = loaded()
    try:
      importlib.import_module(name)
    except UserError:
      raise
    except (Exception, SystemExit) as e:  # A plug-in may raise anything.
      raise PluginError(
        f'--plugins {name}: the import failed ({type(e).__name__}: {e}). Give the name of a module '
        'in the working folder or on PYTHONPATH; --debug before --plugins shows the traceback.'
      ) from e
    own = any(f'{module}.'.startswith(f'{name}.') for module in before)
    if loaded() == before and not own:
      raise PluginError(
        f'--plugins {name}: the module registers nothing. Decorate what it defines with '
        "@plugins.encoding('NAME'), loss, dataset, camera_path or ray_distance."
      )


def require(modules: Iterable[str], source: str) -> tuple[str, ...]:
  """Checks that the plug-ins which `source` needs are loaded; returns all that are.

  Raises:
    PluginError: some are not.
  """
  missing = [str(name) for name in modules if name not in loaded()]
  if missing:
    raise PluginError(
      f'{source} needs plug-ins that are not loaded: {", ".join(missing)}. Add --plugins '
      f'{" ".join(missing)} to the command, or import them first in Python.'
    )
  return loaded()


def flags() -> list[str]:
  """Returns the command-line flags that load the same plug-ins in another process."""
  return ['--plugins', *loaded()] if loaded() else []
