"""Our loop and engine (DeepSpeed ZeRO-2, one rank) without Ray, as several sides run it."""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from shared import ALPACA, ALPHA, BASE, BATCH, LEARNING_RATE, MAX_TOKENS, RANK, STEPS, peak_gib, write_alpaca_rows

from ftray.config import RunConfig, parse_config
from ftray.data.plan import plan_steps
from ftray.data.tokens import tokenize_source
from ftray.model.base import load_tokenizer
from ftray.model.chat import ChatRenderer
from ftray.model.hardware import choose_hardware
from ftray.train.guard import LossGuard
from ftray.train.loop import Schedule, StepRecord, train
from ftray.train.schedule import make_schedule
from ftray.train.worker import make_engine


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


def train_bare(config: RunConfig, *, num_threads: int | None = None) -> list[StepRecord]:
    """All steps of the config, in this process."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    dist.init_process_group("gloo", rank=0, world_size=1)
    renderer = ChatRenderer(load_tokenizer(BASE))
    dataset = tokenize_source("data.train", config.data.train, config.data, renderer, objective=config.objective.type)
    engine = make_engine(config, BASE, choose_hardware())
    plan = plan_steps(config, dataset.lengths)
    num_steps = plan.num_steps(epochs=config.epochs, max_steps=config.max_steps)
    recorder = Recorder()
    train(
        engine,
        dataset,
        plan,
        make_schedule(config.optimizer, num_steps=num_steps),
        Schedule(0, num_steps, None, evaluate_every=10**9, save_every=10**9),
        LossGuard(config.guard),
        recorder,
        rank=0,
        seed=config.seed,
        evaluate=None,
    )
    dist.destroy_process_group()
    return recorder.steps


def run(*overrides: str) -> None:
    """The training of mixed-length chat rows that others are compared with."""
    rows = write_alpaca_rows(Path(tempfile.mkdtemp()))
    text = f"""
kind: run
name: bench
base_model: smollm2-135m
max_steps: {STEPS}
data: {{train: {rows}, shuffle: false, max_example_tokens: {MAX_TOKENS}}}
adapter: {{rank: {RANK}, alpha: {ALPHA}}}
optimizer: {{learning_rate: {LEARNING_RATE}, schedule: constant}}
batch: {{examples_per_step: {BATCH}, tokens_per_micro_batch: {MAX_TOKENS}}}
"""
    steps = train_bare(parse_config(text, overrides, kind="run", source=str(ALPACA)))
    timed = steps[1:]
    result = {
        "tokens_per_s": round(sum(s.num_tokens for s in timed) / sum(s.seconds for s in timed), 1),
        "peak_gib": peak_gib(),
        "first_step_s": round(steps[0].seconds, 1),
        "mean_loss": sum(s.loss for s in steps) / len(steps),
        "num_tokens": sum(s.num_tokens for s in steps),
    }
    print(json.dumps(result))
