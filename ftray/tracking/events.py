"""events.jsonl: what happened to a run besides its steps: starts, restarts, skipped steps, failed saves, stops."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


def record_event(run_directory: Path, kind: str, **fields: Any) -> None:
    """Appends one line. Short enough to be written whole, whoever else appends."""
    line = json.dumps({"time": time.time(), "event": kind, **fields}) + "\n"
    with (run_directory / EVENTS).open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a full disk or a crash cut the last line short
                line = "\n" + line
        file.write(line.encode())


def read_events(run_directory: Path) -> list[dict[str, Any]]:
    return read_whole_lines(run_directory / EVENTS)


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without those that a crash or a full disk cut short; none without a file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found
