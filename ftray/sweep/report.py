"""`sweep.html`: the table, the plots and the choice. One file, no network."""

import json
import re
import shlex
from pathlib import Path

import jinja2

from ftray.config.space import point_text, short
from ftray.storage import read_json, write_bytes
from ftray.sweep.plots import (
    curves,
    has_values,
    heat_map,
    heat_map_keys,
    importances,
    of_the_space,
    parallel_coordinates,
)
from ftray.sweep.search import importance
from ftray.sweep.study import Study
from ftray.sweep.trials import Trial

TEMPLATE = Path(__file__).with_name("sweep.html")
REPORT = "sweep.html"


def write_sweep_report(study: Study, directory: Path) -> Path:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    shares = importance(of_the_space(study), study.space, study.config.search)
    keys = heat_map_keys(study, shares)
    plots = []
    if has_values(study.trials):
        plots = [curves(study), parallel_coordinates(study)]
        plots += [heat_map(study, keys)] if keys is not None else []
        plots += [importances(shares)] if shares else []
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        refresh=not study.is_over,  # while it runs, the page shows it as it goes
        config=study.config,
        keys=list(study.space.free),
        rows=[row_of(trial, study) for trial in study.ranked],
        conclusion=study.conclusion(),
        best=study.best,
        command=train_command(study, study.best) if study.best is not None else None,
        plan=study.describe_plan(),
        state=study.describe_state(),
        num_runs=len(study.runs),
        tokens=study.tokens,
        minutes=study.seconds / 60,
        plots=plots,
        environment=read_json(directory / "environment.json"),
    )
    path = directory / REPORT
    write_bytes(path, page.encode())
    return path


def row_of(trial: Trial, study: Study) -> dict:
    return {
        "name": trial.name,
        "values": [short(trial.point[key]) for key in study.space.free],
        "metric": metric_text(trial),
        "step": trial.step,
        "tokens": trial.tokens,
        "seconds": trial.seconds,
        "outcome": outcome_text(trial),
        "is_best": trial is study.best,
    }


def metric_text(trial: Trial) -> str:
    if trial.mean is None:
        return ""
    return f"{trial.mean:.4f}" + ("" if trial.half_interval is None else f" ± {trial.half_interval:.4f}")


def status_text(trial: Trial) -> str:
    return trial.status if trial.message is None else f"{trial.status}: {trial.message.splitlines()[0]}"


def outcome_text(trial: Trial) -> str:
    if trial.cloned_from is None:
        return status_text(trial)
    return f"{status_text(trial)} (cloned from {trial.cloned_from}: {point_text(trial.point)})"


def train_command(study: Study, trial: Trial) -> str:
    """What runs the trial again by itself, its first seed."""
    config = study.config
    set_keys = {**flat(config.overrides), **study.space.overrides(trial.point), "seed": config.seeds[0]}
    words = [f"{key}={yaml_text(value)}" for key, value in set_keys.items()]
    return shlex.join(["ftray", "train", config.run, f"name={config.name}-{trial.name}", *words])


def flat(overrides: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in overrides.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def yaml_text(value: object) -> str:
    """On one line, as an override is read."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "[" + ", ".join(yaml_text(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and (not re.fullmatch(r"[A-Za-z][\w./@-]*", value) or value in ("null", "true", "false")):
        return json.dumps(value)
    return str(value)
