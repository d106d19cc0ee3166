"""One line of metrics.jsonl for a step, and how fast the step was against what the hardware can do."""

import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ftray.data.examples import Example
from ftray.model.flops import ModelFlops


@dataclass(frozen=True)
class StepRecord:
    step: int  # 1 for the first
    loss: float  # mean over the step's trained tokens (sft, text) or pairs (dpo), before its update
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
class FlopsMeter:
    model: ModelFlops
    gemm_rate: float  # measured FLOPs a second of all workers
    trains_base: bool
    reference: bool  # whose forward pass comes beside the policy's

    def step(self, examples: Sequence[Example]) -> float:
        """Model FLOPs of a step of these examples."""
        return self.model.step(
            num_tokens=sum(example.length for example in examples),
            num_trained=sum(example.num_trained for example in examples),
            lengths=Counter(len(ids) for example in examples for ids, _ in example.sequences),
            trains_base=self.trains_base,
            reference=self.reference,
        )


def record_step(
    examples: Sequence[Example],  # of the step, over all ranks
    meter: FlopsMeter,
    *,
    step: int,
    loss: float,
    metrics: dict[str, float],
    learning_rate: float,
    grad_norm: float,
    seconds: float,
) -> StepRecord:
    num_tokens = sum(example.length for example in examples)
    return StepRecord(
        step=step,
        loss=loss,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        num_tokens=num_tokens,
        num_trained_tokens=sum(example.num_trained for example in examples),
        tokens_per_s=num_tokens / seconds,
        seconds=seconds,
        time=time.time(),
        mfu=meter.step(examples) / seconds / meter.gemm_rate,
        memory_gib=peak_memory_gib(),
        metrics=metrics,
    )


def peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
