"""Ordinary Ray Tune trials, a process group each: one a core at a time."""

from sweep_side import measure

measure("algorithm: grid, fused: off")
