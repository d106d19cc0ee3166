"""TRL's SFTTrainer: the same rows in the same order, rank, batch and steps; padded batches, as it comes."""

import json
import tempfile
import time
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from shared import ALPHA, BASE, BATCH, LEARNING_RATE, MAX_TOKENS, RANK, STEPS, alpaca_messages, peak_gib
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

tokenizer = AutoTokenizer.from_pretrained(BASE.directory)
# The base model's own template, with the marker by which TRL finds the assistant's tokens.
tokenizer.chat_template = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Clock(TrainerCallback):
    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


clock = Clock()
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(BASE.directory),
    args=SFTConfig(
        output_dir=tempfile.mkdtemp(),
        assistant_only_loss=True,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        max_length=MAX_TOKENS,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list([{"messages": messages} for messages in alpaca_messages()]),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[clock],
)
trainer._get_train_sampler = lambda *_: None  # in the order of the rows, as our side  # pyright: ignore
tokenized: Any = trainer.train_dataset
lengths = [len(row["input_ids"]) for row in tokenized]
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
timed_tokens = sum(lengths[BATCH : STEPS * BATCH])
result = {
    "tokens_per_s": round(timed_tokens / (clock.ends[-1] - clock.ends[0]), 1),
    "peak_gib": peak_gib(),
    "mean_loss": sum(losses) / len(losses),
    "num_tokens": sum(lengths[: STEPS * BATCH]),
}
print(json.dumps(result))
