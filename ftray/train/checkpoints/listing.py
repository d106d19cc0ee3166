"""Which checkpoints a run has, and which of them are whole. Nothing here imports torch."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ftray.errors import DamagedError
from ftray.storage import read_json, verify_directory

CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
TRAINER_STATE = "trainer.json"


@dataclass(frozen=True)
class TrainerState:
    step: int  # steps done
    data_digest: str
    world_size: int
    zero_stage: int


def read_state(directory: Path) -> TrainerState:
    return TrainerState(**read_json(directory / TRAINER_STATE))


class Checkpoints(Protocol):
    """Where a run's checkpoints lie, to the ranks."""

    def list(self) -> list[str]:
        """Newest first, whole or not."""
        ...

    def open(self, uri: str, *, share: tuple[int, int]) -> Path:
        """One of them on this machine. Raises `DamagedError` where its manifest does not prove it; the `share`-th of so
        many ranks may look at its part only."""
        ...


class DirectoryCheckpoints:
    """On a disk that all ranks share."""

    def __init__(self, run_directory: Path):
        self._run_directory = run_directory

    def list(self) -> list[str]:
        return [str(path) for path in list_checkpoints(self._run_directory)]

    def open(self, uri: str, *, share: tuple[int, int]) -> Path:
        verify_directory(Path(uri), share=share)
        return Path(uri)


def list_checkpoints(run_directory: Path) -> list[Path]:
    """Newest first, whole or not."""
    found = [path for path in (run_directory / CHECKPOINTS).glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def is_whole(checkpoint: Path) -> bool:
    with contextlib.suppress(DamagedError):
        verify_directory(checkpoint)
        return True
    return False


def first_whole(places: list[str], *, opened: Callable[[str], Path]) -> Path | None:
    """The first whose manifest proves it. Only damaged ones are passed over: what could not be read for another reason
    (a store that does not answer, a full disk) may be the newest, and the training would begin again before it."""
    for uri in places:
        with contextlib.suppress(DamagedError):
            return opened(uri)
    return None


def newest_whole_checkpoint(run_directory: Path) -> Path | None:
    checkpoints = DirectoryCheckpoints(run_directory)
    return first_whole(checkpoints.list(), opened=lambda uri: checkpoints.open(uri, share=(0, 1)))
