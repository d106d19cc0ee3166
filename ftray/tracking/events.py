"""events.jsonl: what happened to a run besides its steps: starts, restarts, skipped steps, failed saves, stops.

The workers write them there and the driver into driver_events.jsonl: in an object store a file has one writer.
"""

import contextlib
import heapq
import json
import os
import time
from pathlib import Path
from typing import Any

EVENTS, DRIVER_EVENTS = "events.jsonl", "driver_events.jsonl"
SKIPPED, SAVE_FAILED = "step_skipped", "save_failed"  # of a run's events


def record_event(run_directory: Path, kind: str, **fields: Any) -> None:
    append_event(run_directory / EVENTS, kind, fields)


def record_driver_event(run_directory: Path, kind: str, **fields: Any) -> None:
    append_event(run_directory / DRIVER_EVENTS, kind, fields)


def append_event(path: Path, kind: str, fields: dict[str, Any]) -> None:
    """Appends one line. Short enough to be written whole, whoever else appends."""
    line = json.dumps({"time": time.time(), "event": kind, **fields}) + "\n"
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a full disk or a crash cut the last line short
                line = "\n" + line
        file.write(line.encode())


def read_events(run_directory: Path) -> list[dict[str, Any]]:
    """Of all who write them, in the order of time; of one file in its own, also where a clock was set back."""
    files = []
    for name in (EVENTS, DRIVER_EVENTS):
        latest = 0.0
        found = [event for event in read_whole_lines(run_directory / name) if {"time", "event"} <= event.keys()]
        files.append([(latest := max(latest, event["time"]), event) for event in found])
    return [event for _, event in heapq.merge(*files, key=lambda timed: timed[0])]


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without those that a crash or a full disk cut short; none without a file."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [value for value in found if isinstance(value, dict)]
