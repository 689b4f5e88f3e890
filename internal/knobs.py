"""Lists every setting with type, default and meaning, for --list_knobs and docs/knobs.md.

Meanings are the comments beside the fields, so that there is one text. Rewrite the page with
`python -m internal.knobs > docs/knobs.md`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import re
import textwrap
import tokenize
import typing
from collections.abc import Callable, Iterator

from . import config_checks, configs, plugins
from .errors import UserError

# Flags that set a knob, in the programs that have them.
FLAGS = {
  'Config.data_dir': '--data',
  'Config.checkpoint_dir': '--out',
  'Config.factor': '--factor',
  'Config.max_steps': '--steps',
  'Config.render_path_frames': '--frames',
  'Config.render_resolution': '--size',
  'Config.render_dir': '--out',
}
_PROGRAMS = {**dict.fromkeys(FLAGS, 'train.py'), **{k: 'render.py' for k in FLAGS if 'render' in k}}
_NO_DEFAULT = inspect.Parameter.empty
_HEADING = re.compile(r'[A-Z]\w+\.')  # A comment that names the fields below it.


class KnobsError(UserError):
  """A word that no knob has anything to do with."""


@dataclasses.dataclass(frozen=True)
class Knob:
  """A setting."""

  name: str  # As in a binding: 'Config.factor'.
  kind: str  # What values it takes, in words.
  default: str  # As gin text; '' without one.
  meaning: str
  section: str = ''  # Heading of the group of fields that it is in.

  @property
  def flag(self) -> str:
    """The flag that sets it, and the program that has the flag; '' without one."""
    return f'{_PROGRAMS[self.name]} {FLAGS[self.name]}' if self.name in FLAGS else ''


@dataclasses.dataclass(frozen=True)
class Group:
  """Knobs that belong together."""

  title: str
  about: str
  knobs: list[Knob]


def groups() -> list[Group]:
  """Returns all knobs: the package's settings, then those of the plug-ins that are loaded."""
  settings = [_of_class(c.__name__, c, c) for c in (configs.Config, configs.Model)]
  both = _of_class('NerfMLP', configs.NerfMLP, configs.MLP)
  about = f'{both.about} Each has its own: write PropMLP.net_width for the other one.'
  own = [_of_configurable(name, target) for name, target in configs.plugged_configurables()]
  return [*settings, Group('NerfMLP and PropMLP', about, both.knobs), *own, *_of_tables()]


def _of_class(owner: str, cls: type, source: type) -> Group:
  """Returns the knobs of a dataclass; `source` is the class whose text has the fields."""
  hints, plugged = typing.get_type_hints(cls), plugins.plugged()
  texts, knobs = _comments(source), []
  for f in dataclasses.fields(cls):
    if not f.init or (f.name in ('parent', 'name') and hasattr(cls, 'apply')):  # Flax's own.
      continue
    meaning, section = texts.get(f.name, ('', ''))
    name = f'{owner}.{f.name}'
    if name in configs.ACCEPTED:
      meaning = f'No effect: {configs.ACCEPTED[name]}.'
    kind = config_checks.describe(f.name, hints[f.name], plugged.get(f.name, ()))
    knobs.append(Knob(name, kind, _default(f), meaning, section))
  return Group(owner, _first_paragraph(source), knobs)


def _default(field: dataclasses.Field) -> str:
  if field.default_factory is not dataclasses.MISSING:
    return repr(field.default_factory())
  return '' if field.default is dataclasses.MISSING else repr(field.default)


def _of_configurable(name: str, target: type | Callable) -> Group:
  """Returns the knobs of a plug-in's own gin configurable, a dataclass or a function."""
  if dataclasses.is_dataclass(target):
    return _of_class(name, target, target)
  knobs = [
    Knob(
      f'{name}.{p.name}',
      '' if p.annotation is _NO_DEFAULT else inspect.formatannotation(p.annotation).strip("'"),
      '' if p.default is _NO_DEFAULT else repr(p.default),
      '',
    )
    for p in inspect.signature(target).parameters.values()
  ]
  return Group(name, _first_paragraph(target), knobs)


def _of_tables() -> Iterator[Group]:
  """Yields what plug-ins have registered, and the options of their encodings."""
  for table in plugins.TABLES:
    for name in table.plugged():
      owner = _owner(table.setting)
      title = f'{table.kind} {name!r} of {table.modules[name]}'
      if table is plugins.loss:
        knob = Knob(f'{owner}.{table.setting}[{name!r}]', 'a number', '', 'Its multiplier.')
        yield Group(title, _first_paragraph(table[name]), [knob])
        continue
      chosen = f'Chosen by {owner}.{table.setting} = {name!r}.'
      about = f'{_first_paragraph(table[name])} {chosen}'.strip()
      options = []
      if table is plugins.encoding and dataclasses.is_dataclass(table[name]):
        options = _of_class('', table[name], table[name]).knobs
      prefix = f'{owner}.encoding_options'
      named = [dataclasses.replace(k, name=f'{prefix}[{k.name[1:]!r}]') for k in options]
      yield Group(title, about, named)


def _owner(setting: str) -> str:
  """Returns the owner of a setting that plug-ins extend."""
  owners = (configs.Config, configs.Model, configs.NerfMLP)
  return next(owner.__name__ for owner in owners if hasattr(owner, setting) or
              setting in {f.name for f in dataclasses.fields(owner)})  # fmt: skip


