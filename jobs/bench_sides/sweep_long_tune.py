"""Ordinary Ray Tune trials of the quickstart's whole length: one a core at a time."""

from sweep_side import LONG_EVALUATE_EVERY, LONG_STEPS, measure

measure("algorithm: grid, fused: off", steps=LONG_STEPS, evaluate_every=LONG_EVALUATE_EVERY)
