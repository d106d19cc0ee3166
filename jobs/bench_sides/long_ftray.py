"""One example of 8,192 tokens, all trained: our loop with activation checkpointing and logits in chunks."""

from long_example import TOKENS, describe, write_config
from one_process import train_bare

if __name__ == "__main__":
    steps = train_bare(write_config())
    describe(steps[-1].seconds, steps[-1].loss, TOKENS)
