"""Reads results.json files, and holds them to their schema, results.schema.json."""

from __future__ import annotations

import functools
import json
import os
from typing import Any

from ..errors import UserError

_SCHEMA = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'results.schema.json')
_TYPES = {
  'object': dict,
  'array': list,
  'string': str,
  'integer': int,
  'number': (int, float),
  'boolean': bool,
  'null': type(None),
}


class ResultsError(UserError):
  """A file that is no results.json of this version; the message names the file and the field."""


@functools.cache
def schema() -> dict[str, Any]:
  """The JSON Schema of results.json."""
  with open(_SCHEMA, encoding='utf-8') as f:
    return json.load(f)


def _is_of(value: Any, kind: str) -> bool:
  if isinstance(value, bool):
    return kind == 'boolean'
  return isinstance(value, _TYPES[kind])


def check(value: Any, rule: dict[str, Any], where: str = '') -> None:
  """Holds a value to a JSON Schema of the keywords that results.schema.json uses.

  Raises:
    ResultsError: the first field that is missing, unknown or of another type.
  """
  at = where or 'the whole'
  if 'const' in rule and value != rule['const']:
    raise ResultsError(f'{at} must be {rule["const"]!r}, got {value!r}')
  kinds = rule.get('type', ())
  kinds = [kinds] if isinstance(kinds, str) else kinds
  if kinds and not any(_is_of(value, kind) for kind in kinds):
    raise ResultsError(f'{at} must be {" or ".join(kinds)}, got {value!r:.60}')
  if isinstance(value, list):
    for i, item in enumerate(value):
      check(item, rule.get('items', {}), f'{where}[{i}]')
  if not isinstance(value, dict):
    return
  prefix = f'{where}.' if where else ''
  for name in rule.get('required', ()):
    if name not in value:
      raise ResultsError(f'{prefix}{name} is missing')
  others = rule.get('additionalProperties', {})
  for name, item in value.items():
    known = rule.get('properties', {}).get(name, others)
    if known is False:
      raise ResultsError(f'{prefix}{name} is unknown')
    check(item, known, f'{prefix}{name}')


def read(path: str) -> dict[str, Any]:
  """Reads a results.json.

  Raises:
    ResultsError: there is no such file, or it does not fit the schema.
  """
  try:
    with open(path, encoding='utf-8') as f:
      found = json.load(f)
  except FileNotFoundError:
    raise ResultsError(f'No such file: {path!r}; eval.py writes RUN/eval/results.json.') from None
  except (OSError, ValueError) as e:
    raise ResultsError(f'{path}: cannot be read as JSON ({e}); run eval.py again.') from None
  version = schema()['properties']['schema_version']['const']
  if isinstance(found, dict) and found.get('schema_version') != version:
    raise ResultsError(
      f'{path}: has schema_version {found.get("schema_version")!r}, this program reads {version}; '
      'run eval.py again on that run.'
    )
  try:
    check(found, schema())
  except ResultsError as e:
    raise ResultsError(f'{path}: {e}; run eval.py again on that run.') from None
  return found
