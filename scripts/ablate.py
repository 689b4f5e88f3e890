"""Trains variants of one method on a scene and tabulates them.

Try `python scripts/ablate.py --help`; the program itself is internal/commands/ablate.py.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from internal.__main__ import main

if __name__ == '__main__':
  main(['ablate'])
