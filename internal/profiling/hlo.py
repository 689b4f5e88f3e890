"""Counts what a compiled program computes and moves, from its optimised HLO text.

XLA's own cost analysis counts the body of a loop once, and reads from a chip's vector memory as if
they were reads from main memory. Here bodies count as often as they run, and only main memory
(memory space 0) counts, with arrays padded to the tiles in which they are stored.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 's64': 8, 'u64': 8}
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$')

# Instructions that move nothing, or whose counterpart (`-start`) is counted.
_FREE = {
  'after-all', 'bitcast', 'constant', 'get-tuple-element', 'opt-barrier', 'parameter',
  'partition-id', 'tuple', 'iota',
}  # fmt: skip
_SLICES = ('dynamic-slice', 'slice', 'gather')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """An instruction: name and type of its result, operation, text in parentheses, attributes."""

  name: str
  type: str
  op: str
  inside: str
  rest: str
  root: bool

  @property
  def operands(self) -> list[str]:
    """The names of the operands."""
    return re.findall(r'%([\w.\-]+)', self.inside)

  def called(self, *keys: str) -> list[str]:
    """Returns the names of the computations that attributes such as 'body' refer to."""
    lists = re.findall(rf'(?:{"|".join(keys)})=\{{?(%?[\w.\-]+(?:, %[\w.\-]+)*)', self.rest)
    return [name.strip('% ') for text in lists for name in text.split(',')]


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one instruction adds to a program's cost, over all of its executions."""

  source: str  # Name of the operation it computes, '' if unknown.
  op: str
  type: str
  bytes: float  # Read from and written to main memory.
  flops: float  # Of matrix products.
  cycles: float  # As the TPU compiler estimates; 0 where it does not.


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Parses HLO text; returns the computations by name, and the entry's name."""
  found, entry, current = {}, '', None
  for line in re.sub(r'/\*.*?\*/', '', text).splitlines():
    if match := _COMPUTATION.match(line):
      current = found[match[2]] = []
      entry = match[2] if match[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      inside, _, rest = match[5].partition('), ')
      inside = inside.removesuffix(')')
      current.append(Instruction(match[2], match[3], match[4], inside, rest, bool(match[1])))
  return found, entry


def array_bytes(kind: str) -> list[int]:
  """Returns the bytes of each array of a type, such as '(f32[10]{0}, bf16[2,3]{1,0})', unpadded."""
  return [
    math.prod(_sizes(shape)) * _BYTES.get(dtype, 4) for dtype, shape, _ in _ARRAY.findall(kind)
  ]


def _sizes(shape: str) -> list[int]:
  return [int(n) for n in shape.split(',') if n]


def _arrays(kind: str) -> Iterator[tuple[int, bool]]:
  """Yields the stored bytes of each array of a type, and whether it is in main memory."""
  for dtype, shape, layout in _ARRAY.findall(kind):
    sizes, order = _sizes(shape), _sizes(layout.split(':')[0])  # The fastest axis first.
    if tile := re.search(r'T\(([\d,]+)\)', layout):
      for axis, side in zip(order, reversed(_sizes(tile[1]))):
        sizes[axis] = -(-sizes[axis] // side) * side
    yield math.prod(sizes) * _BYTES.get(dtype, 4), not re.search(r'S\([1-9]', layout)


def _stored(kind: str) -> int:
  """Returns the bytes of all arrays of a type, wherever they are."""
  return sum(size for size, _ in _arrays(kind))


class Program:
  """A compiled program's instructions and their costs."""

  def __init__(self, text: str):
    """Parses the optimised HLO text of a program for one device."""
    self.computations, self.entry = parse(text)

  def costs(self) -> list[Cost]:
    """Returns the cost of every instruction that moves or multiplies, largest traffic first."""
    found = list(self._walk(self.entry, 1))
    return sorted(found, key=lambda cost: -cost.bytes)

  def _walk(self, name: str, times: int) -> Iterator[Cost]:
    types = {i.name: i.type for i in self.computations[name]}
    for one in self.computations[name]:
      if one.op == 'while':
        trips = self._trips(one.called('condition')[0])
        yield from self._walk(one.called('body')[0], times * trips)
      elif one.op in ('call', 'conditional'):
        for branch in one.called('to_apply', 'branch_computations', 'true_computation',
                                 'false_computation'):  # fmt: skip
          yield from self._walk(branch, times)
      elif one.op not in _FREE and not one.op.endswith(('-done', '-update')):
        source = re.search(r'op_name="([^"]*)"', one.rest)
        moved = times * self._moved(one, types)
        flops = times * self._flops(one, types)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
        cycles = times * float(cycles[1] if cycles else 0)
        yield Cost(source[1] if source else '', one.op, one.type, moved, flops, cycles)

  def _trips(self, condition: str) -> int:
    """Returns how often a loop runs: the constant that its counter is compared with."""
    seen = [condition, *(c for i in self.computations[condition] for c in i.called('calls'))]
    constants = [
      int(i.inside) for name in seen for i in self.computations[name]
      if i.op == 'constant' and i.type.startswith('s32[]')
    ]  # fmt: skip
    return max(constants, default=1)

  def _moved(self, one: Instruction, types: dict[str, str]) -> float:
    """Counts the bytes that an instruction reads from and writes to main memory once."""
    if one.op in ('copy-start', 'slice-start'):
      # The types of both start with source and destination, in either order.
      (first, from_main), (second, to_main) = list(_arrays(one.type))[:2]
      return min(first, second) * (from_main + to_main)
    if one.op == 'custom-call' and 'AllocateBuffer' in one.rest:
      return 0
    body = one.called('calls') if one.op == 'fusion' else []
    results = _arrays(one.type)
    if body:
      written = zip(self._written(body[0]), results, strict=True)
      total = sum(size for size, (_, in_main) in written if in_main)
    else:
      total = sum(size for size, in_main in results if in_main)
    for i, name in enumerate(one.operands):
      for size, in_main in _arrays(types.get(name, '')):
        if in_main:
          total += min(size, self._read(body[0], i)) if body else size
    return total

  def _read(self, computation: str, index: int) -> float:
    """Counts the bytes that a fusion reads of its operand `index`: slices, or all of it."""
    instructions = self.computations[computation]
    names, total = set(), 0.0
    for one in instructions:
      if one.op == 'parameter' and one.inside == str(index):
        names.add(one.name)
      uses = [i for i, name in enumerate(one.operands) if name in names]
      if not uses:
        continue
      if one.op == 'bitcast' and not one.root:
        names.add(one.name)
      elif one.op in _SLICES and uses == [0]:
        total += _stored(one.type)
      elif one.op == 'fusion':
        total += sum(self._read(one.called('calls')[0], i) for i in uses)
      elif not (one.op == 'dynamic-update-slice' and uses == [0]):  # That is done in place.
        return math.inf
    return total

  def _written(self, computation: str) -> list[int]:
    """Returns the bytes that a fusion writes of each of its results: slices, or all of it."""
    by_name = {i.name: i for i in self.computations[computation]}

    def written(one: Instruction) -> list[int]:
      if one.op == 'tuple':
        return [size for name in one.operands for size in written(by_name[name])]
      if one.op == 'bitcast':
        return written(by_name[one.operands[0]])
      if one.op == 'dynamic-update-slice':
        return [_stored(by_name[one.operands[1]].type)]
      if one.op == 'fusion':
        return self._written(one.called('calls')[0])
      return [size for size, _ in _arrays(one.type)]

    return written(next(i for i in by_name.values() if i.root))

  def _flops(self, one: Instruction, types: dict[str, str]) -> float:
    """Counts the FLOPs of the matrix products in an instruction."""
    if one.op == 'convolution':  # TPUs express all products so.
      return _product_flops(one, types[one.operands[1]])
    body = self.computations[one.called('calls')[0]] if one.op == 'fusion' else []
    inner = {i.name: i.type for i in body}
    return sum(self._flops(i, inner) for i in body)


def _product_flops(one: Instruction, kernel: str) -> float:
  """Counts 2 FLOPs per result and contracted element of a convolution that is a product."""
  labels = re.search(r'dim_labels=\w+_(\w+)->', one.rest)[1]
  window = re.search(r'window=\{([^}]*)\}', one.rest)
  batched = window and re.search('pad|dilate', window[1])  # The window's axis is a batch axis.
  result, kernel = (_sizes(_ARRAY.search(kind)[2]) for kind in (one.type, kernel))
  contracted = [
    n for n, label in zip(kernel, labels) if label != 'o' and not (batched and label.isdigit())
  ]
  return 2.0 * math.prod(result) * math.prod(contracted)
