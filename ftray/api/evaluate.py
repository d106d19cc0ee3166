"""`ftray.evaluate`: exact match and loss on held-out rows."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.api.config import read_config, rows_file
from ftray.config import RunConfig
from ftray.errors import UserError
from ftray.objectives import objective_of, trained_turns
from ftray.tasks import Task, find_task

if TYPE_CHECKING:
    from ftray.evaluate.task import Evaluation


def evaluate(
    config: RunConfig | dict[str, Any] | str | Path,
    *overrides: str,
    adapter: str | Path | None = None,
    registry: str | None = None,
    endpoint: str | None = None,
    eval_data: Any = None,
    task: str = "exact_match",
) -> "Evaluation":
    """Asks the held-out questions (`data.eval`) of a run's config, and compares the answers.

    `adapter`: NAME@VERSION, NAME@ALIAS or a PEFT directory; None: the base model. `registry`: where the name is; None:
    the config's. `endpoint`: a running one, asked over HTTP instead of a model in this process. `task`: how answers are
    judged, by name or as `module:NAME` of a `Task`.
    """
    run: RunConfig = read_config(config, overrides, kind="run")
    check_asks(run)
    judge = find_task(task)
    if eval_data is not None:
        file = rows_file(eval_data, runs_dir=run.runs_dir, key="data.eval")
        run = run.model_copy(update={"data": run.data.model_copy(update={"eval": file})})
    from ftray.data.sets import check_evaluation
    from ftray.evaluate.task import load_questions
    from ftray.model.base import check_base_name

    check_base_name(run.base_model)
    check_evaluation(run.data)
    questions = load_questions(run.data)
    name = str(adapter) if adapter is not None else None
    if endpoint is not None:
        return through_endpoint(run, questions, endpoint, adapter=name, task=judge)
    return in_this_process(run, questions, registry or run.registry, adapter=name, task=judge)


def check_asks(run: RunConfig) -> None:
    if objective_of(run.objective).shape != "conversation":
        raise UserError(
            f"objective.type: {run.objective.type}; `ftray eval` asks questions and compares answers, which needs the "
            "conversations of objective sft in data.eval (objective={type: sft} data.eval=FILE)"
        )


def through_endpoint(run: RunConfig, questions: Any, endpoint: str, *, adapter: str | None, task: Task) -> "Evaluation":
    from ftray.evaluate.endpoint import evaluate_endpoint
    from ftray.evaluate.task import answer_tokens, with_thoughts_apart
    from ftray.model.base import load_tokenizer, prepare_base
    from ftray.model.chat import ChatRenderer

    renderer = ChatRenderer(load_tokenizer(prepare_base(run.base_model, chat=run.chat)))
    questions = with_thoughts_apart(questions, renderer)
    tokens = answer_tokens(questions, renderer)
    model = adapter or run.base_model
    return evaluate_endpoint(endpoint.removesuffix("/v1"), questions, model=model, max_tokens=tokens, task=task)


def in_this_process(run: RunConfig, questions: Any, location: str, *, adapter: str | None, task: Task) -> "Evaluation":
    from ftray.api.local import load_engine
    from ftray.evaluate.offline import evaluate_offline

    engine, key = load_engine(
        run.base_model, adapter, location, chat=run.chat, context_tokens=2 * run.data.max_example_tokens
    )
    return evaluate_offline(
        engine,
        questions,
        run.data,
        adapter=key,
        model=key or run.base_model,
        task=task,
        turns=trained_turns(run.objective),
    )
