"""scaling.py: its rows, speed-ups and errors, and a whole small run."""

import json
import types

import jax
import pytest
import tiny

from internal.commands import scaling
from internal.profiling import programs, scaling_tables

SMALLER = ('Model.num_levels = 2', 'PropMLP.net_depth = 1', 'NerfMLP.net_depth = 1')


def test_rows_are_each_batch_on_all_counts_and_the_smallest_batch_grown():
  assert scaling.points([16, 128], [1, 2, 4, 8]) == [
    (16, 1), (16, 2), (16, 4), (16, 8), (32, 2), (64, 4), (128, 1), (128, 2), (128, 4), (128, 8),
  ]  # fmt: skip


def test_speedups_compare_with_one_device_and_the_same_or_the_smallest_batch():
  rows = [
    {'kind': 'train', 'batch': b, 'devices': n, 'rays_per_second': r}
    for b, n, r in ((16, 1, 100.0), (16, 2, 150.0), (32, 1, 110.0), (32, 2, 198.0))
  ]
  rows.append({'kind': 'render', 'batch': 32, 'devices': 2, 'rays_per_second': 7.0})
  scaling_tables.add_speedups(rows, 16)
  assert [row.get('speedup') for row in rows] == [1.0, 1.5, 1.0, pytest.approx(1.8), None]
  grown = [row.get('growing_speedup') for row in rows]
  assert grown == [1.0, None, None, pytest.approx(1.98), None]
  assert rows[3]['of_linear'] == pytest.approx(0.99)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [(['--devices', '1', '16'], 'must be from 1 to 8'), (['--batches', '12'], 'must be multiples')],
)
def test_impossible_measurements_are_errors(monkeypatch, flags, message):
  monkeypatch.setattr(scaling, 'probe', lambda: ('cpu', 'cpu', 8))
  with pytest.raises(scaling.ScalingError, match=message):
    scaling.parse(['--out', 'x', *flags])


def test_names_of_collectives_on_gpus_and_cpus():
  for name in (
    'ncclDevKernel_AllReduce_Sum_f32_RING_LL',
    'all-reduce.3',
    'all_reduce_fusion',
    'psum.7',
  ):
    assert scaling._COLLECTIVE.search(name)
  for name in ('loop_add_fusion_3', 'gemm_fusion', 'input_reduce_fusion'):
    assert not scaling._COLLECTIVE.search(name)


