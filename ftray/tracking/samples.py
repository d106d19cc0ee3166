"""samples.jsonl: what the model answered to a few evaluation prompts, at each evaluation."""

import contextlib
import json
from pathlib import Path
from typing import Any

from ftray.tracking.events import read_whole_lines

SAMPLES = "samples.jsonl"


def write_samples(run_directory: Path, step: int, rows: list[dict[str, str]]) -> None:
    """`rows`: prompt, answer, expected. On a full disk they are left out: a run does not end for want of a sample."""
    lines = "".join(json.dumps({"step": step, **row}) + "\n" for row in rows)
    with contextlib.suppress(OSError), (run_directory / SAMPLES).open("a", encoding="utf-8") as file:
        file.write(lines)


def read_samples(run_directory: Path) -> list[dict[str, Any]]:
    """Those of a step that was trained twice: the later ones."""
    found = {(sample["step"], sample["prompt"]): sample for sample in read_whole_lines(run_directory / SAMPLES)}
    return sorted(found.values(), key=lambda sample: sample["step"])
