"""`trials.jsonl`: what a sweep has heard and decided, a line each. Reading it again gives the same study."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from ftray.errors import DamagedError
from ftray.storage import write_bytes


class Journal:
    def __init__(self, path: Path):
        self._path = path

    def read(self, *, repair: bool) -> list[dict[str, Any]]:
        """`repair`: what follows the last newline was being written, and is taken away. Raises `DamagedError`."""
        if not self._path.is_file():
            return []
        lines = self._path.read_bytes().split(b"\n")
        whole = [line for line in lines[:-1] if line]
        if repair and lines[-1]:
            write_bytes(self._path, b"".join(line + b"\n" for line in whole))
        return [self._parse(number, line) for number, line in enumerate(whole, start=1)]

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            event = json.loads(line)
            assert isinstance(event["event"], str)
        except (ValueError, TypeError, KeyError, AssertionError, RecursionError):
            raise DamagedError(
                f"{self._path}: line {number} is no event of a sweep: it was cut short or overwritten; put the file "
                "back from a copy, or start over with --fresh"
            ) from None
        return event

    def append(self, event: dict[str, Any]) -> None:
        """On the disk when it returns. Raises `OSError`, and nothing of the event is there then."""
        line = json.dumps(event) + "\n"
        with self._path.open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                if file.write(line.encode()) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)  # half a line would spoil what comes after it
                raise
