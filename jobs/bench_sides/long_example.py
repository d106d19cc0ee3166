"""What both sides of the long example share: the document and what is told."""

import json
import random
import tempfile
from pathlib import Path

from shared import ALPHA, BASE, LEARNING_RATE, RANK, peak_gib

from ftray.config import parse_config
from ftray.model.base import load_tokenizer

TOKENS, STEPS = 8192, 1
WORDS = "the sea was calm and grey that morning while they walked along the shore and spoke of nothing at all"


def write_document() -> Path:
    rng = random.Random(0)
    tokenizer = load_tokenizer(BASE)
    text = " ".join(rng.choices(WORDS.split(), k=2 * TOKENS))
    ids = tokenizer(text)["input_ids"][: TOKENS - 8]  # the end token and some slack for words that split otherwise
    path = Path(tempfile.mkdtemp(prefix="ftray-bench-")) / "document.jsonl"
    path.write_text(json.dumps({"text": tokenizer.decode(ids)}) + "\n")
    return path


def write_config():
    text = f"""
kind: run
name: bench
base_model: smollm2-135m
max_steps: {STEPS}
data: {{train: {write_document()}, columns: {{text: text}}, max_example_tokens: {TOKENS}}}
objective: {{type: text}}
adapter: {{rank: {RANK}, alpha: {ALPHA}}}
optimizer: {{learning_rate: {LEARNING_RATE}, schedule: constant}}
batch: {{examples_per_step: 1, tokens_per_micro_batch: {TOKENS}}}
memory: {{activation_checkpointing: true}}
"""
    return parse_config(text, kind="run", source="long_example.py")


def describe(seconds: float, loss: float, tokens: int) -> None:
    print(json.dumps({"tokens_per_s": round(tokens / seconds, 1), "peak_gib": peak_gib(), "loss": loss}))
