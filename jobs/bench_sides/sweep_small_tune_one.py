"""Ordinary Ray Tune trials of small batches, one after the other on all cores."""

from sweep_side import CORES, SMALL, SMALL_STEPS, measure

everything = f"{SMALL}, workers.cpus_each: {CORES}"
measure("algorithm: grid, fused: off", overrides=everything, steps=SMALL_STEPS, evaluate_every=SMALL_STEPS)
