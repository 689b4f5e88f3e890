"""Profiling: FLOPs, speed and memory of training and rendering."""
