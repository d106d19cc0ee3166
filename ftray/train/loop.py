"""The algorithm. No ray and no deepspeed: an engine, a plan, a schedule and two callbacks come from outside."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ftray.data.pack import pack
from ftray.data.plan import MicroBatch, StepPlan, divide
from ftray.data.tokens import TokenizedDataset
from ftray.model.packed import PackedRow

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


def train(
    engine: "TrainEngine",
    dataset: TokenizedDataset,
    plan: StepPlan,
    learning_rate: Callable[[int], float],
    schedule: Schedule,
    *,
    rank: int,
    seed: int,
    evaluate: Callable[[], float] | None,
    on_step_end: Callable[[StepRecord], None],
    on_evaluated: Callable[[int, float], None],
    save: Callable[[int], None],
) -> None:
    for step in range(schedule.start_step, schedule.num_steps):
        began = time.perf_counter()
        examples = plan.examples(step, end=schedule.end_position)
        count = dataset.num_trained_tokens(examples)  # every rank knows the whole step
        num_tokens = int(dataset.lengths[examples].sum())
        seed_step(seed, step=step, rank=rank)
        rows = packed_rows(dataset, plan.divide(examples, engine.world_size)[rank])
        loss = engine.forward_backward(rows, denominator=count)
        lr = learning_rate(step)
        grad_norm = engine.optim_step(lr=lr)
        seconds = time.perf_counter() - began
        on_step_end(StepRecord(step + 1, loss, lr, grad_norm, num_tokens, count, num_tokens / seconds, seconds))
        last = step + 1 == schedule.num_steps
        if evaluate is not None and (last or (step + 1) % schedule.evaluate_every == 0):
            on_evaluated(step + 1, evaluate())
        if last or (step + 1) % schedule.save_every == 0:
            save(step + 1)


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
