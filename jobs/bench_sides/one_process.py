"""Our loop and engine in one process of one rank, without Ray and without saves."""

import os
import sys

import torch
import torch.distributed as dist

from ftray.config import RunConfig
from ftray.data.plan import plan_steps
from ftray.data.tokens import tokenize_source
from ftray.model.base import BaseModel, load_tokenizer
from ftray.model.chat import ChatRenderer
from ftray.model.hardware import choose_hardware
from ftray.objectives import objective_of
from ftray.train.engine.build import make_engine
from ftray.train.engine.schedule import make_schedule
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

    def on_evaluated(self, step: int, loss: float) -> None: ...

    def save(self, step: int) -> None: ...

    def should_stop(self, step: int) -> bool:
        return False


def train_bare(config: RunConfig, base: BaseModel, *, num_threads: int | None = None) -> list[StepRecord]:
    """All steps of the config, in this process."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    hardware = choose_hardware(use_gpu=config.workers.gpus_each > 0)
    dist.init_process_group(hardware.backend, rank=0, world_size=1)
    renderer = ChatRenderer(load_tokenizer(base))
    dataset = tokenize_source(
        "data.train", config.data.train, config.data, renderer, shape=objective_of(config.objective).shape
    )
    engine = make_engine(config, base, hardware)
    plan = plan_steps(config, dataset.lengths)
    num_steps = plan.num_steps(epochs=config.epochs, max_steps=config.max_steps)
    recorder = Recorder()
    schedule = Schedule(
        0,
        num_steps,
        None,
        evaluate_every=10**9,
        save_every=10**9,
        learning_rate=make_schedule(config.optimizer, num_steps=num_steps),
    )
    train(engine, Training(dataset, plan, schedule), LossGuard(config.guard), recorder)
    dist.destroy_process_group()
    return recorder.steps
