"""Sweeps: which point next, what came of it, which to stop (`study.py`); where trials run (`tune_trials.py`)."""
