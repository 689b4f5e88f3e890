"""Makes the demo capture.

Try `python scripts/make_demo_scene.py --help`; the program itself is
internal/commands/demo_scene.py.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from internal.__main__ import main

if __name__ == '__main__':
  main(['demo_scene'])
