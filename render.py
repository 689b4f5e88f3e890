"""Renders a video of a trained scene.

Try `python render.py --help`; the program itself is internal/commands/render.py.
"""

from internal.__main__ import main

if __name__ == '__main__':
  main(['render'])
