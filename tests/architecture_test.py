"""The house: which room may import which, and that CONTRIBUTING.md says the same."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
INTERNAL = ROOT / 'internal'

# From the ground up. A room (a module or a folder in internal/) imports only from floors below its
# own, so there are no circles; within a folder the same holds for its modules.
FLOORS = (
  ('config_checks', 'errors', 'idle_settings', 'math', 'structs'),
  ('bindings', 'plugins', 'system'),
  ('alignment', 'cameras', 'colmap', 'configs', 'coord', 'devices', 'geopoly', 'image', 'paths',
   'stepfun', 'vis'),
  ('demo', 'fields', 'knobs', 'render'),
  ('cli', 'datasets', 'losses', 'models'),
  ('training',),
  ('rendering',),
  ('evaluation', 'export', 'profiling', 'viewer'),
  ('experiments', 'sfm', 'splats'),
  ('commands',),
  ('api',),
)  # fmt: skip
FACE = ('__init__', '__main__')  # The package's own names: whatever they offer is lazy.


def _imports() -> set[tuple[str, str]]:
  """(importer, imported) for all modules, as dotted names below internal/."""
  files = {
    '.'.join(f.relative_to(INTERNAL).with_suffix('').parts): f for f in INTERNAL.rglob('*.py')
  }
  found = set()
  for name, file in files.items():
    package = name.split('.')[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.ImportFrom) and node.level:
        base = package[: len(package) + 1 - node.level] + (node.module or '').split('.')
        base = '.'.join(filter(None, base))
        for alias in node.names:
          names = (f'{base}.{alias.name}'.lstrip('.'), base)
          choices = [c for n in names for c in (n, f'{n}.__init__'.lstrip('.')) if c in files]
          found.add((name, choices[0]))
  return found


def _room(module: str) -> str:
  return module.split('.')[0]


def test_rooms_import_only_from_floors_below():
  floor = {room: k for k, rooms in enumerate(FLOORS) for room in rooms}
  rooms = {f.stem for f in INTERNAL.iterdir() if f.suffix == '.py' or (f / '__init__.py').exists()}
  assert rooms - set(FACE) == set(floor)
  arrows = {(a, b) for a, b in _imports() if _room(a) != _room(b) and _room(a) not in FACE}
  assert [(a, b) for a, b in sorted(arrows) if floor[_room(a)] <= floor[_room(b)]] == []


def test_no_circle_within_a_room():
  below = {}
  for a, b in _imports():
    below.setdefault(a, set()).add(b)

  def visit(module, path):
    assert module not in path, ' -> '.join([*path, module])
    if module not in done:
      for other in below.get(module, ()):
        visit(other, [*path, module])
      done.add(module)

  done = set()
  for module in list(below):
    visit(module, [])


def test_contributing_has_the_same_floors():
  table = (ROOT / 'CONTRIBUTING.md').read_text().split('| | `internal/` | |\n')[1].split('\n\n')[0]
  rows = re.findall(r'^\| \d+ \| (.*?) \|', table, re.MULTILINE)
  assert [set(re.findall(r'`(\w+)/?`', row)) for row in rows] == [set(floor) for floor in FLOORS]
