"""`runs/NAME/`: claimed before any work, so that a name never mixes two configs."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.config import RunConfig
from ftray.errors import UserError
from ftray.storage import read_json, write_json
from ftray.tracking.environment import describe_environment
from ftray.tracking.runs import RESULT
from ftray.train.checkpoints.checkpoint import newest_whole_checkpoint, read_state
from ftray.train.runs.claim import config_changes, holding, refuse_changes, refuse_unwritable
from ftray.train.runs.store import StoredRun
from ftray.train.runs.uri import is_stored


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
    with holding(config, stop_with=stop_with):
        yield None


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
        refused, changes = config_changes(read_json(earlier_file), resolved)
        refuse_changes(path if stored is None else stored.url, refused, can_start_over=stored is None)
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


def set_aside(path: Path) -> None:
    """Nothing is deleted: the old run moves to NAME.TIME beside the new one."""
    shutil.move(path, path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
