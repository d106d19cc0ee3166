"""`sweep.html`: the table, the plots and the choice. One file, no network."""

import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ftray.config.space import flow_text, point_text, short
from ftray.evaluate.scores import Score
from ftray.storage import read_json, write_bytes
from ftray.sweep.compare.comparison import Comparison, Method, read_comparison
from ftray.sweep.report.plots import (
    curves,
    has_values,
    heat_map,
    heat_map_keys,
    importances,
    of_the_space,
    parallel_coordinates,
)
from ftray.sweep.report.text import conclusion, describe_plan, describe_state
from ftray.sweep.search.importance import importance
from ftray.sweep.study import Study
from ftray.sweep.trials import TRIALS, SweepRun, Trial
from ftray.tracking.curves import assets, style
from ftray.tracking.report import REPORT as RUN_REPORT

TEMPLATE = Path(__file__).with_name("sweep.html")
REPORT = "sweep.html"


class LivePage:
    """When it is written anew: at the end of a run, and now and then as reports come."""

    def __init__(self, write: Callable[[], None], *, every_s: float = 15.0):
        self._write = write
        self._every_s = every_s
        self._written = -math.inf

    def __call__(self, *, has_ended: bool) -> None:
        if has_ended or time.monotonic() - self._written >= self._every_s:
            self._write()
            self._written = time.monotonic()


def write_sweep_report(study: Study, directory: Path) -> Path:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    found = importance(of_the_space(study), study.space, study.config.search)
    keys = heat_map_keys(study, found.shares if found is not None else {})
    plots = []
    if has_values(study.trials):
        plots = [curves(study), parallel_coordinates(study)]
        plots += [heat_map(study, keys)] if keys is not None else []
        plots += [importances(found)] if found is not None else []
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        refresh=not study.is_over,  # while it runs, the page shows it as it goes
        config=study.config,
        keys=list(study.space.free),
        rows=[row_of(trial, study, directory) for trial in study.ranked],
        to_come=[[short(point[key]) for key in study.space.free] for point in study.points_to_come],
        num_planned=study.num_planned,
        conclusion=conclusion(study),
        best=study.best,
        command=train_command(study, study.best_run) if study.best_run is not None and not study.moves else None,
        plan=describe_plan(study),
        state=describe_state(study),
        num_runs=len(study.runs),
        tokens=study.tokens,
        minutes=study.seconds / 60,
        plots=plots,
        style=style(),
        assets=assets() if plots else "",
        environment=read_json(directory / "environment.json"),
        comparison=comparison_table(read_comparison(study, directory)),
    )
    path = directory / REPORT
    write_bytes(path, page.encode())
    return path


def row_of(trial: Trial, study: Study, directory: Path) -> dict:
    reports = {run.name: f"{TRIALS}/{run.name}/{RUN_REPORT}" for run in trial.runs}
    return {
        "name": trial.name,
        "reports": {name: path for name, path in reports.items() if (directory / path).is_file()},
        "values": [short(trial.latest[key]) for key in study.space.free],
        "metric": metric_text(trial),
        "step": trial.step,
        "tokens": trial.tokens,
        "seconds": trial.seconds,
        "outcome": outcome_text(trial, study),
        "is_best": trial is study.best,
    }


@dataclass(frozen=True)
class ComparisonTable:
    columns: list[str]
    rows: list[list[str]]
    verdicts: list[str]


def comparison_table(comparison: Comparison | None) -> ComparisonTable | None:
    """What of it is known, as text."""
    if comparison is None:
        return None
    columns = [comparison.key, "trial", "learning rate", comparison.metric, "deviation"]
    columns += ["exact match", "general text, loss", "tokens/s alone", "GiB alone"]
    rows = [method_row(method, comparison.base) for method in comparison.methods]
    if comparison.base is not None:
        base = comparison.base
        untuned = [percent(base.accuracy), number(base.general_loss)]
        rows.insert(0, ["the base, untuned", *[""] * 4, *untuned, "", ""])
    return ComparisonTable(columns, rows, comparison.verdicts())


def method_row(method: Method, base: Score | None) -> list[str]:
    general = number(method.general_loss)
    if method.general_loss is not None and base is not None and base.general_loss is not None:
        general += f" ({method.general_loss - base.general_loss:+.4f})"
    return [
        short(method.value),
        method.best.name if method.best is not None else "none finished",
        "" if method.rate is None else f"{method.rate:.3g}",
        "" if method.best is None else metric_text(method.best),
        number(method.deviation),
        percent(method.accuracy),
        general,
        "" if method.alone is None else f"{method.alone.tokens_per_s:.0f}",
        "" if method.alone is None else f"{method.alone.memory_gib:.2f}",
    ]


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def metric_text(trial: Trial) -> str:
    if trial.mean is None:
        return ""
    return f"{trial.mean:.4f}" + ("" if trial.half_interval is None else f" ± {trial.half_interval:.4f}")


def status_text(trial: Trial, study: Study) -> str:
    if not trial.is_over and study.spent is not None:
        return f"cut off: {study.spent}"
    return trial.status if trial.message is None else f"{trial.status}: {trial.message.splitlines()[0]}"


def outcome_text(trial: Trial, study: Study) -> str:
    if trial.cloned_from is None:
        return status_text(trial, study)
    return f"{status_text(trial, study)} (cloned from {trial.cloned_from}: {point_text(trial.point)})"


def train_command(study: Study, run: SweepRun) -> str:
    """What runs it again by itself."""
    config = study.config
    set_keys = {**flat(config.overrides), **study.space.overrides(study.point_of(run)), "seed": run.seed}
    words = [f"{key}={flow_text(value)}" for key, value in set_keys.items()]
    return shlex.join(["ftray", "train", config.run, f"name={config.name}-{run.name}", *words])


def flat(overrides: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in overrides.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
