"""Compiles the training step and the renderer for a TPU that is only described.

Try `python scripts/compile_for.py --help`; the program itself is internal/commands/compile.py.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from internal.__main__ import main

if __name__ == '__main__':
  main(['compile'])
