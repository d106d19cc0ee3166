"""Fused trials of the quickstart's whole length, stopped early by ASHA."""

from sweep_side import LONG_EVALUATE_EVERY, LONG_STEPS, measure

measure(
    "algorithm: grid, fused: 8, scheduler: asha, grace_steps: 2, reduction_factor: 4",
    steps=LONG_STEPS,
    evaluate_every=LONG_EVALUATE_EVERY,
)
