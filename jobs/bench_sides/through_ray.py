"""Our training as users start it, one worker through Ray Train, as several sides run it: seconds a step from the end of
one to the end of a later one, so that whatever lies between steps counts."""

import json
import tempfile
from pathlib import Path

from shared import ALPACA, LEARNING_RATE, write_alpaca_rows

from ftray.config import parse_config
from ftray.tracking.metrics import read_metrics
from ftray.train.launch import launch
from ftray.train.on_ray.trainer import Watcher
from ftray.train.prepare import prepare

STEPS = 41  # two saves with one every 20 steps
EXAMPLES_PER_STEP = 2


def write_config(directory: Path, overrides: tuple[str, ...]):
    rows = write_alpaca_rows(directory)
    text = f"""
kind: run
name: bench
base_model: smollm2-135m
max_steps: {STEPS}
data: {{train: {rows}, max_example_tokens: 1024}}
optimizer: {{learning_rate: {LEARNING_RATE}, schedule: constant}}
batch: {{examples_per_step: {EXAMPLES_PER_STEP}, tokens_per_micro_batch: 1024}}
checkpoint: {{every: 100000, keep: 1}}
runs_dir: {directory}/runs
"""
    return parse_config(text, overrides, kind="run", source=str(ALPACA))


def report(steps: list[dict]) -> None:
    """From the end of the first step to the end of the last but one: the last one's save is not beside any training."""
    timed = steps[1:-1]
    elapsed = timed[-1]["time"] - steps[0]["time"]
    result = {
        "tokens_per_s": round(sum(step["num_tokens"] for step in timed) / elapsed, 1),
        "s_per_step": round(elapsed / len(timed), 3),
        "s_in_steps": round(sum(step["seconds"] for step in timed) / len(timed), 3),
    }
    print(json.dumps(result))


def run(*overrides: str) -> None:
    with tempfile.TemporaryDirectory(prefix="ftray-bench-") as scratch:
        config = write_config(Path(scratch), overrides)
        watcher = Watcher(log=lambda text: None, on_metrics=lambda records: None, on_start=lambda first, total: None)
        launch(prepare(config), watcher)
        report([r for r in read_metrics(Path(config.runs_dir) / config.name) if "loss" in r])
