"""Where runs lie (`runs_dir`): on a disk that all nodes see, or in an object store. Nobody else asks which."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from ftray.config import RunConfig
from ftray.train.prepared_data import PreparedData
from ftray.train.runs.disk import DiskRunStore
from ftray.train.runs.handle import RunHandle
from ftray.train.runs.object_store import ObjectRunStore
from ftray.train.runs.uri import is_stored


class RunStore(Protocol):
    def uri(self, name: str) -> str:
        """Of a run, as users and workers find it: an absolute path, or a URL."""
        ...

    def local(self, name: str) -> Path:
        """Its directory on this machine."""
        ...

    @property
    def shared_disk(self) -> Path | None:
        """The directory of the runs, where it lies on a disk which all nodes see."""
        ...

    def open(self, config: RunConfig, *, fresh: bool = False) -> AbstractContextManager[RunHandle]:
        """The run `config.name`, whose only driver this process is meanwhile: two would write over each other. `fresh`:
        an earlier one is set aside. Raises `UserError` where another drives it, or where it has another config."""
        ...

    def share(self, tokens: Path) -> Path | str:
        """Puts the directory of a dataset where workers find it, and says where. Runs on the same data have it in
        common."""
        ...

    def ask_to_stop(self, name: str) -> None:
        """Its workers save and end at their next step."""
        ...

    def drop_checkpoints(self, name: str) -> None:
        """Of a run that has its result."""
        ...

    def forget(self, name: str) -> None:
        """All of it, wherever it lies."""
        ...

    def forget_leftover(self, config: RunConfig) -> None:
        """Of a run that its sweep's journal has heard nothing of, where it may be another point's."""
        ...

    def forget_local_copy(self, name: str) -> None:
        """Of a run that has ended, where this machine has only a copy."""
        ...

    def is_driven(self, name: str) -> bool:
        """A process works on it now, or on the sweep or pipeline of that name."""
        ...

    def look(self) -> Path:
        """The notes of all runs, as directories of this machine."""
        ...


def run_store(runs_dir: str) -> RunStore:
    return ObjectRunStore(runs_dir) if is_stored(runs_dir) else DiskRunStore(runs_dir)


def share_data(store: RunStore, data: PreparedData) -> tuple[Path | str, Path | str | None]:
    """Where workers find them: the training data, and the evaluation data where there are any."""
    train, evaluation = (tokens.directory if tokens is not None else None for tokens in (data.train, data.eval))
    assert train is not None, "the driver keeps its tokens"
    return store.share(train), store.share(evaluation) if evaluation is not None else None
