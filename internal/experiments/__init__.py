"""Experiments: many training runs in one command."""
