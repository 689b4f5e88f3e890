"""Bindings as people type them: accepts text without quotes, and explains what gin cannot read."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
import shlex
import typing
from collections.abc import Iterable, Mapping, Sequence

from . import config_checks
from .errors import UserError

_BINDING = re.compile(r'\s*([A-Za-z]\w*)\.(\w+)\s*=(?!=)(.*)', re.DOTALL)
_QUOTES = '\'"'
_STATEMENT = re.compile(r'[^=]*=(?!=)|\s*(?:#|include\b|import\b|from\b|$)|[^\n]*:\s*\n')


class ConfigError(UserError):
  """A config file, binding or value that cannot be used."""


def readable(
  bindings: Sequence[str], owners: Mapping[str, type], plugged: Mapping[str, Iterable[str]]
) -> list[str]:
  """Returns the bindings as gin reads them: text that lacks its quotes gets them.

  Args:
    bindings: lines such as 'Config.factor = 4' or 'Config.data_dir=my_scene'.
    owners: the settings' dataclasses by name.
    plugged: names that plug-ins add to a setting's choices, by the setting's name.

  Raises:
    ConfigError: gin could not read a binding; says what to type instead.
  """
  return [_readable(text, owners, plugged) for text in _joined(bindings)]


def _joined(words: Sequence[str]) -> list[str]:
  """Joins `Config.factor = 4` that a shell has split into three words."""
  result = []
  for word in words:
    if result and (word.strip() == '=' or result[-1].endswith(' =')):
      result[-1] += f' {word.strip()}'
    else:
      result.append(word)
  return result


def _readable(text: str, owners, plugged) -> str:
  match = _BINDING.fullmatch(text)
  if not match:
    if not _STATEMENT.match(text):
      raise ConfigError(
        f'--gin_bindings {text!r}: a setting has a name, = and a value, such as Config.factor=4. '
        'Give all other arguments before --gin_bindings.'
      )
    return text
  owner, name, value = match[1], match[2], match[3].strip()
  if _is_for_gin(value):
    return text
  knob = f'{owner}.{name}'
  fields = {f.name: f for f in dataclasses.fields(owners[owner])} if owner in owners else {}
  if name not in fields:
    raise ConfigError(f'No setting {knob!r}.{nearest(knob, owners)}')
  hint = typing.get_type_hints(owners[owner])[name]
  if config_checks.accepts_text(hint):
    if value and not re.search(r'[\'"\\#]', value):
      return f'{knob} = {value!r}'
    raise ConfigError(
      f'{text.strip()}: type the text in quotes, and the whole setting in other quotes: '
      f'{_quoted(knob, value)}.'
    )
  default = fields[name].default
  example = '' if default is dataclasses.MISSING else f', such as {knob}={default!r}'
  kind = config_checks.describe(name, hint, plugged.get(name, ()))
  problem = f'{value} is not {kind}' if value else f'it has no value. Type {kind}'
  raise ConfigError(f'{text.strip()}: {problem}{example}.')


def _is_for_gin(value: str) -> bool:
  """Returns whether to leave a value to gin: it can be read, or is more than a word or a path."""
  if value[:1] in ('@', '%') or re.search(r'[\n()\[\]{}]', value):
    return True
  try:
    ast.literal_eval(value)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return False
  return True


def _quoted(knob: str, value: str) -> str:
  """Returns the setting as a word to type in a shell."""
  return shlex.quote(f'{knob}="{value.strip(_QUOTES) or "TEXT"}"')


def nearest(wrong: str, owners: Mapping[str, type]) -> str:
  """Returns a sentence with the names of settings nearest to an unknown one, with owner or not."""
  known = [f'{name}.{f.name}' for name, c in owners.items() for f in dataclasses.fields(c)]
  tail = wrong.rsplit('.', 1)[-1]
  near = [k for k in known if k.endswith(f'.{tail}')]  # Right name, wrong owner.
  lower, bare = {k.lower(): k for k in known}, {k.split('.')[1]: k for k in reversed(known)}
  near += [lower[k] for k in difflib.get_close_matches(wrong.lower(), lower, 3, 0.75)]
  near += [bare[k] for k in difflib.get_close_matches(tail.lower(), bare, 3, 0.75)]
  if not near:
    near = sorted((k for k in bare.values() if tail in re.split('[._]', k)), key=len)[:3]
  if not near:
    return ' --list_knobs lists every known name, --list_knobs WORD those about a word.'
  return f' Nearest known: {", ".join(dict.fromkeys(near))}.'


def unused_macro(name: str, value: object, owners: Mapping[str, type]) -> str:
  """Returns the error message for `factor = 4`: to gin a macro, which no `%factor` refers to."""
  full = [f'{k}.{name}' for k, c in owners.items() if hasattr(c, name)]
  if full:
    return f'{name} = {value!r}: sets nothing without its owner. Write {" or ".join(full)}.'
  return (
    f'{name} = {value!r}: sets nothing; {name} is not a setting, and no setting refers to %{name}.'
    f'{nearest(name, owners)}'
  )
