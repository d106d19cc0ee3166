"""Training: DeepSpeed behind `engine.py` and `zero.py`, Ray behind `worker.py`, `launch.py` and `preflight.py`."""
