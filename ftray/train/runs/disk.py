"""Runs on a disk that all nodes see: what one writes the others read, and nothing has to go anywhere."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from ftray.config import RunConfig
from ftray.storage import verify_directory
from ftray.train.checkpoints.listing import CHECKPOINTS, Log, newest_whole_checkpoint
from ftray.train.job import request_stop
from ftray.train.runs.claim import holding, is_held, lock_of
from ftray.train.runs.handle import RunHandle, set_aside


class DiskRunStore:
    def __init__(self, runs_dir: str):
        self._runs_dir = Path(runs_dir)

    def uri(self, name: str) -> str:
        return str((self._runs_dir / name).absolute())

    def local(self, name: str) -> Path:
        return self._runs_dir / name

    @property
    def shared_disk(self) -> Path:
        return self._runs_dir

    @contextlib.contextmanager
    def open(self, config: RunConfig, *, fresh: bool = False) -> Iterator["DiskRun"]:
        """The lock ends with the process that holds it."""
        with holding(lock_of(self._runs_dir, config.name)):
            yield DiskRun(config, fresh=fresh)

    def share(self, tokens: Path) -> Path:
        return tokens

    def ask_to_stop(self, name: str) -> None:
        if (self._runs_dir / name).is_dir():
            request_stop(self._runs_dir / name)

    def drop_checkpoints(self, name: str) -> None:
        shutil.rmtree(self._runs_dir / name / CHECKPOINTS, ignore_errors=True)

    def forget(self, name: str) -> None:
        shutil.rmtree(self._runs_dir / name, ignore_errors=True)

    def forget_leftover(self, config: RunConfig) -> None:
        """A journal on a disk loses no line: there is none."""

    def forget_local_copy(self, name: str) -> None:
        """It is no copy."""

    def is_driven(self, name: str) -> bool:
        return is_held(lock_of(self._runs_dir, name))

    def look(self) -> Path:
        return self._runs_dir


class DiskRun(RunHandle):
    def __init__(self, config: RunConfig, *, fresh: bool = False):
        super().__init__(config, (Path(config.runs_dir) / config.name).absolute(), fresh=fresh)

    @property
    def uri(self) -> str:
        return str(self.path)

    @property
    def shared_disk(self) -> Path:
        return self.path

    def set_aside(self) -> None:
        set_aside(self.path)

    def newest_checkpoint(self, *, log: Log | None = None) -> Path | None:
        return newest_whole_checkpoint(self.path, log=log)

    def sync(self, *, at_once: bool = False) -> None: ...

    def verify_artifact(self) -> None:
        verify_directory(self.artifact)

    def fetch_artifact(self, checkpoint: Path, *, whole: bool) -> None: ...

    def keep_artifact(self, artifact: Path) -> None: ...
