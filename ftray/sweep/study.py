"""What a sweep knows and decides. No ray: it hears what runs report, and says what runs next and what ends.

Everything that it hears is appended to `trials.jsonl`; reading that again gives the same study, so a sweep whose driver
died goes on where it stood.
"""

import errno
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftray.config import RunConfig, Space, SweepConfig
from ftray.config.space import point_text
from ftray.config.sweep import why_not_swept
from ftray.errors import ConfigError, NotFoundError
from ftray.storage import read_json, write_bytes, write_json
from ftray.sweep.schedulers import make_scheduler
from ftray.sweep.search import make_search
from ftray.sweep.trials import Outcome, Report, SweepRun, Trial, run_name, trials_directory

JOURNAL = "trials.jsonl"
REQUESTS = "requests"  # trials that the user asked for while the sweep runs


class Study:
    def __init__(
        self,
        config: SweepConfig,
        space: Space,
        directory: Path,
        *,
        is_driver: bool = True,
        clock: Callable[[], float] = time.time,
    ):
        """`is_driver`: others look into the same directory, and leave the journal as it is."""
        self.config = config
        self.space = space
        self.trials: list[Trial] = []
        self.spent_s = 0.0  # of earlier drivers
        self._search = make_search(space, config.search)
        every = space.config(
            next(iter(space.points_to_check(is_grid=config.search.algorithm == "grid")))
        ).evaluation.every
        self._scheduler = make_scheduler(config.search, evaluate_every=every)
        self._sign = 1.0 if config.search.mode == "min" else -1.0
        self._given: set[str] = set()  # names of the runs that somebody works on
        self._asked: dict[str, str] = {}  # why a run was asked to stop
        self._diverged: dict[str, str] = {}  # whose metric is no number any more
        self._clock = clock
        self._began = clock()
        self._directory = directory
        self._path = directory / JOURNAL
        self._replay(mend=is_driver)

    # -- what runs next --------------------------------------------------------------------------------------------

    def next_run(self, fits: Callable[[RunConfig], bool] = lambda run: True) -> SweepRun | None:
        """A run to work on: one that was cut off, another seed of a trial, or a new trial; `fits`: by its config. None:
        there is nothing to start, now or ever. New trials that do not fit wait for somebody else."""
        while self.spent is None:
            for run in self.runs:
                if run.outcome is None and run.name not in self._given and fits(self.config_of(run)):
                    self._given.add(run.name)
                    return run
            if not self._add_trial():
                return None
        return None

    def _add_trial(self) -> bool:
        """One that the user asked for, or the search's next."""
        for path in self._requests:
            self._note({"event": "trial", "trial": len(self.trials), **read_json(path)})
            path.unlink()
            return True
        point = self._next_point()
        if point is None:
            return False
        self._note({"event": "trial", "trial": len(self.trials), "point": point, "cloned_from": None})
        try:
            self.space.check_point(point, label=self.trials[-1].name)
        except ConfigError as error:  # of a range, not all points were checked before the start
            for run in self.trials[-1].runs:
                self.end(run.name, "failed", "; ".join(error.problems))
        return True

    def clone(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Asks the sweep, also one that runs in another process, for a trial like this one with some keys changed.
        Returns its point; raises `ConfigError` when the run's schema refuses it."""
        trial = self.trial(name)
        point = trial.point | changes
        label = f"clone-trial {name}"
        refused = [f"{key}: {reason}" for key in changes if (reason := why_not_swept(key)) is not None]
        if refused:
            raise ConfigError(label, refused)
        self.space.check_point(point, label=label)
        write_json(self._directory / REQUESTS / f"{time.time_ns()}.json", {"point": point, "cloned_from": trial.name})
        return point

    def take_back(self, names: set[str]) -> None:
        """Whoever worked on these runs has died: those that have not ended are given out again."""
        self._given -= names

    @property
    def _requests(self) -> list[Path]:
        return sorted((self._directory / REQUESTS).glob("*.json"))

    @property
    def is_over(self) -> bool:
        if self.spent is not None:
            return True
        return all(trial.is_over for trial in self.trials) and not self._requests and self._next_point() is None

    def _next_point(self) -> dict[str, Any] | None:
        own = [trial for trial in self.trials if trial.cloned_from is None]
        limit = self.config.search.trials
        return None if limit is not None and len(own) >= limit else self._search.point(len(own), own)

    def report(self, name: str, report: Report) -> str | None:
        """Returns why the run is to stop, or None. A run that resumed may tell again what it has told."""
        run = self.run(name)
        if not math.isfinite(report.value):
            told = f"step {report.step}: {self.config.search.metric} is {report.value}"
            self._asked[name] = self._diverged[name] = told
        elif run.last is None or report.step > run.last.step:
            self._note({"event": "report", "run": name, **vars(report)})
        return self._asked.get(name) or self.spent

    def end(self, name: str, outcome: Outcome, message: str | None = None) -> SweepRun:
        """One that stopped because the budget is spent has not ended: with a larger one it goes on."""
        run = self.run(name)
        if name in self._diverged:
            outcome, message = "diverged", self._diverged[name]
        if outcome != "stopped" or name in self._asked or self.spent is None:
            message = message if outcome != "stopped" else self._asked.get(name, "by the user")
            self._note({"event": "end", "run": name, "outcome": outcome, "message": message})
        return run

    def config_of(self, run: SweepRun) -> RunConfig:
        point = self.trials[run.trial].point
        runs_dir = str(trials_directory(self._directory))
        config = self.space.config(point, name=run.name, seed=run.seed, runs_dir=runs_dir)
        group = config.tracking.wandb_group or self.config.name
        return config.model_copy(update={"tracking": config.tracking.model_copy(update={"wandb_group": group})})

    # -- what is known ---------------------------------------------------------------------------------------------

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
        return sum(run.last.step for run in self.runs if run.last is not None)

    @property
    def seconds(self) -> float:
        """Of all drivers of this sweep."""
        return self.spent_s + self._clock() - self._began

    @property
    def spent(self) -> str | None:
        """Which budget is used up."""
        budget = self.config.search.budget
        if budget.steps is not None and self.steps >= budget.steps:
            return f"the budget of {budget.steps:,} steps is spent"
        if budget.tokens is not None and self.tokens >= budget.tokens:
            return f"the budget of {budget.tokens:,} tokens is spent"
        if budget.hours is not None and self.seconds >= budget.hours * 3600:
            return f"the budget of {budget.hours:g} hours is spent"
        return None

    @property
    def num_planned(self) -> int | None:
        """Trials in all; None: as many as the budget allows."""
        search = self.config.search
        if search.algorithm != "grid":
            return search.trials
        whole = sum(1 for _ in self.space.grid())
        return whole if search.trials is None else min(whole, search.trials)

    @property
    def num_planned_runs(self) -> int | None:
        return None if self.num_planned is None else self.num_planned * len(self.config.seeds)

    def describe_plan(self) -> str:
        search = self.config.search
        count = "as many trials as the budget allows" if self.num_planned is None else f"{self.num_planned} trials"
        seeds = f" of {len(self.config.seeds)} seeds" if len(self.config.seeds) > 1 else ""
        return f"{count}{seeds}, {search.algorithm} search, scheduler {search.scheduler}"

    def describe_end(self, run: SweepRun) -> str:
        value = "" if run.value is None else f"  {self.config.search.metric} {run.value:.4f}"
        return f"{run.name}  {run.outcome or 'interrupted'}{value}{f'  {run.message}' if run.message else ''}"

    def describe_state(self) -> str:
        counts = Counter(trial.status for trial in self.trials)
        return ", ".join(f"{count} {status}" for status, count in counts.items()) or "no trial had begun"

    def conclusion(self) -> str:
        """The choice and how sure it is, in a sentence."""
        best, metric = self.best, self.config.search.metric
        if best is None:
            return f"no trial has finished yet ({self.describe_state()})"
        choice = point_text(best.point)
        text = f"best: {best.name} ({choice}), {metric} {best.mean:.4f}"
        others = [trial for trial in self.ranked[1:] if trial.is_finished]
        if not others:
            return f"{text}; it is the only one that finished"
        next_best = others[0]
        assert best.mean is not None
        assert next_best.mean is not None
        gap = abs(next_best.mean - best.mean)
        text += f", {gap:.4f} ahead of {next_best.name} ({point_text(next_best.point)})"
        if best.half_interval is None or next_best.half_interval is None:
            return f"{text}; with one seed it is not known whether that is more than chance: give `seeds: 3`"
        sure = gap > best.half_interval + next_best.half_interval
        noise = "more" if sure else "not more"
        return f"{text}, which is {noise} than their 95% intervals over {len(self.config.seeds)} seeds"

    # -- the journal -----------------------------------------------------------------------------------------------

    def _replay(self, *, mend: bool) -> None:
        if not self._path.is_file():
            return
        lines = self._path.read_bytes().split(b"\n")
        whole = [line for line in lines[:-1] if line]  # what follows the last newline was being written
        if mend and lines[-1]:
            write_bytes(self._path, b"".join(line + b"\n" for line in whole))
        for line in whole:
            event = json.loads(line)
            self._apply(event)
            self.spent_s = event["seconds_spent"]

    def _note(self, event: dict[str, Any]) -> None:
        """Written before it counts."""
        line = json.dumps({**event, "time": time.time(), "seconds_spent": round(self.seconds, 3)}) + "\n"
        with self._path.open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                if file.write(line.encode()) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)  # half a line would spoil what comes after it
                raise
        self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        if event["event"] == "trial":
            trial = Trial(event["trial"], event["point"], event["cloned_from"])
            seeds = self.config.seeds
            trial.runs = [
                SweepRun(trial.number, seed, run_name(trial.number, seed, num_seeds=len(seeds))) for seed in seeds
            ]
            self.trials.append(trial)
            return
        run = self.run(event["run"])
        if event["event"] == "end":
            run.outcome, run.message = event["outcome"], event["message"]
            return
        report = Report(event["step"], event["value"], event["tokens"], event["seconds"])
        run.reports.append(report)
        if not self._scheduler.goes_on(run.name, step=report.step, value=self._sign * report.value):
            self._asked.setdefault(run.name, f"{self.config.search.scheduler}, at step {report.step}")
