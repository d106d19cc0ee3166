"""A trial is a point of the space; it is run once for every seed."""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

TRIALS = "trials"  # in a sweep's directory

Outcome = Literal["finished", "stopped", "diverged", "failed"]


@dataclass(frozen=True)
class Progress:
    """What a run has done so far."""

    step: int = 0
    tokens: int = 0  # trained on
    seconds: float = 0.0  # of training


NOTHING_DONE = Progress()


@dataclass(frozen=True)
class Report:
    step: int
    value: float  # of the sweep's metric
    tokens: int  # trained on so far
    seconds: float  # of training so far


@dataclass
class SweepRun:
    """One training run of a trial."""

    trial: int
    seed: int
    name: str  # of its run directory
    reports: list[Report] = field(default_factory=list)
    outcome: Outcome | None = None  # None: not over
    message: str | None = None  # why it ended before its end
    point: dict[str, Any] | None = None  # what it took over from another run; None: its trial's
    waits: bool = False  # for the others of its population
    end: Progress = NOTHING_DONE  # where it ended, which may be past its last report

    @property
    def progress(self) -> "Report | Progress":
        return max(self.last or NOTHING_DONE, self.end, key=lambda progress: progress.step)

    @property
    def last(self) -> Report | None:
        return self.reports[-1] if self.reports else None

    def value_at(self, step: int) -> float | None:
        return next((report.value for report in self.reports if report.step == step), None)

    @property
    def value(self) -> float | None:
        """Its metric at the end, or where it is."""
        return self.reports[-1].value if self.reports else None


@dataclass
class Trial:
    number: int
    point: dict[str, Any]
    cloned_from: str | None = None  # by the user; its point may lie outside of the space
    runs: list[SweepRun] = field(default_factory=list)

    @property
    def name(self) -> str:
        return trial_name(self.number)

    @property
    def latest(self) -> dict[str, Any]:
        """Its point, or what it took over from another trial of its population since."""
        return next((run.point for run in self.runs if run.point is not None), self.point)

    @property
    def is_over(self) -> bool:
        return all(run.outcome is not None for run in self.runs)

    @property
    def is_finished(self) -> bool:
        """Every seed ran to its end: only such trials can be the best."""
        return all(run.outcome == "finished" for run in self.runs)

    @property
    def status(self) -> str:
        """What is to be told first: a failure, a stop, or where it is."""
        outcomes = [run.outcome for run in self.runs]
        for outcome in ("failed", "diverged", "stopped"):
            if outcome in outcomes:
                return outcome
        if self.is_finished:
            return "finished"
        return "running" if any(run.reports for run in self.runs) else "started"

    @property
    def values(self) -> list[float]:
        return [run.value for run in self.runs if run.value is not None]

    @property
    def mean(self) -> float | None:
        """Over the seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def half_interval(self) -> float | None:
        """Of the mean's 95% interval over the seeds (Student's t); None with one seed."""
        if len(self.values) < 2:
            return None
        return t_quantile(len(self.values) - 1) * statistics.stdev(self.values) / math.sqrt(len(self.values))

    @property
    def step(self) -> int:
        return max((run.progress.step for run in self.runs), default=0)

    @property
    def tokens(self) -> int:
        return sum(run.progress.tokens for run in self.runs)

    @property
    def seconds(self) -> float:
        return sum(run.progress.seconds for run in self.runs)

    @property
    def message(self) -> str | None:
        return next((run.message for run in self.runs if run.message is not None), None)


def trial_name(number: int) -> str:
    return f"t{number:03d}"


def run_name(number: int, seed: int, *, num_seeds: int) -> str:
    return trial_name(number) if num_seeds == 1 else f"{trial_name(number)}-seed{seed}"


def trials_directory(sweep_directory: Path) -> Path:
    """Its entries are run directories like any others."""
    return sweep_directory / TRIALS


# Two-sided 95% quantiles of Student's t by degrees of freedom; beyond, the next smaller entry errs to the wide side.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 20: 2.086}


def t_quantile(degrees: int) -> float:
    return T_95[max(known for known in T_95 if known <= degrees)]
