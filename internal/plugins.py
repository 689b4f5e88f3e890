"""Extension points: tables of encodings, losses, datasets, camera paths and ray distances.

The package's own entries and those of plug-ins are registered alike: `@plugins.loss('sparsity')`. A
plug-in is a module outside of this package that registers entries when it is imported, which the
flag `--plugins my_package.my_module` does. CONTRIBUTING.md has an example of each kind. What the
functions of plug-ins return is checked here.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .errors import UserError

_PACKAGE = __name__.split('.')[0]


class PluginError(UserError):
  """A plug-in that is missing, cannot be imported, breaks its contract, or takes a taken name."""


class Table(dict[str, Any]):
  """Entries by name; calling a table with a name returns a decorator that adds an entry."""

  def __init__(
    self, kind: str, setting: str, returns: str = '', fits: Callable[[Any], bool] | None = None
  ):
    super().__init__()
    self.kind = kind  # What an entry is, for messages.
    self.setting = setting  # The setting that selects entries by name.
    self.returns = returns  # What entries return, for messages.
    self.fits = fits  # Whether a value is that; None for entries that are no functions.
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
      own = self.fits is None or module.split('.')[0] == _PACKAGE
      self[name], self.modules[name] = entry if own else self._checked(name, entry), module
      return entry

    return register

  def check(self, name: str, value: Any, fits: bool, rule: str) -> Any:
    """Returns the value that an entry is or has returned.

    Args:
      name: the entry's name.
      value: what to check.
      fits: whether it is as it must be.
      rule: what the entry must do, for the message.

    Raises:
      PluginError: it does not fit.
    """
    if not fits:
      entry = f'The {self.kind} {name!r} of {self.modules[name]}'
      raise PluginError(f'{entry} must {rule}, got {_shown(value)}.')
    return value

  def _checked(self, name: str, entry: Callable) -> Callable:
    """Returns the function `entry` with a check of what it returns."""

    @functools.wraps(entry)
    def call(*args, **kwargs):
      value = entry(*args, **kwargs)
      return self.check(name, value, self.fits(value), f'return {self.returns}')

    return call

  def plugged(self) -> list[str]:
    """Returns the names registered outside of this package."""
    return [name for name, module in self.modules.items() if module.split('.')[0] != _PACKAGE]


def _shown(value: Any) -> str:
  """Describes a value in a few words, arrays by their shapes."""
  if isinstance(getattr(value, 'shape', None), tuple):
    return f'an array {list(value.shape)}'
  if isinstance(value, tuple) and len(value) < 4:
    return f'({", ".join(map(_shown, value))})'
  text = ' '.join(repr(value).split())
  return text if len(text) < 80 else f'a {type(value).__name__}'


def _is_scalar(value: Any) -> bool:
  return isinstance(value, (int, float)) or getattr(value, 'shape', None) == ()


def _is_scene(value: Any) -> bool:
  return all(hasattr(value, name) for name in ('names', 'cameras', 'train', 'test', 'report'))


def _is_path(value: Any) -> bool:
  if not isinstance(value, tuple):
    value = value, None
  try:
    (n, *pose), *factors = (np.shape(part) for part in value if part is not None)
  except (TypeError, ValueError):  # Not arrays, or no shape.
    return False
  return n > 0 and pose == [3, 4] and factors in ([], [(n,)])


def _is_curve(value: Any) -> bool:
  return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(callable, value))


# Encodings are subclasses of fields.encodings.Encoding; fields.mlp checks them and their features.
encoding = Table('encoding', 'encoding')
loss = Table('loss', 'loss_mults', 'a scalar', _is_scalar)  # Functions of losses.Inputs.
# Functions of (config, read_only).
dataset = Table('dataset', 'dataset_loader', 'a datasets.scenes.Scene', _is_scene)
# Functions of (config, scene).
camera_path = Table(
  'camera path', 'render_path_type', 'poses [n, 3, 4], or a pair with factors [n]', _is_path
)
# Functions of Model.raydist_options.
ray_distance = Table('ray distance', 'raydist_fn', 'two functions, g and its inverse', _is_curve)
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
    PluginError: a module cannot be imported, registers nothing, or registers a name that is taken;
      or a name is a file's path.
  """
  if os.getcwd() not in map(os.path.abspath, sys.path):
    sys.path.append(os.getcwd())
  for name in modules:
    before = loaded()
    if name.endswith('.py') or os.sep in name:
      raise PluginError(f'--plugins {name}: is a path. Give the name of the module{_hint(name)}.')
    try:
      importlib.import_module(name)
    except UserError:
      raise
    except (Exception, SystemExit) as e:  # A plug-in may raise anything.
      # A package of the name, or the module itself; otherwise the module is there, and fails.
      absent = isinstance(e, ModuleNotFoundError) and f'{name}.'.startswith(f'{e.name}.')
      advice = 'Correct the module; --debug before --plugins shows the traceback.'
      if absent or name[:1] in ('', '.'):
        advice = 'Give the name of a module in the working folder or on PYTHONPATH.'
      reason = ' '.join(f'{type(e).__name__}: {e}'.split())
      raise PluginError(f'--plugins {name}: the import failed ({reason}). {advice}') from e
    own = any(f'{module}.'.startswith(f'{name}.') for module in before)
    if loaded() == before and not own:
      raise PluginError(
        f'--plugins {name}: the module registers nothing. Decorate what it defines with '
        "@plugins.encoding('NAME'), loss, dataset, camera_path or ray_distance."
      )


def _hint(path: str) -> str:
  """Returns how to name the module in a file, as the end of a sentence."""
  inside = os.path.relpath(path).removesuffix('.py')
  if not inside.startswith(os.pardir):
    return f', {inside.replace(os.sep, ".")}'
  folder, name = os.path.split(os.path.abspath(path))
  return f', {name.removesuffix(".py")}, and add {folder} to PYTHONPATH'


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
