"""The algorithm. No ray and no deepspeed: an engine, what it goes through, a guard and callbacks come from outside."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ftray.data.dataset import TokenizedDataset
from ftray.data.examples import DatasetExample, Example, ExampleSource, examples_of
from ftray.data.micro_batches import divide
from ftray.data.pack import pack, pack_all
from ftray.model.packed import PackedRow
from ftray.objectives import Objective
from ftray.train.engine.protocol import StepLoss, TrainingEngine, combined
from ftray.train.loss_guard import LossGuard, suspects
from ftray.train.step_record import StepRecord, record_step


@dataclass(frozen=True)
class Schedule:
    """When things happen, in steps."""

    start_step: int
    num_steps: int
    evaluate_every: int
    save_every: int
    learning_rate: Callable[[int], float]  # of a step; 0 for the first
    skipped: frozenset[int] = frozenset()  # steps that broke the loss in an earlier try


@dataclass(frozen=True)
class Training:
    """What a run goes through."""

    source: ExampleSource
    schedule: Schedule
    seed: int
    token_budget: int  # of a micro-batch
    evaluate: Callable[[], StepLoss] | None = None


class Callbacks(Protocol):
    """What a run does besides training. Every rank calls each of them at the same step."""

    def on_bad_loss(self, step: int, problem: str, rows: list[int]) -> None:
        """Raises: the update is not made."""
        ...

    def on_step_end(self, record: StepRecord) -> None: ...

    def on_evaluated(self, step: int, evaluated: StepLoss) -> None: ...

    def save(self, step: int) -> None: ...

    def should_stop(self, step: int) -> bool: ...


def train(engine: TrainingEngine, training: Training, guard: LossGuard, callbacks: Callbacks) -> int:
    """Returns the number of steps done: fewer than all when it was asked to stop, after a save."""
    schedule = training.schedule
    has_state = schedule.start_step > 0  # AdamW's moments exist from the first update on
    if has_state and callbacks.should_stop(schedule.start_step):  # workers that started again where they were to stop
        return schedule.start_step
    for step in range(schedule.start_step, schedule.num_steps):
        if step not in schedule.skipped:
            callbacks.on_step_end(train_step(engine, training, guard, callbacks, step=step))
            has_state = True
        last = step + 1 == schedule.num_steps
        if training.evaluate is not None and (last or (step + 1) % schedule.evaluate_every == 0):
            callbacks.on_evaluated(step + 1, training.evaluate())
        stop = not last and callbacks.should_stop(step + 1)
        if has_state and (last or stop or (step + 1) % schedule.save_every == 0):
            callbacks.save(step + 1)
        if stop:
            return step + 1
    return schedule.num_steps


def train_step(
    engine: TrainingEngine, training: Training, guard: LossGuard, callbacks: Callbacks, *, step: int
) -> StepRecord:
    examples = training.source.step(step)  # over all ranks: every rank knows them
    shares = divide(examples, world_size=engine.num_shares, token_budget=training.token_budget)
    micro_batches = shares[engine.share]
    seed_step(training.seed, step=step, rank=engine.rank)
    began = time.perf_counter()
    denominator = denominator_of(engine.objective, examples)
    step_loss = engine.forward_backward(pack_all(training.source, micro_batches), denominator=denominator)
    if problem := guard.problem(step_loss.loss):
        callbacks.on_bad_loss(step + 1, problem, suspect_rows(engine, micro_batches))
    learning_rate = training.schedule.learning_rate(step)
    grad_norm = engine.optim_step(lr=learning_rate)
    if not math.isfinite(grad_norm):  # the loss was finite, the update is not
        problem = f"the gradient norm is {grad_norm}"
        callbacks.on_bad_loss(step + 1, problem, suspect_rows(engine, micro_batches))
    return record_step(
        examples,
        engine.meter,
        step=step + 1,
        loss=step_loss.loss,
        metrics=step_loss.metrics,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        seconds=time.perf_counter() - began,
    )


def denominator_of(objective: Objective, examples: Sequence[Example]) -> int:
    """What the loss of a step of these examples is a mean over: trained tokens, or examples."""
    return sum(example.num_trained for example in examples) if objective.unit == "token" else len(examples)


def suspect_rows(engine: TrainingEngine, micro_batches: list[list[Example]]) -> list[int]:
    """Row numbers in the source of what the bad loss may come from, over all ranks."""
    own = [
        (loss, [example.row for example in examples])
        for loss, examples in zip(engine.micro_batch_losses, micro_batches, strict=True)
        if examples
    ]
    return suspects([found for rank in engine.gather(own) for found in rank])


def evaluator(dataset: TokenizedDataset, engine: TrainingEngine, *, token_budget: int) -> Callable[[], StepLoss]:
    """Evaluates the whole set, and where it has several sources each of them."""
    parts = by_source(dataset)
    rows = {name: rows_of(dataset, chosen, engine, token_budget=token_budget) for name, chosen in parts.items()}
    if len(rows) == 1:
        (only,) = rows.values()
        return lambda: engine.evaluate(only())
    counts = {name: denominator_of(engine.objective, chosen) for name, chosen in parts.items()}
    return lambda: combined({name: engine.evaluate(of_source()) for name, of_source in rows.items()}, counts)


def by_source(dataset: TokenizedDataset) -> dict[str, list[DatasetExample]]:
    """The examples of each source that has some."""
    numbers = {name: dataset.examples_of_source(number) for number, name in enumerate(dataset.names)}
    return {name: examples_of(dataset, chosen.tolist()) for name, chosen in numbers.items() if len(chosen)}


def rows_of(
    dataset: TokenizedDataset, examples: Sequence[Example], engine: TrainingEngine, *, token_budget: int
) -> Callable[[], Iterator[PackedRow]]:
    """This rank's share of them."""
    shares = divide(examples, world_size=engine.num_shares, token_budget=token_budget)
    num_sequences = dataset.sequences_per_example
    return lambda: (pack(together, num_sequences=num_sequences) for together in shares[engine.share])


def seed_step(seed: int, *, step: int, rank: int) -> None:
    """Dropout noise depends on (seed, step, rank) alone, so a resumed run at the same world size repeats it."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)
