"""Fused trials of small batches over one base."""

from sweep_side import SMALL, SMALL_STEPS, measure

measure("algorithm: grid, fused: 8", overrides=SMALL, steps=SMALL_STEPS, evaluate_every=SMALL_STEPS)
