"""`gpu_decode.py ENGINE SIZE NEW_TOKENS NUM_SEQUENCES ...`: an engine (torch, vllm) with and without 8 adapters of rank
16; tokens/s and the median time to a first token as JSON."""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from random_model import write_random_model

from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.infer.engines import load_adapter
from ftray.infer.protocol import Request, SamplingParams
from ftray.model.base import prepare_base
from ftray.model.hardware import choose_hardware

RANK, ADAPTERS, PROMPT_TOKENS = 16, 8, 128


def main(kind: str, size: str, new_tokens: int, batches: list[int]) -> None:
    with tempfile.TemporaryDirectory(prefix="ftray-gpu-") as scratch:
        base = prepare_base(str(write_random_model(Path(scratch) / "base", size)))
        adapters = write_adapters(Path(scratch) / "adapters", base.directory)
        engine = make_engine(kind, base, max_sequences=max(batches), new_tokens=new_tokens)
        for path in adapters:
            load_adapter(engine, path.name, path)
        names: list[str | None] = [path.name for path in adapters]
        decode(engine, [None, *names], count=2, new_tokens=4, first=3)  # warms up
        figures = {}
        for count in batches:
            for label, chosen in (("base", [None]), ("adapters", names)):
                rate, first = decode(engine, chosen, count=count, new_tokens=new_tokens, first=3 + count)
                figures[f"{count}_{label}_tokens_per_s"] = round(rate, 1)
                figures[f"{count}_{label}_first_token_ms"] = round(first * 1000, 1)
        engine.close()
    print(json.dumps(figures))


def make_engine(kind: str, base, *, max_sequences: int, new_tokens: int):
    context = PROMPT_TOKENS + new_tokens
    config = EngineConfig(
        type=kind,  # pyright: ignore[reportArgumentType]  as it is written on the command line
        max_sequences=max_sequences,
        context_tokens=context,
        kv_cache_tokens=max(16384, max_sequences * context),
        max_prefill_tokens=4096,
    )
    adapters = AdaptersConfig.model_validate({"max_rank": RANK, "device_budget": "4GiB", "host_budget": "4GiB"})
    if kind == "vllm":
        from ftray.infer.vllm_engine.engine import VllmEngine

        return VllmEngine(base, choose_hardware(), config, adapters)
    from ftray.infer.torch_engine.engine import TorchEngine

    return TorchEngine(base, choose_hardware(), config, adapters)


def write_adapters(root: Path, base: Path) -> list[Path]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), config)
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.01)
        model.save_pretrained(str(root / f"a{number}"))
    return sorted(root.iterdir())


def decode(engine, adapters: Sequence[str | None], *, count: int, new_tokens: int, first: int) -> tuple[float, float]:
    """(tokens/s, median seconds to a first token) of `count` prompts that no cache of prompts knows."""
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    began, seen = time.perf_counter(), {}
    for i in range(count):
        prompt = [3 + (first * 131 + i * 17 + j * 7) % 250 for j in range(PROMPT_TOKENS)]
        engine.add(Request(str(i), prompt, sampling, adapters[i % len(adapters)]))
    while engine.has_work:
        for event in engine.step():
            seen.setdefault(event.request_id, time.perf_counter() - began)
    return count * new_tokens / (time.perf_counter() - began), statistics.median(seen.values())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(count) for count in sys.argv[4:]])
