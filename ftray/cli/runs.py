"""`ftray runs`"""

import json
from collections.abc import Callable, Sequence
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftray.cli.arguments import place

if TYPE_CHECKING:
    from ftray.tracking.jobs import JobSummary
    from ftray.tracking.runs import RunSummary

app = typer.Typer(help="Run directories: what is there, how two differ, and stopping one.")
RunsDir = Annotated[
    str,
    typer.Option("--runs-dir", help="Where the run directories are, also s3://BUCKET/RUNS.", callback=place),
]


class Sort(StrEnum):
    AGE = "age"
    NAME = "name"
    LOSS = "loss"
    EVAL_LOSS = "eval_loss"
    TOKENS_PER_S = "tokens_per_s"


# What is compared, smallest first; by age they are found.
SORTED_BY: dict[Sort, "Callable[[RunSummary], Any]"] = {
    Sort.NAME: lambda run: run.name,
    Sort.LOSS: lambda run: run.final_loss,
    Sort.EVAL_LOSS: lambda run: run.final_eval_loss,
    Sort.TOKENS_PER_S: lambda run: -run.tokens_per_s if run.steps else None,
}


@app.command("list")
def list_runs(
    runs_dir: RunsDir = "runs",
    name: Annotated[
        str | None, typer.Option("--name", metavar="PATTERN", help="Only names like it: 'support-*'.")
    ] = None,
    status: Annotated[
        list[str] | None, typer.Option("--status", help="Only these, such as running or failed; may be repeated.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Only runs with it (tracking.tags).")] = None,
    sort: Annotated[Sort, typer.Option("--sort", help="Of runs: newest, lowest or fastest first.")] = Sort.AGE,
    as_json: Annotated[bool, typer.Option("--json", help="Everything known of each, as JSON.")] = False,
) -> None:
    """Every run, newest first, with what it does now; then sweeps and pipelines."""
    import time

    from ftray.tracking.jobs import find_jobs
    from ftray.tracking.runs import find_runs
    from ftray.train.runs.store import run_store

    seen, is_driven = notes_of(runs_dir), run_store(runs_dir).is_driven
    runs, jobs = find_runs(seen, is_driven=is_driven), find_jobs(seen, is_driven=is_driven)
    runs = [run for run in runs if is_wanted(run, name, status) and set(tag or ()) <= set(run.tags)]
    jobs = [job for job in jobs if is_wanted(job, name, status) and not tag]
    if sort is not Sort.AGE:
        runs.sort(key=lambda run: unknown_last(SORTED_BY[sort](run)))
    if as_json:
        print(json.dumps({"runs": [line_of(run) for run in runs], "jobs": [vars(job) for job in jobs]}, indent=2))
        return
    if not runs and not jobs:
        what = "such runs" if name or status or tag else "runs; `ftray train CONFIG` makes one"
        print(f"{runs_dir} has no {what}")
        return
    now = time.time()
    width = max([4, *(len(found.name) for found in [*runs, *jobs])])
    print(
        f"{'name':<{width}}  {'status':<11}  {'steps':>9}  {'loss':>8}  {'eval loss':>9}  {'tokens/s':>8}  "
        f"{'began':>8}  {'left':>7}  base"
    )
    for run in runs:
        if run.status == "damaged":
            print(f"{run.name:<{width}}  {run.status:<11}  {run.problem}")
            continue
        total = run.driver.get("num_steps")
        steps = f"{run.num_steps}/{total}" if total else str(run.num_steps)
        print(
            f"{run.name:<{width}}  {run.status:<11}  {steps:>9}  {number(run.final_loss):>8}  "
            f"{number(run.final_eval_loss):>9}  {run.tokens_per_s:>8.0f}  {age(now, run.began):>8}  "
            f"{duration(run.seconds_left):>7}  {run.config['base_model']}"
        )
    for job in jobs:
        print(f"{job.name:<{width}}  {job.status:<11}  {job.kind}, {age(now, job.began)}: {job.done}")


def is_wanted(found: "RunSummary | JobSummary", name: str | None, status: Sequence[str] | None) -> bool:
    return (name is None or fnmatchcase(found.name, name)) and (not status or found.status in status)


def unknown_last(value: Any) -> tuple[bool, Any]:
    """What a run does not have, and NaN."""
    is_unknown = value is None or value != value
    return is_unknown, 0 if is_unknown else value


