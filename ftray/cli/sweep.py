"""`ftray sweep`"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ftray.cli.arguments import ConfigFile, DryRun, Overrides, place
from ftray.config import Space, SweepConfig, load_sweep, to_yaml
from ftray.errors import FtrayError, InterruptedRunError, UserError

if TYPE_CHECKING:
    from ftray.sweep.study import Study


class ConfigOrCommand(TyperGroup):
    """`ftray sweep CONFIG` beside `ftray sweep stop-trial`: what is no command is a file to run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=ConfigOrCommand,
    no_args_is_help=True,
    subcommand_metavar="CONFIG [KEY.PATH=VALUE]... | COMMAND [ARGS]...",
    help="Search for the best rank, rate or any other key of a run: `ftray sweep CONFIG`, which is `ftray sweep run`.",
)
RunsDir = Annotated[str, typer.Option("--runs-dir", help="Where the sweep's directory is.", callback=place)]
SweepName = Annotated[str, typer.Argument(metavar="SWEEP", help="Its name.")]
TrialName = Annotated[str, typer.Argument(metavar="TRIAL", help="Such as t003.")]


@app.command()
def run(
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
    from ftray.cluster.address import check_address

    check_address()
    from ftray.sweep.launch import look_into, run_sweep, uninterrupted
    from ftray.sweep.prepare import sweep_directory
    from ftray.sweep.report.report import REPORT, train_command

    command = shlex.join(["ftray", "sweep", config, *(overrides or ())])
    try:
        study = run_sweep(loaded, space, log=lambda text: print(f"  {text}", flush=True), fresh=fresh)
    except InterruptedRunError as error:
        with uninterrupted():
            show_answer(look_into(sweep_directory(loaded, space)))
        raise type(error)(f"{error}\n  go on with: {command}") from None
    show_answer(study)
    show_comparison(study, study.directory)
    print(f"  {study.uri}/{REPORT}")
    if study.gave_up is not None:
        print(f"{study.gave_up}; fix the cause, and give search.trials to go on")
    if study.best is None:
        raise FtrayError(f"{loaded.name}: no trial finished; see {study.trials_uri}")
    if not study.moves and study.best_run is not None:  # else its weights are of several trials
        print(f"again by itself: {train_command(study, study.best_run)}")
    publish_best(study)


@app.command()
def stop_trial(sweep: SweepName, trial: TrialName, runs_dir: RunsDir = "runs") -> None:
    """End a trial: its runs save at their next step, those that wait are left out, and the sweep goes on."""
    from ftray.sweep.launch import look_into
    from ftray.sweep.store import local_sweep

    with local_sweep(runs_dir, sweep) as directory:
        study = look_into(directory)
        found = study.trial(trial)
        stopped = study.stop(found)
    if not stopped:
        raise UserError(f"{trial}: is {found.status}; there is nothing to stop")
    for name in stopped:
        print(f"{name} is asked to stop")


@app.command()
def clone_trial(
    sweep: SweepName,
    trial: TrialName,
    changes: Annotated[list[str], typer.Argument(metavar="KEY.PATH=VALUE...", help="What is to differ.")],
    runs_dir: RunsDir = "runs",
) -> None:
    """Add a trial like another one with some keys changed, also while the sweep runs."""
    from ftray.config.space import point_text
    from ftray.sweep.launch import look_into
    from ftray.sweep.store import local_sweep

    with local_sweep(runs_dir, sweep) as directory:
        study = look_into(directory)
        point = study.clone(trial, parse_changes(changes))
    first = f"{study.spent}: raise search.budget, and " if study.spent is not None else "if it does not run now, "
    print(f"{sweep} will try {point_text(point)}; {first}the same `ftray sweep` command goes on with it")


def parse_changes(words: list[str]) -> dict[str, Any]:
    from ftray.config.load import apply_override

    changes: dict[str, Any] = {}
    for word in words:
        key = word.partition("=")[0]
        leaf: dict[str, Any] = {}
        if (problem := apply_override(leaf, f"value={word.partition('=')[2]}" if "=" in word else word)) is not None:
            raise UserError(problem)
        changes[key] = leaf["value"]
    return changes


def publish_best(study: "Study") -> None:
    from ftray.artifacts.publish import publish_if_new, publish_once
    from ftray.model.adapters.directory import local_adapter
    from ftray.registry import Registry

    run = study.best_run
    assert run is not None
    config, artifact = study.config_of(run), study.artifact_of(run)
    if config.adapter is None:
        print(f"next: ftray serve SERVE.yaml base_model={artifact}")
        return
    adapter = local_adapter(artifact)
    if adapter is None:
        raise FtrayError(f"{artifact}: is gone")
    flag = "" if config.registry == "registry" else f" --registry {config.registry}"
    publish = study.config.publish
    if publish == "off":
        print(f"next: ftray adapters publish {artifact} --name {study.config.name}{flag}")
        return
    registry, name, lineage = Registry(config.registry), publish.name or study.config.name, study.lineage_of(run)
    if publish.alias is None:
        version = publish_if_new(registry, name, adapter, lineage=lineage)
        print(f"published {version} in {config.registry}")
        print(f"next: ftray adapters promote {version} prod{flag}")
    else:
        version = publish_once(registry, name, adapter, alias=publish.alias, lineage=lineage)
        print(f"published {version} in {config.registry}; {name}@{publish.alias} points to it")
        print(f"next: ftray chat {name}@{publish.alias}{flag}")


def show_points(config: SweepConfig, space: Space) -> None:
    print(to_yaml(config))
    points = list(space.grid(config.search.trials)) if config.search.algorithm == "grid" else None
    if points is None:
        print(
            f"# would try {config.search.trials or 'as many as the budget allows'} points by {config.search.algorithm}"
        )
        return
    from ftray.config.space import point_text

    print(f"# would try {len(points)} points, each with {len(config.seeds)} seed(s):")
    for point in points:
        print(f"#   {point_text(space.overrides(point))}")


def show_comparison(study: "Study", directory: Path) -> None:
    from ftray.sweep.compare.comparison import read_comparison
    from ftray.sweep.report.report import comparison_table

    compared = comparison_table(read_comparison(study, directory))
    if compared is not None:
        print_table(compared.columns, compared.rows, to_the_left=compared.columns[:1])
        print("\n".join(compared.verdicts))


def show_answer(study: "Study") -> None:
    from ftray.config.space import short
    from ftray.sweep.report.report import metric_text, status_text
    from ftray.sweep.report.text import conclusion

    keys = list(study.space.free)
    columns = ["trial", *keys, study.config.search.metric, "steps", "tokens", "time", "outcome"]
    rows = []
    for trial in study.ranked:
        values = [short(trial.latest[key]) for key in keys]
        spent = [str(trial.step), f"{trial.tokens:,}", f"{trial.seconds:.0f} s"]
        rows.append([trial.name, *values, metric_text(trial), *spent, status_text(trial, study)])
    print_table(columns, rows, to_the_left=["trial", "outcome"])
    print(conclusion(study))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, to_the_left: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in to_the_left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=None if Console().is_terminal else 140).print(table)
