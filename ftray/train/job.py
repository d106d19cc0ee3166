"""What the driver hands to each worker."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.config import RunConfig

WORKER_ERROR = "worker_error.json"
HARDWARE = "hardware.json"  # what rank 0 chose
STOP_REQUEST = "stop_request"  # while it exists, the workers save and end at the next step
SCRATCH = "scratch"


@dataclass(frozen=True)
class TrainJob:
    """The datasets are files on the storage that all nodes share; workers map them into memory."""

    config: RunConfig
    run_directory: Path
    base_name: str
    base_fingerprint: str
    init_from: Path | None  # a PEFT directory
    data_digest: str
    train_data: Path  # directory of a TokenizedDataset
    eval_data: Path | None
    profile_steps: int = 0
    until_step: int | None = None  # it saves there and ends, as if it were asked to


def request_stop(run_directory: Path) -> None:
    (run_directory / STOP_REQUEST).touch()


def run_in_worker(settings: dict[str, Any]) -> None:
    """Ray Train's train function. The driver pickles it by name, so torch and deepspeed load only in the workers."""
    os.environ.update(settings["secrets"])
    from ftray.train.worker import train_worker

    train_worker(settings["job"])
