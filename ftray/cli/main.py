"""Entry point: one table of commands, and one place where errors become messages and exit codes."""

import os
import sys
from typing import NoReturn

import typer

from ftray import __version__
from ftray.cli import (
    adapters,
    chat,
    doctor,
    evaluate,
    init,
    pipeline,
    plan,
    quickstart,
    runs,
    serve,
    submit,
    sweep,
    tenants,
    train,
)
from ftray.errors import FtrayError, InterruptedRunError

app = typer.Typer(
    name="ftray",
    help="Fine-tuning of language models on Ray: from a base model to a live, measured, swappable adapter.",
    epilog="--debug after any command shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.command()(init.init)
app.command()(train.train)
app.command()(pipeline.pipeline)
app.command()(plan.plan)
app.command()(serve.serve)
app.command()(submit.submit)
app.command("eval")(evaluate.evaluate)
app.add_typer(adapters.app, name="adapters")
app.add_typer(sweep.app, name="sweep")
app.add_typer(runs.app, name="runs")
app.add_typer(tenants.app, name="tenants")
app.command()(tenants.usage)
app.command()(chat.chat)
app.command()(quickstart.quickstart)
app.command()(doctor.doctor)


def show_version(value: bool) -> None:
    if value:
        print(f"ftray {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Exit codes: 0 done, 1 the work failed, 2 the user's input is wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = app(words, standalone_mode=False)
    except FtrayError as error:
        fail(str(error), code=error.exit_code, debug=debug, error=error)
    except typer.TyperException as error:  # an argument that is missing or not understood
        fail(f"{error}; see --help", code=2, debug=debug, error=error)
    except (KeyboardInterrupt, typer.Abort):
        fail("stopped", code=1, debug=debug, error=None)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:  # noqa: BLE001  the last place: what arrives here is a bug of ours or a broken machine
        fail(f"{type(error).__name__}: {error} (run again with --debug to see where)", code=1, debug=debug, error=error)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, *, code: int, debug: bool, error: BaseException | None) -> NoReturn:
    if debug and error is not None:
        raise error
    print(f"error: {message}", file=sys.stderr, flush=True)
    if isinstance(error, InterruptedRunError):
        # A thread may still wait in Ray: taking Ray down under it can crash the process, which would change the exit
        # code. The kernel ends the processes of a Ray session of our own with this one.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
