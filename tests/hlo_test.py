"""Bytes and FLOPs counted from compiled programs, against counts by hand."""

import pytest

from internal.profiling import hlo

# Tiles of 8 x 128; S(1) is vector memory. The loop runs 16 times, on one of 16 blocks each.
HLO = """
HloModule example

%inner (param_0: bf16[16,64,128], param_1: s32[], param_2: bf16[128,128]) -> bf16[64,128] {
  %param_0 = ROWS parameter(0)
  %param_1 = INT parameter(1)
  %zero = INT constant(0)
  %block = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1, %zero, %zero)
  %flat = bf16[64,128]{1,0:T(8,128)(2,1)} bitcast(%block)
  %param_2 = KERNEL parameter(2)
  ROOT %product = BLOCK convolution(%flat, %param_2), dim_labels=bf_io->bf
}

%store (param_0.1: bf16[16,64,128], param_1.1: s32[], param_2.1: bf16[64,128]) -> bf16[16,64,128] {
  %param_0.1 = ROWS parameter(0)
  %param_2.1 = BLOCK parameter(2)
  %row = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} bitcast(%param_2.1)
  %param_1.1 = INT parameter(1)
  %zero.1 = INT constant(0)
  ROOT %update = ROWS dynamic-update-slice(%param_0.1, %row, %param_1.1, %zero.1)
}

%body (state: (s32[])) -> (s32[]) {
  %state = STATE parameter(0)
  %i = INT get-tuple-element(%state), index=0
  %in = ROWS get-tuple-element(%state), index=1
  %out = ROWS get-tuple-element(%state), index=2
  %w = KERNEL get-tuple-element(%state), index=3
  %y = BLOCK fusion(%in, %i, %w), calls=%inner, {op_name="product"}, "estimated_cycles":"50"
  %stored = ROWS fusion(%out, %i, %y), kind=kLoop, calls=%store, metadata={op_name="store"}
  ROOT %next = STATE tuple(%i, %in, %stored, %w)
}

%condition (state.1: (s32[])) -> pred[] {
  %limit = INT constant(16)
  %state.1 = STATE parameter(0)
  %i.1 = INT get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: bf16[16,64,128], w.1: bf16[128,128], points: f32[1000,3]) -> f32[1000,3] {
  %x = ROWS parameter(0)
  %w.1 = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(1)
  %points = f32[1000,3]{1,0:T(8,128)} parameter(2)
  %start = (KERNEL, bf16[128,128]{1,0:T(8,128)(2,1)}, u32[]) copy-start(%w.1)
  %fast = KERNEL copy-done(%start)
  %room = ROWS custom-call(), custom_call_target="AllocateBuffer"
  %zero.2 = INT constant(0)
  %first = STATE tuple(%zero.2, %x, %room, %fast)
  %loop = STATE while(%first), condition=%condition, body=%body
  ROOT %double = f32[1000,3]{1,0:T(8,128)} add(%points, %points), metadata={op_name="add"}
}
"""
for _name, _type in {
  'STATE': '(INT, ROWS, ROWS, /*index=3*/KERNEL)',
  'BLOCK': 'bf16[64,128]{1,0:T(8,128)(2,1)S(1)}',
  'INT': 's32[]{:T(128)}',
  'ROWS': 'bf16[16,64,128]{2,1,0:T(8,128)(2,1)}',
  'KERNEL': 'bf16[128,128]{1,0:T(8,128)(2,1)S(1)}',
}.items():
  HLO = HLO.replace(_name, _type)


@pytest.fixture(scope='module')
def costs():
  return {cost.source or cost.op: cost for cost in hlo.Program(HLO).costs()}


BLOCK = 64 * 128 * 2


def test_a_loop_counts_as_often_as_it_runs_and_only_the_slices_that_it_touches(costs):
  product = costs['product']
  # Weights and result are in vector memory. A scalar takes a tile of 128.
  assert product.bytes == pytest.approx(16 * BLOCK, abs=16 * 512)
  assert product.flops == 16 * 2 * 64 * 128 * 128
  assert product.cycles == 16 * 50
  assert costs['store'].bytes == pytest.approx(16 * BLOCK, abs=16 * 512)


def test_narrow_arrays_count_with_their_padding(costs):
  assert costs['add'].bytes == 3 * 1000 * 128 * 4  # Two operands and the result.


def test_copies_to_vector_memory_are_read_once_and_buffers_cost_nothing(costs):
  assert costs['copy-start'].bytes == 128 * 128 * 2
  assert costs['custom-call'].bytes == 0
  assert len(costs) == 5


def test_largest_first():
  found = [cost.bytes for cost in hlo.Program(HLO).costs()]
  assert found == sorted(found, reverse=True)


def test_bytes_of_a_type_are_unpadded():
  assert hlo.array_bytes('(f32[10,4]{1,0:T(8,128)}, bf16[8]{0}, pred[3])') == [160, 16, 3]
