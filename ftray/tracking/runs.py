"""Run directories, looked at together: what each did, and how two differ."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.config.renamed import with_new_names
from ftray.errors import NotFoundError
from ftray.storage import read_json
from ftray.tracking.events import read_events
from ftray.tracking.metrics import read_metrics

RESULT = "result.json"  # of a run that has finished


@dataclass(frozen=True)
class RunSummary:
    name: str
    path: Path
    status: str  # finished, stopped, or unfinished (running, or cut short)
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @property
    def final_loss(self) -> float | None:
        return self.steps[-1]["loss"] if self.steps else None

    @property
    def final_eval_loss(self) -> float | None:
        return self.evaluations[-1]["eval_loss"] if self.evaluations else None

    @property
    def num_steps(self) -> int:
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def seconds(self) -> float:
        return sum(step["seconds"] for step in self.steps)

    @property
    def tokens_per_s(self) -> float:
        return sum(step["num_tokens"] for step in self.steps) / max(1e-9, self.seconds)


def find_runs(runs_dir: Path) -> list[RunSummary]:
    """Newest first."""
    found = [path.parent for path in runs_dir.glob("*/config.json")]
    return [read_run(path) for path in sorted(found, key=lambda p: (p / "config.json").stat().st_mtime, reverse=True)]


def read_run(path: Path) -> RunSummary:
    if not (path / "config.json").is_file():
        near = sorted(p.parent.name for p in path.parent.glob("*/config.json"))
        have = f"; {path.parent} has {', '.join(near)}" if near else f"; {path.parent} has none"
        raise NotFoundError(f"{path.name}: no such run{have}")
    events = read_events(path)
    metrics = read_metrics(path)
    finished = (path / RESULT).is_file()
    stopped = bool(events) and events[-1]["event"] == "stopped"
    return RunSummary(
        name=path.name,
        path=path,
        status="finished" if finished else "stopped" if stopped else "unfinished",
        config=with_new_names(read_json(path / "config.json")),
        steps=[record for record in metrics if "loss" in record],
        evaluations=[record for record in metrics if "eval_loss" in record],
        events=events,
    )


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, value in one, value in the other) of every differing leaf, as JSON."""
    for name in sorted(one.keys() | other.keys()):
        key, a, b = f"{prefix}{name}", one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{key}.")
        elif a != b:
            yield key, json.dumps(a), json.dumps(b)
