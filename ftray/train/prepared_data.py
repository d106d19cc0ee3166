"""The base and the tokens of a run, ready before its workers start."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ftray.child_process import in_child_process
from ftray.config import RunConfig
from ftray.data.dataset import TokenizedDataset
from ftray.data.examples import dataset_source
from ftray.data.tokens import tokenize_source
from ftray.model.adapters.targets import check_targets
from ftray.model.base import BaseModel, check_length, load_tokenizer, prepare_base
from ftray.model.chat import ChatRenderer
from ftray.objectives import objective_of
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
    config: RunConfig, log: Log, *, kept_in: Path, cancelled: threading.Event | None = None
) -> tuple[BaseModel, PreparedData]:
    """`prepare_data` in a process of its own. Raises `CancelledError` soon after `cancelled` is set."""
    return in_child_process(prepare_data, config, log=log, cancelled=cancelled, kept_in=kept_in)


def prepare_data(
    config: RunConfig,
    *,
    log: Log,
    kept_in: Path | None = None,
    cancelled: threading.Event | None = None,
) -> tuple[BaseModel, PreparedData]:
    """`kept_in`: where tokens are kept, for the workers and for the next run on the same data; None: nowhere."""
    base = prepare_base(config.base_model, chat=config.chat, log=log)
    check_length(base, config.data.max_example_tokens, key="data.max_example_tokens")
    if config.adapter is not None:
        check_targets(base, config.adapter)
    renderer = ChatRenderer(load_tokenizer(base))

    def tokens(key: str, source: str) -> TokenizedDataset:
        shape = objective_of(config.objective).shape
        how = {"shape": shape, "kept_in": kept_in, "cancelled": cancelled}
        return tokenize_source(key, source, config.data, renderer, log=log, **how)

    train = tokens("data.train", config.data.train)
    evaluation = tokens("data.eval", config.data.eval) if config.data.eval is not None else None
    log(f"base model: {base}")
    log(f"training data: {describe_counts(train)}")
    if evaluation is not None:
        log(f"evaluation data: {describe_counts(evaluation)}")
    return base, PreparedData(train, evaluation, train.digest(), num_steps(config, train))


def describe_counts(dataset: TokenizedDataset) -> str:
    counts = dataset.counts()
    lost = "".join(f", {counts[key]} {key}" for key in ("truncated", "dropped") if counts[key])
    rows = f"{counts['rows']:,} rows, " if counts["rows"] != counts["examples"] else ""
    return (
        f"{rows}{counts['examples']:,} examples{lost}, {counts['tokens']:,} tokens, "
        f"{counts['trained_tokens']:,} trained, longest {counts['longest']:,}"
    )
