"""`ftray pipeline`"""

import shlex
from typing import Annotated

import typer

from ftray.cli.arguments import ConfigFile, DryRun, Overrides
from ftray.config import PipelineConfig, load_config, to_yaml
from ftray.errors import InterruptedRunError


def pipeline(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Set earlier runs of its files aside and start over.")] = False,
) -> None:
    """Train in stages, measure, and publish what passes. The same command again goes on where it stood."""
    loaded: PipelineConfig = load_config(config, overrides or (), kind="pipeline")
    from ftray.cli.progress import TrainProgress
    from ftray.cluster.address import check_address
    from ftray.pipeline.check import check_pipeline
    from ftray.pipeline.stages import run_pipeline

    if dry_run:
        check_pipeline(loaded)
        print(to_yaml(loaded))
        return
    check_address()
    try:
        with TrainProgress() as progress:
            announce = lambda text: print(text, flush=True)  # noqa: E731
            outcome = run_pipeline(loaded, progress.watcher(), announce, fresh=fresh)
    except InterruptedRunError as error:
        command = shlex.join(["ftray", "pipeline", config, *(overrides or ())])
        stopped = str(error).split("\n", 1)[0]
        raise type(error)(f"{stopped}\n  go on with: {command}") from None
    print(f"{loaded.name}: {outcome.artifact.uri}")
    if outcome.version is not None and loaded.publish is not None:
        alias = f", and {loaded.publish.name}@{loaded.publish.alias} points at it" if loaded.publish.alias else ""
        print(f"published {outcome.version} in {outcome.artifact.run.registry}{alias}")
