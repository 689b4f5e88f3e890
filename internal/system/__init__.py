"""The operating system: atomic files, signals, progress on the terminal."""
