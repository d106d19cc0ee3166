"""The base and the tokens of a run, ready before its workers start."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ftray.child_process import in_child_process
from ftray.config import RunConfig
from ftray.data.dataset import TokenizedDataset
from ftray.data.examples import dataset_source
from ftray.data.sets import evaluation_set, num_shared, training_set
from ftray.model.adapters.targets import check_embedding, check_targets, describe_experts
from ftray.model.base import BaseModel, check_length, load_tokenizer, prepare_base
from ftray.model.chat import ChatRenderer
from ftray.model.chat.settings import is_dated
from ftray.model.proof import check_packed
from ftray.model.weight_files import weight_shapes
from ftray.model.weight_precision import precision_of
from ftray.objectives import objective_of, trained_turns
from ftray.train.checkpoints.listing import read_state

Log = Callable[[str], None]


@dataclass(frozen=True)
class PreparedData:
    train: TokenizedDataset
    eval: TokenizedDataset | None
    digest: str
    num_steps: int  # of the run


def num_steps(config: RunConfig, dataset: TokenizedDataset) -> int:
    return dataset_source(config, dataset).num_steps


def is_complete(checkpoint: Path, data: PreparedData) -> bool:
    return read_state(checkpoint).step == data.num_steps


def prepare_data_apart(
    config: RunConfig,
    log: Log,
    *,
    kept_in: Path,
    date: str | None = None,
    cancelled: threading.Event | None = None,
) -> tuple[BaseModel, PreparedData]:
    """`prepare_data` in a process of its own. Raises `CancelledError` soon after `cancelled` is set."""
    return in_child_process(prepare_data, config, log=log, cancelled=cancelled, kept_in=kept_in, date=date)


def prepare_data(
    config: RunConfig,
    *,
    log: Log,
    kept_in: Path | None = None,
    date: str | None = None,
    cancelled: threading.Event | None = None,
) -> tuple[BaseModel, PreparedData]:
    """`kept_in`: where tokens are kept, for the workers and for the next run on the same data; None: nowhere. `date`:
    that a dated template writes (YYYY-MM-DD); None: today's, which the base then has in its `chat`."""
    base = prepare_base(config.base_model, chat=config.chat, log=log)
    check_length(base, config.data.max_example_tokens, key="data.max_example_tokens")
    check_packed(base)
    shape, turns = objective_of(config.objective).shape, trained_turns(config.objective)
    tokenizer, shapes = load_tokenizer(base), weight_shapes(base.directory)
    if config.adapter is not None:
        check_targets(base, shapes, config.adapter, tokenizer)
        if (experts := describe_experts(shapes, config.adapter)) is not None:
            log(experts)
    if shape != "document" and is_dated(tokenizer):
        base = replace(base, chat=base.chat.model_copy(update={"date": date or time.strftime("%Y-%m-%d")}))
        tokenizer = load_tokenizer(base)
        log(f"the chat template writes a date: {base.chat.date}, in all of this run, and where its adapter is served")
    renderer = ChatRenderer(tokenizer)
    how = {"shape": shape, "turns": turns, "kept_in": kept_in, "cancelled": cancelled, "log": log}
    train = training_set(config.data, renderer, **how)
    evaluation = evaluation_set(config.data, renderer, **how)
    for dataset in (train, evaluation):
        if dataset is not None:
            check_embedding(base, shapes, tokenizer, dataset.ids, dataset.row_at)
    log(f"base model: {base}")
    if (method := precision_of(base)) is not None:
        log(f"its weights are {method}; they are multiplied out and trained on whole")
    if shape != "document" and not renderer.template.ends_answers:
        log("the chat template ends no answer: a model that is trained on it may write on to its limit")
    log(f"training data: {describe_counts(train)}")
    for line in describe_sources(train):
        log(f"  {line}")
    if evaluation is not None:
        log(f"evaluation data: {describe_counts(evaluation)}")
        if shared := num_shared(train, evaluation):
            log(f"evaluation data: {shared:,} of its conversations are training data too, so eval_loss flatters")
    return base, PreparedData(train, evaluation, train.digest(), num_steps(config, train))


def rendering_as(base: BaseModel, config: RunConfig) -> RunConfig:
    """For workers: with the date that the driver's base has."""
    return config if base.chat.date is None else config.model_copy(update={"chat": base.chat})


def describe_counts(dataset: TokenizedDataset) -> str:
    counts = dataset.counts()
    lost = "".join(f", {counts[key]:,} {key}" for key in ("truncated", "dropped") if counts[key])
    lost += f", {counts['bad_rows']:,} bad rows left out" if counts["bad_rows"] else ""
    lost += f", {counts['untrained_answers']:,} answers not trained" if counts["untrained_answers"] else ""
    rows = f" of {counts['rows']:,} rows" if counts["rows"] != counts["examples"] else ""
    return (
        f"{counts['examples']:,} examples{rows}{lost}, {counts['tokens']:,} tokens, "
        f"{counts['trained_tokens']:,} trained, longest {counts['longest']:,}"
    )


def describe_sources(dataset: TokenizedDataset) -> list[str]:
    """A line of each, where there are several."""
    if len(dataset.names) == 1:
        return []
    numbers = [dataset.examples_of_source(number) for number in range(len(dataset.names))]
    tokens = [int(dataset.lengths[chosen].sum()) for chosen in numbers]
    return [
        f"{name}: {len(chosen):,} examples, {count:,} tokens ({count / max(1, sum(tokens)):.0%})"
        for name, chosen, count in zip(dataset.names, numbers, tokens, strict=True)
    ]
