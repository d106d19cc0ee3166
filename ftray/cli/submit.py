"""`ftray submit`"""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ftray.cli.arguments import ConfigFile, Overrides
from ftray.errors import InterruptedRunError, UserError


def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Of the cluster's job server. Default: RAY_ADDRESS.")
    ] = None,
    working_dir: Annotated[
        str, typer.Option(metavar="DIRECTORY", help="What the job gets, less what .rayignore and .gitignore name.")
    ] = ".",
    runtime_env: Annotated[
        str | None, typer.Option(metavar="FILE", help="What Ray makes on the nodes first (cluster/runtime_env.yaml).")
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="How often a driver that dies (out of memory, a crash) is started again.")
    ] = 3,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the job's end.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the job of this name; a run saves first.")] = False,
) -> None:
    """Run a config on a cluster, follow it, and end with its exit code. The same command again goes on with it."""
    from ftray.config.space import load_any
    from ftray.submit.jobs import Jobs, connect, describe_job, read_runtime_env
    from ftray.submit.own_code import check_own_code

    words = list(overrides or ())
    kind, loaded = load_any(config, words)
    name = getattr(loaded, "name", None) or f"serve-{Path(config).stem}"
    root = Path(working_dir)
    if not root.is_dir():
        raise UserError(f"--working-dir: {working_dir}: no such directory")
    check_own_code(kind, loaded, root=root)
    job = describe_job(kind, name, config, words, resolved=loaded.model_dump(mode="json"), root=root)
    environment = read_runtime_env(runtime_env) if runtime_env is not None else {}
    jobs = Jobs(connect(address), log=lambda text: print(f"  {text}", flush=True))
    if stop:
        jobs.stop(job, runs_dir=loaded.runs_dir if kind == "run" else None, working_dir=root, runtime_env=environment)
        return
    submitted = jobs.submit(job, root, runtime_env=environment, retries=retries)
    where = None if working_dir == "." else working_dir
    given = {"--address": address, "--runtime-env": runtime_env, "--working-dir": where}
    again = command_again(config, words, given)
    if detach:
        print(f"follow it with: {again}")
        return
    try:
        code = jobs.follow(submitted)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"{name} goes on without you\n  follow it with: {again}\n  stop it with: {again} --stop"
        ) from None
    raise typer.Exit(code)


def command_again(config: str, words: list[str], given: dict[str, str | None]) -> str:
    """The same command, to be typed."""
    options = [word for name, value in given.items() if value is not None for word in (name, value)]
    return shlex.join(["ftray", "submit", config, *words, *options])
