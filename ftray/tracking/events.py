"""events.jsonl: what happened to a run besides its steps: starts, restarts, skipped steps, failed saves, stops."""

import json
import time
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


def record_event(run_directory: Path, kind: str, **fields: Any) -> None:
    """Appends one line. Short enough to be written whole, whoever else appends."""
    line = json.dumps({"time": time.time(), "event": kind, **fields}) + "\n"
    with (run_directory / EVENTS).open("a", encoding="utf-8") as file:
        file.write(line)


def read_events(run_directory: Path) -> list[dict[str, Any]]:
    path = run_directory / EVENTS
    if not path.is_file():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
