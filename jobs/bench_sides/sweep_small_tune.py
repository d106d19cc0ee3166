"""Ordinary Ray Tune trials of small batches: one a core at a time."""

from sweep_side import SMALL, SMALL_STEPS, measure

measure("algorithm: grid, fused: off", overrides=SMALL, steps=SMALL_STEPS, evaluate_every=SMALL_STEPS)
