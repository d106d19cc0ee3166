"""`ftray data`"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftray.cli.arguments import ConfigFile, Overrides
from ftray.config import RunConfig, load_config

if TYPE_CHECKING:
    from ftray.data.inspect import Inspection, Token

app = typer.Typer(no_args_is_help=True, help="What a run would train on.")
STYLES = {"prompt": "dim", "control": "blue", "trained": "green", "end": "bold magenta", "cut": "red strike"}
LEGEND = {
    "prompt": "prompt",
    "control": "control token",
    "trained": "trained",
    "end": "trained, ends the answer",
    "cut": "over data.max_example_tokens",
}


@app.callback()
def data() -> None:
    """What a run would train on."""


@app.command()
def inspect(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="So many of the first examples, token by token.")] = 2,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="The same as a page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Rows as the model gets them, and figures of the whole set. No weights are read, nothing is trained."""
    run: RunConfig = load_config(config, overrides or (), kind="run")
    from ftray.data.inspect import inspect_source
    from ftray.data.sets import check_data, sources_of
    from ftray.model.base import load_tokenizer, prepare_base
    from ftray.model.chat import ChatRenderer

    check_data(run.data)
    base = prepare_base(run.base_model, chat=run.chat, log=lambda text: None)
    renderer = ChatRenderer(load_tokenizer(base))
    found = []
    for key, source in sources_of(run.data):
        with progress_of(f"{key}: {source.label}") as on_rows:
            found.append(inspect_source(key, source, run, renderer, show=rows, on_rows=on_rows))
    if as_json:
        print(json.dumps([inspection.as_object() for inspection in found], indent=2, ensure_ascii=False))
    else:
        for line in found[0].template:
            print(f"chat template: {line}")
        for inspection in found:
            show(inspection)
        for line in shares_of(found):
            print(line)
    if html is not None:
        from ftray.data.inspect_page import write_page

        write_page(Path(html), run.name, found)
        print(html)


@contextlib.contextmanager
def progress_of(title: str) -> "Iterator[Callable[[int, int], None]]":
    """A bar on a terminal's standard error, which goes when all rows are read."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda count, total: bar.update(task, advance=count, total=total)


def show(found: "Inspection") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"\n{found.key}: {found.location}", style="bold", markup=False, soft_wrap=True)
    console.print(f"  read as {found.read_as}", soft_wrap=True)
    if found.unread:
        console.print(f"  columns that are not read: {', '.join(found.unread)}")
    console.print(f"  {figures(found)}", soft_wrap=True)
    for row, problem in found.bad:
        console.print(f"  row {row}: {problem}", style="red", markup=False)
    if found.num_bad > len(found.bad):
        console.print(f"  and {found.num_bad - len(found.bad)} more", style="red")
    table = Table(box=None, pad_edge=False, show_header=False)
    most = max(count for _, count in found.histogram)
    for tokens, count in found.histogram:
        bar = "#" * round(40 * count / max(1, most))
        table.add_row(f"  up to {tokens:,} tokens", f"{count:,}", bar, style="red" if tokens > found.limit else None)
    console.print(table)
    for shown in found.shown:
        for number, sequence in enumerate(shown.sequences):
            part = "" if len(shown.sequences) == 1 else (", chosen", ", rejected")[number]
            console.rule(f"row {shown.row}{part}", style="dim")
            console.print(coloured(sequence))
    if found.shown:
        console.print("  ".join(f"[{STYLES[kind]}]{text}[/]" for kind, text in LEGEND.items()), soft_wrap=True)


def shares_of(found: "list[Inspection]") -> list[str]:
    """A line for each of several training sources: what part of the rows and tokens it is, and of an epoch."""
    from ftray.data.inspect import training_sources

    sources = training_sources(found)
    if len(sources) == 1:
        return []
    rows, tokens = (sum(getattr(source, name) for source in sources) for name in ("rows", "tokens"))
    weights = sum(source.weight or 0 for source in sources)
    lines = ["sources of data.train:"]
    for source in sources:
        drawn = f", {source.weight / weights:.0%} of the examples that are drawn" if source.weight else ""
        lines.append(
            f"  {source.name}: {source.rows / rows:.0%} of rows, {source.tokens / tokens:.0%} of tokens{drawn}"
        )
    return lines


def figures(found: "Inspection") -> str:
    over = f", {found.over_limit:,} over data.max_example_tokens ({found.limit:,})" if found.over_limit else ""
    left_out = f", {found.left_out:,} left out by data.transform" if found.left_out else ""
    bad = f", {found.num_bad:,} that cannot be trained" if found.num_bad else ""
    held_out = f", {found.held_out:,} held out for evaluation" if found.held_out else ""
    untrained = f"; {found.untrained_answers:,} answers are not trained" if found.untrained_answers else ""
    duplicates = f", {found.duplicates:,} the same as an earlier one" if found.duplicates else ""
    return (
        f"{found.rows:,} rows{bad}{left_out}; {found.examples:,} examples{over}{held_out}{duplicates}{untrained}; "
        f"{found.tokens:,} tokens, "
        f"{found.trained_share:.0%} trained, longest {found.longest:,}; micro-batches {found.packing:.0%} full"
    )


def coloured(sequence: "list[Token]"):
    from rich.text import Text

    text = Text()
    for token in sequence:
        text.append(token.text, style=STYLES[token.kind])
    return text
