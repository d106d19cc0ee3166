"""One example of 8,192 tokens, all trained: our loop with activation checkpointing and logits in chunks."""

import bare_loop
from long_example import TOKENS, describe, write_config

if __name__ == "__main__":
    steps = bare_loop.train_bare(write_config())
    describe(steps[-1].seconds, steps[-1].loss, TOKENS)
