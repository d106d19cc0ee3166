"""What can be refused of a run's directory before torch is imported: where it is, and whose config it holds."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from ftray.config import RunConfig
from ftray.config.renamed import with_new_names
from ftray.errors import FtrayError, UnwritableError, UserError
from ftray.storage import read_json
from ftray.storage.job_directory import vanishes_with_the_job
from ftray.tracking.metrics import METRICS
from ftray.tracking.runs import RESULT, differences
from ftray.train.checkpoints.listing import CHECKPOINTS
from ftray.train.runs.uri import is_stored, local_directory

LOCKS = ".locks"
# What may change between the parts of one run: where and how it runs, not what it computes.
MAY_CHANGE = (
    "name",  # the directory's
    "runs_dir",
    "workers",
    "zero",
    "checkpoint",
    "evaluation",
    "tracking",
    "callbacks",
    "registry",
    "guard",
    "memory",
    "batch.tokens_per_micro_batch",
)


def refuse_unwritable(path: Path) -> None:
    """Makes the directory, or says that it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UnwritableError(
            f"runs_dir: {path} cannot be written: {error.strerror}; choose another with runs_dir=PATH"
        ) from None


def refuse_unwritable_place(runs_dir: str) -> None:
    """Without leaving anything there."""
    if is_stored(runs_dir):
        return
    path = Path(runs_dir).absolute()
    missing = [place for place in (path, *path.parents) if not place.exists()]
    refuse_unwritable(path)
    for place in missing:
        with contextlib.suppress(OSError):
            place.rmdir()


def refuse_vanishing_directory(config: RunConfig) -> None:
    if vanishes_with_the_job(config.runs_dir):
        raise UserError(
            f"runs_dir: {config.runs_dir!r} lies in the job's temporary working directory and would be lost; "
            "give a shared absolute path (runs_dir=/path/on/all/nodes) or a store (runs_dir=s3://bucket/runs)"
        )


# Where the inputs lie may change as well; that they are the same, their digests say (runs/inputs.py).
PLACES = ("base_model", "data.train", "data.eval")


def has_begun(path: Path) -> bool:
    """The run in this directory has done a step: a start that failed before it leaves nothing that holds the name."""
    metrics = path / METRICS
    return (
        (path / RESULT).is_file()
        or (metrics.is_file() and metrics.stat().st_size > 0)
        or any((path / CHECKPOINTS).glob("step-*"))
    )


def may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def config_changes(earlier: dict[str, Any], config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs from the config that a run began with: (what makes it another run, what may change)."""
    refused, allowed = [], []
    for key, a, b in differences(with_defaults(with_new_names(earlier)), config):
        moved = key in PLACES and "null" not in (a, b)
        (allowed if may_change(key) or moved else refused).append(f"{key}: was {a}, is {b}")
    return refused, allowed


def with_defaults(earlier: dict[str, Any]) -> dict[str, Any]:
    """Of keys that an older ftray did not have: it did what they say by default."""
    try:
        return RunConfig.model_validate(earlier).model_dump(mode="json")
    except (ValidationError, FtrayError):  # such as a module of one's own that is gone
        return earlier


def refuse_changes(where: str, changes: list[str], *, can_start_over: bool, what: str = "run") -> None:
    if changes:
        raise UserError(
            f"{where} holds a {what} of this name with another config:\n"
            + "\n".join(f"  - {line}" for line in changes)
            + "\n  choose another name (name=...)"
            + (f", or set that {what} aside with --fresh" if can_start_over else "")
        )


def refuse_another_config(config: RunConfig) -> None:
    """As far as this machine's disk tells, and an alias in `adapter.init_from` aside, which is not resolved yet."""
    path = local_directory(config.runs_dir, config.name).absolute()
    if is_stored(config.runs_dir) or not (path / "config.json").is_file() or not has_begun(path):
        return
    changes, _ = config_changes(read_json(path / "config.json"), config.model_dump(mode="json"))
    start = "adapter.init_from:"
    refuse_changes(str(path), [line for line in changes if not line.startswith(start)], can_start_over=True)


def lock_of(runs_dir: str | Path, name: str) -> Path:
    return Path(runs_dir).absolute() / LOCKS / name


def refuse_running(config: RunConfig) -> None:
    """The quick look; the driver itself holds the lock as long as it works."""
    lock = lock_of(config.runs_dir, config.name)
    if not is_stored(config.runs_dir) and is_held(lock):
        raise UserError(running_message(lock))


def is_held(lock: Path) -> bool:
    """By a process that lives: the kernel lets go of it with its process. Nothing is made, and nobody disturbed."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it is another user's
        pass
    return False


def running_message(lock: Path, *, stop_with: str | None = None) -> str:
    return (
        f"{lock.name} is running already, by another process; "
        f"stop it with {stop_with or f'`ftray runs stop {lock.name}`'}, or choose another name (name=...)"
    )


@contextlib.contextmanager
def holding(path: Path, *, stop_with: str | None = None) -> Iterator[None]:
    """A run's lock (`lock_of`) on this disk; it ends with the process. `stop_with`: what ends the other driver."""
    refuse_unwritable(path.parent)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.3, poll_interval=0.05)  # somebody may just look whether it is held (`is_held`)
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory, where the run's lock file belongs; remove it") from None
    except PermissionError:
        raise UserError(f"{path}: another user's; choose another name (name=...) or runs_dir") from None
    except Timeout:
        raise UserError(running_message(path, stop_with=stop_with)) from None
    try:
        yield
    finally:
        lock.release()
