"""The function that Ray ships to every worker of a fused group: pickled by name, as in train/on_ray/entry.py."""

import os
from typing import Any


def run_fused_in_worker(settings: dict[str, Any]) -> None:
    """Ray Train's train function. The driver pickles it by name, so torch loads only in the workers."""
    os.environ.update(settings["secrets"])
    from ftray.sweep.fused.worker import fused_worker

    fused_worker(settings["job"])
