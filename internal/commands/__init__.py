"""The programs behind train.py, eval.py, render.py and scripts/."""
