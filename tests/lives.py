"""Programs that live a short time: processes forked from one that has imported everything.

`Nursery` starts such a process, which pays for the imports once; each life is then a process of its
own, with devices of its own, that can be killed like any other.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Life:
  """A running program; `said` is the file of all that it says."""

  def __init__(self, nursery, pid, said):
    self._nursery, self.pid, self.said = nursery, pid, Path(said)

  def wait(self) -> int:
    """Its exit code, minus the signal's number if it was killed by one."""
    self.until(lambda: False)
    return self._nursery.ask({'wait': self.pid})

  def kill(self, signum=signal.SIGKILL) -> None:
    os.kill(self.pid, signum)  # Not reaped before `wait`, so the number is still its own.

  def text(self) -> str:
    return self.said.read_text() if self.said.exists() else ''

  def until(self, happened, seconds=120.0) -> bool:
    """Waits until `happened()`, or the end of the life: then False."""
    deadline = time.monotonic() + seconds
    while not happened():
      if not self._nursery.ask({'lives': self.pid}):
        return False
      assert time.monotonic() < deadline, self.text()
      time.sleep(0.002)
    return True


class Nursery:
  """Starts lives of train.py, eval.py and render.py."""

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

  def start(self, program: str, args, said, **env) -> Life:
    """Begins a life with these arguments and variables of its environment."""
    start = {'program': program, 'args': list(args), 'said': str(said), 'env': env}
    return Life(self, self.ask({'start': start}), said)

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def _live(program, args, said, env) -> None:
  os.environ.update(env)
  where = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  for stream in (1, 2):
    os.dup2(where, stream)
  sys.argv = [program, *args]
  module = importlib.import_module(program)
  code = 1
  try:
    module.cli.run(lambda: module.main(module.parse()) if program == 'train' else module.main())
    code = 0
  except SystemExit as e:
    code = e.code
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
  sys.path.insert(0, str(ROOT))
  for name in ('train', 'eval', 'render'):
    importlib.import_module(name)

  for line in sys.stdin:
    ((what, value),) = json.loads(line).items()
    if what == 'start':
      answer = os.fork()
      if answer == 0:
        _live(**value)
    elif what == 'lives':
      answer = os.waitid(os.P_PID, value, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    else:
      answer = os.waitstatus_to_exitcode(os.waitpid(value, 0)[1])
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  _serve()
