"""What the sides must have in common: rows, batch, rank, steps, prompts, adapters, and how memory is read."""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftray.model.base import prepare_base

BASE = prepare_base("smollm2-135m")
ALPACA = Path(__file__).parent / "data" / "alpaca.jsonl"

# training
STEPS = 4  # the first one warms up and is not timed
BATCH = 8
RANK, ALPHA = 16, 32
LEARNING_RATE = 2e-4
MAX_TOKENS = 1024

# decoding
SEQUENCES, NEW_TOKENS, ADAPTERS = 16, 64, 8
FIRST_TOKEN = 1000  # of a round's prompts, so that none begins as one before it
TOPICS = "sea wood city desert river farm moon island garden station market school harbour bridge castle valley"


def decoding_prompts(tokenizer: Any, *, warm_up: bool = False) -> list[list[int]]:
    """One for each sequence, all of one length and with no beginning in common, so that no cache of prompts helps."""
    topics = TOPICS.upper().split() if warm_up else TOPICS.split()
    ask = "stories: write a long letter to a friend about the weather, what you saw and what you had for dinner, by the"
    prompts = [tokenizer(f"{topic} {ask} {topic}")["input_ids"] for topic in topics]
    shortest = min(len(prompt) for prompt in prompts)
    return [prompt[:shortest] for prompt in prompts]


def decode_in_rounds(run: Callable[[list[list[int]], int], None], tokenizer: Any, *, tells_peak: bool = True) -> None:
    """After a short warm-up, a round of `run(prompts, new tokens)`, prefill included, for every line that comes in."""
    run(decoding_prompts(tokenizer, warm_up=True), 4)
    prompts = decoding_prompts(tokenizer)
    print(json.dumps({"ready": True}), flush=True)
    for number, _ in enumerate(sys.stdin):
        firsts = range(FIRST_TOKEN + number * SEQUENCES, FIRST_TOKEN + (number + 1) * SEQUENCES)
        of_round = [[first, *prompt] for first, prompt in zip(firsts, prompts, strict=True)]
        began = time.perf_counter()
        run(of_round, NEW_TOKENS)
        rate = SEQUENCES * NEW_TOKENS / (time.perf_counter() - began)
        peak = peak_gib() if tells_peak else None
        print(json.dumps({"tokens_per_s": round(rate, 1), "peak_gib": peak}), flush=True)


def alpaca_messages() -> list[list[dict]]:
    rows = [json.loads(line) for line in ALPACA.read_text().splitlines()][: STEPS * BATCH]
    return [
        [
            {"role": "user", "content": "\n\n".join(part for part in (r["instruction"], r["input"]) if part)},
            {"role": "assistant", "content": r["output"]},
        ]
        for r in rows
    ]


def write_alpaca_rows(directory: Path) -> Path:
    """As a file that ftray trains on."""
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in alpaca_messages()))
    return path


def peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def random_adapters(*, rank: int = RANK, dtype: str = "float32") -> list[Path]:
    directory = Path(tempfile.mkdtemp(prefix="ftray-bench-"))
    return write_adapters(directory, count=ADAPTERS, rank=rank, targets="all-linear", dtype=dtype)


def write_adapters(
    root: Path, *, count: int, rank: int, targets: str | list[str], dtype: str = "float32"
) -> list[Path]:
    """PEFT directories with a B that is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE.directory), config)
    made = []
    for number in range(count):
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.normal_(0, 0.01).to(getattr(torch, dtype))
        model.save_pretrained(str(root / str(number)))
        made.append(root / str(number))
    return made
