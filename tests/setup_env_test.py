"""setup_env.sh: which Python and JAX it chooses, and that a finished set-up is skipped."""

import os
import re
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SETUP = os.path.join(ROOT, 'scripts', 'setup_env.sh')


def bash(code, path=None, setup=SETUP, **variables):
  """Runs bash code after sourcing setup_env.sh, in an environment of only `variables`."""
  keep = {k: os.environ[k] for k in ('PATH', 'HOME') if k in os.environ}
  env = {**keep, **variables}
  if path:
    env['PATH'] = f'{path}:{env["PATH"]}'
  return subprocess.run(
    ['bash', '-c', f'set -euo pipefail; source "{setup}"; {code}'],
    env=env, capture_output=True, text=True,
  )  # fmt: skip


def executable(path, text):
  path.write_text(f'#!/bin/sh\n{text}\n')
  path.chmod(0o755)
  return path


@pytest.mark.parametrize(
  ('gpus', 'backend'),
  [
    ('580.159.04, 9.0', 'cuda13'),
    ('580.65.06, 7.5\n580.65.06, 9.0', 'cuda13'),
    ('595.1.2, 12.0', 'cuda13'),
    ('580.65.06, 7.0', 'cuda12'),  # CUDA 13 dropped Volta.
    ('550.54.15, 8.9', 'cuda12'),
    ('525.60.13, 8.0', 'cuda12'),
    ('470.82.01, 8.0', 'cpu'),
  ],
)
def test_driver_chooses_the_cuda_build(tmp_path, gpus, backend):
  executable(tmp_path / 'nvidia-smi', f"printf '%s\\n' '{gpus}'")
  got = bash('jax_backend', path=tmp_path)
  assert got.stdout.strip() == backend
  assert ('too old' in got.stderr) == (backend == 'cpu')


@pytest.mark.parametrize('text', ['exit 9', "echo 'No devices were found'"])
def test_no_working_driver_means_cpu(tmp_path, text):
  executable(tmp_path / 'nvidia-smi', text)
  assert bash('has_tpu() { return 1; }; jax_backend', path=tmp_path).stdout.strip() == 'cpu'


@pytest.mark.parametrize(
  ('devices', 'variables', 'backend'),
  [
    ('/dev/accel[0-9]*', {}, 'tpu'),
    ('/dev/vfio/[0-9]*', {'TPU_WORKER_ID': '0'}, 'tpu'),
    ('/dev/vfio/[0-9]*', {}, 'cpu'),  # Any device passed through to a virtual machine.
    ('none', {'TPU_WORKER_ID': '0'}, 'cpu'),
  ],
)
def test_tpu_is_detected_by_its_devices(tmp_path, devices, variables, backend):
  executable(tmp_path / 'nvidia-smi', 'exit 9')
  code = f"compgen() {{ [[ $2 = '{devices}' ]]; }}; jax_backend"
  assert bash(code, path=tmp_path, **variables).stdout.strip() == backend


def test_backend_can_be_set():
  assert bash('jax_backend', JAX_BACKEND='cuda12').stdout.strip() == 'cuda12'
  got = bash('jax_backend', JAX_BACKEND='rocm')
  assert got.returncode == 1
  assert got.stderr == 'error: JAX_BACKEND must be cpu, cuda12, cuda13 or tpu, got rocm.\n'


def test_python_can_be_set():
  assert bash('find_python', PYTHON=sys.executable).stdout.strip() == sys.executable


def test_unsupported_python_is_an_error(tmp_path):
  old = executable(tmp_path / 'python3.8', 'exit 1')
  for python in (str(old), '/nowhere/python'):
    got = bash('find_python', PYTHON=python)
    assert got.returncode == 1
    assert f'PYTHON={python} is not a working Python' in got.stderr


def test_no_python_is_an_error(tmp_path):
  tools = tmp_path / 'tools'
  tools.mkdir()
  for name in ('dirname', 'bash'):
    (tools / name).symlink_to(shutil.which(name))
  got = bash(f'PATH={tools}; find_python', VENV=str(tmp_path / 'venv'))
  assert got.returncode == 1
  assert got.stderr.startswith('error: no Python 3.11, 3.12 or 3.13 found')


