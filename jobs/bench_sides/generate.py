"""transformers' generate over the same prompts, for the other sides."""

import json
import time
from typing import Any

import torch
from shared import BASE, NEW_TOKENS, SEQUENCES, decoding_prompts, peak_gib
from transformers import AutoTokenizer


@torch.inference_mode()
def generate(model: Any, **options: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE.directory)

    def run(prompts: list[list[int]], new_tokens: int) -> float:
        batch = torch.tensor(prompts)
        began = time.perf_counter()
        limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), do_sample=False, **limits, **options)
        return time.perf_counter() - began

    run(decoding_prompts(tokenizer, warm_up=True), 4)
    seconds = run(decoding_prompts(tokenizer), NEW_TOKENS)
    print(json.dumps({"tokens_per_s": round(SEQUENCES * NEW_TOKENS / seconds, 1), "peak_gib": peak_gib()}))
