"""Runs side by side in one process group over one frozen base: coordinator, workers, members."""
