"""The algorithm. No ray and no deepspeed: an engine, a plan, a schedule and callbacks come from outside."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from ftray.data.pack import pack
from ftray.data.plan import MicroBatch, StepPlan, divide
from ftray.data.tokens import TokenizedDataset
from ftray.model.packed import PackedRow
from ftray.train.guard import LossGuard, suspects

if TYPE_CHECKING:  # importing it loads deepspeed
    from ftray.train.engine import TrainEngine


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl."""

    step: int  # 1 for the first
    loss: float  # mean over the step's trained tokens, before its update
    learning_rate: float
    grad_norm: float  # before clipping
    num_tokens: int
    num_trained_tokens: int
    tokens_per_s: float  # over all ranks, trained or not
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """When things happen, in steps."""

    start_step: int
    num_steps: int
    end_position: int | None  # positions of the order that exist: epochs x examples
    evaluate_every: int
    save_every: int
    skipped: frozenset[int] = frozenset()  # steps that broke the loss in an earlier try


class Callbacks(Protocol):
    """What a run does besides training. Every rank calls each of them at the same step."""

    def on_bad_loss(self, step: int, problem: str, rows: list[int]) -> None:
        """Raises: the update is not made."""
        ...

    def on_step_end(self, record: StepRecord) -> None: ...

    def on_evaluated(self, step: int, loss: float) -> None: ...

    def save(self, step: int) -> None: ...

    def should_stop(self) -> bool: ...


def train(
    engine: "TrainEngine",
    dataset: TokenizedDataset,
    plan: StepPlan,
    learning_rate: Callable[[int], float],
    schedule: Schedule,
    guard: LossGuard,
    callbacks: Callbacks,
    *,
    rank: int,
    seed: int,
    evaluate: Callable[[], float] | None,
) -> int:
    """Returns the number of steps done: fewer than all when it was asked to stop, after a save."""
    for step in range(schedule.start_step, schedule.num_steps):
        if step in schedule.skipped:
            continue
        began = time.perf_counter()
        examples = plan.examples(step, end=schedule.end_position)
        count = dataset.num_trained_tokens(examples)  # every rank knows the whole step
        num_tokens = int(dataset.lengths[examples].sum())
        seed_step(seed, step=step, rank=rank)
        micro_batches = plan.divide(examples, engine.world_size)[rank]
        loss = engine.forward_backward(packed_rows(dataset, micro_batches), denominator=count)
        if problem := guard.problem(loss):
            callbacks.on_bad_loss(step + 1, problem, suspect_rows(engine, dataset, micro_batches))
        lr = learning_rate(step)
        grad_norm = engine.optim_step(lr=lr)
        seconds = time.perf_counter() - began
        record = StepRecord(step + 1, loss, lr, grad_norm, num_tokens, count, num_tokens / seconds, seconds)
        callbacks.on_step_end(record)
        last = step + 1 == schedule.num_steps
        if evaluate is not None and (last or (step + 1) % schedule.evaluate_every == 0):
            callbacks.on_evaluated(step + 1, evaluate())
        stop = not last and callbacks.should_stop()
        if last or stop or (step + 1) % schedule.save_every == 0:
            callbacks.save(step + 1)
        if stop:
            return step + 1
    return schedule.num_steps


def suspect_rows(engine: "TrainEngine", dataset: TokenizedDataset, micro_batches: list[MicroBatch]) -> list[int]:
    """Row numbers in the source of what the bad loss may come from, over all ranks."""
    own = [
        (loss, [int(dataset.rows[i]) for i in examples])
        for loss, examples in zip(engine.micro_batch_losses, micro_batches, strict=True)
        if examples
    ]
    return suspects([found for rank in engine.gather(own) for found in rank])


def evaluation_rows(
    dataset: TokenizedDataset, *, token_budget: int, world_size: int, rank: int
) -> Callable[[], Iterator[PackedRow]]:
    shares = divide(range(len(dataset)), dataset.lengths, world_size=world_size, token_budget=token_budget)
    return lambda: packed_rows(dataset, shares[rank])


def packed_rows(dataset: TokenizedDataset, micro_batches: list[MicroBatch]) -> Iterator[PackedRow]:
    return (pack(dataset, examples) for examples in micro_batches)


def seed_step(seed: int, *, step: int, rank: int) -> None:
    """Dropout noise depends on (seed, step, rank) alone, so a resumed run at the same world size repeats it."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)
