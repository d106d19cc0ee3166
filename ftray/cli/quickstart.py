"""`ftray quickstart`"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ftray.cli.arguments import Overrides

NUM_SHOWN = 8


def quickstart(
    overrides: Overrides = None,
    port: Annotated[
        int | None, typer.Option(help="Of the endpoint; else the one in configs/quickstart/serve.yaml.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Fine-tune, measure, publish and serve a small model on this machine: no GPU, no account, no download."""
    from ftray.cli.progress import TrainProgress, clock
    from ftray.quickstart import load_quickstart, run_quickstart

    run, serve = load_quickstart(overrides or [], port=port)
    began = time.monotonic()

    def announce(title: str) -> None:
        print(f"[{clock(time.monotonic() - began)}] {title}", file=sys.stderr if as_json else sys.stdout, flush=True)

    with TrainProgress(quiet=as_json) as progress:
        outcome = run_quickstart(run, serve, progress.watcher(), announce)
    if as_json:
        print(json.dumps(outcome.summary()))
        return
    show_table(outcome)
    gained = f"{outcome.base.accuracy:.1%} -> {outcome.tuned.accuracy:.1%}"
    count = len(outcome.tuned.answers)
    print(f"exact match on {count} held-out questions: {gained} (served: {outcome.served.accuracy:.1%})")
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in outcome.seconds.items())
    print(f"time: {parts}")
    print(f"report: {outcome.report}")
    print_next_steps(outcome, run)


def show_table(outcome) -> None:
    """Some answers of each kind: the losing ones are the interesting ones."""
    from rich.console import Console
    from rich.table import Table

    pairs = list(zip(outcome.served_base.answers, outcome.served.answers, strict=True))
    losing = [pair for pair in pairs if not pair[1].correct]
    shown = (losing[: NUM_SHOWN // 4] + [pair for pair in pairs if pair[1].correct])[:NUM_SHOWN]
    table = Table(title=f"{outcome.adapter} beside its base, over HTTP ({len(shown)} of {len(pairs)})")
    for column in ("question", "expected", "base", "tuned"):
        table.add_column(column, overflow="fold")
    for base, tuned in shown:
        table.add_row(*(shorten(text) for text in (base.question, base.expected, base.answer, tuned.answer)))
    Console(width=None if sys.stdout.isatty() else 140, markup=False).print(table)


def shorten(text: str, size: int = 80) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= size else f"{flat[: size - 1]}…"


def print_next_steps(outcome, run) -> None:
    from ftray.cli.serve import curl_line

    command = "ftray" if shutil.which("ftray") else str(Path(sys.executable).with_name("ftray"))
    command = command.removeprefix(f"{Path.cwd()}/")
    settings = "" if run.registry == "registry" else f" adapters.registry={run.registry}"
    settings += "" if outcome.port == 8000 else f" port={outcome.port}"
    question = outcome.served.answers[0].question.replace("'", "")
    print("\nGo on with:")
    print(f"  {command} serve configs/quickstart/serve.yaml{settings}")
    print(f"  {curl_line(f'http://127.0.0.1:{outcome.port}', f'{run.name}@prod', question, system='Name the intent.')}")
    print(f"  {command} chat {run.name}@prod --system 'Name the intent.'")
