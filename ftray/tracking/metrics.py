"""metrics.jsonl: one object a step, evaluations as `{"step": ..., "eval_loss": ...}`."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftray.storage import write_bytes

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends to the run's metrics; a resumed run first forgets the steps after its checkpoint.

    On a full disk records wait in memory: a run does not end for want of a line.
    """

    def __init__(self, run_directory: Path, *, resume_step: int):
        self.path = run_directory / METRICS
        kept = [record for record in read_metrics(run_directory) if record["step"] <= resume_step]
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


def read_metrics(run_directory: Path) -> list[dict[str, Any]]:
    path = run_directory / METRICS
    return list(parse_lines(path.read_text(encoding="utf-8"))) if path.is_file() else []


def parse_lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):  # the last line may still be being written
            yield json.loads(line)


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
        return list(parse_lines((whole + newline).decode()))
