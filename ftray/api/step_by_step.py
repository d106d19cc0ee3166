"""`ftray.open_training`: the training engine's verbs, for a loop of one's own in this process."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ftray.api.config import read_config
from ftray.artifacts.resolve import resolve_start
from ftray.config import RunConfig
from ftray.data.dataset import TokenizedDataset
from ftray.data.examples import Example, ExampleSource, dataset_source
from ftray.data.micro_batches import divide
from ftray.data.pack import pack_all
from ftray.data.sets import training_set
from ftray.model.adapters.directory import local_adapter
from ftray.model.base import load_tokenizer, prepare_base
from ftray.model.chat import ChatRenderer
from ftray.model.hardware import choose_hardware
from ftray.model.packed import PackedRow
from ftray.model.proof import check_packed
from ftray.objectives import objective_of, trained_turns
from ftray.train.engine.build import make_engine
from ftray.train.engine.deepspeed import DeepSpeedEngine
from ftray.train.engine.schedule import make_schedule
from ftray.train.loop import denominator_of
from ftray.train.prepare import PreparedRun

OF_A_GROUP = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


@dataclass(frozen=True)
class LocalTraining:
    """What a run goes through, without Ray, saves and callbacks."""

    config: RunConfig
    engine: DeepSpeedEngine
    dataset: TokenizedDataset
    source: ExampleSource
    learning_rate: Callable[[int], float]  # of a step; 0 for the first

    @property
    def num_steps(self) -> int:
        return self.source.num_steps

    def examples(self, step: int) -> Sequence[Example]:
        """Of the step, over all ranks."""
        return self.source.step(step)

    def rows(self, examples: Sequence[Example]) -> Iterator[PackedRow]:
        """This rank's share of them, packed into micro-batches."""
        budget = self.config.batch.tokens_per_micro_batch
        shares = divide(examples, world_size=self.engine.num_shares, token_budget=budget)
        return pack_all(self.source, shares[self.engine.share])

    def denominator(self, examples: Sequence[Example]) -> int:
        """What the step's loss is a mean over: trained tokens, or examples."""
        return denominator_of(self.engine.objective, examples)


@contextlib.contextmanager
def open_training(config: RunConfig | dict[str, Any] | str | Path, *overrides: str) -> Iterator[LocalTraining]:
    """The engine of a run's config in this process: one rank, or the one that torchrun's environment names."""
    run = config if isinstance(config, RunConfig) and not overrides else read_config(config, overrides, kind="run")
    prepared = resolve_start(PreparedRun(run, fresh=False, callbacks=()))
    run, start = prepared.config, prepared.init_from
    base = prepare_base(run.base_model, chat=run.chat)
    check_packed(base)
    renderer, shape = ChatRenderer(load_tokenizer(base)), objective_of(run.objective).shape
    dataset = training_set(run.data, renderer, shape=shape, turns=trained_turns(run.objective))
    if run.workers.gpus_each:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    hardware = choose_hardware(use_gpu=run.workers.gpus_each > 0)
    with process_group(hardware.backend):
        engine = make_engine(run, base, hardware, init_from=local_adapter(start) if start is not None else None)
        source = dataset_source(run, dataset)
        schedule = make_schedule(run.optimizer, num_steps=source.num_steps)
        try:
            yield LocalTraining(run, engine, dataset, source, schedule)
        finally:
            engine.close()


@contextlib.contextmanager
def process_group(backend: str) -> Iterator[None]:
    """The caller's, torchrun's, or one of a single rank."""
    if dist.is_initialized():
        yield
        return
    before = dict(os.environ)
    alone: dict[str, Any] = {}
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # nobody else has to find it
    dist.init_process_group(backend, **alone)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name in OF_A_GROUP - before.keys():
            os.environ.pop(name, None)
