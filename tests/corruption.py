"""Ways to damage a file, as hypothesis strategies from its good content to bytes."""

import copy
import json
import math
import re
import struct

from hypothesis import strategies as st

_FLOATS = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e308, -1e308, 1e30, 1e-30, 1e-300, 5e-324]
_COUNTS = [0, 1, 2, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]
_ODD = {
  'd': st.sampled_from(_FLOATS) | st.floats(),
  'Q': st.sampled_from(_COUNTS),
  'I': st.sampled_from([n for n in _COUNTS if n < 2**32]),
  'i': st.sampled_from([-(2**31), -1, 0, 1, 5, 7, 17, 18, 2**31 - 1]),
}
_TOKENS = [
  'nan', 'inf', '-1', '0', '1e308', '1e-300', '1e400', '1' * 25, '9' * 5000, '1_0', '٣', '-', '"',
  "'", '#', ',', '[', '(', '{', ')', '@', '%', '=', '.', 'None', 'True', 'x', '\0', '\r', '\x85',
  '2.5', '../../outside/secret.png', '1099511627776', '[' * 3000, '(' * 3000, '-' * 3000, '\ufeff',
]  # fmt: skip
# gin's own words: references that call themselves, macros of themselves, files of themselves.
GIN_TOKENS = [
  '@Config()', '@Config', '@jnp.log()', '@jnp.log', '%a', 'a = %a', "include 'a.gin'",
  'x/y/Config.factor = 1', 'import nothing_of_that_name', "include '/dev/null/x'", 'Config.factor',
  '1e999', '{"a": [1, (2,)]}', 'Config.render_resolution = (1e999, [])',
  'Config.weight_decay_mults = {(): []}', '@gin.singleton()',
]  # fmt: skip


def names(outside: str):
  """Picture names for a capture's files; `outside` is a folder outside the capture."""
  return st.sampled_from([
    '../outside/secret.png', '../../outside/secret.png', f'{outside}/secret.png', 'link.png',
    'out/secret.png', 'images/link.png', 'images/out/secret.png', '..\\outside\\secret.png',
    'images\\..\\..\\outside\\secret.png', f'images/{outside}/secret.png',
    f'images//{outside}/secret.png', 'images/../../outside/secret.png', 'link', 'images/link', '',
    '.', '..', '/', '//', './', 'images', 'images/', '\0', 'a\0.png', 'images/a\0.png', 'x' * 5000,
    'x/' * 3000, '\udce9.png', '\ud800.png', 'images/\ud800', '/dev/zero', '/dev/stdin',
    'C:\\x.png', '~/x.png', 'pipe.png', 'images/pipe.png', 'folder.png', 'images/folder.png',
    '000.png', 'images/000.png', 'ü\n b.png',
  ])  # fmt: skip


def fields(kind: str, content: bytes) -> list[tuple[int, str]]:
  """Where the numbers of a .bin file (of PINHOLE cameras, without tracks) are: (offset, format)."""
  found, at = [(0, 'Q')], 8

  def take(layout: str) -> None:
    nonlocal at
    for code in layout:
      found.append((at, code))
      at += struct.calcsize(f'<{code}')

  for _ in range(struct.unpack_from('<Q', content)[0]):
    take(
      {
        'cameras': 'IiQQdddd',
        'images': 'IdddddddI',
        'points3D': 'Qddd',
        'rigs': 'II',
        'frames': 'IIdddddddI',
      }[kind]
    )
    if kind == 'images':
      at = content.index(b'\0', at) + 1
      take('Q')
    if kind == 'points3D':
      at += 3
      take('dQ')
  return found


@st.composite
def _fields(draw, content: bytes, places) -> bytes:
  data = bytearray(content)
  for at, code in draw(st.lists(st.sampled_from(places), min_size=1, max_size=3)):
    struct.pack_into(f'<{code}', data, at, draw(_ODD[code]))
  return bytes(data)


@st.composite
def of_bytes(draw, content: bytes) -> bytes:
  """Flips, cuts, repeats and inserts bytes."""
  data = bytearray(content)
  for _ in range(draw(st.integers(1, 3))):
    at = draw(st.integers(0, len(data)))
    length = draw(st.sampled_from([1, 1, 2, 8, 40]))
    kind = draw(st.sampled_from(['flip', 'cut', 'drop', 'insert', 'repeat', 'huge', 'append']))
    if kind == 'flip' and at < len(data):
      data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == 'cut':
      del data[at:]
    elif kind == 'drop':
      del data[at : at + length]
    elif kind == 'insert':
      data[at:at] = draw(st.binary(min_size=1, max_size=9))
    elif kind == 'repeat':
      data[at:at] = data[at : at + length]
    elif kind == 'huge':
      data[at : at + 8] = struct.pack('<Q', draw(_ODD['Q']))
    elif kind == 'append':
      data += draw(st.binary(min_size=1, max_size=9))
  return bytes(data)


@st.composite
def of_lines(draw, content: bytes, tokens=()) -> bytes:
  """Drops, repeats and swaps lines; replaces words."""
  lines = content.decode('utf-8', 'surrogateescape').split('\n')
  token = st.sampled_from([*_TOKENS, *tokens])
  for _ in range(draw(st.integers(1, 3))):
    at = draw(st.integers(0, len(lines) - 1))
    kind = draw(st.sampled_from(['drop', 'double', 'swap', 'word', 'word', 'word', 'line', 'join']))
    if kind == 'drop' and len(lines) > 1:
      del lines[at]
    elif kind == 'double':
      lines.insert(at, lines[at])
    elif kind == 'swap':
      lines[at], lines[0] = lines[0], lines[at]
    elif kind == 'word':
      words = lines[at].split(' ')
      words[draw(st.integers(0, len(words) - 1))] = draw(token)
      lines[at] = ' '.join(words)
    elif kind == 'line':
      lines.insert(at, draw(token))
    elif kind == 'join' and at:
      lines[at - 1 : at + 1] = [lines[at - 1] + lines[at]]
  return '\n'.join(lines).encode('utf-8', 'surrogateescape')


