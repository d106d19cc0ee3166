"""Ray Train: the driver's trainer, the worker, and the function that is shipped to it."""
