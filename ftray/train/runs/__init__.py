"""A run's directory on a disk or in an object store: claimed, followed, finalized."""
