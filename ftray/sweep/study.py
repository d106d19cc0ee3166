"""What a sweep knows and decides. No ray: it hears what runs report, and says what runs next and what ends.

Everything that it hears is appended to `trials.jsonl`; reading that again gives the same study, so a sweep whose driver
died goes on where it stood.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftray.config import RunConfig, Space, SweepConfig
from ftray.config.domains import Range
from ftray.errors import ConfigError
from ftray.storage import read_json
from ftray.sweep.journal import Journal
from ftray.sweep.requests import Requests, check_clone
from ftray.sweep.search.algorithms import make_search
from ftray.sweep.search.population import RATE, Move, choose_moves, has_saved, take_over
from ftray.sweep.search.schedulers import Arrival, make_scheduler
from ftray.sweep.state import SweepState
from ftray.sweep.trials import (
    NOTHING_DONE,
    TRIALS,
    Outcome,
    Progress,
    Report,
    SweepRun,
    Trial,
    trial_name,
    trials_directory,
)
from ftray.tracking.jobs import JOURNAL
from ftray.train.job import STOP_REQUEST
from ftray.train.runs.store import run_store
from ftray.train.runs.uri import artifact_name

BY_USER = "by the user"


class Study(SweepState):
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
        super().__init__(config)
        self.space = space
        self.spent_s = 0.0  # of earlier drivers
        self._search = make_search(space, config.search)
        self.base_run = space.first_run(config)
        every = self.base_run.evaluation.every
        store = run_store(self.base_run.runs_dir)
        # As users and workers find it; on a disk it is where `directory` is, however its config named that.
        self.uri = str(directory) if store.shared_disk is not None else store.uri(config.name)
        self.trials_uri = f"{self.uri}/{TRIALS}"
        self._scheduler = make_scheduler(config.search, evaluate_every=every)
        self.generation_steps = config.search.generation_steps or every if config.search.scheduler == "pbt" else None
        self._given: set[str] = set()  # names of the runs that somebody works on
        self._asked: dict[str, str] = {}  # why a run was asked to stop
        self._judged: dict[str, int] = {}  # by trial: up to which step the scheduler has
        self._diverged: dict[str, str] = {}  # whose metric is no number any more
        self._clock = clock
        self._began = clock()
        self.directory = directory
        self._requests = Requests(directory)
        self._journal = Journal(directory / JOURNAL)
        self._replay(repair=is_driver)
        if is_driver:
            self._turn_generation()

    # -- what runs next --------------------------------------------------------------------------------------------

    def next_run(self, fits: Callable[[RunConfig], bool] = lambda run: True) -> SweepRun | None:
        """A run to work on: one that was cut off, another seed of a trial, or a new trial; `fits`: by its config. None:
        there is nothing to start, now or ever. New trials that do not fit wait for somebody else."""
        while self.spent is None:
            for run in [run for run in self.runs if run.outcome is None and run.name not in self._given]:
                if self._requests.calls_off(run.name) or run.name in self._asked:  # as another seed of its trial may be
                    self._note_end(run.name, "stopped", None)
            self._turn_generation()  # also one that failed before, on a full disk
            for run in self.runs:
                if run.outcome is None and not run.waits and run.name not in self._given and fits(self.config_of(run)):
                    self._given.add(run.name)
                    return run
            if not self._add_trial():
                return None
        return None

    def _add_trial(self) -> bool:
        """One that the user asked for, or the search's next."""
        for path in self._requests.trials:
            if path.name not in self.requests_met:  # its driver was ended before it removed that
                asked = {"request": path.name, **read_json(path)}
                self._note({"event": "trial", "trial": len(self.trials), **asked})
                path.unlink()
                return True
            path.unlink()
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
        point = check_clone(trial, changes, self.space, in_population=self.until_step is not None)
        self._requests.add(point, cloned_from=trial.name)
        return point

    def stop(self, trial: Trial) -> list[str]:
        """Asks for the end of its runs, also those of a sweep that runs in another process. Returns their names."""
        names = [run.name for run in trial.runs if run.outcome is None]
        for name in names:
            self._requests.call_off(name)  # where nobody works on it now
            self.ask_to_end(name)
        return names

    def ask_to_end(self, name: str) -> None:
        """Whoever works on this run saves it, and ends it, at its next step."""
        run_store(self.trials_uri).ask_to_stop(name)

    def take_back(self, names: set[str]) -> None:
        """Whoever worked on these runs has died: those that have not ended are given out again."""
        self._given -= names

    @property
    def is_over(self) -> bool:
        is_idle = all(trial.is_over for trial in self.trials) and not self._requests.trials
        return self.spent is not None or (is_idle and self._next_point() is None)

    def _next_point(self) -> dict[str, Any] | None:
        own = [trial for trial in self.trials if trial.cloned_from is None]
        limit = self.config.search.trials
        is_last = self.gave_up is not None or (limit is not None and len(own) >= limit)
        return None if is_last else self._search.point(len(own), own)

    def report(self, name: str, report: Report) -> str | None:
        """Returns why the run is to stop, or None. A run that resumed may tell again what it has told."""
        return self.report_together({name: report})[name]

    def report_together(self, reports: dict[str, Report]) -> dict[str, str | None]:
        """By run: what several tell at the same moment."""
        news = []
        for name, report in reports.items():
            if not math.isfinite(report.value):
                reported = f"step {report.step}: {self.config.search.metric} is {report.value}"
                self._asked[name] = self._diverged[name] = reported
            elif self.is_news(name, report):
                news.append({"run": name, **vars(report)})
            if self._requests.calls_off(name):
                self._asked.setdefault(name, BY_USER)
        if news:
            self._note({"event": "reports", "reports": news})
        return {name: self._asked.get(name) or self.spent for name in reports}

    def end(
        self, name: str, outcome: Outcome, message: str | None = None, *, progress: Progress = NOTHING_DONE
    ) -> SweepRun:
        """One that stopped because the budget is spent has not ended: with a larger one it goes on. `progress`: how far
        it had come."""
        run = self.run(name)
        has_come = run.last is not None and run.last.step == self.until_step
        if outcome == "stopped" and has_come and name not in self._asked and not self._user_stops(run):
            self._note({"event": "wait", "run": name})
            self._given.discard(name)
            self._turn_generation()
            return run
        if outcome != "stopped" or name in self._asked or self.spent is None:
            self._note_end(name, outcome, message, progress)
            self._turn_generation()
        return run

    def _note_end(self, name: str, outcome: Outcome, message: str | None, progress: Progress = NOTHING_DONE) -> None:
        if name in self._diverged:
            outcome, message = "diverged", self._diverged[name]
        elif outcome == "stopped":
            message = self._asked.get(name, BY_USER)
        self._note({"event": "end", "run": name, "outcome": outcome, "message": message, "progress": vars(progress)})

    # -- a population ----------------------------------------------------------------------------------------------

    @property
    def until_step(self) -> int | None:
        """Where the runs of this generation wait for each other; None: there are no generations."""
        return None if self.generation_steps is None else self.generation * self.generation_steps

    @property
    def waits(self) -> bool:
        """There will be runs to work on once others have come where they wait for each other."""
        return self.until_step is not None and self.spent is None and any(run.outcome is None for run in self.runs)

    def _turn_generation(self) -> None:
        """When all wait: some take over from others, and all go on."""
        for run in [run for run in self.runs if run.outcome is None and run.waits and self._user_stops(run)]:
            self._note_end(run.name, "stopped", None)
        step, open_runs = self.until_step, [run for run in self.runs if run.outcome is None]
        if step is None or not open_runs or not all(run.waits for run in open_runs):
            return
        if self._next_point() is not None:  # the population is not whole
            return
        done = {moved.run for moved in self.moves if moved.step == step}  # of a generation that was cut off
        for move in self._choose_moves(open_runs, step):
            if move.run not in done:
                self._take_over(move, step)
        self._note({"event": "generation", "step": step})

    def _choose_moves(self, runs: list[SweepRun], step: int) -> list[Move]:
        values = {run.name: self._sign * value for run in runs if (value := run.value_at(step)) is not None}
        points = {run.name: self.point_of(run) for run in runs}
        rates = self.space.domains[RATE]
        assert isinstance(rates, Range)
        directory = trials_directory(self.directory)
        saved = [run.name for run in runs if has_saved(directory / run.name, step=step)]
        return choose_moves(values, points, rates, saved=saved, seed=f"{self.config.search.seed}/{self.generation}")

    def _take_over(self, move: Move, step: int) -> None:
        moved = replace(self.run(move.run), point=move.point)
        directory = trials_directory(self.directory)
        take_over(directory / move.run, directory / move.source, self.config_of(moved), step=step)
        self._note({"event": "move", "run": move.run, "source": move.source, "step": step, "point": move.point})

    def _user_stops(self, run: SweepRun) -> bool:
        path = trials_directory(self.directory) / run.name / STOP_REQUEST
        return path.is_file() or self._requests.calls_off(run.name)

    def config_of(self, run: SweepRun) -> RunConfig:
        config = self.space.config(self.point_of(run), name=run.name, seed=run.seed, runs_dir=self.trials_uri)
        if self.generation_steps is not None:  # what the others may take over
            saved = {"every": self.generation_steps, "keep": max(2, config.checkpoint.keep)}
            config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=saved)})
        group = config.tracking.wandb_group or self.config.name
        return config.model_copy(update={"tracking": config.tracking.model_copy(update={"wandb_group": group})})

    def artifact_of(self, run: SweepRun) -> str:
        """Path or URL of the adapter or model that it leaves."""
        name = artifact_name(is_adapter=self.config_of(run).adapter is not None)
        return f"{run_store(self.trials_uri).uri(run.name)}/{name}"

    # -- what is known ---------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Of all drivers of this sweep."""
        return self.spent_s + self._clock() - self._began

    @property
    def spent(self) -> str | None:
        """Which budget is used up."""
        budget = self.config.search.budget
        return budget.spent(steps=self.steps, tokens=self.tokens, hours=self.seconds / 3600)

    @property
    def num_planned(self) -> int | None:
        """Trials in all; None: as many as the budget allows."""
        trials = self.config.search.trials
        return trials if self.config.search.algorithm != "grid" else sum(1 for _ in self.space.grid(trials))

    @property
    def points_to_come(self) -> list[dict[str, Any]]:
        """Of trials that have not begun, where they are known before; tpe chooses by those that have ended."""
        own = [trial for trial in self.trials if trial.cloned_from is None]
        if self.num_planned is None or self.config.search.algorithm == "tpe" or self._next_point() is None:
            return []
        points = (self._search.point(number, own) for number in range(len(own), self.num_planned))
        return [point for point in points if point is not None]

    # -- the journal -----------------------------------------------------------------------------------------------

    def _replay(self, *, repair: bool) -> None:
        for event in self._journal.read(repair=repair):
            self._apply(event)
            self.spent_s = event["seconds_spent"]

    def _note(self, event: dict[str, Any]) -> None:
        """Written before it counts."""
        self._journal.append({**event, "time": time.time(), "seconds_spent": round(self.seconds, 3)})
        self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        self.apply(event)
        if event["event"] == "end" and event["outcome"] in ("failed", "diverged"):
            for run in self.trials[self.run(event["run"]).trial].runs:  # without all its seeds it cannot be the best
                self._asked.setdefault(run.name, f"{event['run']} of its trial {event['outcome']}")
        if event["event"] == "reports":
            arrivals = self._arrivals(event["reports"])
            for arrival in arrivals:
                beside = [other for other in arrivals if other is not arrival]
                if not self._scheduler.goes_on(arrival, beside=beside):
                    for run in self.trial(arrival.trial).runs:
                        self._asked.setdefault(run.name, f"{self.config.search.scheduler}, at step {arrival.step}")

    def _arrivals(self, reports: list[dict[str, Any]]) -> list[Arrival]:
        """A trial is judged once at a step, by the mean of those of its seeds that came there first, and all of them go
        on or end: one that lost a seed could not be the best, and seed by seed every trial might lose one."""
        values: dict[tuple[str, int], list[float]] = {}
        for reported in reports:
            at = (trial_name(self.run(reported["run"]).trial), reported["step"])
            values.setdefault(at, []).append(reported["value"])
        news = {at: found for at, found in values.items() if at[1] > self._judged.get(at[0], 0)}
        self._judged.update(sorted(news, key=lambda at: at[1]))
        return [Arrival(trial, step, self._sign * statistics.fmean(found)) for (trial, step), found in news.items()]
