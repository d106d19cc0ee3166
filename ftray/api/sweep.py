"""`ftray.sweep` and what it found."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.api.frame import as_frame
from ftray.api.interrupt import nothing_left
from ftray.config import load_sweep

if TYPE_CHECKING:
    from ftray.sweep.study import Study


@dataclass(frozen=True)
class Sweep:
    study: "Study"

    @property
    def best_point(self) -> dict[str, Any] | None:
        """Values by key, of the best trial; None where none finished."""
        return self.study.best.latest if self.study.best is not None else None

    @property
    def best_artifact(self) -> str | None:
        """Path or URL of the adapter or model that the best run left."""
        return self.study.artifact_of(self.study.best_run) if self.study.best_run is not None else None

    @property
    def trials(self) -> Any:
        """A pandas DataFrame with a row for each run: trial, seed, outcome, last step and value, and its point; without
        pandas a list of dicts."""
        rows = [
            {
                "trial": trial.name,
                "run": run.name,
                "seed": run.seed,
                "outcome": run.outcome,
                "step": run.last.step if run.last is not None else None,
                self.study.config.search.metric: run.last.value if run.last is not None else None,
                **trial.latest,
            }
            for trial in self.study.trials
            for run in trial.runs
        ]
        return as_frame(rows)

    @property
    def report(self) -> str:
        """Path or URL of the page with the plots."""
        from ftray.sweep.report.report import REPORT

        return f"{self.study.uri}/{REPORT}"


def sweep(config: str | Path, *overrides: str, fresh: bool = False, log: Callable[[str], None] = print) -> Sweep:
    """Runs, or goes on with, a file of `kind: sweep`; overrides `key.path=value` as on the command line.

    Raises `ConfigError` with every problem, for any point of the space, before the cluster is touched.
    """
    loaded, space = load_sweep(config, overrides)
    from ftray.sweep.launch import look_into, run_sweep
    from ftray.sweep.prepare import sweep_directory

    def stop() -> None:
        study = look_into(sweep_directory(loaded, space))
        for trial in study.trials:
            study.stop(trial)

    with nothing_left(stop):
        return Sweep(run_sweep(loaded, space, log=log, fresh=fresh))
