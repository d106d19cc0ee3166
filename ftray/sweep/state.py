"""What a sweep knows: its trials, as the events of its journal made them."""

import math
from typing import Any

from ftray.config import SweepConfig
from ftray.errors import NotFoundError
from ftray.sweep.search.population import RATE, Moved
from ftray.sweep.trials import Progress, Report, SweepRun, Trial, run_name

MAX_BARREN = 10


class SweepState:
    def __init__(self, config: SweepConfig):
        self.config = config
        self.trials: list[Trial] = []
        self.requests_met: set[str | None] = set()  # names of their files
        self.moves: list[Moved] = []  # of a population
        self.generation = 1  # of a population: the one that trains now
        self._sign = 1.0 if config.search.mode == "min" else -1.0

    def apply(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "trial":
                number, seeds = event["trial"], self.config.seeds
                trial = Trial(number, event["point"], event["cloned_from"])
                trial.runs = [SweepRun(number, seed, run_name(number, seed, num_seeds=len(seeds))) for seed in seeds]
                self.trials.append(trial)
                self.requests_met.add(event.get("request"))
            case "reports":
                for reported in event["reports"]:
                    report = Report(reported["step"], reported["value"], reported["tokens"], reported["seconds"])
                    self.run(reported["run"]).reports.append(report)
            case "end":
                run = self.run(event["run"])
                run.outcome, run.message = event["outcome"], event["message"]
                run.end = Progress(**event.get("progress", {}))
            case "wait":
                self.run(event["run"]).waits = True
            case "move":
                self.run(event["run"]).point = event["point"]
                self.moves.append(Moved(event["step"], event["run"], event["source"], event["point"][RATE]))
            case "generation":
                self.generation += 1
                for run in self.runs:
                    run.waits = False

    @property
    def runs(self) -> list[SweepRun]:
        return [run for trial in self.trials for run in trial.runs]

    def trial(self, name: str) -> Trial:
        found = next((trial for trial in self.trials if trial.name == name), None)
        if found is None:
            known = ", ".join(trial.name for trial in self.trials)
            raise NotFoundError(f"{name}: no such trial; {self.config.name} has {known or 'none yet'}")
        return found

    def run(self, name: str) -> SweepRun:
        return next(run for run in self.runs if run.name == name)

    def is_news(self, name: str, report: Report) -> bool:
        last = self.run(name).last
        return last is None or report.step > last.step

    @property
    def best(self) -> Trial | None:
        ranked = self.ranked
        return ranked[0] if ranked and ranked[0].is_finished else None

    @property
    def ranked(self) -> list[Trial]:
        """Finished ones first, the best of them first; then those that were stopped, the farthest first."""

        def key(trial: Trial) -> tuple[bool, int, float]:
            mean = float("inf") if trial.mean is None else self._sign * trial.mean
            return not trial.is_finished, 0 if trial.is_finished else -trial.step, mean

        return sorted(self.trials, key=key)

    @property
    def best_run(self) -> SweepRun | None:
        """Of the best trial's seeds the best."""
        if self.best is None:
            return None
        return min(self.best.runs, key=lambda run: self._sign * (run.value if run.value is not None else math.inf))

    @property
    def tokens(self) -> int:
        return sum(trial.tokens for trial in self.trials)

    @property
    def steps(self) -> int:
        return sum(run.progress.step for run in self.runs)

    @property
    def gave_up(self) -> str | None:
        """Why a search without a number of trials makes no more: what fails at once uses up no steps and no tokens."""
        search = self.config.search
        if search.algorithm == "grid" or search.trials is not None:
            return None
        last = [trial for trial in self.trials if trial.is_over][-MAX_BARREN:]
        if len(last) < MAX_BARREN or any(run.reports for trial in last for run in trial.runs):
            return None
        return f"the last {MAX_BARREN} trials ended before their first report (the last: {last[-1].message})"

    def history(self, name: str) -> list[Moved]:
        """How a population's weights came into this run, the last move last."""
        found: list[Moved] = []
        for moved in reversed(self.moves):
            if moved.run == name:
                found.insert(0, moved)
                name = moved.source
        return found

    def lineage_of(self, run: SweepRun) -> dict[str, Any]:
        """What an adapter that it left is published with."""
        lineage = {"sweep": self.config.name, "trial": run.name, "point": self.point_of(run)}
        if history := self.history(run.name):
            lineage["took_over"] = [vars(moved) for moved in history]
        return lineage

    def point_of(self, run: SweepRun) -> dict[str, Any]:
        return run.point if run.point is not None else self.trials[run.trial].point
