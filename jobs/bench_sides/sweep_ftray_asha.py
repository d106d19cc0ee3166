"""Fused trials, stopped early by ASHA."""

from sweep_side import measure

measure("algorithm: grid, fused: 8, scheduler: asha")
