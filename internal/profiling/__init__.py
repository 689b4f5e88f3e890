"""Profiling: what a step costs, counted and measured."""
