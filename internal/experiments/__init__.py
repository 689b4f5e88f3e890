"""Experiments: several training runs started by one command."""
