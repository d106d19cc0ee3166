"""What can be refused of a run's directory before torch is imported: where it is, and whose config it holds."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ftray.config import RunConfig
from ftray.config.renamed import with_new_names
from ftray.errors import UnwritableError, UserError
from ftray.storage import read_json
from ftray.storage.job_directory import vanishes_with_the_job
from ftray.tracking.runs import differences
from ftray.train.runs.uri import is_stored, local_directory

LOCKS = ".locks"
# What may change between the parts of one run: where and how it runs, not what it computes.
MAY_CHANGE = (
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


def refuse_vanishing_directory(config: RunConfig) -> None:
    if vanishes_with_the_job(config.runs_dir):
        raise UserError(
            f"runs_dir: {config.runs_dir!r} lies in the job's temporary working directory and would be lost; "
            "give a shared absolute path (runs_dir=/path/on/all/nodes) or a store (runs_dir=s3://bucket/runs)"
        )


def may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def config_changes(earlier: dict[str, Any], config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs from the config that a run began with: (what makes it another run, what may change)."""
    changed = [(key, f"{key}: was {a}, is {b}") for key, a, b in differences(with_new_names(earlier), config)]
    return [text for key, text in changed if not may_change(key)], [text for key, text in changed if may_change(key)]


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
    if is_stored(config.runs_dir) or not (path / "config.json").is_file():
        return
    changes, _ = config_changes(read_json(path / "config.json"), config.model_dump(mode="json"))
    start = "adapter.init_from:"
    refuse_changes(str(path), [line for line in changes if not line.startswith(start)], can_start_over=True)


def lock_of(runs_dir: str | Path, name: str) -> Path:
    return Path(runs_dir).absolute() / LOCKS / name


def refuse_running(config: RunConfig) -> None:
    """The quick look; the driver itself holds the lock as long as it works."""
    lock = lock_of(config.runs_dir, config.name)
    if not is_stored(config.runs_dir) and lock.exists():
        with holding(lock):
            pass


@contextlib.contextmanager
def holding(path: Path, *, stop_with: str | None = None) -> Iterator[None]:
    """A run's lock (`lock_of`) on this disk; it ends with the process. `stop_with`: what ends the other driver."""
    refuse_unwritable(path.parent)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except PermissionError:
        raise UserError(f"{path}: another user's; choose another name (name=...) or runs_dir") from None
    except Timeout:
        raise UserError(
            f"{path.name} is running already, by another process; "
            f"stop it with {stop_with or f'`ftray runs stop {path.name}`'}, or choose another name (name=...)"
        ) from None
    try:
        yield
    finally:
        lock.release()
