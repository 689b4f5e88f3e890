"""Opens a trained scene in a web page.

Try `python scripts/view.py --help`; the program itself is internal/commands/view.py.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from internal.__main__ import main

if __name__ == '__main__':
  main(['view'])