def line_of(run: "RunSummary") -> dict[str, Any]:
    return {
        "name": run.name,
        "status": run.status,
        "problem": run.problem,
        "steps": run.num_steps,
        "num_steps": run.driver.get("num_steps"),
        "final_loss": run.final_loss,
        "final_eval_loss": run.final_eval_loss,
        "tokens_per_s": run.tokens_per_s,
        "began": run.began,
        "seconds": run.seconds,
        "seconds_left": run.seconds_left,
        "base_model": run.config.get("base_model"),
        "tags": run.tags,
    }


def age(now: float, began: float | None) -> str:
    return "-" if began is None else f"{duration(now - began)} ago"


def duration(seconds: float | None) -> str:
    """Two digits of it at most: 45s, 12m, 3h, 5d."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"


@app.command()
def show(name: str, runs_dir: RunsDir = "runs") -> None:
    """One run as JSON: result, events, and the last records."""
    from ftray.storage import read_json
    from ftray.tracking.runs import RESULT, read_run
    from ftray.train.runs.store import run_store

    run = read_run(notes_of(runs_dir) / checked(name), is_driven=run_store(runs_dir).is_driven(name))
    result = run.path / RESULT
    described = {
        "name": run.name,
        **line_of(run),
        "last_step": run.steps[-1] if run.steps else None,
        "events": run.events,
        "result": read_json(result) if result.is_file() else None,
        "report": f"{runs_dir}/{name}/report.html",
        "config": run.config,
    }
    print(json.dumps(described, indent=2))


@app.command()
def compare(
    one: str,
    other: str,
    runs_dir: RunsDir = "runs",
    output: Annotated[str | None, typer.Option(help="Also draw both loss curves into this HTML file.")] = None,
) -> None:
    """Where two runs' configs differ, and their losses side by side."""
    from ftray.tracking.runs import differences, read_run

    there = notes_of(runs_dir)
    runs = [read_run(there / checked(name)) for name in (one, other)]
    changed = [item for item in differences(runs[0].config, runs[1].config) if item[0] != "name"]
    width = max([len("final eval loss"), *(len(key) for key, _, _ in changed)])

    def line(key: str, a: str, b: str) -> None:
        print(f"{key:<{width}}  {a:>20}  {b:>20}")

    line("", one, other)
    for key, a, b in changed:
        line(key, a, b)
    for title, values in {
        "steps": [str(run.num_steps) for run in runs],
        "final loss": [number(run.final_loss) for run in runs],
        "final eval loss": [number(run.final_eval_loss) for run in runs],
        "tokens/s": [f"{run.tokens_per_s:.0f}" for run in runs],
        "seconds": [f"{run.seconds:.0f}" for run in runs],
    }.items():
        line(title, *values)
    if output is not None:
        from ftray.tracking.report import write_comparison

        write_comparison(Path(output), runs)
        print(f"curves: {output}")


@app.command()
def report(
    name: str,
    runs_dir: RunsDir = "runs",
    output: Annotated[str | None, typer.Option(help="Where to write it; without it, into the run's directory.")] = None,
) -> None:
    """Draw a run's report.html as it stands: curves, samples, events, configuration."""
    from ftray.errors import UserError
    from ftray.storage import write_bytes
    from ftray.tracking.report import render_report, write_report
    from ftray.tracking.runs import read_run

    run = read_run(notes_of(runs_dir) / checked(name))
    if output is None and "://" in runs_dir:
        raise UserError(f"{runs_dir} is a store: give the file to write with --output FILE")
    if output is None:
        print(write_report(run.path))
    else:
        write_bytes(Path(output).absolute(), render_report(run.path).encode())
        print(output)


@app.command()
def stop(name: str, runs_dir: RunsDir = "runs") -> None:
    """Ask a running run to save at its next step and end. The same `ftray train` goes on from there."""
    from ftray.errors import UserError
    from ftray.tracking.runs import read_run
    from ftray.train.runs.store import run_store

    run = read_run(notes_of(runs_dir) / checked(name))
    store = run_store(runs_dir)
    if run.status == "finished":
        raise UserError(f"{name}: is finished; there is nothing to stop")
    if not store.is_driven(name):
        raise UserError(f"{name}: no process works on it; there is nothing to stop (`ftray train` goes on with it)")
    store.ask_to_stop(name)
    print(f"{name}: asked to save and stop at the end of the step it is in")


def checked(name: str) -> str:
    """Of a run in `runs_dir`; nothing leads out of it. Raises `UserError`."""
    from ftray.errors import UserError
    from ftray.schema import check_name

    try:
        return check_name(name)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def notes_of(runs_dir: str) -> Path:
    """A directory of run directories: of those in a store, a copy of what tells of them."""
    from ftray.train.runs.store import run_store

    return run_store(runs_dir).look()


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
