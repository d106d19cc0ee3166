"""`runs/NAME/`: claimed before any work, so that a name never mixes two configs."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ftray.config import RunConfig
from ftray.errors import UnwritableError, UserError
from ftray.storage import read_json, write_json
from ftray.tracking.environment import describe_environment
from ftray.tracking.runs import RESULT, differences
from ftray.train.checkpoints.checkpoint import newest_whole_checkpoint, read_state
from ftray.train.runs.store import StoredRun, is_stored

LOCKS = ".locks"
# What may change between the parts of one run: where and how it runs, not what it computes.
MAY_CHANGE = (
    "workers",
    "zero",
    "checkpoint",
    "evaluation",
    "tracking",
    "registry",
    "guard",
    "memory",
    "batch.tokens_per_micro_batch",
)


@dataclass(frozen=True)
class RunDirectory:
    path: Path  # on this machine
    resume_from: Path | None  # the newest whole checkpoint
    finished: dict[str, Any] | None  # the result of a run that is done
    changes: list[str]  # differences to the earlier part that are allowed, for the user to see
    stored: StoredRun | None = None  # where it lies in an object store

    def newest_checkpoint(self) -> Path | None:
        """The newest whole one; of a run in a store, what tells of it."""
        return newest_whole_checkpoint(self.path) if self.stored is None else self.stored.newest_checkpoint()

    def sync(self, *, at_once: bool = False) -> None:
        """With what the workers wrote, where they do not share a disk with the driver. Cheap unless it is `at_once`."""
        if self.stored is not None:
            self.stored.sync(at_once=at_once)

    def uri_of(self, path: Path) -> str:
        """As a user finds it."""
        return str(path) if self.stored is None else f"{self.stored.url}/{path.relative_to(self.path).as_posix()}"


@contextlib.contextmanager
def only_driver(config: RunConfig, *, stop_with: str | None = None) -> Iterator[StoredRun | None]:
    """Two drivers of one run would write over each other. The lock ends with the process that holds it. Yields the run
    in its store, where it lies in one. `stop_with`: what ends the other; None: `ftray runs stop`."""
    if is_stored(config.runs_dir):
        stored = StoredRun(config.runs_dir, config.name)
        with stored.opened(refusal=f"{config.name} is running already, by another driver"):
            yield stored
        return
    path = Path(config.runs_dir).absolute() / LOCKS / config.name
    refuse_unwritable(path.parent)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except PermissionError:
        raise UserError(f"{path}: another user's; choose another name (name=...) or runs_dir") from None
    except Timeout:
        raise UserError(
            f"{config.name} is running already, by another process; "
            f"stop it with {stop_with or f'`ftray runs stop {config.name}`'}, or choose another name (name=...)"
        ) from None
    try:
        yield None
    finally:
        lock.release()


def open_run_directory(config: RunConfig, *, fresh: bool, stored: StoredRun | None = None) -> RunDirectory:
    """Makes or reopens `runs_dir/name`. Raises `UserError` when the name belongs to another config."""
    path = (Path(config.runs_dir) / config.name).absolute() if stored is None else stored.directory
    resolved = config.model_dump(mode="json")
    if path.exists() and fresh:
        if stored is not None:
            raise UserError(
                f"--fresh: {stored.url} would have to be moved in its store; choose another name (name=...)"
            )
        set_aside(path)
    refuse_unwritable(path / "scratch")
    changes: list[str] = []
    earlier_file = path / "config.json"
    if earlier_file.is_file():
        changed = [(key, f"{key}: was {a}, is {b}") for key, a, b in differences(read_json(earlier_file), resolved)]
        refused = [text for key, text in changed if not may_change(key)]
        if refused:
            raise UserError(
                f"{path if stored is None else stored.url} holds a run of this name with another config:\n"
                + "\n".join(f"  - {line}" for line in refused)
                + "\n  choose another name (name=...)"
                + (", or set that run aside with --fresh" if stored is None else "")
            )
        changes = [text for _, text in changed]
    checkpoint = newest_whole_checkpoint(path) if stored is None else stored.newest_checkpoint()
    finished = read_json(path / RESULT) if (path / RESULT).is_file() else None
    if finished is None:  # what a finished run was made with stays
        write_json(earlier_file, resolved)
        write_json(path / "environment.json", describe_environment())
    return RunDirectory(path, checkpoint, finished, changes, stored)


def check_same_data(checkpoint: Path, digest: str) -> None:
    if read_state(checkpoint).data_digest != digest:
        raise UserError(
            f"data.train: the data differ from those that {checkpoint} was trained on (rows, template or tokenizer); "
            "put the old file back, choose another name, or start over with --fresh"
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
    """`ray job submit --working-dir` unpacks into a session directory that goes away with the job."""
    in_store = is_stored(config.runs_dir)
    if "working_dir_files" in Path.cwd().parts and not in_store and not Path(config.runs_dir).is_absolute():
        raise UserError(
            f"runs_dir: {config.runs_dir!r} lies in the job's temporary working directory and would be lost; "
            "give a shared absolute path (runs_dir=/path/on/all/nodes) or a store (runs_dir=s3://bucket/runs)"
        )


def set_aside(path: Path) -> None:
    """Nothing is deleted: the old run moves to NAME.TIME beside the new one."""
    shutil.move(path, path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"))


def may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)