def _odd_values(name):
  deep = []
  for _ in range(200):
    deep = [deep]
  plain = [
    None, True, False, -1, 0, 1, 2, 2.5, 2**31, 2**60, -(2**64), 10**400, '', 'x', '1', [], {},
    [[]], [None], {'a': 1}, ['x'], [0, 0], [1, 0], [7], [1] * 100_000, 'y' * 100_000, deep, 'none',
    'white', 'OPENCV',
  ]  # fmt: skip
  return st.sampled_from(plain) | st.sampled_from(_FLOATS) | name


def _places(tree, path=()):
  yield path
  items = tree.items() if isinstance(tree, dict) else enumerate(tree)
  for key, value in items:
    if isinstance(value, dict | list):
      yield from _places(value, (*path, key))
    else:
      yield (*path, key)


@st.composite
def of_json(draw, content: bytes, name=st.just('x')) -> bytes:  # noqa: B008
  """Replaces values, drops and repeats entries, nests deeply, repeats keys."""
  tree = json.loads(content)
  for _ in range(draw(st.integers(1, 2))):
    # A place by its shape first: few kinds of fields hold thousands of numbers.
    shapes = {}
    for path in _places(tree):
      shapes.setdefault(tuple('#' if isinstance(k, int) else k for k in path), []).append(path)
    path = draw(st.sampled_from(draw(st.sampled_from(sorted(shapes.values(), key=str)))))
    if not path:
      continue
    holder = tree
    for key in path[:-1]:
      holder = holder[key]
    kind = draw(st.sampled_from(['put', 'put', 'put', 'put', 'drop', 'double', 'new']))
    if kind == 'put':
      is_name = isinstance(holder[path[-1]], str) and draw(st.booleans())
      holder[path[-1]] = copy.deepcopy(draw(name if is_name else _odd_values(name)))
    elif kind == 'drop':
      del holder[path[-1]]
    elif isinstance(holder, list):
      holder.append(holder[path[-1]])
    elif kind == 'new':
      holder['new'] = 1
  text = json.dumps(tree)
  kind = draw(st.sampled_from([''] * 8 + ['number', 'key']))
  token = draw(
    st.sampled_from(
      ['[' * 100_000, '{"a":' * 100_000, '9' * 5000, '-', '1e99999', 'NaN', '"', '{}', '00']
    )
  )
  spots = [m.span(1) for m in re.finditer(r'[ \[](-?\d[\d.e+-]*)', text)]
  if kind == 'number' and spots:
    start, end = draw(st.sampled_from(spots))
    text = text[:start] + token + text[end:]
  elif kind == 'key':
    key = draw(st.sampled_from(re.findall(r'"(\w+)": ', text) or ['a']))
    text = text[:-1] + f', "{key}": {draw(st.sampled_from(["3", "null", "[]", "{}", token]))}}}'
  data = text.encode('utf-8', 'surrogateescape')
  return draw(of_bytes(data)) if draw(st.integers(0, 9)) == 0 else data


@st.composite
def of_npy(draw, content: bytes) -> bytes:
  """Headers with another shape or dtype; the test supplies archives and pickles."""
  shape = draw(st.sampled_from(
    ['(1152921504606846976, 17)', '(-1, 17)', '(0, 17)', '(9, 5)', '()', '(17,)',
     '(1000000000, 17)', '(2, 3, 17)', '(1152921504606846976, 0)', '(9, 3, 4)', '(1.5, 17)',
     '(True, 17)', '(' * 2000, '(9, 17']
  ))  # fmt: skip
  kind = draw(st.sampled_from(
    ["'<f8'", "'>f8'", "'<f2'", "'|O'", "'<c16'", "'<U9'", "'<M8[s]'", "[('a', '<f8')]", "'|V8'",
     "'|V9999999999'", "'|b1'", "'<i8'", "[('a', '<f8', (1000000, 1000000))]", '3', "'f'"]
  ))  # fmt: skip
  header = f"{{'descr': {kind}, 'fortran_order': {draw(st.booleans())}, 'shape': {shape}, }}\n"
  version = draw(st.sampled_from([b'\1\0', b'\2\0', b'\3\0', b'\7\0']))
  size = struct.pack('<H' if version[0] == 1 else '<I', len(header))
  made = b'\x93NUMPY' + version + size + header.encode() + content[128:]
  return draw(st.sampled_from([made, draw(of_bytes(content))]))


def of_file(path: str, content: bytes, name=st.just('x')):  # noqa: B008
  """Returns damage for the file type of `path`."""
  kind, _, ending = path.rpartition('/')[2].partition('.')
  general = st.sampled_from([b'', b'\0', b'\xff\xfe', b'\n\n', b'{}', b'[]']) | of_bytes(content)
  special = {
    'bin': lambda: _fields(content, fields(kind, content)),
    'txt': lambda: of_lines(content),
    'json': lambda: of_json(content, name),
    'npy': lambda: of_npy(content),
  }
  if ending not in special:
    return general
  return st.integers(0, 3).flatmap(lambda n: special[ending]() if n else general)
