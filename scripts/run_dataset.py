"""Trains and evaluates all scenes of a dataset.

Try `python scripts/run_dataset.py --help`; the program itself is internal/commands/run_dataset.py.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from internal.__main__ import main

if __name__ == '__main__':
  main(['run_dataset'])
