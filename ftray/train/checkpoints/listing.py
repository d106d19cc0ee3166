"""Which checkpoints a run has, and which of them are whole. Nothing here imports torch."""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ftray.errors import DamagedError, IncompleteError
from ftray.storage import read_json, verify_directory

CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
TRAINER_STATE = "trainer.json"
STEP = re.compile(r"step-([1-9][0-9]*)")

Log = Callable[[str], None]


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
        check_step(Path(uri))
        return Path(uri)


def step_of(name: str) -> int | None:
    """Of `step-N`; None for any other name, a copy `step-006` among them."""
    found = STEP.fullmatch(name)
    return int(found[1]) if found else None


def list_checkpoints(run_directory: Path) -> list[Path]:
    """Newest first, whole or not."""
    found = [path for path in (run_directory / CHECKPOINTS).glob("step-*") if path.is_dir()]
    steps = [(step, path) for path in found if (step := step_of(path.name)) is not None]
    return [path for _, path in sorted(steps, reverse=True)]


def check_step(checkpoint: Path) -> None:
    """Raises `DamagedError` where the directory has another step's name."""
    if (step := read_state(checkpoint).step) != step_of(checkpoint.name):
        raise DamagedError(f"{checkpoint}: holds step {step}; it was renamed or copied")


def is_whole(checkpoint: Path) -> bool:
    with contextlib.suppress(DamagedError):
        verify_directory(checkpoint)
        return True
    return False


def first_whole(places: list[str], *, opened: Callable[[str], Path], log: Log | None = None) -> Path | None:
    """The first whose manifest proves it; None where none was ever completed. Only damaged ones are passed over (and
    logged): what could not be read for another reason (a store that does not answer, a full disk) may be the newest,
    and the training would begin again before it. Raises `DamagedError` where none is whole."""
    damage: DamagedError | None = None
    for uri in places:
        try:
            return opened(uri)
        except IncompleteError:  # its save did not come to its end
            continue
        except DamagedError as error:
            damage = damage or error
            if log is not None:
                log(f"passed over: {error}")
    if damage is not None:
        raise DamagedError(f"no checkpoint is whole: {damage}; put one back from a copy, or start over with --fresh")
    return None


def newest_whole_checkpoint(run_directory: Path, *, log: Log | None = None) -> Path | None:
    checkpoints = DirectoryCheckpoints(run_directory)
    return first_whole(checkpoints.list(), opened=lambda uri: checkpoints.open(uri, share=(0, 1)), log=log)
