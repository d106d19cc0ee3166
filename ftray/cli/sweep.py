"""`ftray sweep`"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftray.cli.arguments import ConfigFile, DryRun, Overrides
from ftray.config import Space, SweepConfig, load_sweep, to_yaml
from ftray.errors import FtrayError, InterruptedRunError

if TYPE_CHECKING:
    from ftray.sweep.study import Study


def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an earlier sweep of this name aside and start over.")
    ] = False,
) -> None:
    """Search for the best rank, rate or any other key of a run. The same command again goes on where it stood."""
    loaded, space = load_sweep(config, overrides or ())
    if dry_run:
        show_points(loaded, space)
        return
    from ftray.sweep.launch import run_sweep, sweep_directory
    from ftray.sweep.report import REPORT, train_command
    from ftray.sweep.study import Study

    command = shlex.join(["ftray", "sweep", config, *(overrides or ())])
    try:
        study = run_sweep(loaded, space, say=lambda text: print(f"  {text}", flush=True), fresh=fresh)
    except InterruptedRunError as error:
        show_answer(Study(loaded, space, sweep_directory(loaded, space)))
        raise type(error)(f"{error}\n  go on with: {command}") from None
    show_answer(study)
    directory = sweep_directory(loaded, space)
    print(f"  {directory / REPORT}")
    if study.best is None:
        raise FtrayError(f"{loaded.name}: no trial finished; see {directory}/trials")
    print(f"again by itself: {train_command(study, study.best)}")
    publish_best(study, directory)


def publish_best(study: "Study", directory: Path) -> None:
    from ftray.pipeline import publish_if_new
    from ftray.registry import Registry
    from ftray.sweep.trials import trials_directory

    run = study.best_run
    assert run is not None
    config = study.config_of(run, runs_dir=trials_directory(directory))
    output = trials_directory(directory) / run.name
    if config.adapter is None:
        print(f"next: ftray serve SERVE.yaml base_model={output / 'model'}")
        return
    lineage = {"sweep": study.config.name, "trial": run.name, "point": study.trials[run.trial].point}
    version = publish_if_new(Registry(config.registry), study.config.name, output / "adapter", lineage=lineage)
    flag = "" if config.registry == "registry" else f" --registry {config.registry}"
    print(f"published {version} in {config.registry}")
    print(f"next: ftray adapters promote {version} prod{flag}")


def show_points(config: SweepConfig, space: Space) -> None:
    print(to_yaml(config))
    points = list(space.grid()) if config.search.algorithm == "grid" else None
    if points is None:
        print(
            f"# would try {config.search.trials or 'as many as the budget allows'} points by {config.search.algorithm}"
        )
        return
    from ftray.config.space import point_text

    print(f"# would try {len(points)} points, each with {len(config.seeds)} seed(s):")
    for point in points:
        print(f"#   {point_text(space.overrides(point))}")


def show_answer(study: "Study") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ftray.config.space import short

    table = Table(box=box.SIMPLE, pad_edge=False)
    keys = list(study.space.free)
    for column in ("trial", *keys, study.config.search.metric, "steps", "tokens", "time", "outcome"):
        table.add_column(column, justify="left" if column in ("trial", "outcome") else "right", overflow="fold")
    for trial in study.ranked:
        value = "" if trial.mean is None else f"{trial.mean:.4f}"
        interval = "" if trial.half_interval is None else f" ± {trial.half_interval:.4f}"
        outcome = trial.status if trial.message is None else f"{trial.status}: {trial.message.splitlines()[0]}"
        values = [short(trial.point[key]) for key in keys]
        spent = [str(trial.step), f"{trial.tokens:,}", f"{trial.seconds:.0f} s"]
        table.add_row(trial.name, *values, value + interval, *spent, outcome)
    Console(highlight=False, width=None if Console().is_terminal else 140).print(table)
    print(study.conclusion())
