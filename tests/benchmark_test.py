import dataclasses
import json
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from internal import configs
from internal.commands import benchmark
from internal.profiling import benchmark_tables, costs, programs, regressions
from tests import captures, tiny


def flops_of(layers):
  """FLOPs of a training step in layers (inputs, outputs, inputs that need gradients)."""
  return sum(2 * o * (2 * i + needing) for i, o, needing in layers)


class TestRayFlops:
  def test_of_the_published_config(self):
    flops = costs.ray_flops(configs.load_config(['configs/360.gin']))
    assert flops['train'] == pytest.approx(1.82e9, rel=5e-3)
    assert flops['train'] * 16384 == pytest.approx(29.8e12, rel=5e-3)
    assert flops['render'] == pytest.approx(0.64e9, rel=5e-3)

  def test_layer_by_layer(self):
    settings = tiny.settings('NerfMLP.bottleneck_width = 8', 'NerfMLP.net_width_viewdirs = 6')
    encoding, view = 2 * 12 * 21, 2 * 3 * 4 + 3
    nerf = [(encoding, 16, 0), (16, 16, 16), (16, 1, 16), (16, 8, 16), (8 + view, 6, 8), (6, 3, 6)]
    prop = [(encoding, 16, 0), (16, 16, 16), (16, 1, 16)]
    assert costs.ray_flops(settings)['train'] == 4 * flops_of(nerf) + 2 * 8 * flops_of(prop)

  def test_only_every_nth_ray_has_a_gradient_of_the_proposals(self):
    flops = {n: costs.ray_flops(tiny.settings(f'Config.interlevel_every = {n}')) for n in (1, 4)}
    prop = [(2 * 12 * 21, 16, 0), (16, 16, 16), (16, 1, 16)]
    forward = 2 * sum(inputs * outputs for inputs, outputs, _ in prop)
    saved = 2 * 8 * (flops_of(prop) - forward) * 3 / 4
    assert flops[1]['train'] - flops[4]['train'] == pytest.approx(saved)
    assert flops[1]['render'] == flops[4]['render']

  def test_the_encoding_joined_by_a_skip_needs_no_gradient(self):
    deep = 'NerfMLP.net_depth = 4'
    flops = [costs.ray_flops(tiny.settings(deep, f'NerfMLP.skip_layer = {k}')) for k in (2, 8)]
    rows = 2 * 12 * 21 * 16 * 4  # Weights that see the encoding again, times samples.
    assert flops[0]['render'] - flops[1]['render'] == 2 * rows
    assert flops[0]['train'] - flops[1]['train'] == 4 * rows  # Forward and the kernel's gradient.

  def test_grids_cost_only_their_layers_whose_inputs_need_gradients(self):
    settings = tiny.settings(
      *(f'{m}.{b}' for m in ('NerfMLP', 'PropMLP') for b in ("encoding = 'grid'", 'net_depth = 1')),
      'Model.separate_prop_mlps = True',
      'NerfMLP.grid_levels = 3',
      'PropMLP.grid_levels = (1, 2)',
      'NerfMLP.bottleneck_width = 8',
      'NerfMLP.net_width_viewdirs = 6',
    )
    view = 2 * 3 * 4 + 3
    nerf = [(12, 16, 12), (16, 1, 16), (16, 8, 16), (8 + view, 6, 8), (6, 3, 6)]
    prop = [(4, 16, 4), (16, 1, 16), (8, 16, 8), (16, 1, 16)]  # Of both proposal levels.
    assert costs.ray_flops(settings)['train'] == 4 * flops_of(nerf) + 8 * flops_of(prop)

  def test_coarse_colours_count_only_if_a_loss_uses_them(self):
    coloured = ('PropMLP.disable_rgb = False',)
    unseen, seen = (
      costs.ray_flops(tiny.settings(*coloured, f'Config.data_coarse_loss_mult = {mult}'))
      for mult in (0.0, 0.1)
    )
    assert unseen == costs.ray_flops(tiny.settings())
    assert seen['train'] > unseen['train']
    assert seen['render'] == unseen['render']


