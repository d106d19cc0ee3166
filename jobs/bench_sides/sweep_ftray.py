"""Fused trials over one base."""

from sweep_side import measure

measure("algorithm: grid, fused: 8")
