"""What a user asks of a sweep, also of one that runs in another process: files, which its driver meets."""

import time
from pathlib import Path
from typing import Any

from ftray.config import Space
from ftray.config.sweep import NOT_SWEPT, why_not_in_population, why_not_swept
from ftray.errors import ConfigError
from ftray.storage import write_bytes, write_json
from ftray.sweep.trials import Trial

REQUESTS = "requests"


class Requests:
    """In a sweep's directory: trials that are to be added, and runs that are not to begin."""

    def __init__(self, sweep_directory: Path):
        self._directory = sweep_directory / REQUESTS

    @property
    def trials(self) -> list[Path]:
        return sorted(self._directory.glob("*.json"))

    def add(self, point: dict[str, Any], *, cloned_from: str) -> None:
        write_json(self._directory / f"{time.time_ns()}.json", {"point": point, "cloned_from": cloned_from})

    def call_off(self, run: str) -> None:
        write_bytes(self._directory / run, b"")

    def calls_off(self, run: str) -> bool:
        return (self._directory / run).is_file()


def check_clone(trial: Trial, changes: dict[str, Any], space: Space, *, in_population: bool) -> dict[str, Any]:
    """The point of a trial like this one with some keys changed. Raises `ConfigError` where the sweep or the run's
    schema refuses it."""
    point, label = trial.latest | changes, f"clone-trial {trial.name}"
    refused = [f"{key}: {reason}" for key in changes if (reason := why_not_swept(key)) is not None]
    if in_population:
        refused += [f"{key}: {reason}" for key in changes if (reason := why_not_in_population(key)) is not None]
    if refused:
        raise ConfigError(label, refused)
    space.check_point(point, label=label)
    if space.config(point).data.eval != space.config(trial.latest).data.eval:
        raise ConfigError(label, [f"data.eval: {NOT_SWEPT['data.eval']}"])
    return point
