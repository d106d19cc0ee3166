"""metrics.jsonl: one object a step, evaluations as `{"step": ..., "eval_loss": ...}`."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftray.errors import DamagedError
from ftray.storage import write_bytes

METRICS = "metrics.jsonl"
OF_SOURCE = "eval_loss/"  # and a source's name, where an evaluation has several


def losses_of_sources(record: dict[str, Any]) -> dict[str, float]:
    """Of an evaluation, by name; empty where it has one source."""
    return {key.removeprefix(OF_SOURCE): value for key, value in record.items() if key.startswith(OF_SOURCE)}


class MetricsLog:
    """Appends to the run's metrics; a resumed run first forgets the steps after its checkpoint.

    On a full disk records wait in memory: a run does not end for want of a line.
    """

    def __init__(self, run_directory: Path, *, resume_step: int):
        self.path = run_directory / METRICS
        records = read_metrics(run_directory, until_step=resume_step)
        kept = [record for record in records if record["step"] <= resume_step]
        write_bytes(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = self.path.open("ab", buffering=0)
        self._waiting = b""

    def append(self, record: dict[str, Any]) -> None:
        self._waiting += (json.dumps(record) + "\n").encode()
        with contextlib.suppress(OSError):
            self._write()

    def close(self) -> None:
        """Raises `OSError` when there is still no room for what waits."""
        try:
            self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]


def read_metrics(run_directory: Path, *, until_step: int | None = None) -> list[dict[str, Any]]:
    """Raises `DamagedError` where a line is none; not after the record of `until_step`, where one is given: what comes
    after it is forgotten anyway."""
    path, found, step = run_directory / METRICS, [], 0
    for number, record in enumerate(parse_lines(path.read_bytes()) if path.is_file() else [], start=1):
        if record is not None:
            step = record["step"]
            found.append(record)
        elif until_step is None or step < until_step:
            raise DamagedError(
                f"{path}: line {number} is no record: it was cut short or overwritten; put the file back from a copy, "
                "or delete the line"
            )
    return found


def parse_lines(content: bytes) -> Iterator[dict[str, Any] | None]:
    """None for a line that is no record. The last may still be being written, and is left out without its newline."""
    for line in content.split(b"\n")[:-1]:
        record = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        yield record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class MetricsFollower:
    """New records since the last look, for a progress line in another process."""

    def __init__(self, run_directory: Path):
        self._path = run_directory / METRICS
        self._identity: tuple[int, int] | None = None  # of the file the offset belongs to
        self._offset = 0

    def poll(self) -> list[dict[str, Any]]:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            stat = os.fstat(file.fileno())
            if (identity := (stat.st_dev, stat.st_ino)) != self._identity:
                self._identity, self._offset = identity, 0  # a restart writes a new file
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [record for record in parse_lines(whole + newline) if record is not None]
