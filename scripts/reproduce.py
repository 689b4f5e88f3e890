"""Trains and evaluates a row of the results table, and compares it with the stored figures.

Try `python scripts/reproduce.py --help`; the program itself is internal/commands/reproduce.py.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from internal.__main__ import main

if __name__ == '__main__':
  main(['reproduce'])
