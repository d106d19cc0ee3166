"""Kernels of our own for CPUs, compiled on the machine, and weights laid out for them."""
