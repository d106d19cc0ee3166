"""`status.json`: what a run's driver says of itself. Whether it still lives, the run's lock or lease says."""

import contextlib
import time
from pathlib import Path
from typing import Any

from ftray.errors import DamagedError
from ftray.storage import read_json, write_json

STATUS = "status.json"
QUEUED, RUNNING, FAILED, INTERRUPTED = "queued", "running", "failed", "interrupted"


def write_status(run_directory: Path, state: str, **fields: Any) -> None:
    """A full disk must not end a run for want of it."""
    with contextlib.suppress(OSError):
        write_json(run_directory / STATUS, read_status(run_directory) | {"state": state, "at": time.time(), **fields})


def read_status(run_directory: Path) -> dict[str, Any]:
    with contextlib.suppress(DamagedError, FileNotFoundError):
        return read_json(run_directory / STATUS)
    return {}
