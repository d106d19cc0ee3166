"""`ftray runs`"""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Run directories: what is there, how two differ, and stopping one.")
RunsDir = Annotated[str, typer.Option("--runs-dir", help="Where the run directories are, also s3://BUCKET/RUNS.")]


@app.command("list")
def list_runs(runs_dir: RunsDir = "runs") -> None:
    """Every run, newest first."""
    from ftray.tracking.runs import find_runs

    runs = find_runs(notes_of(runs_dir))
    if not runs:
        print(f"{runs_dir} has no runs; `ftray train CONFIG` makes one")
        return
    width = max(len(run.name) for run in runs)
    print(f"{'name':<{width}}  {'status':<10}  {'steps':>6}  {'loss':>8}  {'eval loss':>9}  {'tokens/s':>8}  base")
    for run in runs:
        print(
            f"{run.name:<{width}}  {run.status:<10}  {run.num_steps:>6}  {number(run.final_loss):>8}  "
            f"{number(run.final_eval_loss):>9}  {run.tokens_per_s:>8.0f}  {run.config['base_model']}"
        )


@app.command()
def show(name: str, runs_dir: RunsDir = "runs") -> None:
    """One run as JSON: result, events, and the last records."""
    from ftray.storage import read_json
    from ftray.tracking.runs import RESULT, read_run

    run = read_run(notes_of(runs_dir) / checked(name))
    result = run.path / RESULT
    described = {
        "name": run.name,
        "status": run.status,
        "steps": run.num_steps,
        "final_loss": run.final_loss,
        "final_eval_loss": run.final_eval_loss,
        "seconds": round(run.seconds, 1),
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
def stop(name: str, runs_dir: RunsDir = "runs") -> None:
    """Ask a running run to save at its next step and end. The same `ftray train` goes on from there."""
    from ftray.errors import UserError
    from ftray.tracking.runs import read_run
    from ftray.train.runs.store import run_store

    run = read_run(notes_of(runs_dir) / checked(name))
    if run.status == "finished":
        raise UserError(f"{name}: is finished; there is nothing to stop")
    run_store(runs_dir).ask_to_stop(name)
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
