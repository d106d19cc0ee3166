"""Ordinary Ray Tune trials, one after the other on all cores."""

from sweep_side import CORES, measure

measure("algorithm: grid, fused: off", overrides=f", workers.cpus_each: {CORES}")
