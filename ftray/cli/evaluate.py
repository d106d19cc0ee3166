"""`ftray eval`"""

from pathlib import Path
from typing import Annotated

import typer

from ftray.cli.arguments import ConfigFile, Overrides
from ftray.config import RunConfig, load_config
from ftray.errors import UserError
from ftray.objectives import objective_of

MAX_LISTED = 20


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    adapter: Annotated[
        str | None, typer.Option(help="NAME@VERSION, NAME@ALIAS or a PEFT directory; without it, the base model.")
    ] = None,
    registry: Annotated[str | None, typer.Option(help="Where the adapter is; else the config's registry.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Ask a running endpoint, such as http://127.0.0.1:8000.")] = None,
    output: Annotated[
        str | None, typer.Option(help="Also write the result, every losing example in it, as JSON.")
    ] = None,
) -> None:
    """Exact match and loss on the held-out rows (data.eval) of a run's config."""
    run: RunConfig = load_config(config, overrides or (), kind="run")
    if objective_of(run.objective).shape != "conversation":
        raise UserError(
            f"objective.type: {run.objective.type}; `ftray eval` asks questions and compares answers, which needs the "
            "conversations of objective sft in data.eval (objective={type: sft} data.eval=FILE)"
        )
    from ftray.data.sources import check_source
    from ftray.evaluate.task import load_questions
    from ftray.model.base import check_base_name

    check_base_name(run.base_model)
    if run.data.eval is not None:
        check_source("data.eval", run.data.eval)
    questions = load_questions(run.data)
    location = registry or run.registry
    if endpoint is not None:
        result = through_endpoint(run, questions, endpoint, adapter=adapter)
    else:
        result = in_this_process(run, questions, location, adapter=adapter)
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    print(f"{result.model}: exact match {result.accuracy:.1%} of {len(result.answers)}{loss}")
    for answer in result.losing[:MAX_LISTED]:
        print(f"  {answer.question!r}\n    expected {answer.expected!r}, got {answer.answer!r}")
    if len(result.losing) > MAX_LISTED:
        print(f"  and {len(result.losing) - MAX_LISTED} more (--output FILE has all)")
    if output is not None:
        from ftray.storage import write_json

        write_json(Path(output), result.summary())


def through_endpoint(run: RunConfig, questions, endpoint: str, *, adapter: str | None):
    from ftray.evaluate.endpoint import evaluate_endpoint
    from ftray.evaluate.task import answer_tokens
    from ftray.model.base import load_tokenizer, prepare_base
    from ftray.model.chat import ChatRenderer

    renderer = ChatRenderer(load_tokenizer(prepare_base(run.base_model)))
    tokens = answer_tokens(questions, renderer)
    return evaluate_endpoint(
        endpoint.removesuffix("/v1"), questions, model=adapter or run.base_model, max_tokens=tokens
    )


def in_this_process(run: RunConfig, questions, location: str, *, adapter: str | None):
    from ftray.cli.local import load_engine
    from ftray.evaluate.offline import evaluate_offline

    engine, key = load_engine(run.base_model, adapter, location, context_tokens=2 * run.data.max_example_tokens)
    return evaluate_offline(engine, questions, run.data, adapter=key, model=key or run.base_model)