def fake_python(path, log):
  """Makes a script that answers like Python and records `-m pip install` and `-m venv` in `log`."""
  return executable(
    path,
    f"""case "$*" in
      *sys.exit*|"-c ") exit 0 ;;
      *platform*) echo 3.12.9 ;;
      *importlib.metadata*) echo 0.11.2 ;;
      "-m venv"*) echo "$@" >>{log}; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
      "-m pip --version") echo "pip 25 from somewhere (python 3.12)" ;;
      "-m pip install"*)
        echo "$@" >>{log}
        [ -z "$PIP_BREAKS" ] || {{ echo "ERROR: no space"; exit 2; }} ;;
    esac""",
  )


@pytest.fixture
def fake_tree(tmp_path):
  """A checkout with a lock, and a fake Python. Returns the folder and a function that sets up."""
  (tmp_path / 'scripts').mkdir()
  shutil.copy(SETUP, tmp_path / 'scripts')
  (tmp_path / 'a.lock').write_text('jax==0.11.2\n')
  log = tmp_path / 'log'
  python = fake_python(tmp_path / 'python', log)

  def run(**variables):
    log.write_text('')
    got = bash(
      'setup_env a.lock; echo ready', setup=tmp_path / 'scripts' / 'setup_env.sh',
      **{'PYTHON': str(python), 'JAX_BACKEND': 'cpu', 'VENV': str(tmp_path / 'venv'),
         'PIP_BREAKS': '', **variables},
    )  # fmt: skip
    return got, log.read_text()

  return tmp_path, run


def test_second_set_up_is_skipped_until_something_changes(fake_tree):
  folder, run = fake_tree
  got, log = run()
  assert got.stdout.endswith('ready\n')
  assert '-m venv' in log
  assert f'-r {folder}/a.lock' in log
  assert run()[1] == ''
  got, log = run(JAX_BACKEND='cuda13')
  assert '-m venv' not in log
  assert f'jax[cuda13]==0.11.2 -c {folder}/a.lock' in log
  (folder / 'a.lock').write_text('jax==0.11.3\n')
  assert 'pip install' in run(JAX_BACKEND='cuda13')[1]
  assert run(JAX_BACKEND='cuda13')[1] == ''


def test_the_script_itself_makes_the_environment_and_says_what_is_next(fake_tree):
  folder, _ = fake_tree
  (folder / 'requirements.lock').write_text('jax==0.11.2\n')
  variables = {'PYTHON': str(folder / 'python'), 'JAX_BACKEND': 'cpu', 'VENV': str(folder / 'v')}
  got = subprocess.run(
    [folder / 'scripts' / 'setup_env.sh'], env={**os.environ, **variables, 'PIP_BREAKS': ''},
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert got.stdout.endswith(f'ready: source {folder}/v/bin/activate\n')
  assert f'-r {folder}/requirements.lock' in (folder / 'log').read_text()


def test_failed_install_is_shown_and_tried_again(fake_tree):
  _, run = fake_tree
  got, _ = run(PIP_BREAKS='1')
  assert got.returncode == 1
  assert 'ready' not in got.stdout
  assert 'ERROR: no space' in got.stderr
  assert 'install.log' in got.stderr
  got, log = run()
  assert got.stdout.endswith('ready\n')
  assert 'pip install' in log


def lock(name):
  with open(os.path.join(ROOT, name)) as f:
    return [line.strip() for line in f if line.strip() and not line.startswith('#')]


@pytest.mark.parametrize('name', ['requirements', 'requirements-dev'])
def test_locks_pin_every_requirement_exactly_and_name_no_host(name):
  pins = lock(f'{name}.lock')
  assert all(re.fullmatch(r'[a-z0-9-]+==[0-9.]+( ; [^/@]+)?', pin) for pin in pins), pins
  locked = {pin.split('==')[0] for pin in pins}
  for line in lock(f'{name}.txt'):
    if not line.startswith('-r'):
      assert re.split('[<>=]', line)[0].lower() in locked


def test_both_locks_agree():
  assert set(lock('requirements.lock')) <= set(lock('requirements-dev.lock'))
