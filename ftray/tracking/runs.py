"""Run directories, looked at together: what each did, and how two differ."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftray.config.renamed import with_new_names
from ftray.errors import DamagedError, NotFoundError
from ftray.storage import read_json
from ftray.tracking.events import read_events
from ftray.tracking.metrics import read_metrics
from ftray.tracking.status import FAILED, INTERRUPTED, RUNNING, read_status

RESULT = "result.json"  # of a run that has finished
TOKENS = ".tokens"  # beside the run directories: all nodes share it
FINISHED, DAMAGED = "finished", "damaged"
RECENT = 50  # steps, whose pace counts


@dataclass(frozen=True)
class RunSummary:
    name: str
    path: Path
    status: str  # queued, running, finished, failed, interrupted, or damaged
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    driver: dict[str, Any] = field(default_factory=dict)  # what its driver said last (tracking/status.py)
    problem: str | None = None  # why it failed, or what is damaged

    @property
    def tags(self) -> list[str]:
        return self.config.get("tracking", {}).get("tags", [])

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

    @property
    def began(self) -> float | None:
        """When its driver was started last; of an older ftray's run, when its first event was."""
        return self.driver.get("began") or (self.events[0]["time"] if self.events else None)

    @property
    def seconds_left(self) -> float | None:
        """Of a running one, at the pace of its last steps."""
        total, recent = self.driver.get("num_steps"), self.steps[-RECENT:]
        if self.status != RUNNING or total is None or not recent:
            return None
        return (total - self.num_steps) * sum(step["seconds"] for step in recent) / len(recent)


def find_runs(runs_dir: Path, *, is_driven: Callable[[str], bool] = lambda name: False) -> list[RunSummary]:
    """Newest first; one that cannot be read is among them, as damaged. `is_driven`: a process works on that run now."""
    found = [path.parent for path in runs_dir.glob("*/config.json")]
    runs = []
    for path in sorted(found, key=lambda p: (p / "config.json").stat().st_mtime, reverse=True):
        try:
            runs.append(read_run(path, is_driven=is_driven(path.name)))
        except DamagedError as error:
            runs.append(RunSummary(path.name, path, DAMAGED, {}, [], [], [], problem=str(error)))
    return runs


def read_run(path: Path, *, is_driven: bool = False) -> RunSummary:
    """Raises `NotFoundError`, or `DamagedError` with the file and line."""
    if not (path / "config.json").is_file():
        near = sorted(p.parent.name for p in path.parent.glob("*/config.json"))
        have = f"; {path.parent} has {', '.join(near)}" if near else f"; {path.parent} has none"
        raise NotFoundError(f"{path.name}: no such run{have}")
    events = read_events(path)
    metrics = read_metrics(path)
    if is_finished := (path / RESULT).is_file():
        read_json(path / RESULT)
    driver = read_status(path)
    return RunSummary(
        name=path.name,
        path=path,
        status=status_of(driver, is_finished=is_finished, is_driven=is_driven),
        config=with_new_names(read_json(path / "config.json")),
        steps=[record for record in metrics if "loss" in record],
        evaluations=[record for record in metrics if "eval_loss" in record],
        events=events,
        driver=driver,
        problem=driver.get("error"),
    )


def status_of(driver: dict[str, Any], *, is_finished: bool, is_driven: bool) -> str:
    """`is_driven`: its lock is held. A driver that was killed leaves a lock that is free."""
    if is_driven:
        return driver.get("state", RUNNING)
    if is_finished:
        return FINISHED
    return FAILED if driver.get("state") == FAILED else INTERRUPTED


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, value in one, value in the other) of every differing leaf, as JSON."""
    for name in sorted(one.keys() | other.keys()):
        key, a, b = f"{prefix}{name}", one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{key}.")
        elif a != b:
            yield key, json.dumps(a), json.dumps(b)
