"""Our engine, 8 adapters of mixed rank in one batch: two of rank 4, two of 8, four of 16."""

from decode import decode
from shared import random_adapters

decode([*random_adapters(rank=4)[:2], *random_adapters(rank=8)[2:4], *random_adapters(rank=16)[4:]])
