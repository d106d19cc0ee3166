"""Entry point: one table of commands, and one place where errors become messages and exit codes."""

import contextlib
import io
import os
import sys
import warnings
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ftray import __version__
from ftray.cli import (
    adapters,
    chat,
    clean,
    data,
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
from ftray.config.renamed import RenamedWarning
from ftray.errors import FtrayError, InterruptedRunError
from ftray.storage.machine import keep_loopback_from_proxies

# In the order in which they are needed: what it is, in a line that is not cut, and an example.
COMMANDS: dict[str, tuple[Any, str, str]] = {
    "init": (init.init, "Write a starter project with configs and sample data.", "ftray init my-project"),
    "quickstart": (quickstart.quickstart, "Fine-tune, measure, serve a small model here.", "ftray quickstart"),
    "train": (train.train, "Fine-tune a model.", "ftray train run.yaml optimizer.learning_rate=5e-4"),
    "data": (data.app, "What a run would train on, token by token.", "ftray data inspect run.yaml --html data.html"),
    "plan": (plan.plan, "Memory, time and cost of a run beforehand.", "ftray plan run.yaml --gpu h100-80gb --count 8"),
    "sweep": (sweep.app, "Search for the best rank, rate or any other key.", "ftray sweep sweep.yaml"),
    "pipeline": (pipeline.pipeline, "Train in stages, measure, publish what passes.", "ftray pipeline pipeline.yaml"),
    "eval": (evaluate.evaluate, "Exact match and loss on held-out rows.", "ftray eval run.yaml --adapter support@prod"),
    "runs": (runs.app, "Run directories: list, show, compare, stop.", "ftray runs compare first second"),
    "adapters": (adapters.app, "The registry of adapters and their versions.", "ftray adapters promote support@3 prod"),
    "serve": (serve.serve, "Serve a base with every adapter of a registry.", "ftray serve serve.yaml port=8001"),
    "chat": (chat.chat, "Talk with a model.", "ftray chat support@prod"),
    "tenants": (tenants.app, "Who may use an endpoint, and how much.", "ftray tenants create acme"),
    "usage": (tenants.usage, "Requests and tokens by tenant and version.", "ftray usage --database tenants.db"),
    "submit": (
        submit.submit,
        "Run a config on a cluster and follow it.",
        "ftray submit run.yaml --address http://head:8265",
    ),
    "clean": (clean.clean, "Remove what ended sessions left on the disk.", "ftray clean --older-than 1"),
    "doctor": (doctor.doctor, "What is wrong with this machine or a cluster.", "ftray doctor --address head:6379"),
}


class InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)


app = typer.Typer(
    name="ftray",
    cls=InOrder,
    help="Fine-tuning of language models on Ray: from a base model to a live, measured, swappable adapter.",
    epilog="--debug after any command shows the traceback of an error.",
    add_completion=False,
    rich_markup_mode=None,
)
for name, (command, short, example) in COMMANDS.items():
    about: dict[str, Any] = {"short_help": short, "epilog": f"Example: {example}"}
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name, **about)
    else:
        app.command(name, **about)(command)


CTRL_C = 130  # what typer makes of it
SHOW_WARNING = warnings.showwarning


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
    for stream in (sys.stdout, sys.stderr):  # a terminal of few characters shows the rest as `?`
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    keep_loopback_from_proxies()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if is_group(words):  # alone
        words.append("--help")
    warnings.simplefilter("always", RenamedWarning)
    warnings.showwarning = show_note
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
        if code == CTRL_C:
            fail("stopped", code=1, debug=debug, error=None)
        sys.exit(code if isinstance(code, int) else 0)


def show_note(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    """Of ours the line alone."""
    if issubclass(category, RenamedWarning):
        print(f"note: {message}", file=sys.stderr, flush=True)
    else:
        SHOW_WARNING(message, category, filename, lineno, *rest)


def is_group(words: list[str]) -> bool:
    return not words or (len(words) == 1 and isinstance(COMMANDS.get(words[0], (None,))[0], typer.Typer))


def fail(message: str, *, code: int, debug: bool, error: BaseException | None) -> NoReturn:
    if debug and error is not None:
        raise error
    is_asked = isinstance(error, InterruptedRunError)  # somebody wanted the end: no error
    print(message if is_asked else f"error: {message}", file=sys.stderr, flush=True)
    if is_asked:
        # A thread may still wait in Ray: taking Ray down under it can crash the process, which would change the exit
        # code. So what this process started, a Ray session's processes among it, is ended by its ids.
        sys.stdout.flush()
        end_descendants()
        os._exit(code)
    sys.exit(code)


def end_descendants() -> None:
    """What this process started, by their ids."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
