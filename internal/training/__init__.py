"""Training: the compiled step, its data, and what a run keeps on disk."""
