"""Sweeps: what a sweep knows and decides (`study.py`), and where its trials run (`fused/`, `on_tune/`)."""
