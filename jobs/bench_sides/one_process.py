"""Our loop and engine in one process of one rank, without Ray and without saves."""

import sys
from typing import Any

import torch

import ftray
from ftray.config import RunConfig
from ftray.train.loop import Schedule, Training, train
from ftray.train.loss_guard import LossGuard
from ftray.train.step_record import StepRecord


class Recorder:
    """The loop's callbacks; nothing is saved or evaluated."""

    def __init__(self):
        self.steps: list[StepRecord] = []

    def on_step_end(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_bad_loss(self, step: int, problem: str, rows: list[int]) -> None:
        sys.exit(f"step {step}: {problem}")

    def on_evaluated(self, step: int, evaluated: Any) -> None: ...

    def save(self, step: int) -> None: ...

    def should_stop(self, step: int) -> bool:
        return False


def train_bare(config: RunConfig, *, num_threads: int | None = None) -> list[StepRecord]:
    """All steps of the config, in this process."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    recorder = Recorder()
    with ftray.open_training(config) as opened:
        schedule = Schedule(
            0,
            opened.num_steps,
            evaluate_every=10**9,
            save_every=10**9,
            learning_rate=opened.learning_rate,
        )
        training = Training(opened.source, schedule, config.seed, config.batch.tokens_per_micro_batch)
        train(opened.engine, training, LossGuard(config.guard), recorder)
    return recorder.steps
