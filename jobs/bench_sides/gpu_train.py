"""`gpu_train.py SIZE STEPS EXAMPLES_PER_STEP EXAMPLE_TOKENS [key=value ...]`: its figures as JSON."""

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from one_process import train_bare
from random_model import write_random_model

from ftray.config import parse_config


def main(size: str, steps: int, examples: int, tokens: int, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="ftray-gpu-") as scratch:
        directory = Path(scratch)
        pairs = any(override.startswith("objective=") and "dpo" in override for override in overrides)
        rows = write_rows(directory / "rows.jsonl", count=steps * examples, tokens=tokens, pairs=pairs)
        base = write_random_model(directory / "base", size)
        longest = tokens * (2 if pairs else 1)
        text = f"""
kind: run
name: gpu-check
base_model: {base}
max_steps: {steps}
data: {{train: {rows}, max_example_tokens: {tokens}}}
optimizer: {{learning_rate: 1e-3, schedule: constant}}
batch: {{examples_per_step: {examples}, tokens_per_micro_batch: {max(longest, min(16384, examples * longest))}}}
workers: {{gpus_each: {int(torch.cuda.is_available())}}}
"""
        config = parse_config(text, overrides, kind="run", source="gpu_check")
        done = train_bare(config)
    timed = done[len(done) // 3 :]  # the first steps warm up
    figures = {
        "first_loss": round(done[0].loss, 4),
        "last_loss": round(done[-1].loss, 4),
        "tokens_per_s": round(sum(s.num_tokens for s in timed) / sum(s.seconds for s in timed), 1),
        "mfu": round(sum(s.mfu for s in timed) / len(timed), 4),
        "peak_gib": round(done[-1].memory_gib, 2),
    }
    print(json.dumps(figures))


def write_rows(path: Path, *, count: int, tokens: int, pairs: bool) -> Path:
    """Made-up text of one token a byte; with its template a row has nearly `tokens`."""
    draw = random.Random(0)
    words = ["card", "lost", "money", "transfer", "pin", "rate", "refund", "help", "where", "my", "is", "the"]

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length))[:length]

    with path.open("w") as file:
        for _ in range(count):
            ask, answer = text(tokens // 4), text(tokens // 2)
            turn = {"role": "assistant", "content": answer}
            row: dict = {"messages": [{"role": "user", "content": ask}, turn]}
            if pairs:
                row = {
                    "prompt": row["messages"][:1],
                    "chosen": [turn],
                    "rejected": [{**turn, "content": text(tokens // 3)}],
                }
            file.write(json.dumps(row) + "\n")
    return path


if __name__ == "__main__":
    steps, examples, tokens = map(int, sys.argv[2:5])
    main(sys.argv[1], steps, examples, tokens, sys.argv[5:])
