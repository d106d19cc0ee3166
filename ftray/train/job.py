"""What the driver hands to each worker."""

import traceback
from dataclasses import dataclass
from pathlib import Path

from ftray.config import RunConfig
from ftray.errors import DivergedError, FtrayError, StoreError, UserError
from ftray.storage import read_json, write_json

WORKER_ERROR = "worker_error.json"
KINDS = (UserError, DivergedError, StoreError, FtrayError)  # that a worker tells apart
HARDWARE = "hardware.json"  # what rank 0 chose
STOP_REQUEST = "stop_request"  # while it exists, the workers save and end at the next step
SCRATCH = "scratch"


@dataclass(frozen=True)
class TrainJob:
    """The datasets lie on the storage that all nodes share, as the run directory does; workers map them into memory.
    Of a run in an object store they are URLs, and each worker has a directory of its own."""

    config: RunConfig
    uri: str  # of the run: the path of its directory, or the URL
    run_directory: Path  # on this machine
    base_name: str
    base_fingerprint: str
    data_digest: str
    train_data: Path | str  # directory of a TokenizedDataset
    eval_data: Path | str | None
    attempt: str = ""  # of the run: each driver's has a word of its own
    init_from: Path | str | None = None  # a PEFT directory, or the URL of one
    profile_steps: int = 0
    until_step: int | None = None  # it saves there and ends, as if it were asked to


def write_worker_error(run_directory: Path, error: FtrayError) -> None:
    kind = next(kind for kind in KINDS if isinstance(error, kind)).__name__
    reported = {"kind": kind, "message": str(error), "traceback": traceback.format_exc()}
    write_json(run_directory / WORKER_ERROR, reported)


def read_worker_error(run_directory: Path) -> FtrayError | None:
    if not (run_directory / WORKER_ERROR).is_file():
        return None
    reported = read_json(run_directory / WORKER_ERROR)
    return next(kind for kind in KINDS if kind.__name__ == reported["kind"])(reported["message"])


def request_stop(run_directory: Path) -> None:
    (run_directory / STOP_REQUEST).touch()
