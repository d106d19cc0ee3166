"""PEFT's mixed batch: `generate(adapter_names=...)` over the same 8 adapters."""

from generate import generate
from peft import PeftModel
from shared import BASE, SEQUENCES, random_adapters
from transformers import AutoModelForCausalLM

adapters = random_adapters()
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE.directory), adapters[0], adapter_name="0")
for number, directory in enumerate(adapters[1:], start=1):
    model.load_adapter(directory, adapter_name=str(number))
model.eval()
generate(model, adapter_names=[str(i % len(adapters)) for i in range(SEQUENCES)])
