"""Runs commands as short processes, forked from a server that has imported everything.

`ProgramRunner` starts the server, which pays for the imports once. Each program is a process of its
own, with its own devices, and can be killed like any other.
"""

import gc
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

STEPS = 300
SMALLEST = (
  f'Config.max_steps = {STEPS}',
  'Config.print_every = 7',
  'Config.checkpoint_every = 30',
  f'Config.train_render_every = {STEPS}',
  'Config.batch_size = 8',
  'Config.factor = 0',
  'Config.render_chunk_size = 64',
  'Config.render_path_frames = 40',
  'Model.num_levels = 2',
  'Model.num_prop_samples = 4',
  'Model.num_nerf_samples = 4',
  'PropMLP.net_depth = 1',
  'PropMLP.net_width = 8',
  'PropMLP.max_deg_point = 2',
  'NerfMLP.net_depth = 1',
  'NerfMLP.net_width = 8',
  'NerfMLP.max_deg_point = 2',
  'NerfMLP.net_width_viewdirs = 8',
  'NerfMLP.bottleneck_width = 8',
)


def xla_flags(devices: int) -> str:
  """Returns XLA's flags for some CPU devices and fast compilation, which takes most of the time."""
  flags = f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
  if platform.machine() in ('x86_64', 'AMD64'):
    # What is fused changes rounding where the processor fuses multiplications with additions,
    # which AVX does not have.
    flags += ' --xla_cpu_max_isa=AVX'
    # Older code for fusions compiles in half the time. XLA ends a program for a flag that it does
    # not know, and from JAX 0.11 on it does not know this one.
    if importlib.metadata.version('jaxlib').startswith('0.10.'):
      flags += ' --xla_cpu_use_fusion_emitters=false'
  return flags


def arguments(capture, run, *bindings):
  """Returns arguments of train.py for a tiny model."""
  here = (f"Config.data_dir = '{capture}'", f"Config.checkpoint_dir = '{run}'")
  return ('--gin_configs=configs/360.gin', '--gin_bindings', *SMALLEST, *here, *bindings)


class RunningProgram:
  """A running program; the file `output` has its stdout and stderr."""

  def __init__(self, runner, pid, output):
    self._runner, self.pid, self.output = runner, pid, Path(output)

  def wait(self) -> int:
    """Returns its exit code, or minus the number of the signal that killed it."""
    self.until(lambda: False)
    return self._runner.ask({'wait': self.pid})

  def kill(self, signum=signal.SIGKILL) -> None:
    os.kill(self.pid, signum)  # Not reaped before `wait`, so the number is still its own.

  def text(self) -> str:
    return self.output.read_text() if self.output.exists() else ''

  def until(self, happened, seconds=120.0) -> bool:
    """Waits until `happened()`; returns False if the program ends first."""
    deadline = time.monotonic() + seconds
    while not happened():
      if not self._runner.ask({'is_running': self.pid}):
        return False
      assert time.monotonic() < deadline, self.text()
      time.sleep(0.002)
    return True


class ProgramRunner:
  """Starts processes of train.py, eval.py and render.py."""

  def __init__(self, env):
    self.env = env
    self._process = subprocess.Popen(
      [sys.executable, __file__], cwd=ROOT, env=env, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    self._lock = threading.Lock()

  def ask(self, question):
    with self._lock:
      self._process.stdin.write(json.dumps(question) + '\n')
      self._process.stdin.flush()
      return json.loads(self._process.stdout.readline())

  def start(self, program: str, args, output, constants=None, writes=True, **env) -> RunningProgram:
    """Starts a program with these arguments and environment variables.

    Args:
      program: 'train', 'eval' or 'render'.
      args: command-line arguments.
      output: file for stdout and stderr.
      constants: values for module constants in internal/devices.
      writes: False makes all writing to files fail.
      **env: environment variables.
    """
    start = {'program': program, 'args': list(args), 'output': str(output), 'env': env}
    start |= {'constants': constants or {}, 'writes': writes}
    return RunningProgram(self, self.ask({'start': start}), output)

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def _keep_own_programs() -> None:
  """Makes every process write its compiled programs to the cache, not only process 0."""
  from jax._src import compiler, distributed

  write, state = compiler._cache_write, distributed.global_state

  def keep(*args):
    process_id, state.process_id = state.process_id, 0
    try:
      write(*args)
    finally:
      state.process_id = process_id

  compiler._cache_write = keep


def _run(program, args, output, env, constants, writes) -> None:
  os.environ.update(env)
  _keep_own_programs()
  from internal.devices import processes, sharding

  for name, value in constants.items():
    for module in (processes, sharding):
      if hasattr(module, name):
        setattr(module, name, value)
  if not writes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
  out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  for stream in (1, 2):
    os.dup2(out, stream)
  # New objects, because the old ones remember whether the runner's own output could seek.
  sys.stdout, sys.stderr = (os.fdopen(s, 'w', closefd=False) for s in (1, 2))
  sys.argv = [program, *args]
  module = importlib.import_module(f'internal.commands.{program}')
  code = 1
  try:
    module.cli.run(module.main)
    code = 0
  except SystemExit as e:
    code = e.code
  except BaseException:
    traceback.print_exc()
  finally:
    threading._shutdown()  # Waits for threads, as a program that was not forked does at its end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
  sys.path.insert(0, str(ROOT))
  for name in ('train', 'eval', 'render'):
    importlib.import_module(f'internal.commands.{name}')
  gc.disable()  # Programs are short, and garbage collection takes a third of the time of tracing.

  for line in sys.stdin:
    ((what, value),) = json.loads(line).items()
    if what == 'start':
      answer = os.fork()
      if answer == 0:
        _run(**value)
    elif what == 'is_running':
      answer = os.waitid(os.P_PID, value, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    else:
      answer = os.waitstatus_to_exitcode(os.waitpid(value, 0)[1])
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  _serve()
