import json

import pytest

from internal import configs, profiling
from scripts import benchmark
from tests import tiny


class TestRayFlops:
  def test_of_the_published_config(self):
    flops = profiling.ray_flops(configs.load_config(['configs/360.gin']))
    assert flops['train'] == pytest.approx(1.82e9, rel=5e-3)
    assert flops['train'] * 16384 == pytest.approx(29.8e12, rel=5e-3)
    assert flops['render'] == pytest.approx(0.64e9, rel=5e-3)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
  folder = tmp_path_factory.mktemp('benchmark')
  benchmark.main([
    '--gin_bindings', *tiny.TINY, '--json', str(folder / 'out.json'),
    '--profile', str(folder / 'trace'), '--seconds', '0.2',
  ])  # fmt: skip
  return json.loads((folder / 'out.json').read_text())


def test_rows(results):
  for part, rays in (('train', 64), ('render', 64)):
    row = results[part]
    assert row['rays'] == rays
    assert row['ms_10'] <= row['ms'] <= row['ms_90']
    assert row['rays_per_second'] == pytest.approx(rays / row['ms'] * 1e3)
    assert row['compile_seconds'] > 0


def test_kernels(results):
  for part in ('train', 'render'):
    kernels = results[part]['profile']['kernels']
    assert len(kernels) > 10
    assert any('trunk_0/dot_general' in k['source'] for k in kernels)
