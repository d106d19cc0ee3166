"""The function that Ray ships to every worker: it is pickled by name, so torch and deepspeed load only there."""

import os
from typing import Any


def run_in_worker(settings: dict[str, Any]) -> None:
    """Ray Train's train function. The driver pickles it by name, so torch and deepspeed load only in the workers."""
    os.environ.update(settings["secrets"])
    from ftray.train.on_ray.worker import train_worker

    train_worker(settings["job"])