class TestKernels:
  """On a handwritten trace: planes of two GPUs, with kernels and other events."""

  GPU = """
    planes {{
      id: {id} name: "/device:GPU:{id}"
      event_metadata {{ key: 1 value {{ id: 1 name: "gemm" }} }}
      event_metadata {{ key: 2 value {{ id: 2 name: "fusion_3" }} }}
      event_metadata {{ key: 3 value {{ id: 3 name: "a whole step" }} }}
      stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
      lines {{
        id: 1 name: "Stream #13(Compute)"
        events {{ metadata_id: 1 duration_ps: 4000000000
                  stats {{ metadata_id: 1 str_value: "dot.1" }} }}
        events {{ metadata_id: 1 offset_ps: 5000000000 duration_ps: 2000000000
                  stats {{ metadata_id: 1 str_value: "dot.2" }} }}
        events {{ metadata_id: 2 offset_ps: 8000000000 duration_ps: 1000000000 }}
      }}
      lines {{ id: 2 name: "Steps" events {{ metadata_id: 3 duration_ps: 9000000000 }} }}
    }}
  """

  def test_sums_by_name_per_step_and_device(self, tmp_path):
    text = self.GPU.format(id=0) + self.GPU.format(id=1) + 'planes { id: 9 name: "/host:CPU" }'
    data = jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    (tmp_path / 'host.xplane.pb').write_bytes(data)
    hlo = '  %dot.1 = f32[2] dot(a, b), metadata={op_name="jit(f)/trunk_0"}\n  dot.2 = f32[2] dot()'
    found = costs.kernels(str(tmp_path), 2, costs.op_names(hlo))
    assert found == [
      costs.Kernel('gemm', 3.0, 1.0, 'jit(f)/trunk_0'),
      costs.Kernel('fusion_3', 0.5, 0.5, ''),
    ]

  def test_no_trace_no_kernels(self, tmp_path):
    assert costs.kernels(str(tmp_path), 1) == []


