"""Our loop and engine (DeepSpeed ZeRO-2, one rank): packed rows, logits at trained positions only."""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from shared import ALPACA, ALPHA, BASE, BATCH, LEARNING_RATE, MAX_TOKENS, RANK, STEPS, alpaca_messages, peak_gib

from ftray.config import parse_config
from ftray.data.plan import plan_steps
from ftray.data.tokens import tokenize_source
from ftray.model.base import load_tokenizer
from ftray.model.chat import ChatRenderer
from ftray.model.hardware import choose_hardware
from ftray.train.guard import LossGuard
from ftray.train.loop import Schedule, StepRecord, train
from ftray.train.schedule import make_schedule
from ftray.train.worker import make_engine

rows = Path(tempfile.mkdtemp()) / "rows.jsonl"
rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in alpaca_messages()))
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
config = parse_config(text, kind="run", source=str(ALPACA))
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
dist.init_process_group("gloo", rank=0, world_size=1)
dataset = tokenize_source("data.train", config.data.train, config.data, ChatRenderer(load_tokenizer(BASE)))
engine = make_engine(config, BASE, choose_hardware())


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

    def should_stop(self) -> bool:
        return False


recorder = Recorder()
train(
    engine,
    dataset,
    plan_steps(config, dataset.lengths),
    make_schedule(config.optimizer, num_steps=STEPS),
    Schedule(0, STEPS, None, evaluate_every=10**9, save_every=10**9),
    LossGuard(config.guard),
    recorder,
    rank=0,
    seed=0,
    evaluate=None,
)
steps = recorder.steps
timed = steps[1:]
result = {
    "tokens_per_s": round(sum(s.num_tokens for s in timed) / sum(s.seconds for s in timed), 1),
    "peak_gib": peak_gib(),
    "mean_loss": sum(s.loss for s in steps) / len(steps),
    "num_tokens": sum(s.num_tokens for s in steps),
}
print(json.dumps(result))
dist.destroy_process_group()
