"""transformers' generate over the same prompts, for the other sides."""

import json
from typing import Any

import torch
from shared import BASE, decoding_rate, peak_gib
from transformers import AutoTokenizer


@torch.inference_mode()
def generate(model: Any, **options: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE.directory)

    def run(prompts: list[list[int]], new_tokens: int) -> None:
        batch = torch.tensor(prompts)
        limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), do_sample=False, **limits, **options)

    print(json.dumps({"tokens_per_s": decoding_rate(run, tokenizer), "peak_gib": peak_gib()}))
