"""`ftray eval`"""

from pathlib import Path
from typing import Annotated

import typer

from ftray.cli.arguments import ConfigFile, Overrides

MAX_LISTED = 20


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    adapter: Annotated[
        str | None, typer.Option(help="NAME@VERSION, NAME@ALIAS or a PEFT directory; without it, the base model.")
    ] = None,
    registry: Annotated[str | None, typer.Option(help="Where the adapter is; else the config's registry.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Ask a running endpoint, such as http://127.0.0.1:8000.")] = None,
    task: Annotated[str, typer.Option(help="How answers are judged: exact_match, or module:NAME.")] = "exact_match",
    output: Annotated[
        str | None, typer.Option(help="Also write the result, every losing example in it, as JSON.")
    ] = None,
) -> None:
    """Exact match and loss on the held-out rows (data.eval) of a run's config."""
    from ftray.api.evaluate import evaluate as ask

    result = ask(config, *(overrides or ()), adapter=adapter, registry=registry, endpoint=endpoint, task=task)
    scores = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in result.scores.items())
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    print(f"{result.model}: {scores} of {len(result.answers)}{loss}")
    for answer in result.losing[:MAX_LISTED]:
        print(f"  {answer.question!r}\n    expected {answer.expected!r}, got {answer.answer!r}")
    if len(result.losing) > MAX_LISTED:
        print(f"  and {len(result.losing) - MAX_LISTED} more (--output FILE has all)")
    if output is not None:
        from ftray.storage import write_json

        write_json(Path(output), result.summary())
