"""transformers `generate`, base model only."""

from generate import generate
from shared import BASE
from transformers import AutoModelForCausalLM

generate(AutoModelForCausalLM.from_pretrained(BASE.directory))
