"""The same by transformers and PEFT: sdpa, gradient checkpointing, and the loss of the model's own forward."""

import json
import time

import torch
from long_example import STEPS, TOKENS, describe, write_document
from peft import LoraConfig, get_peft_model
from shared import ALPHA, BASE, LEARNING_RATE, RANK
from transformers import AutoModelForCausalLM

from ftray.model.base import load_tokenizer

if __name__ == "__main__":
    tokenizer = load_tokenizer(BASE)
    text = json.loads(write_document().read_text())["text"]
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    model = AutoModelForCausalLM.from_pretrained(BASE.directory, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for _ in range(STEPS):
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    describe(time.perf_counter() - began, loss.item(), TOKENS)
