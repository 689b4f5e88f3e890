"""The package as others install it: a wheel, used from an empty folder under its public name."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import program_runner
import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ('--gin_bindings', 'Config.batch_size = 64', 'Config.max_steps = 3', 'Config.factor = 0',
         'Config.render_chunk_size = 64', 'Config.train_render_every = 0')  # fmt: skip


def _git_files() -> list[str]:
  return subprocess.run(
    ['git', 'ls-files', '--cached', '--others', '--exclude-standard'],
    cwd=ROOT, capture_output=True, text=True, check=True,
  ).stdout.split('\n')[:-1]  # fmt: skip


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Built from a copy, since building writes beside the sources."""
  source, out = (tmp_path_factory.mktemp(name) for name in ('source', 'wheel'))
  for name in filter(os.path.isfile, (ROOT / f for f in _git_files())):
    copy = source / name.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(name.read_bytes())
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'wheel', '-q', '--no-deps']
  subprocess.run([*pip, '-w', out, source], check=True)
  (built,) = out.glob('*.whl')
  return built


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
  """`run(*words)`: runs Python in an empty folder that sees the wheel and another `internal`."""
  site, other, empty = (tmp_path_factory.mktemp(name) for name in ('site', 'other', 'empty'))
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'install', '-q', '--no-deps']
  subprocess.run([*pip, '--target', site, wheel], check=True)
  (other / 'internal').mkdir()
  (other / 'internal' / '__init__.py').write_text('OWNER = "another project"\n')
  path = os.pathsep.join((str(other), str(site)))
  env = {**os.environ, 'PYTHONPATH': path, 'XLA_FLAGS': program_runner.xla_flags(1)}

  def run(*words):
    done = subprocess.run(
      [sys.executable, *words], cwd=empty, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  return run


def test_wheel_has_every_module_and_config(wheel):
  def shipped(name):
    return name.startswith(('internal/', 'configs/')) and not name.endswith('.md')

  wanted = {
    name.replace('internal/', 'mipnerf360/').replace('configs/', 'mipnerf360/bundled/configs/')
    for name in filter(shipped, _git_files())
    if (ROOT / name).exists()
  }
  names = {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
  assert names == wanted


def test_extras_are_the_requirements_files():
  extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']['dynamic']
  files = {f'requirements-{name}.txt' for name in extras['optional-dependencies']}
  wanted = {path.name for path in ROOT.glob('requirements-*.txt')} - {'requirements-dev.txt'}
  assert files == wanted


def test_functions_import_beside_another_internal(installed):
  code = """
import internal
from mipnerf360 import configs, coord, geopoly, render, stepfun
assert internal.OWNER == 'another project'
assert geopoly.generate_basis('icosahedron', 2).shape == (3, 21)
assert configs.load_config(['configs/360_fast.gin']).config.far == 1e6
"""
  installed('-c', code)


def test_console_command_makes_trains_and_evaluates(installed):
  command = ('-m', 'mipnerf360')
  assert 'mipnerf360 train --config' in installed(*command, 'train', '--help')
  installed(*command, 'demo_scene', 'scene', '--width', '32', '--height', '24', '--images', '9')
  here = ("Config.data_dir = 'scene'", "Config.checkpoint_dir = 'run'")
  said = installed(*command, 'train', '--gin_configs', 'configs/debug.gin', *SMALL, *here)
  assert 'mipnerf360 eval run' in said
  assert 'PSNR' in installed(*command, 'eval', 'run').upper()


_EDITABLE = """
import importlib.util, sys
place = ['internal']
spec = importlib.util.spec_from_file_location(
  'mipnerf360', 'internal/__init__.py', submodule_search_locations=place)
sys.modules['mipnerf360'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules['mipnerf360'])
"""


@pytest.mark.parametrize('before', ['', _EDITABLE], ids=['checkout', 'editable install'])
def test_both_names_are_one_package_in_a_checkout(before):
  code = f"""{before}
import internal, mipnerf360
import internal.fields.grid as one, mipnerf360.fields.grid as two
from internal import stepfun
from mipnerf360 import stepfun as same
assert one is two and stepfun is same and internal is mipnerf360
"""
  subprocess.run([sys.executable, '-W', 'error', '-c', code], cwd=ROOT, check=True)