def test_a_program_gets_its_own_devices(monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6,7')
  assert scaling.visible('gpu', 3) == {'CUDA_VISIBLE_DEVICES': '4,5,6'}
  assert scaling.visible('cpu', 3) == {'XLA_FLAGS': '--xla_force_host_platform_device_count=3'}


def test_losses_on_one_device_and_on_all_are_compared():
  rows = [
    {'devices': 1, 'losses': [2.0, 1.0]},
    {'devices': 2},
    {'devices': 8, 'losses': [2.0, 1.1]},
  ]
  assert scaling_tables.loss_difference(rows) == (2, pytest.approx(0.05), pytest.approx(0.1))
  assert scaling_tables.loss_difference(rows[:2]) is None


@pytest.mark.hammer
def test_a_small_run_that_is_interrupted_and_resumed(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(scaling, 'probe', lambda: ('cpu', 'cpu', 8))
  cams_and_pixels = programs.synthetic()
  monkeypatch.setattr(programs, 'synthetic', lambda: cams_and_pixels)
  gin = tmp_path / 'a.gin'
  gin.write_text('\n'.join([*tiny.TINY, *SMALLER]))
  out = tmp_path / 'out'
  flags = ['--out', str(out), '--gin_configs', str(gin), '--only', 'rates', '--batches', '32']
  flags += ['--seconds', '0.01', '--steps', '3', '--devices', '1', '2', '--threads', '4']
  measure, measured = scaling.measure, []

  def measure_all_but_the_last(program, *args):
    measured.append(program.rays)
    if len(measured) == 6:
      raise KeyboardInterrupt
    return measure(program, *args)

  monkeypatch.setattr(scaling, 'measure', measure_all_but_the_last)
  with pytest.raises(KeyboardInterrupt):
    scaling.main(flags)
  begun = json.loads((out / 'scaling.json').read_text())['configs'][str(gin)]['rates']
  grown = [('train', 32, 1), ('render', 32, 1), ('train', 64, 2), ('render', 64, 2)]
  same = [('train', 32, 2), ('render', 32, 2)]
  assert [(r['kind'], r['batch'], r['devices']) for r in begun] == [*grown, same[0]]
  scaling.main(flags)
  assert measured == [32, 32, 64, 64, 32, 32, 32]  # Only the last one again.
  found = json.loads((out / 'scaling.json').read_text())
  assert found['jax'] == jax.__version__
  resumed = found['configs'][str(gin)]['rates']
  assert resumed[:5] == begun
  rows = {(r['kind'], r['batch'], r['devices']): r for r in resumed}
  assert rows.keys() == {*grown, *same}
  assert all(r['rays_per_second'] > 0 and r['collective_ms'] >= 0 for r in rows.values())
  assert all(0 < r['own_ms_fastest'] <= r['own_ms_slowest'] for r in rows.values())
  assert rows['render', 64, 2]['of_linear'] == rows['render', 64, 2]['growing_speedup'] / 2
  alone, two = rows['train', 32, 1], rows['train', 64, 2]
  assert two['collective_ms'] > 2 * alone['collective_ms']  # One device has no collectives.
  assert len(set(alone['losses'])) == 3
  assert scaling_tables.loss_difference(resumed)[2] < 1e-5
  table = (out / 'scaling.md').read_text()
  assert '| train | 64 | 2 |' in table
  assert 'Losses of the first 3 steps' in table
  products = found['configs'][str(gin)]['products']
  assert len(products['alone']) == 1
  assert len(products['together']) == 2
  assert table in capsys.readouterr().out
  picture = (out / 'scaling.svg').read_text()
  assert 'a.gin, training' in picture
  with pytest.raises(scaling.ScalingError, match=r'measured with seconds 0\.01, not 0\.02'):
    scaling.main([*flags, '--seconds', '0.02'])


def test_rates_are_measured_by_a_process_that_then_frees_the_devices(tmp_path, monkeypatch):
  monkeypatch.setattr(scaling, 'probe', lambda: ('cpu', 'cpu', 8))
  seen = []
  monkeypatch.setattr(scaling.subprocess, 'run', lambda command, **_: seen.append(command))
  monkeypatch.setattr(scaling, 'measure_programs', lambda *_: seen.append('programs'))
  monkeypatch.setattr(scaling, 'measure_rates', lambda *_: seen.append('rates'))
  scaling.main(['--out', str(tmp_path / 'out'), '--gin_configs', 'a.gin', '--devices', '1'])
  command, *rest = seen
  assert command[2:] == ['--out', str(tmp_path / 'out'), '--gin_configs', 'a.gin', '--devices', '1',
                         '--only', 'rates']  # fmt: skip
  assert rest == ['programs']


def test_each_scene_gets_its_own_device(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1,2,3')
  monkeypatch.setattr(
    scaling.subprocess, 'run', lambda command, **how: seen.append((list(map(str, command)), how))
  )
  names = scaling.make_scenes(str(tmp_path), 3)
  assert len(names) == 3
  assert all((tmp_path / name).is_symlink() for name in names)
  args = types.SimpleNamespace(platform='gpu', gin_bindings=['Config.near = 1'], scene_steps=7)
  assert scaling.dataset_seconds('a.gin', str(tmp_path), names, args) >= 0
  command, how = seen[-1]
  assert how['env']['CUDA_VISIBLE_DEVICES'] == '0,1,2'
  assert [command[command.index('--scenes') + k] for k in (1, 2, 3)] == names
  assert {'Config.near = 1', 'Config.max_steps = 7'} <= set(command)
  with pytest.raises(scaling.ScalingError, match='has 9 scenes'):
    scaling.make_scenes(str(tmp_path), 10)
