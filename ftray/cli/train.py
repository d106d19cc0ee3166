"""`ftray train`"""

import shlex
from typing import Annotated

import typer

from ftray.cli.arguments import ConfigFile, DryRun, Overrides
from ftray.config import RunConfig, load_config, to_yaml
from ftray.errors import InterruptedRunError


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an earlier run of this name aside and start over.")
    ] = False,
    profile: Annotated[
        int, typer.Option(min=0, metavar="N", help="Trace N steps of rank 0, for https://ui.perfetto.dev.")
    ] = 0,
) -> None:
    """Fine-tune a model. The same command again goes on from the last checkpoint."""
    run: RunConfig = load_config(config, overrides or (), kind="run")
    from ftray.cluster.address import check_address
    from ftray.train.prepare import prepare

    prepared = prepare(run, fresh=fresh)
    check_address()
    from ftray.artifacts.resolve import resolve_start
    from ftray.cli.progress import TrainProgress
    from ftray.tracking.facts import next_command
    from ftray.train.advice import advise
    from ftray.train.launch import launch

    prepared = resolve_start(prepared)
    run = prepared.config
    for advice in advise(run):
        print(f"note: {advice}")
    if dry_run:
        check_what_the_run_would(run)
        show_plan(run)
        return
    try:
        with TrainProgress() as progress:
            result = launch(prepared, progress.watcher(), profile_steps=profile)
    except InterruptedRunError as error:
        command = shlex.join(["ftray", "train", config, *(overrides or ())])
        raise type(error)(f"{error}\n  go on with: {command}") from None
    evaluation = "" if result["final_eval_loss"] is None else f", evaluation loss {result['final_eval_loss']:.4f}"
    print(f"{run.name}: {result['steps']} steps, loss {result['final_loss']:.4f}{evaluation}")
    print(f"  {result['output']}")
    if profile:
        print(f"  {trace_of(run)}")
    print(f"next: {next_command(run.model_dump(mode='json'), result)}")


def check_what_the_run_would(run: RunConfig) -> None:
    """Beside what was looked at already: where it writes, and where it joins no cluster, that its workers fit here."""
    from ftray.cluster.address import joins_cluster
    from ftray.train.runs.claim import refuse_unwritable_place

    refuse_unwritable_place(run.runs_dir)
    if not joins_cluster():
        from ftray.cluster.resources import check_own_session

        check_own_session(run.workers)


def trace_of(run: RunConfig) -> str:
    """Where the profile lies, for the user."""
    from ftray.train.runs.store import run_store

    store = run_store(run.runs_dir)
    traces = [f"{store.uri(run.name)}/profile/rank-0.trace.json.gz"]
    if store.shared_disk is not None:
        traces = [str(path) for path in (store.local(run.name) / "profile").glob("*.json.gz")]
    return f"{traces[0]}: drop it on https://ui.perfetto.dev" if traces else "no trace: too few steps were left"


def show_plan(run: RunConfig) -> None:
    from ftray.train.prepared_data import prepare_data

    lines: list[str] = []
    base, data = prepare_data(run, log=lines.append)  # what is wrong with it is not to stand below 60 keys
    print(to_yaml(run))
    for line in lines:
        print(f"# {line}")
    steps = data.num_steps
    method = "full fine-tuning" if run.adapter is None else f"LoRA of rank {run.adapter.rank}"
    gpus = (
        f" with {run.workers.gpus_each:g} GPUs each"
        if run.workers.gpus_each
        else f", {run.workers.cpus_each} CPUs each"
    )
    print(f"# would run: {method} of {base.name}, {steps} steps of {run.batch.examples_per_step} examples,")
    print(f"#   {run.workers.count} workers{gpus}, ZeRO stage {run.zero.stage}, into {run.runs_dir}/{run.name}")