def _first_paragraph(target) -> str:
  text = inspect.cleandoc(getattr(target, '__doc__', None) or '')
  return (
    '' if text.startswith(f'{getattr(target, "__name__", "")}(') else _flat(text.split('\n\n')[0])
  )


def _flat(text: str) -> str:
  return ' '.join(text.split())


def _comments(cls: type) -> dict[str, tuple[str, str]]:
  """Returns the (comment, heading) of each field: comments above it and behind it, in its class."""
  try:
    source = textwrap.dedent(inspect.getsource(cls))
  except (OSError, TypeError):  # Made in a notebook's cell that is gone, or without a file.
    return {}
  lines, notes = source.split('\n'), {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      notes[token.start[0]] = token.string.lstrip('# ')
  result, heading = {}, ''
  for node in ast.parse(source).body[0].body:
    if not isinstance(node, ast.AnnAssign):
      continue
    first, above = node.lineno - 1, []
    while first in notes and lines[first - 1].lstrip().startswith('#'):
      above.insert(0, notes[first])
      first -= 1
    if len(above) == 1 and _HEADING.fullmatch(above[0]):
      heading, above = above[0].rstrip('.'), []
    behind = [notes[k] for k in range(node.lineno, node.end_lineno + 1) if k in notes]
    result[node.target.id] = _flat(' '.join(above + behind)), heading
  return result


def listing(word: str | None = None) -> str:
  """Returns all knobs, or those with `word` in name, type or meaning, as text for a terminal.

  Raises:
    KnobsError: there are none; the message has the nearest names.
  """
  word = word and word.rsplit('.', 1)[-1]  # NerfMLP's list stands for PropMLP's.
  blocks = []
  for group in groups():
    whole = word and word.lower() in group.title.lower()
    found = [k for k in group.knobs if not word or whole or _matches(k, word.lower())]
    if found or (group.about and not group.knobs and (whole or not word)):
      head = _wrapped(f'{group.title}: {group.about}', '')
      blocks.append('\n'.join([head, *map(_entry, found)]))
  if not blocks:
    names = {k.name.split('.')[-1]: k.name for group in groups() for k in group.knobs}
    near = [names[n] for n in difflib.get_close_matches(word, names, 3, 0.5)]
    more = f' Nearest: {", ".join(near)}.' if near else ''
    raise KnobsError(f'--list_knobs {word}: no setting has this word.{more}')
  return '\n\n'.join(blocks)


def _matches(knob: Knob, word: str) -> bool:
  return any(word in text.lower() for text in (knob.name, knob.kind, knob.meaning, knob.flag))


def _entry(knob: Knob) -> str:
  flag = f'   (or {knob.flag})' if knob.flag else ''
  default = f' = {knob.default}' if knob.default else ''
  kind = f'[{knob.kind}]' if knob.kind else ''
  return f'  {knob.name}{default}{flag}\n{_wrapped(f"{knob.meaning} {kind}".strip(), "      ")}'


def _wrapped(text: str, indent: str) -> str:
  return textwrap.fill(text, 96, initial_indent=indent, subsequent_indent=indent or '  ')


_PAGE_HEAD = """# Settings

Every setting with its default, the values it takes, and what it means. This page is made from the
comments in [`internal/configs.py`](../internal/configs.py). `--list_knobs` prints the same in a
terminal, `--list_knobs WORD` only the settings that have to do with a word. After `--plugins` it
also prints the settings of plug-ins.

**How to set them.** Flags set what most people set. `--gin_bindings` sets anything. Later rows of
this table win, and a note says so where a binding overrides a flag. The run's `config.gin` has the
result.

| | |
|---|---|
| defaults | this page |
| `--config` | `fast`, `grid`, `paper`, another name in `configs/`, or a .gin file |
| `--gin_configs` | more .gin files |
| flags | train.py: `--data`, `--out`, `--factor`, `--steps`; render.py: `--data`, `--path`, `--frames`, `--size`, `--out`; eval.py and view.py: `--data` |
| `--gin_bindings` | any setting by its name on this page |

```bash
python train.py --config fast --data data/my_scene --out runs/my_scene \\
  --gin_bindings Config.lr_init=0.005 NerfMLP.net_width=128
```

Text in a binding needs no quotes (`Config.data_dir=my_scene`), unless it could be read as something
else (`Config.data_dir="'2024'"`). A note names each setting that has no effect with the others, such as
`Config.camera_lr_init` without `Config.refine_cameras`.
"""  # noqa: E501


def markdown() -> str:
  """Returns docs/knobs.md."""
  parts = [_PAGE_HEAD]
  for group in groups():
    parts.append(f'## {group.title}\n\n{_escaped(group.about)}\n')
    for section in dict.fromkeys(knob.section for knob in group.knobs):
      heading = [f'### {section}', ''] if section else []
      rows = [_row(knob) for knob in group.knobs if knob.section == section]
      table = ['| setting | default | values | meaning |', '|---|---|---|---|', *rows]
      parts.append('\n'.join([*heading, *table, '']))
  return '\n'.join(parts)


def _row(knob: Knob) -> str:
  flag = f' (`{knob.flag}`)' if knob.flag else ''
  default = f'`{knob.default}`' if knob.default else ''
  return f'| `{knob.name}`{flag} | {default} | {_escaped(knob.kind)} | {_escaped(knob.meaning)} |'


def _escaped(text: str) -> str:
  """Returns text whose <, |, * and _ are no markup."""
  return re.sub(r'[|*_]', r'\\\g<0>', text).replace('<', '&lt;')


if __name__ == '__main__':
  print(markdown(), end='')
