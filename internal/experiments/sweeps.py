"""Rows of an experiment: from a file of bindings, and from sweeps over values.

A file of rows:

    # Bindings above the first row are for all rows.
    Config.max_steps = 5000

    full model:
    no distortion loss:
      Config.distortion_loss_mult = 0
    width:
      NerfMLP.net_width = 256, 512, 1024

A name and a colon start a row; the bindings below it are the row's. Values separated by commas
(outside of brackets and quotes) make a row each; several such bindings make all combinations. `#`
starts a comment.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from ..system import files
from . import runs

MOST_ROWS = 100
_OPEN, _CLOSE, _QUOTES = '([{', ')]}', '\'"'
TAKEN = {'Config.data_dir': '--data_dir', 'Config.checkpoint_dir': '--out'}  # Flags of ablate.py.


def _split(text: str, at: str) -> list[str]:
  """Splits at a character, except in brackets and quotes; the parts are stripped."""
  parts, depth, quote = [''], 0, ''
  for character in text:
    if quote:
      quote = '' if character == quote else quote
    elif character in _QUOTES:
      quote = character
    depth += (not quote) * ((character in _OPEN) - (character in _CLOSE))
    if character == at and not quote and not depth:
      parts.append('')
    else:
      parts[-1] += character
  return [part.strip() for part in parts]


def read_rows(path: str) -> dict[str, list[str]]:
  """Reads a file of rows: the bindings of each row by its name, sweeps not yet expanded.

  Raises:
    RunError: a line is neither a row's name nor a binding, a name is used twice, or there is no
      row.
  """
  common, rows, name = [], {}, None
  for number, line in enumerate(files.read_text(path).splitlines(), 1):
    line = _split(line, '#')[0]
    if not line:
      continue
    if '=' in line:
      (rows[name] if name else common).append(line)
      continue
    name = line.removesuffix(':').strip()
    if not line.endswith(':') or not name:
      raise runs.RunError(
        f'{path}, line {number}: {line!r} is neither a row (`name:`) nor a binding '
        '(`Config.near = 0.1`).'
      )
    if name in rows:
      raise runs.RunError(f'{path}, line {number}: there is another row {name!r}; rename one.')
    rows[name] = []
  if not rows:
    raise runs.RunError(f'{path}: has no rows; a row is a line with a name and a colon.')
  return {name: [*common, *bindings] for name, bindings in rows.items()}


def expand(bindings: Sequence[str]) -> Iterator[tuple[dict[str, str], list[str]]]:
  """Yields each combination of swept values.

  Args:
    bindings: 'NAME = VALUE' or 'NAME = VALUE, VALUE, ...'; the last binding of a name counts.

  Yields:
    The swept names with their values, and all bindings.

  Raises:
    RunError: a binding has no name or an empty value, or sets what ablate.py sets.
  """
  values = {}
  for binding in bindings:
    name, equals, text = binding.partition('=')
    name, choices = name.strip(), _split(text, ',')
    if not (name and equals and all(choices)):
      raise runs.RunError(f'{binding!r} must be NAME = VALUE, or NAME = VALUE, VALUE, ...')
    runs.refuse_taken([binding], TAKEN)
    values[name] = choices
  swept = [name for name, choices in values.items() if len(choices) > 1]
  for combination in itertools.product(*values.values()):
    chosen = dict(zip(values, combination))
    yield {name: chosen[name] for name in swept}, [f'{n} = {v}' for n, v in chosen.items()]


def expand_all(rows: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
  """Returns the bindings of each row by its label, with swept values as part of the labels.

  Raises:
    RunError: see `expand`; or there are more than MOST_ROWS rows.
  """
  made = {}
  for name, bindings in rows.items():
    for swept, combination in expand(bindings):
      short = [full.split('.')[-1] for full in swept]
      shown = short if len(set(short)) == len(short) else swept
      values = ', '.join(f'{key} = {value}' for key, value in zip(shown, swept.values()))
      made[': '.join(part for part in (name, values) if part)] = combination
      if len(made) > MOST_ROWS:
        raise runs.RunError(
          f'More than {MOST_ROWS} rows. Sweep fewer values, or use several commands, each with an '
          '--out of its own.'
        )
  return made


def folder_names(labels: Sequence[str]) -> list[str]:
  """Returns a unique folder name for each label: letters, digits and `._=-`, the rest as `_`."""
  names = [re.sub(r'[^\w.=-]+', '_', label.replace(' = ', '=')).strip('_.') for label in labels]
  for label, name in zip(labels, names):
    if not name or names.count(name) > 1:
      raise runs.RunError(f'The row {label!r} needs another name: its folder would be {name!r}.')
  return names
