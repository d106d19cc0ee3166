"""Training: the algorithm (`loop.py`) between an engine (`engine/`), a run directory (`runs/`) and Ray (`on_ray/`)."""
