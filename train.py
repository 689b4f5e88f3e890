"""Trains a scene.

Try `python train.py --help`; the program itself is internal/commands/train.py.
"""

from internal.__main__ import main

if __name__ == '__main__':
  main(['train'])
