"""Trials as Ray Tune trials, each a training run of its own."""
