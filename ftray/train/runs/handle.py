"""A run whose directory this driver has opened: what it starts from, and what goes in and out of it."""

import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from ftray.config import RunConfig
from ftray.errors import UserError
from ftray.storage import read_json, write_json
from ftray.tracking.environment import describe_environment
from ftray.tracking.metrics import read_metrics
from ftray.tracking.runs import RESULT
from ftray.train.checkpoints.listing import Log, read_state
from ftray.train.runs.claim import config_changes, has_begun, refuse_changes, refuse_unwritable
from ftray.train.runs.uri import artifact_name

INPUTS = "inputs.json"


class RunHandle(ABC):
    """`runs_dir/name`, claimed before any work, so that a name never mixes two configs. Opening it raises `UserError`
    when the name belongs to another one."""

    def __init__(self, config: RunConfig, path: Path, *, fresh: bool):
        self.config = config
        self.path = path  # on this machine
        if path.exists() and fresh:
            self.set_aside()
        refuse_unwritable(path / "scratch")
        began_with, resolved = path / "config.json", config.model_dump(mode="json")
        self.changes: list[str] = []  # differences to the earlier part that are allowed, for the user to see
        self.notes: list[str] = []  # what the user should know of its earlier part
        self.resume_from = self.newest_checkpoint(log=self.notes.append)
        self.has_begun = self.resume_from is not None or has_begun(path)
        if began_with.is_file() and self.has_begun:
            refused, self.changes = config_changes(read_json(began_with), resolved)
            refuse_changes(self.uri, refused, can_start_over=self.shared_disk is not None)
        read_metrics(path, until_step=read_state(self.resume_from).step if self.resume_from is not None else 0)
        # The result of a run that is done.
        self.finished: dict[str, Any] | None = read_json(path / RESULT) if (path / RESULT).is_file() else None
        if self.finished is None:  # what a finished run was made with stays
            write_json(began_with, resolved)
            write_json(path / "environment.json", describe_environment())

    @property
    @abstractmethod
    def uri(self) -> str:
        """As users and workers find it."""

    @property
    @abstractmethod
    def shared_disk(self) -> Path | None:
        """Its directory, where that lies on a disk which all nodes see."""

    @abstractmethod
    def set_aside(self) -> None:
        """Nothing is deleted: an old run of this name is kept under another."""

    @abstractmethod
    def newest_checkpoint(self, *, log: Log | None = None) -> Path | None:
        """The newest whole one, or as much of it as a driver needs; `log`: of those that were passed over. Raises
        `DamagedError` where there are some and none is whole."""

    @abstractmethod
    def sync(self, *, at_once: bool = False) -> None:
        """With what the workers wrote. Cheap unless it is `at_once`. Raises `FtrayError` where another driver has taken
        the run over."""

    @abstractmethod
    def verify_artifact(self) -> None:
        """Raises `DamagedError` where what a finished run left cannot be used."""

    @abstractmethod
    def fetch_artifact(self, checkpoint: Path, *, whole: bool) -> None:
        """What the run's result is made of: the adapter of `newest_checkpoint`, or the `whole` of it."""

    @abstractmethod
    def keep_artifact(self, artifact: Path) -> None:
        """The adapter or model, the report, and last the result, where users find them."""

    @property
    def artifact(self) -> Path:
        """What the run leaves: its adapter's directory, or its model's."""
        return self.path / artifact_name(is_adapter=self.config.adapter is not None)

    def uri_of(self, path: Path) -> str:
        """Of something in the directory, as a user finds it."""
        return f"{self.uri}/{path.relative_to(self.path).as_posix()}"


def check_same_data(checkpoint: Path, digest: str) -> None:
    if read_state(checkpoint).data_digest != digest:
        raise UserError(
            f"data.train: the data differ from those that {checkpoint} was trained on (rows, template or tokenizer); "
            "put the old file back, choose another name, or start over with --fresh"
        )


def set_aside(path: Path) -> None:
    """Nothing is deleted: what was there moves to NAME.TIME beside the new."""
    shutil.move(path, path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
