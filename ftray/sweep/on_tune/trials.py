"""Trials as Ray Tune trials: each is a training run of its own, of one worker or many.

Tune asks the study for the next run and tells it what runs report. A run that is to stop is asked to:
it saves and ends at its next step, and nothing of Ray has to be killed.
"""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from ftray.cluster.fit_thread import Fit, last_line
from ftray.cluster.worker_env import passed_secrets
from ftray.config import RunConfig
from ftray.errors import FtrayError, StoreError, UserError
from ftray.sweep.report.report import LivePage
from ftray.sweep.report.text import describe_end
from ftray.sweep.study import Study
from ftray.sweep.trial_run import REFUSED
from ftray.sweep.trials import NOTHING_DONE, Progress, Report, trial_name
from ftray.train.runs.store import run_store

# A driver of a trial only waits: it takes no CPU, and it runs where the sweep's own driver keeps its files.
TRIAL_BUNDLE = {"node:__internal_head__": 0.0001}
MAX_TRIAL_FAILURES = 3  # of a trial's driver; its workers have their own `workers.max_failures`
POLL_S = 0.2
TUNE_DIRECTORY = "ray-tune"
# Without them it prints its own tables, keeps logs of its own, and moves every trial into another directory.
QUIET_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


Log = Callable[[str], None]


@dataclass(frozen=True)
class TrialSettings:
    """What a Tune trial gets. The run is JSON text: Tune would take a dict apart in everything that it prints."""

    run: str
    metric: str
    until_step: int | None
    is_new: bool  # the study has heard nothing of it


def run_trials(study: Study, directory: Path, *, max_concurrent: int, log: Log, on_news: LivePage) -> None:
    """Until the study has no more."""
    os.environ.update(QUIET_TUNE)
    search = StudySearch(study)
    trainable = tune.with_parameters(run_trial, secrets=passed_secrets())  # not among what Tune writes down of a trial
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([TRIAL_BUNDLE])),
        tune_config=tune.TuneConfig(search_alg=search, num_samples=-1, max_concurrent_trials=max_concurrent),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(directory / TUNE_DIRECTORY),
            failure_config=tune.FailureConfig(max_failures=MAX_TRIAL_FAILURES),
            callbacks=[StudyCallback(study, search, log, on_news)],
            verbose=0,
        ),
    )
    thread = Fit(tuner)
    while thread.is_alive():
        thread.join(POLL_S)
    if search.refusal is not None:
        raise UserError(
            f"{search.refusal}\n  the same command goes on; if that trial can never run, end it first: "
            f"ftray sweep stop-trial {study.config.name} {search.refused_trial} "
            f"--runs-dir {study.uri.rpartition('/')[0]}"
        )
    if thread.failure is not None:
        raise FtrayError(f"Ray Tune failed: {last_line(thread.failure)}") from thread.failure


class StudySearch(Searcher):
    """The study, as Ray Tune asks for trials."""

    def __init__(self, study: Study):
        super().__init__()
        self._study = study
        self.runs: dict[str, str] = {}  # by Tune's trial id
        self.refusal: str | None = None  # why the machine takes no more
        self.refused_trial: str | None = None

    def suggest(self, trial_id: str) -> Any:
        run = self._study.next_run() if self.refusal is None else None
        if run is None:  # None: it asks again later
            return None if self._study.waits and self.refusal is None else Searcher.FINISHED
        self.runs[trial_id] = run.name
        config = self._study.config_of(run)
        metric, is_new = self._study.config.search.metric, run.last is None
        return vars(TrialSettings(config.model_dump_json(), metric, self._study.until_step, is_new))

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """The callback below hears it."""

    def save(self, checkpoint_path: str) -> None:
        """The study keeps its own journal."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from its own journal")


class StudyCallback(tune.Callback):
    def __init__(self, study: Study, search: StudySearch, log: Log, on_news: LivePage):
        self._study = study
        self._search = search
        self._log = log
        self._on_news = on_news
        self._ended: set[str] = set()

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        name = self._search.runs[trial.trial_id]
        if "outcome" in result:
            self._end(trial.trial_id, result["outcome"], result["message"], Progress(**result["progress"]))
        elif "value" in result:
            report = Report(result["step"], result["value"], result["tokens"], result["seconds"])
            is_news = self._study.is_news(name, report)
            reason = self._study.report(name, report)
            if is_news:
                self._log(f"{name}  step {report.step}  {self._study.config.search.metric} {report.value:.4f}")
                self._on_news(has_ended=False)
            if reason is not None:
                self._log(f"{name}  {reason}")
            if reason is not None and report.step != self._study.until_step:  # there it stops by itself
                with contextlib.suppress(StoreError):  # it is asked again at its next report
                    self._study.ask_to_end(name)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Its driver died more often than `MAX_TRIAL_FAILURES`."""
        self._end(trial.trial_id, "failed", f"its driver died {MAX_TRIAL_FAILURES + 1} times")

    def _end(self, trial_id: str, outcome: Any, message: str | None, progress: Progress = NOTHING_DONE) -> None:
        if trial_id in self._ended:
            return
        self._ended.add(trial_id)
        name = self._search.runs[trial_id]
        if outcome == REFUSED:
            self._search.refusal = f"{name}: {message}"
            self._search.refused_trial = trial_name(self._study.run(name).trial)
            return
        self._log(describe_end(self._study, self._study.end(name, outcome, message, progress=progress)))
        self._on_news(has_ended=True)


def run_trial(settings: dict[str, Any], secrets: dict[str, str]) -> None:
    """In a Tune trial: the driver of one run. What goes wrong with the run is its outcome, not an error of Tune's."""
    os.environ.update(secrets)
    from ftray.sweep.trial_run import progress_of, run_to_end

    trial = TrialSettings(**settings)
    config = RunConfig.model_validate_json(trial.run)
    outcome, message = run_to_end(
        config,
        metric=trial.metric,
        on_report=lambda report: tune.report(vars(report)),
        until_step=trial.until_step,
        is_new=trial.is_new,
    )
    store = run_store(config.runs_dir)
    progress = progress_of(store.local(config.name))
    store.forget_local_copy(config.name)
    tune.report({"outcome": outcome, "message": message, "progress": vars(progress)})
