"""Our engine, base model only. The time includes the prompts' prefill, as on every side."""

from decode import decode

decode([])
