"""transformers' generate over the same prompts, for the other sides."""

from typing import Any

import torch
from shared import BASE, decode_in_rounds
from transformers import AutoTokenizer


@torch.inference_mode()
def generate(model: Any, **options: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE.directory)

    def run(prompts: list[list[int]], new_tokens: int) -> None:
        batch = torch.tensor(prompts)
        limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), do_sample=False, **limits, **options)

    decode_in_rounds(run, tokenizer)
