"""Measures how fast training and rendering are.

Try `python scripts/benchmark.py --help`; the program itself is internal/commands/benchmark.py.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from internal.__main__ import main

if __name__ == '__main__':
  main(['benchmark'])
