"""Our loop and engine (DeepSpeed ZeRO-2, one rank) without Ray, as several sides run it."""

import json
import tempfile
from pathlib import Path

from one_process import train_bare
from shared import ALPACA, ALPHA, BATCH, LEARNING_RATE, MAX_TOKENS, RANK, STEPS, peak_gib, write_alpaca_rows

from ftray.config import parse_config


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
