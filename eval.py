"""Evaluates a trained scene on its test images.

Try `python eval.py --help`; the program itself is internal/commands/eval.py.
"""

from internal.__main__ import main

if __name__ == '__main__':
  main(['eval'])
