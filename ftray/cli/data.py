"""`ftray data`"""

import json
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
    from ftray.data.sources import check_source
    from ftray.model.base import load_tokenizer, prepare_base
    from ftray.model.chat import ChatRenderer

    sources = {"data.train": run.data.train} | ({"data.eval": run.data.eval} if run.data.eval is not None else {})
    for key, location in sources.items():
        check_source(key, location)
    base = prepare_base(run.base_model, chat=run.chat, log=lambda text: None)
    renderer = ChatRenderer(load_tokenizer(base))
    found = [inspect_source(key, location, run, renderer, show=rows) for key, location in sources.items()]
    if as_json:
        print(json.dumps([inspection.as_object() for inspection in found], indent=2, ensure_ascii=False))
    else:
        for line in found[0].template:
            print(f"chat template: {line}")
        for inspection in found:
            show(inspection)
    if html is not None:
        from ftray.data.inspect_page import write_page

        write_page(Path(html), run.name, found)
        print(html)


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


def figures(found: "Inspection") -> str:
    over = f", {found.over_limit:,} over data.max_example_tokens ({found.limit:,})" if found.over_limit else ""
    left_out = f", {found.left_out:,} left out by data.transform" if found.left_out else ""
    bad = f", {found.num_bad:,} that cannot be trained" if found.num_bad else ""
    duplicates = f", {found.duplicates:,} the same as an earlier one" if found.duplicates else ""
    return (
        f"{found.rows:,} rows{bad}{left_out}; {found.examples:,} examples{over}{duplicates}; {found.tokens:,} tokens, "
        f"{found.trained_share:.0%} trained, longest {found.longest:,}; micro-batches {found.packing:.0%} full"
    )


def coloured(sequence: "list[Token]"):
    from rich.text import Text

    text = Text()
    for token in sequence:
        text.append(token.text, style=STYLES[token.kind])
    return text
