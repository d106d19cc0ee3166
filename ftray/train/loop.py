"""The algorithm. No ray and no deepspeed: an engine, a plan, a schedule and callbacks come from outside."""

import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from ftray.data.dataset import TokenizedDataset
from ftray.data.pack import pack
from ftray.data.plan import MicroBatch, StepPlan, divide
from ftray.model.packed import PackedRow
from ftray.train.loss_guard import LossGuard, suspects

if TYPE_CHECKING:  # importing it loads deepspeed
    from ftray.train.engine.deepspeed import TrainEngine


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl."""

    step: int  # 1 for the first
    loss: float  # mean over the step's trained tokens (sft, domain) or pairs (dpo), before its update
    learning_rate: float
    grad_norm: float  # before clipping
    num_tokens: int
    num_trained_tokens: int
    tokens_per_s: float  # over all ranks, trained or not
    seconds: float
    time: float  # of its end, since 1970
    mfu: float  # model FLOPs a second over the measured matmul rate of all workers
    memory_gib: float  # this worker's peak so far: of its GPU, or of its process
    metrics: dict[str, float]  # the objective's own, such as dpo's reward margin

    def as_dict(self) -> dict[str, float]:
        fields = vars(self).copy()
        return fields | fields.pop("metrics")


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

    def should_stop(self, step: int) -> bool: ...


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
    has_state = schedule.start_step > 0  # AdamW's moments exist from the first update on
    if has_state and callbacks.should_stop(schedule.start_step):  # workers that started again where they were to stop
        return schedule.start_step
    for step in range(schedule.start_step, schedule.num_steps):
        if step not in schedule.skipped:
            examples = plan.examples(step, end=schedule.end_position)
            micro_batches = plan.divide(examples, engine.num_shares)[engine.share]
            seed_step(seed, step=step, rank=rank)
            record = train_step(
                engine, dataset, examples, micro_batches, guard, callbacks, step=step, lr=learning_rate(step)
            )
            callbacks.on_step_end(record)
            has_state = True
        last = step + 1 == schedule.num_steps
        if evaluate is not None and (last or (step + 1) % schedule.evaluate_every == 0):
            callbacks.on_evaluated(step + 1, evaluate())
        stop = not last and callbacks.should_stop(step + 1)
        if has_state and (last or stop or (step + 1) % schedule.save_every == 0):
            callbacks.save(step + 1)
        if stop:
            return step + 1
    return schedule.num_steps


def train_step(
    engine: "TrainEngine",
    dataset: TokenizedDataset,
    examples: list[int],  # of the step, over all ranks: every rank knows them
    micro_batches: list[MicroBatch],  # this rank's share
    guard: LossGuard,
    callbacks: Callbacks,
    *,
    step: int,
    lr: float,
) -> StepRecord:
    began = time.perf_counter()
    num_trained = dataset.num_trained_tokens(examples)
    num_tokens = int(dataset.lengths[examples].sum())
    denominator = num_trained if engine.objective.unit == "token" else len(examples)
    step_loss = engine.forward_backward(packed_rows(dataset, micro_batches), denominator=denominator)
    if problem := guard.problem(step_loss.loss):
        callbacks.on_bad_loss(step + 1, problem, suspect_rows(engine, dataset, micro_batches))
    grad_norm = engine.optim_step(lr=lr)
    if not math.isfinite(grad_norm):  # the loss was finite, the update is not
        problem = f"the gradient norm is {grad_norm}"
        callbacks.on_bad_loss(step + 1, problem, suspect_rows(engine, dataset, micro_batches))
    seconds = time.perf_counter() - began
    return StepRecord(
        step=step + 1,
        loss=step_loss.loss,
        learning_rate=lr,
        grad_norm=grad_norm,
        num_tokens=num_tokens,
        num_trained_tokens=num_trained,
        tokens_per_s=num_tokens / seconds,
        seconds=seconds,
        time=time.time(),
        mfu=step_flops(engine, dataset, examples, num_tokens, num_trained) / seconds / engine.gemm_rate,
        memory_gib=peak_memory_gib(),
        metrics=step_loss.metrics,
    )


def step_flops(
    engine: "TrainEngine", dataset: TokenizedDataset, examples: list[int], num_tokens: int, num_trained: int
) -> float:
    lengths = dataset.sequence_lengths.reshape(len(dataset), -1)[examples]
    return engine.flops.step(
        num_tokens=num_tokens,
        num_trained=num_trained,
        sum_squared_lengths=int((lengths**2).sum()),
        trains_base=engine.trains_base,
        reference=engine.objective.needs_reference,
    )


def peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def suspect_rows(engine: "TrainEngine", dataset: TokenizedDataset, micro_batches: list[MicroBatch]) -> list[int]:
    """Row numbers in the source of what the bad loss may come from, over all ranks."""
    own = [
        (loss, [int(dataset.rows[i]) for i in examples])
        for loss, examples in zip(engine.micro_batch_losses, micro_batches, strict=True)
        if examples
    ]
    return suspects([found for rank in engine.gather(own) for found in rank])


def evaluation_rows(
    dataset: TokenizedDataset, engine: "TrainEngine", *, token_budget: int
) -> Callable[[], Iterator[PackedRow]]:
    shares = divide(range(len(dataset)), dataset.lengths, world_size=engine.num_shares, token_budget=token_budget)
    return lambda: packed_rows(dataset, shares[engine.share])


def packed_rows(dataset: TokenizedDataset, micro_batches: list[MicroBatch]) -> Iterator[PackedRow]:
    return (pack(dataset, examples) for examples in micro_batches)


def seed_step(seed: int, *, step: int, rank: int) -> None:
    """Dropout noise depends on (seed, step, rank) alone, so a resumed run at the same world size repeats it."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)