class TestTimeGroups:
  def test_a_call_of_known_duration(self, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(costs, 'time', SimpleNamespace(perf_counter=lambda: clock.now))
    lengths = iter([9.0, 0.1, *[0.1] * 3, *[0.2] * 3, *[0.3] * 3, *[0.4] * 99])

    def call():
      clock.now += next(lengths)
      return np.zeros(1)

    timed = costs.time_groups(call, 3.0)
    assert timed['calls_per_group'] == 3
    assert timed['groups'] == 4
    assert timed['ms'] == pytest.approx(250)
    assert timed['ms_10'] == pytest.approx(130)

  def test_few_calls_are_in_flight_at_a_time(self):
    class Started:
      def block_until_ready(self):
        waiting.discard(self)

    waiting, counts = set(), []

    def call():
      waiting.add(started := Started())
      counts.append(len(waiting))
      return started

    timed = costs.time_groups(call, 0.0)
    assert timed['calls_per_group'] == 100
    assert max(counts) == 9
    assert not waiting


class TestParts:
  def parts(self, *argv):
    return benchmark.parse(argv).parts

  def test_default_and_on_request(self):
    assert self.parts() == ['matmul', 'train', 'render']
    assert self.parts('--data', 'scene') == ['matmul', 'train', 'real', 'render']
    assert self.parts('--only', 'render,train') == ['train', 'render']
    assert self.parts('--only', 'matmul', '--sweep', 'width') == ['matmul', 'sweep']

  def test_unknown_parts_are_errors(self, capsys):
    for flag, name in (('--only', 'trian'), ('--sweep', 'depth')):
      with pytest.raises(SystemExit):
        benchmark.parse([flag, name])
      assert f'not {name}' in capsys.readouterr().err

  def test_data_and_factor_become_bindings(self):
    args = benchmark.parse(['--data', "it's here", '--factor', '2'])
    config = configs.load_config(args.gin_configs, args.gin_bindings).config
    assert (config.data_dir, config.factor) == ("it's here", 2)


class TestSweepPoints:
  @pytest.mark.parametrize('kind', benchmark.SWEEPS)
  def test_each_point_changes_one_part_of_the_settings(self, kind):
    settings = tiny.settings()
    points = benchmark.sweep_points(kind, settings)
    assert len({label for label, _ in points}) == len(points) >= 3
    for _, point in points:
      parts = [f.name for f in dataclasses.fields(point)]
      changed = [p for p in parts if getattr(point, p) != getattr(settings, p)]
      assert len(changed) <= 1

  def test_costs_table(self):
    row = {'ms': 2.0, 'rays_per_second': 1e6, 'tflops': 0.5, 'temp_bytes': 2**31}
    points = [{'label': 'a', 'train': row, 'render': {'name': 'b', 'error': 'out of memory'}}]
    line = benchmark_tables.cost_table(points).splitlines()[-1]
    assert line.startswith('| a | 2.00 | 1,000,000 | 0.5 |  | 2.00 | failed |')


def run(folder, *argv):
  """Returns the results of a run with the tiny config."""
  out = folder / 'out.json'
  benchmark.main(['--gin_bindings', *tiny.TINY, 'Model.num_levels = 2', '--json', str(out), *argv])
  return json.loads(out.read_text())


@pytest.fixture(scope='module')
def results(tmp_path_factory):
  """Results of the default parts on two devices, with profiles."""
  folder = tmp_path_factory.mktemp('benchmark')
  name = 'jax_compilation_cache_include_metadata_in_key'
  before = getattr(jax.config, name)
  yield run(folder, '--devices', '2', '--profile', str(folder / 'trace'), '--seconds', '0.2')
  jax.config.update(name, before)


@pytest.fixture
def stand_ins(monkeypatch):
  """Replaces the programs by some that need no compilation; returns how each was made."""
  made = []

  def make(kind):
    def program(settings, mesh, cams, *_):
      made.append((kind, mesh.size, cams.size[0].tolist()))
      return programs.Program(lambda: np.zeros(1), 64, {'compile_seconds': 1.0}, '')

    return program

  for kind in ('train', 'render'):
    monkeypatch.setattr(programs, f'{kind}_program', make(kind))
  leave_garbage(monkeypatch)
  return made


def leave_garbage(monkeypatch):
  """Skips garbage collection, which frees nothing of stand-ins and takes long after other tests."""
  for module in (benchmark, programs):
    monkeypatch.setattr(module, 'gc', SimpleNamespace(collect=lambda: None))


class TestRun:
  def test_describes_itself(self, results):
    assert results['jax'] == jax.__version__
    assert (results['platform'], results['devices_used'], results['shrunk']) == ('cpu', 2, False)
    assert results['flops_per_step'] == 64 * results['flops_per_ray_train']

  @pytest.mark.parametrize('part', ['train', 'render'])
  def test_rows(self, results, part):
    row = results[part]
    assert (row['rays'], row['devices']) == (64, 2)
    assert 0 < row['ms_10'] <= row['ms'] <= row['ms_90']
    assert row['rays_per_second'] == pytest.approx(64 / row['ms'] * 1e3)
    assert row['tflops'] == pytest.approx(64 * results[f'flops_per_ray_{part}'] / row['ms'] / 1e9)
    chip = results['matmul']['float32']['tflops']
    assert row['fraction_of_chip'] == pytest.approx(row['tflops'] / (2 * chip))
    assert row['compile_seconds'] > row['first_call_seconds'] > 0  # It was compiled before.
    assert row['temp_bytes'] > row['argument_bytes'] > 0

  @pytest.mark.parametrize('part', ['train', 'render'])
  def test_profile(self, results, part):
    found = results[part]['profile']['kernels']
    assert any('nerf_mlp' in k['source'] for k in found)
    assert sum(k['ms'] for k in found) == pytest.approx(results[part]['profile']['kernel_ms'])
    assert [k['ms'] for k in found] == sorted((k['ms'] for k in found), reverse=True)


class TestOtherParts:
  def test_a_real_capture_beside_the_synthetic_one(self, tmp_path, stand_ins):
    captures.write_colmap(tmp_path / 'scene', 9)
    data = '--data', str(tmp_path / 'scene')
    results = run(tmp_path, '--only', 'train,real', '--seconds', '0', *data)
    assert results['real']['pixels_on'] == 'device'
    assert results['real']['ms_ratio_to_synthetic'] > 0
    assert [size for _, _, size in stand_ins] == [[96, 64], list(captures.SIZE)]

  def test_a_failure_is_shown_and_the_rest_runs(self, tmp_path, stand_ins, monkeypatch, capsys):
    def no_memory(*_):
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of\nmemory')

    monkeypatch.setattr(programs, 'train_program', no_memory)
    results = run(tmp_path, '--only', 'train,render', '--sweep', 'width', '--seconds', '0')
    assert 'Out of memory' in results['train']['error']
    assert results['render']['ms'] >= 0
    points = results['sweep']['width']
    assert [('error' in p['train'], 'error' in p['render']) for p in points] == [(True, False)] * 3
    assert 'failed' in capsys.readouterr().out

  @pytest.mark.hammer
  def test_a_sweep_measures_nothing_twice(self, tmp_path, stand_ins):
    results = run(tmp_path, '--only', 'train', '--sweep', 'batch', '--seconds', '0')
    points = results['sweep']['batch']
    assert points[2]['train']['ms'] == results['train']['ms']
    assert [kind for kind, *_ in stand_ins] == ['train', *['train', 'render'] * 2, 'render',
                                                'train', 'render']  # fmt: skip

  @pytest.mark.hammer
  def test_busy_processes_beside_one_and_many_steps_a_dispatch(self, tmp_path, monkeypatch):
    alive, made = [], []

    def program(*args):
      made.append(args[4])
      return programs.Program(lambda: alive.append(len(children())) or np.zeros(1), 64, {}, '')

    monkeypatch.setattr(programs, 'train_program', program)
    before = len(children())
    results = run(tmp_path, '--only', 'busy', '--busy', '2', '--seconds', '0')
    assert made == [True, False]
    assert len(children()) == before
    for rows in results['busy'].values():
      assert [row['name'].split(', ')[1] for row in rows.values()] == ['0 busy', '2 busy']
    changes = [a for a, b in zip(alive, [None, *alive]) if a != b]
    assert changes == [before, before + 2] * 2

  def test_too_many_devices(self, tmp_path):
    with pytest.raises(configs.ConfigError, match='--devices must be from 1 to 8'):
      run(tmp_path, '--devices', '99')


def children():
  """The ids of this process's children that run."""
  found = set()
  for task in os.listdir('/proc/self/task'):
    with open(f'/proc/self/task/{task}/children') as f:
      found |= set(f.read().split())
  return found


class TestProgram:
  def test_a_call_of_many_steps_is_timed_as_steps(self, monkeypatch):
    clock, paces = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(costs, 'time', SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(programs, 'time', SimpleNamespace(perf_counter=lambda: clock.now))

    def pace(seconds):
      paces.append(seconds)
      return 1 if seconds == np.inf else 4

    def call():
      clock.now += 0.002 * (1 if len(paces) < 2 else 4)
      return np.zeros(1)

    row = programs.Program(call, 64, {}, '', pace).time(0.1)
    assert paces == [np.inf, pytest.approx(0.002)]
    assert row['steps_per_call'] == 4
    assert [row[k] for k in ('ms', 'ms_10', 'ms_90')] == pytest.approx([2, 2, 2])
    assert row['rays_per_second'] == pytest.approx(32000)

  def test_training_by_many_steps(self):
    mesh, (cams, store) = tiny.mesh(1), programs.synthetic()
    settings = tiny.settings('Config.steps_per_dispatch = 3')
    program = programs.synthetic_program('train', settings, mesh, cams, store)
    losses = program.losses(4)
    assert program.pace(1e-6) == 3
    assert program.call().shape[0] == 3
    assert len(program.rows()) == 7
    assert losses == [row['loss'] for row in program.rows()[:4]]
    assert program.pace(np.inf) == 1


class TestAgainst:
  """Rates by TFLOP/s of products: 640 / 2 before."""

  @pytest.fixture
  def measured(self, monkeypatch):
    """Stands in for measurements; its values are those of the next run."""
    now = {'tflops': 2.0, 'train': 640.0, 'render': 640.0}
    product = {'name': 'product', 'devices': 1, 'ms': 1.0}

    def program(kind):
      row = {'ms': 1.0}

      def time(_):
        if now[kind] is None:
          raise MemoryError('too little')
        return {**row, 'rays_per_second': now[kind]}

      return SimpleNamespace(rays=64, facts={}, time=time)

    leave_garbage(monkeypatch)
    monkeypatch.setattr(programs, 'matmul_row', lambda *_: {**product, 'tflops': now['tflops']})
    monkeypatch.setattr(programs, 'synthetic_program', lambda kind, *_: program(kind))
    return now

  @pytest.fixture
  def before(self, tmp_path, measured):
    run(tmp_path, '--seconds', '0')
    return str((tmp_path / 'out.json').rename(tmp_path / 'before.json'))

  def test_a_slower_chip_is_no_loss(self, tmp_path, measured, before, capsys):
    measured.update(tflops=1.0, train=300.0, render=400.0)
    run(tmp_path, '--against', before)
    said = capsys.readouterr().out
    assert 'train: 0.938 x the earlier rate' in said
    assert 'render: 1.250 x the earlier rate' in said
    assert 'is lost' not in said

  @pytest.mark.parametrize('render', [570.0, None])
  def test_a_tenth_less_ends_with_an_error(self, tmp_path, measured, before, capsys, render):
    measured.update(render=render)
    with pytest.raises(SystemExit) as end:
      run(tmp_path, '--only', 'train,render', '--against', before)
    assert end.value.code == 1
    lost = [
      line for line in capsys.readouterr().out.splitlines() if 'more than 10% is lost' in line
    ]
    assert [line.split(':')[0] for line in lost] == ['render']

  def test_other_settings_cannot_be_compared(self, tmp_path, before):
    with pytest.raises(regressions.AgainstError, match='batch_size was 64 and is 32'):
      benchmark.main(['--gin_bindings', *tiny.TINY, 'Config.batch_size = 32', '--against', before])

  def test_parts_must_be_shared(self, tmp_path, measured, before):
    with pytest.raises(regressions.AgainstError, match='none of the parts'):
      run(tmp_path, '--only', 'matmul', '--against', before)
    run(tmp_path, '--only', 'matmul')
    with pytest.raises(regressions.AgainstError, match='no rates to compare with'):
      run(tmp_path, '--against', str(tmp_path / 'out.json'))


def test_a_cpu_takes_fewer_rays():
  settings = configs.load_config(['configs/360.gin'])
  config = benchmark.shrink(settings).config
  assert (config.batch_size, config.render_chunk_size) == (256, 256)
  assert benchmark.shrink(tiny.settings()) == tiny.settings()
